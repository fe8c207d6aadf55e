// Backward of stick-breaking attention on Hopper, dq, dk and dv in one pass of five products: equations (8) to (10).
//
//     grid        at most as many blocks of THREADS as multiprocessors, each taking one (key head, key tile) after the other, by ticket
//     warpgroups  0 and 1: the older and the newer half of the tile's keys, with dk and dv of the half in registers; 2: a warp each
//                 for loads, for state in, for state out and for dq
//     k, v        the tile [BLOCK_N, D], keys permuted within each half (tile.cuh), in KEY_STAGES, the next one's loaded meanwhile where
//                 there are two; q, dout [BLOCK_M, D] in STAGES; by tensor maps
//     step        one block of BLOCK_M queries of one query head that visits the tile, see VisitingBlocks
//
// A query block's chain runs from its oldest visited tile to the newest, one tile after the other: two floats a row, `state` in
// global memory. Tickets go out tile after tile within a group of heads, and a block takes its tiles in their order, so whoever is
// waited for is under way, or behind tiles that wait for none later, whatever order the hardware starts blocks in. In the tile each
// thread walks its run of keys from the oldest to the newest, with left = stick left after the key:
//
//     A = left e,  x = left dA,  left += A;  a = e x,  dz = beta (x - older sum of a)
//
// The walk starts from the stick left by the tiles done; in a row's oldest visited tile, where the stick may be used up, and in its
// newest one, from what enters from the newer side, divided. dq is summed in global memory, in the chain's order.
//
// Rows beyond M and N, and columns beyond D and Dv up to the kernel's HEAD_DIM, enter as zeros: dout and older sum of rows beyond M too,
// so that nothing comes of them. Needs rows on 16 bytes. Maps of 16-bit elements, swizzled by 128 bytes, for rows of S bytes:
//     q, dout         rows, in boxes [64, 64]
//     k, v, dk, dv    blocks of 64 keys in permuted order, strides S, 16 S, 2 S, in boxes [64, 2, 4, 8]; beyond whole blocks, pairs
#pragma once
#include "hopper_backward_exact.cuh"
#include "hopper_backward_producers.cuh"
#include "hopper_backward_results.cuh"

