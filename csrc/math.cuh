// The per-logit mathematics of stick-breaking attention, once for all kernels: softplus policies and, on one thread's run of
// keys of one row, the stick step in linear and in log space. Equations are numbered as in sbkernels/reference.py.
//
// A row's keys in a tile lie in 4 runs, one a lane (tile.cuh); in a run they are ordered oldest to newest. A `Run` takes the
// base-2 logits of its keys and answers, by key: the weight A, 1 - beta, and the logit's gradient. What is left of the stick is
// passed on as a `carry`, a number whose meaning belongs to the formulation:
//
//     LinearRun   carry = the stick itself; eq. (6) and (7): u = 1 + 2^s, one reciprocal for each pair of keys. Products only
//                 shrink, so underflow to 0 means "used up".
//     LogRun      carry = -log2 of the stick, the paper's form: A = 2^(s - sum of softplus2 from this key to the newest).
#pragma once
#include "instructions.cuh"

namespace sbk {

constexpr float LOG2_E = 1.44269504f;
// Base-2 logits are cut here: (1 + 2^63)^2 and its reciprocal are normal float32 numbers. 1 - beta is right to 2^-63.
constexpr float MAX_LOGIT2 = 63.f;
// A stick below this counts as used up: what one key beyond MAX_LOGIT2 leaves, and invisible in any output dtype.
constexpr float MIN_STICK_LOG2 = -62.f;
constexpr float MIN_STICK = 2.16840434e-19f;  // 2^-62
// Up to here the product of all u of a run and its reciprocal are normal numbers.
constexpr float NEWTON_LIMIT = 1e36f;
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

// The paper's: right to 2^-22 absolute only, which far keys add up to more than the tolerance allows the remainder.
struct SoftplusApproximate {
  static SBK_FN float log2(float s) { return s > 15.f ? s : lg2(1.f + ex2(s)); }
};

// The mathematical library's.
struct SoftplusLibrary {
  static SBK_FN float log2(float s) { return s > 25.f ? s : log1pf(exp2f(s)) * LOG2_E; }
};

// ---- 1 - beta = 1 / (1 + 2^s) ----

struct RestReciprocal {
  static SBK_FN float of(float s) { return rcp(1.f + ex2(min_nan(s, MAX_LOGIT2))); }
};

// Absolute error 2^-12: 1 - beta near 1 has no digits left for a small share.
struct RestTanh {
  static SBK_FN float of(float s) { return fmaf(-0.5f, tanh_approx(s * (0.5f / LOG2_E)), 0.5f); }
};

// ---- One thread's run of R keys of one row ----

template <int R> struct LinearRun {
  static constexpr float WHOLE = 1.f;  // the carry of a whole stick
  static constexpr float NONE = 0.f;   // of a used-up one
  static constexpr float IDENTITY = 1.f;

  static SBK_FN float combine(float x, float y) { return x * y; }
  // The carry on exit of keys with this total; used up at MIN_STICK.
  static SBK_FN float advance(float carry, float total) { float y = carry * total; return y < MIN_STICK ? 0.f : y; }
  // The carry on entry of keys with this total, from the one on their exit.
  static SBK_FN float undo(float carry, float total) { return carry * rcp(total); }
  static SBK_FN bool alive(float carry) { return carry > 0.f; }
  static SBK_FN float stick(float carry) { return carry; }

  float e[R];              // 2^s
  float pair[R / 2];       // 1 / (u_older u_newer) of each pair of keys
  float inclusive[R / 2];  // product of `pair` from here to the newest

  // Takes the run's base-2 logits; returns its total, prod(1 - beta).
  // NOTE: of keys with small shares, rcp.approx errs to one side, by up to 2^-24 a pair: 1e-4 of the stick after 8,192 keys. What
  // the forward multiplies up over all keys is therefore ACCURATE: a Newton step from the product of all u.
  template <bool ACCURATE> SBK_FN float absorb(const float (&s)[R]) {
    float product = 1.f, all = 1.f;
#pragma unroll
    for (int j = R / 2 - 1; j >= 0; j--) {
      e[2 * j] = ex2(min_nan(s[2 * j], MAX_LOGIT2));
      e[2 * j + 1] = ex2(min_nan(s[2 * j + 1], MAX_LOGIT2));
      const float older = 1.f + e[2 * j], both = fmaf(older, e[2 * j + 1], older);
      pair[j] = rcp(both);
      product *= pair[j];
      inclusive[j] = product;
      all *= both;
    }
    return ACCURATE && all < NEWTON_LIMIT ? fmaf(product, fmaf(-all, product, 1.f), product) : product;
  }
  // Eq. (3), given the carry on entry of the run.
  SBK_FN float weight(int t, float carry) const {
    const float y = carry * inclusive[t / 2];  // the stick after the pair's older key
    return t % 2 ? fmaf(y, e[t - 1], y) * e[t] : y * e[t];
  }
  // Eq. (9) from a of eq. (8) and dr r + sum of a over the older keys.
  SBK_FN float gradient(int t, float a, float older) const {
    const float rest = fmaf(pair[t / 2], e[t ^ 1], pair[t / 2]);
    return fmaf(-e[t], older, a) * rest;
  }
};

template <int R, typename Softplus = SoftplusPolynomial> struct LogRun {
  static constexpr float WHOLE = 0.f;
  static constexpr float NONE = 1e30f;
  static constexpr float IDENTITY = 0.f;

  static SBK_FN float combine(float x, float y) { return x + y; }
  static SBK_FN float advance(float carry, float total) { float y = carry + total; return y > -MIN_STICK_LOG2 ? NONE : y; }
  static SBK_FN float undo(float carry, float total) { return carry - total; }
  static SBK_FN bool alive(float carry) { return carry < NONE; }
  static SBK_FN float stick(float carry) { return ex2(-carry); }

  float s[R];
  float softplus[R];
  float exponent[R];  // s - sum of softplus2 from here to the run's newest

  template <bool ACCURATE> SBK_FN float absorb(const float (&logits)[R]) {
    float sum = 0.f;
#pragma unroll
    for (int t = R - 1; t >= 0; t--) {
      s[t] = logits[t];
      softplus[t] = Softplus::log2(s[t]);
      sum += softplus[t];
      exponent[t] = s[t] - sum;
    }
    return sum;
  }
  SBK_FN float weight(int t, float carry) const { return ex2(exponent[t] - carry); }
  SBK_FN float gradient(int t, float a, float older) const { return a * ex2(-softplus[t]) - ex2(s[t] - softplus[t]) * older; }
};

}  // namespace sbk
