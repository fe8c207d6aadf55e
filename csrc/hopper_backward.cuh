// Backward of stick-breaking attention on Hopper, dq, dk and dv in one pass of five products: equations (8) to (10).
//
//     grid        at most as many blocks of THREADS as multiprocessors, each taking one (key head, key tile) after the other, by ticket
//     warpgroups  0 and 1: the older and the newer half of the tile's keys, with dk and dv of the half in registers; the last: a warp
//                 each for loads, for state in, for state out and for dq. With sums apart (HEAD_DIM 64) one more between them takes dq,
//                 dk and dv off the first two
//     k, v        the tile [BLOCK_N, D], keys permuted within each half (tile.cuh), in KEY_STAGES, the next one's loaded meanwhile where
//                 there are two; q, dout [BLOCK_M, D] in STAGES; by tensor maps
//     step        one block of BLOCK_M queries of one query head that visits the tile, see VisitingBlocks
//
// A query block's chain runs from its oldest visited tile to the newest, one tile after the other: two floats a row, `state` in
// global memory. Tickets go out tile after tile within a group of heads, and a block takes its tiles in their order, so whoever is
// waited for is under way, or behind tiles that wait for none later, whatever order the hardware starts blocks in. In the tile each
// thread walks its run of keys from the oldest to the newest, with left = stick left after the key:
//
//     A = left e,  left += A;  a = A dA,  dz = (a - e times the older sum of a) / (1 + e)
//
// The walk starts from the stick left by the tiles done; in a row's oldest visited tile, where the stick may be used up, and in its
// newest one, from what enters from the newer side, divided. dq is summed in global memory, in the chain's order.
//
// Rows beyond M and N, and columns beyond D and Dv up to the kernel's HEAD_DIM, enter as zeros: dout and older sum of rows beyond M too,
// so that nothing comes of them. Needs rows on 16 bytes. Maps of 16-bit elements, swizzled by 128 bytes, for rows of S bytes:
//     q, dout         rows, in boxes [64, 64]
//     k, v, dk, dv    blocks of 64 keys in permuted order, strides S, 16 S, 2 S, in boxes [64, 2, 4, 8]; beyond whole blocks, pairs
#pragma once
#include "hopper_backward_exchange.cuh"
#include "hopper_backward_producers.cuh"
#include "hopper_backward_sums.cuh"
#include "hopper_backward_wide.cuh"

