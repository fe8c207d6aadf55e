"""A case's inputs as the public operator takes them, for whoever times or checks it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..api import stickbreaking_attention, stickbreaking_attention_varlen
from .inputs import Inputs


def public(x: Inputs) -> tuple[Callable, list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(operator of q, k, v; those three; gradients of its two results), in the layout that the case is of.

    cu_seqlens is trusted, so that a call does not wait for the device.
    """
    case = x.case
    options = case.options
    tensors, upstream = [x.q, x.k, x.v], (x.dout, x.dremainder)
    if case.lengths:
        longest = max(case.lengths)
        operator = functools.partial(
            stickbreaking_attention_varlen, cu_seqlens=x.cu_seqlens, max_seqlen=longest, check_seqlens=False, **options
        )
        return operator, [t[0].transpose(0, 1) for t in tensors], tuple(t[0].transpose(0, 1) for t in upstream)
    operator = functools.partial(stickbreaking_attention, **options)
    if case.layout != "bnhd":
        return operator, tensors, upstream
    operator = functools.partial(operator, layout="bnhd")
    return operator, [t.transpose(1, 2) for t in tensors], tuple(t.transpose(1, 2) for t in upstream)


def passes(x: Inputs) -> dict[str, Callable]:
    """{direction: function} without arguments; autograd's graph is built now, with the backend that is in use now."""
    operator, tensors, upstream = public(x)
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = operator(*leaves)
    return {
        "forward": lambda: operator(*tensors),
        "backward": lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True),
    }
