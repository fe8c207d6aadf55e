"""Backward of stick-breaking attention, second of two kernels: dk and dv. Equations (8) to (10).

    grid    [UNITS * key tiles]: one program per (batch, key head, key tile), over all query heads of the group and all query
            blocks of the chunk that visit the tile; no two programs write the same place
    tensors, stats, state and chunks as in backward_queries.py, which has filled state and block_oldest
    dk_sum, dv_sum   [UNITS, N, D or DV] float32: carry the sums over the chunks of rows where one is not enough

Query rows are in their natural order; keys are permuted within the tile (step.py) and leave through the same offsets.
"""

import triton
import triton.language as tl

from .step import from_runs, key_offsets, logit_gradient, per_lane, scan_start, weights
from .tiles import load_rows, logits, program_again, rows_at, sequence, state_ptrs, store_rows

OLDEST_AT_ONCE = tl.constexpr(1024)  # entries of block_oldest read at a time


@triton.jit
def last_visitor(block_oldest_ptr, blocks, tile):
    """1 + index of the last query block that visits the key tile, 0 if none does."""
    last = 0
    for first in range(0, blocks, OLDEST_AT_ONCE):
        i = first + tl.arange(0, OLDEST_AT_ONCE)
        oldest = tl.load(block_oldest_ptr + i, mask=i < blocks, other=2147483647)
        last = tl.maximum(last, tl.max(tl.where(oldest <= tile, i + 1, 0), 0))
    return last


@triton.jit
def add_product(sum, x, rows, TRANSPOSED: tl.constexpr):
    """sum + x^T rows for x [BLOCK_M, BLOCK_N] and rows [BLOCK_M, width]; TRANSPOSED keeps the transpose of the sum.

    NOTE: not transposed, x^T comes from registers. On an H100 the two are equal at D = 128 (1.33 and 1.34 ms at B, H, N = 4, 16,
    4096), where the transposed one compiles without spills; at D = 64 it is the faster (1.63 against 1.94 ms at 4, 32, 4096).
    """
    if TRANSPOSED:
        return tl.dot(tl.trans(rows), x, sum)
    else:
        return tl.dot(tl.trans(x), rows, sum)


