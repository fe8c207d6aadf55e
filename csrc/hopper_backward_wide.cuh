// Backward on Hopper beyond 128 columns: tiles of 64 keys, two consumers. Each takes half the keys of q k^T and dout v^T, as in
// hopper_backward.cuh, whose names these are; but A and dz of both halves lie side by side in one tile, and each consumer adds up dk and dv
// of all keys, half the columns: in registers there is no room for more. dk and dq of a step are computed in the next one; of 256 columns of
// dq there is room in shared memory for half, so they are handed over in two parts.
#pragma once
#include "hopper_backward_exchange.cuh"
#include "hopper_backward_results.cuh"

namespace sbk {
namespace hopper_backward {

template <class C> SBK_FN void consume_wide(const HopperBackwardParams& p, Shared<C>& s, int half) {
  using T = typename C::T;
  using Here = Shared<C>;
  constexpr int OWN = C::HEAD_DIM / 2, PARTS = C::DQ_PARTS;
  static_assert(C::WIDE && C::KEY_STAGES == 1 && C::STAGES == 2 && C::A_STAGES == 1 && C::DZ_STAGES == 1);
  const unsigned base = kept_address(shared_address(&s));
  const unsigned q_tile = base + offsetof(Here, q), dout_tile = base + offsetof(Here, dout), k_tile = base + offsetof(Here, k);
  const unsigned v_tile = base + offsetof(Here, v), weights_tile = base + offsetof(Here, weights), dz_tile = base + offsetof(Here, dz);
  const unsigned dq_tile = base + offsetof(Here, dq) + half * (C::DQ_FLOATS * 4);
  const Barriers barriers = {base + (unsigned)offsetof(Here, barriers), p};
  // Operands. Rows: along k; columns: across it, this consumer's.
  constexpr int Q_STAGE = further(C::Q_BYTES);
  const uint64 q_rows = operand(q_tile, 0), dout_rows = operand(dout_tile, 0), dz_rows = operand(dz_tile, 0);
  const uint64 k_rows = operand(k_tile + half * C::HALF_BYTES, 0), v_rows = operand(v_tile + half * C::HALF_BYTES, 0);
  // NOTE: the "leading" offset may end within a slab, for its 64 columns are counted from where it ends, and swizzled by address.
  auto own_columns = [&](unsigned tile, int slab_bytes) {
    auto at = [&](int j) { return C::own_column(half, j) / 8 * slab_bytes + C::own_column(half, j) % 8 * 16; };
    return operand(tile + at(0), at(8) - at(0));
  };
  const uint64 q_columns = own_columns(q_tile, C::Q_SLAB_BYTES), dout_columns = own_columns(dout_tile, C::Q_SLAB_BYTES);
  const uint64 k_columns = own_columns(k_tile, C::K_SLAB_BYTES);
  const uint64 A_columns = operand(weights_tile, 0), dz_columns = operand(dz_tile, 0);

  float dk[OWN / 2], dv[OWN / 2], dq[C::DQ_COLUMNS / 2], e[C::HALF_N / 2], dA[C::HALF_N / 2];
  unsigned g = 0;  // steps of all tiles so far
  auto written = [&](int full, bool arriving) {
    fence_async_shared();
    __syncwarp();
    barriers.arrive(full, arriving);
  };
  // Part of dq, once it is computed, to the warp that adds it up, if `there`.
  // NOTE: behind the branch, or the compiler waits for it before 2^s.
  auto hand_over = [&](int part, unsigned lane, bool there) {
    if (there) barriers.wait(DQ_EMPTY, PARTS == 2 ? part ^ 1 : g % 2);  // of step g - 1
    wgmma_wait<0>();
    if (there) hand_dq_over<C>(barriers, dq_tile + kept(threadIdx.x % 128) * 16, dq, lane);
  };
  auto multiply_part = [&](int part) { multiply_dq<C>(dq, dz_rows, k_columns + part * further(C::K_SLAB_BYTES)); };
#pragma unroll 1
  for (int t = 0;; t++) {
    barriers.wait(WORK_FULL + t % 2, t / 2 % 2);
    const int steps = __shfl_sync(ALL_LANES, s.work[t % 4].steps, 0);
    if (t > 0 && steps == 0) convert_dq<C>(p, barriers, s, 0, s.work[(t + 3) % 4], half);
    if (steps == 0) break;
    barriers.wait(K_FULL, t % 2);
    barriers.wait(V_FULL, t % 2);
#pragma unroll 1
    for (int n = 0; n < steps; n++, g++) {
      const int stage = g % C::STAGES, parity = g / C::STAGES % 2, single_parity = g % 2;
      const int dout_stage = g % C::DOUT_STAGES, dout_parity = g / C::DOUT_STAGES % 2;

      // s = q k^T, then of the last step (before the second: of what is there, and thrown away) dk and dq's first part.
      barriers.wait(Q_FULL + stage, parity);
      wgmma_fence();
      multiply_by_keys<C>(e, q_rows + stage * Q_STAGE, k_rows);
      wgmma_commit();
      barriers.wait(DZ_FULL, single_parity ^ 1);
      wgmma_fence();
      add_product<C>(dk, dz_columns, q_columns + (stage ^ 1) * Q_STAGE, n > 1);
      multiply_part(0);
      const Thread thread(kept(threadIdx.x % 128));
      const unsigned lane = thread.lane, stored = thread.stored;
      const bool arriving = arrives(lane);
      const int visible = __shfl_sync(ALL_LANES, load_shared_int(base + (unsigned)offsetof(Here, visible) + stage * 4), 0);
      wgmma_wait<1>();  // s

      // e = 2^s; what the last step has left; dA = dout v^T, and dq's second part.
      float u[2] = {1.f, 1.f};
#pragma unroll
      for (int i = 0; i < C::RUN / 2; i++) exponentiate(e, u, i, p.scale_log2);
      hand_over(0, lane, n > 0);
      barriers.arrive(Q_EMPTY + (stage ^ 1), arriving && n > 0);
      if (PARTS == 1) barriers.arrive(DZ_EMPTY, arriving && n > 0);
      barriers.wait(DOUT_FULL + dout_stage, dout_parity);
      wgmma_fence();
      multiply_by_keys<C>(dA, dout_rows + dout_stage * Q_STAGE, v_rows);
      wgmma_commit();
      if constexpr (PARTS == 2) multiply_part(1);
      const Exchange<C> exchange(barriers, base, half, g, thread);
      float excess[2];
      exchange.hide(e, u, visible, excess);

      // The rest of the step, compiled for warpgroups without exact rows and for others.
      auto finish = [&](auto exact) {
        constexpr bool ANY_EXACT = decltype(exact)::ANY;
        float start[2];
        exchange.find_starts(start, e, excess, exact);

        // Walk: A, and a in place of dA.
        barriers.wait(A_EMPTY, single_parity ^ 1);
        wgmma_wait<PARTS - 1>();  // dA
        if constexpr (ANY_EXACT)
          walk_exactly<T, C::RUN>(e, dA, start, exact.rows, weights_tile + Thread(kept(threadIdx.x % 128)).row * SLAB_ROW_BYTES, lane ^ half << 4);
        else
          walk<T>(e, dA, start, weights_tile, stored ^ half << 6);
        written(A_FULL, arriving);
        if constexpr (PARTS == 2) {
          hand_over(1, lane, n > 0);
          barriers.arrive(DZ_EMPTY, arriving && n > 0);
        }

        // Sums of a, then dv += A^T dout and dz.
        float sum[2] = {0.f, 0.f}, older[2];
#pragma unroll
        for (int i = 0; i < C::RUN / 4; i++) take_older(e, dA, sum, i);
        exchange.add_sums(older, sum);
        barriers.wait(A_FULL, single_parity);
        wgmma_fence();
        add_product<C>(dv, A_columns, dout_columns + dout_stage * Q_STAGE, n > 0);
        wgmma_commit();
        barriers.wait(DZ_EMPTY, single_parity ^ 1);
        store_dz<T>(e, dA, older, dz_tile, stored ^ half << 6);
        written(DZ_FULL, arriving);
        wgmma_wait<0>();  // dv
        barriers.arrive(DOUT_EMPTY + dout_stage, arriving);
        barriers.arrive(A_EMPTY, arriving);
      };
      if (__shfl_sync(ALL_LANES, (int)named_all(OLDER_HALF + half, 128, walks_simply(excess)), 0))
        finish(NoExactRows());
      else
        finish(find_exact_rows(excess, lane));
    }

    // dk and dq of the last step.
    const unsigned lane = threadIdx.x % 32;
    const int stage = (g - 1) % C::STAGES;
    barriers.wait(DZ_FULL, (g - 1) % 2);
    wgmma_fence();
    add_product<C>(dk, dz_columns, q_columns + stage * Q_STAGE, steps > 1);
    multiply_part(0);
    hand_over(0, lane, true);
    barriers.arrive(Q_EMPTY + stage, arrives(lane));
    if constexpr (PARTS == 2) {
      multiply_part(1);
      hand_over(1, lane, true);
    }
    barriers.arrive(DZ_EMPTY, arrives(lane));
    if (t > 0) convert_dq<C>(p, barriers, s, 0, s.work[(t + 3) % 4], half);
    store_sums(p, s, s.work[t % 4], 0, half, dk, dv);
    barriers.arrive(K_EMPTY, threadIdx.x % 128 == 0);
    barriers.arrive(V_EMPTY, threadIdx.x % 128 == 0);
    __syncwarp();
    barriers.arrive(WORK_EMPTY + t % 2, arrives(lane));
  }
}

}  // namespace hopper_backward
}  // namespace sbk
