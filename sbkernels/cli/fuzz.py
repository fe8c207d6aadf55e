"""`sbk fuzz`: random problems against the reference; failures made small, in one line each, and remembered."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import shlex
import time

from rich.markup import escape

from .. import registry
from ..verify import fuzz as fuzzing
from ..verify import record, run
from .main import EXCEEDED, INTERRUPTED, OK
from .shared import backend_names, check_device, out, progress_bar
from .verify import describe


def fuzz(arguments) -> int:
    """Exit status 1 when a problem fails."""
    device = check_device(arguments.device)
    if arguments.seeds < 1 or arguments.first_seed < 0 or (arguments.minutes is not None and arguments.minutes <= 0):
        raise ValueError("--seeds, --first-seed, --minutes: expected at least 1, at least 0 and more than 0")
    if arguments.case is not None:
        return one(arguments, device)
    corpus = pathlib.Path(arguments.corpus or fuzzing.corpus())
    asked = backend_names(arguments.backend)
    found, missing = run.targets(device, asked)
    names = dict.fromkeys(backend.name for backend, _ in found)
    if asked is None:
        names = [name for name in names if registry.load(name).slow(run.probe(device)) is None]
    for name, reason in missing.items():
        out.print(f"cannot run here: {name}: {escape(reason)}")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    rows, status = [], OK
    for name in names:
        row, interrupted = one_backend(name, device, seeds, arguments, corpus)
        rows.append(row)
        status = max(status, EXCEEDED if row["failed"] else OK)
        if interrupted:
            status = INTERRUPTED
            break
    if arguments.record:
        record.write(arguments.record, "fuzz", rows, device=device)
        out.print(f"recorded in {arguments.record}")
    return status


def one_backend(name: str, device: str, seeds: range, arguments, corpus: pathlib.Path) -> tuple[dict, bool]:
    """Run seeds on a backend until they, the time or the failures are enough; a row of a record, and whether it was interrupted."""
    begin, counts, failures, worst = time.monotonic(), collections.Counter(), [], (0.0, "")
    done, interrupted, last = set(), False, begin + 60 * arguments.minutes if arguments.minutes else None
    with progress_bar() as bar:
        task = bar.add_task("", total=len(seeds))
        try:
            with contextlib.closing(fuzzing.fuzz(name, device, seeds, arguments.processes)) as results:
                for seed, job, outcome in results:
                    done.add(seed)
                    counts["skipped" if outcome.skipped else job[2]] += 1
                    worst = max([worst, *((f.ratio, f"{fuzzing.to_text(job)}: {f.output}, {f.where}") for f in outcome.findings)])
                    if not outcome.ok:
                        failures.append(fuzzing.to_text(job))
                        bar.console.print(f"FAILED seed {seed}: {describe(outcome)}", markup=False, soft_wrap=True)
                        failures[-1] = report(job, outcome, device, corpus, bar.console)
                    bar.update(task, advance=1, description=f"{name}, {len(failures)} failed, seed {seed} {job[2]} {job[3]}"[:150])
                    if len(failures) >= fuzzing.MOST_FAILURES or (last is not None and time.monotonic() > last):
                        break
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.monotonic() - begin
    ran = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    ending = "interrupted after " if interrupted else ""
    out.print(f"{name} on {device}: {ending}{len(done)} of {len(seeds)} seeds from {seeds.start} in {seconds:.0f} s ({ran})")
    if len(done) < len(seeds):
        out.print(f"  to go on: --first-seed {min(set(seeds) - done)}")
    if worst[1]:
        out.print(f"  worst {worst[0]:.2f} of its bound: {escape(worst[1])}")
    out.print(f"  {len(failures)} failed" + (f", remembered in {corpus}" if failures else ""))
    row = {
        "backend": name, "first_seed": seeds.start, "seeds": len(done), "asked": len(seeds), "failed": len(failures),
        "counts": dict(counts), "seconds": seconds, "worst": worst[0], "where": worst[1], "failures": failures,
    }  # fmt: skip
    return row, interrupted


def report(job, outcome, device: str, corpus: pathlib.Path, console) -> str:
    """Remember a failure, make it smaller, remember that instead; returns it as text."""
    fuzzing.remember(corpus, job, describe(outcome))
    small = fuzzing.smallest(job, device)
    fuzzing.remember(corpus, small, describe(outcome), instead_of=job)
    text = fuzzing.to_text(small)
    console.print(f"  sbk fuzz --device {device} --case {shlex.quote(text)}", markup=False, soft_wrap=True)
    return text


def one(arguments, device: str) -> int:
    """Run the case that was given."""
    names = backend_names(arguments.backend) or (None,)
    status = OK
    for name in names:
        job = fuzzing.from_text(arguments.case, name)
        ((_, outcome),) = fuzzing.outcomes([job], device)
        if outcome.skipped:
            raise ValueError(f"--case {arguments.case!r}: {outcome.skipped}")
        if not outcome.ok:
            out.print(f"FAILED {describe(outcome)}", markup=False, soft_wrap=True)
            status = EXCEEDED
        for f in outcome.findings:
            out.print(f"  {f.output}: {f.ratio:.3g} of its bound, {f.where}", markup=False, soft_wrap=True)
    return status
