"""Problem: one frozen, hashable description of one attention call, the key of dispatch, tuning and records."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

LAYOUTS = ("bhnd", "bnhd")
MAX_HEAD_DIM = 256
ALIGNMENT = 16  # bytes of the widest load
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes, types and flags of one call. Names are those of docs and kernels (see README, "Names").

    batch B (sequences when varlen), heads H, kv_heads Hk, queries M and keys N (the longest sequence when varlen),
    head_dim D of q and k, value_dim Dv of v, tokens T in all (varlen only).
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: str
    device: str  # "cpu", "cuda:0", ...
    layout: str = "bhnd"  # "bhnd", "bnhd", or "thd" for varlen
    varlen: bool = False
    tokens: int = 0
    attend_current: bool = False
    skip: bool = True  # early stop on
    aligned: bool = True  # every row of q, k and v starts on a multiple of ALIGNMENT bytes, and of tensors of their widths can
    direction: Literal["forward", "backward"] = "forward"

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def device_type(self) -> str:
        return self.device.split(":")[0]

    def flops(self) -> float:
        """Floating-point operations of the matrix products on the causal half: two forward, five backward."""
        if self.direction == "forward":
            per_logit = 2 * (self.head_dim + self.value_dim)
        else:
            per_logit = 2 * (3 * self.head_dim + 2 * self.value_dim)
        return per_logit * self.batch * self.heads * self.visible_logits()

    def visible_logits(self) -> float:
        """Logits of one head that causality leaves, counted as peers do: M * (N - M / 2)."""
        return self.queries * (self.keys - self.queries / 2)

    @property
    def empty(self) -> bool:
        """Whether there is no query row."""
        return self.batch == 0 or (self.tokens if self.varlen else self.queries) == 0

    def reversed(self) -> Problem:
        """The backward of this forward problem."""
        return dataclasses.replace(self, direction="backward")

    def __str__(self) -> str:
        lengths = f"N={self.keys}" if self.queries == self.keys else f"M={self.queries} N={self.keys}"
        heads = f"H={self.heads}" if self.group == 1 else f"H={self.heads}/{self.kv_heads}"
        dims = f"D={self.head_dim}" if self.head_dim == self.value_dim else f"D={self.head_dim}/{self.value_dim}"
        named = {"varlen": self.varlen, "attend_current": self.attend_current, "unaligned": not self.aligned}
        flags = [name for name, on in named.items() if on]
        text = f"{self.direction} B={self.batch} {heads} {lengths} {dims} {self.dtype} {self.layout} {self.device}"
        return " ".join([text, *flags])


def is_aligned(x: torch.Tensor) -> bool:
    """Whether rows of x, and of a dense tensor as wide, start on multiples of ALIGNMENT bytes."""
    steps = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.data_ptr() % ALIGNMENT == 0 and all(step * x.element_size() % ALIGNMENT == 0 for step in [*steps, x.shape[-1]])


def describe(q, k, v, *, layout="bhnd", cu_seqlens=None, max_seqlen=None, attend_current=False, skip_below=2.0**-24):
    """The forward Problem of tensors in canonical [B, H, N, D] order (varlen: [1, H, T, D])."""
    varlen = cu_seqlens is not None
    return Problem(
        batch=cu_seqlens.numel() - 1 if varlen else q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        queries=max_seqlen if varlen else q.shape[2],
        keys=max_seqlen if varlen else k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        dtype=DTYPE_NAMES[q.dtype],
        device=str(q.device),
        layout="thd" if varlen else layout,
        varlen=varlen,
        tokens=q.shape[2] if varlen else 0,
        attend_current=attend_current,
        skip=skip_below > 0,
        aligned=all(map(is_aligned, (q, k, v))),
    )
