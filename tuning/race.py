"""What samples say: which rounds count, which config is faster, and when that is known well enough.

Every sample of a config is taken beside one of a canary, the default config: where the canary differs from its own median, the
machine was doing something else, and the round does not count.
"""

from __future__ import annotations

import statistics

from ..bench.timer import Timing

DRIFT = 0.01  # of the canary, beyond its own scatter
SCATTER = 3.0  # times the canary's median deviation: what its own scatter is
WELL_KNOWN = 0.005  # half the interval of a median, as a share of it


def quiet(canary: list[float]) -> list[int]:
    """Rounds in which the canary was near its median."""
    median = statistics.median(canary)
    scatter = statistics.median(abs(x - median) for x in canary)
    allowed = max(DRIFT * median, SCATTER * scatter)
    return [i for i, x in enumerate(canary) if abs(x - median) <= allowed]


def interval(samples: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median."""
    return Timing(tuple(samples)).interval


def behind(samples: list[float], leader: list[float]) -> bool:
    """Whether the interval of one lies above the leader's."""
    return interval(samples)[0] > interval(leader)[1]


def known(samples: list[float]) -> bool:
    """Whether a median is known to WELL_KNOWN."""
    low, high = interval(samples)
    return (high - low) / 2 <= WELL_KNOWN * statistics.median(samples)
