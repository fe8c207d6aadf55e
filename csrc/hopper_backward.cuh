// Backward of stick-breaking attention on Hopper, dq, dk and dv in one pass of five products: equations (8) to (10).
//
//     grid        batch * heads * N / BLOCK_N blocks of THREADS: one per (head, key tile), taken by ticket
//     warpgroups  0 and 1: the older and the newer half of the tile's keys, with dk and dv of the half in registers; 2: a warp each
//                 for loads, for state in, for state out and for dq
//     k, v        the tile [BLOCK_N, D], keys permuted within each half (tile.cuh); q, dout [BLOCK_M, D] in STAGES, by tensor maps
//     step        one block of BLOCK_M queries that visits the tile, from the diagonal on
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
// Needs M = N, a multiple of BLOCK_N; D = Dv; a key head for each query head; rows on 16 bytes. Maps of 16-bit elements, swizzled
// by 128 bytes, for C = D * heads_in_row columns and rows of S bytes:
//     q, dout         3 dimensions [C, N, rest], box [64, 64, 1]
//     k, v, dk, dv    5 dimensions [C, 2, 4, N / 2, rest], strides S, 16 S, 2 S, box [64, 2, 4, 8, 1]: 64 keys in permuted order
#pragma once
#include "hopper_backward_exact.cuh"
#include "hopper_backward_producers.cuh"

namespace sbk {
namespace hopper_backward {

// A block's half of dq to the warp that adds it up.
template <class C> SBK_FN void hand_dq_over(Shared<C>& s, const float (&dq)[C::HEAD_DIM / 4], int half, int n, int* error) {
  wait(s, DQ_EMPTY + half, n % 2 ^ 1, error);
  float4* to = reinterpret_cast<float4*>(s.dq[half]) + threadIdx.x % 128;
#pragma unroll
  for (int j = 0; j < C::HEAD_DIM / 16; j++) to[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
  fence_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(s, DQ_FULL + half);
}

// Accumulator [HALF_N, D] times scale, rounded, to slabs slab_bytes apart; `stored` as in consume().
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
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4, row = warp * 16 + lane / 4;
  const bool first_lane = lane == 0;
  const float scale_log2 = p.shape.scale * LOG2_E;
  auto wait_for = [&](int barrier, int parity) { wait(s, barrier, parity, p.error); };

  // Operands of the five products. Rows: along k; columns: across it, of the half's keys or, k_columns, the half's part of D.
  constexpr int Q_STAGE = further(C::Q_BYTES), DZ_STAGE = further(2 * C::HALF_BYTES);
  const uint64 q_rows = operand(shared_address(s.q), 0), dout_rows = operand(shared_address(s.dout), 0);
  const uint64 k_rows = operand(shared_address(s.k) + half * C::HALF_BYTES, 0);
  const uint64 v_rows = operand(shared_address(s.v) + half * C::HALF_BYTES, 0);
  const uint64 dz_rows = operand(shared_address(s.dz), 0);
  const uint64 k_columns = operand(shared_address(s.k) + half * (D == 128 ? C::K_SLAB_BYTES : SLAB_ROW_BYTES / 2), 0);
  const uint64 q_columns = operand(shared_address(s.q), C::Q_SLAB_BYTES);
  const uint64 dout_columns = operand(shared_address(s.dout), C::Q_SLAB_BYTES);
  const uint64 A_columns = operand(shared_address(s.weights[half]), 0), dz_columns = operand(shared_address(s.dz[0][half]), 0);
  auto multiply_dq = [&](float (&dq)[D / 4], int stage) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BLOCK_N / 16; i++)
      wgmma_step<T, ALONG_K, ACROSS_K>(dq, dz_rows + stage * DZ_STAGE + along_k(i, C::HALF_BYTES), k_columns + across_k(i), i);
    wgmma_commit();
  };
  // A lane's place for store_matrices: row lane % 16 of the warp's, and there the piece lane / 16, swizzled. 16 columns on are 32
  // bytes, added without carry.
  const unsigned stored = (warp * 16 + lane % 16) * SLAB_ROW_BYTES + ((lane / 16 ^ lane % 8) << 4);

