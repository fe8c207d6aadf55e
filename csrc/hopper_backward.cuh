// Backward of stick-breaking attention on Hopper, dq, dk and dv in one pass of five products: equations (8) to (10).
//
//     grid        batch * key heads * N / BLOCK_N blocks of THREADS: one per (key head, key tile), taken by ticket
//     warpgroups  0 and 1: the older and the newer half of the tile's keys, with dk and dv of the half in registers; 2: a warp each
//                 for loads, for state in, for state out and for dq
//     k, v        the tile [BLOCK_N, D], keys permuted within each half (tile.cuh); q, dout [BLOCK_M, D] in STAGES, by tensor maps
//     step        one block of BLOCK_M queries that visits the tile, from the diagonal on, of one query head after the other
//
// A query block's chain runs from its oldest visited tile to the newest, one tile after the other: two floats a row, `state` in
// global memory. Tickets go out tile after tile within a group of heads, so whoever is waited for has started, whatever order the
// hardware starts blocks in. In the tile each thread walks its run of keys from the oldest to the newest, with left = stick left
// after the key:
//
//     A = left e,  x = left dA,  left += A;  a = e x,  dz = beta (x - older sum of a)
//
// The walk starts from the stick left by the tiles done; in a row's oldest visited tile, where the stick may be used up, and in its
// newest one, from what enters from the newer side, divided. dq is summed in global memory, in the chain's order.
//
// Needs M = N, a multiple of BLOCK_N; D = Dv; rows on 16 bytes. Maps of 16-bit elements, swizzled
// by 128 bytes, for C = D * heads_in_row columns and rows of S bytes:
//     q, dout         3 dimensions [C, N, rest], box [64, 64, 1]
//     k, v, dk, dv    5 dimensions [C, 2, 4, N / 2, rest], strides S, 16 S, 2 S, box [64, 2, 4, 8, 1]: 64 keys in permuted order
#pragma once
#include "hopper_backward_exact.cuh"
#include "hopper_backward_producers.cuh"

namespace sbk {
namespace hopper_backward {

// A block's half of dq to the warp that adds it up.
template <class C> SBK_FN void hand_dq_over(const Barriers& barriers, unsigned to, const float (&dq)[C::HEAD_DIM / 4], int half, int n, int lane) {
  barriers.wait(DQ_EMPTY + half, n % 2 ^ 1);
#pragma unroll
  for (int j = 0; j < C::HEAD_DIM / 16; j++)
    store_shared(to + j * 128 * 16, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
  __syncwarp();
  if (lane == 0) barriers.arrive(DQ_FULL + half);
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
  const Barriers barriers = {base + (unsigned)offsetof(Here, barriers), p.error};
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
  auto multiply_dq = [&](float (&dq)[D / 4], int stage) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BLOCK_N / 16; i++)
      wgmma_step<T, ALONG_K, ACROSS_K>(dq, dz_rows + stage * DZ_STAGE + along_k(i, C::HALF_BYTES), k_columns + across_k(i), i);
    wgmma_commit();
  };
  float dk[D / 2], dv[D / 2], e[32], dA[32];
  barriers.wait(K_FULL, 0);
  barriers.wait(V_FULL, 0);

#pragma unroll 1
  for (int n = 0; n < s.work.steps; n++) {
    const auto [lane, q, row, stored] = Thread(kept(threadIdx.x % 128));
    const bool first_lane = lane == 0;
    const int stage = n % C::STAGES, parity = n / C::STAGES % 2, slot = n % C::SLOTS, slot_parity = n / C::SLOTS % 2;

    // dq of two steps ago (before the third: of what is there, and thrown away), then s = q k^T.
    float dq[D / 4];
    if (n >= 2) barriers.wait(DZ_FULL + stage, parity ^ 1);
    multiply_dq(dq, stage);
    barriers.wait(Q_FULL + stage, parity);
    const uint64 q_stage = q_rows + stage * Q_STAGE, dout_stage = dout_rows + stage * Q_STAGE;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++)
      wgmma_step<T, ALONG_K, ALONG_K>(e, q_stage + along_k(i, C::Q_SLAB_BYTES), k_rows + along_k(i, C::K_SLAB_BYTES), i);
    wgmma_commit();
    const int off_diagonal = __shfl_sync(ALL_LANES, load_shared_int(base + (unsigned)offsetof(Here, off_diagonal) + stage * 4), 0);
    wgmma_wait<1>();  // dq, and of the last step dv and dk
    if (first_lane && n >= 1) {
      barriers.arrive(DOUT_EMPTY + (stage ^ 1));
      barriers.arrive(Q_EMPTY + (stage ^ 1));
      if (n >= 2) barriers.arrive(DZ_EMPTY + stage);
    }
    if (n >= 2) hand_dq_over<C>(barriers, dq_tile + kept(threadIdx.x % 128) * 16, dq, half, n - 2, lane);
    wgmma_wait<0>();

