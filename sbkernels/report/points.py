"""Measured times of `sbk bench` and `sbk compare` in one form: a point for each contender, problem and pass."""

from __future__ import annotations

import collections
import dataclasses
import math

from ..bench import compare
from ..problem import DTYPE_NAMES, DTYPES
from ..verify.report import label
from .stored import Record, Stored

KIB = 2**10
DECODE = "decode"  # a forward with one query


@dataclasses.dataclass(frozen=True)
class Point:
    """One contender on one problem, one pass. sizes: B, H, Hk, M, N, D, Dv; None where the record does not say.

    share: of the limit that is named, 1 is all of it. ratios: by softmax contender its time over this one's.
    """

    machine: str
    problem: str
    contender: str
    ours: bool
    direction: str
    dtype: str
    sizes: tuple[int, ...] | None
    ms: float
    interval: tuple[float, float] | None
    tflops: float | None
    ratios: dict[str, float]
    packed: bool = False
    share: float | None = None
    limit: str = ""
    peak_bytes: int | None = None

    @property
    def D(self) -> int:
        return self.sizes[5]

    @property
    def N(self) -> int:
        return self.sizes[4]

    @property
    def work(self) -> int:
        """B H N D: what training sets keep constant over N."""
        B, H, _, _, N, D, _ = self.sizes
        return B * H * N * D

    def flops_a_logit(self) -> int:
        """Of the matrix products: two, backward five."""
        *_, D, Dv = self.sizes
        return 2 * (3 * D + 2 * Dv) if self.direction == "backward" else 2 * (D + Dv)

    def bytes_moved(self) -> int:
        """Each input read and each result written once."""
        B, H, Hk, M, N, D, Dv = self.sizes
        inputs, output = H * M * D + Hk * N * (D + Dv), H * M * Dv
        return B * (2 * inputs + output if self.direction == "backward" else inputs + output) * DTYPES[self.dtype].itemsize

    def intensity(self) -> float:
        """Matrix operations a byte of memory traffic."""
        B, H, _, M, N, *_ = self.sizes
        return self.flops_a_logit() * B * H * M * (N - M / 2) / self.bytes_moved()

    def rate(self) -> float:
        """What is drawn over N: TFLOP/s; of decoding, which memory bounds, GB/s."""
        return self.bytes_moved() / self.ms / 1e6 if self.direction == DECODE else self.tflops


def points(stored: Stored) -> dict[str, list[Point]]:
    """By machine, GPUs first. A machine whose benchmarks have times over N is not shown by its comparisons, too."""
    records = sorted(stored.of("bench", "compare"), key=lambda record: not record.on_gpu)
    found = {record.machine: [] for record in records}
    for record in records:
        if record.kind == "bench":
            found[record.machine] += of_bench(record)
    benched = {machine for machine, mine in found.items() if any(curves(mine, way) for way in ("forward", "backward"))}
    for record in records:
        if record.kind == "compare" and record.machine not in benched:
            found[record.machine] += of_compare(record)
    return found


def of_bench(record: Record) -> list[Point]:
    """Every row that was timed and right."""
    return [
        Point(
            record.machine, row["case"], row["contender"], row["ours"], row["direction"], row["dtype"],
            tuple(row[name] for name in ("B", "H", "Hk", "M", "N", "D", "Dv")), row["ms"], row.get("interval"), row.get("tflops"),
            row.get("ratios") or {}, bool(row.get("lengths")), row.get("of_limit"), row.get("limit") or "", row.get("peak_bytes"),
        )
        for row in record.rows
        if row.get("ms") is not None and row.get("ok", True)
    ]  # fmt: skip


def of_compare(record: Record) -> list[Point]:
    """Every row that was timed, and softmax's of the same run, whose times follow from the ratios."""
    kind, found = "cuda" if record.on_gpu else "cpu", {}
    shapes = {compare.title(shape): shape[1:] for shape in compare.SHAPES[kind]}
    for row in record.rows:
        if row["ms"] is None:
            continue
        sizes, dtype = None, ""
        if row["problem"] in shapes:
            B, H, Hk, N, D = shapes[row["problem"]]
            sizes, dtype = (B, H, Hk, N, N, D, D), DTYPE_NAMES[compare.SYNTHETIC_DTYPE[kind]]
        whose = (record.machine, row["problem"])
        shared = (row["direction"], dtype, sizes)
        name = label(row["backend"], row["variant"])
        interval = tuple(row["interval"]) if row["interval"] else None
        found[(*whose, name, *shared)] = Point(*whose, name, True, *shared, row["ms"], interval, row["tflops"], row["ratios"])
        for other, ratio in row["ratios"].items():
            tflops = row["tflops"] / ratio if row["tflops"] else None
            found.setdefault((*whose, other, *shared), Point(*whose, other, False, *shared, row["ms"] * ratio, None, tflops, {}))
    return list(found.values())


def curves(found: list[Point], direction: str) -> dict[int, list[Point]]:
    """By head dim, what can be drawn over N: dense problems, of decoding those with one query, of others as many queries as keys,
    heads not shared, of one size over N or larger. Head dims with a single N are left out.
    """
    dense = [p for p in found if p.sizes and not p.packed and p.direction == direction and p.tflops]
    fit = [p for p in dense if direction == DECODE or (p.sizes[3] == p.N and p.sizes[1] == p.sizes[2])]
    if not fit:
        return {}
    (usual, _), *_ = collections.Counter(p.work for p in fit).most_common(1)
    best = {}
    for p in sorted(fit, key=lambda p: p.work):
        if p.work >= usual or direction == DECODE:
            best.setdefault((p.D, p.contender, p.N), p)
    by_dim = collections.defaultdict(list)
    for p in best.values():
        by_dim[p.D].append(p)
    return {D: sorted(kept, key=lambda p: p.N) for D, kept in sorted(by_dim.items()) if len({p.N for p in kept}) > 1}


def fastest(found: list[Point]) -> str | None:
    """Our contender with the best mean speed beside all contenders at the same problems and passes."""
    best = collections.defaultdict(lambda: math.inf)
    for p in found:
        best[p.problem, p.direction] = min(best[p.problem, p.direction], p.ms)
    shares = collections.defaultdict(list)
    for p in found:
        if p.ours:
            shares[p.contender].append(math.log(best[p.problem, p.direction] / p.ms))
    most = max(map(len, shares.values()), default=0)
    return max((name for name in shares if len(shares[name]) == most), key=lambda name: sum(shares[name]), default=None)


def span(found: list[Point], contender: str, other: str, direction: str) -> tuple[float, float] | None:
    """Least and largest speed of a contender beside another; None where they never met."""
    met = [p.ratios[other] for p in found if p.contender == contender and p.direction == direction and other in p.ratios]
    return (min(met), max(met)) if met else None


def short(length: int) -> str:
    """A length as it is spoken of: 4k for 4096."""
    return f"{length // KIB}k" if length >= KIB and length % KIB == 0 else str(length)


def left_out(stored: Stored) -> list[tuple]:
    """(record, problem, contender, pass, why) of every row that has no time, or was wrong."""
    found = []
    for record in stored.of("bench", "compare"):
        for row in record.rows:
            if row["ms"] is None or not row.get("ok", True):
                who = row["contender"] if record.kind == "bench" else label(row["backend"], row["variant"])
                found.append((record.name, row.get("case") or row.get("problem"), who, row["direction"], row.get("note") or ""))
    return found