  float dk[D / 2], dv[D / 2], e[32], dA[32];
  wait_for(K_FULL, 0);
  wait_for(V_FULL, 0);

#pragma unroll 1
  for (int n = 0; n < s.work.steps; n++) {
    const int stage = n % C::STAGES, parity = n / C::STAGES % 2, slot = n % C::SLOTS, slot_parity = n / C::SLOTS % 2;

    // dq of two steps ago (before the third: of what is there, and thrown away), then s = q k^T.
    float dq[D / 4];
    if (n >= 2) wait_for(DZ_FULL + stage, parity ^ 1);
    multiply_dq(dq, stage);
    wait_for(Q_FULL + stage, parity);
    const uint64 q_stage = q_rows + stage * Q_STAGE, dout_stage = dout_rows + stage * Q_STAGE;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++)
      wgmma_step<T, ALONG_K, ALONG_K>(e, q_stage + along_k(i, C::Q_SLAB_BYTES), k_rows + along_k(i, C::K_SLAB_BYTES), i);
    wgmma_commit();
    wgmma_wait<1>();  // dq, and of the last step dv and dk
    if (first_lane && n >= 1) {
      arrive(s, DOUT_EMPTY + (stage ^ 1));
      arrive(s, Q_EMPTY + (stage ^ 1));
      if (n >= 2) arrive(s, DZ_EMPTY + stage);
    }
    if (n >= 2) hand_dq_over<C>(s, dq, half, n - 2, p.error);
    wgmma_wait<0>();

