// Backward on Hopper: what the warps of hopper_backward.cuh share: shared memory, barriers, and who is where.
#pragma once
#include "hopper.cuh"
#include "hopper_backward_begin.cuh"

namespace sbk {

template <typename T_, int HEAD_DIM_> struct HopperBackwardConfig {
  using T = T_;
  static constexpr int HEAD_DIM = HEAD_DIM_, BLOCK_M = HOPPER_BLOCK_M, BLOCK_N = hopper_backward_keys(HEAD_DIM);
  static constexpr int HALF_N = BLOCK_N / 2, RUN = HALF_N / 4, SLABS = HEAD_DIM / SLAB_COLUMNS;
  // Whether a warpgroup of its own adds up dq, dk and dv: its registers have to hold dk and dv of the whole tile.
  static constexpr bool SUMS_APART = HEAD_DIM == 64;
  static constexpr int WARPS = SUMS_APART ? 16 : 12, THREADS = 32 * WARPS;
  static constexpr int CONSUMER_REGISTERS = SUMS_APART ? 136 : 232, SUMS_REGISTERS = SUMS_APART ? 200 : 0, PRODUCER_REGISTERS = 40;
  static_assert(128 * (2 * CONSUMER_REGISTERS + SUMS_REGISTERS + PRODUCER_REGISTERS) <= registers_at_start(THREADS));
  // Whether keys are too few for halves of a product's 64 rows: A and dz of both then lie side by side, and a warpgroup adds up dk and
  // dv of all of the tile's keys, half the columns.
  static constexpr bool WIDE = HEAD_DIM > 128;
  static constexpr int STAGES = SUMS_APART ? 4 : 2, DOUT_STAGES = HEAD_DIM == 256 ? 1 : STAGES;  // of q; of dout
  static constexpr int A_STAGES = SUMS_APART ? 2 : 1, DZ_STAGES = WIDE ? 1 : 2;
  static constexpr int SLOTS = 4, KEY_STAGES = HEAD_DIM == 64 ? 2 : 1;                             // of state; of k and v
  static constexpr int Q_SLAB_BYTES = BLOCK_M * SLAB_ROW_BYTES, K_SLAB_BYTES = BLOCK_N * SLAB_ROW_BYTES;
  static constexpr int Q_BYTES = SLABS * Q_SLAB_BYTES, K_BYTES = SLABS * K_SLAB_BYTES;
  static constexpr int HALF_BYTES = HALF_N * SLAB_ROW_BYTES;  // half the keys of a slab, and [BLOCK_M, HALF_N] of A or dz
  static constexpr int DQ_PARTS = HEAD_DIM == 256 ? 2 : 1;    // in which dq is handed over
  static constexpr int TURNS = SUMS_APART ? 2 : 1;            // for dq, that are passed on at a time
  static constexpr int DQ_COLUMNS = HEAD_DIM / 2 / DQ_PARTS, DQ_FLOATS = BLOCK_M * DQ_COLUMNS;  // what a warpgroup computes of a part
  // Which columns, by eights, the j-th of a half's are: of dq and, WIDE, of dk and dv. Of three slabs each half has one and half the third.
  static SBK_FN constexpr int own_column(int half, int j) {
    return SLABS != 3 ? half * (HEAD_DIM / 16) + j : j < 8 ? half * 8 + j : 16 + half * 4 + j - 8;
  }
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 192 || HEAD_DIM == 256);
};

