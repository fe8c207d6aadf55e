// Backward on Hopper: what a thread's rows have to know of other keys: of the other runs by shuffles, of the tile's other half and of other
// tiles through shared memory. The names are those of hopper_backward.cuh.
#pragma once
#include "hopper_backward_exact.cuh"
#include "hopper_backward_shared.cuh"

namespace sbk {
namespace hopper_backward {

template <class C> struct Exchange {
  using Here = Shared<C>;
  using Simple = SimplePath<C::RUN>;
  static constexpr int STATE = offsetof(Here, state), NEXT = offsetof(Here, next), EXCESS = offsetof(Here, excess), SUM = offsetof(Here, sum);
  static constexpr int SECOND = 8 * ROW_BYTES;  // a thread's second row

  const Barriers& barriers;
  int half, slot, slot_parity;
  unsigned here, q;  // here: the slot's place of the thread's first row, less what the offsets above are
  bool arriving, state_ready, next_free;  // the last two asked early

  // Of step g. base: of shared memory.
  SBK_FN Exchange(const Barriers& barriers, unsigned base, int half, unsigned g, const Thread& thread)
      : barriers(barriers), half(half), slot(g % C::SLOTS), slot_parity(g / C::SLOTS % 2),
        here(base + (slot * C::BLOCK_M + thread.row) * ROW_BYTES), q(thread.q), arriving(arrives(thread.lane)),
        state_ready(barriers.ready(STATE_FULL + slot, slot_parity)), next_free(barriers.ready(NEXT_EMPTY + slot, slot_parity ^ 1)) {}

  // Each run's excess, out of its e and u, the product of all 1 + e, without the keys that the row does not see. visible: how many of the
  // tile's the block's first row sees.
  template <int COUNT> SBK_FN void hide(float (&e)[COUNT], float (&u)[2], int visible, float (&excess)[2]) const {
    if (visible < C::BLOCK_N)
      hide_others(e, u, visible + (int)Thread(kept(threadIdx.x % 128)).row - half * C::HALF_N - (int)q * C::RUN);
    excess[0] = u[0] - 1.f, excess[1] = u[1] - 1.f;
  }

  // What is left before each of the two runs' oldest keys, out of their excesses.
  template <class Exact, int COUNT>
  SBK_FN void find_starts(float (&start)[2], float (&e)[COUNT], const float (&excess)[2], Exact exact) const {
    // Totals of the half, for the other one.
    HalfScan scans[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Scan<float> scan = scan_newer<Simple>(excess[r], 3 - q);
      scans[r] = {scan.before, scan.total};
    }
    if constexpr (Exact::ANY) {
      barriers.wait(STATE_FULL + slot, slot_parity);
      const float carry[2] = {load_shared<STATE>(here), load_shared<STATE + SECOND>(here)};
      scan_exactly<C::RUN>(e, scans, exact.rows, carry, q);
    }
    if (q == 0) {
      store_shared<EXCESS>(here + half * 4, scans[0].total);
      store_shared<EXCESS + SECOND>(here + half * 4, scans[1].total);
    }
    __syncwarp();
    barriers.arrive(EXCESS_FULL + half * C::SLOTS + slot, arriving);

    // Where the runs start.
    float next[2];
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
        const float share = exact.rows >> r & 1 ? scans[r].older : Simple::enter(1.f + scans[r].older, scans[r].total);
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
  }

  // The sums of a over all keys older than the runs, out of the runs' own.
  SBK_FN void add_sums(float (&older)[2], const float (&sum)[2]) const {
    // Sums of a: the older runs', and on to the newer half or the next tile.
    const Scan<float> sums[2] = {scan_older(sum[0], q), scan_older(sum[1], q)};
    if (half == 1) barriers.wait(SUM_FULL + slot, slot_parity);
    const unsigned from = here + (half == 0 ? STATE + 4 : SUM), to = here + (half == 0 ? SUM : NEXT + 4);
    const float before[2] = {load_shared(from), load_shared<SECOND>(from)};
    if (q == 0) {
      store_shared(to, before[0] + sums[0].total);
      store_shared<SECOND>(to, before[1] + sums[1].total);
    }
    __syncwarp();
    barriers.arrive(STATE_EMPTY + slot, half == 0 && arriving);
    barriers.arrive((half == 0 ? SUM_FULL : NEXT_FULL) + slot, arriving);
    older[0] = before[0] + sums[0].before;
    older[1] = before[1] + sums[1].before;
  }
};

}  // namespace hopper_backward
}  // namespace sbk
