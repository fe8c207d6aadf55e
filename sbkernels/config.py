"""Which config a backend runs a Problem with: the lookup protocol, and the analytic default behind it.

A config is a frozen dataclass of the backend. A lookup is any callable (backend name, Problem) -> (config as a dict,
provenance) or None; the tuning database installs itself with `install_lookup`. Whatever a lookup answers passes the
backend's own legality check before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

Lookup = Callable[[str, object], "tuple[dict, str] | None"]
_lookup: Lookup | None = None
_generation = 0


def install_lookup(lookup: Lookup | None) -> None:
    """Ask `lookup` before the analytic default from now on; None removes it.

    Its answers are kept: one that has new answers has to be installed again.
    """
    global _lookup, _generation
    _lookup = lookup
    _generation += 1


def generation() -> int:
    """A number that is new after each install_lookup."""
    return _generation


def resolve(backend, problem) -> tuple[object, str]:
    """(config, where it comes from) for this backend and problem."""
    if _lookup is not None:
        found = _lookup(backend.name, problem)
        if found is not None:
            values, provenance = found
            config = backend.config_types[problem.direction](**values)
            reason = backend.illegal(problem, config)
            if reason is None:
                return config, provenance
    return backend.default_config(problem), "analytic default"


def to_dict(config) -> dict:
    """A config by field name, as stored."""
    return dataclasses.asdict(config)
