// Backward on Hopper: what the consumers of hopper_backward.cuh leave: dq of a step, dk and dv of the tile.
#pragma once
#include "hopper_backward_shared.cuh"

namespace sbk {
namespace hopper_backward {

// dq = dz k, of a step: all of a half's dz and columns of k.
template <class C, int COUNT> SBK_FN void multiply_dq(float (&dq)[COUNT], uint64 dz_rows, uint64 k_columns) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::BLOCK_N / 16; i++)
    wgmma_step<typename C::T, ALONG_K, ACROSS_K>(dq, dz_rows + along_k(i, C::HALF_BYTES), k_columns + across_k(i), i);
  wgmma_commit();
}
// sum += x^T y over the step's rows, or, unless `keep`, from nothing.
template <class C, int COUNT> SBK_FN void add_product(float (&sum)[COUNT], uint64 x_columns, uint64 y_columns, bool keep) {
#pragma unroll
  for (int i = 0; i < C::BLOCK_M / 16; i++)
    wgmma_add<typename C::T, ACROSS_K, ACROSS_K>(sum, x_columns + across_k(i), y_columns + across_k(i), keep || i > 0);
}

// A block's half of dq, the n-th of all tiles, to the warp that adds it up, once the one before is taken.
// NOTE: a barrier for every other one: whoever hands over the next but one may come before the one before is taken.
template <class C> SBK_FN void hand_dq_over(const Barriers& barriers, unsigned to, const float (&dq)[C::HEAD_DIM / 4], int n, int lane) {
  constexpr int BEFORE = 2 - C::DQ_STAGES;  // whose place it takes: of the step before or, of two places, of the one before that
  barriers.wait(DQ_EMPTY + (n + BEFORE) % 2, (n + BEFORE) / 2 % 2 ^ 1);
  to += n % C::DQ_STAGES * (2 * C::DQ_FLOATS * 4);
#pragma unroll
  for (int j = 0; j < C::HEAD_DIM / 4; j += 4) store_shared(to + j / 4 * 128 * 16, dq[j], dq[j + 1], dq[j + 2], dq[j + 3]);
  __syncwarp();
  barriers.arrive(DQ_FULL + n % 2, arrives(lane));
}

// Accumulator [HALF_N, D] times scale, rounded, to slabs slab_bytes apart; `stored`: see Thread.
template <class C>
SBK_FN void stage_sums(unsigned tile, int slab_bytes, unsigned stored, const float (&x)[C::HEAD_DIM / 2], float scale) {
#pragma unroll
  for (int i = 0; i < C::HEAD_DIM / 16; i++) {
    unsigned packed[4];
#pragma unroll
    for (int y = 0; y < 4; y++) packed[y] = pack<typename C::T>(x[8 * i + 2 * y] * scale, x[8 * i + 2 * y + 1] * scale);
    store_matrices(tile + i / 4 * slab_bytes + (stored ^ i % 4 << 5), packed);
  }
}

// dk and dv of the half's keys, through its rows of v, which only its own products read, and of k, which both halves' do; with sums apart
// both through v, since consumers may still multiply by k.
template <class C>
SBK_FN void store_sums(const HopperBackwardParams& p, Shared<C>& s, const Work& work, int stage, int half, const float (&dk)[C::HEAD_DIM / 2],
                       const float (&dv)[C::HEAD_DIM / 2]) {
  const unsigned stored = Thread(threadIdx.x % 128).stored;
  const unsigned dv_tile = shared_address(s.v[stage]) + half * C::HALF_BYTES;
  const unsigned dk_tile = C::SUMS_APART ? dv_tile : shared_address(s.k[stage]) + half * C::HALF_BYTES;
  const Sequence at = work.at;
  const int first = work.tile * C::BLOCK_N + half * C::HALF_N;
  auto sync = [&] { named_sync(OLDER_HALF + half, 128); };
  auto send = [&](const Tensor& x, const MappedKeys& mapped, int width, unsigned from) {
    using T = typename C::T;
    if (first + C::HALF_N > at.N)
      store_pieces<C::HALF_N, C::SLABS, KeyOrder<C::HALF_N>>(from, C::K_SLAB_BYTES, Rows<T>{rows_of<T>(x, at, 1), x.stride_row, at.N, width, first},
                                                             threadIdx.x % 128);
    else if (threadIdx.x % 128 == 0)
      store_keys<C::SLABS>(mapped, from, C::K_SLAB_BYTES, at.batch, at.head, (int)at.token + first);
    bulk_commit();
  };
  stage_sums<C>(dv_tile, C::K_SLAB_BYTES, stored, dv, 1.f);
  if constexpr (C::SUMS_APART) {
    fence_async_shared();
    sync();
  } else {
    named_sync(BOTH_HALVES, 256);  // both are done with k
    stage_sums<C>(dk_tile, C::K_SLAB_BYTES, stored, dk, p.given.shape.scale);
    fence_async_shared();
    sync();
  }
  send(p.given.dv, p.dv, p.given.shape.value_dim, dv_tile);
  if constexpr (C::SUMS_APART) {
    bulk_wait_read<0>();
    sync();
    stage_sums<C>(dk_tile, C::K_SLAB_BYTES, stored, dk, p.given.shape.scale);
    fence_async_shared();
    sync();
  }
  send(p.given.dk, p.dk, p.given.shape.head_dim, dk_tile);
  bulk_wait_read<0>();
  sync();
}

// dk and dv of a tile that nobody visits, by a warp.
template <class C> SBK_FN void store_zeros(const HopperBackwardParams& p, const Work& work, int lane) {
  const int first = work.tile * C::BLOCK_N, rows = min(C::BLOCK_N, work.at.N - first);
#pragma unroll 1
  for (int j = 0; j < 2; j++) {
    const Tensor& x = j ? p.given.dk : p.given.dv;
    const int pieces = (j ? p.given.shape.head_dim : p.given.shape.value_dim) / 8;
    typename C::T* to = rows_of<typename C::T>(x, work.at, 1) + first * x.stride_row;
#pragma unroll 1
    for (int i = lane; i < rows * pieces; i += 32)
      *reinterpret_cast<uint4*>(to + i / pieces * x.stride_row + i % pieces * 8) = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace hopper_backward
}  // namespace sbk
