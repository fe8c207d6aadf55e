"""`sbk compare`: the main job. Every backend that works here, on synthetic and captured input."""

from __future__ import annotations

import dataclasses
import pathlib

from rich.markup import escape

from ..bench import compare as bench
from ..dispatch import BackendError, availability_text
from ..verify import record
from ..verify.run import targets
from .main import EXCEEDED, INTERRUPTED, OK
from .shared import backend_names, check_device, label, out, progress_bar, shown, table

PRIMARY = ("FlashAttention-2", "cuDNN", "SDPA math")


def compare(arguments) -> int:
    """Exit status 1 when an error bound was exceeded."""
    device, names = check_device(arguments.device), backend_names(arguments.backend)
    if arguments.input:
        problems = bench.from_file(pathlib.Path(arguments.input), device)
    else:
        problems = bench.synthetic(device)
        if bench.CAPTURED.exists():
            problems += bench.from_file(bench.CAPTURED, device)
            problems += bench.tiled(problems[-1]) if device != "cpu" else ()
    rows, interrupted, host_us = [], False, {}
    with progress_bar() as bar:
        found, missing = targets(device, names)
        task = bar.add_task("", total=len(problems) * (len(found) + 1))
        try:
            bench.run(problems, device, found, rows, lambda *what: bar.update(task, advance=1, description=" ".join(what)))
            if device != "cpu" and not arguments.input:
                timed = dict.fromkeys(row.backend for row in rows if row.ms is not None)
                host_us = bench.host_overhead(list(timed), device)
        except KeyboardInterrupt:
            interrupted = True
    ran = {row.backend for row in rows if row.relative_l2 is not None}
    if not ran and not interrupted:
        raise BackendError(f"no backend could run any of {len(problems)} problems\n{availability_text()}")
    show(problems, rows, missing)
    if host_us:
        times = ", ".join(f"{name} {us:.1f}" for name, us in host_us.items())
        out.print(f"host, microseconds a forward call of {bench.HOST_SHAPE}, at best: {times}", style="dim")
    if arguments.json:
        record.write(arguments.json, "compare", [dataclasses.asdict(row) for row in rows], device=device, host_us=host_us)
        out.print(f"stored in {arguments.json}")
    if interrupted:
        out.print("interrupted: the problems above are complete, the others were not run")
        return INTERRUPTED
    return OK if all(row.ok for row in rows) else EXCEEDED


def show(problems, rows, missing) -> None:
    """The tables: one for each problem, then what could not run."""
    softmax = [name for name in PRIMARY if any(name in row.ratios for row in rows)]
    numbers = ("rel. L2", "x baseline", "ms", "TFLOP/s", *(f"x {name}" for name in softmax))
    for problem in problems:
        mine = [row for row in rows if row.problem == problem.name]
        if not mine:
            continue
        x = problem.x
        title = f"{problem.name}: q {tuple(x.q.shape)}, k {tuple(x.k.shape)}, {str(x.q.dtype)[6:]}"
        if x.case.regime == "file":
            median, p95 = bench.stick_lasts(x)
            title += f"; the stick lasts {median:.0f} keys (median), {p95:.0f} (95th percentile)"
            title += f"; early stop {'on' if x.case.skip else 'off'}"
        else:
            title += f"; logits of mean {bench.inputs.alive_logit(x.case.N):.3g}, early stop off"
        made = table(title, "backend", "pass", *numbers, "", right=numbers)
        notes = {}
        for row in mine:
            who = label(row.backend, row.variant)
            if row.note and row.ok:
                notes.setdefault(row.note, dict.fromkeys([who]))[who] = None
            if row.relative_l2 is None:
                continue
            cells = [shown(row.relative_l2, ".1e"), shown(row.to_baseline, ".2f"), shown(row.ms, ".3f")]
            cells += [shown(row.tflops, ".2f"), *(shown(row.ratios.get(name), ".2f") for name in softmax)]
            made.add_row(who, row.direction, *cells, "" if row.ok else f"[red]bound exceeded[/red] {escape(row.note)}")
        out.print(made)
        for note, names in notes.items():
            out.print(f"  {', '.join(names)}: {escape(note)}", style="dim")
        out.print()
    out.print(
        "rel. L2: against float64. x baseline: worst error over that of a straightforward computation in that precision.",
        style="dim",
    )
    out.print("x softmax attention (torch's SDPA, same run): its time over ours, above 1 we are faster.", style="dim")
    out.print("TFLOP/s: of the causal half; five products in the backward.", style="dim")
    for line in gains(rows):
        out.print(line, style="dim")
    for name, reason in missing.items():
        out.print(f"cannot run here: {name}: {escape(reason)}")


def gains(rows) -> list[str]:
    """What early stop gains, for problems that come with it and without."""
    ms = {(row.problem, row.backend, row.variant, row.direction): row.ms for row in rows if row.ms is not None}
    found = {}
    for (problem, backend, variant, direction), without in ms.items():
        name = problem.removesuffix(bench.NO_STOP)
        if name != problem and (name, backend, variant, direction) in ms:
            gain = without / ms[name, backend, variant, direction]
            found.setdefault((name, direction), []).append(f"{label(backend, variant)} {gain:.1f}")
    return [f"early stop on {name}, {direction}, times as fast: {', '.join(each)}" for (name, direction), each in found.items()]
