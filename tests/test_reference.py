"""The specification against itself: two formulations, and the closed-form gradient against autograd."""

import pytest
import torch
import torch.nn.functional as F

from sbkernels import reference
from sbkernels.verify import inputs

CASES = [
    inputs.Case(regime, M=m, N=n, D=16, Dv=8, H=2, Hk=hk, attend_current=current)
    for regime in inputs.REGIMES
    for m, n, hk, current in ((40, 40, 2, False), (7, 33, 1, True))
]


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-200)).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formulations_agree(case):
    x = inputs.make(case, torch.float64, "cpu")
    a = reference.forward(x.q, x.k, x.v, attend_current=case.attend_current)
    b = reference.forward_recurrence(x.q, x.k, x.v, attend_current=case.attend_current)
    assert relative(a[0], b[0]) < 1e-13
    assert (a[1] - b[1]).abs().max() < 1e-13


@pytest.mark.parametrize("case", CASES, ids=str)
def test_closed_form_gradient_is_autograd_s(case):
    """Autograd through equations (1) to (5) in log space."""
    x = inputs.make(case, torch.float64, "cpu")
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    group, M, N = case.H // case.Hk, case.M, case.N
    z = reference.default_scale(q) * q @ k.repeat_interleave(group, 1).transpose(-1, -2)
    mask = reference.visible(range(M), M, N, case.attend_current, "cpu")
    log_rest = F.logsigmoid(-z).masked_fill(~mask, 0.0)
    log_A = F.logsigmoid(z) + reference.exclusive_cumsum(log_rest, newer=True)
    out = log_A.exp().masked_fill(~mask, 0.0) @ v.repeat_interleave(group, 1)
    loss = (out * x.dout).sum() + (log_rest.sum(-1).exp() * x.dremainder).sum()
    exact = torch.autograd.grad(loss, (q, k, v))
    closed = reference.backward(x.q, x.k, x.v, x.dout, x.dremainder, attend_current=case.attend_current)
    for a, b in zip(closed, exact, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-14
