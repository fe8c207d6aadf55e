// Backward on Hopper: rows of hopper_backward.cuh's tiles whose logits are too large for one reciprocal a run (math.cuh). Each half
// of a row chooses for itself, by its 4 lanes, so that no row depends on others.
#pragma once
#include "hopper_backward_half.cuh"

namespace sbk {
namespace hopper_backward {

// Up to here, a product of u over the 4 runs of a half and its reciprocal are normal numbers.
constexpr float WALK_LIMIT = 1.07374182e9f;  // 2^30

SBK_FN bool walks_simply(const float (&excess)[2]) { return excess[0] < WALK_LIMIT && excess[1] < WALK_LIMIT; }

// Rows (bits) of this quad whose runs are not all simple, in a warp that has some and in one that has none.
// NOTE: what the lanes of a warp do together may hang on the type, which they share, and not on the rows, in which quads differ.
struct ExactRows {
  static constexpr bool ANY = true;
  int rows;
};
struct NoExactRows {
  static constexpr bool ANY = false;
  static constexpr int rows = 0;
};

SBK_FN ExactRows find_exact_rows(const float (&excess)[2], int lane) {
  ExactRows found = {0};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const unsigned lanes = __ballot_sync(ALL_LANES, !(excess[r] < WALK_LIMIT));
    found.rows |= (lanes >> (lane & 28) & 15) != 0 ? 1 << r : 0;
  }
  return found;
}

// An exact path's product of 1 - beta as an excess. That of a used-up stick is still finite, so that 0 times it is 0.
SBK_FN float excess_of(float rest) { return rest < MIN_STICK * MIN_STICK ? 1.7e38f : rcp(rest) - 1.f; }

// Products of 1 - beta, for scan_newer.
struct Rests {
  using Total = float;
  static SBK_FN float identity() { return 1.f; }
  static SBK_FN float combine(float x, float y) { return x * y; }
  static SBK_FN float from_lane(float x, int mask) { return from_lane_xor(x, mask); }
  static SBK_FN void settle(float&, float) {}
};

// Cuts the exact rows' e and scans them for walks from the newest key. `older`: where the carry is < 0 (encode_carry) the share
// that the newer runs leave of the stick on entry of the half, elsewhere the excess of the older runs and the lane's own.
template <int R> SBK_FN void scan_exactly(float (&e)[2 * R], HalfScan (&scans)[2], int exact, const float (&carry)[2], int q) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float rest = 1.f;
#pragma unroll
    for (int t = 0; t < R; t++) {
      float& x = e[element(t, r)];
      x = exact >> r & 1 ? min_nan(x, MAX_E) : x;
      rest *= rcp(1.f + x);
    }
    const Scan<float> newer = scan_newer<Rests>(rest, q), older = scan_newer<Rests>(rest, 3 - q);
    if (exact >> r & 1) scans[r] = {carry[r] < 0.f ? newer.before : excess_of(older.before * rest), excess_of(newer.total)};
  }
}

// NOTE: a number whose origin the compiler does not know: else it keeps the reciprocals of scan_exactly for the walk, in no registers.
SBK_FN float anew(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

template <int COUNT> SBK_FN void renew(float (&x)[COUNT]) {
#pragma unroll
  for (float& each : x) each = anew(each);
}

// What walk does, for a warp with exact rows: those are walked from the newest key, as in MixedPath::weights, the
// others as ever. weights: the lane's first row.
template <typename T, int R>
SBK_FN void walk_exactly(const float (&e)[2 * R], float (&dA)[2 * R], const float (&start)[2], int exact, unsigned weights,
                         int lane) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const unsigned row = weights + r * 8 * SLAB_ROW_BYTES + lane % 4 * 4;
    const bool is_exact = exact >> r & 1;
    float left = start[r];
    // NOTE: a branch for each pair of keys keeps the compiler from starting all reciprocals at once, for which it has no registers.
#pragma unroll
    for (int t = R - 2; t >= 0; t -= 2) {
      if (is_exact) {
        const float e0 = anew(e[element(t, r)]), e1 = anew(e[element(t + 1, r)]);
        const float left1 = left * rcp(1.f + e1);
        left = left1 * rcp(1.f + e0);
        store_shared(row + ((t / 2 ^ lane / 4) << 4), pack<T>(left * e0, left1 * e1));
        dA[element(t, r)] *= left * e0;
        dA[element(t + 1, r)] *= left1 * e1;
      }
    }
#pragma unroll
    for (int t = 0; t < R; t += 2) {
      if (!is_exact) {
        const float e0 = e[element(t, r)], e1 = e[element(t + 1, r)];
        const float left1 = fmaf(left, e0, left);
        store_shared(row + ((t / 2 ^ lane / 4) << 4), pack<T>(left * e0, left1 * e1));
        dA[element(t, r)] *= left * e0;
        dA[element(t + 1, r)] *= left1 * e1;
        left = fmaf(left1, e1, left1);
      }
    }
  }
  __syncwarp();
}

}  // namespace hopper_backward
}  // namespace sbk