    // dA = dout v^T and, between its steps, e = 2^s.
    float excess[2] = {0.f, 0.f};
    wait_for(DOUT_FULL + stage, parity);
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
        e0 = ex2(e0 * scale_log2);
        e1 = ex2(e1 * scale_log2);
        excess[r] = Simple::combine(excess[r], Simple::combine(e0, e1));
      }
    }
    wgmma_commit();
    if (n < 2) {  // on the diagonal
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int visible = n * C::BLOCK_M + row + r * 8 + p.shape.attend_current - half * C::HALF_N - q * C::RUN;
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
    const int exact = find_exact_rows(excess, lane);
    HalfScan scans[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Scan<float> scan = scan_newer<Simple>(excess[r], 3 - q);
      scans[r] = {scan.before, scan.total};
    }
    if (exact) {
      wait_for(STATE_FULL + slot, slot_parity);
      const float carry[2] = {s.state[slot][row].x, s.state[slot][row + 8].x};
      scan_exactly<C::RUN>(e, scans, exact, carry, q);
    }
    if (q == 0) {
#pragma unroll
      for (int r = 0; r < 2; r++) s.excess[slot][half][row + r * 8] = scans[r].total;
    }
    __syncwarp();
    if (first_lane) arrive(s, EXCESS_FULL + half * C::SLOTS + slot);

    // Where the runs start.
    float start[2], next[2];
    wait_for(STATE_FULL + slot, slot_parity);
    const float carry[2] = {s.state[slot][row].x, s.state[slot][row + 8].x};
    const bool entering = __any_sync(0xffffffffu, carry[0] < 0.f || carry[1] < 0.f);
    if (half == 1 && first_lane) arrive(s, STATE_EMPTY + slot);
    if (half == 1 || entering) wait_for(EXCESS_FULL + (half ^ 1) * C::SLOTS + slot, slot_parity);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float other = half == 1 || entering ? s.excess[slot][half ^ 1][row + r * 8] : 0.f;
      if (carry[r] < 0.f) {
        next[r] = -carry[r];
        const float share = exact >> r & 1 ? scans[r].older : Simple::enter(1.f + scans[r].older, scans[r].total);
        start[r] = (half == 1 ? next[r] : Simple::enter(next[r], other)) * share;
      } else {
        const float left = half == 1 ? Simple::undo(carry[r], other) : carry[r];
        next[r] = Simple::undo(left, scans[r].total);
        start[r] = Simple::undo(left, scans[r].older);
      }
    }
    if (half == 1) {
      wait_for(NEXT_EMPTY + slot, slot_parity ^ 1);
      if (q == 0) {
#pragma unroll
        for (int r = 0; r < 2; r++) s.next[slot][row + r * 8].x = next[r];
      }
    }
    wgmma_wait<0>();  // dA

    // Walk: A, and x in place of dA.
    if (exact) {
      walk_exactly<T, C::RUN>(e, dA, start, exact, shared_address(s.weights[half]) + row * SLAB_ROW_BYTES, lane);
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
        store_matrices(shared_address(s.weights[half]) + (stored ^ i << 5), packed);
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
    if (half == 1) wait_for(SUM_FULL + slot, slot_parity);
#pragma unroll
    for (int r = 0; r < 2; r++) before[r] = half == 0 ? s.state[slot][row + r * 8].y : s.sum[slot][row + r * 8];
    if (q == 0) {
#pragma unroll
      for (int r = 0; r < 2; r++) (half == 0 ? s.sum[slot][row + r * 8] : s.next[slot][row + r * 8].y) = before[r] + sums[r].total;
    }
    __syncwarp();
    if (first_lane) {
      if (half == 0) arrive(s, STATE_EMPTY + slot);
      arrive(s, (half == 0 ? SUM_FULL : NEXT_FULL) + slot);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) before[r] += sums[r].before;

    // dz.
    wait_for(DZ_EMPTY + stage, parity ^ 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      unsigned packed[4];
#pragma unroll
      for (int y = 0; y < 4; y++) {
        const int at = 8 * i + 2 * (y % 2) + 4 * (y / 2);
        packed[y] = pack<T>((dA[at] - before[y % 2]) * e[at], (dA[at + 1] - before[y % 2]) * e[at + 1]);
      }
      store_matrices(shared_address(s.dz[stage][half]) + (stored ^ i << 5), packed);
    }
    fence_async_shared();
    named_sync(OLDER_HALF + half, 128);
    if (threadIdx.x % 128 == 0) arrive(s, DZ_FULL + stage);

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
    wait_for(DZ_FULL + n % 2, n / 2 % 2);
    multiply_dq(dq, n % 2);
    wgmma_wait<0>();
    hand_dq_over<C>(s, dq, half, n, p.error);
  }

  // Store dv through the half's rows of v, which only its own products read, dk through a stage of q; the maps put keys in order.
  const unsigned dv_tile = shared_address(s.v) + half * C::HALF_BYTES, dk_tile = shared_address(s.q[half]);
  stage_sums<C>(dv_tile, C::K_SLAB_BYTES, stored, dv, 1.f);
  named_sync(BOTH_HALVES, 256);  // both are done with q
  stage_sums<C>(dk_tile, C::Q_SLAB_BYTES, stored, dk, p.shape.scale);
  fence_async_shared();
  named_sync(OLDER_HALF + half, 128);
  if (threadIdx.x % 128 == 0) {
    const int head = s.work.head, keys = s.work.tile * (C::BLOCK_N / 2) + half * (C::HALF_N / 2);
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
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

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
  const int ticket = __shfl_sync(0xffffffffu, s.ticket, 0), group = ticket / (p.heads_per_group * tiles);
  const int heads = min(p.heads_per_group, p.shape.batch * p.shape.heads - group * p.heads_per_group);
  const int in_group = ticket - group * p.heads_per_group * tiles;
  Work work = {group * p.heads_per_group + in_group % heads, in_group / heads, in_group / heads * (C::BLOCK_N / C::BLOCK_M), 0};
  const int* oldest = p.block_oldest + (int64)work.head * blocks;
  for (int block = work.first_block + threadIdx.x; block - (int)threadIdx.x < blocks; block += C::THREADS)
    work.steps += __syncthreads_count(block < blocks && oldest[block] <= work.tile);
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
