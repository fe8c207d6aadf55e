"""Properties of out and remainder."""

from __future__ import annotations

import math

import torch

from ... import reference
from ..inputs import STOP
from ..tolerance import USED_UP
from .lab import Lab, Result, apart, check, largest, same


@check
def mass(lab: Lab) -> Result:
    """v = 1 gives o + r = 1."""
    x = lab.inputs("critical")
    out, r = lab.attend(x.q, x.k, torch.ones_like(x.v))
    return [("o + r", largest(out.double() + r[..., None].double() - 1), 2 * lab.u + lab.e)]


@check
def causality(lab: Lab) -> Result:
    """Keys and values of the future leave o_i and r_i bit-equal, also when they are huge."""
    x = lab.inputs()
    half = lab.N // 2
    out, r = lab.attend(x.q, x.k, x.v)
    k, v = x.k.clone(), x.v.clone()
    k[:, :, half:] = torch.finfo(lab.dtype).max / 2**10
    v[:, :, half:] = torch.finfo(lab.dtype).max / 2**10
    out2, r2 = lab.attend(x.q, k, v)
    return [same("o", out[:, :, : half + 1], out2[:, :, : half + 1]), same("r", r[:, :, : half + 1], r2[:, :, : half + 1])]


@check
def zero_logits(lab: Lab) -> Result:
    """All logits 0 give A = 2^-(distance), read out by v = I, and r = 2^-n, exactly."""
    n = min(lab.D, lab.N)
    q = torch.zeros(1, 1, n, lab.D, dtype=lab.dtype, device=lab.device)
    v = torch.eye(n, lab.D, dtype=lab.dtype, device=lab.device)[None, None]
    out, r = lab.attend(q, q, v)
    i = torch.arange(n)
    power = torch.ldexp(torch.ones(n, dtype=torch.float64), -i).to(lab.device)  # pow() is not exact on every device
    exact = torch.where(i[None, :] < i[:, None], power.cpu()[(i[:, None] - i[None, :]).clamp_min(0)], 0.0).to(lab.device)
    smallest = torch.finfo(lab.dtype).smallest_normal
    kept = torch.where(exact < smallest, out[0, 0, :, :n].double(), exact)
    return [("A", largest(out[0, 0, :, :n].double() - kept), 0.0), ("r", largest(r[0, 0].double() - power), 0.0)]


@check
def constant_logits(lab: Lab) -> Result:
    """Logits all z give A = beta (1 - beta)^n, read out by v = I, and r_n = (1 - beta)^n."""
    x = lab.inputs("zero", B=1, H=1, Hk=1, Dv=lab.N)
    q, k = x.q.clone(), torch.zeros_like(x.k)
    q[..., 0], k[..., 0] = math.sqrt(lab.D), -2.0
    z = (q[0, 0, 0, 0].double() * k[0, 0, 0, 0].double()) / math.sqrt(lab.D)
    beta, rest = torch.sigmoid(z), torch.sigmoid(-z)
    out, r = lab.attend(q, k, torch.eye(lab.N, dtype=lab.dtype, device=lab.device)[None, None])
    n = torch.arange(lab.N, device=lab.device, dtype=torch.float64)
    newer = n[:, None] - n[None, :] - 1
    exact = torch.where(newer >= 0, beta * rest ** newer.clamp_min(0), 0.0)
    tiny = torch.finfo(lab.dtype).smallest_normal  # below it a rounding is absolute
    allowed = lab.e * (1 + lab.N * beta.item())
    return [
        ("A", largest((out[0, 0].double() - exact) / (exact + tiny)), 2 * lab.u + allowed),
        ("r", largest((r - rest**n) / rest**n), allowed),
    ]


@check
def null_keys(lab: Lab) -> Result:
    """Keys of logit -STOP change nothing."""
    x = lab.inputs("critical")
    q, k = x.q, x.k
    null = torch.zeros_like(k)
    null[..., -1] = -STOP
    twice = lambda x, y: torch.stack((x, y), 3).flatten(2, 3)  # noqa: E731
    out, r = lab.attend(q[:, :, -1:], k, x.v, attend_current=True)
    out2, r2 = lab.attend(q[:, :, -1:], twice(k, null), twice(x.v, x.v), attend_current=True)
    return [
        ("o", largest(out.double() - out2.double()), 3 * lab.u * largest(x.v) + lab.e * largest(x.v)),
        ("r", largest(r / r2 - 1), lab.e),
    ]


