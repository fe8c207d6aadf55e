"""Properties of gradients, and of results and gradients together."""

from __future__ import annotations

import math

import torch

from ..inputs import STOP
from ..tolerance import OUTPUTS, SIGMAS, USED_UP
from .lab import Lab, Result, check, largest, same


@check
def first_query_sees_nothing(lab: Lab) -> Result:
    """Strict: o_0 = 0, r_0 = 1, dq_0 = 0, dk_last = dv_last = 0, all exactly."""
    x = lab.inputs()
    out, r, dq, dk, dv = lab.gradients(x.q, x.k, x.v, x.dout, x.dremainder)
    zeros = {
        "o_0": out[:, :, 0],
        "dq_0": dq[:, :, 0],
        "dk_last": dk[:, :, -1],
        "dv_last": dv[:, :, -1],
        "r_0 - 1": r[:, :, 0] - 1,
    }
    return [(name, largest(value), 0.0) for name, value in zeros.items()]


@check
def full_stop(lab: Lab) -> Result:
    """A key that takes the whole stick makes older ones invisible: o and r bit-equal, older gradients as good as 0."""
    x = lab.inputs()
    stop = lab.N // 2
    q, k = x.q.clone(), x.k.clone()
    q[..., -1], k[..., -1] = math.sqrt(lab.D), 0.0
    k[:, :, stop] = 0.0
    k[:, :, stop, -1] = STOP
    k2, v2 = k.clone(), x.v.clone()
    k2[:, :, :stop, :-1] += 1.0
    v2[:, :, :stop] += 1.0
    a = lab.gradients(q, k, x.v, x.dout, x.dremainder)
    b = lab.attend(q, k2, v2)
    after = slice(stop + 1, None)
    _, _, _, dk, dv = lab.gradients(q[:, :, after], k, x.v, x.dout[:, :, after], x.dremainder[:, :, after])
    reach = largest(x.dout) * largest(x.v) * lab.D + largest(x.dremainder)
    allowed = USED_UP * lab.N * reach * (1 + largest(q))
    return [
        same("o", a[0][:, :, after], b[0][:, :, after]),
        ("r", largest(a[1][:, :, after]), USED_UP),
        ("dk of older keys", largest(dk[:, :, :stop]), allowed),
        ("dv of older keys", largest(dv[:, :, :stop]), allowed),
    ]


@check
def chunks(lab: Lab) -> Result:
    """A newer chunk (o1, r1) and an older one (o2, r2) combine to (o1 + r1 o2, r1 r2), and so do their gradients."""
    x = lab.inputs("critical")
    q, cut = x.q[:, :, -1:], lab.N // 2 + 1
    dout, dr = x.dout[:, :, -1:], x.dremainder[:, :, -1:]
    whole = lab.gradients(q, x.k, x.v, dout, dr, attend_current=True)
    new = lab.gradients(q, x.k[:, :, cut:], x.v[:, :, cut:], dout, dr, attend_current=True)
    older = (q, x.k[:, :, :cut], x.v[:, :, :cut])
    out2, r2 = lab.attend(*older, attend_current=True)
    inner = (dout.double() * out2.double()).sum(-1) + (r2 * dr).double()
    new = lab.gradients(q, x.k[:, :, cut:], x.v[:, :, cut:], dout, inner.to(dr.dtype), attend_current=True)
    old = lab.gradients(*older, (new[1][..., None] * dout).to(dout.dtype), new[1] * dr, attend_current=True)
    u, e = lab.u, lab.e
    size = largest(x.v)
    grad = lambda a, b: largest(a.double() - b.double()) / max(largest(a), 1e-30)  # noqa: E731
    # Each gradient went through at most six roundings to the dtype: A or dz, dout, the result, on both sides.
    return [
        ("o", largest(whole[0].double() - new[0].double() - new[1].double()[..., None] * out2.double()), (4 * u + e) * size),
        ("r", largest(whole[1].double() / (new[1].double() * r2.double()) - 1), 4 * e),
        ("dq", grad(whole[2], new[2].double() + old[2].double()), 6 * u * math.sqrt(lab.N) + 10 * e),
        ("dk", grad(whole[3], torch.cat((old[3], new[3]), 2)), 6 * u + 10 * e),
        ("dv", grad(whole[4], torch.cat((old[4], new[4]), 2)), 6 * u + 10 * e),
    ]


@check
def gradient_identities(lab: Lab) -> Result:
    """sum dv = sum (1 - r) do; <dv, v> = <do, o>; <q, dq> = <k, dk>."""
    x = lab.inputs("critical")
    out, r, dq, dk, dv = (y.double() for y in lab.gradients(x.q, x.k, x.v, x.dout, x.dremainder))
    q, k, v, do = (y.double() for y in (x.q, x.k, x.v, x.dout))
    dot = lambda a, b: ((a * b).sum((2, 3)), (a * b).norm(dim=(2, 3)))  # noqa: E731
    column = dv.sum(2) - ((1 - r)[..., None] * do).sum(2)
    column_size = dv.norm(dim=2) + do.norm(dim=2)
    (a, a_size), (b, b_size), (c, c_size), (d, d_size) = dot(dv, v), dot(do, out), dot(q, dq), dot(k, dk)
    # Independent roundings of the terms add up like their norm; SIGMAS of them, two roundings each.
    allowed = 2 * SIGMAS * lab.u + lab.e * math.sqrt(lab.N)
    return [
        ("sum dv", (column.abs() / column_size).max().item(), allowed),
        ("<dv, v> - <do, o>", ((a - b).abs() / (a_size + b_size)).max().item(), allowed),
        ("<q, dq> - <k, dk>", ((c - d).abs() / (c_size + d_size)).max().item(), allowed),
    ]


