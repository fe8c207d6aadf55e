"""What a tuning worker does with a config, in a process of its own: compile it, hold it against float64, time it.

A Subject names what is worked on by plain values, so that it goes from process to process. A forward config is held together with
a backward config that goes with it, and the other way round: what a forward saves is its backward's to read.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import itertools
from typing import NamedTuple

import torch

from .. import registry
from ..bench import timer
from ..config import to_dict
from ..dispatch import use_backend
from ..problem import Problem
from ..verify import inputs
from ..verify.calls import passes
from ..verify.run import attend, expectation, judge
from ..verify.spots import Spot, judge_spots
from ..verify.spots import spots as spots_of
from . import lookup

# Lengths configs are verified at: ragged tails of any tile; the even one only of configs that take no other. Tails of the same
# kind, so that kernels that are compiled for what lengths are divisible by are compiled for few.
LENGTHS, EVEN_LENGTH = (193, 130, 77), 256
TURN_MS = 500.0  # after which no further sample is taken in a turn
DRAWN = 0  # seed of the inputs that are timed


class Subject(NamedTuple):
    """A config (its fields by name) of a backend, on a problem whose direction it is for."""

    backend: str
    problem: Problem
    config: tuple[tuple[str, object], ...]


class Result(NamedTuple):
    """What came of it: a status of store.STATUSES, words where it is not "ok", and values by name."""

    status: str
    why: str = ""
    values: dict = {}


class NoPartner(ValueError):
    """No config of the other direction goes with one."""


def work(item: tuple[str, Subject, object], state: dict) -> Result:
    """Do one of ACTIONS with a subject; what it raises becomes its status."""
    action, subject, argument = item
    try:
        return ACTIONS[action](subject, argument)
    except torch.OutOfMemoryError as error:
        release()
        return Result("out of memory", str(error).splitlines()[0])
    except NoPartner as error:
        return Result("illegal", str(error))
    except Exception as error:
        words = f"{type(error).__name__}: {error}".strip()[:500]
        return Result("not compiled" if action == "compile" or too_large(error) else "crashed", words)


def too_large(error: Exception) -> bool:
    """Whether a kernel could not be launched for what it takes; Triton finds out at its first launch."""
    return type(error).__name__ in ("OutOfResources", "CompileError", "CompilationError", "PTXASError")


def release() -> None:
    """Give back what inputs were kept and memory cached."""
    timed_inputs.cache_clear()
    spots.cache_clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def both_configs(subject: Subject) -> tuple[object, object, object]:
    """(backend, forward config, backward config) with the subject's as one of the two. NoPartner if none goes with it."""
    backend = registry.load(subject.backend)
    problem = subject.problem
    config = lookup.make(backend.config_types[problem.direction], dict(subject.config))
    is_forward = problem.direction == "forward"
    other = dataclasses.replace(problem, direction="backward" if is_forward else "forward")
    for partner in itertools.chain([backend.default_config(other)], backend.config_space(other)):
        if backend.illegal(other, partner) is None and lookup.together(backend, problem, config, partner):
            return (backend, config, partner) if is_forward else (backend, partner, config)
    raise NoPartner(f"no {other.direction} config goes with it")


def case_of(problem: Problem, seed: int) -> inputs.Case:
    """The harness's case of a forward problem.

    Logits are such that a share of the stick lasts to the oldest key, so that an early stop leaves nothing out.
    """
    return inputs.Case(
        "critical", B=problem.batch, H=problem.heads, Hk=problem.kv_heads, M=problem.queries, N=problem.keys, D=problem.head_dim,
        Dv=problem.value_dim, layout="bnhd" if problem.layout == "bnhd" else "bhnd", attend_current=problem.attend_current,
        skip=problem.skip, lengths=sequences(problem), seed=seed,
    )  # fmt: skip