namespace sbk {
namespace hopper_backward {

template <class C> SBK_FN void consume(const HopperBackwardParams& p, Shared<C>& s, int half) {
  using T = typename C::T;
  constexpr int D = C::HEAD_DIM;
  const unsigned base = kept_address(shared_address(&s));

  // Where things lie in shared memory.
  using Here = Shared<C>;
  const unsigned q_tile = base + offsetof(Here, q), dout_tile = base + offsetof(Here, dout), k_tile = base + offsetof(Here, k);
  const unsigned v_tile = base + offsetof(Here, v), weights_tiles = base + offsetof(Here, weights) + half * C::HALF_BYTES;
  const unsigned dz_tiles = base + offsetof(Here, dz), dq_tile = base + offsetof(Here, dq) + half * (C::DQ_FLOATS * 4);
  const Barriers barriers = {base + (unsigned)offsetof(Here, barriers), p};
  // Operands of the five products. Rows: along k; columns: across it, of the half's keys or, k_columns, the half's part of D.
  constexpr int Q_STAGE = further(C::Q_BYTES), DZ_STAGE = further(2 * C::HALF_BYTES);
  const uint64 q_rows = operand(q_tile, 0), dout_rows = operand(dout_tile, 0), dz_rows = operand(dz_tiles, 0);
  const uint64 k_rows = operand(k_tile + half * C::HALF_BYTES, 0), v_rows = operand(v_tile + half * C::HALF_BYTES, 0);
  const uint64 q_columns = operand(q_tile, C::Q_SLAB_BYTES), dout_columns = operand(dout_tile, C::Q_SLAB_BYTES);
  const uint64 k_columns = operand(k_tile + half * C::K_SLAB_BYTES, 0);
  const uint64 A_columns = operand(weights_tiles, 0), dz_columns = operand(dz_tiles + half * C::HALF_BYTES, 0);

  // A or dz is in shared memory, for this warpgroup's products or, by a barrier, those of the sums.
  auto written = [&](int full, bool arriving) {
    fence_async_shared();
    if constexpr (C::SUMS_APART)
      __syncwarp();
    else
      named_sync(OLDER_HALF + half, 128);
    barriers.arrive(full, arriving);
  };
  // Without sums apart the halves take turns with the products that begin a step, so that one's run beside the rest of the other's step.
  auto take_turn = [&] {
    if constexpr (!C::SUMS_APART) named_sync(OLDER_TURN + half, 256);
  };
  auto pass_turn = [&] {
    if constexpr (!C::SUMS_APART) named_arrive(OLDER_TURN + (half ^ 1), 256);
  };
  if (half == 1) pass_turn();
  float dk[D / 2], dv[D / 2], e[32], dA[32];
  bool q_ready = false;  // for the next step, asked at the end of the last
  unsigned g = 0;        // steps of all tiles so far
#pragma unroll 1
  for (int t = 0;; t++) {
    const int key_stage = t % C::KEY_STAGES, key_parity = t / C::KEY_STAGES % 2;
    const uint64 keys = key_stage * further(C::K_BYTES);  // what this tile's k and v are further on
    barriers.wait(WORK_FULL + t % 2, t / 2 % 2);
    const int steps = __shfl_sync(ALL_LANES, s.work[t % 4].steps, 0);
    if (!C::SUMS_APART && t > 0 && steps == 0 && half == 0) convert_dq<C>(p, barriers, s, 0, s.work[(t + 3) % 4], half);
    if (steps == 0) break;
    barriers.wait(K_FULL + key_stage, key_parity);
    barriers.wait(V_FULL + key_stage, key_parity);
    bool dz_ready = true;
#pragma unroll 1
    for (int n = 0; n < steps; n++, g++) {
      const int stage = g % C::STAGES, parity = g / C::STAGES % 2;
      const int out = g % C::DZ_STAGES, out_parity = g / C::DZ_STAGES % 2;  // of dz, and of A where it has stages
      const unsigned weights_tile = weights_tiles + out % C::A_STAGES * (2 * C::HALF_BYTES);

      // s = q k^T and, without sums apart, dq of two steps ago (before the third: of what is there, and thrown away).
      float dq[D / 4];
      take_turn();
      barriers.wait_unless(q_ready, Q_FULL + stage, parity);
      const uint64 q_stage = q_rows + stage * Q_STAGE, dout_stage = dout_rows + stage * Q_STAGE;
      wgmma_fence();
      multiply_by_keys<C>(e, q_stage, k_rows + keys);
      wgmma_commit();
      if constexpr (!C::SUMS_APART) {
        barriers.wait_unless(dz_ready, DZ_FULL + out, out_parity ^ 1);
        multiply_dq<C>(dq, dz_rows + out * DZ_STAGE, k_columns + keys);
      }
      const Thread thread(kept(threadIdx.x % 128));
      const unsigned lane = thread.lane, stored = thread.stored;
      const bool arriving = arrives(lane);
      const int visible = __shfl_sync(ALL_LANES, load_shared_int(base + (unsigned)offsetof(Here, visible) + stage * 4), 0);
      const bool dout_ready = barriers.ready(DOUT_FULL + stage, parity);
      wgmma_wait<C::SUMS_APART ? 0 : 1>();  // s, and of the last step dv and dk
      if constexpr (!C::SUMS_APART) {
        barriers.arrive(DOUT_EMPTY + (stage ^ 1), arriving && g >= 1);
        barriers.arrive(Q_EMPTY + (stage ^ 1), arriving && g >= 1);
      }
      pass_turn();

      // dA = dout v^T and e = 2^s: dA beside it or, where its registers are dq's, behind.
      float u[2] = {1.f, 1.f};
      barriers.wait_unless(dout_ready, DOUT_FULL + stage, parity);
      if constexpr (C::SUMS_APART) wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (C::SUMS_APART && i % 2 == 0) wgmma_step<T, ALONG_K, ALONG_K>(dA, dout_stage + along_k(i / 2, 0), v_rows + keys + along_k(i / 2, 0), i / 2);
        exponentiate(e, u, i, p.scale_log2);
      }
      if constexpr (!C::SUMS_APART) {
        if (n >= 2) barriers.wait(DQ_EMPTY, g % 2 ^ 1);  // NOTE: behind this branch, or the compiler waits for dq before 2^s
        wgmma_wait<0>();                                 // dq
        barriers.arrive(DZ_EMPTY + out, arriving && g >= 2);
        if (n >= 2) hand_dq_over<C>(barriers, dq_tile + kept(threadIdx.x % 128) * 16, dq, lane);
        wgmma_fence();
        multiply_by_keys<C>(dA, dout_stage, v_rows + keys);
      }
      wgmma_commit();
      const Exchange<C> exchange(barriers, base, half, g, thread);
      float excess[2];
      exchange.hide(e, u, visible, excess);

      // The rest of the step, compiled for warps without exact rows and for others.
      // NOTE: branches around what exact rows take, in the midst of the others' code, cost 8 %, though nobody went there.
      auto finish = [&](auto exact) {
        constexpr bool ANY_EXACT = decltype(exact)::ANY;
        float start[2];
        exchange.find_starts(start, e, excess, exact);
        const bool A_free = !C::SUMS_APART || barriers.ready(A_EMPTY + out, out_parity ^ 1);
        if constexpr (C::SUMS_APART)
          barriers.wait_unless(A_free, A_EMPTY + out, out_parity ^ 1);
        else
          wgmma_wait<0>();  // dA

        // Walk: A, and a in place of dA.
        if constexpr (ANY_EXACT)
          walk_exactly<T, C::RUN>(e, dA, start, exact.rows, weights_tile + Thread(kept(threadIdx.x % 128)).row * SLAB_ROW_BYTES, lane);
        else
          walk<T>(e, dA, start, weights_tile, stored);
        const bool dz_free = barriers.ready(DZ_EMPTY + out, out_parity ^ 1);
        written(A_FULL + out, arriving && C::SUMS_APART);

        // dv += A^T dout and, between its steps, a less e times the run's older sum of a in place of a.
        float sum[2] = {0.f, 0.f};
        if constexpr (!C::SUMS_APART) wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if constexpr (!C::SUMS_APART)
            wgmma_add<T, ACROSS_K, ACROSS_K>(dv, A_columns + across_k(i), dout_columns + stage * Q_STAGE + across_k(i), n > 0 || i > 0);
          take_older(e, dA, sum, i);
        }
        if constexpr (!C::SUMS_APART) wgmma_commit();

        float older[2];
        exchange.add_sums(older, sum);

        // dz.
        barriers.wait_unless(dz_free, DZ_EMPTY + out, out_parity ^ 1);
        store_dz<T>(e, dA, older, dz_tiles + (out * 2 + half) * C::HALF_BYTES, stored);
        if constexpr (!C::SUMS_APART) dz_ready = g < 1 || barriers.ready(DZ_FULL + (out ^ 1), (g - 1) / C::DZ_STAGES % 2);
        q_ready = barriers.ready(Q_FULL + (g + 1) % C::STAGES, (g + 1) / C::STAGES % 2);
        written(DZ_FULL + out, arriving);
        if constexpr (C::SUMS_APART) return;
        wgmma_fence();
        add_product<C>(dk, dz_columns + out * DZ_STAGE, q_columns + stage * Q_STAGE, n > 0);
        wgmma_commit();
      };
      // NOTE: a warpgroup's warps have to begin products, and to wait for them, together. By a shuffle the compiler knows that a warp stays so.
      if constexpr (C::SUMS_APART) wgmma_wait<0>();  // dA, before they part
      const bool simple = C::SUMS_APART ? __all_sync(ALL_LANES, walks_simply(excess)) : named_all(OLDER_HALF + half, 128, walks_simply(excess));
      if (__shfl_sync(ALL_LANES, (int)simple, 0))
        finish(NoExactRows());
      else
        finish(find_exact_rows(excess, lane));
    }
    if constexpr (!C::SUMS_APART) {
      // dq of the last two steps, there is at least one; and dv and dk, while the warp that adds dq is busy: both through the half's rows of
      // v, which only its own products read, so that the next tile's k can come as soon as dq is done with this one's.
      static_assert(C::KEY_STAGES == 1);
      const Work& work = s.work[t % 4];
      const unsigned own_tile = v_tile + half * C::HALF_BYTES;
      const bool first_thread = threadIdx.x % 128 == 0;
      float dq[D / 4];
      auto multiply = [&](unsigned step) {
        barriers.wait(DZ_FULL + step % 2, step / 2 % 2);
        multiply_dq<C>(dq, dz_rows + step % 2 * DZ_STAGE, k_columns);
        wgmma_wait<0>();
      };
      auto hand_over = [&](unsigned step) {
        barriers.wait(DQ_EMPTY, step % 2 ^ 1);
        hand_dq_over<C>(barriers, dq_tile + threadIdx.x % 128 * 16, dq, threadIdx.x % 32);
      };
      auto store = [&](const float (&sum)[D / 2], float scale, bool of_values) {
        stage_sum<C>(own_tile, half, sum, scale);
        fence_async_shared();
        named_sync(OLDER_HALF + half, 128);
        copy_sum<C>(p, work, own_tile, half, of_values);
      };
      multiply(g - 2);  // of a tile with one step: of what is there, and thrown away
      store(dv, 1.f, true);
      if (steps > 1) hand_over(g - 2);
      // By the half that is ahead of the other one, whose dz of the last step it would wait for.
      if (half == 0 && t > 0) convert_dq<C>(p, barriers, s, 0, s.work[(t + 3) % 4], half);
      multiply(g - 1);
      await_copies(half);
      barriers.arrive(K_EMPTY, first_thread);
      store(dk, p.given.shape.scale, false);
      hand_over(g - 1);
      await_copies(half);
      barriers.arrive(V_EMPTY, first_thread);
    }
    __syncwarp();
    barriers.arrive(WORK_EMPTY + t % 2, arrives(threadIdx.x % 32));
  }
  if (half == 0) take_turn();
}

}  // namespace hopper_backward

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) hopper_backward_kernel(const __grid_constant__ HopperBackwardParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // other architectures get an empty kernel, which nobody launches
  using namespace hopper_backward;
  extern __shared__ __align__(SWIZZLE_BYTES) unsigned char hopper_shared[];
  Shared<C>& s = *reinterpret_cast<Shared<C>*>(hopper_shared);
  // NOTE: equal over a warp by a shuffle, which tells the compiler so; else it serializes the products.
  const int warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  // Set barriers up.
  if (threadIdx.x < BARRIERS) {
    barrier_init(shared_address(&s.barriers[threadIdx.x]), arrivals_of<C>(threadIdx.x));
    fence_barrier_init();
  }
  if (threadIdx.x == 0) s.patience = PATIENCE, s.failed = 0;
  __syncthreads();

  if (warp < 8) {
    registers_increase<C::CONSUMER_REGISTERS>();
    if constexpr (C::WIDE)
      consume_wide<C>(p, s, warp / 4);
    else
      consume<C>(p, s, warp / 4);
  } else if (warp >= C::WARPS - 4) {
    registers_decrease<C::PRODUCER_REGISTERS>();
    if (warp == C::WARPS - 4) load_rows<C>(p, s, lane);
    if (warp == C::WARPS - 3) take_state<C>(p, s, lane);
    if (warp == C::WARPS - 2) pass_state_on<C>(p, s, lane);
    if (warp == C::WARPS - 1) add_dq<C>(p, s, lane);
  } else if constexpr (C::SUMS_APART) {
    registers_increase<C::SUMS_REGISTERS>();
    add_up<C>(p, s);
  }
  barriers_of(s, p).report();
#endif
}

}  // namespace sbk
