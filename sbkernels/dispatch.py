"""Which backend runs a problem, with which config, and why not the others.

Precedence: argument > use_backend() > SBKERNELS_BACKEND > automatic. A backend that was named never falls back to another.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses

from . import config as configs
from . import env, registry
from .problem import Problem


class BackendError(RuntimeError):
    """No backend, or not the one asked for, can run a problem; the message lists every backend with its reason."""


GIVEN = "use_backend()"  # the provenance of configs that were given


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs a problem: the backend, its config, who asked for the backend, where the config comes from."""

    backend: object
    config: object
    asked_by: str
    provenance: str


@dataclasses.dataclass(frozen=True, eq=False)
class Override:
    """One use_backend() block; equal to no other."""

    name: str
    forward: object
    backward: object


_override: contextvars.ContextVar[Override | None] = contextvars.ContextVar("sbkernels_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str, *, forward=None, backward=None):
    """Within the block, calls that name no backend use this one and, if given, these configs of it.

    ValueError if there is no backend of that name. Applies to the current thread and context; a backward pass keeps the
    backend and config its forward chose for it.
    """
    check_name(name, "use_backend()")
    token = _override.set(Override(name, forward, backward))
    try:
        yield
    finally:
        _override.reset(token)


def check_name(name: str, asked_by: str) -> None:
    """ValueError unless a backend of this name is registered."""
    if name not in registry.names():
        raise ValueError(f"{asked_by} names backend {name!r}, which is not registered\n{availability_text()}")


def reasons(problem: Problem | None = None) -> dict[str, str | None]:
    """Every registered backend with why it cannot run the problem (None: it can); without one, whether it loads at all."""
    result = {}
    for name in registry.names():
        backend, reason = registry.try_load(name)
        if reason is None and problem is not None:
            reason = backend.unsupported(problem)
        result[name] = reason
    return result


def availability_text(problem: Problem | None = None) -> str:
    """One line per backend: available, or why not."""
    lines = [f"backends for {problem}:" if problem is not None else "backends:"]
    lines += [f"  {name}: {reason or 'available'}" for name, reason in reasons(problem).items()]
    return "\n".join(lines)


def requested(backend: str | None) -> tuple[str | None, str]:
    """(backend asked for or None, who asked)."""
    if backend is not None:
        return backend, "argument backend="
    override = _override.get()
    if override is not None:
        return override.name, "use_backend()"
    if env.backend() is not None:
        return env.backend(), env.BACKEND
    return None, "automatic"


def circumstances(backend: str | None) -> tuple:
    """All that `choose` goes by besides the problem: while it is equal, so are the choices. ValueError for what is no name."""
    if backend is not None and not isinstance(backend, str):
        check_name(backend, "argument backend=")
    override = _override.get()
    return backend, override, env.backend() if backend is None and override is None else None, configs.generation()


def choose(problem: Problem, backend: str | None = None) -> Choice:
    """The backend and config that run this problem.

    ValueError for a name that is not registered; BackendError, listing every backend with its reason, where the backend
    asked for, or every backend, cannot run the problem.
    """
    name, asked_by = requested(backend)
    if name is not None:
        check_name(name, asked_by)
        chosen, reason = registry.try_load(name)
        reason = reason or chosen.unsupported(problem)
        if reason is not None:
            raise BackendError(f"{asked_by} asks for backend {name!r}: {reason}\n{availability_text(problem)}")
        override = _override.get()
        config = getattr(override, problem.direction) if override is not None and override.name == name else None
        if config is not None:
            reason = chosen.illegal(problem, config)
            if reason is not None:
                raise ValueError(f"use_backend({name!r}, {problem.direction}={config}): {reason}")
            return Choice(chosen, config, asked_by, GIVEN)
        return Choice(chosen, *_config(chosen, problem, asked_by))
    for candidate in registry.names():
        chosen, reason = registry.try_load(candidate)
        if reason is None and chosen.unsupported(problem) is None and chosen.slow(problem) is None:
            return Choice(chosen, *_config(chosen, problem, asked_by))
    raise BackendError(f"no backend can run this problem\n{availability_text(problem)}")


def agree(problem: Problem, forward: Choice, backward: Choice) -> tuple[Choice, Choice]:
    """Choices of both directions of a problem that go together: tuned ones that do not give way to the defaults, which do.

    ValueError where configs that were given do not.
    """
    backend = backward.backend
    if backend.mismatch(forward.config, backward.config) is None:
        return forward, backward
    both = [
        choice
        if choice.provenance == GIVEN
        else dataclasses.replace(choice, config=backend.default_config(p), provenance="analytic default: tuned ones do not match")
        for p, choice in ((problem, forward), (problem.reversed(), backward))
    ]
    reason = backend.mismatch(*(choice.config for choice in both))
    if reason is not None:
        raise ValueError(f"backend {backend.name!r}: {reason}")
    return tuple(both)


def _config(backend, problem, asked_by):
    config, provenance = configs.resolve(backend, problem)
    return config, asked_by, provenance
