"""The mutation score: each mutant through the checks of `sbk verify` until one catches it; and the controls, which none may."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import time
from collections.abc import Callable, Iterator

from ... import registry, workers
from .. import run
from .mutant import CONTROLS, SWITCHED_OFF, Mutant, planted
from .switches import SWITCHES
from .wrappers import MUTANTS

CONTROL_PARTS = 16  # of a control's jobs, so that several processes share them
DTYPES_TRIED = ("float32", "float16")  # mutants run in the first of these that the backend takes


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was said of a mutant or control: the first check that caught it, on what, by how much, after how many."""

    backend: str
    mutant: str
    caught_by: str = ""
    where: str = ""
    ratio: float = 0.0
    checks: int = 0
    seconds: float = 0.0


def table(backend: str) -> list[Mutant]:
    """The mutants of a registered backend."""
    return [*SWITCHES.get(backend, []), *MUTANTS]


def controls(backend: str) -> list[Mutant]:
    """What no check may catch: the backend, and its test build if it has one."""
    return list(CONTROLS if backend in SWITCHES else CONTROLS[:1])


def plan(backend: str, device: str, dtype: str | None = None) -> list:
    """The jobs of `run.plan` a mutant has to pass, properties first, in one dtype. ValueError if there are none."""
    for tried in (dtype,) if dtype else DTYPES_TRIED:
        jobs, missing = run.plan(device, (backend,), (tried,))
        if jobs:
            return sorted(jobs, key=lambda job: not isinstance(job[3], str))
    raise ValueError(f"no mutants of {backend} run on {device}: {missing.get(backend)}")


# What the cases compare with, from mutant to mutant of a process.
_expectations: dict = {}


def judge(backend: str, name: str, jobs: list, device: str, before_each: Callable[[], None] = lambda: None) -> Verdict:
    """A mutant or control through jobs, up to the first that catches it."""
    mutant = next(m for m in (*controls(backend), *table(backend)) if m.name == name)
    begin, checks = time.perf_counter(), 0
    with planted(registry.load(backend), mutant, SWITCHES.get(backend, [])):
        for job in jobs:
            before_each()
            outcome = run.run_job(job, device, _expectations)
            checks += not outcome.skipped
            if not outcome.ok:
                bad = max(outcome.findings, key=lambda f: f.ratio, default=None)
                where, ratio = (outcome.error, float("inf")) if bad is None else (f"{bad.output}, {bad.where}", bad.ratio)
                return Verdict(backend, name, outcome.name, where, ratio, checks, time.perf_counter() - begin)
    return Verdict(backend, name, checks=checks, seconds=time.perf_counter() - begin)


def run_all(backend: str, device: str, progress: Callable[[Verdict], None], processes: int = 1, dtype: str | None = None) -> None:
    """Judge the controls and all mutants of a backend, calling progress(verdict) after each; controls, in parts, come last.

    On a GPU, and with more than one process, in processes that can be killed: a hang or a crash is then what caught a mutant.
    ValueError if the table of switches is not of the present sources.
    """
    jobs = plan(backend, device, dtype)
    if backend in SWITCHES:
        with planted(registry.load(backend), SWITCHED_OFF, SWITCHES[backend]):
            pass  # or its table is out of date: in a process of its own each mutant would pass for caught
    items = [(m.name, [job for job in jobs if job[1] == m.variant]) for m in table(backend)]
    parts = [(m.name, jobs[i::CONTROL_PARTS]) for m in controls(backend) for i in range(CONTROL_PARTS)]
    of_controls: dict[str, list[Verdict]] = {}
    for verdict in _verdicts(backend, device, [*parts, *items], processes):
        if verdict.mutant in (m.name for m in controls(backend)):
            of_controls.setdefault(verdict.mutant, []).append(verdict)
        else:
            progress(verdict)
    for found in of_controls.values():
        worst = max(found, key=lambda v: v.ratio)
        progress(dataclasses.replace(worst, checks=sum(v.checks for v in found), seconds=sum(v.seconds for v in found)))


def _verdicts(backend: str, device: str, items: list[tuple[str, list]], processes: int) -> Iterator[Verdict]:
    if processes <= 1 and device == "cpu":
        yield from (judge(backend, name, jobs, device) for name, jobs in items)
        return
    work = functools.partial(_work, backend=backend, device=device)
    deadline = run.DEADLINE_SECONDS * max(len(jobs) for _, jobs in items)  # _work keeps to that of each job
    with contextlib.closing(workers.run(work, [[item] for item in items], processes, deadline)) as results:
        for (name, _), verdict, lost in results:
            yield verdict or Verdict(backend, name, "killable process", lost, float("inf"))


def _work(item: tuple[str, list], _state: dict, backend: str, device: str):
    end_if_late = functools.partial(faulthandler.dump_traceback_later, run.DEADLINE_SECONDS, exit=True)
    verdict = judge(backend, *item, device, end_if_late)
    faulthandler.cancel_dump_traceback_later()
    return workers.Last(verdict) if run.spoiled(device) else verdict
