"""Which config a backend runs a Problem with: the lookup protocol, and the analytic default behind it.

A config is a frozen dataclass of the backend. A lookup is any callable (backend name, Problem, config of the other direction that
the answer has to go with, or None) -> Answer or None; the tuning database installs itself with `install_lookup`. Whatever a lookup
answers passes the backend's own legality check before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


class Answer(NamedTuple):
    """A tuned config by field name, where it comes from in words, and its milliseconds on what it was measured on.

    measured_on: machine and sizes; times of other answers that have the same may be compared.
    """

    config: dict
    provenance: str
    ms: float
    measured_on: str


Lookup = Callable[[str, object, object], "Answer | None"]
_lookup: Lookup | None = None
_on_miss: Callable[[object, object], bool] | None = None
_generation = 0


def install_lookup(lookup: Lookup | None, on_miss: Callable[[object, object], bool] | None = None) -> None:
    """Ask `lookup` before the analytic default from now on; None removes it.

    Its answers are kept: one that has new answers has to be installed again. on_miss(backend, problem) is called where there is
    no answer for what is to run, and says whether to ask once more.
    """
    global _lookup, _on_miss, _generation
    _lookup, _on_miss = lookup, on_miss
    _generation += 1


def generation() -> int:
    """A number that is new after each install_lookup."""
    return _generation


def tuned(backend, problem, goes_with=None) -> Answer | None:
    """The lookup's answer, if there is one and its config is legal; goes_with: the other direction's config."""
    found = _lookup(backend.name, problem, goes_with) if _lookup is not None else None
    if found is None or backend.illegal(problem, backend.config_types[problem.direction](**found.config)) is not None:
        return None
    return found


def resolve(backend, problem) -> tuple[object, str]:
    """(config, where it comes from) for this backend and problem."""
    found = tuned(backend, problem)
    if found is None and _on_miss is not None and _on_miss(backend, problem):
        found = tuned(backend, problem)
    if found is None:
        return backend.default_config(problem), "analytic default"
    return backend.config_types[problem.direction](**found.config), found.provenance


def to_dict(config) -> dict:
    """A config by field name, as stored."""
    return dataclasses.asdict(config)
