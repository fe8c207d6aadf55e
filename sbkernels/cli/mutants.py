"""`sbk verify --mutants`: whether the harness catches every wrong implementation, and by which check."""

from __future__ import annotations

import dataclasses

from rich.markup import escape

from .. import registry
from ..verify import record, run
from ..verify.mutants import score
from .main import EXCEEDED, INTERRUPTED, OK
from .shared import backend_names, check_device, check_dtypes, out, progress_bar, table


def mutants(arguments) -> int:
    """Exit status 1 unless every mutant is caught and every control passes."""
    device = check_device(arguments.device)
    asked = backend_names(arguments.backend)
    found, _ = run.targets(device, asked)
    names = [name for name in registry.names() if any(backend.name == name for backend, _ in found)]
    if asked is None:  # the interpreter takes minutes, for who asks for it
        names = [name for name in names if not score.slow(name, device)]
    dtypes = check_dtypes(arguments.dtype) or [None]
    verdicts, status = [], OK
    for name in names:
        mutants = {mutant.name: mutant for mutant in score.table(name)}
        controls = {mutant.name: mutant for mutant in score.controls(name)}
        mine = []
        with progress_bar() as bar:
            task = bar.add_task("", total=len(controls | mutants))

            def advance(verdict, mine=mine, bar=bar, task=task, name=name):
                mine.append(verdict)
                bar.update(task, advance=1, description=f"{name}: {verdict.mutant}")

            try:
                score.run_all(name, device, advance, arguments.processes, dtypes[0])
            except KeyboardInterrupt:
                status = INTERRUPTED
        verdicts += mine
        control = [v for v in mine if v.mutant in controls]
        mine = sorted((v for v in mine if v.mutant in mutants), key=lambda v: list(mutants).index(v.mutant))
        made = table(f"mutants of {name} on {device}", "mutant", "what is wrong", "caught by", "ratio", "at", right=("ratio",))
        for v in mine:
            caught = escape(v.caught_by) or "[red]nothing[/red]"
            ratio = f"{v.ratio:.3g}" if v.caught_by else ""
            made.add_row(escape(v.mutant), escape(mutants[v.mutant].what), caught, ratio, escape(v.where))
        out.print(made)
        caught = sum(bool(v.caught_by) for v in mine)
        for v in control:
            what = f"fails {v.caught_by}: {v.where}" if v.caught_by else f"passes all {v.checks} checks"
            out.print(f"control, {v.mutant}: {what}", markup=False)
        out.print(f"{name}: {caught} of {len(mutants)} mutants caught, mutation score {100 * caught / len(mutants):.0f} %")
        if status == INTERRUPTED:
            out.print(f"interrupted after {len(mine)} mutants; nothing was recorded")
            return INTERRUPTED
        if caught < len(mutants) or any(v.caught_by for v in control):
            status = EXCEEDED
    if arguments.record:
        record.write(arguments.record, "mutants", [dataclasses.asdict(v) for v in verdicts], device=device)
        out.print(f"recorded in {arguments.record}")
    return status
