// Backward on Hopper: what hopper_backward.cuh's warps share, and the four warps that feed its consumers.
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
  static constexpr int HALF_BYTES = HALF_N * SLAB_ROW_BYTES;  // half the keys of a slab, and [BLOCK_M, HALF_N] of A or dz
  static constexpr int DQ_FLOATS = BLOCK_M * HEAD_DIM / 2;    // what a warpgroup computes of a block's dq
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128);
};

namespace hopper_backward {

// Barriers: FULL when something is there to be read, EMPTY when its place may be written again.
enum BarrierName {
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
enum NamedBarrier { ALL_THREADS, OLDER_HALF, NEWER_HALF, BOTH_HALVES };

struct Work {
  int head, tile, first_block, steps;
};

template <class C> struct alignas(SWIZZLE_BYTES) Shared {
  char k[C::K_BYTES], v[C::K_BYTES], q[C::STAGES][C::Q_BYTES], dout[C::STAGES][C::Q_BYTES];
  char weights[2][C::HALF_BYTES], dz[C::STAGES][2][C::HALF_BYTES];  // [half]
  float dq[2][C::DQ_FLOATS];                                        // [half]: in the order of the product's registers
  float2 state[C::SLOTS][C::BLOCK_M];      // carry (see encode_carry), dr r + sum of a over the older tiles
  float2 next[C::SLOTS][C::BLOCK_M];       // the same for the next tile; carry 0: the row's stays as it is
  float excess[C::SLOTS][2][C::BLOCK_M];   // of each half: its product of all u, less 1
  float sum[C::SLOTS][C::BLOCK_M];         // dr r + sum of a over the older tiles and the older half
  Barrier barriers[BARRIERS];
  int ticket, patience;
  Work work;  // here too, since the consumers have no registers for it
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

  SBK_FN VisitingBlocks(const HopperBackwardParams& p, const Work& work) {
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

template <class C> SBK_FN void load_rows(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work work = s.work;
  auto load_keys = [&](const MappedTensor& x, char* tile, int barrier) {
    const unsigned full = shared_address(&s.barriers[barrier]);
    barrier_arrive_expecting(full, C::K_BYTES);
    const int column = column_of(x, work.head, C::HEAD_DIM), place = place_of(x, work.head);
    for (int i = 0; i < 2 * C::SLABS; i++)
      load_box(shared_address(tile) + i * C::HALF_BYTES, &x.map, full, column + i / 2 * SLAB_COLUMNS, 0, 0,
               work.tile * (C::BLOCK_N / 2) + i % 2 * (C::HALF_N / 2), place);
  };
  auto load_queries = [&](const MappedTensor& x, char (&tiles)[C::STAGES][C::Q_BYTES], int n, int block, int full, int empty) {
    const int stage = n % C::STAGES;
    const unsigned barrier = shared_address(&s.barriers[full + stage]);
    wait(s, empty + stage, n / C::STAGES % 2 ^ 1, p.error);
    barrier_arrive_expecting(barrier, C::Q_BYTES);
    const int column = column_of(x, work.head, C::HEAD_DIM), place = place_of(x, work.head);
    for (int i = 0; i < C::SLABS; i++)
      load_box(shared_address(tiles[stage]) + i * C::Q_SLAB_BYTES, &x.map, barrier, column + i * SLAB_COLUMNS, block * C::BLOCK_M,
               place);
  };
  VisitingBlocks blocks(p, work);
  int block = blocks.next(lane);
  if (lane == 0) {
    load_keys(p.k, s.k, K_FULL);
    load_queries(p.q, s.q, 0, block, Q_FULL, Q_EMPTY);
    load_keys(p.v, s.v, V_FULL);
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

// What a row's walk starts from, in one number. > 0: the stick left by the tiles done. < 0: minus the stick on entry from the newer
// side, which is whole in the newest tile and what the forward kept in the oldest. 0: the row's stick does not reach this tile.
SBK_FN float encode_carry(float carry, int oldest_tile, int tile, bool newest) {
  return newest ? -1.f : tile < oldest_tile ? 0.f : tile == oldest_tile ? -carry : carry;
}

template <class C> SBK_FN void take_state(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work work = s.work;
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

template <class C> SBK_FN void pass_state_on(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work work = s.work;
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
template <class C> SBK_FN void add_dq(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work work = s.work;
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

}  // namespace hopper_backward
}  // namespace sbk
