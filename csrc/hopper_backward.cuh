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
// Where the walk starts: a row's stick left by the tiles done, or in its oldest visited tile, where the stick may be used up, and in its
// newest one, what enters from the newer side, divided. dq is summed in global memory, in the chain's order.
//
// Needs M = N, a multiple of BLOCK_N; D = Dv; one query head for each key head; rows on 16 bytes. Maps of 16-bit elements, swizzled by
// 128 bytes, for C = D * heads_in_row columns and rows of S bytes:
//     q, dout         3 dimensions [C, N, rest], box [64, 64, 1]
//     k, v, dk, dv    5 dimensions [C, 2, 4, N / 2, rest], strides S, 16 S, 2 S, box [64, 2, 4, 8, 1]: 64 keys in permuted order
#pragma once
#include "hopper.cuh"
#include "hopper_backward_dq.cuh"

namespace sbk {

template <typename T_, int HEAD_DIM_> struct HopperBackwardConfig {
  using T = T_;
  static constexpr int HEAD_DIM = HEAD_DIM_, BLOCK_M = HOPPER_BLOCK_M, BLOCK_N = HOPPER_BLOCK_N;
  static constexpr int HALF_N = BLOCK_N / 2, RUN = HALF_N / 4, SLABS = HEAD_DIM / SLAB_COLUMNS;
  static constexpr int THREADS = 384, CONSUMER_REGISTERS = 240, PRODUCER_REGISTERS = 24;
  static constexpr int STAGES = 2, SLOTS = 4;  // of q and dout; of state
  static constexpr int Q_SLAB_BYTES = BLOCK_M * SLAB_ROW_BYTES, K_SLAB_BYTES = BLOCK_N * SLAB_ROW_BYTES;
  static constexpr int Q_BYTES = SLABS * Q_SLAB_BYTES, K_BYTES = SLABS * K_SLAB_BYTES;
  static constexpr int HALF_BYTES = HALF_N * SLAB_ROW_BYTES;       // half the keys of a slab, and [BLOCK_M, HALF_N] of A or dz
  static constexpr int DQ_FLOATS = BLOCK_M * HEAD_DIM / 2;         // what a warpgroup computes of a block's dq
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128);
};

// Barriers: FULL when something is there to be read, EMPTY when its place may be written again.
enum HopperBackwardBarrier {
  K_FULL, V_FULL,
  Q_FULL, Q_EMPTY = Q_FULL + 2, DOUT_FULL = Q_EMPTY + 2, DOUT_EMPTY = DOUT_FULL + 2,  // by stage
  DZ_FULL = DOUT_EMPTY + 2, DZ_EMPTY = DZ_FULL + 2,                                   // by stage
  DQ_FULL = DZ_EMPTY + 2, DQ_EMPTY = DQ_FULL + 2,                                     // by half
  STATE_FULL = DQ_EMPTY + 2, STATE_EMPTY = STATE_FULL + 4,                            // by slot
  EXCESS_FULL = STATE_EMPTY + 4,                                                      // by half, slot
  SUM_FULL = EXCESS_FULL + 8, NEXT_FULL = SUM_FULL + 4, NEXT_EMPTY = NEXT_FULL + 4,   // by slot
  BARRIERS = NEXT_EMPTY + 4,
  STATE_TURN, DQ_TURN  // waits for other blocks, for error codes only
};
SBK_FN int arrivals_of(int barrier) {
  const bool by_both_halves = (barrier >= Q_EMPTY && barrier < DOUT_FULL) || (barrier >= DOUT_EMPTY && barrier < DZ_FULL) ||
                              (barrier >= DZ_EMPTY && barrier < DQ_FULL) || (barrier >= STATE_EMPTY && barrier < EXCESS_FULL);
  const bool by_one_half = (barrier >= DQ_FULL && barrier < DQ_EMPTY) || (barrier >= EXCESS_FULL && barrier < NEXT_EMPTY);
  return by_both_halves ? 8 : by_one_half ? 4 : barrier >= DZ_FULL && barrier < DZ_EMPTY ? 2 : 1;  // warps
}
enum HopperBackwardNamedBarrier { ALL_THREADS, OLDER_HALF, NEWER_HALF, BOTH_HALVES };

