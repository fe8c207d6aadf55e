"""Strategies and lookups on recorded full measurements of spaces: how near they come to the best, without a device."""

from __future__ import annotations

import json
import math
import pathlib
from typing import NamedTuple

from . import keys
from .store import Store
from .strategies import STRATEGIES

SEEDS = 30
SHARES = (0.05, 0.10, 0.15, 0.25)


class Space(NamedTuple):
    """Configs of a backend for a problem, the default first; their times over the default's beside them, None where one failed.

    confirmed: the number of the one that tuning confirmed; None where it did not.
    """

    problem: dict
    configs: list[dict]
    times: list[float | None]
    confirmed: int | None
    backend: str = ""

    def __len__(self) -> int:
        return len(self.configs)

    @property
    def best(self) -> float:
        return min(time for time in self.times if time is not None)


def opened(path: pathlib.Path) -> Store:
    """An export in memory, or a database to be read. ValueError for a file that is neither."""
    if path.suffix == ".json":
        store = Store(":memory:")
        store.take_in(path)
        return store
    if path.is_file():
        return Store(path, writable=False)
    raise ValueError(f"there is no file {path}")


def spaces(path: pathlib.Path) -> list[Space]:
    """Those of an export, or of a database, that were tried whole. ValueError for a file that is neither."""
    with opened(path) as store:
        tried, default, confirmed, sizes = {}, {}, {}, {}
        for trial in store.trials():
            key = keys.canonical([trial.bodies[kind] for kind in ("machine", "toolchain", "kernel", "problem")])
            config = keys.canonical(trial.bodies["config"])
            sizes[key] = trial.details["space"]
            if trial.status == "confirmed":
                confirmed[key] = config
            else:
                tried.setdefault(key, {})[config] = trial.details.get("relative")
            if trial.details["default"]:
                default[key] = config
    found = []
    for key, times in sorted(tried.items()):
        if key in default and len(times) == sizes[key]:
            order = sorted(times, key=lambda config: (config != default[key], config))
            number = order.index(confirmed[key]) if key in confirmed else None
            *_, kernel, problem = json.loads(key)
            relative = [times[config] for config in order]
            found.append(Space(problem, list(map(json.loads, order)), relative, number, kernel["backend"]))
    return found


def searched(space: Space, name: str, share: float, seed: int) -> float:
    """The least time of what a strategy tries of a space."""
    options = {} if name == "exhaustive" else {"share": share}
    strategy, best = STRATEGIES[name](space.configs, seed, **options), math.inf
    while (number := strategy.ask()) is not None:
        strategy.tell(number, space.times[number])
        best = min(best, math.inf if space.times[number] is None else space.times[number])
    return best


def regrets(found: list[Space], name: str, share: float, seeds: int = SEEDS) -> list[float]:
    """By how much a strategy's best is slower than each space's, for each seed: 0.02 is 2 %."""
    return [searched(space, name, share, seed) / space.best - 1 for space in found for seed in range(seeds)]


def quantile(values: list[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
