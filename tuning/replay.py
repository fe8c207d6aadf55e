"""Strategies and lookups on recorded full measurements of spaces: how near they come to the best, without a device."""

from __future__ import annotations

import json
import math
import pathlib
from typing import NamedTuple

from . import keys
from .store import MEASURED, Store
from .strategies import STRATEGIES

SEEDS = 30
SHARES = (0.05, 0.10, 0.15, 0.25)


class Space(NamedTuple):
    """Configs of a kernel for a problem, the default first, and their milliseconds; None where one failed."""

    problem: dict
    configs: list[dict]
    ms: list[float | None]

    def __len__(self) -> int:
        return len(self.configs)

    @property
    def best(self) -> float:
        return min(ms for ms in self.ms if ms is not None)


def spaces(path: pathlib.Path) -> list[Space]:
    """Those of an export, or of a database, that were tried whole. ValueError for a file that is neither."""
    if path.suffix == ".json":
        store = Store(":memory:")
        store.take_in(path)
    elif path.is_file():
        store = Store(path, writable=False)
    else:
        raise ValueError(f"there is no file {path}")
    with store:
        default, medians, sizes = {}, {}, {}
        for trial in store.trials():
            key = keys.canonical([trial.bodies[kind] for kind in ("machine", "toolchain", "kernel", "problem")])
            config = keys.canonical(trial.bodies["config"])
            of_space = medians.setdefault(key, {})
            if trial.status in MEASURED:
                of_space[config] = min(trial.median, of_space.get(config) or math.inf)
            else:
                of_space[config] = None
            sizes[key] = trial.details["space"]
            if trial.details["default"]:
                default[key] = config
    found = []
    for key, of_space in sorted(medians.items()):
        if key in default and len(of_space) == sizes[key]:
            order = sorted(of_space, key=lambda config: (config != default[key], config))
            *_, problem = json.loads(key)
            found.append(Space(problem, [json.loads(config) for config in order], [of_space[config] for config in order]))
    return found


def searched(space: Space, name: str, share: float, seed: int) -> float:
    """The best milliseconds of what a strategy tries of a space."""
    options = {} if name == "exhaustive" else {"share": share}
    strategy, best = STRATEGIES[name](space.configs, seed, **options), math.inf
    while (number := strategy.ask()) is not None:
        ms = space.ms[number]
        strategy.tell(number, ms)
        best = min(best, math.inf if ms is None else ms)
    return best


def regrets(found: list[Space], name: str, share: float, seeds: int = SEEDS) -> list[float]:
    """By how much a strategy's best is slower than each space's, for each seed: 0.02 is 2 %."""
    return [searched(space, name, share, seed) / space.best - 1 for space in found for seed in range(seeds)]


def quantile(values: list[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