struct HopperBackwardWork {
  int head, tile, first_block, steps;
};

template <class C> struct alignas(SWIZZLE_BYTES) HopperBackwardShared {
  char k[C::K_BYTES], v[C::K_BYTES], q[C::STAGES][C::Q_BYTES], dout[C::STAGES][C::Q_BYTES];
  char weights[2][C::HALF_BYTES], dz[C::STAGES][2][C::HALF_BYTES];  // [half]
  float dq[2][C::DQ_FLOATS];                                        // [half]: in the order of the product's registers
  float2 state[C::SLOTS][C::BLOCK_M];      // carry (see encode_carry), dr r + sum of a over the older tiles
  float2 next[C::SLOTS][C::BLOCK_M];       // the same for the next tile; carry 0: the row's stays as it is
  float excess[C::SLOTS][2][C::BLOCK_M];   // of each half: its product of all u, less 1
  float sum[C::SLOTS][C::BLOCK_M];         // dr r + sum of a over the older tiles and the older half
  Barrier barriers[BARRIERS];
  int ticket, patience;
  HopperBackwardWork work;  // here too, since the consumers have no registers for it
};

// A wait that runs out is given up after this many tries, about a microsecond each.
constexpr int PATIENCE = 1 << 22;
// NOTE: such a wait is reported and passed, with all later ones of this block cut short: a trap would keep the compiler from giving
// the consumers more registers than a thread starts with.
template <class S> SBK_FN void give_up(S& s, int barrier, int* error) {
  *(volatile int*)&s.patience = 1;
  atomicCAS(error, 0, barrier + 1);
}
template <class S> SBK_FN void wait(S& s, int barrier, int parity, int* error) {
  const unsigned address = shared_address(&s.barriers[barrier]);
  if (barrier_try_wait(address, parity)) return;
  if (!barrier_wait(address, parity, *(volatile int*)&s.patience)) give_up(s, barrier, error);
}
template <class S> SBK_FN void wait_for_turn(S& s, const int* turn, int tile, int barrier, int* error) {
  for (int i = 0; load_acquire(turn) < tile; i++) {
    if (i >= *(volatile int*)&s.patience) return give_up(s, barrier, error);
    if (i > 100) __nanosleep(500);
  }
}
template <class S> SBK_FN void arrive(S& s, int barrier) { barrier_arrive(shared_address(&s.barriers[barrier])); }

// Walks over the query blocks that visit the tile, by a whole warp, 32 at a time.
struct VisitingBlocks {
  const int* oldest;  // of the head's query blocks
  int base, end, tile;
  unsigned mask;

  SBK_FN VisitingBlocks(const HopperBackwardParams& p, const HopperBackwardWork& work) {
    end = p.shape.queries / HOPPER_BLOCK_M;
    oldest = p.block_oldest + (int64)work.head * end;
    base = work.first_block - 32;
    tile = work.tile;
    mask = 0;
  }
  SBK_FN int next(int lane) {
    while (mask == 0 && base < end) {
      base += 32;
      mask = __ballot_sync(0xffffffffu, base + lane < end && oldest[base + lane] <= tile);
    }
    const int block = base + __ffs(mask) - 1;
    mask &= mask - 1;
    return block;
  }
};

// ---- The producers' warps ----