def moves(lab: Lab, before, after) -> Result:
    """o changes from problem to problem as the reference's does: by more than roundings, and right to roundings."""
    exact = [reference.forward(*x, attend_current=True)[0] for x in (before, after)]
    found = [lab.attend(*x, attend_current=True)[0] for x in (before, after)]
    allowed = (2 * lab.u + lab.e_of(*before[:2]) + lab.e_of(*after[:2])) * largest(before[2])
    change = apart(*exact)
    error = apart(found[0].double() - found[1].double(), exact[0] - exact[1])
    return [("change of o", error, allowed), ("roundings beside the change", allowed / change, 1.0)]


@check
def order_of_keys(lab: Lab) -> Result:
    """Permuting the keys of one query keeps r and changes o."""
    x = lab.inputs("critical")
    order = torch.randperm(lab.N, generator=torch.Generator().manual_seed(5)).to(lab.device)
    q = x.q[:, :, -1:]
    permuted = (q, x.k[:, :, order], x.v[:, :, order])
    _, r = lab.attend(q, x.k, x.v, attend_current=True)
    _, r2 = lab.attend(*permuted, attend_current=True)
    logs = r.double().log().abs().max().item()
    return [("r", largest(r / r2 - 1), 2 * lab.e * (1 + logs)), *moves(lab, (q, x.k, x.v), permuted)]


@check
def shift_of_logits(lab: Lab) -> Result:
    """Unlike softmax, a constant added to all logits changes the result."""
    x = lab.inputs()
    q, k = x.q.clone(), x.k.clone()
    q[..., -1], k[..., -1] = math.sqrt(lab.D), 0.0
    shifted = k.clone()
    shifted[..., -1] = -3.0
    return moves(lab, (q, k, x.v), (q, shifted, x.v))


@check
def scale_of_values(lab: Lab) -> Result:
    """Scaling v by a power of two scales o exactly."""
    x = lab.inputs("critical")
    v = x.v + torch.sign(x.v)  # away from subnormals
    out, _ = lab.attend(x.q, x.k, v)
    out4, _ = lab.attend(x.q, x.k, v * 4)
    big = out.abs() > 2**10 * torch.finfo(lab.dtype).smallest_normal
    return [same("o", out4[big], out[big] * 4)]


@check
def convexity(lab: Lab) -> Result:
    """|o| <= (1 - r) max|v|."""
    x = lab.inputs("critical")
    out, r = lab.attend(x.q, x.k, x.v)
    over = out.double().abs().amax(-1) - (1 - r.double()) * largest(x.v)
    return [("excess", max(over.max().item(), 0.0), (2 * lab.u + lab.e) * largest(x.v))]


@check
def reflection(lab: Lab) -> Result:
    """log r(q, k) - log r(-q, k) = -scale q . sum(k): an O(N) oracle."""
    x = lab.inputs(seed=3, D=16, Dv=16)
    q = x.q / 8
    _, r = lab.attend(q, x.k, x.v)
    _, r2 = lab.attend(-q, x.k, x.v)
    older = x.k.double().cumsum(2) - x.k.double()
    exact = -(16**-0.5) * (q.double() * older).sum(-1)
    alive = (r > 2**20 * USED_UP) & (r2 > 2**20 * USED_UP)
    error = (r.double().log() - r2.double().log() - exact)[alive]
    return [("difference of logs", largest(error), 2 * lab.e * (1 + lab.N * math.log(2)))]


