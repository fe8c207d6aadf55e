"""The one timer: contenders take turns, samples start with a cold L2, the result is a median with its confidence interval.

On CUDA devices times come from events, on CPUs from perf_counter_ns. Correctness is the caller's to check, before and after.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch

L2_BYTES = 2**28  # more than any GPU's L2: writing this much evicts it
# How often it is written before a sample: about a millisecond, in which the host enqueues the sample. Otherwise short kernels
# would be timed by the Python that launches them; a host that takes longer still shows in the result.
FLUSHES = 12
WARMUP_CALLS = 2
TARGET_SECONDS = 0.4  # time spent on each contender's samples
MIN_SAMPLES, MAX_SAMPLES = 3, 200
HOST_CALLS, HOST_ROUNDS = 20, 200


@dataclasses.dataclass(frozen=True)
class Timing:
    """Samples in milliseconds; median and the 95 % interval of the median (order statistics)."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        ordered, n = sorted(self.samples), len(self.samples)
        reach = math.ceil(0.98 * math.sqrt(n))
        return ordered[max(0, n // 2 - reach)], ordered[min(n - 1, n // 2 + reach)]


def _cuda_sample(function: Callable, flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        flush.zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _cpu_sample(function: Callable, _flush) -> float:
    begin = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - begin) / 1e6


def sampler(device: str) -> Callable[[Callable], float]:
    """A function that times one call of an argument-less function, in milliseconds, after the L2 of a GPU was evicted."""
    if not device.startswith("cuda"):
        return lambda function: _cpu_sample(function, None)
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    return lambda function: _cuda_sample(function, flush)


def measure_host(contenders: dict[str, Callable], device: str) -> dict[str, float]:
    """Microseconds until an argument-less function returns that enqueues little work on a CUDA device; by name, called in turns.

    The least mean of HOST_CALLS calls: whatever else the machine does only adds to it.
    """
    best = dict.fromkeys(contenders, math.inf)
    for _ in range(HOST_ROUNDS):
        for name, function in contenders.items():
            function()  # caches are this contender's
            torch.cuda.synchronize(device)
            begin = time.perf_counter_ns()
            for _ in range(HOST_CALLS):
                function()
            best[name] = min(best[name], (time.perf_counter_ns() - begin) / HOST_CALLS / 1e3)
        torch.cuda.synchronize(device)
    return best


def measure(contenders: dict[str, Callable], device: str) -> dict[str, Timing]:
    """Time argument-less functions in turns on one device; by name."""
    if not contenders:
        return {}
    sample, cost = sampler(device), {}
    for name, function in contenders.items():
        for _ in range(WARMUP_CALLS if device.startswith("cuda") else 1):
            sample(function)
        cost[name] = sample(function)
    rounds = {name: round(min(MAX_SAMPLES, max(MIN_SAMPLES, TARGET_SECONDS / max(ms / 1e3, 1e-9)))) for name, ms in cost.items()}
    samples = {name: [] for name in contenders}
    for turn in range(max(rounds.values())):
        for name, function in contenders.items():
            if turn < rounds[name]:
                samples[name].append(sample(function))
    return {name: Timing(tuple(values)) for name, values in samples.items()}