namespace sbk {
namespace hopper_backward {

template <class C> SBK_FN void consume(const HopperBackwardParams& p, Shared<C>& s, int half) {
  using T = typename C::T;
  using Simple = SimplePath<C::RUN>;
  constexpr int D = C::HEAD_DIM;
  const unsigned base = kept_address(shared_address(&s));

  // Where things lie in shared memory.
  using Here = Shared<C>;
  const unsigned q_tile = base + offsetof(Here, q), dout_tile = base + offsetof(Here, dout), k_tile = base + offsetof(Here, k);
  const unsigned v_tile = base + offsetof(Here, v), weights_tile = base + offsetof(Here, weights) + half * C::HALF_BYTES;
  const unsigned dz_tiles = base + offsetof(Here, dz), dq_tile = base + offsetof(Here, dq) + half * (C::DQ_FLOATS * 4);
  const Barriers barriers = {base + (unsigned)offsetof(Here, barriers), p};
  constexpr int STATE = offsetof(Here, state), NEXT = offsetof(Here, next), EXCESS = offsetof(Here, excess), SUM = offsetof(Here, sum);
  constexpr int SECOND = 8 * ROW_BYTES;  // a thread's second row

  // Operands of the five products. Rows: along k; columns: across it, of the half's keys or, k_columns, the half's part of D.
  constexpr int Q_STAGE = further(C::Q_BYTES), DZ_STAGE = further(2 * C::HALF_BYTES);
  const uint64 q_rows = operand(q_tile, 0), dout_rows = operand(dout_tile, 0);
  const uint64 k_rows = operand(k_tile + half * C::HALF_BYTES, 0);
  const uint64 v_rows = operand(v_tile + half * C::HALF_BYTES, 0);
  const uint64 dz_rows = operand(dz_tiles, 0);
  const uint64 k_columns = operand(k_tile + half * (D == 128 ? C::K_SLAB_BYTES : SLAB_ROW_BYTES / 2), 0);
  const uint64 q_columns = operand(q_tile, C::Q_SLAB_BYTES);
  const uint64 dout_columns = operand(dout_tile, C::Q_SLAB_BYTES);
  const uint64 A_columns = operand(weights_tile, 0), dz_columns = operand(dz_tiles + half * C::HALF_BYTES, 0);
  auto multiply_dq = [&](float (&dq)[D / 4], int stage, uint64 keys) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BLOCK_N / 16; i++)
      wgmma_step<T, ALONG_K, ACROSS_K>(dq, dz_rows + stage * DZ_STAGE + along_k(i, C::HALF_BYTES), k_columns + keys + across_k(i), i);
    wgmma_commit();
  };
  float dk[D / 2], dv[D / 2], e[32], dA[32];
  bool q_ready = false;  // for the next step, asked at the end of the last
  int g = 0;             // steps of all tiles so far
#pragma unroll 1
  for (int t = 0;; t++) {
    const int key_stage = t % C::KEY_STAGES, key_parity = t / C::KEY_STAGES % 2;
    const uint64 keys = key_stage * further(C::K_BYTES);  // what this tile's k and v are further on
    barriers.wait(WORK_FULL + t % 2, t / 2 % 2);
    const int steps = __shfl_sync(ALL_LANES, s.work[t % 2].steps, 0);
    if (steps == 0) break;
    barriers.wait(K_FULL + key_stage, key_parity);
    barriers.wait(V_FULL + key_stage, key_parity);
    bool dz_ready = true;
#pragma unroll 1
    for (int n = 0; n < steps; n++, g++) {
      const int stage = g % C::STAGES, parity = g / C::STAGES % 2, slot = g % C::SLOTS, slot_parity = g / C::SLOTS % 2;

      // dq of two steps ago (before the third: of what is there, and thrown away), then s = q k^T.
      float dq[D / 4];
      barriers.wait_unless(dz_ready, DZ_FULL + stage, parity ^ 1);
      multiply_dq(dq, stage, keys);
      barriers.wait_unless(q_ready, Q_FULL + stage, parity);
      const uint64 q_stage = q_rows + stage * Q_STAGE, dout_stage = dout_rows + stage * Q_STAGE;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < D / 16; i++)
        wgmma_step<T, ALONG_K, ALONG_K>(e, q_stage + along_k(i, C::Q_SLAB_BYTES), k_rows + keys + along_k(i, C::K_SLAB_BYTES), i);
      wgmma_commit();
      const auto [lane, q, row, stored] = Thread(kept(threadIdx.x % 128));
      const bool arriving = arrives(lane);
      const int visible = __shfl_sync(ALL_LANES, load_shared_int(base + (unsigned)offsetof(Here, visible) + stage * 4), 0);
      const bool dout_ready = barriers.ready(DOUT_FULL + stage, parity);
      wgmma_wait<1>();  // dq, and of the last step dv and dk
      barriers.arrive(DOUT_EMPTY + (stage ^ 1), arriving && g >= 1);
      barriers.arrive(Q_EMPTY + (stage ^ 1), arriving && g >= 1);
      barriers.arrive(DZ_EMPTY + stage, arriving && g >= 2);
      if (n >= 2) hand_dq_over<C>(barriers, dq_tile + kept(threadIdx.x % 128) * 16, dq, half, g - 2, lane);
      wgmma_wait<0>();

      // dA = dout v^T and, between its steps, e = 2^s.
      // NOTE: u (1 + e), rounded once, is rounded to either side: e has digits that u has not. A product of two u's is not (math.cuh).
      float u[2] = {1.f, 1.f};
      barriers.wait_unless(dout_ready, DOUT_FULL + stage, parity);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (D == 128 || i % 2 == 0) {
          const int k = i * D / 128;
          wgmma_step<T, ALONG_K, ALONG_K>(dA, dout_stage + along_k(k, C::Q_SLAB_BYTES), v_rows + keys + along_k(k, C::K_SLAB_BYTES), k);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float &e0 = e[element(2 * i, r)], &e1 = e[element(2 * i + 1, r)];
          e0 = ex2(e0 * p.scale_log2);
          e1 = ex2(e1 * p.scale_log2);
          u[r] = fmaf(u[r], e0, u[r]);
          u[r] = fmaf(u[r], e1, u[r]);
        }
      }
      wgmma_commit();
      const bool state_ready = barriers.ready(STATE_FULL + slot, slot_parity), next_free = barriers.ready(NEXT_EMPTY + slot, slot_parity ^ 1);
      if (visible < C::BLOCK_N) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int of_run = visible + Thread(kept(threadIdx.x % 128)).row + r * 8 - half * C::HALF_N - q * C::RUN;
          u[r] = 1.f;
#pragma unroll
          for (int t = 0; t < C::RUN; t++) {
            float& x = e[element(t, r)];
            x = t < of_run ? x : 0.f;
            u[r] = fmaf(u[r], x, u[r]);
          }
        }
      }
      const float excess[2] = {u[0] - 1.f, u[1] - 1.f};

      // Totals of the half, for the other one.
      const unsigned here = base + (slot * C::BLOCK_M + row) * ROW_BYTES;
      const int exact = find_exact_rows(excess, lane);
      HalfScan scans[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const Scan<float> scan = scan_newer<Simple>(excess[r], 3 - q);
        scans[r] = {scan.before, scan.total};
      }
      if (exact) {
        barriers.wait(STATE_FULL + slot, slot_parity);
        const float carry[2] = {load_shared<STATE>(here), load_shared<STATE + SECOND>(here)};
        scan_exactly<C::RUN>(e, scans, exact, carry, q);
      }
      if (q == 0) {
        store_shared<EXCESS>(here + half * 4, scans[0].total);
        store_shared<EXCESS + SECOND>(here + half * 4, scans[1].total);
      }
      __syncwarp();
      barriers.arrive(EXCESS_FULL + half * C::SLOTS + slot, arriving);

      // Where the runs start.
      float start[2], next[2];
      barriers.wait_unless(state_ready, STATE_FULL + slot, slot_parity);
      const float carry[2] = {load_shared<STATE>(here), load_shared<STATE + SECOND>(here)};
      const bool entering = __any_sync(ALL_LANES, carry[0] < 0.f || carry[1] < 0.f);
      barriers.arrive(STATE_EMPTY + slot, half == 1 && arriving);
      float other[2] = {0.f, 0.f};
      if (half == 1 || entering || CHECKED) {
        barriers.wait(EXCESS_FULL + (half ^ 1) * C::SLOTS + slot, slot_parity);
        other[0] = load_shared<EXCESS>(here + (half ^ 1) * 4);
        other[1] = load_shared<EXCESS + SECOND>(here + (half ^ 1) * 4);
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float left = Simple::undo(carry[r], half == 1 ? other[r] : 0.f);
        next[r] = Simple::undo(left, scans[r].total);
        start[r] = Simple::undo(left, scans[r].older);
      }
      if (entering) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float share = exact >> r & 1 ? scans[r].older : Simple::enter(1.f + scans[r].older, scans[r].total);
          const float entered = half == 1 ? -carry[r] : Simple::enter(-carry[r], other[r]);
          next[r] = carry[r] < 0.f ? -carry[r] : next[r];
          start[r] = carry[r] < 0.f ? entered * share : start[r];
        }
      }
      if (half == 1) {
        barriers.wait_unless(next_free, NEXT_EMPTY + slot, slot_parity ^ 1);
        if (q == 0) {
          store_shared<NEXT>(here, next[0]);
          store_shared<NEXT + SECOND>(here, next[1]);
        }
      }
      wgmma_wait<0>();  // dA

      // Walk: A, and x in place of dA.
      if (exact) {
        walk_exactly<T, C::RUN>(e, dA, start, exact, weights_tile + Thread(kept(threadIdx.x % 128)).row * SLAB_ROW_BYTES, lane);
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          unsigned packed[4];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            float A[4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
              const float now = e[element(4 * i + t, r)];
              dA[element(4 * i + t, r)] *= start[r];
              A[t] = start[r] * now;
              start[r] = fmaf(start[r], now, start[r]);
            }
            packed[r] = pack<T>(A[0], A[1]);
            packed[2 + r] = pack<T>(A[2], A[3]);
          }
          store_matrices(weights_tile + (stored ^ i << 5), packed);
        }
      }
      const bool dz_free = barriers.ready(DZ_EMPTY + stage, parity ^ 1);
      fence_async_shared();
      named_sync(OLDER_HALF + half, 128);

      // dv += A^T dout and, between its steps, x less the run's older sum of a in place of x, beta in place of e.
      float sum[2] = {0.f, 0.f};
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        wgmma_add<T, ACROSS_K, ACROSS_K>(dv, A_columns + across_k(i), dout_columns + stage * Q_STAGE + across_k(i), n > 0 || i > 0);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const int at = element(4 * i + j / 2, j % 2);
          const float now = e[at], x = dA[at];
          dA[at] = x - sum[j % 2];
          sum[j % 2] = fmaf(now, x, sum[j % 2]);
          e[at] = now * rcp(1.f + now);
        }
      }
      wgmma_commit();

      // Sums of a: the older runs', and on to the newer half or the next tile.
      const Scan<float> sums[2] = {scan_older(sum[0], q), scan_older(sum[1], q)};
      float before[2];
      if (half == 1) barriers.wait(SUM_FULL + slot, slot_parity);
      const unsigned from = here + (half == 0 ? STATE + 4 : SUM), to = here + (half == 0 ? SUM : NEXT + 4);
      before[0] = load_shared(from);
      before[1] = load_shared<SECOND>(from);
      if (q == 0) {
        store_shared(to, before[0] + sums[0].total);
        store_shared<SECOND>(to, before[1] + sums[1].total);
      }
      __syncwarp();
      barriers.arrive(STATE_EMPTY + slot, half == 0 && arriving);
      barriers.arrive((half == 0 ? SUM_FULL : NEXT_FULL) + slot, arriving);