namespace hopper_backward {

// Barriers: FULL when something is there to be read, EMPTY when its place may be written again.
enum BarrierName {
  WORK_FULL, WORK_EMPTY = WORK_FULL + 2,                                              // by place
  K_FULL = WORK_EMPTY + 2, V_FULL = K_FULL + 2, K_EMPTY = V_FULL + 2, V_EMPTY = K_EMPTY + 2,  // by stage
  Q_FULL = V_EMPTY + 2, Q_EMPTY = Q_FULL + 4, DOUT_FULL = Q_EMPTY + 4, DOUT_EMPTY = DOUT_FULL + 4,  // by stage
  A_FULL = DOUT_EMPTY + 4, A_EMPTY = A_FULL + 2, DZ_FULL = A_EMPTY + 2, DZ_EMPTY = DZ_FULL + 2,        // by stage; of A with sums apart
  DQ_FULL = DZ_EMPTY + 2, DQ_EMPTY, SUMMED,                                           // SUMMED: a tile's dq, added up; by place
  STATE_FULL = SUMMED + 2, STATE_EMPTY = STATE_FULL + 4,                              // by slot
  EXCESS_FULL = STATE_EMPTY + 4,                                                      // by half, slot
  SUM_FULL = EXCESS_FULL + 8, NEXT_FULL = SUM_FULL + 4, NEXT_EMPTY = NEXT_FULL + 4,   // by slot
  BARRIERS = NEXT_EMPTY + 4,
  STATE_TURN, DQ_TURN  // waits for other blocks, for error codes only
};
template <class C> SBK_FN int arrivals_of(int barrier) {
  const auto within = [&](int first, int end) { return barrier >= first && barrier < end; };
  const bool by_sums = within(Q_EMPTY, DOUT_FULL) || within(DOUT_EMPTY, A_FULL) || within(A_EMPTY, DZ_FULL) || within(DZ_EMPTY, DQ_FULL);
  const bool by_both_halves = (by_sums && !C::SUMS_APART) || within(A_FULL, A_EMPTY) || within(DZ_FULL, DZ_EMPTY) || barrier == DQ_FULL ||
                              within(STATE_EMPTY, EXCESS_FULL);
  const bool by_one_half = by_sums || within(EXCESS_FULL, NEXT_EMPTY);
  const bool by_a_warp = within(SUMMED, STATE_EMPTY) || barrier >= NEXT_EMPTY;
  if (by_both_halves || by_one_half || by_a_warp) return (by_both_halves ? 8 : by_one_half ? 4 : 1) * WARP_ARRIVALS;
  if (within(WORK_EMPTY, K_FULL)) return (C::WARPS - 1) * WARP_ARRIVALS;  // all but the one that loads
  return within(K_FULL, Q_FULL) ? 2 : 1;                                  // a thread for each half of the tile; one
}
enum NamedBarrier { ALL_THREADS, OLDER_HALF, NEWER_HALF, BOTH_HALVES, OLDER_TURN, NEWER_TURN };

struct Work {
  Sequence at;  // its head: the key head
  int blocks;   // number of block 0 of the key head's first query head
  int tile, first_block, steps;  // steps 0: there is no tile any more
  int number, begin;             // tiles and steps of this block of threads before
};

struct Visit {
  int head, block;  // of the key head's query heads; of the head's query blocks
};

template <class C> struct alignas(SWIZZLE_BYTES) Shared {
  char k[C::KEY_STAGES][C::K_BYTES], v[C::KEY_STAGES][C::K_BYTES], q[C::STAGES][C::Q_BYTES], dout[C::DOUT_STAGES][C::Q_BYTES];
  char weights[C::A_STAGES][2][C::HALF_BYTES], dz[C::DZ_STAGES][2][C::HALF_BYTES];  // [half]; WIDE: [2][HALF_BYTES] is one tile
  float dq[2][C::DQ_FLOATS];                                        // [half]: in the order of the product's registers
  // By slot and row; each row's lie equally far apart.
  float2 state[C::SLOTS][C::BLOCK_M];   // carry (see encode_carry), dr r + sum of a over the older tiles
  float2 next[C::SLOTS][C::BLOCK_M];    // the same for the next tile; carry 0: the row's stays as it is
  float2 excess[C::SLOTS][C::BLOCK_M];  // of the older and the newer half: its product of all u, less 1
  float2 sum[C::SLOTS][C::BLOCK_M];     // x: dr r + sum of a over the older tiles and the older half
  Barrier barriers[BARRIERS];
  int patience, failed;    // directly behind the barriers; the last barrier whose wait was given up, plus 1
  int visible[C::STAGES];  // of the block whose q is there: keys of the tile that its first row sees, BLOCK_N or more for all
  // By tile: this one's, the next one's, and the one's before, whose dq is converted; no steps: the end.
  // NOTE: copied by a consumer's thread instead, in a branch of its own, it cost 10 % of the kernel: behind such a branch ptxas keeps what
  // descriptors of products are made of in each thread's registers, and takes four instructions to pass each one on (R2UR).
  Work work[4];
  Work loading;            // the one whose rows are loaded ...
  Visit visits[2];         // ... and the blocks that visit it, by step
};

// A wait that runs out is given up after this many tries: seconds.
constexpr int PATIENCE = 1 << 22;

// The barriers of a block. A wait that runs out is noted and passed, with all later ones of this block cut short; see report.
// NOTE: a trap would keep the compiler from giving the consumers more registers than a thread starts with.
struct Barriers {
  unsigned address;
  const HopperBackwardParams& p;