template <class C> SBK_FN void load_rows(const HopperBackwardParams& p, HopperBackwardShared<C>& s, int lane) {
  const HopperBackwardWork work = s.work;
  auto load_half_keys = [&](const MappedTensor& x, char* tile, int barrier) {
    const unsigned full = shared_address(&s.barriers[barrier]);
    barrier_arrive_expecting(full, C::K_BYTES);
    for (int i = 0; i < 2 * C::SLABS; i++)
      load_box(shared_address(tile) + i * C::HALF_BYTES, &x.map, full, work.head % x.heads_in_row * C::HEAD_DIM + i / 2 * SLAB_COLUMNS, 0, 0,
               work.tile * (C::BLOCK_N / 2) + i % 2 * (C::HALF_N / 2), work.head / x.heads_in_row);
  };
  auto load_queries = [&](const MappedTensor& x, char (&tiles)[C::STAGES][C::Q_BYTES], int n, int block, int full, int empty) {
    const int stage = n % C::STAGES;
    const unsigned barrier = shared_address(&s.barriers[full + stage]);
    wait(s, empty + stage, n / C::STAGES % 2 ^ 1, p.error);
    barrier_arrive_expecting(barrier, C::Q_BYTES);
    for (int i = 0; i < C::SLABS; i++)
      load_box(shared_address(tiles[stage]) + i * C::Q_SLAB_BYTES, &x.map, barrier,
               work.head % x.heads_in_row * C::HEAD_DIM + i * SLAB_COLUMNS, block * C::BLOCK_M, work.head / x.heads_in_row);
  };
  VisitingBlocks blocks(p, work);
  int block = blocks.next(lane);
  if (lane == 0) {
    load_half_keys(p.k, s.k, K_FULL);
    load_queries(p.q, s.q, 0, block, Q_FULL, Q_EMPTY);
    load_half_keys(p.v, s.v, V_FULL);
  }
  for (int n = 0; n < work.steps; n++) {  // a step ahead with q
    const int after = n + 1 < work.steps ? blocks.next(lane) : 0;
    if (lane == 0) {
      load_queries(p.dout, s.dout, n, block, DOUT_FULL, DOUT_EMPTY);
      if (n + 1 < work.steps) load_queries(p.q, s.q, n + 1, after, Q_FULL, Q_EMPTY);
    }
    block = after;
  }
}

// What a row's walk starts from, in one number: > 0 the stick left by the tiles done; < 0 less the stick on entry from the newer side,
// which is whole in the newest tile and what the forward kept in the oldest; 0: the row's stick does not reach this tile.
SBK_FN float encode_carry(float carry, int oldest_tile, int tile, bool newest) {
  return newest ? -1.f : tile < oldest_tile ? 0.f : tile == oldest_tile ? -carry : carry;
}

template <class C> SBK_FN void take_state(const HopperBackwardParams& p, HopperBackwardShared<C>& s, int lane) {
  const HopperBackwardWork work = s.work;
  VisitingBlocks blocks(p, work);
  for (int n = 0; n < work.steps; n++) {
    const int slot = n % C::SLOTS, block = blocks.next(lane);
    const int64 index = (int64)work.head * blocks.end + block, rows = index * (C::BLOCK_M / 2) + lane;  // two a lane
    wait(s, STATE_EMPTY + slot, n / C::SLOTS % 2 ^ 1, p.error);
    const int2 oldest = reinterpret_cast<const int2*>(p.oldest_tile)[rows];
    wait_for_turn(s, p.state_turn + index, work.tile, STATE_TURN, p.error);
    __syncwarp();
    const float4 x = __ldcg(reinterpret_cast<const float4*>(p.state) + rows);
    reinterpret_cast<float4*>(s.state[slot])[lane] = make_float4(encode_carry(x.x, oldest.x, work.tile, n < 2), x.y,
                                                                 encode_carry(x.z, oldest.y, work.tile, n < 2), x.w);
    __syncwarp();
    if (lane == 0) arrive(s, STATE_FULL + slot);
  }
}

template <class C> SBK_FN void pass_state_on(const HopperBackwardParams& p, HopperBackwardShared<C>& s, int lane) {
  const HopperBackwardWork work = s.work;
  VisitingBlocks blocks(p, work);
  for (int n = 0; n < work.steps; n++) {
    const int slot = n % C::SLOTS;
    const int64 index = (int64)work.head * blocks.end + blocks.next(lane);
    wait(s, NEXT_FULL + slot, n / C::SLOTS % 2, p.error);
    const float4 x = reinterpret_cast<const float4*>(s.next[slot])[lane];
    float2* rows = reinterpret_cast<float2*>(p.state) + index * C::BLOCK_M + 2 * lane;
    if (x.x != 0.f) __stcg(rows, make_float2(x.x, x.y));
    if (x.z != 0.f) __stcg(rows + 1, make_float2(x.z, x.w));
    __syncwarp();
    if (lane == 0) {
      arrive(s, NEXT_EMPTY + slot);
      store_release(p.state_turn + index, work.tile + 1);
    }
  }
}

