// Backward of stick-breaking attention, second of two kernels: dk and dv. Equations (8) to (10).
//
//     grid    units * ceil(N / BLOCK_N) * SPLIT: one block per (batch, key head), tile of BLOCK_N keys and part of the columns of
//             dk and dv, over all query heads of the group and all query blocks of the chunk that visit the tile
//     warp    its own group of KEY_GROUP keys against all query rows: k, v of the group as operands in registers (or shared
//             memory, where those do not hold them), dk, dv of the group as accumulators
//     q, dout [BLOCK_M, D], [BLOCK_M, Dv] with the rows' state, in STAGES of shared memory, through cp.async
//
// The state that backward_queries.cuh left is one per row and group of keys, so warps need nothing of each other: no barrier but
// the one for the loads. A warp transposes its weights and gradients of logits in registers, with movmatrix. No two blocks write
// the same place, and sums run in a fixed order.
#pragma once
#include "tile.cuh"

namespace sbk {

template <typename T_, template <int> class Run_, int BLOCK_D_, int BLOCK_DV_, int BLOCK_M_, int MT_, int NUM_WARPS_, int NUM_STAGES_,
          int KEY_GROUP_, int SPLIT_>
struct KeysConfig {
  using T = T_;
  using Run = Run_<KEY_GROUP_ / 4>;
  static constexpr int BLOCK_D = BLOCK_D_, BLOCK_DV = BLOCK_DV_, BLOCK_M = BLOCK_M_, KEY_GROUP = KEY_GROUP_;
  static constexpr int WARPS = NUM_WARPS_, THREADS = 32 * WARPS, STAGES = NUM_STAGES_, SPLIT = SPLIT_;
  static constexpr int BLOCK_N = WARPS * KEY_GROUP, RUN = KEY_GROUP / 4;
  static constexpr int MT = MT_, NT = KEY_GROUP / 8, KT = KEY_GROUP / 16;  // row blocks at a time; column, row blocks of a group
  static constexpr int COLUMNS_D = BLOCK_D / SPLIT, COLUMNS_DV = BLOCK_DV / SPLIT;
  // What the registers hold beside dk and dv: k and v of the group, k alone, or neither.
  static constexpr bool KEEP_K = SPLIT == 1, KEEP_V = KEEP_K && BLOCK_DV <= 64;
  static constexpr int K_BYTES = tile_bytes<BLOCK_N, BLOCK_D>, KEYS_BYTES = K_BYTES + tile_bytes<BLOCK_N, BLOCK_DV>;
  static constexpr int Q_BYTES = tile_bytes<BLOCK_M, BLOCK_D>, DOUT_BYTES = tile_bytes<BLOCK_M, BLOCK_DV>;
  static constexpr int STATE_BYTES = WARPS * BLOCK_M * 4;  // one of carry and sum
  static constexpr int STAGE_BYTES = Q_BYTES + DOUT_BYTES + 2 * STATE_BYTES + 16;
  static constexpr int STAGES_BYTES = STAGES * STAGE_BYTES;
  // v, k, and the stages, which reuse the memory of what registers hold.
  static constexpr int V_BYTES = KEYS_BYTES - K_BYTES, STAGES_AT = KEEP_V ? 0 : KEEP_K ? V_BYTES : KEYS_BYTES;
  static constexpr int SHARED_BYTES = STAGES_AT + STAGES_BYTES > KEYS_BYTES ? STAGES_AT + STAGES_BYTES : KEYS_BYTES;
  static_assert(BLOCK_M % (16 * MT) == 0 && KEY_GROUP % 16 == 0 && STAGES >= 2);
};

// The group's rows of a key-side tile as operand b: in registers, loaded once, or from shared memory each time.
template <class C, int WIDTH, bool KEEP> struct KeyRows {
  unsigned kept[KEEP ? C::KT : 1][KEEP ? WIDTH / 16 : 1][4];
  unsigned address;

  SBK_FN void take(unsigned tile) {
    address = tile;
    if constexpr (KEEP) {
#pragma unroll
      for (int i = 0; i < C::KT * (WIDTH / 16); i++)
        load_matrices<false>(kept[i / (WIDTH / 16)][i % (WIDTH / 16)], address_of(i / (WIDTH / 16), i % (WIDTH / 16)));
    }
  }
  SBK_FN unsigned address_of(int n, int k) const { return address + (n * 16 * tile_stride<WIDTH> + k * 16) * 2; }

  // acc [16 MT, KEY_GROUP] += a rows^T, a the tile rows from its address on.
  template <int MT> SBK_FN void multiply(float (&acc)[MT][C::NT][4], unsigned a) const {
    multiply_rows<typename C::T, WIDTH>(acc, a, [&](unsigned (&columns)[4], int n, int k) {
      if constexpr (!KEEP) load_matrices<false>(columns, address_of(n, k));
#pragma unroll
      for (int i = 0; i < 4; i++)
        if constexpr (KEEP) columns[i] = kept[n][k][i];
    });
  }
};

// Accumulator [16 MT, KEY_GROUP] -> its transpose as operand a [KT][MT], rounded to T.
template <typename T, int MT, int NT> SBK_FN void to_transposed_operand(unsigned (&p)[NT / 2][MT][4], const float (&acc)[MT][NT][4]) {
#pragma unroll
  for (int i = 0; i < NT / 2 * MT * 4; i++) {
    const int n = i / 4 / MT, mt = i / 4 % MT, part = i % 4;  // parts: rows of keys (first 8, second 8), twice for queries + 8
    const float* x = &acc[mt][2 * n + part % 2][part / 2 * 2];
    p[n][mt][part] = transpose_matrix(pack<T>(x[0], x[1]));
  }
}

// Runs and dA of rows against the group -> weights in place of dA, gradients of the logits in dz.
template <class C>
SBK_FN void weigh_and_differentiate(float (&dz)[C::MT][C::NT][4], typename C::Run (&runs)[C::MT][2], float (&dA)[C::MT][C::NT][4],
                                    unsigned state, int q) {
  each_row(runs, q, [](bool yes) { return (bool)__all_sync(ALL_LANES, yes); }, [&](auto path, const auto& scan, int i) {
    using Path = decltype(path);
    typename C::Run& run = runs[i / 2][i % 2];
    float A[C::RUN], a[C::RUN], sum = 0.f;
    Path::weights(run, Path::enter(load_shared(state + i * 32), scan.before), scan.total, A);
    get_row(a, dA[i / 2], i % 2);
    put_row(dA[i / 2], i % 2, A);
#pragma unroll
    for (int t = 0; t < C::RUN; t++) sum += a[t] *= A[t];
    differentiate(run, a, load_shared(state + i * 32 + C::STATE_BYTES) + scan_older(sum, q).before);
    put_row(dz[i / 2], i % 2, a);
  });
}

// Sums of this block [KEY_GROUP, WIDTH / SPLIT] -> the gradient, or its sum over chunks of rows, or from that to the gradient.
template <class C, int NT>
SBK_FN void finish(float (&acc)[C::KT][NT][4], const Tensor& gradient, float* sums, const BackwardParams& p, const Sequence& at,
                   int unit, int group_begin, int column, int width, float scale, int lane) {
  using T = typename C::T;
  if (sums != nullptr) {
#pragma unroll
    for (int i = 0; i < C::KT * NT * 2; i++) {
      const int kt = i / (NT * 2), j = i / 2 % NT, h = i % 2;
      const int key = group_begin + KeyOrder<C::KEY_GROUP>::offset(kt * 16 + h * 8 + lane / 4), first = column + 8 * j + lane % 4 * 2;
#pragma unroll
      for (int b = 0; b < 2; b++) {
        if (key < at.N && first + b < width) {
          float* sum = sums + ((int64)unit * p.shape.keys + key) * width + first + b;
          float& x = acc[kt][j][2 * h + b];
          if (!p.first_rows) x += *sum;
          if (!p.last_rows) *sum = x;
        }
      }
    }
  }
  if (!p.last_rows) return;
#pragma unroll
  for (int i = 0; i < C::KT * NT * 4; i++) (&acc[0][0][0])[i] *= scale;
  store_rows(rows_of<T>(gradient, at, p.shape.group) + column, gradient.stride_row, acc, width - column, p.shape.aligned, lane, [&](int row) {
    const int key = group_begin + KeyOrder<C::KEY_GROUP>::offset(row);
    return key < at.N ? key : -1;
  });
}

template <class C> __global__ void __launch_bounds__(C::THREADS, 1) backward_keys_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  extern __shared__ __align__(16) char shared[];
  __shared__ int last_block;

