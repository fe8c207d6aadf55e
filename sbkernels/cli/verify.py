"""`sbk verify`: the differential harness, its record, and whether the record still holds."""

from __future__ import annotations

import pathlib

from rich.markup import escape

from ..dispatch import BackendError, availability_text
from ..verify import record
from ..verify import report as reporting
from ..verify import run as harness
from .main import EXCEEDED, INTERRUPTED, OK
from .mutants import mutants
from .shared import backend_names, check_device, check_dtypes, label, out, progress_bar, table


def verify(arguments) -> int:
    """Exit status 1 when a case fails, or a record is stale."""
    if arguments.check_record is not None:
        return check_records([pathlib.Path(p) for p in arguments.check_record] or sorted(record.FOLDER.glob("*.json")))
    if arguments.mutants:
        return mutants(arguments)
    device = check_device(arguments.device)
    jobs, missing = harness.plan(device, backend_names(arguments.backend), check_dtypes(arguments.dtype), arguments.quick)
    if not jobs:
        raise BackendError(f"nothing to verify on {device}\n{availability_text()}")
    outcomes, interrupted = [], False
    with progress_bar() as bar:
        task = bar.add_task("", total=len(jobs))

        def advance(outcome):
            outcomes.append(outcome)
            bar.update(task, advance=1, description=f"{label(outcome.backend, outcome.variant)} {outcome.dtype} {outcome.name}")
            if not outcome.ok:
                bar.console.print(f"FAILED {describe(outcome)}", markup=False, soft_wrap=True)

        try:
            harness.run(jobs, device, advance, arguments.processes)
        except KeyboardInterrupt:
            interrupted = True
    rows = harness.summary(outcomes)
    numbers = ("run", "skipped", "failed", "worst", "rel. L2")
    made = table(
        f"verified on {device}: {len(outcomes)} of {len(jobs)}", "backend", "dtype", "pass", *numbers, "worst at", right=numbers
    )
    for row in rows:
        l2 = "-" if row["pass"] == "properties" else f"{row['relative_l2']:.1e}"
        counts = [str(row[name]) for name in numbers[:3]]
        made.add_row(
            label(row["backend"], row["variant"]),
            row["dtype"],
            row["pass"],
            *counts,
            f"{row['worst']:.2f}",
            l2,
            escape(row["where"]),
        )
    out.print(made)
    out.print("worst: error over its bound, above 1 is a failure. rel. L2: the largest of any case.", style="dim")
    found = reporting.report(outcomes, missing, len(jobs))
    print_report(found, arguments.details)
    failed = sum(not outcome.ok for outcome in outcomes)
    if interrupted:
        out.print(f"interrupted after {len(outcomes)} of {len(jobs)}, {failed} failed; nothing was recorded")
        return INTERRUPTED
    if arguments.record:
        record.write(arguments.record, "verify", rows, device=device, failed=failed, cases=len(outcomes), report=found)
        out.print(f"recorded in {arguments.record}")
    if arguments.html:
        pathlib.Path(arguments.html).write_text(reporting.section(found), encoding="utf-8")
        out.print(f"written to {arguments.html}")
    out.print(f"{found['ran'] - failed} passed, {failed} failed, {found['skipped']} skipped")
    return EXCEEDED if failed else OK


def print_report(found: dict, details: bool) -> None:
    """Coverage and what was skipped; with details every check of every backend."""
    backends = list(dict.fromkeys(row["backend"] for row in found["checks"]))
    if details:
        numbers = ("run", "skipped", "failed", "worst", "seconds")
        made = table("checks", "backend", "check", *numbers, "worst at", right=numbers)
        for row in found["checks"]:
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
            counts = (str(row[name]) for name in numbers[:3])
            made.add_row(row["backend"], row["check"], *counts, f"{row['worst']:.2f}", seconds, escape(row["where"]))
        out.print(made)
    made = table("coverage: cases run, and skipped where any were", "feature", *backends, right=tuple(backends))
    for feature, counts in found["coverage"].items():
        cells = (f"{ran} ({skipped} skipped)" if skipped else str(ran) for ran, skipped in (counts[name] for name in backends))
        made.add_row(feature, *cells)
    out.print(made)
    out.print(reporting.totals(found))
    for row in found["reasons"]:
        out.print(f"skipped: {row['count']} of {row['backend']}: {escape(row['reason'])}")
    for name, reason in found["missing"].items():
        out.print(f"cannot run here: {name}: {escape(reason)}")


def describe(outcome: harness.Outcome) -> str:
    """One line on a failure: what, where, by how much."""
    bad = [f"{f.output} at {f.ratio:.3g} of its bound ({f.where})" for f in outcome.findings if not f.ok]
    what = outcome.error or "; ".join(bad)
    return f"{label(outcome.backend, outcome.variant)} {outcome.dtype} {outcome.name}: {what}"


def check_records(paths: list[pathlib.Path]) -> int:
    """Say of each record whether it describes the present sources."""
    if not paths:
        raise ValueError(f"no records in {record.FOLDER}")
    status = OK
    for path in paths:
        differences = record.stale(path)
        out.print(f"{path.name}: {'stale' if differences else 'of the present sources'}")
        for line in differences:
            out.print(f"  {escape(line)}")
            status = EXCEEDED
    return status
