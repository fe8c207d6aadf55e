"""What must hold of stick-breaking attention whatever the inputs, as named checks (list and derivations: the reference's docs).

Each check takes a `Lab` and returns [(what, error, allowed)]; it passes where error <= allowed. Allowed errors are roundings:
u is half an ulp of the tensors' dtype, e one of the working precision times what a chain of N of them can walk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from ..api import stickbreaking_attention
from ..problem import describe
from .inputs import STOP, Case, make
from .tolerance import SIGMAS, USED_UP, half_ulp, working_dtype

Result = list[tuple[str, float, float]]
PROPERTIES: dict[str, Callable[[Lab], Result]] = {}


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

    def inputs(self, regime: str = "normal", seed: int = 0, **shape):
        case = Case(regime, **({"M": self.N, "N": self.N, "D": self.D, "Dv": self.D, "seed": seed} | shape))
        return make(case, self.dtype, self.device)

    def attend(self, q, k, v, **options):
        """out, remainder without early stop unless asked for."""
        options = {"skip_below": 0.0} | options
        with self.around(describe(*(x.detach() for x in (q, k, v)), **options)):
            return stickbreaking_attention(q, k, v, **options)

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


def same(what: str, a: torch.Tensor, b: torch.Tensor) -> tuple[str, float, float]:
    """Bit-equal."""
    return what, float((a != b).sum().item()), 0.0


@check
def mass(lab: Lab) -> Result:
    """v = 1 gives o + r = 1."""
    x = lab.inputs("critical")
    out, r = lab.attend(x.q, x.k, torch.ones_like(x.v))
    return [("o + r", largest(out.double() + r[..., None].double() - 1), 2 * lab.u + lab.e)]


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
    """Logits all z give r_n = (1 - beta)^n."""
    x = lab.inputs("zero")
    q, k = x.q.clone(), torch.zeros_like(x.k)
    q[..., 0], k[..., 0] = math.sqrt(lab.D), -2.0
    z = (q[0, 0, 0, 0].double() * k[0, 0, 0, 0].double()) / math.sqrt(lab.D)
    _, r = lab.attend(q, k, x.v)
    n = torch.arange(lab.N, device=lab.device, dtype=torch.float64)
    exact = torch.sigmoid(-z) ** n
    return [("r", largest((r - exact) / exact), lab.e * (1 + n[-1].item() * abs(torch.sigmoid(z).item())))]


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


@check
def order_of_keys(lab: Lab) -> Result:
    """Permuting the keys of one query keeps r and changes o."""
    x = lab.inputs("critical")
    order = torch.randperm(lab.N, generator=torch.Generator().manual_seed(5)).to(lab.device)
    q = x.q[:, :, -1:]
    out, r = lab.attend(q, x.k, x.v, attend_current=True)
    out2, r2 = lab.attend(q, x.k[:, :, order], x.v[:, :, order], attend_current=True)
    moved = (out.double() - out2.double()).norm() / out.double().norm()
    logs = r.double().log().abs().max().item()
    return [("r", largest(r / r2 - 1), 2 * lab.e * (1 + logs)), ("o stays (1 / change)", 1 / max(moved.item(), 1e-9), 1e3)]


@check
def shift_of_logits(lab: Lab) -> Result:
    """Unlike softmax, a constant added to all logits changes the result."""
    x = lab.inputs()
    q, k = x.q.clone(), x.k.clone()
    q[..., -1], k[..., -1] = math.sqrt(lab.D), 0.0
    out, _ = lab.attend(q, k, x.v)
    k[..., -1] = -3.0
    out2, _ = lab.attend(q, k, x.v)
    moved = (out.double() - out2.double()).norm() / out.double().norm()
    return [("o stays (1 / change)", 1 / max(moved.item(), 1e-9), 1e2)]


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
    return [
        ("dq", error, 3 * lab.u + lab.e * 4),
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
    spread = size * lab.D**-0.5 * max(largest(x.q), largest(x.k)) * lab.N
    return [("dq", largest(dq), lab.e * spread), ("dk", largest(dk), lab.e * spread)]
