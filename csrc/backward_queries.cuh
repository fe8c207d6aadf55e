// Backward of stick-breaking attention, first of two kernels: dq, and the state the second one starts from. Equations (8) to (10).
//
//     grid    units * group * chunk_rows / BLOCK_M: one block per (batch, head, query block) of the chunk, longest first
//     q, dout [BLOCK_M, D], [BLOCK_M, Dv] in shared memory throughout; k, v tiles in STAGES of them, through cp.async
//     state   written for every row and every group of KEY_GROUP keys of the tiles visited: the carry on entry of the group, and
//             dr r + the sum of a over the keys older than it
//
// Walks from the oldest visited tile to the newest, against the forward: the inner sum of eq. (9) runs that way. The carry on
// entry of a tile is the next older one's with this tile's total undone, which starts from what the forward kept; a row's newest
// tile starts whole, which ends the drift of the roundings.
#pragma once
#include "tile.cuh"

namespace sbk {

template <typename T_, template <int> class Run_, int BLOCK_D_, int BLOCK_DV_, int BLOCK_M_, int BLOCK_N_, int NUM_WARPS_,
          int NUM_STAGES_, int KEY_GROUP_>
struct QueriesConfig {
  using T = T_;
  using Run = Run_<BLOCK_N_ / 4>;
  static constexpr int BLOCK_D = BLOCK_D_, BLOCK_DV = BLOCK_DV_, BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static constexpr int THREADS = 32 * NUM_WARPS_, STAGES = NUM_STAGES_, KEY_GROUP = KEY_GROUP_;
  static constexpr int MT = BLOCK_M / (16 * NUM_WARPS_), NT = BLOCK_N / 8, RUN = BLOCK_N / 4;
  static constexpr int Q_BYTES = tile_bytes<BLOCK_M, BLOCK_D>, DOUT_BYTES = tile_bytes<BLOCK_M, BLOCK_DV>;
  static constexpr int K_BYTES = tile_bytes<BLOCK_N, BLOCK_D>, STAGE_BYTES = K_BYTES + tile_bytes<BLOCK_N, BLOCK_DV>;
  static constexpr int SHARED_BYTES = Q_BYTES + DOUT_BYTES + STAGES * STAGE_BYTES;
  static constexpr int RUNS_PER_GROUP = KEY_GROUP / RUN;
  static_assert(MT * 16 * NUM_WARPS_ == BLOCK_M && BLOCK_N % 16 == 0 && STAGES >= 2);
  static_assert(RUNS_PER_GROUP * RUN == KEY_GROUP && (RUNS_PER_GROUP == 1 || RUNS_PER_GROUP == 2 || RUNS_PER_GROUP == 4));
};

// What a lane keeps of one of its rows from tile to tile.
struct BackwardRow {
  float carry;      // on entry of the last tile visited, once past oldest_tile
  float older_sum;  // dr r + sum of a over the tiles visited
  int oldest_tile;
};

// The tile's runs and dA = do v^T -> gradients of the logits. `end`: of the lane's first row, the first invisible key in the tile;
// state_carry, state_sum: those of that row and of the group the lane's run belongs to.
template <class C>
SBK_FN void differentiate(float (&dz)[C::MT][C::NT][4], typename C::Run (&runs)[C::MT][2], const float (&dA)[C::MT][C::NT][4],
                          BackwardRow (&rows)[C::MT][2], int end, int tile, int q, float* state_carry, float* state_sum) {
  using Run = typename C::Run;
  each_row(runs, q, [](bool yes) { return (bool)__all_sync(ALL_LANES, yes); }, [&](auto path, const auto& scan, int i) {
    using Path = decltype(path);
    BackwardRow& row = rows[i / 2][i % 2];
    Run& run = runs[i / 2][i % 2];
    if (tile > row.oldest_tile) row.carry = Path::undo(row.carry, scan.total);
    if (end + i * 8 <= C::BLOCK_N) row.carry = Run::WHOLE;
    const float carry = Path::enter(tile < row.oldest_tile ? Run::NONE : row.carry, scan.before);
    float A[C::RUN], a[C::RUN], sum = 0.f;
    Path::weights(run, carry, scan.total, A);
    get_row(a, dA[i / 2], i % 2);
#pragma unroll
    for (int t = 0; t < C::RUN; t++) sum += a[t] *= A[t];
    const auto older = scan_older(sum, q);
    const float before = row.older_sum + older.before;
    row.older_sum += older.total;
    if (q % C::RUNS_PER_GROUP == C::RUNS_PER_GROUP - 1) state_carry[i * 8] = carry;
    if (q % C::RUNS_PER_GROUP == 0) state_sum[i * 8] = before;
    differentiate(run, a, before);
    put_row(dz[i / 2], i % 2, a);
  });
}

template <class C> __global__ void __launch_bounds__(C::THREADS, 1) backward_queries_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  using Run = typename C::Run;
  extern __shared__ __align__(16) char shared[];
  __shared__ int oldest_of_block;

  // Find this block's rows.
  const Shape& shape = p.shape;
  const int blocks = p.chunk_rows / C::BLOCK_M, chunk_head = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;
  const int index = p.unit_begin * shape.group + chunk_head, m_begin = p.row_begin + block * C::BLOCK_M;
  const Sequence at = sequence_of(shape, index / shape.heads, index % shape.heads);
  if (m_begin >= at.M) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4;
  const int first_end = first_invisible(shape, at, m_begin), my_row = warp * 16 * C::MT + lane / 4;
  const int tiles_full = first_end / C::BLOCK_N, tiles_seen = ceil_div(min(first_end + C::BLOCK_M - 1, at.N), C::BLOCK_N);

