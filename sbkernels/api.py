"""The public operator: input checks, canonical views, autograd."""

from __future__ import annotations

import dataclasses
import itertools
import numbers

import torch
from torch.autograd import forward_ad

from . import dispatch, env, nvtx
from .backends.base import Call
from .problem import ALIGNMENT, DTYPE_NAMES, LAYOUTS, MAX_HEAD_DIM, Problem, describe

DEFAULT_SKIP_BELOW = 2.0**-24
PLANS_KEPT = 1024


def stickbreaking_attention(
    q, k, v, *, scale=None, attend_current=False, layout="bhnd", skip_below=DEFAULT_SKIP_BELOW, backend=None
):
    """Causal stick-breaking attention: walking back from the query, each key takes a sigmoid share of what is left of a stick.

    Method: Tan et al. 2024, arXiv 2410.17980, eq. 1 to 5; linear-space evaluation and backward: sbkernels/reference.py.

    Args:
        q: queries [B, H, M, D] (layout "bhnd") or [B, M, H, D] ("bnhd"); float64, float32, float16 or bfloat16.
        k: keys [B, Hk, N, D] or [B, N, Hk, D]; H is a multiple of Hk (grouped-query attention), M <= N: queries stand at the
            end of the keys, query i at position N - M + i.
        v: values [B, Hk, N, Dv] or [B, N, Hk, Dv]. D and Dv up to 256. Any strides with a contiguous last dimension.
        scale: factor on q . k; default D ** -0.5.
        attend_current: whether a query sees the key at its own position.
        layout: "bhnd" or "bnhd".
        skip_below: stop once every row of a query block has less than this share of its stick left; out changes by at most
            skip_below * max|v|. 0 turns it off.
        backend: a registered backend's name; default: use_backend(), SBKERNELS_BACKEND, else the first that can.

    Returns:
        out, like q with Dv for D, in q's dtype; and remainder, like q without its last dimension, in float32 (float64 for
        float64 input): the share of the stick that no key took. Both are differentiable in q, k and v.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what came and what is allowed.
        BackendError: the backend asked for cannot run this problem; the message lists every backend with its reason.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")
    scale = _check_flags(scale, attend_current, skip_below)
    key = _plan_key(q, k, v, layout, attend_current, skip_below, backend)
    plan = _plans.get(key)
    if plan is None:
        _check_tensors(q, k, v, rank=4)
    if layout == "bnhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if plan is None:
        _check_shapes(q, k, v, layout)
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"q has {q.shape[2]} queries and k {k.shape[2]} keys: expected at most as many queries as keys")
        problem = describe(q, k, v, layout=layout, attend_current=attend_current, skip_below=skip_below)
        plan = _make_plan(key, problem, backend, q.requires_grad or k.requires_grad or v.requires_grad)
    out, remainder = _run(plan, q, k, v, None, scale, skip_below)
    return (out, remainder) if layout == "bhnd" else (out.transpose(1, 2), remainder.transpose(1, 2))


def stickbreaking_attention_varlen(
    q, k, v, cu_seqlens, max_seqlen, *,
    scale=None, attend_current=False, skip_below=DEFAULT_SKIP_BELOW, backend=None, check_seqlens=None,
):  # fmt: skip
    """Stick-breaking attention over packed sequences of different lengths, each attending to itself alone.

    Args:
        q: queries [T, H, D], tokens of all sequences one after the other. k: keys [T, Hk, D]. v: values [T, Hk, Dv].
        cu_seqlens: int32 [B + 1] on q's device: 0, then the end of each sequence; the last is T. Empty sequences are fine.
        max_seqlen: int, at least the longest sequence's length.
        check_seqlens: read cu_seqlens back and refuse one that decreases or overruns; costs a synchronisation with the device.
            False trusts it (needed under CUDA graph capture); default: SBKERNELS_CHECK_SEQLENS, else True.
        scale, attend_current, skip_below, backend: as in `stickbreaking_attention`.

    Returns:
        out [T, H, Dv] in q's dtype and remainder [T, H] in float32 (float64 for float64 input), both differentiable.

    Raises:
        As `stickbreaking_attention`.
    """
    scale = _check_flags(scale, attend_current, skip_below)
    key = None
    if isinstance(cu_seqlens, torch.Tensor) and isinstance(max_seqlen, int):
        key = _plan_key(q, k, v, ("thd", cu_seqlens.shape, max_seqlen), attend_current, skip_below, backend)
    plan = _plans.get(key)
    if plan is None:
        _check_tensors(q, k, v, rank=3)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if plan is None:
        _check_shapes(q, k, v, "thd")
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"k has {k.shape[2]} tokens and q {q.shape[2]}: expected as many")
    _check_cu_seqlens(cu_seqlens, max_seqlen, q, env.check_seqlens() if check_seqlens is None else check_seqlens)
    if plan is None:
        flags = {"attend_current": attend_current, "skip_below": skip_below}
        problem = describe(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **flags)
        plan = _make_plan(key, problem, backend, q.requires_grad or k.requires_grad or v.requires_grad)
    out, remainder = _run(plan, q, k, v, cu_seqlens, scale, skip_below)
    return out[0].transpose(0, 1), remainder[0].transpose(0, 1)


# ---- Plans: what the checks and dispatch make of a kind of call, kept under all that they look at ----


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """A checked problem and what runs it; `backward` and `reversed` are None where no gradient is wanted."""

    problem: Problem
    scale: float  # the default
    empty: bool
    forward: dispatch.Choice
    backward: dispatch.Choice | None
    reversed: Problem | None
    requires_grad: bool  # whether some input does, if only where gradients are off
    kept: dict = dataclasses.field(default_factory=dict)  # the forward backend's, see Call


_plans: dict[tuple, _Plan] = {}


def _plan_key(q, k, v, layout, attend_current, skip_below, backend) -> tuple | None:
    """All that checks, Problem and autograd look at; None, of which no plan is ever made, where something is no tensor."""
    circumstances = dispatch.circumstances(backend)
    try:
        return (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT == 0, q.requires_grad, k.requires_grad, v.requires_grad,
            layout, attend_current, skip_below > 0, torch.is_grad_enabled(), circumstances,
        )  # fmt: skip
    except AttributeError:
        return None


def _make_plan(key: tuple, problem: Problem, backend, requires_grad: bool) -> _Plan:
    """The plan of a checked problem, kept from now on."""
    if requires_grad and torch.is_grad_enabled():
        reversed_problem = problem.reversed()
        forward, backward = dispatch.choose_both(problem, backend)
    else:
        forward, backward, reversed_problem = dispatch.choose(problem, backend), None, None
    forward = nvtx.annotated(forward, problem)
    backward = backward and nvtx.annotated(backward, reversed_problem)
    plan = _Plan(problem, problem.head_dim**-0.5, problem.empty, forward, backward, reversed_problem, requires_grad)
    if len(_plans) >= PLANS_KEPT:
        _plans.clear()
    _plans[key] = plan
    return plan


def _run(plan: _Plan, q, k, v, cu_seqlens, scale, skip_below):
    inputs = (q.detach(), k.detach(), v.detach()) if plan.requires_grad else (q, k, v)
    scale = plan.scale if scale is None else scale
    call = Call(plan.problem, *inputs, scale, skip_below, cu_seqlens, plan.backward is not None, plan.kept)
    # Forward-mode derivatives are refused by autograd.Function, in its words.
    if plan.backward is None and forward_ad._current_level < 0:
        return _forward(plan, call)[:2]
    return _StickBreaking.apply(q, k, v, call, plan)


def _forward(plan: _Plan, call: Call):
    """out, remainder and what backward wants saved."""
    if plan.empty:
        return call.empty_out().zero_(), call.empty_statistic(statistic_dtype(call.q)).fill_(1.0), ()
    return plan.forward.backend.forward(call, plan.forward.config)


class _StickBreaking(torch.autograd.Function):
    """Canonical tensors in, out and remainder out; the backends do the work."""

    @staticmethod
    def forward(ctx, q, k, v, call, plan):
        out, remainder, saved = _forward(plan, call)
        ctx.plan, ctx.scale, ctx.skip_below = plan, call.scale, call.skip_below
        ctx.save_for_backward(q, k, v, call.cu_seqlens, remainder, *saved)
        return out, remainder

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dremainder):
        q, k, v, cu_seqlens, remainder, *saved = ctx.saved_tensors
        plan = ctx.plan
        call = Call(plan.reversed, q.detach(), k.detach(), v.detach(), ctx.scale, ctx.skip_below, cu_seqlens)
        if plan.empty:
            gradients = tuple(torch.zeros_like(x) for x in (q, k, v))
        else:
            choice = plan.backward
            gradients = choice.backend.backward(call, choice.config, remainder, tuple(saved), dout, dremainder)
        return *gradients, None, None


def statistic_dtype(q: torch.Tensor) -> torch.dtype:
    """The remainder's dtype for input like q."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_tensors(q, k, v, rank: int) -> None:
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: expected a torch.Tensor")
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {rank} dimensions")
        if x.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name} has dtype {x.dtype}: expected one of {', '.join(map(str, DTYPE_NAMES))}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} and q {q.dtype}: expected the same")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: expected the same device")
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has a last dimension of {x.shape[-1]}: expected 1 to {MAX_HEAD_DIM}")
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
            raise ValueError(
                f"{name} has strides {x.stride()}: expected a contiguous last dimension (stride 1); see Tensor.contiguous()"
            )


