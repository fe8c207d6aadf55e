"""Where properties are checked, and the register of their names.

Each check takes a `Lab` and returns [(what, error, allowed)]; it passes where error <= allowed. Allowed errors are roundings:
u is half an ulp of the tensors' dtype, e one of the working precision times what a chain of N of them can walk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from ...api import stickbreaking_attention, stickbreaking_attention_varlen
from ...problem import describe
from ..inputs import Case, make
from ..tolerance import SIGMAS, half_ulp, logit_walk, working_dtype

Result = list[tuple[str, float, float]]
PROPERTIES: dict[str, Callable[[Lab], Result]] = {}


class NotHere(Exception):
    """Why there is nothing to check on this machine."""


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where a property is checked: around(problem) is the context that picks a backend; a dtype, a device, a size."""

    around: Callable
    dtype: torch.dtype
    device: str
    N: int = 100
    D: int = 32

    @property
    def u(self) -> float:
        return half_ulp(self.dtype)

    @property
    def e(self) -> float:
        return SIGMAS * half_ulp(working_dtype(self.dtype)) * math.sqrt(self.N)

    def e_of(self, q, k) -> float:
        """e, and what the roundings of the logits of q and k [B, H, N, D] walk."""
        keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        return self.e + SIGMAS * half_ulp(working_dtype(self.dtype)) * logit_walk(q.double(), keys, q.shape[-1] ** -0.5).item()

    def inputs(self, regime: str = "normal", seed: int = 0, **shape):
        case = Case(regime, **({"M": self.N, "N": self.N, "D": self.D, "Dv": self.D, "seed": seed} | shape))
        return make(case, self.dtype, self.device)

    def attend(self, q, k, v, **options):
        """out, remainder without early stop unless asked for."""
        options = {"skip_below": 0.0} | options
        described = {name: value for name, value in options.items() if name != "scale"}
        with self.around(describe(*(x.detach() for x in (q, k, v)), **described)):
            return stickbreaking_attention(q, k, v, **options)

    def attend_packed(self, q, k, v, lengths: list[int]):
        """The same of sequences one after the other: q [1, H, T, D] and so on, T the sum of lengths."""
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=self.device)
        with self.around(describe(q, k, v, cu_seqlens=bounds, max_seqlen=max(lengths), skip_below=0.0)):
            flat = (x[0].transpose(0, 1) for x in (q, k, v))
            out, r = stickbreaking_attention_varlen(*flat, bounds, max(lengths), skip_below=0.0)
        return out.transpose(0, 1)[None], r.transpose(0, 1)[None]

    def gradients(self, q, k, v, dout, dremainder, **options):
        """out, remainder, dq, dk, dv."""
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        outputs = self.attend(*leaves, **options)
        found = torch.autograd.grad(outputs, leaves, (dout, dremainder))
        return *(x.detach() for x in outputs), *found


def check(function):
    """Register a property under its function's name."""
    PROPERTIES[function.__name__] = function
    return function


def largest(x: torch.Tensor) -> float:
    """Largest absolute value, NaN counting as inf; 0 of nothing."""
    return x.double().abs().nan_to_num(nan=math.inf).max().item() if x.numel() else 0.0


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference."""
    return largest(a.double() - b.double())


def same(what: str, a: torch.Tensor, b: torch.Tensor) -> tuple[str, float, float]:
    """Bit-equal."""
    return what, float((a != b).sum().item()), 0.0
