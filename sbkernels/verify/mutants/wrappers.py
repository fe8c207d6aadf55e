"""Mutants of any backend: what goes into a right one, or comes out of it, is changed.

Tensors are canonical: q [B, H, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv], out and dout [B, H, M, Dv], remainder and dremainder
[B, H, M]; varlen: B = 1 and tokens for M and N.
"""

from __future__ import annotations

import dataclasses

import torch

from ...backends.base import Call
from .mutant import Mutant


def of_call(change) -> dict:
    """Both directions compute change(call)."""
    return {
        "forward": lambda right, call, config: right(change(call)._replace(kept=None), config),
        "backward": lambda right, call, config, *rest: right(change(call), config, *rest),
    }


def of_results(change) -> dict:
    """The forward returns change(call, out, remainder) in place of out and remainder."""

    def forward(right, call, config):
        out, remainder, saved = right(call, config)
        return *change(call, out, remainder), saved

    return {"forward": forward}


def of_incoming(change) -> dict:
    """The backward gets change(dout, dremainder)."""

    def backward(right, call, config, remainder, saved, dout, dremainder):
        return right(call, config, remainder, saved, *change(dout, dremainder))

    return {"backward": backward}


def of_gradients(change) -> dict:
    """The backward returns change(call, dq, dk, dv)."""
    return {"backward": lambda right, call, config, *rest: change(call, *right(call, config, *rest))}


def with_problem(call: Call, **changes) -> Call:
    return call._replace(problem=dataclasses.replace(call.problem, **changes))


