// The per-logit mathematics of stick-breaking attention, once for all kernels: softplus policies and, on one thread's run of
// keys of one row, the stick step in linear and in log space. Equations are numbered as in sbkernels/reference.py.
//
// A row's keys in a tile lie in 4 runs, one a lane (tile.cuh); in a run they are ordered oldest to newest. A `Run` takes the
// base-2 logits of its keys and answers, by key: the weight A, 1 - beta, and the logit's gradient. What is left of the stick is
// passed on as a `carry`, a number whose meaning belongs to the formulation:
//
//     LinearRun   carry = the stick itself; eq. (6) and (7), u = 1 + 2^s. One reciprocal for a group of 8 keys, of their product
//                 of u, where that stays below 2^62, one for each key elsewhere; underflow to 0 means "used up".
//     LogRun      carry = -log2 of the stick, the paper's form: A = 2^(s - sum of softplus2 from this key to the newest).
#pragma once
#include "instructions.cuh"

namespace sbk {

constexpr float LOG2_E = 1.44269504f;
// 2^s is cut here: 1 - beta and A are right to 2^-63 of a stick, and products with a sum of gradients stay finite.
constexpr float MAX_LOGIT2 = 63.f;
constexpr float MAX_E = 9.22337204e18f;  // 2^63
// A stick below this counts as used up: what one key beyond MAX_LOGIT2 leaves, and invisible in any output dtype.
constexpr float MIN_STICK_LOG2 = -62.f;
constexpr float MIN_STICK = 2.16840434e-19f;  // 2^-62
// Up to here, the reciprocal of a group's product of u leaves a normal number of any stick that is not used up; a NaN is not below it.
constexpr float SIMPLE_LIMIT = 4.61168602e18f;  // 2^62
// A run that takes more than this uses any stick up. Products of two such are numbers, of more infinite; their reciprocals are 0.
constexpr float MAX_EXCESS = 9.22337204e18f;  // 2^63
// An invisible key's base-2 logit: 2^s and softplus2(s) are 0.
constexpr float INVISIBLE = -1e30f;

// ---- softplus2(s) = log2(1 + 2^s) ----

// log2(1 + x) on [0, 1] as x * polynomial, minimax of the relative error: 2^-25, with the roundings 2^-22.4.
SBK_FN float log2_1p(float x) {
  float p = 0.007549156f;
  p = fmaf(p, x, -0.042566955f);
  p = fmaf(p, x, 0.112856016f);
  p = fmaf(p, x, -0.19711882f);
  p = fmaf(p, x, 0.27564132f);
  p = fmaf(p, x, -0.35840845f);
  p = fmaf(p, x, 0.48069295f);
  p = fmaf(p, x, -0.7213402f);
  p = fmaf(p, x, 1.442695f);
  return p * x;
}

// Right to 2^-22 relative in both tails, at one special function. The kernels' policy.
struct SoftplusPolynomial {
  static SBK_FN float log2(float s) { return max_nan(s, 0.f) + log2_1p(ex2(-fabsf(s))); }
};

// The paper's: right to 2^-22 absolute, which far keys add up to more than the tolerance allows the remainder, and 2^-14.5 just
// above the cut at 15.
struct SoftplusApproximate {
  static SBK_FN float log2(float s) { return s > 15.f ? s : lg2(1.f + ex2(s)); }
};

// The mathematical library's.
struct SoftplusLibrary {
  static SBK_FN float log2(float s) { return s > 25.f ? s : log1pf(exp2f(s)) * LOG2_E; }
};

// ---- 1 - beta = 1 / (1 + 2^s) of GROUP logits ----

// One reciprocal of the product of all G factors 1 + 2^s, multiplied back by the others.
template <int G> struct RestReciprocal {
  static constexpr int GROUP = G;
  // Logits are cut here: the product and its reciprocal are normal float32 numbers. 1 - beta is right to 2^-CUT.
  static constexpr float CUT = G > 2 ? 30.f : MAX_LOGIT2;

  static SBK_FN void of(const float (&s)[G], float (&rest)[G]) {
    float u[G], before[G];  // before: product of u[0] to u[i - 1]
    float product = 1.f;
#pragma unroll
    for (int i = 0; i < G; i++) {
      u[i] = 1.f + ex2(min_nan(s[i], CUT));
      before[i] = product;
      product *= u[i];
    }
    float inverse = rcp(product);  // of u[0] to u[i]
#pragma unroll
    for (int i = G - 1; i >= 0; i--) {
      rest[i] = inverse * before[i];
      inverse *= u[i];
    }
  }
};

// Absolute error 2^-12: 1 - beta near 0 and a small share have no digits left.
struct RestTanh {
  static constexpr int GROUP = 1;
  static SBK_FN void of(const float (&s)[1], float (&rest)[1]) { rest[0] = fmaf(-0.5f, tanh_approx(s[0] * (0.5f / LOG2_E)), 0.5f); }
};

// ---- One thread's run of R keys of one row ----
//
// A Run absorbs the run's base-2 logits. If it is `simple()` on all lanes of a warp, as real logits are, the kernels go on with
// Run::Path<true>, else with Path<false>, which take the same steps, `total` first:
//
//     total      of the run, to be combined over the row's runs from identity() on; from_lane gives another lane's
//     settle     once the row's total is known: what depends on the whole row
//     enter      carry on entry of keys, and the total of newer ones -> carry on entry of those behind them
//     advance    the same at the end of a tile, for the kernel that walks towards older keys; undo goes back
//     weights    A of eq. (3), from the carry on entry of the run

template <bool CHOICE, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };
template <int R> struct SimplePath;
template <int R> struct MixedPath;

