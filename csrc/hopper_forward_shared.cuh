// Forward on Hopper: what the warps of hopper_forward.cuh share.
#pragma once
#include "forward.cuh"
#include "hopper.cuh"

namespace sbk {

// A run whose excesses take an instruction less a key.
// NOTE: u (1 + e), rounded once, is rounded to either side: e has digits that u has not. A product of two u's is not (math.cuh).
template <int R> struct HopperRun : LinearRun<R> {
  using LinearRun<R>::GROUP, LinearRun<R>::GROUPS;
  SBK_FN void absorb(const float (&s)[R]) {
    float u[GROUPS];
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const float e = this->e[i * GROUP + t] = ex2(s[i * GROUP + t]);
        u[i] = t == 0 ? 1.f + e : fmaf(u[i], e, u[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) this->excess[i] = u[i] - 1.f;
  }
};

template <typename T_, int BLOCK_D_, int CONSUMERS_, int NUM_STAGES_> struct HopperForwardConfig {
  using T = T_;
  static constexpr int BLOCK_D = BLOCK_D_, CONSUMERS = CONSUMERS_, STAGES = NUM_STAGES_;
  // Of q. NOTE: with two, the place of the next one's is free only when the output of the one before has left it, in this one's second step.
  static constexpr int Q_STAGES = BLOCK_D > 128 ? 2 : 3;
  // Whether a tile's values take the place of its keys once those are done with. NOTE: beside 128 KB of q there is room for three tiles
  // of 32 KB. Two of keys and one of values would leave a copy of values only the time of the next tile's q k.
  static constexpr bool ONE_PLACE = BLOCK_D > 192;
  static constexpr int BLOCK_M = 64 * CONSUMERS, BLOCK_N = BLOCK_D > 128 ? 64 : 128, THREADS = 128 * (CONSUMERS + 1);
  static constexpr int MT = 1, NT = BLOCK_N / 8, RUN = BLOCK_N / 4;
  using Run = HopperRun<RUN>;
  static constexpr int SLABS = BLOCK_D / SLAB_COLUMNS;
  static constexpr int Q_SLAB = BLOCK_M * SLAB_ROW_BYTES, KEY_SLAB = BLOCK_N * SLAB_ROW_BYTES;
  static constexpr int Q_BYTES = SLABS * Q_SLAB, KEY_BYTES = SLABS * KEY_SLAB;
  // Of a thread, in eights.
  static constexpr int LOADER_REGISTERS = CONSUMERS == 2 ? 40 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
  static_assert(128 * (CONSUMERS * CONSUMER_REGISTERS + LOADER_REGISTERS) <= registers_at_start(THREADS));
};

// One query block: which, and which key tiles it sees.
struct Work {
  Sequence at;
  int index, m_begin, first_end, tiles_seen;
};

// With one place for both, keys wait for the values that were there and values for their keys, in the same stage; an early stop, which
// takes a stage of keys, takes it of values too.
template <class C, bool ONE_PLACE = C::ONE_PLACE> struct Tiles {
  alignas(SWIZZLE_BYTES) unsigned char k[C::STAGES][C::KEY_BYTES];
  alignas(SWIZZLE_BYTES) unsigned char v[C::STAGES][C::KEY_BYTES];
};
template <class C> struct Tiles<C, true> {
  union {
    alignas(SWIZZLE_BYTES) unsigned char k[C::STAGES][C::KEY_BYTES], v[C::STAGES][C::KEY_BYTES];
  };
};

template <class C> struct HopperForwardShared {
  alignas(SWIZZLE_BYTES) unsigned char q[C::Q_STAGES][C::Q_BYTES];
  Tiles<C> tiles;
  Barrier q_full[C::Q_STAGES], q_empty[C::Q_STAGES];
  Barrier k_full[C::STAGES], k_empty[C::STAGES], v_full[C::STAGES], v_empty[C::STAGES];
  Work work[C::Q_STAGES];               // the query blocks in q; one that sees no tiles: the end
  int stop[C::STAGES];                  // whether the stage of k holds no tile but the end of an early stop
  int used_up[4 * C::CONSUMERS];        // by warp: 1 + the work in which its rows have used up their sticks; read at any time
};

// Tries of a wait inside a block: seconds. It only ends so if something else went wrong.
constexpr int WAIT_LIMIT = 1 << 24;

// A ring of stages: which is next, and the parity of its phase.
template <int STAGES> struct Ring {
  int stage = 0, parity = 0;
  SBK_FN void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  // The stage before, where the keys are whose values come next.
  SBK_FN Ring before() const { return stage == 0 ? Ring{STAGES - 1, parity ^ 1} : Ring{stage - 1, parity}; }
};

}  // namespace sbk
