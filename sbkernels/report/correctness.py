"""Whether it is right: errors beside a straightforward computation's, what the harness checked, whether it catches mistakes."""

from __future__ import annotations

import collections
import html
import math

from ..markup import number, table
from ..verify import report as verification
from ..verify import tolerance
from ..verify.mutants import score
from . import charts
from .page import Section, details, figure, grid, note
from .performance import PASSES, TITLES
from .stored import Record, Stored

ERROR_TOP = 1.05  # of the largest value: where the axis of errors ends


def errors(stored: Stored) -> Section:
    """Errors against float64 beside those of a straightforward computation, and how large they are."""
    parts, drawn, headings = [], {}, []
    for index, record in enumerate(sorted(stored.of("compare"), key=lambda record: not record.on_gpu)):
        rows = [row for row in record.rows if row["relative_l2"] is not None]
        if not rows:
            continue
        named = [
            row | {"backend": verification.label(row["backend"], row["variant"]), "ratio": float(row["to_baseline"])}
            for row in rows
        ]
        looks = charts.styles({row["backend"] for row in named})
        figures = []
        for way, allowed in zip(PASSES, (tolerance.FORWARD_FACTOR, tolerance.BACKWARD_FACTOR), strict=True):
            dots = [
                {name: row[name] for name in ("backend", "problem", "ratio")}
                for row in named
                if row["direction"] == way and math.isfinite(row["ratio"])
            ]
            if dots:
                id, text = f"errors-{index}-{way}", f"Largest error of each result over the baseline's on {record.machine}, {way}"
                top = ERROR_TOP * max(allowed, *(dot["ratio"] for dot in dots))
                drawn[id] = charts.errors(dots, looks, allowed, top, text)
                figures.append(figure(id, TITLES[way], text))
        wrong, worst = sum(not row["ok"] for row in rows), max(row["ratio"] for row in named)
        said = f"{wrong} of {len(rows)} results exceed their bound" if wrong else f"all {len(rows)} results are within their bounds"
        headings.append(f"On {record.machine} {said}: errors at most {worst:.2f} times the baseline's")
        parts += [f"<h3>{html.escape(record.machine)}</h3>", grid(figures), worst_errors(named)]
        parts.append(details(f"All {len(named)} errors on {record.machine}", all_errors(named)))
    if not headings:
        return Section("Errors", "No errors are stored", note("sbk compare --json FILE stores some."))
    about = note(
        "Errors are against float64. The baseline is a straightforward computation of the same formula in the same precision. "
        "A dot for each problem, synthetic or captured from a trained model."
    )
    return Section("Errors", headings[0], "\n".join([about, *parts]), drawn)


def worst_errors(rows: list[dict]) -> str:
    """The worst of each backend and pass."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["backend"], row["direction"]].append(row)
    shown = []
    for (backend, way), mine in groups.items():
        worst = max(mine, key=lambda row: row["ratio"])
        largest = max(float(row["relative_l2"]) for row in mine)
        shown.append((backend, way, f"{largest:.1e}", f"{worst['ratio']:.2f}", worst["problem"] if worst["ratio"] > 1 else None))
    numbers = ("rel. L2 error", "x baseline")
    return table(("backend", "pass", *numbers, "worst at"), shown, numbers)


def all_errors(rows: list[dict]) -> str:
    """Every error."""
    names = ("problem", "backend", "direction")
    shown = [
        (*(row[name] for name in names), number(row["relative_l2"], ".2e"), f"{row['ratio']:.2f}", "" if row["ok"] else "exceeded")
        for row in rows
    ]
    numbers = ("rel. L2 error", "x baseline")
    return table(("problem", "backend", "pass", *numbers, "bound"), shown, numbers)


def verify(stored: Stored) -> Section:
    """What the harness, its mutants and the fuzzer found."""
    parts, headings = [], []
    for record in stored.of("verify"):
        found = record.content["report"]
        said = f"{found['failed']} of {found['ran']:,} checks failed" if found["failed"] else f"All {found['ran']:,} checks passed"
        headings.append(f"{said} on {record.machine}")
        parts += [f"<h3>{html.escape(record.machine)}: every backend against float64</h3>", note(f"{verification.totals(found)}.")]
        parts.append(by_backend(record))
        parts.append(details("Checks, coverage, what was skipped and why", verification.tables(found)))
    parts += [part for record in stored.of("mutants") for part in mutants(record)]
    parts += [part for record in stored.of("fuzz") for part in fuzz(record)]
    parts += [part for record in stored.of("stress", "sanitize") for part in passed(record)]
    if not parts:
        return Section("Verification", "No verification is stored", note("sbk verify --record FILE stores one."))
    return Section("Verification", headings[0] if headings else "Whether the harness catches mistakes", "\n".join(parts))


def by_backend(record: Record) -> str:
    """Counts of each backend over all dtypes, and the worst of each kind of check."""
    counts = ("run", "skipped", "failed")
    groups = collections.defaultdict(list)
    for row in record.rows:
        groups[verification.label(row["backend"], row["variant"])].append(row)
    kinds = list(dict.fromkeys(row["pass"] for row in record.rows))
    shown = []
    for backend, mine in groups.items():
        worst = {kind: max((float(row["worst"]) for row in mine if row["pass"] == kind), default=None) for kind in kinds}
        totals = (sum(row[name] for row in mine) for name in counts)
        shown.append((backend, *totals, *(number(worst[kind], ".2f") for kind in kinds)))
    numbers = (*counts, *(f"worst, {kind}" for kind in kinds))
    about = note("Forward and backward of a case count apart. Worst: error over its bound; above 1 is a failure.")
    return table(("backend", *numbers), shown, numbers) + about


def mutants(record: Record) -> list[str]:
    """Which planted mistakes were caught, and by what; whether what has none passes."""
    controls = {(name, control.name) for name in {row["backend"] for row in record.rows} for control in score.controls(name)}
    planted = [row for row in record.rows if (row["backend"], row["mutant"]) not in controls]
    caught = sum(bool(row["caught_by"]) for row in planted)
    blamed = sum(bool(row["caught_by"]) for row in record.rows) - caught
    said = f"{caught} of {len(planted)} planted mistakes were caught, {record.machine}"
    others = note(f"What has no mistake planted: {blamed} of {len(record.rows) - len(planted)} failed.")
    rows = [(r["backend"], r["mutant"], r["checks"], f"{r['seconds']:.2f}", r["caught_by"]) for r in planted]
    numbers = ("checks until then", "seconds")
    listed = table(("backend", "mistake", *numbers, "caught by"), rows, numbers)
    return [f"<h3>{html.escape(said)}</h3>", others, details("Which, and by which check", listed)]


def fuzz(record: Record) -> list[str]:
    """What random problems found."""
    seeds, failed = (sum(row[name] for row in record.rows) for name in ("seeds", "failed"))
    said = f"{failed} of {seeds} random problems failed, {record.machine}"
    rows = [(r["backend"], r["seeds"], r["failed"], number(r["worst"], ".2f"), f"{r['seconds']:.0f}") for r in record.rows]
    numbers = ("problems", "failed", "worst, of its bound", "seconds")
    return [f"<h3>{html.escape(said)}</h3>", table(("backend", *numbers), rows, numbers)]


def passed(record: Record) -> list[str]:
    """Records whose rows say whether all was as it has to be."""
    right = sum(bool(row["ok"]) for row in record.rows)
    return [f"<h3>{html.escape(f'{record.kind}: {right} of {len(record.rows)} as expected, {record.machine}')}</h3>"]
