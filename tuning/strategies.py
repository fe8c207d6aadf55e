"""In which order configs are tried. A strategy is asked for the next one and told what came of it; several may be out at a time.

Configs are numbers into a space: a list of dicts of equal keys. Number 0 is the default, which every strategy tries first. hints:
numbers that were fast elsewhere, fastest first.
"""

from __future__ import annotations

import math
import random

FEW_HINTS = 3  # that strategies go by which try a share only
START_SHARE = 0.4  # of what `guided` may try before the model is asked: hints, else spread over the space


class Exhaustive:
    """All of them: first what hints say, fastest first, then in an order drawn from the seed. A budget so cuts off no kind."""

    def __init__(self, space: list[dict], seed: int = 0, hints: list[int] = ()):
        rest = list(range(1, len(space)))
        random.Random(seed).shuffle(rest)
        self._order = list(dict.fromkeys([0, *hints, *rest]))[::-1]

    def ask(self) -> int | None:
        """The next config's number; None when there is none left to try."""
        return self._order.pop() if self._order else None

    def tell(self, number: int, time: float | None) -> None:
        """What a config took, in any unit; None where it could not be measured."""


class Random(Exhaustive):
    """A share of them, drawn."""

    def __init__(self, space: list[dict], seed: int = 0, hints: list[int] = (), share: float = 0.15):
        super().__init__(space, seed, hints[:FEW_HINTS])
        del self._order[: -count(len(space), share)]


class Guided:
    """A share of them, proposed by Optuna's Gaussian process from what was measured so far. RuntimeError without Optuna."""

    def __init__(self, space: list[dict], seed: int = 0, hints: list[int] = (), share: float = 0.15):
        optuna = load_optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._random = space, random.Random(seed)
        self._left = count(len(space), share)
        self._values = {name: ordered({config[name] for config in space}) for name in space[0]}
        self._coordinates = [tuple(self._values[name].index(config[name]) for name in config) for config in space]
        self._untried = set(range(len(space)))
        start = max(1, round(self._left * START_SHARE))
        self._start = (
            list(dict.fromkeys([0, *hints[:FEW_HINTS]]))[:start] if hints else spread(self._coordinates, start, self._random)
        )
        self._study = optuna.create_study(sampler=sampler(optuna, seed))
        self._optuna = optuna
        varied = {name: len(values) for name, values in self._values.items() if len(values) > 1}
        self._distributions = {name: optuna.distributions.IntDistribution(0, size - 1) for name, size in varied.items()}

    def ask(self) -> int | None:
        if not self._left or not self._untried:
            return None
        self._left -= 1
        number = self._start.pop(0) if self._start else self._proposed()
        self._untried.discard(number)
        return number

    def tell(self, number: int, time: float | None) -> None:
        point = dict(zip(self._values, self._coordinates[number], strict=True))
        point = {name: value for name, value in point.items() if name in self._distributions}
        failed = time is None or not point
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=self._optuna.trial.TrialState.FAIL if failed else self._optuna.trial.TrialState.COMPLETE,
                params=point, distributions=self._distributions, value=None if failed else math.log(time),
            )
        )  # fmt: skip

    def _proposed(self) -> int:
        """The untried config nearest to the model's proposal."""
        if not self._distributions:
            return min(self._untried)
        proposal = self._study.ask(self._distributions).params
        wanted = [proposal.get(name, 0) for name in self._values]
        self._study.tell(len(self._study.trials) - 1, state=self._optuna.trial.TrialState.FAIL)  # what is tried is told by tell()
        return min(sorted(self._untried), key=lambda number: distance(self._coordinates[number], wanted, self._values))


STRATEGIES = {"exhaustive": Exhaustive, "random": Random, "guided": Guided}


def load_optuna():
    """The module. RuntimeError, saying what brings it, where it is not installed."""
    try:
        import optuna
        import scipy  # noqa: F401  what its Gaussian process stands on
    except ImportError as error:
        raise RuntimeError(f"the guided strategy needs Optuna: pip install 'sbkernels[tune]' ({error})") from error
    return optuna


def sampler(optuna, seed: int):
    """Optuna's model."""
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=0)


def count(size: int, share: float) -> int:
    """How many configs a share of a space is: at least the default and one more, rounded down beyond."""
    return min(size, max(2, int(size * share)))


def ordered(values: set) -> list:
    """Values of a field from the least to the largest."""
    return sorted(values, key=lambda value: (value is None, value))


def spread(points: list[tuple], wanted: int, generator: random.Random) -> list[int]:
    """`wanted` points, the first one first, each next as far from those before it as any of a few drawn ones."""
    chosen, rest = [0], list(range(1, len(points)))
    scale = [max(column) or 1 for column in zip(*points, strict=True)]
    apart = lambda a, b: sum(abs(x - y) / s for x, y, s in zip(points[a], points[b], scale, strict=True))  # noqa: E731
    while rest and len(chosen) < wanted:
        drawn = generator.sample(rest, min(len(rest), 8))
        best = max(drawn, key=lambda number: min(apart(number, other) for other in chosen))
        chosen.append(best)
        rest.remove(best)
    return chosen


def distance(point: tuple, wanted: list, values: dict[str, list]) -> float:
    """How far apart two points are, each coordinate in units of its range."""
    return sum(abs(a - b) / max(1, len(each) - 1) for a, b, each in zip(point, wanted, values.values(), strict=True))
