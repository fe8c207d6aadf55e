// Backward on Hopper: what a thread does with its part of a half, BLOCK_M queries by HALF_N keys: a run of keys of each of two rows, in
// accumulators of as many elements. The names are those of hopper_backward.cuh.
#pragma once
#include "hopper.cuh"
#include "tile.cuh"

namespace sbk {
namespace hopper_backward {

// Where key t of the run of row r lies in an accumulator.
SBK_FN constexpr int element(int t, int r) { return t / 2 * 4 + 2 * r + t % 2; }

// A half's 4 runs of a row.
struct HalfScan {
  float older;  // excess of the runs older than the lane's; of exact rows see scan_exactly
  float total;  // excess of all 4
};

// e = 2^s in place of the logits of keys 2 i and 2 i + 1, by which u, the product of 1 + e, is multiplied.
// NOTE: u (1 + e), rounded once, is rounded to either side: e has digits that u has not. A product of two u's is not (math.cuh).
template <int COUNT> SBK_FN void exponentiate(float (&e)[COUNT], float (&u)[2], int i, float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float &e0 = e[element(2 * i, r)], &e1 = e[element(2 * i + 1, r)];
    e0 = ex2(e0 * scale_log2);
    e1 = ex2(e1 * scale_log2);
    u[r] = fmaf(u[r], e0, u[r]);
    u[r] = fmaf(u[r], e1, u[r]);
  }
}
// Leaves the first `visible` keys of the first row's run, and 8 more of the second's, which is 8 rows further on.
template <int COUNT> SBK_FN void hide_others(float (&e)[COUNT], float (&u)[2], int visible) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u[r] = 1.f;
#pragma unroll
    for (int t = 0; t < COUNT / 2; t++) {
      float& x = e[element(t, r)];
      x = t < visible + 8 * r ? x : 0.f;
      u[r] = fmaf(u[r], x, u[r]);
    }
  }
}
// From `left` before the runs' oldest keys: A, rounded, to its place in shared memory (Thread::stored), and a in place of dA.
template <typename T, int COUNT>
SBK_FN void walk(const float (&e)[COUNT], float (&dA)[COUNT], float (&left)[2], unsigned tile, unsigned stored) {
#pragma unroll
  for (int i = 0; i < COUNT / 8; i++) {
    unsigned packed[4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float A[4];
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const float now = e[element(4 * i + t, r)];
        A[t] = left[r] * now;
        dA[element(4 * i + t, r)] *= A[t];
        left[r] = fmaf(left[r], now, left[r]);
      }
      packed[r] = pack<T>(A[0], A[1]);
      packed[2 + r] = pack<T>(A[2], A[3]);
    }
    store_matrices(tile + (stored ^ i << 5), packed);
  }
}
// Of keys 4 i to 4 i + 3: a less e times `sum`, the run's older a, in place of a, which goes to the sum.
template <int COUNT> SBK_FN void take_older(const float (&e)[COUNT], float (&a)[COUNT], float (&sum)[2], int i) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int at = element(4 * i + j / 2, j % 2);
    const float now = a[at];
    a[at] = fmaf(-e[at], sum[j % 2], now);
    sum[j % 2] += now;
  }
}
// dz, rounded, to its place, out of that and `older`, the sums of a over the older runs.
template <typename T, int COUNT>
SBK_FN void store_dz(const float (&e)[COUNT], const float (&a)[COUNT], const float (&older)[2], unsigned tile, unsigned stored) {
#pragma unroll
  for (int i = 0; i < COUNT / 8; i++) {
    unsigned packed[4];
#pragma unroll
    for (int y = 0; y < 4; y++) {
      const int at = 8 * i + 2 * (y % 2) + 4 * (y / 2);
      const float first = fmaf(-e[at], older[y % 2], a[at]), second = fmaf(-e[at + 1], older[y % 2], a[at + 1]);
      packed[y] = pack<T>(first * rcp(1.f + e[at]), second * rcp(1.f + e[at + 1]));
    }
    store_matrices(tile + (stored ^ i << 5), packed);
  }
}

}  // namespace hopper_backward
}  // namespace sbk
