"""A training step of a decoder with stick-breaking or softmax attention: forward, backward, optimizer.

The paper's 1B shape (Tan et al. 2024: hidden 1536, 24 heads of 64, MLP 4096, context 4096) with fewer layers and without
vocabulary: the loss is the mean square of what the last layer says, so that layers are weighed as in a deep model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import sdpa_kernel

from ..api import stickbreaking_attention
from ..dispatch import use_backend
from ..verify import inputs
from . import contenders, limits

INITIAL_STD = 0.02
# So little that weights, and with them the logits, stay what they are however many steps are timed.
LEARNING_RATE = 1e-7
ROPE_BASE = 10000.0
# Bytes a weight moves at least: read forward and backward, gradient written and read, weight written; and each of Adam's two
# states read and written: 9 times the weight's own size.
MOVES = 9
PRODUCTS = 3  # with each weight: forward, and backward with respect to input and to weight


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder and its batch."""

    hidden: int
    heads: int
    head_dim: int
    mlp: int
    layers: int
    batch: int
    tokens: int

    def __str__(self) -> str:
        size = f"hidden {self.hidden}, {self.heads} heads of {self.head_dim}, MLP {self.mlp}, {self.depth}"
        return f"decoder of {size}, no vocabulary, batch {self.batch} of {self.tokens} tokens, AdamW"

    @property
    def depth(self) -> str:
        return f"{self.layers} layer{'s' * (self.layers != 1)}"

    @property
    def weights(self) -> int:
        """Of the matrices."""
        return self.layers * self.hidden * (4 * self.heads * self.head_dim + 3 * self.mlp)


PAPER = Shape(hidden=1536, heads=24, head_dim=64, mlp=4096, layers=4, batch=4, tokens=4096)
TINY = Shape(hidden=64, heads=2, head_dim=32, mlp=128, layers=1, batch=2, tokens=128)


class Attention(nn.Module):
    """Projections around an attention of q, k, v [B, H, N, D] that returns [B, H, N, D]."""

    def __init__(self, shape: Shape, attend: Callable):
        super().__init__()
        self.heads, self.head_dim, self.attend = shape.heads, shape.head_dim, attend
        width = shape.heads * shape.head_dim
        self.qkv, self.out = nn.Linear(shape.hidden, 3 * width), nn.Linear(width, shape.hidden, bias=False)
        # The last column of every head makes logits of the mean that inputs.alive_logit gives, as inputs.logit_parts does.
        bias = torch.zeros(3, shape.heads, shape.head_dim)
        bias[0, :, -1] = math.sqrt(-inputs.alive_logit(shape.tokens) * math.sqrt(shape.head_dim))
        bias[1, :, -1] = -bias[0, :, -1]
        self.qkv.bias = nn.Parameter(bias.flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(B, N, -1))


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape, attend: Callable):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden) for _ in range(2))
        self.attention = Attention(shape, attend)
        self.up, self.down = nn.Linear(shape.hidden, 2 * shape.mlp, bias=False), nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def stickbreaking(backend: str) -> Callable:
    """The paper's use of the operator: what is left of the stick goes to the token's own value."""

    def attend(q, k, v):
        with use_backend(backend):
            out, remainder = stickbreaking_attention(q, k, v, skip_below=0.0)
        return out + remainder[..., None].to(v.dtype) * v

    return attend


def softmax(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Callable:
    """torch's causal attention by a kernel of contenders.SOFTMAX, with rotary embeddings, which it needs and stick-breaking not.

    torch.compile fuses the embeddings: in eager operations they would make a step longer than any user's.
    """
    exponent = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    angle = torch.arange(shape.tokens, device=device)[:, None] / ROPE_BASE**exponent
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (angle.cos(), angle.sin()))

    @torch.compile
    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def attend(q, k, v):
        with sdpa_kernel(contenders.SOFTMAX[name]):
            return F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)

    return attend


def contender(shape: Shape, attend: Callable, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """{"step": function} of a decoder with this attention, on inputs and weights that are the same for all."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Layer(shape, attend) for _ in range(shape.layers)))
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INITIAL_STD)
    x = torch.randn(shape.batch, shape.tokens, shape.hidden).to(device, dtype)
    layers = layers.to(device, dtype)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=LEARNING_RATE, fused=True)

    def function():
        optimizer.zero_grad()
        layers(x).float().square().mean().backward()
        optimizer.step()

    return {"step": function}


def softmax_contender(name: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """`contender` with `softmax`."""
    return contender(shape, softmax(name, shape, dtype, device), dtype, device)


def work(shape: Shape, x: inputs.Inputs) -> limits.Work:
    """The least a step asks for; x: inputs of one layer's attention."""
    both = [limits.work(x, direction) for direction in ("forward", "backward")]
    tokens = shape.batch * shape.tokens
    flops = 2 * PRODUCTS * shape.weights * tokens + shape.layers * sum(each.flops for each in both)
    moved = MOVES * shape.weights * x.q.element_size() + shape.layers * sum(each.bytes for each in both)
    return limits.Work(flops, shape.layers * sum(each.special for each in both), moved)
