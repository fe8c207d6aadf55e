// Backward on Hopper: what the consumers of hopper_backward.cuh leave: dq of a step, dk and dv of the tile.
#pragma once
#include "hopper_backward_shared.cuh"

namespace sbk {
namespace hopper_backward {

// x = rows keys^T, q k^T or dout v^T, over all columns.
template <class C, int COUNT> SBK_FN void multiply_by_keys(float (&x)[COUNT], uint64 rows, uint64 keys) {
#pragma unroll
  for (int i = 0; i < C::HEAD_DIM / 16; i++)
    wgmma_step<typename C::T, ALONG_K, ALONG_K>(x, rows + along_k(i, C::Q_SLAB_BYTES), keys + along_k(i, C::K_SLAB_BYTES), i);
}
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

// A block's half of dq to the warp that adds it up, after DQ_EMPTY: BEGIN, where dq holds both.
template <class C, int BEGIN = 0, int COUNT>
SBK_FN void hand_dq_over(const Barriers& barriers, unsigned to, const float (&dq)[COUNT], int lane) {
#pragma unroll
  for (int j = BEGIN; j < BEGIN + C::DQ_COLUMNS / 2; j += 4)
    store_shared(to + (j - BEGIN) / 4 * 128 * 16, dq[j], dq[j + 1], dq[j + 2], dq[j + 3]);
  __syncwarp();
  barriers.arrive(DQ_FULL, arrives(lane));
}

// dk or dv of 64 keys, or dq of a block, times scale, rounded, to a tile in shared memory: all columns or, WIDE, the half's.
template <class C, int COUNT> SBK_FN void stage_sum(unsigned tile, int half, const float (&x)[COUNT], float scale) {
  store_accumulator<typename C::T>(tile, C::K_SLAB_BYTES, matrix_place(threadIdx.x % 128), x, scale,
                                   [&](int i) { return C::WIDE ? C::own_column(half, 2 * i) : 2 * i; });
}
// dq, out of its sums, of the blocks whose newest tile was `work`, through a tile of v whose products are all done. By a
// warpgroup (half 0) or, WIDE, by both consumers. A tile later, when the sums have been added up and are still in the L2 cache.
template <class C>
SBK_FN void convert_dq(const HopperBackwardParams& p, const Barriers& barriers, Shared<C>& s, int stage, const Work& work, int half) {
  using T = typename C::T;
  constexpr int COUNT = C::HEAD_DIM / (C::WIDE ? 4 : 2), PIECES = C::DQ_COLUMNS / 8;
  const unsigned tile = shared_address(s.v[stage]);
  const int group = p.given.shape.group, end = blocks_end<C::BLOCK_N>(work.at, work.tile), thread = threadIdx.x % 128;
  auto meet = [] { named_sync(C::WIDE ? BOTH_HALVES : OLDER_HALF, C::WIDE ? 256 : 128); };
  barriers.wait(SUMMED + work.number % 2, work.number / 2 % 2);
#pragma unroll 1
  for (int i = 0; i < group * (end - work.first_block); i++) {
    const int head = i % group, block = work.first_block + i / group, first = block * C::BLOCK_M;
    const float* sums = p.dq_sum + (int64)(work.blocks + head * p.head_blocks + block) * (C::BLOCK_M * C::HEAD_DIM);
    float x[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT / 4; j++) {
      const int slice = C::WIDE ? j / PIECES * 2 + half : j / PIECES;
      const float4 y = __ldcg(reinterpret_cast<const float4*>(sums + slice * C::DQ_FLOATS) + j % PIECES * 128 + thread);
      x[4 * j] = y.x, x[4 * j + 1] = y.y, x[4 * j + 2] = y.z, x[4 * j + 3] = y.w;
    }
    bulk_wait_read<0>();  // of what was there before
    meet();
    stage_sum<C>(tile, half, x, p.given.shape.scale);
    fence_async_shared();
    meet();
    Sequence at = work.at;
    at.head = at.head * group + head;
    if (p.given.shape.cu_seqlens != nullptr && first + C::BLOCK_M > at.M) {  // else the map knows the last row
      const Rows<T> rows = {rows_of<T>(p.given.dq, at, 1), p.given.dq.stride_row, at.M, p.given.shape.head_dim, first};
      if (half == 0) store_pieces<C::BLOCK_M, C::SLABS, NaturalOrder, 128>(tile, C::K_SLAB_BYTES, rows, thread);
    } else if (half == 0 && thread == 0) {
#pragma unroll
      for (int slab = 0; slab < C::SLABS; slab++)
        store_box(tile + slab * C::K_SLAB_BYTES, &p.dq, slab * SLAB_COLUMNS, (int)at.token + first, at.head, at.batch);
    }
    bulk_commit();
  }
  bulk_wait_read<0>();
  meet();
}

// dk or, `of_values`, dv of the half's keys from there to global memory, part of the first thread's bulk group. By a warpgroup.
template <class C> SBK_FN void copy_sum(const HopperBackwardParams& p, const Work& work, unsigned tile, int half, bool of_values) {
  const int first = work.tile * C::BLOCK_N + half * C::HALF_N;
  if (first + C::HALF_N > work.at.N) {
    using T = typename C::T;
    const Tensor& x = of_values ? p.given.dv : p.given.dk;
    const Rows<T> rows = {rows_of<T>(x, work.at, 1), x.stride_row, work.at.N, of_values ? p.given.shape.value_dim : p.given.shape.head_dim, first};
    store_pieces<C::HALF_N, C::SLABS, KeyOrder<C::HALF_N>, 128>(tile, C::K_SLAB_BYTES, rows, threadIdx.x % 128);
  } else if (threadIdx.x % 128 == 0) {
    store_keys<C::SLABS>(of_values ? p.dv : p.dk, tile, C::K_SLAB_BYTES, work.at.batch, work.at.head, (int)work.at.token + first);
  }
  bulk_commit();
}
// Until copies have read what they copy.
SBK_FN void await_copies(int half) {
  bulk_wait_read<0>();
  named_sync(OLDER_HALF + half, 128);
}

// dv and dk through the tile's v and k, whose products are all done; WIDE: of the half's columns, which both halves' products read.
template <class C, int COUNT>
SBK_FN void store_sums(const HopperBackwardParams& p, Shared<C>& s, const Work& work, int stage, int half, const float (&dk)[COUNT],
                       const float (&dv)[COUNT]) {
  const unsigned v_tile = shared_address(s.v[stage]), k_tile = shared_address(s.k[stage]), own = half * C::HALF_BYTES, staged = C::WIDE ? 0 : own;
  if (C::WIDE) named_sync(BOTH_HALVES, 256);
  stage_sum<C>(v_tile + staged, half, dv, 1.f);
  stage_sum<C>(k_tile + staged, half, dk, p.given.shape.scale);
  fence_async_shared();
  if (C::WIDE)
    named_sync(BOTH_HALVES, 256);
  else
    named_sync(OLDER_HALF + half, 128);
#pragma unroll 1
  for (int i = 0; i < 2; i++) copy_sum<C>(p, work, (i ? k_tile : v_tile) + own, half, i == 0);
  await_copies(half);
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
