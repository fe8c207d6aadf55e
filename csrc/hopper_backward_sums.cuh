// Backward on Hopper with sums apart (head dims up to 64): the warpgroup that adds up dv, dq and dk, out of A and dz as the consumers of
// hopper_backward.cuh leave them in shared memory.
#pragma once
#include "hopper_backward_results.cuh"

namespace sbk {
namespace hopper_backward {

template <class C> SBK_FN void add_up(const HopperBackwardParams& p, Shared<C>& s) {
  using Here = Shared<C>;
  constexpr int D = C::HEAD_DIM, Q_STAGE = further(C::Q_BYTES), OUT_STAGE = further(2 * C::HALF_BYTES), HALF = further(C::HALF_BYTES);
  const unsigned base = kept_address(shared_address(&s)), dq_tile = base + offsetof(Here, dq);
  const Barriers barriers = {base + (unsigned)offsetof(Here, barriers), p};
  const uint64 q_columns = operand(base + offsetof(Here, q), C::Q_SLAB_BYTES), dout_columns = operand(base + offsetof(Here, dout), C::Q_SLAB_BYTES);
  const uint64 A_columns = operand(base + offsetof(Here, weights), 0), dz_columns = operand(base + offsetof(Here, dz), 0);
  const uint64 k_columns = operand(base + offsetof(Here, k), C::K_SLAB_BYTES);
  float dk[2][D / 2], dv[2][D / 2];  // by half
#pragma unroll 1
  for (int t = 0;; t++) {
    const int key_stage = t % C::KEY_STAGES;
    barriers.wait(WORK_FULL + t % 2, t / 2 % 2);
    const int steps = __shfl_sync(ALL_LANES, s.work[t % 4].steps, 0);
    if (t > 0 && steps == 0) convert_dq<C>(p, barriers, s, 0, s.work[(t + 3) % 4], 0);
    if (steps == 0) break;
    int g = __shfl_sync(ALL_LANES, s.work[t % 4].begin, 0);  // steps of all tiles so far
#pragma unroll 1
    for (int n = 0; n < steps; n++, g++) {
      const int stage = g % C::STAGES, out = g % C::DZ_STAGES, parity = g / C::DZ_STAGES % 2, lane = threadIdx.x % 32;
      const bool arriving = arrives(lane);

      // What the consumers have read of this step is there for these products too: A and dz came after it.
      barriers.wait(A_FULL + out, parity);
      wgmma_fence();
#pragma unroll
      for (int half = 0; half < 2; half++)
        add_product<C>(dv[half], A_columns + out * OUT_STAGE + half * HALF, dout_columns + stage * Q_STAGE, n > 0);
      wgmma_commit();
      barriers.wait(DZ_FULL + out, parity);
      float dq[D / 2];
      multiply_dq<C>(dq, dz_columns + out * OUT_STAGE, k_columns + key_stage * further(C::K_BYTES));
#pragma unroll
      for (int half = 0; half < 2; half++)
        add_product<C>(dk[half], dz_columns + out * OUT_STAGE + half * HALF, q_columns + stage * Q_STAGE, n > 0);
      wgmma_commit();
      wgmma_wait<2>();  // dv
      barriers.arrive(A_EMPTY + out, arriving);
      barriers.arrive(DOUT_EMPTY + stage, arriving);
      wgmma_wait<1>();  // dq
      const unsigned to = dq_tile + kept(threadIdx.x % 128) * 16;
      barriers.wait(DQ_EMPTY, g % 2 ^ 1);
      hand_dq_over<C>(barriers, to, dq, lane);
      hand_dq_over<C, D / 4>(barriers, to + C::DQ_FLOATS * 4, dq, lane);
      wgmma_wait<0>();  // dk
      barriers.arrive(DZ_EMPTY + out, arriving);
      barriers.arrive(Q_EMPTY + stage, arriving);
    }
    if (t > 0) convert_dq<C>(p, barriers, s, key_stage, s.work[(t + 3) % 4], 0);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      store_sums(p, s, s.work[t % 4], key_stage, half, dk[half], dv[half]);
      barriers.arrive(K_EMPTY + key_stage, threadIdx.x % 128 == 0);
      barriers.arrive(V_EMPTY + key_stage, threadIdx.x % 128 == 0);
    }
    barriers.arrive(WORK_EMPTY + t % 2, arrives(threadIdx.x % 32));
  }
}

}  // namespace hopper_backward
}  // namespace sbk