def _check_shapes(q, k, v, layout: str) -> None:
    """q, k, v in canonical order; messages speak of the caller's layout."""
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise ValueError(f"batch of q, k, v is {q.shape[0]}, {k.shape[0]}, {v.shape[0]}: expected the same")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head dim {k.shape[3]} and q {q.shape[3]}: expected the same")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v has {v.shape[1]} heads and k {k.shape[1]}: expected the same (layout {layout!r})")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} tokens and k {k.shape[2]}: expected the same (layout {layout!r})")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k {k.shape[1]}: expected a positive multiple of k's heads (layout {layout!r})"
        )


def _check_flags(scale, attend_current, skip_below) -> float | None:
    """The scale as a float, None for the default."""
    if not isinstance(attend_current, bool):
        raise TypeError(f"attend_current={attend_current!r}: expected a bool")
    if not _is_number(skip_below):
        raise TypeError(f"skip_below={skip_below!r}: expected a number")
    if not 0 <= skip_below < 1:
        raise ValueError(f"skip_below={skip_below}: expected 0 <= skip_below < 1")
    if scale is None:
        return None
    if not _is_number(scale):
        raise TypeError(f"scale={scale!r}: expected a number or None")
    scale = float(scale)
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale={scale}: expected a finite number")
    return scale


def _is_number(x) -> bool:
    # A float is what comes, and an abstract class takes ten times as long to recognise it.
    return type(x) is float or (isinstance(x, numbers.Real) and not isinstance(x, bool))


def _check_cu_seqlens(cu_seqlens, max_seqlen, q, read_back) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens is a {type(cu_seqlens).__name__}: expected a torch.Tensor")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}: expected torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected one dimension, sequences + 1 elements")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q on {q.device}: expected the same device")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"cu_seqlens has stride {cu_seqlens.stride(0)}: expected 1")
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool):
        raise TypeError(f"max_seqlen={max_seqlen!r}: expected an int")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen={max_seqlen}: expected at least 0")
    if not read_back:
        return
    bounds, tokens = cu_seqlens.tolist(), q.shape[2]
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts with {bounds[0]}: expected 0")
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end < begin:
            raise ValueError(f"cu_seqlens decreases from {begin} to {end} at index {i + 1}: expected it never to decrease")
        if end - begin > max_seqlen:
            raise ValueError(f"max_seqlen={max_seqlen}: expected at least {end - begin}, the length of sequence {i}")
    if bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens ends with {bounds[-1]}: expected {tokens}, the number of tokens in q")