  // Fetch the rows' statistics; those beyond the last query have no stick and no sum.
  BackwardRow rows[C::MT][2];
  const int64 statistic = statistic_of(shape, at) + m_begin;
  int oldest = tiles_seen;
#pragma unroll
  for (int i = 0; i < C::MT * 2; i++) {
    const int row = my_row + i * 8;
    const bool exists = m_begin + row < at.M;
    BackwardRow& kept = rows[i / 2][i % 2];
    kept.oldest_tile = exists ? p.oldest_tile[statistic + row] : tiles_seen;
    kept.carry = exists ? p.oldest_carry[statistic + row] : Run::NONE;
    kept.older_sum = exists ? p.remainder[statistic + row] * p.dremainder[statistic + row] : 0.f;
    oldest = min(oldest, kept.oldest_tile);
  }
  if (threadIdx.x == 0) oldest_of_block = tiles_seen;
  __syncthreads();
  atomicMin(&oldest_of_block, oldest);
  __syncthreads();
  const int tile_lo = oldest_of_block;
  if (threadIdx.x == 0) p.block_oldest[chunk_head * blocks + block] = tile_lo * C::BLOCK_N;

  // Plan shared memory and start loading.
  const unsigned q_tile = shared_address(shared), dout_tile = q_tile + C::Q_BYTES, stages = dout_tile + C::DOUT_BYTES;
  const unsigned q_rows = q_tile + warp * 16 * C::MT * tile_stride<C::BLOCK_D> * 2 + lane_offset_rows<C::BLOCK_D>(lane);
  const unsigned dout_rows = dout_tile + warp * 16 * C::MT * tile_stride<C::BLOCK_DV> * 2 + lane_offset_rows<C::BLOCK_DV>(lane);
  const T *k = rows_of<T>(p.k, at, shape.group), *v = rows_of<T>(p.v, at, shape.group);
  auto load_stage = [&](int tile) {
    const unsigned stage = stages + tile % C::STAGES * C::STAGE_BYTES;
    if (tile < tiles_seen) {
      load_tile<C::BLOCK_N, C::BLOCK_D, C::THREADS, KeyOrder<C::BLOCK_N>>(
          stage, k, p.k.stride_row, tile * C::BLOCK_N, at.N, shape.head_dim, shape.aligned);
      load_tile<C::BLOCK_N, C::BLOCK_DV, C::THREADS, KeyOrder<C::BLOCK_N>>(
          stage + C::K_BYTES, v, p.v.stride_row, tile * C::BLOCK_N, at.N, shape.value_dim, shape.aligned);
    }
    copy_async_commit();
  };
  load_tile<C::BLOCK_M, C::BLOCK_D, C::THREADS, NaturalOrder>(
      q_tile, rows_of<T>(p.q, at, 1), p.q.stride_row, m_begin, at.M, shape.head_dim, shape.aligned);
  load_tile<C::BLOCK_M, C::BLOCK_DV, C::THREADS, NaturalOrder>(
      dout_tile, rows_of<T>(p.dout, at, 1), p.dout.stride_row, m_begin, at.M, shape.value_dim, shape.aligned);
#pragma unroll
  for (int i = 0; i < C::STAGES - 1; i++) load_stage(tile_lo + i);
  float dq[C::MT][C::BLOCK_D / 8][4];
  zero(dq);
  const float scale_log2 = shape.scale * LOG2_E;
  const int64 state_row = (int64)chunk_head * p.key_groups * p.chunk_rows + block * C::BLOCK_M + my_row;

#pragma unroll 1
  for (int tile = tile_lo; tile < tiles_seen; tile++) {
    // Wait for the tile, then refill the stage that everyone has left.
    copy_async_wait<C::STAGES - 2>();
    __syncthreads();
    load_stage(tile + C::STAGES - 1);
    const unsigned stage = stages + tile % C::STAGES * C::STAGE_BYTES;

    // s = q k^T, dA = dout v^T.
    float s[C::MT][C::NT][4], dA[C::MT][C::NT][4];
    zero(s);
    multiply_rows<T, C::BLOCK_D>(s, q_rows, stage + lane_offset_columns<C::BLOCK_D>(lane));
    zero(dA);
    multiply_rows<T, C::BLOCK_DV>(dA, dout_rows, stage + C::K_BYTES + lane_offset_columns<C::BLOCK_DV>(lane));

    // dz from both, in place of s.
    Run runs[C::MT][2];
    const int end = first_end + my_row - tile * C::BLOCK_N, run_begin = tile * C::BLOCK_N + q * C::RUN;
    if (tile >= tiles_full)
      absorb<true>(runs, s, scale_log2, end - q * C::RUN);
    else
      absorb<false>(runs, s, scale_log2, 0);
    const int64 state = state_row + (int64)(run_begin / C::KEY_GROUP) * p.chunk_rows;
    differentiate<C>(s, runs, dA, rows, end, tile, q, p.state_carry + state, p.state_sum + state);

    // dq += dz k.
    unsigned dz[C::MT][C::NT / 2][4];
    to_operand<T>(dz, s);
    multiply_registers<T, C::BLOCK_D>(dq, dz, stage + lane_offset_rows<C::BLOCK_D>(lane));
  }
  copy_async_wait<0>();

  // Store.
#pragma unroll
  for (int i = 0; i < C::MT * (C::BLOCK_D / 8) * 4; i++) (&dq[0][0][0])[i] *= shape.scale;
  const int rows_left = at.M - m_begin, warp_row = warp * 16 * C::MT;
  store_rows(rows_of<T>(p.dq, at, 1) + m_begin * p.dq.stride_row, p.dq.stride_row, dq, shape.head_dim, shape.aligned, lane,
             [&](int row) { return warp_row + row < rows_left ? warp_row + row : -1; });
}

}  // namespace sbk