    // dA = dout v^T and, between its steps, e = 2^s.
    float excess[2] = {0.f, 0.f};
    barriers.wait(DOUT_FULL + stage, parity);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (D == 128 || i % 2 == 0) {
        const int k = i * D / 128;
        wgmma_step<T, ALONG_K, ALONG_K>(dA, dout_stage + along_k(k, C::Q_SLAB_BYTES), v_rows + along_k(k, C::K_SLAB_BYTES), k);
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float &e0 = e[element(2 * i, r)], &e1 = e[element(2 * i + 1, r)];
        e0 = ex2(e0 * p.scale_log2);
        e1 = ex2(e1 * p.scale_log2);
        excess[r] = Simple::combine(excess[r], Simple::combine(e0, e1));
      }
    }
    wgmma_commit();
    if (off_diagonal < 2) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int visible = off_diagonal * C::BLOCK_M + Thread(kept(threadIdx.x % 128)).row + r * 8 + p.shape.attend_current - half * C::HALF_N - q * C::RUN;
        excess[r] = 0.f;
#pragma unroll
        for (int t = 0; t < C::RUN; t++) {
          float& x = e[element(t, r)];
          x = t < visible ? x : 0.f;
          excess[r] = Simple::combine(excess[r], x);
        }
      }
    }

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
    if (first_lane) barriers.arrive(EXCESS_FULL + half * C::SLOTS + slot);

    // Where the runs start.
    float start[2], next[2];
    barriers.wait(STATE_FULL + slot, slot_parity);
    const float carry[2] = {load_shared<STATE>(here), load_shared<STATE + SECOND>(here)};
    const bool entering = __any_sync(ALL_LANES, carry[0] < 0.f || carry[1] < 0.f);
    if (half == 1 && first_lane) barriers.arrive(STATE_EMPTY + slot);
    float other[2] = {0.f, 0.f};
    if (half == 1 || entering) {
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
      barriers.wait(NEXT_EMPTY + slot, slot_parity ^ 1);
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
    if (first_lane) {
      if (half == 0) barriers.arrive(STATE_EMPTY + slot);
      barriers.arrive((half == 0 ? SUM_FULL : NEXT_FULL) + slot);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) before[r] += sums[r].before;

    // dz.
    barriers.wait(DZ_EMPTY + stage, parity ^ 1);
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
    fence_async_shared();
    named_sync(OLDER_HALF + half, 128);
    if (first_lane) barriers.arrive(DZ_FULL + stage);

    // dk += dz^T q.
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++)
      wgmma_add<T, ACROSS_K, ACROSS_K>(dk, dz_columns + stage * DZ_STAGE + across_k(i), q_columns + stage * Q_STAGE + across_k(i),
                                       n > 0 || i > 0);
    wgmma_commit();
  }

  // dq of the last two steps.
#pragma unroll 1
  for (int n = s.work.steps - 2; n < s.work.steps; n++) {
    float dq[D / 4];
    barriers.wait(DZ_FULL + n % 2, n / 2 % 2);
    multiply_dq(dq, n % 2);
    wgmma_wait<0>();
    hand_dq_over<C>(barriers, dq_tile + threadIdx.x % 128 * 16, dq, half, n, threadIdx.x % 32);
  }

  // Store dv through the half's rows of v, which only its own products read, dk through a stage of q; the maps put keys in order.
  const unsigned stored = Thread(threadIdx.x % 128).stored;
  const unsigned dv_tile = v_tile + half * C::HALF_BYTES, dk_tile = q_tile + half * C::Q_BYTES;
  stage_sums<C>(dv_tile, C::K_SLAB_BYTES, stored, dv, 1.f);
  named_sync(BOTH_HALVES, 256);  // both are done with q
  stage_sums<C>(dk_tile, C::Q_SLAB_BYTES, stored, dk, p.shape.scale);
  fence_async_shared();
  named_sync(OLDER_HALF + half, 128);
  if (threadIdx.x % 128 == 0) {
    const int head = s.work.key_head, keys = s.work.tile * (C::BLOCK_N / 2) + half * (C::HALF_N / 2);
    for (int i = 0; i < C::SLABS; i++) {
      const int column = i * SLAB_COLUMNS;
      store_box(dv_tile + i * C::K_SLAB_BYTES, &p.dv.map, column_of(p.dv, head, D) + column, 0, 0, keys, place_of(p.dv, head));
      store_box(dk_tile + i * C::Q_SLAB_BYTES, &p.dk.map, column_of(p.dk, head, D) + column, 0, 0, keys, place_of(p.dk, head));
    }
    bulk_commit();
    bulk_wait<0>();
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

  // Set barriers up and draw a ticket.
  if (threadIdx.x < BARRIERS) {
    barrier_init(shared_address(&s.barriers[threadIdx.x]), arrivals_of(threadIdx.x));
    fence_barrier_init();
  }
  if (threadIdx.x == 0) {
    s.patience = PATIENCE;
    s.ticket = atomicAdd(p.ticket, 1);
  }
  __syncthreads();

  // Find this block's tile, and count its steps.
  const int tiles = p.shape.keys / C::BLOCK_N, blocks = p.shape.queries / C::BLOCK_M;
  const int ticket = __shfl_sync(ALL_LANES, s.ticket, 0), group = ticket / (p.heads_per_group * tiles);
  const int heads = min(p.heads_per_group, p.shape.batch * p.shape.heads / p.shape.group - group * p.heads_per_group);
  const int in_group = ticket - group * p.heads_per_group * tiles, key_head = group * p.heads_per_group + in_group % heads;
  const int tile = in_group / heads, first_block = tile * (C::BLOCK_N / C::BLOCK_M), visiting = p.shape.group * (blocks - first_block);
  Work work = {key_head, key_head * p.shape.group, tile, first_block, 0};
  const int* oldest = p.block_oldest + work.first_head * blocks + first_block;
  for (int i = threadIdx.x; i - (int)threadIdx.x < visiting; i += C::THREADS)
    work.steps += __syncthreads_count(i < visiting && oldest[i / (blocks - first_block) * blocks + i % (blocks - first_block)] <= tile);
  if (threadIdx.x == 0) s.work = work;
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
