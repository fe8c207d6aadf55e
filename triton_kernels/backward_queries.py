"""Backward of stick-breaking attention, first of two kernels: dq, and the state the second one needs. Equations (8) to (10).

    grid    [heads of the chunk * query blocks of the chunk]: one program per (batch, head, query block)
    q, dout, dq      [B, H, M, D or DV]      k, v      [B, H / GROUP, N, D or DV]      any strides, last one 1
    stats   [B, H, M]: remainder, oldest_tile, log2_oldest from the forward, dremainder from the caller
    state   [heads of the chunk, key tiles, rows of the chunk, 2] float32: for each row, on entry of each key tile, its stick and
            dr r + sum of a over the older tiles
    block_oldest     [heads of the chunk, query blocks of the chunk]: the oldest key tile the block visits

Walks from the oldest visited key tile to the newest, against the forward: the inner sum of eq. (9) runs that way, and the stick
follows from the log2 the forward saved. A chunk is UNITS (batch, key head) pairs times chunk_rows query rows of each, a
multiple of BLOCK_M; rows beyond the last query have no stick and no sum.
"""

import triton
import triton.language as tl

from .step import chain_entry, key_offsets, logit_gradient, per_lane, weights
from .tiles import load_rows, logits, program_again, rows_at, sequence, side_by_side, state_ptrs, store_rows, wide


