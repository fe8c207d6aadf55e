"""Which tuned config serves a problem, by tiers: the same problem; a neighbouring one, at most an octave off; the same two of
another toolchain; those of a device of the same architecture. Never of other kernel sources, never a config that is not legal here.

A tier comes before where a row is from; equals go to the smaller problem and then by the config's digest, so that all ranks of a
job with the same rows choose the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from .. import registry
from ..problem import Problem
from . import keys
from .store import Store

OCTAVES = 1.0  # how far off a neighbour may be, in each size
TAIL = 64  # sizes that are and are not multiples of this are less alike than their ratio says
TIERS = (
    "tuned", "tuned for {shape}", "tuned with another toolchain", "tuned for {shape} with another toolchain",
    "tuned on {name}", "tuned for {shape} on {name}",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answer:
    """A config and where it is from; distance in octaves, summed over sizes and waves."""

    tier: int
    distance: float
    origin: str
    config: dict
    provenance: str


class Lookup:
    """Answers of some databases, for config.install_lookup.

    open_stores: gives (name, Store) of each database, the user's first. Called once for each backend and direction; what it opens
    is read and closed, so that threads and forked processes share nothing.
    """

    def __init__(self, open_stores: Callable[[], list[tuple[str, Store]]]):
        self._open_stores = open_stores
        self._answers: dict[tuple[str, Problem], Answer | None] = {}
        self._rows: dict[tuple[str, str], list[tuple[int, str, Row]]] = {}

    def __call__(self, backend: str, problem: Problem) -> tuple[dict, str] | None:
        found = self.answer(backend, problem)
        return None if found is None else (found.config, found.provenance)

    def answer(self, backend: str, problem: Problem) -> Answer | None:
        """The answer for a backend's name and a problem, kept from then on; None where no row serves."""
        key = backend, problem
        if key not in self._answers:
            self._answers[key] = self._find(registry.load(backend), problem)
        return self._answers[key]

    def _find(self, backend, problem: Problem) -> Answer | None:
        if problem.empty or not problem.keys:
            return None
        rows = self._served(backend, problem.direction)
        if not rows:
            return None
        wanted, here = keys.problem(problem), keys.machine(problem.device)
        machine, toolchain = keys.digest(here), keys.digest(keys.toolchain(backend, problem.device))
        ranked = []
        for place, origin, row in rows:
            if row.problem["exact"] != wanted["exact"]:
                continue
            distance = octaves(row.problem["sizes"], wanted["sizes"], row.machine, here, row.config)
            if distance is None or not (row.machine_id == machine or same_architecture(row.machine, here)):
                continue
            elsewhere = 2 if row.machine_id != machine else 1 if row.toolchain_id != toolchain else 0
            sizes = row.problem["sizes"]
            tier = 2 * elsewhere + (sizes != wanted["sizes"])
            tails = sum((sizes[name] % TAIL == 0) != (wanted["sizes"][name] % TAIL == 0) for name in ("queries", "keys"))
            order = (tier, tails, distance, place, math.prod(sizes.values()), row.ms, keys.digest(row.config))
            ranked.append((order, origin, row))
        for (tier, _, distance, *_), origin, row in sorted(ranked, key=lambda each: each[0]):
            chosen = make(backend.config_types[problem.direction], row.config)
            if chosen is not None and backend.illegal(problem, chosen) is None:
                shape = "{heads} heads, M={queries} N={keys}".format(**row.problem["sizes"])
                words = TIERS[tier].format(shape=shape, name=row.machine["name"])
                return Answer(tier, distance, origin, row.config, f"{words}, {origin}")
        return None

    def _served(self, backend, direction: str) -> list[tuple[int, str, Row]]:
        """(place among the databases, its name, row) of all that was measured of a backend's kernels."""
        key = backend.name, direction
        if key not in self._rows:
            self._rows[key] = rows = []
            for place, (origin, store) in enumerate(self._open_stores()):
                with store:
                    rows += [(place, origin, Row(*parts)) for parts in store.served(keys.kernel(backend, direction))]
        return self._rows[key]


@dataclasses.dataclass(frozen=True)
class Row:
    """A config that was never found wrong or broken on a machine, with its least median in ms."""

    machine_id: str
    toolchain_id: str
    machine: dict
    problem: dict
    config: dict
    ms: float


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
    ratios = [sizes[name] / wanted[name] for name in ("queries", "keys")]
    ratios.append(waves(sizes, machine, config) / waves(wanted, here, config))
    distances = [abs(math.log2(ratio)) for ratio in ratios]
    return sum(distances) if max(distances) <= OCTAVES else None


def waves(sizes: dict, machine: dict, config: dict) -> float:
    """Blocks of query rows for each multiprocessor; where a config has no BLOCK_M, rows."""
    block = next((value for name, value in config.items() if name.endswith("BLOCK_M") and value), 1)
    return sizes["heads"] * -(-sizes["queries"] // block) / machine.get("multiprocessors", machine.get("cores", 1))