  // Find this block's keys.
  const Shape& shape = p.shape;
  const int tiles = ceil_div(shape.keys, C::BLOCK_N), split = blockIdx.x % C::SPLIT;
  const int chunk_unit = blockIdx.x / C::SPLIT / tiles, unit = p.unit_begin + chunk_unit;
  const int n_begin = blockIdx.x / C::SPLIT % tiles * C::BLOCK_N, kv_heads = shape.heads / shape.group;
  Sequence at = sequence_of(shape, unit / kv_heads, unit % kv_heads * shape.group);
  if (n_begin >= at.N) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4;
  const int group_begin = n_begin + warp * C::KEY_GROUP;

  // Take the keys.
  const unsigned v_tile = shared_address(shared), k_tile = v_tile + C::V_BYTES, stages = v_tile + C::STAGES_AT;
  load_tile<C::BLOCK_N, C::BLOCK_D, C::THREADS, KeyOrder<C::KEY_GROUP>, C::KEY_GROUP>(
      k_tile, rows_of<T>(p.k, at, shape.group), p.k.stride_row, n_begin, at.N, shape.head_dim, shape.aligned);
  load_tile<C::BLOCK_N, C::BLOCK_DV, C::THREADS, KeyOrder<C::KEY_GROUP>, C::KEY_GROUP>(
      v_tile, rows_of<T>(p.v, at, shape.group), p.v.stride_row, n_begin, at.N, shape.value_dim, shape.aligned);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  KeyRows<C, C::BLOCK_D, C::KEEP_K> k;
  KeyRows<C, C::BLOCK_DV, C::KEEP_V> v;
  k.take(k_tile + warp * C::KEY_GROUP * tile_stride<C::BLOCK_D> * 2 + lane_offset_columns<C::BLOCK_D>(lane));
  v.take(v_tile + warp * C::KEY_GROUP * tile_stride<C::BLOCK_DV> * 2 + lane_offset_columns<C::BLOCK_DV>(lane));
  __syncthreads();