@triton.jit
def gather_tiles(
    q, dout, k_ptr, v_ptr, state_ptr, tile_lo, tiles_full, tile_hi, row_end, N, scale_log2, oldest_tile, carried,
    chunk_rows, k_stride_n: tl.constexpr, v_stride_n: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_N: tl.constexpr, LOG_SPACE: tl.constexpr,
):  # fmt: skip
    """Visit key tiles tile_lo to tile_hi - 1; row_end [BLOCK_M] is each row's first invisible key."""
    dq, log2_stick, older_sum = carried
    offsets = key_offsets(BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    lane_end = per_lane(row_end, BLOCK_M)
    for tile in range(tile_lo, tile_hi):
        begin = tile * BLOCK_N
        k = load_rows(k_ptr, begin, offsets, N, k_stride_n, D, BLOCK_D, EVEN_N)
        v = load_rows(v_ptr, begin, offsets, N, v_stride_n, DV, BLOCK_DV, EVEN_N)
        s = logits(q, k, scale_log2, offsets, row_end - begin, tile >= tiles_full)
        chain = (log2_stick, tile - oldest_tile, begin + BLOCK_N >= lane_end)
        A, e, rest, total = weights(s, chain, BLOCK_M, BLOCK_N, True, LOG_SPACE)
        log2_stick, stick = chain_entry(total, chain, LOG_SPACE)
        tl.store(state_ptrs(state_ptr, wide(tile) * chunk_rows, rows), side_by_side(stick, older_sum))
        dA = tl.dot(dout, tl.trans(v))  # [BLOCK_M, BLOCK_N]
        dz, older_sum = logit_gradient(A, e, rest, dA, older_sum, 1.0, BLOCK_M, BLOCK_N, False, LOG_SPACE)
        dq = tl.dot(dz.to(k.dtype), k, dq)
    return dq, log2_stick, older_sum


@triton.jit
def locate(pid, unit_begin, row_begin, chunk_blocks, H, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Program number -> head within the chunk, query block within the chunk, first query row, batch entry, head."""
    chunk_head = pid // chunk_blocks
    chunk_block = chunk_blocks - 1 - pid % chunk_blocks
    head = unit_begin * GROUP + chunk_head
    return chunk_head, chunk_block, row_begin + chunk_block * BLOCK_M, (head // H).to(tl.int64), (head % H).to(tl.int64)


@triton.jit
def backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dremainder_ptr, remainder_ptr, oldest_tile_ptr, log2_oldest_ptr, cu_seqlens_ptr,
    dq_ptr, state_ptr, block_oldest_ptr,
    scale, scale_log2, H, M, N, unit_begin, row_begin, chunk_rows, key_tiles,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h, dout_stride_b, dout_stride_h,
    dq_stride_b, dq_stride_h, stat_stride_b, stat_stride_h,
    q_stride_m: tl.constexpr, k_stride_n: tl.constexpr, v_stride_n: tl.constexpr, dout_stride_m: tl.constexpr,
    dq_stride_m: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ATTEND_CURRENT: tl.constexpr, VARLEN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN_N: tl.constexpr, SKIP: tl.constexpr, LOG_SPACE: tl.constexpr,
):  # fmt: skip
    blocks = chunk_rows // BLOCK_M
    chunk_head, chunk_block, m_begin, b, h = locate(tl.program_id(0), unit_begin, row_begin, blocks, H, GROUP, BLOCK_M)
    token, M, N = sequence(cu_seqlens_ptr, b, M, N, VARLEN)
    if m_begin >= M:
        return
    batch = 0 if VARLEN else b
    q_ptr = rows_at(q_ptr, batch, q_stride_b, h, q_stride_h, token + m_begin, q_stride_m, ALIGNED)
    k_ptr = rows_at(k_ptr, batch, k_stride_b, h // GROUP, k_stride_h, token, k_stride_n, ALIGNED)
    v_ptr = rows_at(v_ptr, batch, v_stride_b, h // GROUP, v_stride_h, token, v_stride_n, ALIGNED)
    dout_ptr = rows_at(dout_ptr, batch, dout_stride_b, h, dout_stride_h, token + m_begin, dout_stride_m, ALIGNED)
    stat = batch * stat_stride_b + h * stat_stride_h + token + m_begin
    state_ptr += (chunk_head.to(tl.int64) * key_tiles * chunk_rows + chunk_block * BLOCK_M) * 2

    rows = tl.arange(0, BLOCK_M)
    rows_left = M - m_begin
    in_range = rows < rows_left
    q = load_rows(q_ptr, 0, rows, rows_left, q_stride_m, D, BLOCK_D, False)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, 0, rows, rows_left, dout_stride_m, DV, BLOCK_DV, False)  # [BLOCK_M, BLOCK_DV]
    first_end = N - M + m_begin + (1 if ATTEND_CURRENT else 0)  # the block's first row sees keys [0, first_end)
    row_end = first_end + rows
    tiles_full = first_end // BLOCK_N
    tiles_seen = tl.cdiv(tl.minimum(first_end + BLOCK_M - 1, N), BLOCK_N)

    oldest_tile = tl.load(oldest_tile_ptr + stat + rows, mask=in_range, other=tiles_seen)
    log2_oldest = tl.load(log2_oldest_ptr + stat + rows, mask=in_range, other=0.0)
    remainder = tl.load(remainder_ptr + stat + rows, mask=in_range, other=0.0)
    dremainder = tl.load(dremainder_ptr + stat + rows, mask=in_range, other=0.0)
    tile_lo = tl.min(oldest_tile, 0) if SKIP else 0
    tl.store(block_oldest_ptr + chunk_head * blocks + chunk_block, tile_lo)
    oldest_tile = per_lane(oldest_tile, BLOCK_M)
    carried = (
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        per_lane(log2_oldest, BLOCK_M),
        per_lane(dremainder * remainder, BLOCK_M),
    )
    carried = gather_tiles(
        q, dout, k_ptr, v_ptr, state_ptr, tile_lo, tiles_full, tiles_seen, row_end, N, scale_log2,
        oldest_tile, carried, chunk_rows, k_stride_n, v_stride_n,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EVEN_N, LOG_SPACE,
    )  # fmt: skip

    # NOTE: found again, from numbers the compiler cannot trace, so that none of it takes registers through the loop.
    blocks = wide(chunk_rows).to(tl.int32) // BLOCK_M
    chunk_head, chunk_block, m_begin, b, h = locate(program_again(0), unit_begin, row_begin, blocks, H, GROUP, BLOCK_M)
    batch = 0 if VARLEN else b
    dq_ptr = rows_at(dq_ptr, batch, dq_stride_b, h, dq_stride_h, token + m_begin, dq_stride_m, ALIGNED)
    store_rows(dq_ptr, carried[0] * scale, rows, M - m_begin, dq_stride_m, D, BLOCK_D)