#pragma unroll
      for (int r = 0; r < 2; r++) before[r] += sums[r].before;

      // dz.
      barriers.wait_unless(dz_free, DZ_EMPTY + stage, parity ^ 1);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        unsigned packed[4];
#pragma unroll
        for (int y = 0; y < 4; y++) {
          const int at = 8 * i + 2 * (y % 2) + 4 * (y / 2);
          packed[y] = pack<T>((dA[at] - before[y % 2]) * e[at], (dA[at + 1] - before[y % 2]) * e[at + 1]);
        }
        store_matrices(dz_tiles + (stage * 2 + half) * C::HALF_BYTES + (stored ^ i << 5), packed);
      }
      dz_ready = g < 1 || barriers.ready(DZ_FULL + (stage ^ 1), (g - 1) / C::STAGES % 2);
      q_ready = barriers.ready(Q_FULL + (stage ^ 1), (g + 1) / C::STAGES % 2);
      fence_async_shared();
      named_sync(OLDER_HALF + half, 128);
      barriers.arrive(DZ_FULL + stage, arriving);

      // dk += dz^T q.
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; i++)
        wgmma_add<T, ACROSS_K, ACROSS_K>(dk, dz_columns + stage * DZ_STAGE + across_k(i), q_columns + stage * Q_STAGE + across_k(i),
                                         n > 0 || i > 0);
      wgmma_commit();
    }

    // dq of the last two steps. There is at least one.
    int m = max(g - 2, g - steps);