// The first tile of a query block stores its part of dq, the others add theirs in turn, so that sums are the same each time.
template <class C> SBK_FN void add_dq(const HopperBackwardParams& p, HopperBackwardShared<C>& s, int lane) {
  const HopperBackwardWork work = s.work;
  VisitingBlocks blocks(p, work);
  for (int n = 0; n < work.steps; n++) {
    const int block = blocks.next(lane);
    if (lane == 0) {
      const int64 index = (int64)work.head * blocks.end + block;
      const bool first = blocks.oldest[block] == work.tile;
      float* sum = p.dq_sum + index * (2 * C::DQ_FLOATS);
      wait_for_turn(s, p.dq_turn + index, work.tile, DQ_TURN, p.error);
      fence_async_global();
      for (int half = 0; half < 2; half++, sum += C::DQ_FLOATS) {
        wait(s, DQ_FULL + half, n % 2, p.error);
        if (first)
          store_bulk(sum, shared_address(s.dq[half]), C::DQ_FLOATS * 4);
        else
          reduce_add(sum, shared_address(s.dq[half]), C::DQ_FLOATS * 4);
        bulk_commit();
        bulk_wait_read<0>();
        arrive(s, DQ_EMPTY + half);
      }
      bulk_wait<0>();
      fence_async_global();
      store_release(p.dq_turn + index, work.tile + 1);
    }
    __syncwarp();
  }
}

// ---- A warpgroup's half of the tile ----

// Where key t of the run of a thread's row r lies among the 32 elements of its accumulator.
SBK_FN constexpr int element(int t, int r) { return t / 2 * 4 + 2 * r + t % 2; }

// A half's 4 runs of a row.
struct HalfScan {
  float older;  // excess of the runs older than the lane's; of exact rows what a walk from the newest key starts from: see scan_exactly
  float total;  // excess of all 4
};

// Rows (bits) of this quad whose runs are not all simple; bit 2: some row of the warp is such.
SBK_FN int find_exact_rows(const float (&excess)[2], int lane) {
  if (__all_sync(0xffffffffu, excess[0] < SIMPLE_LIMIT && excess[1] < SIMPLE_LIMIT)) return 0;
  int found = 4;
#pragma unroll
  for (int r = 0; r < 2; r++) found |= (__ballot_sync(0xffffffffu, !(excess[r] < SIMPLE_LIMIT)) >> (lane & 28) & 15) != 0 ? 1 << r : 0;
  return found;
}

// An exact path's product of 1 - beta as an excess. That of a used-up stick is still finite, so that 0 times it is 0.
SBK_FN float excess_of(float rest) { return rest < MIN_STICK * MIN_STICK ? 1.7e38f : rcp(rest) - 1.f; }

// The exact rows' e, cut, and their scans: `older` is for rows whose carry is < 0 the share of the stick on entry of the half that the
// newer runs leave, and for others the excess of the older runs and the lane's own.
template <int R> SBK_FN void scan_exactly(float (&e)[2 * R], HalfScan (&scans)[2], int exact, const float (&carry)[2], int q) {
  using Path = ExactPath<R>;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    LinearRun<R> run;
#pragma unroll
    for (int t = 0; t < R; t++) run.e[t] = e[element(t, r)];
    const float rest = Path::total(run);
    const Scan newer = scan_newer<Path>(rest, q), older = scan_newer<Path>(rest, 3 - q);
    if (exact >> r & 1) {
      scans[r] = {carry[r] < 0.f ? newer.before : excess_of(older.before * rest), excess_of(newer.total)};
#pragma unroll
      for (int t = 0; t < R; t++) e[element(t, r)] = run.e[t];
    }
  }
}

