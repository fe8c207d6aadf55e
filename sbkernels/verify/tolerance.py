"""The one comparator: an error is judged by the error of a straightforward computation in the same precision.

Rule: NaN and inf where the reference has them and nowhere else; then, in every band of BAND rows, the largest and the RMS error
are at most FORWARD_FACTOR (BACKWARD_FACTOR for gradients) times the baseline's there, or times a rounding of the result where
the baseline was lucky, plus a floor: what working precision cannot see beside the terms that were added up, and what the early
stop may leave out. Nothing is compared with a number of our choosing.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .. import reference

BAND = 64
FORWARD_FACTOR, BACKWARD_FACTOR = 2.0, 3.0
OUTPUTS = ("out", "remainder", "dq", "dk", "dv")
GRADIENTS = OUTPUTS[2:]
# A stick is a product of up to N factors 1 / (1 + 2^s): three roundings each, of the sum, the quotient and the product, of at
# most half an ulp: a random walk whose standard deviation is sqrt(3 N / 3) half ulps. A logit is a sum of D products, whose
# roundings walk by sqrt(sum of the products' squares). SIGMAS is how many standard deviations an error may reach.
# NOTE: what a logit's partial sums lose besides is not in it. For that, seed 6021 of `sbk fuzz` on torch, in float32, is at 1.09 of
# its bound; as small as it gets, Case(regime=std10, H=4, D=64, Dv=1, attend_current=True, lengths=(1, 1, 1), seed=7040) at 1.05.
SIGMAS = 4.0
# What a backend may take for a used-up stick, early stop or not: MIN_STICK of the kernels.
USED_UP = 2.0**-62


def half_ulp(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to dtype."""
    return torch.finfo(dtype).eps / 2


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and transcendental functions run in for input of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logit_walk(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Standard deviation, in half ulps, of the largest logit's roundings for q [..., M, D], k [..., N, D]."""
    return abs(scale) * (q.square() @ k.square().transpose(-1, -2)).max().sqrt()


def _head(q, k, v, dout, dremainder, dtype, scale, mask):
    """Straightforward computation for one head in working precision, products' operands rounded to dtype; and its terms' sizes.

    Returns by output name: results; the size of their terms, with |.| on each, since cancellation leaves the noise of terms;
    what rounding in working precision may move; and what a stick left out may move, per unit of stick.
    """
    z = (q @ k.T) * scale
    log_rest = F.logsigmoid(-z).masked_fill(~mask, 0.0)
    log_A = F.logsigmoid(z) + reference.exclusive_cumsum(log_rest, newer=True)
    A = log_A.exp().masked_fill(~mask, 0.0)
    r = log_rest.sum(-1).exp()
    beta, rest = torch.sigmoid(z).masked_fill(~mask, 0.0), torch.sigmoid(-z)
    a = A * (dout @ v.T)
    older = (dremainder * r)[:, None] + reference.exclusive_cumsum(a, newer=False)
    dz = a * rest - beta * older
    a_size = A * (dout.abs() @ v.abs().T)
    older_size = (dremainder * r).abs()[:, None] + reference.exclusive_cumsum(a_size, newer=False)
    dz_size = a_size * rest + beta * older_size
    A_low, dz_low = A.to(dtype).to(z.dtype), dz.to(dtype).to(z.dtype)
    results = {
        "out": A_low @ v, "remainder": r, "dq": scale * (dz_low @ k), "dk": scale * (dz_low.T @ q), "dv": A_low.T @ dout,
    }  # fmt: skip
    sizes = {
        "out": A @ v.abs(), "remainder": r * (1 + log_rest.sum(-1).abs()), "dq": scale * (dz_size @ k.abs()),
        "dk": scale * (dz_size.T @ q.abs()), "dv": A.T @ dout.abs(),
    }  # fmt: skip
    walk = max(k.shape[0], 1) ** 0.5 + logit_walk(q, k, scale)
    noise = {name: SIGMAS * half_ulp(z.dtype) * walk * size for name, size in sizes.items()}
    # What a stick left out moves at most, per unit of stick: an early stop leaves out skip_below, rounding to 0 USED_UP.
    reach = (dout.abs() @ v.abs().T).max() + dremainder.abs().max()
    queries = mask.any(1, keepdim=True).to(z.dtype)
    stopped = {
        "out": v.abs().max() * queries, "remainder": queries[:, 0],
        "dq": scale * reach * (beta @ k.abs() + 2 * k.abs().max()) * queries,
        "dk": scale * reach * (beta.T @ q.abs() + q.abs().sum(0)), "dv": dout.abs().sum(0).expand_as(v),
    }  # fmt: skip
    return results, noise, stopped


@dataclasses.dataclass
class Expected:
    """By output name: the reference (float64), the baseline (float64 values of a lower-precision computation) and the floor."""

    reference: dict[str, torch.Tensor]
    baseline: dict[str, torch.Tensor]
    floor: dict[str, torch.Tensor]
    dtype: torch.dtype


def expect(q, k, v, dout, dremainder, *, scale=None, attend_current=False, skip_below=0.0) -> Expected:
    """Reference, baseline and floor of one dense problem in canonical order [B, H, M, D]; memory M by N for one head."""
    scale = reference.default_scale(q) if scale is None else scale
    out, remainder = reference.forward(q, k, v, scale=scale, attend_current=attend_current)
    gradients = reference.backward(q, k, v, dout, dremainder, scale=scale, attend_current=attend_current)
    exact = dict(zip(OUTPUTS, (out, remainder, *gradients), strict=True))
    group, M, N = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    working = working_dtype(q.dtype)
    mask = reference.visible(range(M), M, N, attend_current, q.device)
    baseline = {name: torch.zeros_like(x) for name, x in exact.items()}
    floor = {name: torch.zeros_like(x) for name, x in exact.items()}
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kh = h // group
            tensors = (q[b, h], k[b, kh], v[b, kh], dout[b, h], dremainder[b, h])
            results, noise, stopped = _head(*(x.to(working) for x in tensors), q.dtype, scale, mask)
            for name in OUTPUTS:
                head = kh if name in ("dk", "dv") else h
                baseline[name][b, head] += results[name].double()
                floor[name][b, head] += noise[name].double() + (skip_below + USED_UP) * stopped[name].double()
    for name in OUTPUTS:
        stored = working if name == "remainder" else q.dtype
        floor[name] += torch.finfo(stored).smallest_normal * half_ulp(stored)  # half of the smallest step there is
        baseline[name] = baseline[name].to(stored).double()
    return Expected(exact, baseline, floor, q.dtype)


@dataclasses.dataclass(frozen=True)
class Finding:
    """How one output compares: the worst error over its bound, where, and the plain relative error."""

    output: str
    ratio: float  # worst error / bound over bands, in max or RMS; above 1 is a failure
    to_baseline: float  # the same without the floor and the factor: error over the baseline's error
    relative_l2: float  # ||error|| / ||exact||, or / ||floor|| where the exact result is below the floor
    where: str

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


def _bands(x: torch.Tensor) -> torch.Tensor:
    """[B, H, rows, width] -> [B, H, bands, BAND * width], zero-padded."""
    pad = -x.shape[2] % BAND
    return F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, BAND)).flatten(3)


