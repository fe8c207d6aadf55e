"""What a forward call costs the host: the time until it returns, on a problem so small that the device keeps up."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from ..api import stickbreaking_attention

SHAPE = (1, 1, 64, 64)  # B, H, N, D
CALLS, ROUNDS = 20, 200
SDPA = "SDPA"


def overhead(backends: list[str], device: str) -> dict[str, float]:
    """Microseconds a call of each backend on a CUDA device, and of torch's SDPA: the least mean of CALLS calls, by turns.

    The least, because whatever else the machine does only adds to it. No gradients. A backend that cannot run SHAPE in bfloat16
    must not be among them.
    """
    q, k, v = (torch.randn(SHAPE, dtype=torch.bfloat16, device=device) for _ in range(3))
    contenders = {name: lambda name=name: stickbreaking_attention(q, k, v, backend=name) for name in backends}
    contenders[SDPA] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            call()  # caches are this contender's
            torch.cuda.synchronize(device)
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter_ns() - begin) / CALLS / 1e3)
        torch.cuda.synchronize(device)
    return best