#pragma unroll 1
    do {
      float dq[D / 4];
      barriers.wait(DZ_FULL + m % 2, m / 2 % 2);
      multiply_dq(dq, m % 2, keys);
      wgmma_wait<0>();
      hand_dq_over<C>(barriers, dq_tile + threadIdx.x % 128 * 16, dq, half, m, threadIdx.x % 32);
    } while (++m < g);
    store_sums(p, s, s.work[t % 2], key_stage, half, dk, dv);
    barriers.arrive(KEYS_EMPTY + key_stage, threadIdx.x % 128 == 0);
    barriers.arrive(WORK_EMPTY + t % 2, arrives(threadIdx.x % 32));
  }
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
    barrier_init(shared_address(&s.barriers[threadIdx.x]), arrivals_of(threadIdx.x));
    fence_barrier_init();
  }
  if (threadIdx.x == 0) s.patience = PATIENCE;
  __syncthreads();

  if (warp < 8) {
    registers_increase<C::CONSUMER_REGISTERS>();
    consume<C>(p, s, warp / 4);
  } else {
    registers_decrease<C::PRODUCER_REGISTERS>();
    if (warp == 8) load_rows<C>(p, s, lane);
    if (warp == 9) take_state<C>(p, s, lane);
    if (warp == 10) pass_state_on<C>(p, s, lane);
    if (warp == 11) add_dq<C>(p, s, lane);
  }
#endif
}

}  // namespace sbk
