"""What every backend is: an interface, the call it gets, and the one place outputs are allocated."""

from __future__ import annotations

import contextlib
import functools
from typing import ClassVar, NamedTuple

import torch

from ..problem import Problem

# Elements of poison on either side of a guarded output: more than the widest tile row any kernel could overrun by.
GUARD = 4096


class Call(NamedTuple):
    """One forward call: checked tensors in canonical order [B, H, N, D] (varlen: [1, H, T, D]) and its numbers."""

    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    skip_below: float
    cu_seqlens: torch.Tensor | None = None  # int32 [B + 1] on the tensors' device
    saves: bool = True  # whether a backward may follow: without one, forward need not save anything
    kept: dict | None = None  # for what a forward finds out once for all calls of a kind: equal in all but pointers and numbers

    def empty_out(self) -> torch.Tensor:
        """Output [B, H, M, Dv] laid out in memory as the caller's layout has it."""
        batch, heads, queries, _ = self.q.shape
        if self.problem.layout == "bhnd":
            return allocate((batch, heads, queries, self.problem.value_dim), self.q)
        return allocate((batch, queries, heads, self.problem.value_dim), self.q).transpose(1, 2)

    def empty_gradient(self, of: torch.Tensor) -> torch.Tensor:
        """Uninitialised gradient of an input, dense, in the caller's layout."""
        if self.problem.layout == "bhnd":
            return allocate(of.shape, of)
        return allocate(of.transpose(1, 2).shape, of).transpose(1, 2)

    def empty_statistic(self, dtype=torch.float32) -> torch.Tensor:
        """One number per query row: [B, H, M], contiguous."""
        return allocate(self.q.shape[:3], self.q, dtype)


def described_call(problem: Problem) -> Call:
    """A call of dense tensors that have shapes and strides but no memory, for what needs no more."""
    batch, queries, keys = (1, problem.tokens, problem.tokens) if problem.varlen else (problem.batch, problem.queries, problem.keys)
    shapes = ((problem.heads, queries, problem.head_dim), (problem.kv_heads, keys, problem.head_dim),
              (problem.kv_heads, keys, problem.value_dim))  # fmt: skip
    make = functools.partial(torch.empty, dtype=problem.torch_dtype, device="meta")
    if problem.layout == "bhnd":
        tensors = [make(batch, heads, rows, width) for heads, rows, width in shapes]
    else:
        tensors = [make(batch, rows, heads, width).transpose(1, 2) for heads, rows, width in shapes]
    cu_seqlens = torch.empty(problem.batch + 1, dtype=torch.int32, device="meta") if problem.varlen else None
    return Call(problem, *tensors, 1.0, float(problem.skip), cu_seqlens)


_guarded: list[torch.Tensor] | None = None


def allocate(shape, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """torch.empty; inside `guarded_outputs` filled and surrounded with poison instead."""
    if _guarded is None:
        return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)
    dtype = dtype or like.dtype
    numel = torch.Size(shape).numel()
    buffer = torch.full((numel + 2 * GUARD,), poison(dtype), dtype=dtype, device=like.device)
    _guarded.append(buffer)
    return buffer[GUARD : GUARD + numel].view(shape)


def poison(dtype: torch.dtype):
    """A value no kernel writes by chance: NaN, or the most negative integer."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


@contextlib.contextmanager
def guarded_outputs():
    """Poison every output and scratch buffer; on exit RuntimeError if anything was written outside of one."""
    global _guarded
    outer, _guarded = _guarded, []
    try:
        yield
        for buffer in _guarded:
            for side, guard in (("before", buffer[:GUARD]), ("after", buffer[-GUARD:])):
                value = poison(buffer.dtype)
                intact = guard.isnan() if buffer.dtype.is_floating_point else guard == value
                if not bool(intact.all()):
                    raise RuntimeError(f"a kernel wrote {int((~intact).sum())} elements {side} an output of {buffer.dtype}")
    finally:
        _guarded = outer


class Backend:
    """The interface. Configs are frozen dataclasses, one type per direction, passed by name."""

    name: ClassVar[str]
    config_types: ClassVar[dict[str, type]]  # "forward" and "backward"
    compiles: ClassVar[bool] = False  # whether `compile` has anything to do

    def unsupported(self, problem: Problem) -> str | None:
        """Why this backend cannot run the problem on this machine, in words; None if it can."""
        raise NotImplementedError

    def slow(self, problem: Problem) -> str | None:
        """Why automatic choice and timing should leave this backend alone although it runs the problem; None if not so."""
        return None

    def default_config(self, problem: Problem):
        """The config to use where nothing was tuned."""
        raise NotImplementedError

    def variants(self, problem: Problem) -> dict[str, object]:
        """Other formulations of the same kernels worth comparing: name -> config."""
        return {}

    def illegal(self, problem: Problem, config) -> str | None:
        """Why this config may not be used for the problem; None if it may."""
        raise NotImplementedError

    def kernels(self, problem: Problem, config) -> str | None:
        """Which set of kernels this config means for the problem, and why not a faster one; None if there is but one."""
        return None

    def mismatch(self, forward, backward) -> str | None:
        """Why a backward may not run with this config on what a forward with that one has saved; None if it may."""
        return None

    def candidates(self, problem: Problem):
        """(legal configs, [(config, reason)] of the rejected ones) of the backend's config space."""
        legal, rejected = [], []
        for config in self.config_space(problem):
            reason = self.illegal(problem, config)
            if reason is None:
                legal.append(config)
            else:
                rejected.append((config, reason))
        return legal, rejected

    def config_space(self, problem: Problem):
        """All configs worth looking at, legal or not."""
        raise NotImplementedError

    def compile(self, problem: Problem, config) -> None:
        """Compile what a config needs for a problem into a cache on disk, where that is done at run time; needs no inputs.

        Raises what the compiler does.
        """

    def forward(self, call: Call, config) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """out [B, H, M, Dv], remainder [B, H, M], and what backward wants saved; where not call.saves, that is not looked at."""
        raise NotImplementedError

    def backward(self, call: Call, config, remainder, saved, dout, dremainder):
        """dq, dk, dv in the shapes of q, k, v, from dout [B, H, M, Dv] and dremainder [B, H, M]."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Versions of what this backend stands on, for `sbk info` and records."""
        return {}

    def sources(self) -> list:
        """Files whose text decides what this backend computes: hashed into records."""
        raise NotImplementedError