template <int R> struct LinearRun {
  template <bool SIMPLE> using Path = typename Choose<SIMPLE, SimplePath<R>, MixedPath<R>>::type;
  static constexpr float WHOLE = 1.f;  // the carry of a whole stick
  static constexpr float NONE = 0.f;   // of a used-up one
  static SBK_FN bool alive(float carry) { return carry > 0.f; }
  static SBK_FN float stick(float carry) { return carry; }

  static constexpr int GROUP = R < 8 ? R : 8, GROUPS = R / GROUP;
  float e[R];            // 2^s
  float excess[GROUPS];  // product of u, less 1: a sum of small shares keeps all its digits, which 1 + e does not

  SBK_FN void absorb(const float (&s)[R]) {
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const float x = e[i * GROUP + t] = ex2(s[i * GROUP + t]);
        excess[i] = t == 0 ? x : combine(excess[i], x);
      }
    }
  }
  static SBK_FN float combine(float x, float y) { return fmaf(x, y, x) + y; }
  SBK_FN float total_excess() const {
    float total = excess[0];
#pragma unroll
    for (int i = 1; i < GROUPS; i++) total = fminf(combine(total, excess[i]), MAX_EXCESS);
    return total;
  }
  SBK_FN bool simple() const {
    bool simple = true;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) simple = simple && excess[i] < SIMPLE_LIMIT;
    return simple;
  }

  // Eq. (9) for key t, from a of eq. (8) and dr r + sum of a over the older keys.
  SBK_FN float gradient(int t, float a, float older) const { return fmaf(-e[t], older, a) * rcp(1.f + e[t]); }
};

// Totals are excesses, of a run at most MAX_EXCESS.
template <int R> struct SimplePath {
  using Total = float;
  static SBK_FN float identity() { return 0.f; }
  static SBK_FN float total(LinearRun<R>& run) { return run.total_excess(); }
  static SBK_FN void settle(float&, float) {}
  static SBK_FN float from_lane(float x, int mask) { return from_lane_xor(x, mask); }
  static SBK_FN float combine(float x, float y) { return LinearRun<R>::combine(x, y); }
  static SBK_FN float enter(float carry, float excess) { return carry * rcp(1.f + excess); }
  static SBK_FN float advance(float carry, float excess) {
    const float rest = rcp(1.f + excess), left = excess < 1.f ? fmaf(-carry, excess * rest, carry) : carry * rest;
    return left < MIN_STICK ? 0.f : left;
  }
  static SBK_FN float undo(float carry, float excess) { return fmaf(carry, excess, carry); }
  // From a group's oldest key, after which `enter` leaves the stick: a key's share is 2^s times what is left after it.
  static SBK_FN void weights(const LinearRun<R>& run, float carry, float, float (&A)[R]) {
    constexpr int GROUP = LinearRun<R>::GROUP, GROUPS = LinearRun<R>::GROUPS;
    float left[GROUPS];
#pragma unroll
    for (int i = GROUPS - 1; i >= 0; i--) carry = left[i] = enter(carry, run.excess[i]);
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const float e = run.e[i * GROUP + t];
        A[i * GROUP + t] = left[i] * e;
        left[i] = fmaf(left[i], e, left[i]);
      }
    }
  }
};

