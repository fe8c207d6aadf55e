// Backward on Hopper: what the consumers of hopper_backward.cuh leave: dq of a step, dk and dv of the tile.
#pragma once
#include "hopper_backward_shared.cuh"

namespace sbk {
namespace hopper_backward {

// A block's half of dq to the warp that adds it up.
template <class C> SBK_FN void hand_dq_over(const Barriers& barriers, unsigned to, const float (&dq)[C::HEAD_DIM / 4], int half, int n, int lane) {
  barriers.wait(DQ_EMPTY + half, n % 2 ^ 1);
#pragma unroll
  for (int j = 0; j < C::HEAD_DIM / 16; j++)
    store_shared(to + j * 128 * 16, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
  __syncwarp();
  barriers.arrive(DQ_FULL + half, lane == 0);
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

// dk and dv of the half's keys: dv through the half's rows of v, which only its own products read, dk through a stage of q.
template <class C>
SBK_FN void store_sums(const HopperBackwardParams& p, Shared<C>& s, int half, const float (&dk)[C::HEAD_DIM / 2], const float (&dv)[C::HEAD_DIM / 2]) {
  const unsigned stored = Thread(threadIdx.x % 128).stored;
  const unsigned dv_tile = shared_address(s.v) + half * C::HALF_BYTES, dk_tile = shared_address(s.q[half]);
  stage_sums<C>(dv_tile, C::K_SLAB_BYTES, stored, dv, 1.f);
  named_sync(BOTH_HALVES, 256);  // both are done with q
  stage_sums<C>(dk_tile, C::Q_SLAB_BYTES, stored, dk, p.given.shape.scale);
  fence_async_shared();
  named_sync(OLDER_HALF + half, 128);
  if (threadIdx.x % 128 == 0) {
    const int row = s.work.tile * C::BLOCK_N + half * C::HALF_N;
#pragma unroll 1
    for (int i = 0; i < 2; i++)  // dv, dk
      store_keys<C::HALF_N, C::SLABS>(i ? p.dk : p.dv, i ? dk_tile : dv_tile, i ? C::Q_SLAB_BYTES : C::K_SLAB_BYTES, s.work.batch,
                                      s.work.key_head, row);
    bulk_commit();
    bulk_wait<0>();
  }
}

// dk and dv of a tile that nobody visits, by the whole block, through a stage of q.
template <class C> SBK_FN void store_zeros(const HopperBackwardParams& p, Shared<C>& s, const Work& work) {
  for (int i = threadIdx.x; i < C::Q_BYTES / 16; i += C::THREADS) reinterpret_cast<uint4*>(s.q[0])[i] = make_uint4(0, 0, 0, 0);
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x < 4) {
    store_keys<C::HALF_N, C::SLABS>(threadIdx.x % 2 ? p.dk : p.dv, shared_address(s.q[0]), C::Q_SLAB_BYTES, work.batch, work.key_head,
                                    work.tile * C::BLOCK_N + threadIdx.x / 2 * C::HALF_N);
    bulk_commit();
    bulk_wait<0>();
  }
}

}  // namespace hopper_backward
}  // namespace sbk
