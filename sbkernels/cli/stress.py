"""`sbk stress`: the same bits a thousand times under load; graphs, streams, devices."""

from __future__ import annotations

import dataclasses

from rich.markup import escape

from .. import registry
from ..dispatch import BackendError, availability_text
from ..verify import record, run
from ..verify import stress as stressing
from .main import EXCEEDED, INTERRUPTED, OK
from .shared import backend_names, check_device, out, progress_bar, table


def stress(arguments) -> int:
    """Exit status 1 when a run differs from the first, or a check fails."""
    if arguments.runs < 1:
        raise ValueError(f"--runs {arguments.runs}: expected at least 1")
    device = check_device(arguments.device)
    asked = backend_names(arguments.backend)
    found, missing = run.targets(device, asked)
    names = list(dict.fromkeys(backend.name for backend, _ in found))
    if asked is None:
        names = [name for name in names if name != "torch" and not registry.load(name).slow(run.probe(device))]
    if not names:
        raise BackendError(f"nothing to run on {device}\n{availability_text()}")
    rows, status = [], OK
    with progress_bar() as bar:
        task = bar.add_task(f"{arguments.runs} runs each", total=None)

        def advance(row):
            rows.append(row)
            bar.update(task, description=f"{row.backend} {row.check}")

        try:
            stressing.stress(names, device, arguments.runs, advance)
        except KeyboardInterrupt:
            status = INTERRUPTED
    numbers = ("runs", "differ", "seconds")
    made = table(f"under load on {device}", "backend", "dtype", "what", *numbers, "", right=numbers)
    for row in rows:
        why = row.skipped or row.error or (f"first in run {row.first_wrong}" if row.wrong else "")
        made.add_row(row.backend, row.dtype, escape(row.check), str(row.runs), str(row.wrong), f"{row.seconds:.1f}", escape(why))
    out.print(made)
    for name, reason in missing.items():
        out.print(f"cannot run here: {name}: {escape(reason)}")
    if status == INTERRUPTED:
        out.print(f"interrupted after {len(rows)}; nothing was recorded")
        return status
    if arguments.record:
        record.write(arguments.record, "stress", [dataclasses.asdict(row) | {"ok": row.ok} for row in rows], device=device)
        out.print(f"recorded in {arguments.record}")
    failed, skipped = (sum(map(bool, x)) for x in ([not row.ok for row in rows], [row.skipped for row in rows]))
    out.print(f"{len(rows) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return EXCEEDED if failed else OK
