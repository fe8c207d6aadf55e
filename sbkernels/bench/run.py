"""Measures sets of problems: every contender of a problem in turns, beside what the machine can do; checked on fresh inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import math
import time
from collections.abc import Callable

import torch

from .. import registry
from ..problem import DTYPES
from ..verify import inputs
from ..verify.run import attend, problem_of, variant_of, why_not
from ..verify.spots import judge_spots, spots
from . import contenders, limits, regress, step, timer
from .clock import Clock
from .contenders import NotHere
from .rows import Canary, Row, rounded
from .sets import Case

# On a GPU such that a set of 28 problems and passes with eight contenders takes two or three minutes; a CPU's times scatter more.
EFFORT = {
    "cuda": timer.Effort(seconds=0.1, least=regress.LEAST, most=200),
    "cpu": timer.Effort(seconds=0.4, least=regress.LEAST, most=400),
}
WARM_EFFORT = timer.Effort(seconds=0.03, least=3, most=30)
MAX_CALL_SECONDS = 0.5  # contenders that take longer are not timed, and not tried again on as much work
MAX_SLOW_LOGITS = 2**14  # for a backend that runs but slowly: Triton's interpreter
FRESH_SEED = 1  # of the inputs on which results are checked; those that are timed have Case's seed 0
HOST_LOGITS = 2**14  # up to here the host's time for a call is measured, too
# Above which no gap between launches shows; and how far a replay's time may be from the events' to be called the same.
REPLAYED_MS, REPLAY_AGREES, REPLAY_AGREES_MS = 1.0, 0.05, 0.003
EAGER, COMPILED = "eager", "torch.compile"


@dataclasses.dataclass
class Bench:
    """Where and with whom a set is measured, and what came of it."""

    device: str
    backends: list[str]
    beside: tuple[str, ...]
    limits: limits.Limits
    clock: Clock | None = None
    until: float = math.inf  # of time.monotonic(): after that no further problem is begun
    sustained: float = 0.0  # seconds that each contender runs over and over besides
    progress: Callable[..., object] = lambda *what: None
    rows: list[Row] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)  # problems, and why

    def __post_init__(self):
        what, self._canary = limits.canary(self.device)
        self.canary = Canary(what)
        self._gave_up: dict[tuple[str, str], float] = {}  # by contender and pass, operations that took too long

    def run(self, cases: list[Case]) -> None:
        """Measure case by case; the rows of a case are added once all of it was measured and checked."""
        with timer.own_stream(self.device):
            for case in cases:
                if time.monotonic() > self.until:
                    self.left_out[case.name] = "no time was left"
                    continue
                try:
                    self.rows += self._case(case)
                except torch.OutOfMemoryError as error:
                    self.left_out[case.name] = in_words(error)
                release(self.device)

    def _case(self, case: Case) -> list[Row]:
        """Rows of all passes, measured and checked."""
        x = inputs.make(case.case, DTYPES[case.dtype], self.device)
        made = self._make(case, x)
        rows = [row for direction in case.directions for row in self._measure(case, x, direction, made)]
        del x, made
        release(self.device)
        self._check(case, rows)
        return rows

    def _candidates(self, case: Case, x: inputs.Inputs) -> dict[str, Callable[[], dict]]:
        """{contender: function that makes it}, which raises where it cannot run."""
        dtype, found = DTYPES[case.dtype], {}
        for name in self.backends:
            backend = registry.load(name)
            make = functools.partial(contenders.ours, x, backend)
            if case.step:
                make = functools.partial(step.contender, case.step, step.stickbreaking(name), dtype, self.device)
            found[name] = functools.partial(willing, backend, problem_of(x), make)
        for name in beside(self.device, bool(case.step)):
            if name in self.beside:
                found[name] = functools.partial(MAKERS[name], x)
                if case.step:
                    found[name] = functools.partial(step.softmax_contender, name, case.step, dtype, self.device)
        return found

    def _make(self, case: Case, x: inputs.Inputs) -> dict[str, dict | Exception]:
        """{contender: its functions by direction, or why it has none}."""
        found = {}
        for name, make in self._candidates(case, x).items():
            self.progress(case.name, "prepared", name)
            try:
                self._try_again(case, x, name, case.directions[0])  # making it takes as long as that
                found[name] = make()
            except Exception as error:  # a contender's failure is its row's note; the others go on
                found[name] = error.with_traceback(None)  # which would keep its tensors
                release(self.device)
        return found

    def _measure(self, case: Case, x: inputs.Inputs, direction: str, made: dict) -> list[Row]:
        """Rows of one pass."""
        c = x.case
        rows, functions = {}, {}
        for name, by_direction in made.items():
            self.progress(case.name, direction, name)
            sizes = (c.B, c.H, c.Hk, c.M, c.N, c.D, c.Dv, c.lengths)
            row = rows[name] = Row(case.name, *sizes, case.dtype, name, name in self.backends, direction, case.inputs)
            try:
                if isinstance(by_direction, Exception):
                    raise by_direction
                self._try_again(case, x, name, direction)
                function = by_direction["forward" if direction == "decode" else direction]
                seconds, row.peak_bytes = tried(function, self.device)
                if seconds > MAX_CALL_SECONDS:
                    row.add_note(f"not timed: a call takes {seconds:.1f} s")
                    self._gave_up[name, direction] = work(case, x, direction).flops
                else:
                    functions[name] = function
            except NotHere as reason:
                row.add_note(str(reason))
            except Exception as error:  # as in _make
                row.ok = not row.ours
                row.add_note(in_words(error))
                release(self.device)
        self.progress(case.name, direction, "timed")
        options = {"canary": self._canary, "clock": self.clock}
        times = timer.measure(functions, self.device, effort=EFFORT[self.device.partition(":")[0]], **options)
        warm = timer.measure(functions, self.device, effort=WARM_EFFORT, warm=True) if self.device != "cpu" else {}
        if times:
            longest = max(times.values(), key=lambda timing: len(timing.beside))
            self.canary.samples[f"{case.name}, {direction}"] = rounded(longest.beside)
            if longest.clock:
                self.canary.mhz[f"{case.name}, {direction}"] = longest.clock
        for name in times if self.sustained else ():
            self.progress(case.name, direction, "over and over", name)
            rows[name].sustained = timer.sustained(functions[name], self.device, self.sustained, self.clock)
        for name, timing in times.items():
            self._fill(rows[name], timing, work(case, x, direction), times)
            rows[name].warm_ms = warm[name].median if warm else None
            if case.step and timing.samples:
                rows[name].add_note(f"{case.step.batch * case.step.tokens / timing.median * 1e3:.0f} tokens/s")
        if self.device != "cpu":
            self._cross_check(x, functions, rows)
        return list(rows.values())

    def _try_again(self, case: Case, x: inputs.Inputs, name: str, direction: str) -> None:
        """NotHere where a contender took too long with at most as much work."""
        if work(case, x, direction).flops >= self._gave_up.get((name, direction), math.inf):
            raise NotHere("not tried: takes too long with at most as much work")

    def _fill(self, row: Row, timing: timer.Timing, least: limits.Work, times: dict[str, timer.Timing]) -> None:
        """What one contender's samples say."""
        if timing.dropped:
            row.add_note(f"{timing.dropped} turns below {self.clock.declared:.0f} MHz thrown out")
        if not timing.samples:
            return
        row.ms, row.interval, row.samples = timing.median, timing.interval, rounded(timing.samples)
        row.tflops = least.flops / row.ms / 1e9
        least_ms, row.limit = self.limits.least_ms(least)
        row.of_limit = least_ms / row.ms
        row.ratios = {
            name: other.median / row.ms
            for name, other in times.items()
            if name in contenders.SOFTMAX and name != row.contender and other.samples
        }

    def _cross_check(self, x: inputs.Inputs, functions: dict[str, Callable], rows: dict[str, Row]) -> None:
        """What else is known of short calls on a GPU: whether graph replay agrees with events, the host's time."""
        for name, function in functions.items():
            row = rows[name]
            if row.ms is None or row.ms > REPLAYED_MS:
                continue
            try:
                replayed = timer.replayed(function, self.device)
            except Exception as error:  # as in _make
                row.add_note(f"not captured in a graph: {in_words(error)}")
                continue
            if abs(replayed - row.ms) > max(REPLAY_AGREES * row.ms, REPLAY_AGREES_MS):
                row.add_note(f"replayed from a graph {replayed:.4f} ms")
        if x.case.B * x.case.H * x.case.M * x.case.N <= HOST_LOGITS:
            for name, us in timer.measure_host(functions, self.device).items():
                rows[name].add_note(f"host {us:.1f} us a call")

    def _check(self, case: Case, rows: list[Row]) -> None:
        """Hold our contenders that were timed against float64, on inputs they have not seen; what is wrong has no time."""
        timed = dict.fromkeys(row.contender for row in rows if row.ours and row.ms is not None)
        if not timed:
            return
        x = inputs.make(dataclasses.replace(case.case, seed=FRESH_SEED), DTYPES[case.dtype], self.device)
        expected = spots(x)
        for name in timed:
            self.progress(case.name, "checked", name)
            backend = registry.load(name)
            try:
                with variant_of(backend, "", problem_of(x)):
                    bad = [f"{f.output} ({f.where})" for f in judge_spots(expected, attend(x)) if not f.ok]
            except Exception as error:  # as in _measure
                bad = [in_words(error)]
            for row in rows if bad else ():
                if row.contender == name:
                    row.forget()
                    row.add_note(f"wrong on fresh inputs: {'; '.join(bad)}")