// What the walk in consume() does, where rows of the warp are exact: those are walked from the newest key, as ExactPath::weights does.
// weights: of the lane's first row, piece 0, before the swizzle.
template <typename T, int R> SBK_FN void walk_exactly(const float (&e)[2 * R], float (&dA)[2 * R], const float (&start)[2], int exact,
                                                      unsigned weights, int lane) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const unsigned row = weights + r * 8 * SLAB_ROW_BYTES + lane % 4 * 4;
    float left = start[r];
    if (exact >> r & 1) {
#pragma unroll
      for (int t = R - 2; t >= 0; t -= 2) {
        const float e0 = e[element(t, r)], e1 = e[element(t + 1, r)];
        const float left1 = left * rcp(1.f + e1);
        left = left1 * rcp(1.f + e0);
        store_shared(row + ((t / 2 ^ lane / 4) << 4), pack<T>(left * e0, left1 * e1));
        dA[element(t, r)] *= left;
        dA[element(t + 1, r)] *= left1;
      }
    } else {
#pragma unroll
      for (int t = 0; t < R; t += 2) {
        const float e0 = e[element(t, r)], e1 = e[element(t + 1, r)];
        const float left1 = fmaf(left, e0, left);
        store_shared(row + ((t / 2 ^ lane / 4) << 4), pack<T>(left * e0, left1 * e1));
        dA[element(t, r)] *= left;
        dA[element(t + 1, r)] *= left1;
        left = fmaf(left1, e1, left1);
      }
    }
  }
  __syncwarp();
}

// A block's half of dq to the warp that adds it up.
template <class C> SBK_FN void hand_dq_over(HopperBackwardShared<C>& s, const float (&dq)[C::HEAD_DIM / 4], int half, int n, int* error) {
  wait(s, DQ_EMPTY + half, n % 2 ^ 1, error);
#pragma unroll
  for (int j = 0; j < C::HEAD_DIM / 16; j++)
    reinterpret_cast<float4*>(s.dq[half])[j * 128 + threadIdx.x % 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
  fence_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(s, DQ_FULL + half);
}

// Accumulator [HALF_N, D] times scale, rounded, to slabs slab_bytes apart; `stored` as in consume().
template <class C> SBK_FN void stage_sums(unsigned tile, int slab_bytes, unsigned stored, const float (&x)[C::HEAD_DIM / 2], float scale) {
#pragma unroll
  for (int i = 0; i < C::HEAD_DIM / 16; i++) {
    unsigned packed[4];
#pragma unroll
    for (int y = 0; y < 4; y++) packed[y] = pack<typename C::T>(x[8 * i + 2 * y] * scale, x[8 * i + 2 * y + 1] * scale);
    store_matrices(tile + i / 4 * slab_bytes + (stored ^ i % 4 << 5), packed);
  }
}

template <class C> SBK_FN void consume(const HopperBackwardParams& p, HopperBackwardShared<C>& s, int half) {
  using T = typename C::T;
  using Simple = SimplePath<C::RUN>;
  constexpr int D = C::HEAD_DIM;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4, row = warp * 16 + lane / 4;
  const bool first_lane = lane == 0;
  const float scale_log2 = p.shape.scale * LOG2_E;
  auto wait_for = [&](int barrier, int parity) { wait(s, barrier, parity, p.error); };

  // Operands of the five products.
  const uint64 q_rows = operand(shared_address(s.q), 0), dout_rows = operand(shared_address(s.dout), 0);
  const uint64 k_rows = operand(shared_address(s.k) + half * C::HALF_BYTES, 0), v_rows = operand(shared_address(s.v) + half * C::HALF_BYTES, 0);
  const uint64 dz_rows = operand(shared_address(s.dz), 0);
  const uint64 k_columns = operand(shared_address(s.k) + (D == 128 ? half * C::K_SLAB_BYTES : half * SLAB_ROW_BYTES / 2), 0);
  const uint64 q_columns = operand(shared_address(s.q), C::Q_SLAB_BYTES), dout_columns = operand(shared_address(s.dout), C::Q_SLAB_BYTES);
  const uint64 weights_columns = operand(shared_address(s.weights[half]), 0), dz_columns = operand(shared_address(s.dz[0][half]), 0);
  // A lane's place for store_matrices: row lane % 16 of the warp's, and there the piece lane / 16, swizzled. 16 columns on: 32 bytes,
  // added without carry.
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
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BLOCK_N / 16; i++)
      wgmma_step<T, ALONG_K, ACROSS_K>(dq, dz_rows + stage * further(2 * C::HALF_BYTES) + along_k(i, C::HALF_BYTES), k_columns + across_k(i), i);
    wgmma_commit();
    wait_for(Q_FULL + stage, parity);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++)
      wgmma_step<T, ALONG_K, ALONG_K>(e, q_rows + stage * further(C::Q_BYTES) + along_k(i, C::Q_SLAB_BYTES), k_rows + along_k(i, C::K_SLAB_BYTES), i);
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
      if (i * D / 16 % 8 == 0 || D == 128) {
        const int k = i * D / 128;
        wgmma_step<T, ALONG_K, ALONG_K>(dA, dout_rows + stage * further(C::Q_BYTES) + along_k(k, C::Q_SLAB_BYTES), v_rows + along_k(k, C::K_SLAB_BYTES), k);
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
      const Scan scan = scan_newer<Simple>(excess[r], 3 - q);
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
      wgmma_add<T, ACROSS_K, ACROSS_K>(dv, weights_columns + across_k(i), dout_columns + stage * further(C::Q_BYTES) + across_k(i), n > 0 || i > 0);
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
    const Scan sums[2] = {scan_older(sum[0], q), scan_older(sum[1], q)};
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
      wgmma_add<T, ACROSS_K, ACROSS_K>(dk, dz_columns + stage * further(2 * C::HALF_BYTES) + across_k(i),
                                       q_columns + stage * further(C::Q_BYTES) + across_k(i), n > 0 || i > 0);
    wgmma_commit();
  }

  // dq of the last two steps.
