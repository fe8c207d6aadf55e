"""Which tuned config serves a problem, by tiers: the same problem; a neighbouring one, at most an octave off; the same two of
another toolchain; those of a device of the same architecture. Never of other kernel sources, never a config that is not legal here
or that was wrong, crashed or hung at any size of such a problem.

A tier comes before where a row is from; equals go to the smaller problem and then by the config's digest, so that all ranks of a
job with the same rows choose the same.
"""

from __future__ import annotations

import math
import sqlite3
import warnings
from collections.abc import Callable

from .. import registry
from ..config import Answer
from ..problem import Problem
from . import keys
from .store import Row, Store

OCTAVES = 1.0  # how far off a neighbour may be, in each size
TAIL = 64  # sizes that are and are not multiples of this are less alike than their ratio says
ANSWERS_KEPT = 1024


class Lookup:
    """Answers of some databases, for config.install_lookup.

    open_stores: gives (name, Store) of each database, the user's first. Called once for each backend and direction; what it opens
    is read and closed, so that threads and forked processes share nothing.
    """

    def __init__(self, open_stores: Callable[[], list[tuple[str, Store]]]):
        self._open_stores = open_stores
        self._answers: dict[tuple[str, Problem, object], Answer | None] = {}
        self._rows: dict[tuple[str, str], dict[str, list[tuple[int, str, Row]]]] = {}

    def __call__(self, backend: str, problem: Problem, goes_with=None) -> Answer | None:
        """For a backend's name and a problem, and with the other direction's config; None where no row serves."""
        key = backend, problem, goes_with
        try:
            return self._answers[key]
        except KeyError:
            pass
        if len(self._answers) >= ANSWERS_KEPT:
            self._answers.clear()
        self._answers[key] = answer = self._find(registry.load(backend), problem, goes_with)
        return answer

    def _find(self, backend, problem: Problem, goes_with) -> Answer | None:
        if problem.empty or not problem.keys or not self._served(backend, problem.direction):
            return None
        wanted, here = keys.problem(problem), keys.machine(problem.device)
        machine, toolchain = keys.digest(here), keys.digest(keys.toolchain(backend, problem.device))
        alike = self._served(backend, problem.direction).get(keys.canonical(wanted["exact"]), ())
        broken = {row.config_id for _, _, row in alike if row.broken}
        ranked = []
        for place, origin, row in alike:
            if row.confirmed is None or row.config_id in broken:
                continue
            sizes = row.problem["sizes"]
            distance = octaves(sizes, wanted["sizes"], row.machine, here, row.config)
            if distance is None or not (row.machine_id == machine or same_architecture(row.machine, here)):
                continue
            elsewhere = 2 if row.machine_id != machine else 1 if row.toolchain_id != toolchain else 0
            tier = 2 * elsewhere + (sizes != wanted["sizes"])
            tails = sum((sizes[name] % TAIL == 0) != (wanted["sizes"][name] % TAIL == 0) for name in ("queries", "keys"))
            order = (tier, tails, distance, place, math.prod(sizes.values()), row.confirmed, row.config_id)
            ranked.append((order, origin, row))
        for (tier, _, distance, *_), origin, row in sorted(ranked, key=lambda each: each[0]):
            chosen = make(backend.config_types[problem.direction], row.config)
            if chosen is None or backend.illegal(problem, chosen) is not None or not together(backend, problem, chosen, goes_with):
                continue
            sizes = "{heads} heads, M={queries} N={keys}".format(**row.problem["sizes"])
            what = f"tuned for {sizes}, {distance:.1f} octaves off" if tier % 2 else "tuned"
            where = ("", "with another toolchain", f"on {row.machine['name']}")[tier // 2]
            measured_on = f"{row.machine_id} {sizes}"
            return Answer(row.config, ", ".join(filter(None, (what, where, origin))), row.confirmed, measured_on)
        return None

    def _served(self, backend, direction: str) -> dict[str, list[tuple[int, str, Row]]]:
        """(place among the databases, its name, row) of all that was measured of a backend's kernels, by what has to match."""
        key = backend.name, direction
        if key not in self._rows:
            rows = self._rows[key] = {}
            for place, (origin, store) in enumerate(self._open_stores()):
                try:
                    with store:
                        found = store.measured(keys.kernel(backend, direction))
                except (sqlite3.DatabaseError, ValueError) as error:  # of damage that opening did not see
                    warnings.warn(f"tuned configs of {origin} are not used: {error}", stacklevel=2)
                    continue
                for row in found:
                    if keys.digest(row.config) == row.config_id:
                        rows.setdefault(keys.canonical(row.problem["exact"]), []).append((place, origin, row))
        return self._rows[key]


def together(backend, problem: Problem, config, other) -> bool:
    """Whether a config of the problem's direction goes with one of the other direction; None goes with all."""
    pair = (config, other) if problem.direction == "forward" else (other, config)
    return other is None or backend.mismatch(*pair) is None


def make(config_type, values: dict):
    """A config of stored values; None if its fields are others."""
    try:
        return config_type(**values)
    except TypeError:
        return None


def same_architecture(one: dict, other: dict) -> bool:
    """Whether GPUs have the same compute capability and multiprocessors within OCTAVES."""
    if one.get("kind") != "cuda" or other.get("kind") != "cuda" or one["capability"] != other["capability"]:
        return False
    return abs(math.log2(one["multiprocessors"] / other["multiprocessors"])) <= OCTAVES


def octaves(sizes: dict, wanted: dict, machine: dict, here: dict, config: dict) -> float | None:
    """From a tuned problem to the wanted one: |log2| of the ratios of M, N and waves, summed; None with any beyond OCTAVES."""
    block = block_rows(config)
    ratios = (
        sizes["queries"] / wanted["queries"],
        sizes["keys"] / wanted["keys"],
        waves(sizes, machine, block) / waves(wanted, here, block),
    )
    apart = [max(ratio, 1 / ratio) for ratio in ratios]
    return math.log2(math.prod(apart)) if max(apart) <= 2**OCTAVES else None


def block_rows(config: dict) -> int:
    """Query rows of a block; 1 where a config has no BLOCK_M."""
    return next((value for name, value in config.items() if name.endswith("BLOCK_M") and value), 1)


def waves(sizes: dict, machine: dict, block: int) -> float:
    """Blocks of query rows for each multiprocessor or core."""
    return sizes["heads"] * -(-sizes["queries"] // block) / machine.get("multiprocessors", machine.get("cores", 1))