@check
def monotonicity(lab: Lab) -> Result:
    """A higher logit leaves newer weights bit-equal, raises its own and lowers the older ones and r."""
    n = min(lab.D - 1, lab.N)
    x = lab.inputs(M=1, N=n)
    q, k = x.q.clone(), x.k.clone()
    q[..., -1], k[..., -1] = math.sqrt(lab.D), 0.0
    v = torch.eye(n, lab.D, dtype=lab.dtype, device=lab.device).expand(1, 2, n, lab.D)
    out, r = lab.attend(q, k, v, attend_current=True)
    j = n // 2
    k[:, :, j, -1] = 4.0
    out2, r2 = lab.attend(q, k, v, attend_current=True)
    grew = (out2 - out)[..., 0, :]
    return [
        same("newer", grew[..., j + 1 : n], torch.zeros_like(grew[..., j + 1 : n])),
        ("own (decrease)", max(0.0, -grew[..., j].min().item()), 0.0),
        ("older (increase)", max(0.0, grew[..., :j].max().item()), 0.0),
        ("r (increase)", max(0.0, (r2 - r).max().item()), 0.0),
    ]


@check
def batching(lab: Lab) -> Result:
    """A batch entry and a head come out as they do alone, and appended tokens change nothing, but for the order of sums."""
    x = lab.inputs("critical", B=3, H=2, Hk=2)
    out, r = lab.attend(x.q, x.k, x.v)
    alone, r_alone = lab.attend(x.q[1:2, 1:], x.k[1:2, 1:], x.v[1:2, 1:])
    n = lab.N - 7
    short, r_short = lab.attend(x.q[:, :, :n], x.k[:, :, :n], x.v[:, :, :n])
    allowed = (2 * lab.u + 2 * lab.e) * largest(x.v)
    return [
        ("one entry's o", largest(out[1:2, 1:].double() - alone.double()), allowed),
        ("one entry's r", largest(r[1:2, 1:] - r_alone), 2 * lab.e),
        ("o without the last tokens", largest(out[:, :, :n].double() - short.double()), allowed),
        ("r without the last tokens", largest(r[:, :, :n] - r_short), 2 * lab.e),
    ]


@check
def read_out(lab: Lab) -> Result:
    """v = I reads A out: never negative, 0 from the diagonal on, rows of 1 - r; and o = A v for any other v."""
    x = lab.inputs("critical", Dv=lab.N)
    A, r = lab.attend(x.q, x.k, torch.eye(lab.N, dtype=lab.dtype, device=lab.device).expand_as(x.v))
    out, _ = lab.attend(x.q, x.k, x.v)
    A = A.double()
    # Each weight was rounded on its own: their sum is off by as many half ulps of them, and so is their product with v.
    rounded = lab.u + lab.e
    return [
        ("negative A", max(0.0, -A.min().item()), 0.0),
        ("A of invisible keys", largest(A.triu()), 0.0),
        ("sum of A", apart(A.sum(-1), 1 - r.double()), rounded),
        ("o - A v", apart(out, A @ x.v.double()), (2 * lab.u + rounded) * largest(x.v)),
    ]


@check
def recurrence(lab: Lab) -> Result:
    """o <- (1 - beta_j) o + beta_j v_j and r <- (1 - beta_j) r, oldest key first: a reference without a logarithm."""
    x = lab.inputs("critical", H=4, Hk=2, Dv=lab.D // 2)
    out, r = lab.attend(x.q, x.k, x.v)
    exact, left = reference.forward_recurrence(x.q, x.k, x.v)
    e = lab.e_of(x.q, x.k)
    logs = left.log().abs().max().item()
    return [("o", apart(out, exact), (2 * lab.u + e) * largest(x.v)), ("r", largest(r / left - 1), e * (1 + logs))]


@check
def packing(lab: Lab) -> Result:
    """Packed sequences come out as each does alone, whatever their neighbours hold, but for the order of sums."""
    lengths = [lab.N // 3, 0, 1, lab.N - lab.N // 3 - 1]
    x = lab.inputs("critical", H=4, Hk=2)
    out, r = lab.attend_packed(*(t[:1] for t in (x.q, x.k, x.v)), lengths)
    results, begin = [], 0
    for length in lengths:
        span, begin = slice(begin, begin + length), begin + length
        alone, r_alone = lab.attend(*(t[:1, :, span] for t in (x.q, x.k, x.v)))
        results.append((f"o of {length} tokens", apart(out[:, :, span], alone), (2 * lab.u + 2 * lab.e) * largest(x.v)))
        results.append((f"r of {length} tokens", apart(r[:, :, span], r_alone), 2 * lab.e))
    return results
