"""The mutation score: each mutant through the checks of `sbk verify` until one catches it; and the controls, which none may."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable

from ... import registry, workers
from .. import run
from .mutant import CONTROLS, Mutant, planted
from .switches import SWITCHES
from .wrappers import MUTANTS

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


def slow(backend: str, device: str) -> str | None:
    """Why the backend is to be left alone here unless it is asked for."""
    return registry.load(backend).slow(run.probe(device))


# What the cases compare with, from mutant to mutant of a process.
_expectations: dict = {}


def judge(item: tuple[str, str], _state, jobs: list, device: str) -> Verdict:
    """One (backend, name of a mutant or control) through jobs, up to the first that catches it."""
    backend, name = item
    mutant = next(m for m in (*controls(backend), *table(backend)) if m.name == name)
    begin, checks = time.perf_counter(), 0
    with planted(registry.load(backend), mutant, SWITCHES.get(backend, [])):
        for job in jobs:
            if mutant not in CONTROLS and job[1] != mutant.variant:
                continue
            outcome = run.run_job(job, device, _expectations)
            checks += not outcome.skipped
            if not outcome.ok:
                bad = max(outcome.findings, key=lambda f: f.ratio, default=None)
                where, ratio = (outcome.error, float("inf")) if bad is None else (f"{bad.output}, {bad.where}", bad.ratio)
                return Verdict(backend, name, outcome.name, where, ratio, checks, time.perf_counter() - begin)
    return Verdict(backend, name, checks=checks, seconds=time.perf_counter() - begin)


def run_all(backend: str, device: str, progress: Callable[[Verdict], None], processes: int = 1, dtype: str | None = None) -> None:
    """Judge the controls and all mutants of a backend, calling progress(verdict) after each.

    On a GPU, and with more than one process, each runs in a process that is killed when it takes longer than run.DEADLINE_SECONDS a
    job: then that is what caught it.
    """
    jobs = plan(backend, device, dtype)
    items = [(backend, mutant.name) for mutant in (*controls(backend), *table(backend))]
    if processes <= 1 and device == "cpu":
        for item in items:
            progress(judge(item, None, jobs, device))
        return
    work = functools.partial(_work, jobs=jobs, device=device)
    with contextlib.closing(workers.run(work, [[item] for item in items], processes, run.DEADLINE_SECONDS)) as results:
        for item, verdict, lost in results:
            progress(verdict or Verdict(*item, "killable process", lost, float("inf")))


def _work(item, state, jobs, device):
    verdict = judge(item, state, jobs, device)
    return workers.Last(verdict) if device != "cpu" and verdict.where else verdict
