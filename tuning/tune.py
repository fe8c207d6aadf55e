"""A tuning run: problems by backends, over the devices there are, on one database."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import queue
from collections.abc import Callable
from typing import NamedTuple

from .. import registry
from ..problem import Problem
from .benches import Compilers, Killable
from .session import Clock, Outcome, Session
from .store import Store
from .tuner import Tuner

DIRECTIONS = ("forward", "backward")


class Task(NamedTuple):
    """A backend's name and the problem, of one direction, that it is tuned for."""

    backend: str
    problem: Problem


def tasks(problems: list[Problem], backends: tuple[str, ...], directions=DIRECTIONS) -> tuple[list[Task], dict[str, str]]:
    """What there is to tune of forward problems, and {backend: why not} of backends that run none of them fast."""
    found, missing = [], {}
    for name in backends:
        backend, reason = registry.try_load(name)
        for problem in problems if reason is None else ():
            both = {"forward": problem, "backward": problem.reversed()}
            for direction in directions:
                reason = backend.unsupported(both[direction]) or backend.slow(both[direction])
                if reason is None:
                    found.append(Task(name, both[direction]))
        if not any(task.backend == name for task in found):
            missing[name] = reason
    return found, missing


def tune(
    wanted: list[Task], database: pathlib.Path, session: Session, devices: list[str], *,
    processes: int | None = None, started: Callable = lambda task: None, advanced: Callable = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Tune all tasks, one at a time on each device; outcomes in the order in which they were done.

    Each task gets an equal share of what is left of the budget. processes: that compile ahead, by default as many as there are
    processors. started(task) and advanced(outcome), after each trial, are called from the devices' threads. KeyboardInterrupt ends
    all after the trials under way. OSError where the database cannot be written, RuntimeError for one of a later version.
    """
    clock, waiting, outcomes = Clock(session.seconds), queue.SimpleQueue(), []
    for task in wanted:
        waiting.put(task)

    def work(device: str) -> None:
        try:
            with Store(database) as store, contextlib.ExitStack() as stack:
                bench, compilers = stack.enter_context(Killable()), None
                while clock.left() > 0:
                    try:
                        task = waiting.get_nowait()
                    except queue.Empty:
                        return
                    backend = registry.load(task.backend)
                    if backend.compiles and compilers is None:
                        compilers = stack.enter_context(Compilers(processes or max(1, (os.cpu_count() or 1) // len(devices))))
                    started(task)
                    problem = dataclasses.replace(task.problem, device=device)
                    share = clock.part(min(1.0, len(devices) / (waiting.qsize() + 1)))
                    tuner = Tuner(
                        backend, problem, session, store, bench,
                        compilers=compilers if backend.compiles else None, clock=share, notify=advanced,
                    )  # fmt: skip
                    outcomes.append(tuner.run())
                    advanced(outcomes[-1])
        except BaseException:
            clock.stop()
            raise

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as executor:  # leaving it waits for the threads
        running = [executor.submit(work, device) for device in devices]
        try:
            concurrent.futures.wait(running)
        except KeyboardInterrupt:
            clock.stop()
            raise
    for each in running:
        each.result()
    return outcomes