def willing(backend, problem, make: Callable[[], dict]) -> dict:
    """make(), or NotHere where a backend does not take a problem, or only slowly."""
    logits = problem.batch * problem.heads * problem.visible_logits()
    slow = backend.slow(problem)
    reason = why_not(backend, "", problem) or (f"left out: {slow}" if slow and logits > MAX_SLOW_LOGITS else "")
    if reason:
        raise NotHere(reason)
    return make()


MAKERS = {
    **{name: functools.partial(contenders.softmax, name=name) for name in contenders.SOFTMAX},
    EAGER: contenders.eager,
    COMPILED: contenders.compiled,
    contenders.AUTHORS: contenders.authors,
}


def work(case: Case, x: inputs.Inputs, direction: str) -> limits.Work:
    """The least that one pass of a case asks for."""
    return step.work(case.step, x) if case.step else limits.work(x, direction)


def beside(device: str, softmax_only: bool = False) -> list[str]:
    """Names of what may stand beside our backends on a device."""
    found = contenders.softmax_names(device)
    if not softmax_only:
        found += [EAGER, COMPILED]
        if importlib.util.find_spec("stickbreaking_attention"):
            found.append(contenders.AUTHORS)
    return found


def tried(function: Callable, device: str) -> tuple[float, int | None]:
    """Call twice, so that all is compiled: (seconds, bytes taken at most) of the second call; bytes are a GPU's."""
    function()
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, begin = torch.cuda.memory_allocated(device), time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated(device) - before


def release(device: str) -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if device.startswith("cuda"):
        with contextlib.suppress(RuntimeError):  # of a failed capture; what was measured stays
            torch.cuda.empty_cache()


def in_words(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