// For warps with other rows too: those take products of 1 - beta, which only shrink, and a reciprocal a key. Rows whose 4 runs are
// simple keep what SimplePath gives them, to the bit: a row's results are its own affair, whatever its neighbours' logits.
// NOTE: by selection, not by branches: in divergent code the compiler runs a warpgroup's products one after the other.
template <int R> struct MixedPath {
  using Simple = SimplePath<R>;
  struct Total {
    float excess, rest;
    bool simple;  // settled: of the whole row
  };
  static SBK_FN Total identity() { return {0.f, 1.f, true}; }
  static SBK_FN Total total(LinearRun<R>& run) {
    float rest = 1.f;
    const bool simple = run.simple();
#pragma unroll
    for (int t = 0; t < R; t++) {
      run.e[t] = min_nan(run.e[t], MAX_E);
      rest *= rcp(1.f + run.e[t]);
    }
    return {Simple::total(run), rest, simple};
  }
  static SBK_FN Total combine(const Total& x, const Total& y) {
    return {Simple::combine(x.excess, y.excess), x.rest * y.rest, x.simple && y.simple};
  }
  static SBK_FN void settle(Total& x, const Total& row) { x.simple = row.simple; }
  static SBK_FN Total from_lane(const Total& x, int mask) {
    return {from_lane_xor(x.excess, mask), from_lane_xor(x.rest, mask), from_lane_xor(x.simple, mask) != 0.f};
  }
  static SBK_FN float enter(float carry, const Total& x) { return x.simple ? Simple::enter(carry, x.excess) : carry * x.rest; }
  static SBK_FN float advance(float carry, const Total& x) {
    const float left = carry * x.rest;
    return x.simple ? Simple::advance(carry, x.excess) : left < MIN_STICK ? 0.f : left;
  }
  static SBK_FN float undo(float carry, const Total& x) { return x.simple ? Simple::undo(carry, x.excess) : carry * rcp(x.rest); }
  static SBK_FN void weights(const LinearRun<R>& run, float carry, const Total& row, float (&A)[R]) {
    Simple::weights(run, carry, row.excess, A);
#pragma unroll
    for (int t = R - 1; t >= 0; t--) {
      carry *= rcp(1.f + run.e[t]);
      A[t] = row.simple ? A[t] : carry * run.e[t];
    }
  }
};

template <int R, typename Softplus = SoftplusPolynomial> struct LogRun {
  static constexpr float WHOLE = 0.f;
  static constexpr float NONE = 1e30f;
  static SBK_FN bool alive(float carry) { return carry < NONE; }
  static SBK_FN float stick(float carry) { return ex2(-carry); }

  float s[R];
  float softplus[R];

  SBK_FN void absorb(const float (&logits)[R]) {
#pragma unroll
    for (int t = 0; t < R; t++) {
      s[t] = logits[t];
      softplus[t] = Softplus::log2(s[t]);
    }
  }
  SBK_FN float sum() const {
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < R; t++) sum += softplus[t];
    return sum;
  }
  SBK_FN bool simple() const { return sum() < MAX_LOGIT2; }  // no logit is larger than the sum
  SBK_FN float gradient(int t, float a, float older) const { return a * ex2(-softplus[t]) - ex2(s[t] - softplus[t]) * older; }

  // Totals are sums of softplus2, of logits cut at MAX_LOGIT2: a large one's digits would push the newer keys' out of a sum.
  template <bool SIMPLE> struct Path {
    using Total = float;
    static SBK_FN float identity() { return 0.f; }
    static SBK_FN void settle(float&, float) {}
    static SBK_FN float from_lane(float x, int mask) { return from_lane_xor(x, mask); }
    static SBK_FN float total(LogRun& run) {
#pragma unroll
      for (int t = 0; t < R && !SIMPLE; t++) {
        run.s[t] = min_nan(run.s[t], MAX_LOGIT2);
        run.softplus[t] = Softplus::log2(run.s[t]);
      }
      return run.sum();
    }
    static SBK_FN float combine(float x, float y) { return x + y; }
    static SBK_FN float enter(float carry, float spent) { return carry + spent; }
    static SBK_FN float advance(float carry, float spent) { return carry + spent > -MIN_STICK_LOG2 ? NONE : carry + spent; }
    static SBK_FN float undo(float carry, float spent) { return carry - spent; }
    static SBK_FN void weights(const LogRun& run, float carry, float, float (&A)[R]) {
#pragma unroll
      for (int t = R - 1; t >= 0; t--) {
        carry += run.softplus[t];
        A[t] = ex2(run.s[t] - carry);
      }
    }
  };
};

}  // namespace sbk
