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

// A block's half of dq to the warp that adds it up, after DQ_EMPTY: BEGIN, where dq holds both.
template <class C, int BEGIN = 0, int COUNT>
SBK_FN void hand_dq_over(const Barriers& barriers, unsigned to, const float (&dq)[COUNT], int lane) {
#pragma unroll
  for (int j = BEGIN; j < BEGIN + C::DQ_COLUMNS / 2; j += 4)
    store_shared(to + (j - BEGIN) / 4 * 128 * 16, dq[j], dq[j + 1], dq[j + 2], dq[j + 3]);
  __syncwarp();
  barriers.arrive(DQ_FULL, arrives(lane));
}

// dq, out of its sums, of the blocks whose newest tile was `work`, by a warpgroup: what `half` of them computed.
// NOTE: a tile later, when the sums have long been added up and are still in the L2 cache. With sums apart, which would do it, that held
// the chain up by more than a kernel of its own takes (hopper_backward_end_kernel).
template <class C> SBK_FN void convert_dq(const HopperBackwardParams& p, const Barriers& barriers, const Work& work, int half) {
  using T = typename C::T;
  constexpr int PIECES = C::DQ_COLUMNS / 8;
  const Thread thread(threadIdx.x % 128);
  const int group = p.given.shape.group, width = p.given.shape.head_dim, all = query_blocks(work.at);
  const int end = work.tile == newest_tile<C::BLOCK_N>(work.at, all) ? all : first_block<C::BLOCK_N>(work.at, work.tile + 1);
  const float scale = p.given.shape.scale;
#pragma unroll 1
  for (int i = 0; i < group * (end - work.first_block) * C::DQ_PARTS; i++) {
    const int part = i % C::DQ_PARTS, head = i / C::DQ_PARTS % group, block = work.first_block + i / C::DQ_PARTS / group;
    const int index = work.blocks + head * p.head_blocks + block, slice = part * 2 + half;
    barriers.wait_for_turn(p.dq_turn + index, work.tile + 1, DQ_TURN);
    __syncwarp();
    const float4* sums = reinterpret_cast<const float4*>(p.dq_sum + ((int64)index * 2 * C::DQ_PARTS + slice) * C::DQ_FLOATS) + threadIdx.x % 128;
    float4 x[PIECES];
#pragma unroll
    for (int j = 0; j < PIECES; j++) x[j] = load_done_with(sums + j * 128);
    Sequence at = work.at;
    at.head = at.head * group + head;
    const int64 row = block * C::BLOCK_M + (int)thread.row;
    T* to = rows_of<T>(p.given.dq, at, 1) + row * p.given.dq.stride_row;
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      const int column = 8 * C::own_column(half, part * PIECES + j) + 2 * (int)thread.q;
      if (column >= width) continue;
      if (row < at.M) *reinterpret_cast<unsigned*>(to + column) = pack<T>(x[j].x * scale, x[j].y * scale);
      if (row + 8 < at.M) *reinterpret_cast<unsigned*>(to + 8 * p.given.dq.stride_row + column) = pack<T>(x[j].z * scale, x[j].w * scale);
    }
  }
}

// Accumulator of 64 keys times scale, rounded, to a tile of keys, of all columns or, WIDE, the half's; `stored`: see Thread.
template <class C, int COUNT> SBK_FN void stage_sums(unsigned tile, int half, unsigned stored, const float (&x)[COUNT], float scale) {
#pragma unroll
  for (int i = 0; i < COUNT / 8; i++) {
    unsigned packed[4];
#pragma unroll
    for (int y = 0; y < 4; y++) packed[y] = pack<typename C::T>(x[8 * i + 2 * y] * scale, x[8 * i + 2 * y + 1] * scale);
    const int column = C::WIDE ? C::own_column(half, 2 * i) : 2 * i;
    store_matrices(tile + column / 8 * C::K_SLAB_BYTES + (stored ^ column % 8 << 4), packed);
  }
}

// dk and dv of the half's keys, through its rows of v, which only its own products read, and of k, which both halves' do; with sums apart
// all products are done. WIDE: of the half's columns, which both halves' products read.
template <class C, int COUNT>
SBK_FN void store_sums(const HopperBackwardParams& p, Shared<C>& s, const Work& work, int stage, int half, const float (&dk)[COUNT],
                       const float (&dv)[COUNT]) {
  const int of_half = C::WIDE ? 0 : half * C::HALF_BYTES;
  const unsigned stored = Thread(threadIdx.x % 128).stored, v_tile = shared_address(s.v[stage]), k_tile = shared_address(s.k[stage]);
  if (C::WIDE) named_sync(BOTH_HALVES, 256);
  stage_sums<C>(v_tile + of_half, half, stored, dv, 1.f);
  if (!C::SUMS_APART && !C::WIDE) named_sync(BOTH_HALVES, 256);  // both are done with k
  stage_sums<C>(k_tile + of_half, half, stored, dk, p.given.shape.scale);
  fence_async_shared();
  if (C::WIDE)
    named_sync(BOTH_HALVES, 256);
  else
    named_sync(OLDER_HALF + half, 128);
  const unsigned dv_tile = v_tile + half * C::HALF_BYTES, dk_tile = k_tile + half * C::HALF_BYTES;
  const Sequence at = work.at;
  const int first = work.tile * C::BLOCK_N + half * C::HALF_N;
#pragma unroll 1
  for (int i = 0; i < 2; i++) {  // dv, dk
    const unsigned from = i ? dk_tile : dv_tile;
    if (first + C::HALF_N > at.N) {
      using T = typename C::T;
      const Tensor& x = i ? p.given.dk : p.given.dv;
      const Rows<T> rows = {rows_of<T>(x, at, 1), x.stride_row, at.N, i ? p.given.shape.head_dim : p.given.shape.value_dim, first};
      store_pieces<C::HALF_N, C::SLABS, KeyOrder<C::HALF_N>>(from, C::K_SLAB_BYTES, rows, threadIdx.x % 128);
    } else if (threadIdx.x % 128 == 0) {
      store_keys<C::SLABS>(i ? p.dk : p.dv, from, C::K_SLAB_BYTES, at.batch, at.head, (int)at.token + first);
    }
  }
  bulk_commit();
  bulk_wait_read<0>();
  if (!C::SUMS_APART && threadIdx.x % 128 == 0) s.done[half] = work;
  named_sync(OLDER_HALF + half, 128);
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
