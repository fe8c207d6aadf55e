"""Whether one set of samples is faster or slower than another: of two contenders that took turns, or of two runs.

No distribution is assumed. Samples of the same turns are divided by each other, which takes out what the machine did meanwhile; the
interval is that of Hodges and Lehmann for the middle of the ratios, at which Wilcoxon's signed-rank test just rejects.

Samples of two runs were not taken in turns. Each is divided by the canary's of its turn instead. Neighbours in time resemble each
other, so consecutive ratios are gathered into batches, whose medians are the observations; the interval is Hodges and Lehmann's for
two sets of them, at which the Mann-Whitney test just rejects. What the canary does not explain is added to both of its ends.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics

import numpy as np

WORDS = SAME, FASTER, SLOWER, UNSURE = "SAME", "FASTER", "SLOWER", "UNSURE"
Z = 2.576  # of a 99 % interval
BATCHES = 25
LEAST = 8  # samples: with fewer, not even ratios that all lie on one side are significant at 1 %
WORTH = 0.01  # a difference below this does not matter
EQUAL = 0.03  # SAME says that a difference of this is excluded: in the same turns, and between runs
EQUAL_RUNS = {"cpu": 0.10, "cuda": EQUAL}
# By which the same code differs from run to run beside a canary that stays the same. On a CPU the medians of 16 processes had
# standard deviations of 1 to 4 %, by problem: each process finds its memory elsewhere. A GPU's is an assumption.
UNEXPLAINED = {"cpu": 0.06, "cuda": 0.005}
FOLLOWED = 0.1  # share of the canary's move that may be missing in, or added to, a row's
MOVED = 0.15  # by which a canary may move at most: beyond, the machine is another


@dataclasses.dataclass(frozen=True)
class Samples:
    """Milliseconds of one row, and the canary's of the same turns."""

    ms: tuple[float, ...]
    canary: tuple[float, ...]

    def observations(self) -> list[float]:
        """Medians of batches of ms over canary."""
        ratios = [ms / beside for ms, beside in zip(self.ms, self.canary, strict=True)]
        count = min(BATCHES, len(ratios))
        return [statistics.median(ratios[len(ratios) * i // count : len(ratios) * (i + 1) // count]) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One of SAME, FASTER, SLOWER, UNSURE; the interval of new over old, above 1 it is slower; why UNSURE."""

    word: str
    low: float | None = None
    high: float | None = None
    why: str = ""


def ordered_interval(values: np.ndarray, mean: float, variance: float) -> tuple[float, float]:
    """The order statistics of values at Z from where the test's statistic, with this mean and variance, just rejects."""
    ordered = np.sort(values, axis=None)
    cut = max(0, math.floor(mean - Z * math.sqrt(variance)))
    return ordered[cut], ordered[-1 - cut]


def in_turns(old, new) -> Verdict:
    """new beside old, milliseconds of two contenders in the same turns; the longer one's last are left out."""
    n = min(len(old), len(new))
    if n < LEAST:
        return too_few(old, new)
    ratios = np.log(np.asarray(new[:n]) / np.asarray(old[:n]))
    first, second = np.triu_indices(n)
    averages = (ratios[first] + ratios[second]) / 2
    return judged(*ordered_interval(averages, n * (n + 1) / 4, n * (n + 1) * (2 * n + 1) / 24))


def two_runs(old: Samples, new: Samples, kind: str) -> Verdict:
    """new beside old, of two runs on the same machine; kind: of UNEXPLAINED."""
    if min(len(old.ms), len(new.ms)) < LEAST:
        return too_few(old.ms, new.ms)
    moved = math.log(statistics.median(new.canary) / statistics.median(old.canary))
    if abs(moved) > MOVED:
        return Verdict(UNSURE, why=f"the canary takes {math.exp(moved):.2f} times as long: the machine is not what it was")
    a, b = (np.log(samples.observations()) for samples in (old, new))
    n, m = len(a), len(b)
    low, high = ordered_interval(b[:, None] - a[None, :], n * m / 2, n * m * (n + m + 1) / 12)
    doubt = UNEXPLAINED[kind] + FOLLOWED * abs(moved)
    return judged(low - doubt, high + doubt, EQUAL_RUNS[kind])


def too_few(old, new) -> Verdict:
    """The verdict on fewer than LEAST samples."""
    return Verdict(UNSURE, why=f"{len(old)} and {len(new)} samples: at least {LEAST} are needed")


def judged(low: float, high: float, equal: float = EQUAL) -> Verdict:
    """The verdict of an interval of logarithms; equal: what SAME excludes."""
    low, high = math.exp(low), math.exp(high)
    if low > 1 + WORTH:
        return Verdict(SLOWER, low, high)
    if high < 1 / (1 + WORTH):
        return Verdict(FASTER, low, high)
    if low > 1 / (1 + equal) and high < 1 + equal:
        return Verdict(SAME, low, high)
    return Verdict(UNSURE, low, high, "the interval holds both no difference and one that matters")


def load(path) -> dict:
    """A record of `sbk bench --json`. ValueError if it is none."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if content["kind"] != "bench":
            raise ValueError(f"{path} is a record of {content['kind']!r}: expected one of sbk bench --json")
        content["rows"], content["canary"]["samples"], machine(content)
    except (json.JSONDecodeError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no record of sbk bench --json: {error!r}") from error
    return content


def machine(content: dict) -> str:
    """What a record was measured on: a GPU's name, or a CPU's and on how many threads."""
    kind, _, index = content["device"].partition(":")
    environment = content["environment"]
    return (
        environment["gpus"][int(index or 0)]["name"] if kind == "cuda" else f"{environment['cpu']}, threads: {content['threads']}"
    )


def key(row: dict) -> tuple:
    """What two rows have in common that are compared."""
    names = ("case", "contender", "direction", "B", "H", "Hk", "M", "N", "D", "Dv", "dtype")
    return *(row[name] for name in names), tuple(row["lengths"])


def samples(content: dict, row: dict) -> Samples:
    """A row's, with the canary's of the same turns."""
    canary = content["canary"]["samples"].get(f"{row['case']}, {row['direction']}", ())
    return Samples(tuple(row["samples"]), tuple(canary[: len(row["samples"])]))


def check_machine(old: dict, new: dict) -> None:
    """ValueError where records are of different machines; of the new one device, threads and environment are enough."""
    if machine(old) != machine(new):
        raise ValueError(f"the record is of {machine(old)} and this is {machine(new)}: expected the same machine")


def against(old: dict, new: dict) -> list[tuple[dict, Verdict]]:
    """A verdict for each of our rows of a new record of the same machine that has samples in the old one, too.

    ValueError where the records have no row in common.
    """
    kept = {key(row): row for row in old["rows"] if row["samples"]}
    pairs = [(kept[key(row)], row) for row in new["rows"] if row["ours"] and row["samples"] and key(row) in kept]
    if not pairs:
        raise ValueError("the record has none of the problems and backends that were measured")
    return [(row, verdict(old, before, new, row)) for before, row in pairs]


def verdict(old: dict, before: dict, new: dict, row: dict) -> Verdict:
    """Of a row of a new record beside the one of an old record."""
    kind = new["device"].partition(":")[0]
    if kind == "cpu" and company(old, before) != company(new, row):
        return Verdict(UNSURE, why=f"measured beside {company(new, row)}, formerly beside {company(old, before)}")
    return two_runs(samples(old, before), samples(new, row), kind)


def company(content: dict, row: dict) -> str:
    """The others that were timed in a row's turns. A CPU's caches are as they left them; a GPU's are evicted."""
    pass_ = (row["case"], row["direction"])
    names = [other["contender"] for other in content["rows"] if other["samples"] and (other["case"], other["direction"]) == pass_]
    return ", ".join(sorted(set(names) - {row["contender"]})) or "none"