def as_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x read by its shape alone, as far as its memory reaches."""
    if x.untyped_storage().nbytes() // x.element_size() < x.storage_offset() + x.numel():
        return x
    strides = torch.empty(x.shape, device="meta").stride()
    return x.as_strided(x.shape, strides, x.storage_offset())


def unwritten(x: torch.Tensor, right: torch.Tensor, rows) -> torch.Tensor:
    """`right` with some rows of the third dimension as they were in x."""
    right[:, :, rows] = x[:, :, rows]
    return right


# ---- Wrong calls ----


def heads_shuffled(call: Call, x: torch.Tensor, back: bool) -> torch.Tensor:
    """Query heads in the order in which a backend that takes key head h % Hk finds its key heads right, and back."""
    H, Hk = call.problem.heads, call.problem.kv_heads
    order = torch.arange(H).view(H // Hk, Hk).T.flatten()
    return x[:, order.argsort() if back else order]


def wrong_group_forward(right, call, config):
    out, remainder, saved = right(call._replace(q=heads_shuffled(call, call.q, False).contiguous(), kept=None), config)
    return heads_shuffled(call, out, True), heads_shuffled(call, remainder, True), saved


def wrong_group_backward(right, call, config, remainder, saved, dout, dremainder):
    shuffled = [heads_shuffled(call, x, False).contiguous() for x in (call.q, remainder, dout, dremainder)]
    dq, dk, dv = right(call._replace(q=shuffled[0]), config, shuffled[1], saved, *shuffled[2:])
    return heads_shuffled(call, dq, True), dk, dv


def bounds_moved(call: Call) -> Call:
    if call.cu_seqlens is None:
        return call
    bounds = call.cu_seqlens.clone()
    bounds[1:-1] = (bounds[1:-1] - 1).clamp_min(0)
    return call._replace(cu_seqlens=bounds)


def one_sequence(call: Call) -> Call:
    if call.cu_seqlens is None:
        return call
    tokens = call.q.shape[2]
    return with_problem(call, batch=1, queries=tokens, keys=tokens)._replace(cu_seqlens=call.cu_seqlens[[0, -1]].contiguous())


def without_columns(x: torch.Tensor, first: int) -> torch.Tensor:
    x = x.contiguous().clone()
    x[..., first:] = 0
    return x


# ---- Wrong results ----


class Stale:
    """Returns the results of the call before, where they have the shape."""

    def __init__(self):
        self.before = {}

    def __call__(self, call, *results):
        key = tuple((x.shape, x.dtype) for x in results)
        stale = self.before.get(key, results)
        self.before[key] = tuple(x.clone() for x in results)
        return stale


class Leftover:
    """Adds dk to what the call before of the same shape has left in it."""

    def __init__(self):
        self.before = {}

    def __call__(self, call, dq, dk, dv):
        dk = dk + self.before.get((dk.shape, dk.dtype), 0)
        self.before[dk.shape, dk.dtype] = dk.clone()
        return dq, dk, dv


def softmax(call: Call, out, remainder):
    if call.cu_seqlens is not None:
        return out, remainder
    group, M, N = call.problem.group, call.q.shape[2], call.k.shape[2]
    k, v = (x.float().repeat_interleave(group, 1) for x in (call.k, call.v))
    z = call.scale * (call.q.float() @ k.transpose(2, 3))
    seen = torch.ones(M, N, dtype=torch.bool, device=z.device).tril(N - M - (0 if call.problem.attend_current else 1))
    A = z.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return out.copy_(A @ v), remainder


def one_minus_mass(right, call, config):
    out, remainder, saved = right(call, config)
    mass, _, _ = right(call._replace(v=torch.ones_like(call.v), kept=None), config)
    return out, remainder.copy_(1 - mass[..., 0].float()), saved


def wrong_layout(call: Call, out, remainder):
    if call.problem.layout != "bnhd":
        return out, remainder
    B, H, M, Dv = out.shape
    return out.contiguous().view(B, M, H, Dv).transpose(1, 2), remainder


def one_too_far(call: Call, out, remainder):
    flat = out.transpose(1, 2) if call.problem.layout == "bnhd" else out
    end = flat.storage_offset() + flat.numel()
    if end < flat.untyped_storage().nbytes() // flat.element_size():  # only where outputs are guarded is there a place
        flat.as_strided((1,), (1,), end).zero_()
    return out, remainder


def last_bit(call: Call, out, remainder):
    return out * (1 + torch.finfo(out.dtype).eps * torch.randint(0, 2, out.shape, device=out.device)).to(out.dtype), remainder


def blocks_swapped(call: Call, out, remainder):
    if out.shape[2] < 32:
        return out, remainder
    return torch.cat((out[:, :, 16:32], out[:, :, :16], out[:, :, 32:]), 2), remainder


def dv_of_one_head(right, call, config, remainder, saved, dout, dremainder):
    group = call.problem.group
    last = torch.arange(call.problem.heads, device=dout.device) % group == group - 1
    _, _, dv = right(call, config, remainder, saved, dout * last[:, None, None], dremainder)
    dq, dk, _ = right(call, config, remainder, saved, dout, dremainder)
    return dq, dk, dv


def last_key_head_lost(call: Call, dq, dk, dv):
    dk[:, -1:], dv[:, -1:] = 0, 0
    return dq, dk, dv


def used_up_rows_lost(right, call, config, remainder, *rest):
    dq, dk, dv = right(call, config, remainder, *rest)
    return dq * (remainder > 2.0**-24)[..., None], dk, dv


MUTANTS = [
    Mutant("scale squared", "logits are scale^2 q . k", of_call(lambda c: c._replace(scale=c.scale**2))),
    Mutant("scale ignored", "always D ** -0.5", of_call(lambda c: c._replace(scale=c.q.shape[-1] ** -0.5))),
    Mutant(
        "diagonal off by one",
        "a query sees its own position where it should not, and the reverse",
        of_call(lambda c: with_problem(c, attend_current=not c.problem.attend_current)),
    ),
    Mutant("group modulo", "query head h takes key head h % Hk",
           {"forward": wrong_group_forward, "backward": wrong_group_backward}),
    Mutant("batch stride of k", "all batch entries read the first one's keys",
           of_call(lambda c: c._replace(k=c.k[:1].expand_as(c.k)))),
    Mutant("head stride of v", "all heads read the first one's values",
           of_call(lambda c: c._replace(v=c.v[:, :1].expand_as(c.v)))),
    Mutant("strides of q", "q is taken for contiguous", of_call(lambda c: c._replace(q=as_if_contiguous(c.q)))),
    Mutant("strides of k", "k is taken for contiguous", of_call(lambda c: c._replace(k=as_if_contiguous(c.k)))),
    Mutant("sequence bounds", "the last token of a sequence is counted to the next", of_call(bounds_moved)),
    Mutant("sequences leak", "packed sequences see the ones before them", of_call(one_sequence)),
    Mutant(
        "eager stop",
        "the early stop comes while 2^-5 of the stick is left",
        of_call(lambda c: c._replace(skip_below=max(c.skip_below, 2.0**-5) if c.skip_below else 0.0)),
    ),
    Mutant(
        "stop without leave",
        "stops early, at 2^-9 of the stick, where that is turned off",
        of_call(lambda c: with_problem(c, skip=True)._replace(skip_below=max(c.skip_below, 2.0**-9))),
    ),
    Mutant("head dim's tail", "columns of q beyond a multiple of 16 are not read",
           of_call(lambda c: c._replace(q=without_columns(c.q, max(1, c.q.shape[-1] // 16 * 16))))),
    Mutant("value dim's tail", "columns of v beyond D are not read",
           of_call(lambda c: c._replace(v=without_columns(c.v, c.q.shape[-1])))),
    Mutant("keys begin late", "with M < N keys are read from row N - M on, wrapping",
           of_call(lambda c: c._replace(k=c.k.roll(c.q.shape[2] - c.k.shape[2], 2)))),
    Mutant("values begin late", "each key takes the next newer one's value", of_call(lambda c: c._replace(v=c.v.roll(-1, 2)))),
    Mutant("bf16 queries", "q is rounded to bfloat16 on the way in", of_call(lambda c: c._replace(q=c.q.bfloat16().to(c.q.dtype)))),
    Mutant("stale output", "the results of the call before", of_results(Stale())),
    Mutant("missing fill value", "out of the first row, which sees no key, is not written",
           of_results(lambda c, out, r: (unwritten(c.empty_out(), out, slice(0, 1)), r))),
    Mutant("no remainder without keys", "a row that sees no key has remainder 0",
           of_results(lambda c, out, r: (out, torch.where(r == 1, 0.0, r)))),
    Mutant("last rows unwritten", "rows of out beyond a multiple of 16 are not written",
           of_results(lambda c, out, r: (unwritten(c.empty_out(), out, slice(out.shape[2] // 16 * 16, None)), r))),
    Mutant("bf16 remainder", "the remainder is rounded to bfloat16",
           of_results(lambda c, out, r: (out, r.bfloat16().to(r.dtype)))),
    Mutant("remainder by difference", "1 - sum of A in place of the product", {"forward": one_minus_mass}),
    Mutant("remainder of ones", "the remainder is never written back", of_results(lambda c, out, r: (out, torch.ones_like(r)))),
    Mutant("layout of out", "bnhd results are stored as bhnd", of_results(wrong_layout)),
    Mutant("heads of out", "head h is stored as head h + 1", of_results(lambda c, out, r: (out.roll(1, 1), r))),
    Mutant("one too far", "one element behind out is written", of_results(one_too_far)),
    Mutant("last bit", "out changes in its last bit from call to call", of_results(last_bit)),
    Mutant("softmax", "softmax attention", of_results(softmax)),
    Mutant("blocks swapped", "rows 0.. and 16.. are stored in each other's place", of_results(blocks_swapped)),
    Mutant("no remainder gradient", "dremainder is not read", of_incoming(lambda do, dr: (do, torch.zeros_like(dr)))),
    Mutant("remainder gradient's sign", "dremainder is subtracted", of_incoming(lambda do, dr: (do, -dr))),
    Mutant("remainder gradient's head", "dremainder of the next head", of_incoming(lambda do, dr: (do, dr.roll(1, 1)))),
    Mutant("strides of dout", "dout is taken for contiguous", of_incoming(lambda do, dr: (as_if_contiguous(do), dr))),
    Mutant("bf16 dout", "dout is rounded to bfloat16 on the way in", of_incoming(lambda do, dr: (do.bfloat16().to(do.dtype), dr))),
    Mutant("stale gradients", "the gradients of the call before", of_gradients(Stale())),
    Mutant("leftover dk", "dk is added to what is there", of_gradients(Leftover())),
    Mutant("last key head lost", "dk and dv of the last key head are 0", of_gradients(last_key_head_lost)),
    Mutant("dv of one head", "dv of a group's last query head only", {"backward": dv_of_one_head}),
    Mutant("dq without scale", "dq lacks the factor scale", of_gradients(lambda c, dq, dk, dv: (dq / c.scale, dk, dv))),
    Mutant("dk without scale", "dk lacks the factor scale", of_gradients(lambda c, dq, dk, dv: (dq, dk / c.scale, dv))),
    Mutant("dv a little large", "dv is 1/64 too large", of_gradients(lambda c, dq, dk, dv: (dq, dk, dv * (1 + 2.0**-6)))),
    Mutant("dk and dv swapped", "where they have one shape",
           of_gradients(lambda c, dq, dk, dv: (dq, dv, dk) if dk.shape == dv.shape else (dq, dk, dv))),
    Mutant("unseen keys unwritten", "dk of the newest key, which no query may see, is not written",
           of_gradients(lambda c, dq, dk, dv: (dq, unwritten(c.empty_gradient(c.k), dk, slice(-1, None)), dv))),
    Mutant("used-up rows lost", "rows whose stick is used up get no dq", {"backward": used_up_rows_lost}),
    Mutant("last batch entry lost", "dq of the last of several batch entries is 0",
           of_gradients(lambda c, dq, dk, dv: (torch.cat((dq[:-1], 0 * dq[-1:])) if len(dq) > 1 else dq, dk, dv))),
]  # fmt: skip
