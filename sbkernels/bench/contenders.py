"""Who is compared: our backends, torch's softmax attention, eager and compiled stick-breaking, the authors' package.

Each is a function of inputs that gives {direction: function without arguments}; autograd's graph is built then, outside of the
timing. What cannot run raises, and the message says why.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import reference
from ..verify import inputs
from ..verify.calls import directions, passes
from ..verify.run import problem_of, variant_of

SOFTMAX = {
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
# Logits that are kept in memory at most: about six arrays of 4 bytes each in a forward and its graph.
EAGER_LOGITS = 2**30
AUTHORS = "authors"


class NotHere(ValueError):
    """Why a contender does not take inputs, which is no failure."""


def ours(x: inputs.Inputs, backend, variant: str = "") -> dict:
    """One backend on dense or varlen inputs."""
    problem = problem_of(x)
    with variant_of(backend, variant, problem):
        functions = passes(x)

    def forward():
        with variant_of(backend, variant, problem):
            return functions["forward"]()

    return functions | {"forward": forward}


def softmax_names(device: str) -> list[str]:
    """Those of SOFTMAX that a device may have: kernels on a GPU, plain torch elsewhere."""
    return [name for name in SOFTMAX if (name == "SDPA math") != device.startswith("cuda")]


def softmax(x: inputs.Inputs, name: str) -> dict:
    """torch's causal softmax attention by the kernel of this name."""
    if x.case.lengths:
        return softmax_packed(x, name)
    group, M, N = x.q.shape[1] // x.k.shape[1], x.q.shape[2], x.k.shape[2]
    if M not in (1, N):
        raise NotHere(f"{name} stands beside as many queries as keys or one, not {M} of {N}")

    def call(q, k, v):
        with sdpa_kernel(SOFTMAX[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=M == N, enable_gqa=group > 1)

    return directions(call, [x.q, x.k, x.v], x.dout)


def softmax_packed(x: inputs.Inputs, name: str) -> dict:
    """The same for packed sequences: by what SDPA calls for nested tensors, which take milliseconds themselves."""
    if name == "cuDNN":
        raise NotHere("its backward takes the head dim for the longest length (pytorch PR 186142) and writes beyond its memory")
    if name != "FlashAttention-2":
        raise NotHere("packed sequences are not in it")
    longest, dropout, causal, debug = max(x.case.lengths), 0.0, True, False

    def call(q, k, v):
        lengths = (x.cu_seqlens, x.cu_seqlens, longest, longest)
        return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout, causal, debug)[0]

    tokens = [t[0].transpose(0, 1).contiguous() for t in (x.q, x.k, x.v)]
    return directions(call, tokens, x.dout[0].transpose(0, 1))


def softmax_contenders(x: inputs.Inputs) -> dict[str, dict]:
    """{name: {direction: function}} of those that take these inputs."""
    found = {}
    for name in softmax_names(str(x.q.device)):
        try:
            found[name] = softmax(x, name)
        except (RuntimeError, NotHere):
            continue
    return found


def stickbreaking(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, remainder) in plain torch with all logits in memory, in float32, as the equations of reference.py stand there."""
    M, N, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    z = (q @ k.transpose(-1, -2)).float() * reference.default_scale(q)
    A, remainder = reference.weights(z, reference.visible(range(M), M, N, False, q.device))
    return A.to(v.dtype) @ v, remainder


def eager(x: inputs.Inputs, operator=stickbreaking) -> dict:
    """`stickbreaking` on dense inputs."""
    case = x.case
    if case.lengths:
        raise NotHere("packed sequences are not in it")
    logits = case.B * case.H * case.M * case.N
    if logits > EAGER_LOGITS:
        raise NotHere(f"{logits} logits in memory: at most {EAGER_LOGITS} are tried")
    return directions(operator, [x.q, x.k, x.v], (x.dout, x.dremainder))


def compiled(x: inputs.Inputs) -> dict:
    """The same through torch.compile, for these shapes alone."""
    torch.compiler.reset()  # else the limit of recompilations is reached after some shapes
    return eager(x, torch.compile(stickbreaking, dynamic=False))


def authors(x: inputs.Inputs) -> dict:
    """The package `stickbreaking_attention` of the paper's authors. ImportError where it is not installed."""
    case = x.case
    if case.Hk != case.H or (case.M != case.N and not case.lengths):
        raise NotHere("it takes as many key heads as heads, and as many queries as keys")
    if case.lengths:
        from stickbreaking_attention.sb_varlen import sb_attn_varlen

        call = lambda q, k, v: sb_attn_varlen(q, k, v, x.cu_seqlens[1:], zero_start=False)  # noqa: E731
        return directions(call, [t[0] for t in (x.q, x.k, x.v)], (x.dout[0], x.dremainder[0]))
    from stickbreaking_attention.sb_attn import sb_attn

    return directions(sb_attn, [x.q, x.k, x.v], (x.dout, x.dremainder))
