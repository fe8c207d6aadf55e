"""A tuning run's settings, its clock, and what it has found for a problem."""

from __future__ import annotations

import collections
import dataclasses
import time
from datetime import datetime, timezone

from .. import environment
from ..problem import Problem


@dataclasses.dataclass(frozen=True)
class Policy:
    """How trials are measured; stored with each."""

    samples: int = 5  # a turn of a trial, each beside one of the default
    trial_turns: int = 4  # at most
    race_samples: int = 2  # a turn of the race at the end, in which configs follow each other
    race_turns: int = 30  # at most
    finalists: int = 4  # that race the default


@dataclasses.dataclass(frozen=True)
class Session:
    """What is common to a run's trials. seconds: its wall-time budget; None is none."""

    strategy: str = "exhaustive"
    seed: int = 0
    seconds: float | None = None
    policy: Policy = Policy()
    started: str = dataclasses.field(default_factory=lambda: now())
    git: str = dataclasses.field(default_factory=environment.git_state)


@dataclasses.dataclass
class Outcome:
    """What a run found for one problem with one backend."""

    backend: str
    problem: Problem
    configs: int = 0  # of the space
    tried: int = 0  # now
    known: int = 0  # from earlier runs
    failed: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by status
    best: dict | None = None  # the confirmed config
    ms: float | None = None
    default_ms: float | None = None
    ties: list[dict] = dataclasses.field(default_factory=list)  # configs as fast as the best within noise
    why: str = ""  # where nothing was confirmed

    @property
    def gain(self) -> float | None:
        """The default's time over the best's; 1 where the default is the best."""
        return None if self.ms is None else self.default_ms / self.ms


class Clock:
    """What is left of a wall-time budget in seconds, None being none, and never more than `whole` has left. stop() uses it up."""

    def __init__(self, seconds: float | None = None, whole: Clock | None = None):
        self._end = float("inf") if seconds is None else time.monotonic() + seconds
        self._whole = whole

    def left(self) -> float:
        left = self._end - time.monotonic()
        return left if self._whole is None else min(left, self._whole.left())

    def stop(self) -> None:
        self._end = float("-inf")

    def part(self, share: float) -> Clock:
        """A clock with a share of what is left."""
        left = self.left()
        return Clock(None if left == float("inf") else left * share, self)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
