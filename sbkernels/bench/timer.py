"""The one timer: contenders take turns in a new order each, samples start with a cold L2, the result is a median with its interval.

On CUDA devices times come from events, on CPUs from perf_counter_ns. Correctness is the caller's to check, before and after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Callable

import torch

from .clock import Clock

L2_BYTES = 2**28  # more than any GPU's L2: writing this much evicts it, so that inputs need not be rotated
# How often it is written before a sample: about a millisecond, in which the host enqueues the sample. Otherwise short kernels
# would be timed by the Python that launches them; a host that takes longer still shows in the result.
FLUSHES = 12
WARMUP_CALLS = 2
TARGET_SECONDS = 0.4  # time spent on each contender's samples
MIN_SAMPLES, MAX_SAMPLES = 3, 200
HOST_CALLS, HOST_ROUNDS, HOST_SECONDS = 20, 200, 2
REPLAYS = 5  # of a captured call
BATCH_SECONDS = 0.05  # of calls between two looks at the clock, in `sustained`


@dataclasses.dataclass(frozen=True)
class Timing:
    """Samples in milliseconds; median and the 95 % interval of the median (order statistics).

    beside: the canary's samples of the same turns, in the same order; empty where there was none. dropped: turns that were thrown
    out for a slow clock. clock: median SM clock of those that were kept, in MHz; None where nothing reads it.
    """

    samples: tuple[float, ...]
    beside: tuple[float, ...] = ()
    dropped: int = 0
    clock: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        ordered, n = sorted(self.samples), len(self.samples)
        reach = math.ceil(0.98 * math.sqrt(n))
        return ordered[max(0, n // 2 - reach)], ordered[min(n - 1, n // 2 + reach)]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long each contender is sampled, and how often at least and at most."""

    seconds: float = TARGET_SECONDS
    least: int = MIN_SAMPLES
    most: int = MAX_SAMPLES

    def rounds(self, ms: float) -> int:
        """Samples of a function that takes so many milliseconds."""
        return round(min(self.most, max(self.least, self.seconds / max(ms / 1e3, 1e-9))))


def sampler(device: str, warm: bool = False, watch: Callable[[], object] = lambda: None) -> Callable[[Callable], float]:
    """A function that times one call of an argument-less function, in milliseconds.

    On a GPU after its L2 was evicted, or with `warm`, right after another call. watch() is called after the function, on a GPU
    while it is still under way.
    """

    def cpu_sample(function: Callable) -> float:
        begin = time.perf_counter_ns()
        function()
        elapsed = (time.perf_counter_ns() - begin) / 1e6
        watch()
        return elapsed

    if not device.startswith("cuda"):
        return cpu_sample
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)

    def sample(function: Callable) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            flush.zero_()
        if warm:
            function()
        begin.record()
        function()
        end.record()
        watch()
        end.synchronize()
        return begin.elapsed_time(end)

    return sample


def measure_host(contenders: dict[str, Callable], device: str) -> dict[str, float]:
    """Microseconds until an argument-less function returns that enqueues little work on a CUDA device; by name, called in turns.

    The least mean of HOST_CALLS calls, HOST_ROUNDS times or for HOST_SECONDS: whatever else the machine does only adds to it.
    """
    best, left = dict.fromkeys(contenders, math.inf), dict.fromkeys(contenders, HOST_SECONDS * 1e6)
    for _ in range(HOST_ROUNDS):
        for name, function in contenders.items():
            if left[name] <= 0:
                continue
            function()  # caches are this contender's
            torch.cuda.synchronize(device)
            begin = time.perf_counter_ns()
            for _ in range(HOST_CALLS):
                function()
            spent = (time.perf_counter_ns() - begin) / 1e3
            best[name] = min(best[name], spent / HOST_CALLS)
            left[name] -= spent
        torch.cuda.synchronize(device)
    return best