#pragma unroll 1
  for (int n = s.work.steps - 2; n < s.work.steps; n++) {
    float dq[D / 4];
    wait_for(DZ_FULL + n % 2, n / 2 % 2);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BLOCK_N / 16; i++)
      wgmma_step<T, ALONG_K, ACROSS_K>(dq, dz_rows + n % 2 * further(2 * C::HALF_BYTES) + along_k(i, C::HALF_BYTES), k_columns + across_k(i), i);
    wgmma_commit();
    wgmma_wait<0>();
    hand_dq_over<C>(s, dq, half, n, p.error);
  }

  // Store dv through the half's rows of v, which only its own products read, and dk through a stage of q. The maps put keys in order.
  const unsigned dv_tile = shared_address(s.v) + half * C::HALF_BYTES, dk_tile = shared_address(s.q[half]);
  stage_sums<C>(dv_tile, C::K_SLAB_BYTES, stored, dv, 1.f);
  named_sync(BOTH_HALVES, 256);  // both are done with q
  stage_sums<C>(dk_tile, C::Q_SLAB_BYTES, stored, dk, p.shape.scale);
  fence_async_shared();
  named_sync(OLDER_HALF + half, 128);
  if (threadIdx.x % 128 == 0) {
    const HopperBackwardWork work = s.work;
    const int keys = work.tile * (C::BLOCK_N / 2) + half * (C::HALF_N / 2);
    for (int i = 0; i < C::SLABS; i++) {
      store_box(dv_tile + i * C::K_SLAB_BYTES, &p.dv.map, work.head % p.dv.heads_in_row * D + i * SLAB_COLUMNS, 0, 0, keys, work.head / p.dv.heads_in_row);
      store_box(dk_tile + i * C::Q_SLAB_BYTES, &p.dk.map, work.head % p.dk.heads_in_row * D + i * SLAB_COLUMNS, 0, 0, keys, work.head / p.dk.heads_in_row);
    }
    bulk_commit();
    bulk_wait<0>();
  }
}

template <class C> __global__ void __launch_bounds__(C::THREADS, 1) hopper_backward_kernel(const __grid_constant__ HopperBackwardParams p) {
  extern __shared__ __align__(SWIZZLE_BYTES) char shared[];
  HopperBackwardShared<C>& s = *reinterpret_cast<HopperBackwardShared<C>*>(shared);
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
  HopperBackwardWork work = {group * p.heads_per_group + in_group % heads, in_group / heads, in_group / heads * (C::BLOCK_N / C::BLOCK_M), 0};
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
}

}  // namespace sbk
