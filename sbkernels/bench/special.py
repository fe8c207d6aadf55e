"""A kernel of exp2 alone, from registers: how many special functions a GPU does in a second."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK, NUM_WARPS = 2048, 8  # 8 independent chains a thread: their latencies overlap
ROUNDS, UNROLLED = 512, 8
PROGRAMS_PER_SM = 32


@triton.jit
def chains(out, ROUNDS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr):
    """out [programs, BLOCK] float32: x <- 2^-x, ROUNDS * UNROLLED times, which neither overflows nor can be computed beforehand."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = place.to(tl.float32) * 1e-9
    for _ in range(ROUNDS):
        for _ in tl.static_range(UNROLLED):
            x = tl.exp2(-x)
    tl.store(out + place, x)


def load(out, multiprocessors: int) -> tuple[int, object]:
    """(special functions, function that launches them) on out, float32 of at least PROGRAMS_PER_SM * BLOCK a multiprocessor."""
    programs = PROGRAMS_PER_SM * multiprocessors
    launch = lambda: chains[(programs,)](out, ROUNDS, UNROLLED, BLOCK, num_warps=NUM_WARPS)  # noqa: E731
    return programs * BLOCK * ROUNDS * UNROLLED, launch
