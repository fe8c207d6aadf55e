"""A case's inputs as the public operator takes them, for whoever times or checks it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..api import stickbreaking_attention, stickbreaking_attention_varlen
from .inputs import Case, Inputs


def public(x: Inputs, check_seqlens: bool | None = False) -> tuple[Callable, list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """(operator of q, k, v; those three; gradients of its two results), in the layout that the case is of.

    check_seqlens: the operator's, by default such that a call does not wait for the device.
    """
    case = x.case
    tensors, upstream = [x.q, x.k, x.v], (x.dout, x.dremainder)
    if case.lengths:
        lengths = {"cu_seqlens": x.cu_seqlens, "max_seqlen": max(case.lengths), "check_seqlens": check_seqlens}
        operator = functools.partial(stickbreaking_attention_varlen, **lengths, **case.options)
        return operator, [t[0].transpose(0, 1) for t in tensors], tuple(t[0].transpose(0, 1) for t in upstream)
    if case.layout == "bnhd":
        operator = functools.partial(stickbreaking_attention, layout="bnhd", **case.options)
        return operator, [t.transpose(1, 2) for t in tensors], tuple(t.transpose(1, 2) for t in upstream)
    return functools.partial(stickbreaking_attention, **case.options), tensors, upstream


def canonical(t: torch.Tensor, case: Case) -> torch.Tensor:
    """A result or gradient of `public` in canonical order."""
    if case.lengths:
        return t.transpose(0, 1)[None]
    return t.transpose(1, 2) if case.layout == "bnhd" else t


def directions(operator: Callable, tensors, upstream) -> dict[str, Callable]:
    """{direction: function} without arguments of an operator of q, k, v; autograd's graph is built now.

    upstream: gradients of what the operator returns.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = operator(*leaves)
    return {
        "forward": lambda: operator(*tensors),
        "backward": lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True),
    }


def passes(x: Inputs) -> dict[str, Callable]:
    """`directions` of the public operator, with the backend that is in use now."""
    return directions(*public(x))
