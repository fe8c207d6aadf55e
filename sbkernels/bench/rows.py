"""What is stored of a run of `sbk bench`."""

from __future__ import annotations

import dataclasses
import statistics

from .timer import Sustained


@dataclasses.dataclass
class Row:
    """One contender on one problem, one pass. B to Dv and lengths as in inputs.Case, M and N of packed sequences in all.

    ms: median, with the 95 % interval; samples: those it is of, in milliseconds, beside the canary's of the same turns. tflops: of
    the causal half. of_limit: the least time that `limit` allows, over ms. ratios: by softmax contender, its time over this one's.
    peak_bytes: taken during a call, at most; warm_ms: with what the call before left in the L2; both of GPUs. sustained: over and
    over, where that was asked for. None: not measured, see note. ok: False where it failed or gave wrong results.
    """

    case: str
    B: int
    H: int
    Hk: int
    M: int
    N: int
    D: int
    Dv: int
    lengths: tuple[int, ...]
    dtype: str
    contender: str
    ours: bool
    direction: str
    inputs: str
    ms: float | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()
    tflops: float | None = None
    of_limit: float | None = None
    limit: str | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_bytes: int | None = None
    warm_ms: float | None = None
    sustained: Sustained | None = None
    note: str = ""
    ok: bool = True

    def add_note(self, text: str) -> None:
        """Append to what is to be said about this row."""
        self.note = f"{self.note}; {text}" if self.note else text

    def forget(self) -> None:
        """What was measured is of something wrong."""
        self.ok, self.samples, self.ratios = False, (), {}
        self.ms = self.interval = self.tflops = self.of_limit = self.limit = self.warm_ms = self.sustained = None


@dataclasses.dataclass
class Canary:
    """The fixed workload beside everything.

    samples: in milliseconds, by "case, direction", turn by turn: the first of them are of the turns in which a row's samples were
    taken. mhz: median SM clock meanwhile, where it is read.
    """

    what: str
    samples: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    mhz: dict[str, float] = dataclasses.field(default_factory=dict)

    def record(self) -> dict:
        """As it is stored; ms: the median of all."""
        every = [ms for samples in self.samples.values() for ms in samples]
        return dataclasses.asdict(self) | {"ms": statistics.median(every) if every else None}


def rounded(samples) -> tuple[float, ...]:
    """Milliseconds as they are stored: to what events and clocks resolve."""
    return tuple(float(f"{ms:.6g}") for ms in samples)