def sequences(problem: Problem) -> tuple[int, ...]:
    """Lengths of a varlen problem: the longest, an empty one, and the other tokens shared out evenly; none of a dense problem."""
    if not problem.varlen:
        return ()
    rest, others = problem.tokens - problem.keys, problem.batch - 1
    if others < 3:
        return problem.keys, *(rest // others + (i < rest % others) for i in range(others))
    return problem.keys, 0, *(rest // (others - 1) + (i < rest % (others - 1)) for i in range(others - 1))


def small_problem(problem: Problem, keys: int) -> Problem:
    """One like a forward problem with `keys` keys, two batch entries or four sequences, and at most two key heads."""
    kv_heads = min(problem.kv_heads, 2)
    queries = keys if problem.varlen or problem.queries == problem.keys else min(problem.queries, 65, keys)
    return dataclasses.replace(
        problem, batch=4 if problem.varlen else 2, heads=kv_heads * problem.group, kv_heads=kv_heads, queries=queries, keys=keys,
        tokens=2 * keys - 3 if problem.varlen else 0,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def timed_inputs(problem: Problem) -> inputs.Inputs:
    """The inputs a forward problem is timed on."""
    return inputs.make(case_of(problem, DRAWN), problem.torch_dtype, problem.device)


@functools.lru_cache(maxsize=4 * len(LENGTHS))
def small_inputs(problem: Problem, seed: int):
    """Inputs of what small_problem made, and what is expected of them; problems that differ in size alone share them."""
    x = inputs.make(case_of(problem, seed), problem.torch_dtype, problem.device)
    return x, expectation(x)


def forward_of(problem: Problem) -> Problem:
    """The problem in its forward direction."""
    return dataclasses.replace(problem, direction="forward")


def compile_one(subject: Subject, _) -> Result:
    """Compile a config for its problem alone."""
    backend = registry.load(subject.backend)
    backend.compile(subject.problem, lookup.make(backend.config_types[subject.problem.direction], dict(subject.config)))
    return Result("ok")


def compiled_parts(subject: Subject) -> list[Subject]:
    """All that has to be compiled before a subject is verified and timed: both passes, on small problems and the timed one.

    NoPartner as both_configs.
    """
    backend, *configs = both_configs(subject)
    problem = forward_of(subject.problem)
    found = []
    for forward in (problem, *(small_problem(problem, keys) for keys in lengths(backend, problem, configs))):
        for p, config in zip((forward, forward.reversed()), configs, strict=True):
            if backend.illegal(p, config) is None:
                found.append(Subject(subject.backend, p, tuple(to_dict(config).items())))
    return found


def lengths(backend, problem: Problem, configs) -> list[int]:
    """The LENGTHS at which both configs are legal; the even one where there is none."""

    def legal(keys: int) -> bool:
        small = small_problem(problem, keys)
        return all(backend.illegal(p, config) is None for p, config in zip((small, small.reversed()), configs, strict=True))

    return [keys for keys in LENGTHS if legal(keys)] or [keys for keys in (EVEN_LENGTH,) if legal(keys)]


def verify(subject: Subject, seed: int) -> Result:
    """Hold both passes against float64 at LENGTHS, with poisoned outputs; "wrong" with the worst finding where they differ."""
    backend, *configs = both_configs(subject)
    problem, worst = forward_of(subject.problem), 0.0
    for keys in lengths(backend, problem, configs):
        x, expected = small_inputs(small_problem(problem, keys), seed)
        result = verdict(lambda x=x, expected=expected: judge(fresh(x), expected), backend, configs, f"N={keys}")
        if result.status != "ok":
            return result
        worst = max(worst, result.values["worst"])
    return Result("ok", values={"worst": worst})


def fresh(x: inputs.Inputs) -> tuple[torch.Tensor, ...]:
    """All results for x, right after others of the same shapes: an answer to an earlier call would be seen."""
    attend(dataclasses.replace(x, v=-x.v, dout=-2 * x.dout))
    return attend(x)


def check(subject: Subject, _) -> Result:
    """Hold both passes of the timed problem against float64 in places; "wrong" as in verify."""
    backend, *configs = both_configs(subject)
    problem = forward_of(subject.problem)
    return verdict(lambda: judge_spots(spots(problem), fresh(timed_inputs(problem))), backend, configs, "the timed problem")


def verdict(findings, backend, configs, where: str) -> Result:
    """The Result of what an argument-less function finds with both configs in use."""
    try:
        with use_backend(backend.name, forward=configs[0], backward=configs[1]):
            found = findings()
    except RuntimeError as error:
        if "a kernel wrote" not in str(error):  # guarded_outputs
            raise
        return Result("wrong", f"{where}: {error}")
    bad = [f"{f.output} at {f.ratio:.3g} of its bound ({f.where})" for f in found if not f.ok]
    if bad:
        return Result("wrong", f"{where}: {'; '.join(bad)}")
    return Result("ok", values={"worst": max((f.ratio for f in found), default=0.0)})


@functools.lru_cache(maxsize=1)
def spots(problem: Problem) -> list[Spot]:
    """Places of a timed problem."""
    return spots_of(timed_inputs(problem))


def time(subject: Subject, argument: tuple[int, tuple | None]) -> Result:
    """Up to so many samples in milliseconds, fewer where they take long, after one call that is not timed.

    argument: how many, and a config of the same problem to take a sample of before each, as "canary"; None for none.
    """
    count, canary = argument
    configs = {"samples": subject.config} | ({} if canary is None else {"canary": canary})
    x, sample = timed_inputs(forward_of(subject.problem)), sampler(subject.problem.device)
    functions, found = {}, {name: [] for name in reversed(configs)}
    for name in found:
        functions[name] = timed_function(subject._replace(config=configs[name]), x)
        functions[name](sample)
    spent = 0.0
    while not found["samples"] or (len(found["samples"]) < count and spent < TURN_MS):
        for name, times in found.items():
            times.append(functions[name](sample))
            spent += times[-1]
    return Result("ok", values=found)


def timed_function(subject: Subject, x: inputs.Inputs):
    """A function of a sampler that takes a sample of the subject on its inputs."""
    backend, forward, backward = both_configs(subject)
    with use_backend(backend.name, forward=forward, backward=backward):
        function, context = passes(x)[subject.problem.direction], contextvars.copy_context()
    return lambda sample: context.run(sample, function)  # in one context, so that what was planned is planned once


sampler = functools.cache(timer.sampler)


ACTIONS = {"compile": compile_one, "verify": verify, "check": check, "time": time}
