"""`sbk verify --mutants`: whether the harness catches every wrong implementation, and by which check."""

from __future__ import annotations

import dataclasses

from rich.markup import escape

from .. import registry
from ..dispatch import BackendError, availability_text
from ..verify import record, run
from ..verify.mutants import score
from .main import EXCEEDED, INTERRUPTED, OK
from .shared import backend_names, check_device, check_dtypes, out, progress_bar, table


def mutants(arguments) -> int:
    """Exit status 1 unless every mutant is caught and every control passes."""
    device = check_device(arguments.device)
    asked = backend_names(arguments.backend)
    dtypes = check_dtypes(arguments.dtype) or [None]
    if len(dtypes) > 1:
        raise ValueError(f"--dtype {' --dtype '.join(dtypes)}: mutants run in one dtype")
    found, _ = run.targets(device, asked)
    names = list(dict.fromkeys(backend.name for backend, _ in found))
    if asked is None:  # the interpreter takes minutes, for who asks for it
        names = [name for name in names if registry.load(name).slow(run.probe(device)) is None]
    if not names:
        raise BackendError(f"nothing to plant mutants in on {device}\n{availability_text()}")
    verdicts, complete = [], True
    for name in names:
        mine, interrupted = judged(name, device, arguments.processes, dtypes[0])
        verdicts += mine
        complete = print_score(name, device, mine) and complete
        if interrupted:
            out.print("interrupted; nothing was recorded")
            return INTERRUPTED
    if arguments.record:
        record.write(arguments.record, "mutants", [dataclasses.asdict(v) for v in verdicts], device=device)
        out.print(f"recorded in {arguments.record}")
    return OK if complete else EXCEEDED


def judged(name: str, device: str, processes: int, dtype: str | None) -> tuple[list[score.Verdict], bool]:
    """Verdicts on a backend's mutants and controls, and whether that was interrupted."""
    verdicts = []
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(score.table(name)) + len(score.controls(name)))

        def advance(verdict):
            verdicts.append(verdict)
            bar.update(task, advance=1, description=f"{name}: {verdict.mutant}")

        try:
            score.run_all(name, device, advance, processes, dtype)
        except KeyboardInterrupt:
            return verdicts, True
    return verdicts, False


def print_score(name: str, device: str, verdicts: list[score.Verdict]) -> bool:
    """The table of a backend's mutants, the controls, and the score; whether all is as it has to be."""
    found, caught = {v.mutant: v for v in verdicts}, 0
    made = table(f"mutants of {name} on {device}", "mutant", "what is wrong", "caught by", "ratio", "at", right=("ratio",))
    for mutant in score.table(name):
        v = found.get(mutant.name)
        if v is None:
            made.add_row(escape(mutant.name), escape(mutant.what), "not run", "", "")
        elif not v.caught_by:
            made.add_row(escape(mutant.name), escape(mutant.what), "[red]nothing[/red]", "", f"{v.checks} checks passed")
        else:
            caught += 1
            made.add_row(escape(mutant.name), escape(mutant.what), escape(v.caught_by), f"{v.ratio:.3g}", escape(v.where))
    out.print(made)
    controls = [found[control.name] for control in score.controls(name) if control.name in found]
    for v in controls:
        what = f"fails {v.caught_by}: {v.where}" if v.caught_by else f"passes all {v.checks} checks"
        out.print(f"control, {v.mutant}: {what}", markup=False)
    total = len(score.table(name))
    out.print(f"{name}: {caught} of {total} mutants caught, mutation score {100 * caught / total:.0f} %")
    return caught == total and len(controls) == len(score.controls(name)) and not any(v.caught_by for v in controls)
