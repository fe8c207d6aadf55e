"""Where a tuner's trials are done: in a process that can be killed, or in recorded measurements.

A bench does one action of trial.ACTIONS with a subject and always gives a Result: what hangs, dies or raises is a status.
"""

from __future__ import annotations

import functools
import os

from .. import registry, workers
from ..verify.run import spoiled
from .trial import NoPartner, Result, Subject, compiled_parts, work

HANG_SECONDS = 60.0  # from a config that answers no more to its end
COMPILE_SECONDS = 300.0
LOW_PRIORITY = 10  # added to a compiling process's niceness


class Killable:
    """One device, used by one process at a time; a context manager. deadline: seconds an action may take."""

    def __init__(self, deadline: float = HANG_SECONDS):
        self._pool = workers.Pool(functools.partial(act, backends=dict(registry.BACKENDS)), 1, deadline)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._pool.__exit__(*exception)

    def act(self, action: str, subject: Subject, argument=None) -> Result:
        """Do an action; "hung" or "crashed" where its process had to be killed or died."""
        result, lost = self._pool.ask((action, subject, argument))
        if lost is not None:
            return Result("hung" if "killed" in lost else "crashed", lost)
        return result


class Compilers:
    """Processes that compile ahead of what is measured, at a low priority; a context manager."""

    def __init__(self, processes: int, deadline: float = COMPILE_SECONDS):
        self._pool = workers.Pool(functools.partial(act, backends=dict(registry.BACKENDS), low_priority=True), processes, deadline)
        self._results: dict[Subject, Result | None] = {}  # by part; None while it is under way
        self._parts: dict[Subject, list[Subject]] = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._pool.__exit__(*exception)

    def put(self, subject: Subject) -> None:
        """Have all that a subject needs compiled."""
        try:
            self._parts[subject] = compiled_parts(subject)
        except NoPartner:  # is said when it is verified
            self._parts[subject] = []
        for part in self._parts[subject]:
            if part not in self._results:
                self._results[part] = None
                self._pool.put([("compile", part, None)])

    def done(self, subject: Subject, wait: float) -> Result | None:
        """What came of it; None while it is under way, after `wait` seconds at most."""
        for (_, part, _), result, lost in self._pool.results(wait if self._under_way(subject) else 0):
            self._results[part] = result if lost is None else Result("not compiled", lost)
        if self._under_way(subject):
            return None
        failed = [self._results[part] for part in self._parts[subject] if self._results[part].status != "ok"]
        return failed[0] if failed else Result("ok")

    def drop(self) -> None:
        """Give up what is still to be compiled, so that what is measured now has the machine for itself."""
        self._pool.__exit__()
        self._results = {part: result for part, result in self._results.items() if result is not None}

    def _under_way(self, subject: Subject) -> bool:
        return any(self._results[part] is None for part in self._parts[subject])


class Recorded:
    """Full measurements of spaces, instead of a device: medians by subject; None where a config failed."""

    def __init__(self, medians: dict[Subject, float | None]):
        self._medians = medians

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def act(self, action: str, subject: Subject, argument=None) -> Result:
        median = self._medians.get(subject)
        if median is None:
            return Result("crashed", "was not measured")
        if action != "time":
            return Result("ok", values={"worst": 0.0})
        count, canary = argument
        beside = {} if canary is None else {"canary": [self._medians[subject._replace(config=canary)]] * count}
        return Result("ok", values={"samples": [median] * count} | beside)


def act(item, state: dict, backends: dict[str, str], low_priority: bool = False) -> Result | workers.Last:
    """trial.work with the backends of the process that asks; the last of a process whose GPU context is spoiled."""
    registry.BACKENDS.update(backends)
    if low_priority and os.nice(0) == 0:
        os.nice(LOW_PRIORITY)
    result = work(item, state)
    return workers.Last(result) if result.status == "crashed" and spoiled(item[1].problem.device) else result
