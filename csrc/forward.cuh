// Forward of stick-breaking attention, newest key tile first: equations (1) to (5).
//
//     grid    batch * heads * ceil(M / BLOCK_M): one block per (batch, head, query block), a head's longest blocks first
//     q       [BLOCK_M, D] in shared memory throughout; k, v tiles [BLOCK_N, D or Dv] in STAGES of them, through cp.async
//     warp    16 MT rows by BLOCK_N keys of logits; out [16 MT, Dv] stays in registers
//
// No running maximum and no rescaling, which softmax needs; a row carries its stick (math.cuh) and, for the backward, the oldest
// tile it had stick left on entry of, with that stick.
#pragma once
#include "tile.cuh"

namespace sbk {

template <typename T_, template <int> class Run_, int BLOCK_D_, int BLOCK_DV_, int BLOCK_M_, int BLOCK_N_, int NUM_WARPS_, int NUM_STAGES_>
struct ForwardConfig {
  using T = T_;
  using Run = Run_<BLOCK_N_ / 4>;
  static constexpr int BLOCK_D = BLOCK_D_, BLOCK_DV = BLOCK_DV_, BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static constexpr int THREADS = 32 * NUM_WARPS_, STAGES = NUM_STAGES_;
  static constexpr int MT = BLOCK_M / (16 * NUM_WARPS_), NT = BLOCK_N / 8, RUN = BLOCK_N / 4;
  // Blocks a multiprocessor should hold: 4 need 128 registers a thread, which small tiles can do with.
  static constexpr int BLOCKS = MT == 1 && NT <= 8 && BLOCK_DV <= 64 && THREADS == 128 ? 4 : 1;
  static constexpr int Q_BYTES = tile_bytes<BLOCK_M, BLOCK_D>, K_BYTES = tile_bytes<BLOCK_N, BLOCK_D>;
  static constexpr int STAGE_BYTES = K_BYTES + tile_bytes<BLOCK_N, BLOCK_DV>;
  static constexpr int SHARED_BYTES = Q_BYTES + STAGES * STAGE_BYTES;
  static_assert(MT * 16 * NUM_WARPS_ == BLOCK_M && BLOCK_N % 16 == 0 && STAGES >= 2);
};

// What a lane keeps of one of its rows from tile to tile.
struct ForwardRow {
  float carry;         // on entry of the next older tile
  float oldest_carry;  // on entry of oldest_tile
  int oldest_tile;     // oldest visited tile with stick left on entry
};

// The tile's runs -> weights in s, and on to the next tile.
template <class C>
SBK_FN void weigh(float (&s)[C::MT][C::NT][4], typename C::Run (&runs)[C::MT][2], ForwardRow (&rows)[C::MT][2], int tile, int q) {
  using Run = typename C::Run;
  each_row(runs, q, [](bool yes) { return (bool)__all_sync(ALL_LANES, yes); }, [&](auto path, const auto& scan, int i) {
    using Path = decltype(path);
    ForwardRow& row = rows[i / 2][i % 2];
    Run& run = runs[i / 2][i % 2];
    if (Run::alive(row.carry)) {
      row.oldest_carry = row.carry;
      row.oldest_tile = tile;
    }
    float A[C::RUN];
    Path::weights(run, Path::enter(row.carry, scan.before), scan.total, A);
    put_row(s[i / 2], i % 2, A);
    row.carry = Path::advance(row.carry, scan.total);
  });
}

template <class C> __global__ void __launch_bounds__(C::THREADS, C::BLOCKS) forward_kernel(const __grid_constant__ ForwardParams p) {
  using T = typename C::T;
  using Run = typename C::Run;
  extern __shared__ __align__(16) char shared[];

  // Find this block's rows.
  const Shape& shape = p.shape;
  const int m_blocks = ceil_div(shape.queries, C::BLOCK_M), index = blockIdx.x / m_blocks;
  const int m_begin = (m_blocks - 1 - blockIdx.x % m_blocks) * C::BLOCK_M;
  const Sequence at = sequence_of(shape, index / shape.heads, index % shape.heads);
  if (m_begin >= at.M) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4;
  const int first_end = first_invisible(shape, at, m_begin);
  const int tiles_full = first_end / C::BLOCK_N, tiles_seen = ceil_div(min(first_end + C::BLOCK_M - 1, at.N), C::BLOCK_N);
  const int my_row = warp * 16 * C::MT + lane / 4;

  // Plan shared memory.
  const unsigned q_tile = shared_address(shared), stages = q_tile + C::Q_BYTES;
  const unsigned q_rows = q_tile + warp * 16 * C::MT * tile_stride<C::BLOCK_D> * 2 + lane_offset_rows<C::BLOCK_D>(lane);
  const unsigned k_lane = lane_offset_columns<C::BLOCK_D>(lane), v_lane = C::K_BYTES + lane_offset_rows<C::BLOCK_DV>(lane);
  const T *k = rows_of<T>(p.k, at, shape.group), *v = rows_of<T>(p.v, at, shape.group);
  auto load_stage = [&](int i) {
    const int begin = (tiles_seen - 1 - i) * C::BLOCK_N;
    const unsigned stage = stages + i % C::STAGES * C::STAGE_BYTES;
    if (begin >= 0) {
      load_tile<C::BLOCK_N, C::BLOCK_D, C::THREADS, KeyOrder<C::BLOCK_N>>(stage, k, p.k.stride_row, begin, at.N, shape.head_dim, shape.aligned);
      load_tile<C::BLOCK_N, C::BLOCK_DV, C::THREADS, KeyOrder<C::BLOCK_N>>(
          stage + C::K_BYTES, v, p.v.stride_row, begin, at.N, shape.value_dim, shape.aligned);
    }
    copy_async_commit();
  };

  // Start loading; rows beyond the last query start without a stick, so that they hold nobody up.
  load_tile<C::BLOCK_M, C::BLOCK_D, C::THREADS, NaturalOrder>(
      q_tile, rows_of<T>(p.q, at, 1), p.q.stride_row, m_begin, at.M, shape.head_dim, shape.aligned);
#pragma unroll
  for (int i = 0; i < C::STAGES - 1; i++) load_stage(i);
  float out[C::MT][C::BLOCK_DV / 8][4];
  zero(out);
  ForwardRow rows[C::MT][2];
#pragma unroll
  for (int i = 0; i < C::MT * 2; i++)
    rows[i / 2][i % 2] = {m_begin + my_row + i * 8 < at.M ? Run::WHOLE : Run::NONE, Run::WHOLE, tiles_seen};
  const float scale_log2 = shape.scale * LOG2_E;
  bool alive = true;

#pragma unroll 1
  for (int i = 0; i < tiles_seen; i++) {
    // Wait for tile i, then refill the stage that everyone has left.
    copy_async_wait<C::STAGES - 2>();
    if (!__syncthreads_or(alive)) break;
    load_stage(i + C::STAGES - 1);
    const int tile = tiles_seen - 1 - i;
    const unsigned stage = stages + i % C::STAGES * C::STAGE_BYTES;

    // s = q k^T.
    float s[C::MT][C::NT][4];
    zero(s);
    multiply_rows<T, C::BLOCK_D>(s, q_rows, stage + k_lane);

    // A from s and the stick.
    Run runs[C::MT][2];
    const int visible = first_end + my_row - tile * C::BLOCK_N - q * C::RUN;
    if (tile >= tiles_full)
      absorb<true>(runs, s, scale_log2, visible);
    else
      absorb<false>(runs, s, scale_log2, 0);
    weigh<C>(s, runs, rows, tile, q);
    if (shape.skip_below > 0.f) {
      alive = false;
#pragma unroll
      for (int j = 0; j < C::MT * 2; j++) alive |= Run::stick(rows[j / 2][j % 2].carry) >= shape.skip_below;
    }

    // out += A v.
    unsigned weights[C::MT][C::NT / 2][4];
    to_operand<T>(weights, s);
    multiply_registers<T, C::BLOCK_DV>(out, weights, stage + v_lane);
  }
  copy_async_wait<0>();

  // Store.
  const int rows_left = at.M - m_begin, warp_row = warp * 16 * C::MT;
  store_rows(rows_of<T>(p.out, at, 1) + m_begin * p.out.stride_row, p.out.stride_row, out, shape.value_dim, shape.aligned, lane,
             [&](int row) { return warp_row + row < rows_left ? warp_row + row : -1; });
  const int64 statistic = statistic_of(shape, at) + m_begin;
#pragma unroll
  for (int i = 0; i < C::MT * 2; i++) {
    const int row = my_row + i * 8;
    const ForwardRow& kept = rows[i / 2][i % 2];
    if (q == 0 && row < rows_left) {
      p.remainder[statistic + row] = Run::stick(kept.carry);
      if (p.oldest_carry != nullptr) p.oldest_carry[statistic + row] = kept.oldest_carry;
      if (p.oldest_tile != nullptr) p.oldest_tile[statistic + row] = kept.oldest_tile;
    }
  }
}

}  // namespace sbk