def measure(
    contenders: dict, device: str, *, effort: Effort | None = None, warm: bool = False, canary: Callable | None = None,
    clock: Clock | None = None,
) -> dict:  # fmt: skip
    """{name: Timing} of argument-less functions that take turns on one device.

    warm: as in `sampler`. canary: a function that is sampled in every turn beside them. clock: turns in which it is below what it
    declares are thrown out; a Timing has no samples where that were all.
    """
    if not contenders:
        return {}
    effort, readings = effort or Effort(), []
    # Once a turn: what it costs is not known of all drivers.
    sample = sampler(device, warm, lambda: clock and (readings or readings.append(clock.read())))
    canary_key = object()  # no contender's name
    functions, cost = contenders | ({canary_key: canary} if canary else {}), {}
    for name, function in functions.items():
        for _ in range(WARMUP_CALLS if device.startswith("cuda") else 1):
            sample(function)
        cost[name] = sample(function)
    rounds = {name: effort.rounds(cost[name]) for name in contenders}
    turns = max(rounds.values())
    # In a fixed order each would find the caches as the same other one left them: 3 % of 1 ms on a CPU.
    order, shuffle = list(functions), random.Random(0).shuffle
    samples, beside = {name: [] for name in contenders}, {name: [] for name in contenders}
    clocks, dropped = [], 0
    for turn in range(turns):
        readings.clear()
        shuffle(order)
        taken = {}
        for name in order:
            if name is canary_key:
                canary()  # so that it finds its own data in a CPU's caches, whoever came before
            if turn < rounds.get(name, turns):
                taken[name] = sample(functions[name])
        if clock and readings[0] < clock.declared:
            dropped += 1
            continue
        clocks += readings
        for name in contenders.keys() & taken.keys():
            samples[name].append(taken[name])
            if canary:
                beside[name].append(taken[canary_key])
    mhz = statistics.median(clocks) if clocks else None
    return {name: Timing(tuple(samples[name]), tuple(beside[name]), dropped, mhz) for name in contenders}


@dataclasses.dataclass(frozen=True)
class Sustained:
    """A function over and over: mean milliseconds a call by the host's clock; mean SM clock in MHz and power in watts meanwhile.

    None where nothing reads them. Where the host enqueues more slowly than the device works, ms is the host's time.
    """

    ms: float
    mhz: float | None = None
    watts: float | None = None

    def __str__(self) -> str:
        read = ((self.mhz, "MHz"), (self.watts, "W"))
        return ", ".join([f"{self.ms:.4g} ms", *(f"{value:.0f} {unit}" for value, unit in read if value is not None)])


def sustained(function: Callable, device: str, seconds: float, clock: Clock | None = None) -> Sustained:
    """An argument-less function alone, over and over for as many seconds, after half as many that do not count.

    Samples of single calls start from a GPU that was writing memory at its highest clock. Dense kernels that run on bring it to its
    power limit, and the clock down: on an H100 by up to a quarter (csrc/NOTES-backward.md).
    """
    synchronize = functools.partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None

    def run(seconds: float, batch: int) -> tuple[int, float, list[int]]:
        """(calls, seconds they took, clocks while they were under way)."""
        calls, elapsed, readings = 0, 0.0, []
        begin = time.perf_counter()
        while elapsed < seconds:
            for _ in range(batch):
                function()
            if clock:
                readings.append(clock.read())
            synchronize()
            calls, elapsed = calls + batch, time.perf_counter() - begin
        return calls, elapsed, readings

    calls, elapsed, _ = run(seconds / 2, 1)
    before = clock and clock.joules()
    calls, elapsed, readings = run(seconds, max(1, round(BATCH_SECONDS * calls / elapsed)))
    taken = None if before is None else clock.joules() - before
    return Sustained(1e3 * elapsed / calls, statistics.mean(readings) if readings else None, taken and taken / elapsed)


def replayed(function: Callable, device: str) -> float:
    """Median milliseconds of REPLAYS replays of a call captured in a CUDA graph; has to run within `own_stream`.

    RuntimeError where it cannot be captured.
    """
    graph, sample = torch.cuda.CUDAGraph(), sampler(device)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        function()
    return statistics.median(sample(graph.replay) for _ in range(REPLAYS))


@contextlib.contextmanager
def own_stream(device: str):
    """Makes a stream other than the default one current, on which calls can be captured: backwards run where their forwards did."""
    if not device.startswith("cuda"):
        yield
        return
    stream, outer = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)