@triton.jit
def sum_tile(
    ptr, row, rows, count,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What the sum of a gradient tile starts from: zeros, or what the chunk of rows before has left in a [rows, D] matrix."""
    if FIRST:
        return tl.zeros([BLOCK_D, BLOCK_N] if TRANSPOSED else [BLOCK_N, BLOCK_D], tl.float32)
    else:
        x = load_rows(ptr + row * D, 0, rows, count, D, D, BLOCK_D, False)
        return tl.trans(x) if TRANSPOSED else x


@triton.jit
def gather_rows(
    k, v, q_ptr, dout_ptr, state_ptr, block_oldest_ptr, tile, block_lo, block_full, block_hi, keys_seen, M,
    scale_log2, one, gradients,
    q_stride_m: tl.constexpr, dout_stride_m: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_M: tl.constexpr, SKIP: tl.constexpr, TRANSPOSED: tl.constexpr, RECOMPUTE: tl.constexpr, LOG_SPACE: tl.constexpr,
):  # fmt: skip
    """Visit query blocks block_lo to block_hi - 1 of M rows; row m sees the tile's first keys_seen + m keys."""
    dk, dv = gradients
    offsets = key_offsets(BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    for block in range(block_lo, block_hi):
        m_begin = block * BLOCK_M
        q = load_rows(q_ptr, m_begin, rows, M, q_stride_m, D, BLOCK_D, EVEN_M)
        dout = load_rows(dout_ptr, m_begin, rows, M, dout_stride_m, DV, BLOCK_DV, EVEN_M)
        if SKIP:
            visits = tl.load(block_oldest_ptr + block) <= tile
            state = tl.load(state_ptrs(state_ptr, m_begin, rows), mask=visits, other=0.0)
        else:
            state = tl.load(state_ptrs(state_ptr, m_begin, rows))
        stick, older_sum = tl.split(state)
        s = logits(q, k, scale_log2, offsets, keys_seen + m_begin + rows, block < block_full)
        dA = tl.dot(dout, tl.trans(v))  # [BLOCK_M, BLOCK_N]
        start = scan_start(per_lane(stick, BLOCK_M), LOG_SPACE)
        A, e, rest, _ = weights(s, start, BLOCK_M, BLOCK_N, False, LOG_SPACE)
        dv = add_product(dv, from_runs(A, BLOCK_M, BLOCK_N).to(dout.dtype), dout, TRANSPOSED)
        dz, older_sum = logit_gradient(A, e, rest, dA, per_lane(older_sum, BLOCK_M), one, BLOCK_M, BLOCK_N, RECOMPUTE, LOG_SPACE)
        dk = add_product(dk, dz.to(q.dtype), q, TRANSPOSED)
    return dk, dv


@triton.jit
def locate(pid, unit_begin, key_tiles, key_heads):
    """Program number -> pair within the chunk, key tile, batch entry, key head."""
    unit = pid // key_tiles
    b = ((unit_begin + unit) // key_heads).to(tl.int64)
    h = ((unit_begin + unit) % key_heads).to(tl.int64)
    return unit, pid % key_tiles, b, h


@triton.jit
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, cu_seqlens_ptr, dk_ptr, dv_ptr, dk_sum_ptr, dv_sum_ptr,
    state_ptr, block_oldest_ptr,
    scale, scale_log2, one, H, M, N, unit_begin, row_begin, chunk_rows, key_tiles,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h, dout_stride_b, dout_stride_h,
    dk_stride_b, dk_stride_h, dv_stride_b, dv_stride_h,
    q_stride_m: tl.constexpr, k_stride_n: tl.constexpr, v_stride_n: tl.constexpr, dout_stride_m: tl.constexpr,
    dk_stride_n: tl.constexpr, dv_stride_n: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ATTEND_CURRENT: tl.constexpr, VARLEN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN_M: tl.constexpr, FIRST_ROWS: tl.constexpr, LAST_ROWS: tl.constexpr, SKIP: tl.constexpr,
    TRANSPOSED: tl.constexpr, RECOMPUTE: tl.constexpr, LOG_SPACE: tl.constexpr,
):  # fmt: skip
    unit, tile, b, h = locate(tl.program_id(0), unit_begin, key_tiles, H // GROUP)
    token, sequence_M, sequence_N = sequence(cu_seqlens_ptr, b, M, N, VARLEN)
    begin = tile * BLOCK_N
    if begin >= sequence_N:
        return
    keys_left = sequence_N - begin
    batch = 0 if VARLEN else b
    k_ptr = rows_at(k_ptr, batch, k_stride_b, h, k_stride_h, token + begin, k_stride_n, ALIGNED)
    v_ptr = rows_at(v_ptr, batch, v_stride_b, h, v_stride_h, token + begin, v_stride_n, ALIGNED)
    sum_row = unit.to(tl.int64) * N + begin
    offsets = key_offsets(BLOCK_N)
    k = load_rows(k_ptr, 0, offsets, keys_left, k_stride_n, D, BLOCK_D, False)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, 0, offsets, keys_left, v_stride_n, DV, BLOCK_DV, False)  # [BLOCK_N, BLOCK_DV]
    gradients = (
        sum_tile(dk_sum_ptr, sum_row, offsets, keys_left, D, BLOCK_N, BLOCK_D, FIRST_ROWS, TRANSPOSED),
        sum_tile(dv_sum_ptr, sum_row, offsets, keys_left, DV, BLOCK_N, BLOCK_DV, FIRST_ROWS, TRANSPOSED),
    )

    for g in range(GROUP):
        # NOTE: all of this is found again for each head, and after the loop, from the hardware's program number, so that
        # it takes no registers through the inner loop, which spills otherwise at D = 128.
        unit, tile, b, h = locate(program_again(g), unit_begin, key_tiles, H // GROUP)
        token, sequence_M, sequence_N = sequence(cu_seqlens_ptr, b, M, N, VARLEN)
        batch = 0 if VARLEN else b
        head = h * GROUP + g
        chunk_head = (unit * GROUP + g).to(tl.int64)
        # Rows count from the chunk's first. Row m sees the tile's first keys_seen + m keys.
        rows_left = sequence_M - row_begin
        keys_seen = sequence_N - rows_left + (1 if ATTEND_CURRENT else 0) - tile * BLOCK_N
        blocks = tl.cdiv(tl.maximum(tl.minimum(rows_left, chunk_rows), 0), BLOCK_M)
        oldest_ptr = block_oldest_ptr + chunk_head * (chunk_rows // BLOCK_M)
        gradients = gather_rows(
            k, v,
            rows_at(q_ptr, batch, q_stride_b, head, q_stride_h, token + row_begin, q_stride_m, ALIGNED),
            rows_at(dout_ptr, batch, dout_stride_b, head, dout_stride_h, token + row_begin, dout_stride_m, ALIGNED),
            state_ptr + (chunk_head * key_tiles + tile) * chunk_rows * 2, oldest_ptr, tile,
            tl.maximum(1 - keys_seen, 0) // BLOCK_M,
            tl.cdiv(tl.maximum(BLOCK_N - keys_seen, 0), BLOCK_M),
            last_visitor(oldest_ptr, blocks, tile) if SKIP else blocks,
            keys_seen, rows_left, scale_log2, one, gradients, q_stride_m, dout_stride_m,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EVEN_M, SKIP, TRANSPOSED, RECOMPUTE, LOG_SPACE,
        )  # fmt: skip

    unit, tile, b, h = locate(program_again(0), unit_begin, key_tiles, H // GROUP)
    token, sequence_M, sequence_N = sequence(cu_seqlens_ptr, b, M, N, VARLEN)
    batch = 0 if VARLEN else b
    begin = tile * BLOCK_N
    keys_left = sequence_N - begin
    dk, dv = gradients
    if TRANSPOSED:
        dk, dv = tl.trans(dk), tl.trans(dv)
    if LAST_ROWS:
        dk_ptr = rows_at(dk_ptr, batch, dk_stride_b, h, dk_stride_h, token + begin, dk_stride_n, ALIGNED)
        dv_ptr = rows_at(dv_ptr, batch, dv_stride_b, h, dv_stride_h, token + begin, dv_stride_n, ALIGNED)
        store_rows(dk_ptr, dk * scale, offsets, keys_left, dk_stride_n, D, BLOCK_D)
        store_rows(dv_ptr, dv, offsets, keys_left, dv_stride_n, DV, BLOCK_DV)
    else:
        sum_row = unit.to(tl.int64) * N + begin
        store_rows(dk_sum_ptr + sum_row * D, dk, offsets, keys_left, D, D, BLOCK_D)
        store_rows(dv_sum_ptr + sum_row * DV, dv, offsets, keys_left, DV, DV, BLOCK_DV)
