"""Which backend runs a problem, with which config, and why not the others.

Precedence: argument > use_backend() > SBKERNELS_BACKEND > automatic. A backend that was named never falls back to another.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math

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


@dataclasses.dataclass(frozen=True)
class Override:
    """What a use_backend() block asks for; equal ones share their plans, however many blocks there are."""

    name: str
    forward: object
    backward: object


_override: contextvars.ContextVar[Override | None] = contextvars.ContextVar("sbkernels_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str, *, forward=None, backward=None):
    """Within the block, calls that name no backend use this one and, if given, these configs of it.

    ValueError if there is no backend of that name, TypeError for what is no config of it. Applies to the current thread and
    context; a backward pass keeps the backend and config its forward chose for it.
    """
    check_name(name, "use_backend()")
    for direction, config in (("forward", forward), ("backward", backward)):
        backend = registry.try_load(name)[0] if config is not None else None
        if backend is not None and not isinstance(config, backend.config_types[direction]):
            expected = backend.config_types[direction].__name__
            raise TypeError(f"use_backend({name!r}, {direction}={config!r}): expected a {expected} or None")
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
        return _choice(chosen, asked_by, problem)
    return _choice(*_automatic((problem,)), problem)


def choose_both(problem: Problem, backend: str | None = None) -> tuple[Choice, Choice]:
    """What runs a forward problem and its backward: one backend, and configs that go together. Raises as those do."""
    both = (problem, problem.reversed())
    if requested(backend)[0] is not None:
        return agree(problem, *(choose(p, backend) for p in both))
    found = _automatic(both)
    return agree(problem, *(_choice(*found, p) for p in both))


def _automatic(problems: tuple[Problem, ...]) -> tuple[object, str]:
    """(backend, why) for problems that one backend has to run: the first in order of preference that can, unless another is faster.

    Others count where all were tuned on the same machine and sizes.
    """
    able = []
    for name in registry.names():
        backend, reason = registry.try_load(name)
        if reason is None and all(backend.unsupported(p) is None and backend.slow(p) is None for p in problems):
            able.append(backend)
    if not able:
        raise BackendError(f"no backend can run this problem\n{availability_text(problems[0])}")
    first = tuned_ms(able[0], problems)
    if first is None:
        return able[0], "automatic"
    measured = [first, *(tuned_ms(backend, problems) for backend in able[1:])]
    comparable = [i for i, found in enumerate(measured) if found is not None and found[1] == first[1]]
    fastest = min(comparable, key=lambda i: measured[i][0])
    if fastest == 0:
        return able[0], "automatic"
    return able[fastest], f"automatic: {measured[fastest][0]:.4g} ms tuned, {able[0].name} {first[0]:.4g}"


def tuned_ms(backend, problems: tuple[Problem, ...]) -> tuple[float, list[str]] | None:
    """(milliseconds of all the problems with tuned configs, what each was measured on); None where one was not tuned."""
    answers = [configs.tuned(backend, problem) for problem in problems]
    return None if None in answers else (sum(answer.ms for answer in answers), [answer.measured_on for answer in answers])


def agree(problem: Problem, forward: Choice, backward: Choice) -> tuple[Choice, Choice]:
    """Choices of both directions of a problem that go together.

    Where tuned ones do not, one gives way to the fastest tuned one that goes with the other: the one that loses less by it, if that
    was measured on the same sizes, else the forward's. Where there is none, those that were not given give way to the defaults.
    ValueError where configs that were given do not go together.
    """
    backend, both, problems = backward.backend, [forward, backward], (problem, problem.reversed())
    if backend.mismatch(forward.config, backward.config) is None:
        return forward, backward
    ways = []
    for i, other in ((0, backward), (1, forward)):
        best, found = configs.tuned(backend, problems[i]), configs.tuned(backend, problems[i], other.config)
        if found is not None and both[i].provenance != GIVEN:
            loss = found.ms - best.ms if found.measured_on == best.measured_on else math.inf
            ways.append((loss, i, found))
    if ways:
        _, i, found = min(ways, key=lambda way: way[:2])
        config = backend.config_types[problems[i].direction](**found.config)
        provenance = f"{found.provenance}, to go with the {problems[1 - i].direction}'s"
        both[i] = dataclasses.replace(both[i], config=config, provenance=provenance)
        return tuple(both)
    both = [
        choice
        if choice.provenance == GIVEN
        else dataclasses.replace(choice, config=backend.default_config(p), provenance="analytic default: tuned ones do not match")
        for p, choice in zip(problems, both, strict=True)
    ]
    reason = backend.mismatch(*(choice.config for choice in both))
    if reason is not None:
        raise ValueError(f"backend {backend.name!r}: {reason}")
    return tuple(both)


def _choice(backend, asked_by: str, problem: Problem) -> Choice:
    config, provenance = configs.resolve(backend, problem)
    return Choice(backend, config, asked_by, provenance)