def relative_l2(got: torch.Tensor, exact: torch.Tensor, floor: torch.Tensor) -> float:
    """||got - exact|| / max(||exact||, ||floor||); 0 for two zeros."""
    error, size = (got - exact).norm().item(), max(exact.norm().item(), floor.norm().item())
    return error / size if size else (0.0 if error == 0 else float("inf"))


def compare(got: torch.Tensor, expected: Expected, output: str) -> Finding:
    """Judge one output [B, H, rows, width] ([B, H, rows] for the remainder) by the rule of this module."""
    exact, baseline, floor = (x[output] for x in (expected.reference, expected.baseline, expected.floor))
    got = got.double()
    if got.shape != exact.shape:
        return Finding(output, *[float("inf")] * 3, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    if exact.numel() == 0:
        return Finding(output, 0.0, 0.0, 0.0, "empty")
    l2 = relative_l2(got, exact, floor)
    wrong = ~torch.isfinite(got) & torch.isfinite(exact) | (~torch.isfinite(exact) & ~torch.isclose(got, exact, equal_nan=True))
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        return Finding(output, float("inf"), float("inf"), l2, f"{got[place].item()} at {place}, {int(wrong.sum())} such")
    if exact.dim() == 3:
        got, exact, baseline, floor = (x.unsqueeze(-1) for x in (got, exact, baseline, floor))
    stored = working_dtype(expected.dtype) if output == "remainder" else expected.dtype
    factor = BACKWARD_FACTOR if output in GRADIENTS else FORWARD_FACTOR
    error = _bands((got - exact).abs())
    worst_ratio, worst_base, where = 0.0, 0.0, "nowhere"
    for measure in ("max", "rms"):
        size = (lambda x: x.amax(-1)) if measure == "max" else (lambda x: x.square().mean(-1).sqrt())
        base, scale = size(_bands((baseline - exact).abs())), size(_bands(exact.abs()))
        # Where the baseline happens to be exact, a typical band's relative error or one rounding of the result stands in.
        typical = (base / scale)[scale > 0].median() if bool((scale > 0).any()) else base.new_zeros(())
        base = torch.maximum(base, scale * typical.clamp_min(half_ulp(stored)))
        bound = factor * base + size(_bands(floor))
        ratio = torch.where(size(error) == 0, 0.0, size(error) / bound)
        worst_base = max(worst_base, torch.where(size(error) == 0, 0.0, size(error) / base.clamp_min(1e-300)).max().item())
        if ratio.max().item() > worst_ratio:
            worst_ratio = ratio.max().item()
            b, h, band = (int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
            inside = int(error[b, h, band].argmax())
            row, column = band * BAND + inside // exact.shape[3], inside % exact.shape[3]
            where = f"{measure} in rows {band * BAND}.. of [{b}, {h}], worst at [{b}, {h}, {row}, {column}]"
    return Finding(output, worst_ratio, worst_base, l2, where)