  float dk[C::KT][C::COLUMNS_D / 8][4], dv[C::KT][C::COLUMNS_DV / 8][4];
  zero(dk);
  zero(dv);
  const float scale_log2 = shape.scale * LOG2_E;
  const int rows_end = min(at.M - p.row_begin, p.chunk_rows);  // of the chunk's rows, those the sequence has
  const int first_row = max(n_begin - (at.N - at.M) - shape.attend_current + 1, 0) - p.row_begin;
  const int block_first = max(first_row, 0) / C::BLOCK_M;

#pragma unroll 1
  for (int member = 0; member < shape.group; member++) {
    at.head = unit % kv_heads * shape.group + member;
    const int chunk_head = chunk_unit * shape.group + member;

    // Find the last block of queries that visits this tile.
    const int oldest_at = chunk_head * (p.chunk_rows / p.rows_per_oldest);
    if (threadIdx.x == 0) last_block = -1;
    __syncthreads();
    for (int i = threadIdx.x; i * p.rows_per_oldest < rows_end; i += C::THREADS)
      if (p.block_oldest[oldest_at + i] < n_begin + C::BLOCK_N) atomicMax(&last_block, (min((i + 1) * p.rows_per_oldest, rows_end) - 1) / C::BLOCK_M);
    __syncthreads();
    const int block_last = last_block;

    auto load_stage = [&](int block) {
      const unsigned stage = stages + block % C::STAGES * C::STAGE_BYTES;
      if (block <= block_last) {
        const int begin = p.row_begin + block * C::BLOCK_M;
        load_tile<C::BLOCK_M, C::BLOCK_D, C::THREADS, NaturalOrder>(stage, rows_of<T>(p.q, at, 1), p.q.stride_row, begin, at.M, shape.head_dim, shape.aligned);
        load_tile<C::BLOCK_M, C::BLOCK_DV, C::THREADS, NaturalOrder>(
            stage + C::Q_BYTES, rows_of<T>(p.dout, at, 1), p.dout.stride_row, begin, at.M, shape.value_dim, shape.aligned);
        const unsigned state = stage + C::Q_BYTES + C::DOUT_BYTES;
        constexpr int PIECES = C::BLOCK_M / 4;  // 16 bytes each, of one group's carries or sums
        for (int i = threadIdx.x; i < 2 * C::WARPS * PIECES; i += C::THREADS) {
          const int group = n_begin / C::KEY_GROUP + i / PIECES % C::WARPS;
          const float* from = i < C::WARPS * PIECES ? p.state_carry : p.state_sum;
          from += (int64)(chunk_head * p.key_groups + group) * p.chunk_rows + block * C::BLOCK_M + i % PIECES * 4;
          copy_async_16(state + i * 16, from, 16);
        }
        if (threadIdx.x == 0) copy_async_4(state + 2 * C::STATE_BYTES, p.block_oldest + oldest_at + block * C::BLOCK_M / p.rows_per_oldest, 4);
      }
      copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < C::STAGES - 1; i++) load_stage(block_first + i);

#pragma unroll 1
    for (int block = block_first; block <= block_last; block++) {
      // Wait for the rows, then refill the stage that everyone has left.
      copy_async_wait<C::STAGES - 2>();
      __syncthreads();
      load_stage(block + C::STAGES - 1);
      const unsigned stage = stages + block % C::STAGES * C::STAGE_BYTES, dout_tile = stage + C::Q_BYTES, state = dout_tile + C::DOUT_BYTES;
      if (load_shared_int(state + 2 * C::STATE_BYTES) > group_begin) continue;

#pragma unroll 1
      for (int row = 0; row < C::BLOCK_M; row += 16 * C::MT) {
        const int first_end = first_invisible(shape, at, p.row_begin + block * C::BLOCK_M + row);
        if (group_begin >= first_end + 16 * C::MT - 1) continue;
        const unsigned q_from = stage + row * tile_stride<C::BLOCK_D> * 2, dout_from = dout_tile + row * tile_stride<C::BLOCK_DV> * 2;

        // s = q k^T, dA = dout v^T.
        float s[C::MT][C::NT][4], dA[C::MT][C::NT][4];
        zero(s);
        k.multiply(s, q_from + lane_offset_rows<C::BLOCK_D>(lane));
        zero(dA);
        v.multiply(dA, dout_from + lane_offset_rows<C::BLOCK_DV>(lane));

        // A and dz from both.
        const unsigned state_at = state + (warp * C::BLOCK_M + row + lane / 4) * 4;
        const int visible = first_end + lane / 4 - group_begin - q * C::RUN;
        typename C::Run runs[C::MT][2];
        if (group_begin + C::KEY_GROUP > first_end)
          absorb<true>(runs, s, scale_log2, visible);
        else
          absorb<false>(runs, s, scale_log2, 0);
        weigh_and_differentiate<C>(s, runs, dA, state_at, q);

        // dv += A^T dout, dk += dz^T q.
        unsigned transposed[C::KT][C::MT][4];
        to_transposed_operand<T>(transposed, dA);
        multiply_registers<T, C::BLOCK_DV>(dv, transposed, dout_from + split * C::COLUMNS_DV * 2 + lane_offset_rows<C::BLOCK_DV>(lane));
        to_transposed_operand<T>(transposed, s);
        multiply_registers<T, C::BLOCK_D>(dk, transposed, q_from + split * C::COLUMNS_D * 2 + lane_offset_rows<C::BLOCK_D>(lane));
      }
    }
    copy_async_wait<0>();
    __syncthreads();
  }

  finish<C>(dk, p.dk, p.dk_sum, p, at, chunk_unit, group_begin, split * C::COLUMNS_D, shape.head_dim, shape.scale, lane);
  finish<C>(dv, p.dv, p.dv_sum, p, at, chunk_unit, group_begin, split * C::COLUMNS_DV, shape.value_dim, 1.f, lane);
}

}  // namespace sbk
