"""`sbk softplus`: how right and how fast each variant of softplus2 and of 1 - beta is."""

from __future__ import annotations

import dataclasses

from ..bench import softplus as bench
from ..verify import record
from .main import EXCEEDED, INTERRUPTED, OK
from .shared import check_device, out, progress_bar, table


def softplus(arguments) -> int:
    """Exit status 1 when a variant made a number from a NaN."""
    device = check_device(arguments.device)
    rows, interrupted = [], False
    total = bench.steps(device)
    with progress_bar() as bar:
        task = bar.add_task("", total=total)
        try:
            bench.run(device, rows, lambda variant: bar.update(task, advance=1, description=variant))
        except KeyboardInterrupt:
            interrupted = True
    show(device, rows)
    if arguments.json:
        record.write(arguments.json, "softplus", [dataclasses.asdict(row) for row in rows], device=device)
        out.print(f"stored in {arguments.json}")
    if interrupted:
        out.print("interrupted: the variants above are complete, the others were not run")
        return INTERRUPTED
    return EXCEEDED if any(row.lost_nans for row in rows) else OK


def show(device: str, rows: list[bench.Row]) -> None:
    """The table, and what its columns mean."""
    uncut = f"|s| <= {bench.extension().UNCUT:g}"
    ulps = (f"max ulps\n{uncut}", "\nat s", "max ulps\nany s", "\nat s ")
    numbers = ("special\nper logit", *ulps, "max abs.\nerror", "logits per\nclock, SM")
    inputs = "all 2^32 inputs" if device != "cpu" else f"{len(bench.samples())} of 2^32 inputs, by the host build"
    title = f"softplus2(s) = log2(1 + 2^s) and 1 - beta = 1 / (1 + 2^s) on {device}: {inputs}"
    made = table(title, "variant", *numbers, right=numbers)
    for row in rows:
        cells = [f"{row.special:g}", _ulps(row.ulps_uncut), f"{row.ulps_uncut_at:.6g}", _ulps(row.ulps), f"{row.ulps_at:.6g}"]
        cells += [f"{row.absolute:.1e}", "-" if row.logits_per_clock is None else f"{row.logits_per_clock:.2f}"]
        made.add_row(row.variant, *cells)
    out.print(made)
    out.print("special: ex2, lg2, rcp and tanh; the host build has the library's functions in their place.", style="dim")
    out.print("ulps: error against float64 in units of the right result's last place in float32, over results of at", style="dim")
    out.print("least 2^-125; smaller ones may be flushed to 0. rcp cuts logits at 63, rcp of 4 at 30.", style="dim")
    for row in rows:
        if row.lost_nans:
            out.print(f"[red]{row.variant}: {row.lost_nans} NaNs gave a number[/red]")


def _ulps(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
