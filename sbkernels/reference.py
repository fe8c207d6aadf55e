"""The float64 specification of stick-breaking attention (Tan et al. 2024, arXiv 2410.17980). Equations are numbered here.

V(i) = { j : j < i }, or j <= i with attend_current; M queries are aligned to the end of N keys: query i stands at N - M + i.

    (1)  z_ij = scale * q_i . k_j                       scale defaults to D ** -0.5
    (2)  beta_ij = sigmoid(z_ij)
    (3)  A_ij = beta_ij * prod_{l in V(i), l > j} (1 - beta_il)
    (4)  o_i = sum_j A_ij v_j
    (5)  r_i = prod_{j in V(i)} (1 - beta_ij) = 1 - sum_j A_ij
    (6)  1 - beta_ij = 1 / (1 + 2^s_ij),  s_ij = z_ij log2(e)
    (7)  A_ij = stick_ij * 2^s_ij / (1 + 2^s_ij),  stick_ij = prod_{l in V(i), l > j} (1 - beta_il)
    (8)  a_ij = A_ij * (do_i . v_j)
    (9)  dz_ij = a_ij (1 - beta_ij) - beta_ij * ( dr_i r_i + sum_{l in V(i), l < j} a_il )
    (10) dv_j = sum_i A_ij do_i ;  dq_i = scale * sum_j dz_ij k_j ;  dk_j = scale * sum_i dz_ij q_i

`forward` evaluates (1) to (5) in log space, `forward_recurrence` walks the keys oldest first without a logarithm, `backward` is
(8) to (10). All take tensors in canonical order, q [B, H, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv] of any float dtype, work in
float64 on the tensors' device, and need memory for a block of rows by N, not M by N.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = 2**22  # logits of one head in flight: 32 MiB each of a few float64 arrays


def row_blocks(M: int, N: int):
    """(begin, end) of blocks of query rows whose logits fit LOGITS_AT_ONCE."""
    step = max(1, LOGITS_AT_ONCE // max(N, 1))
    return [(begin, min(begin + step, M)) for begin in range(0, M, step)]


def visible(rows: range, M: int, N: int, attend_current: bool, device) -> torch.Tensor:
    """[len(rows), N] bool: which keys these query rows see."""
    position = torch.arange(rows.start, rows.stop, device=device) + N - M
    key = torch.arange(N, device=device)
    return key[None, :] <= position[:, None] if attend_current else key[None, :] < position[:, None]


def exclusive_cumsum(x: torch.Tensor, newer: bool) -> torch.Tensor:
    """Along the last dimension, sum over strictly newer (higher) or strictly older indices, never by subtraction."""
    if newer:
        return exclusive_cumsum(x.flip(-1), False).flip(-1)
    return F.pad(x.cumsum(-1)[..., :-1], (1, 0)) if x.shape[-1] else x


def weights(z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (3) and (5) in log space: A [rows, N] and r [rows] from logits and visibility."""
    log_rest = F.logsigmoid(-z).masked_fill(~mask, 0.0)
    A = (F.logsigmoid(z) + exclusive_cumsum(log_rest, newer=True)).exp().masked_fill(~mask, 0.0)
    return A, log_rest.sum(-1).exp()


def _heads(q, k, v):
    """(b, h, key head) over all query heads."""
    group = q.shape[1] // k.shape[1]
    return [(b, h, h // group) for b in range(q.shape[0]) for h in range(q.shape[1])]


def default_scale(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5


def forward(q, k, v, *, scale=None, attend_current=False):
    """Eq. (1) to (5): out [B, H, M, Dv] and remainder [B, H, M], float64."""
    scale = default_scale(q) if scale is None else scale
    M, N = q.shape[2], k.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    remainder = torch.ones(q.shape[:3], dtype=torch.float64, device=q.device)
    for b, h, kh in _heads(q, k, v):
        keys, values = k[b, kh].double(), v[b, kh].double()
        for begin, end in row_blocks(M, N):
            z = scale * (q[b, h, begin:end].double() @ keys.T)
            A, remainder[b, h, begin:end] = weights(z, visible(range(begin, end), M, N, attend_current, q.device))
            out[b, h, begin:end] = A @ values
    return out, remainder


def forward_recurrence(q, k, v, *, scale=None, attend_current=False):
    """The second formulation: o <- (1 - beta_j) o + beta_j v_j, r <- (1 - beta_j) r, oldest key first. N steps: small N."""
    scale = default_scale(q) if scale is None else scale
    M, N = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    z = scale * (q.double() @ keys.transpose(-1, -2))
    z = z.masked_fill(~visible(range(M), M, N, attend_current, q.device), float("-inf"))
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    remainder = torch.ones(q.shape[:3], dtype=torch.float64, device=q.device)
    for j in range(N):
        take, leave = torch.sigmoid(z[..., j]), torch.sigmoid(-z[..., j])
        out = leave[..., None] * out + take[..., None] * values[:, :, j, None, :]
        remainder = leave * remainder
    return out, remainder


def backward(q, k, v, dout, dremainder, *, scale=None, attend_current=False):
    """Eq. (8) to (10): dq, dk, dv in float64 from dout [B, H, M, Dv] and dremainder [B, H, M]."""
    scale = default_scale(q) if scale is None else scale
    M, N = q.shape[2], k.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v))
    for b, h, kh in _heads(q, k, v):
        keys, values = k[b, kh].double(), v[b, kh].double()
        for begin, end in row_blocks(M, N):
            queries, do = q[b, h, begin:end].double(), dout[b, h, begin:end].double()
            z = scale * (queries @ keys.T)
            mask = visible(range(begin, end), M, N, attend_current, q.device)
            A, r = weights(z, mask)
            a = A * (do @ values.T)
            older = (dremainder[b, h, begin:end].double() * r)[:, None] + exclusive_cumsum(a, newer=False)
            dz = (a * torch.sigmoid(-z) - torch.sigmoid(z) * older).masked_fill(~mask, 0.0)
            dq[b, h, begin:end] = scale * (dz @ keys)
            dk[b, kh] += scale * (dz.T @ queries)
            dv[b, kh] += A.T @ do
    return dq, dk, dv


def per_sequence(function, tensors, cu_seqlens, **options):
    """Apply `forward` or `backward` to each sequence of varlen tensors [1, H, T, ...] and join the results along T."""
    bounds = cu_seqlens.tolist()
    parts = [function(*(x[:, :, begin:end] for x in tensors), **options) for begin, end in itertools.pairwise(bounds)]
    return tuple(torch.cat(results, dim=2) for results in zip(*parts, strict=True))
