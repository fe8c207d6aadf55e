"""Forward of stick-breaking attention, newest key tile first: equations (1) to (5).

    grid   [B * H * ceil(max M / BLOCK_M)]: one program per (batch, head, query block), a head's longest blocks first
    q      [B, H, M, D]    k [B, H / GROUP, N, D]    v [B, H / GROUP, N, DV]    out [B, H, M, DV]    any strides, last one 1
    stats  [B, H, M]: remainder r (eq. 5), oldest_tile and log2_oldest (index of the oldest visited key tile in which the
           row still had stick left, and log2 of that stick on entry): what the backward's walk starts from
    VARLEN: cu_seqlens [B + 1] cuts one token dimension; tensors are [1, H, T, ...] views and M = N per sequence

With SKIP the tiles go by in stretches, each as long as all before it and the first SKIP_FIRST tiles long, and end once every
row's stick is below skip_below: a look at the sticks ends the software pipeline, which costs a third at every fourth tile.
"""

import triton
import triton.language as tl

from .step import MIN_STICK, exp2, from_runs, key_offsets, per_lane, per_row, scan_start, spent_log2, weights
from .tiles import load_rows, logits, rows_at, sequence, store_rows


@triton.jit
def attend_tiles(
    q, k_ptr, v_ptr, tile_hi, tile_lo, tiles_full, row_end, N, scale_log2, state,
    k_stride_n: tl.constexpr, v_stride_n: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_N: tl.constexpr, LOG_SPACE: tl.constexpr,
):  # fmt: skip
    """Visit key tiles tile_hi - 1 down to tile_lo; row_end [BLOCK_M] is each row's first invisible key."""
    acc, stick, log2_stick, oldest_tile, log2_oldest = state
    offsets = key_offsets(BLOCK_N)
    for i in range(0, tile_hi - tile_lo):
        tile = tile_hi - 1 - i
        begin = tile * BLOCK_N
        k = load_rows(k_ptr, begin, offsets, N, k_stride_n, D, BLOCK_D, EVEN_N)
        v = load_rows(v_ptr, begin, offsets, N, v_stride_n, DV, BLOCK_DV, EVEN_N)
        s = logits(q, k, scale_log2, offsets, row_end - begin, tile >= tiles_full)
        oldest_tile = tl.where(stick > 0.0, tile, oldest_tile)
        log2_oldest = tl.where(stick > 0.0, log2_stick, log2_oldest)
        A, _, _, total = weights(s, scan_start(stick, LOG_SPACE), BLOCK_M, BLOCK_N, False, LOG_SPACE)
        log2_stick += spent_log2(total, LOG_SPACE)
        stick = exp2(log2_stick) if LOG_SPACE else stick * total
        stick = tl.where(stick < MIN_STICK, 0.0, stick)
        acc = tl.dot(from_runs(A, BLOCK_M, BLOCK_N).to(v.dtype), v, acc)
    return acc, stick, log2_stick, oldest_tile, log2_oldest


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, remainder_ptr, oldest_tile_ptr, log2_oldest_ptr, cu_seqlens_ptr,
    scale_log2, skip_below, H, M, N,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h, out_stride_b, out_stride_h,
    stat_stride_b, stat_stride_h,
    q_stride_m: tl.constexpr, k_stride_n: tl.constexpr, v_stride_n: tl.constexpr, out_stride_m: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ATTEND_CURRENT: tl.constexpr, VARLEN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN_N: tl.constexpr, SKIP: tl.constexpr, SKIP_FIRST: tl.constexpr, LOG_SPACE: tl.constexpr,
):  # fmt: skip
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    m_block = m_blocks - 1 - pid % m_blocks
    b = (pid // m_blocks // H).to(tl.int64)
    h = (pid // m_blocks % H).to(tl.int64)
    token, M, N = sequence(cu_seqlens_ptr, b, M, N, VARLEN)
    m_begin = m_block * BLOCK_M
    if m_begin >= M:
        return
    batch = 0 if VARLEN else b
    q_ptr = rows_at(q_ptr, batch, q_stride_b, h, q_stride_h, token + m_begin, q_stride_m, ALIGNED)
    k_ptr = rows_at(k_ptr, batch, k_stride_b, h // GROUP, k_stride_h, token, k_stride_n, ALIGNED)
    v_ptr = rows_at(v_ptr, batch, v_stride_b, h // GROUP, v_stride_h, token, v_stride_n, ALIGNED)
    out_ptr = rows_at(out_ptr, batch, out_stride_b, h, out_stride_h, token + m_begin, out_stride_m, ALIGNED)
    stat = batch * stat_stride_b + h * stat_stride_h + token + m_begin

    rows = tl.arange(0, BLOCK_M)
    rows_left = M - m_begin
    q = load_rows(q_ptr, 0, rows, rows_left, q_stride_m, D, BLOCK_D, False)  # [BLOCK_M, BLOCK_D]
    first_end = N - M + m_begin + (1 if ATTEND_CURRENT else 0)  # the block's first row sees keys [0, first_end)
    row_end = first_end + rows
    tiles_full = first_end // BLOCK_N
    tiles_seen = tl.cdiv(tl.minimum(first_end + BLOCK_M - 1, N), BLOCK_N)

    # Rows beyond M start with no stick left, so that they hold nobody up.
    state = (
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        per_lane(tl.where(rows < rows_left, 1.0, 0.0), BLOCK_M),
        tl.zeros([BLOCK_M, 2, 2], tl.float32),
        tl.zeros([BLOCK_M, 2, 2], tl.int32) + tiles_seen,
        tl.zeros([BLOCK_M, 2, 2], tl.float32),
    )
    if SKIP:
        tiles_left = tiles_seen
        while (tiles_left > 0) & (tl.max(state[1]) >= skip_below):
            stretch_end = tl.maximum(tiles_left - tl.maximum(tiles_seen - tiles_left, SKIP_FIRST), 0)
            state = attend_tiles(
                q, k_ptr, v_ptr, tiles_left, stretch_end, tiles_full, row_end, N, scale_log2, state, k_stride_n, v_stride_n,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EVEN_N, LOG_SPACE,
            )  # fmt: skip
            tiles_left = stretch_end
    else:
        state = attend_tiles(
            q, k_ptr, v_ptr, tiles_seen, 0, tiles_full, row_end, N, scale_log2, state, k_stride_n, v_stride_n,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EVEN_N, LOG_SPACE,
        )  # fmt: skip
    acc, stick, _, oldest_tile, log2_oldest = state

    store_rows(out_ptr, acc, rows, rows_left, out_stride_m, DV, BLOCK_DV)
    in_range = rows < rows_left
    tl.store(remainder_ptr + stat + rows, per_row(stick), mask=in_range)
    tl.store(oldest_tile_ptr + stat + rows, per_row(oldest_tile), mask=in_range)
    tl.store(log2_oldest_ptr + stat + rows, per_row(log2_oldest), mask=in_range)