@check
def gradient_of_remainder(lab: Lab) -> Result:
    """do = 0, dr = 1 gives dz = -beta r: read out with D = 1 as dq and dk."""
    x = lab.inputs("critical", D=1, Dv=1)
    x.q[..., 0], x.k[..., 0] = -3.0, 1.0
    ones = torch.ones_like(x.dremainder)
    _, _, dq, dk, dv = lab.gradients(x.q, x.k, x.v, torch.zeros_like(x.dout), ones)
    beta = torch.sigmoid(torch.tensor(-3.0, dtype=torch.float64)).item()
    n = torch.arange(lab.N, device=lab.device, dtype=torch.float64)
    exact = -beta * (1 - beta) ** n * n
    error = largest((dq[..., 0].double() - exact) / exact.abs().max())
    # Roundings: of each dz, of their sum; and of r, the product of N factors 1 - beta.
    return [
        ("dq", error, 2 * lab.u + lab.e * (1 + lab.N * beta)),
        ("dv", largest(dv), 0.0),
        ("dk's sign", max(0.0, -dk.double().min().item()), 0.0),
    ]


@check
def gradient_of_constant_values(lab: Lab) -> Result:
    """v = c and dr = do . c: o + r c does not depend on the logits, so that dq = dk = 0 but for cancellation."""
    x = lab.inputs("critical")
    c = torch.full_like(x.v, 0.5)
    dr = (x.dout.double() * 0.5).sum(-1).to(x.dremainder.dtype)
    _, _, dq, dk, _ = lab.gradients(x.q, x.k, c, x.dout, dr)
    size = (x.dout.double().abs() * 0.5).sum(-1).max().item()
    # What cancels in dz is beta times sums of up to |do| . c, each right to e; with that, beta stands in for dz in dq and dk.
    scale = lab.D**-0.5
    beta = torch.sigmoid(scale * x.q.double() @ x.k.double().transpose(-1, -2)).tril(-1)
    noise = lab.e * size * scale
    return [
        ("dq", largest(dq), noise * largest(beta @ x.k.double().abs())),
        ("dk", largest(dk), noise * largest(beta.transpose(-1, -2) @ x.q.double().abs())),
    ]


@check
def gradient_of_constant_values_alone(lab: Lab) -> Result:
    """v = c, dr = 0 gives dz = beta r (do . c): read out with D = 1 as dq."""
    x = lab.inputs("critical", D=1, Dv=1)
    x.q[..., 0], x.k[..., 0] = -3.0, 1.0
    c = torch.full_like(x.v, 0.5)
    _, _, dq, _, _ = lab.gradients(x.q, x.k, c, x.dout, torch.zeros_like(x.dremainder))
    beta = torch.sigmoid(torch.tensor(-3.0, dtype=torch.float64)).item()
    n = torch.arange(lab.N, device=lab.device, dtype=torch.float64)
    moved = x.dout[..., 0].double() * 0.5
    exact = moved * beta * (1 - beta) ** n * n
    # Each dz is rounded to the dtype, and so is their sum; before that, it is the difference of sums of up to beta |do . c| each.
    return [("dq", largest(dq[..., 0].double() - exact), 2 * lab.u * largest(exact) + lab.e * largest(moved) * beta * lab.N)]


@check
def scale_of_logits(lab: Lab) -> Result:
    """Four times the scale on a quarter of q gives the same bits, and four times dq."""
    x = lab.inputs("normal")
    q = x.q / 4
    scale = lab.D**-0.5
    results = lab.gradients(q * 4, x.k, x.v, x.dout, x.dremainder, scale=scale)
    given = lab.gradients(q, x.k, x.v, x.dout, x.dremainder, scale=4 * scale)
    normal = results[2].abs() > 2**4 * torch.finfo(lab.dtype).smallest_normal  # below, roundings are absolute
    bits = [same(name, a, b) for name, a, b in zip(OUTPUTS, results, given, strict=True) if name != "dq"]
    return [*bits, same("dq", 4 * results[2][normal], given[2][normal])]


@check
def expanded_gradients(lab: Lab) -> Result:
    """What .sum().backward() hands back, one number with strides of 0, counts like the same numbers in memory of their own."""
    x = lab.inputs("critical", H=1, Hk=1)
    dout, dr = torch.ones_like(x.dout[:1, :1, :1, :1]).expand_as(x.dout), torch.ones_like(x.dremainder[:1, :1, :1])
    expanded = lab.gradients(x.q, x.k, x.v, dout, dr.expand_as(x.dremainder))
    stored = lab.gradients(x.q, x.k, x.v, dout.contiguous(), dr.expand_as(x.dremainder).contiguous())
    return [same(name, a, b) for name, a, b in zip(("dq", "dk", "dv"), expanded[2:], stored[2:], strict=True)]