  SBK_FN unsigned at(int barrier) const { return address + barrier * (int)sizeof(Barrier); }
  SBK_FN void arrive(int barrier, bool yes = true) const { barrier_arrive(at(barrier), yes); }
  // Whether a wait would be over by now (barrier_test), for wait_unless.
  SBK_FN bool ready(int barrier, int parity) const { return barrier_test(at(barrier), parity); }
  SBK_FN void wait_unless(bool ready, int barrier, int parity) const {
    if (!ready) wait(barrier, parity);
  }
  SBK_FN void wait(int barrier, int parity) const {
    if (barrier_try_wait(at(barrier), parity)) return;
    if (!barrier_wait(at(barrier), parity, load_shared_int(at(BARRIERS)))) give_up(barrier);
  }
  SBK_FN void wait_for_turn(const int* turn, int tile, int barrier) const {
    for (int i = 0; load_acquire(turn) < tile; i++) {
      if (i >= load_shared_int(at(BARRIERS))) return give_up(barrier);
      if (i > 100) __nanosleep(500);
    }
  }
  SBK_FN void give_up(int barrier) const {
    store_shared(at(BARRIERS), 1u);
    store_shared(at(BARRIERS) + 4, (unsigned)barrier + 1);
  }
  // At a warp's end, to the host. NOTE: there, not in each wait: the machine code of waits lies in the loops.
  SBK_FN void report() const {
    const int failed = load_shared_int(at(BARRIERS) + 4);
    if (failed) atomicCAS(p.given.error, 0, failed);
  }
};

template <class C> SBK_FN Barriers barriers_of(Shared<C>& s, const HopperBackwardParams& p) {
  static_assert(offsetof(Shared<C>, patience) == offsetof(Shared<C>, barriers) + sizeof(s.barriers));
  return {shared_address(s.barriers), p};
}

// Walks over the query blocks that visit the tile by a whole warp, 32 at a time: from the newest block to the diagonal, and for each
// block over the query heads of the key head.
// NOTE: in this order a tile can follow the next older one a single step behind. From the diagonal on it has to wait for three steps
// of that one before its own first, and from head to head for two more.
struct VisitingBlocks {
  const HopperBackwardParams& p;
  const Work& work;  // in shared memory: there are no registers for it
  int seen = 0;  // blocks looked at, of all the group's heads
  Visit mine;    // the latest of them that is this lane's
  unsigned mask = 0;

  SBK_FN VisitingBlocks(const HopperBackwardParams& p, const Work& work) : p(p), work(work) {}
  // The next one. There must be one.
  SBK_FN Visit next(int lane) {
    while (mask == 0) {
      const int group = p.given.shape.group;
      mine = {(seen + lane) % group, query_blocks(work.at) - 1 - (seen + lane) / group};
      mask = __ballot_sync(ALL_LANES, mine.block >= work.first_block && p.block_oldest[index(mine)] <= work.tile);
      seen += 32;
    }
    const int source = __ffs(mask) - 1;  // NOTE: divisions at each step, instead of shuffles, cost 2 % of the kernel
    mask &= mask - 1;
    return {__shfl_sync(ALL_LANES, mine.head, source), __shfl_sync(ALL_LANES, mine.block, source)};
  }
  // Where a block is in `block_oldest` and the like.
  SBK_FN int index(Visit x) const { return work.blocks + x.head * p.head_blocks + x.block; }
};

// ---- A consumer's thread ----

constexpr int ROW_BYTES = sizeof(float2);  // of state and the like

// NOTE: what comes out of a shuffle the compiler keeps; a thread's number and the address of shared memory it would read anew for each
// use, 30 clocks each, and what follows from them it would keep instead, in registers it does not have.
SBK_FN unsigned kept(unsigned number) { return __shfl_sync(ALL_LANES, number, number); }
SBK_FN unsigned kept_address(unsigned x) { return __shfl_sync(ALL_LANES, x, 0); }

// What follows from a thread's number in its warpgroup.
struct Thread {
  unsigned lane, q, row;  // in the warp, in its quad; the first of its two rows
  unsigned stored;        // its place for store_matrices
  SBK_FN explicit Thread(unsigned number)
      : lane(number % 32), q(number % 4), row(number / 32 * 16 + lane / 4), stored(matrix_place(number)) {}
};

}  // namespace hopper_backward
}  // namespace sbk
