// How right and how fast each variant of softplus2 and of 1 - beta in math.cuh is: what `sbk softplus` prints. The errors are
// counted by the same code on the device (softplus.cu) and on the CPU (bind_math.cpp).
#pragma once
#include <math.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "math.cuh"

namespace sbk {

// Results from here on count for errors in ulps: smaller ones may be flushed to 0.
constexpr double MIN_RESULT = 2.350988701644575e-38;  // 2^-125
// No variant cuts logits up to here.
constexpr float UNCUT = RestReciprocal<4>::CUT;

// A variant takes GROUP logits and has a float64 `truth`, itself right to 2^-50.
template <typename Policy> struct Softplus2Of {
  static constexpr int GROUP = 1;
  static SBK_FN void of(const float (&s)[1], float (&y)[1]) { y[0] = Policy::log2(s[0]); }
  static SBK_FN double truth(double s) { return (s > 0. ? s : 0.) + log1p(exp2(-fabs(s))) * 1.4426950408889634; }
};
template <typename Policy> struct RestOf : Policy {
  static SBK_FN double truth(double s) { return 1. / (1. + exp2(s)); }
};

// take(name, special functions per logit, variant) of each variant.
template <typename Take> void for_each_variant(Take take) {
  take("softplus2 library", 1., Softplus2Of<SoftplusLibrary>{});
  take("softplus2 lg2", 2., Softplus2Of<SoftplusApproximate>{});
  take("softplus2 polynomial", 1., Softplus2Of<SoftplusPolynomial>{});
  take("1 - beta rcp", 2., RestOf<RestReciprocal<1>>{});
  take("1 - beta rcp of 2", 1.5, RestOf<RestReciprocal<2>>{});
  take("1 - beta rcp of 4", 1.25, RestOf<RestReciprocal<4>>{});
  take("1 - beta tanh", 1., RestOf<RestTanh>{});
}

// use(variant) of the one with this name; std::invalid_argument if there is none.
template <typename Use> void with_variant(const std::string& wanted, Use use) {
  std::string names;
  bool found = false;
  for_each_variant([&](const char* name, double, auto variant) {
    names += (names.empty() ? "'" : ", '") + std::string(name) + "'";
    if (wanted != name) return;
    found = true;
    use(variant);
  });
  if (!found) throw std::invalid_argument("variant '" + wanted + "': expected one of " + names);
}

// The largest error and the input's bits, the smallest that have it.
struct Worst {
  double error;
  unsigned input;
  SBK_FN void take(Worst other) {
    if (other.error > error || (other.error == error && other.input < input)) *this = other;
  }
};

struct Errors {
  Worst ulps_uncut;  // of inputs |s| <= UNCUT
  Worst ulps;        // of all; in units of the truth's last place in float32
  Worst absolute;
  unsigned lost_nans;  // NaNs that gave a number

  SBK_FN void clear() {
    ulps_uncut = ulps = absolute = {0., 0xffffffffu};
    lost_nans = 0;
  }
  SBK_FN void take(const Errors& other) {
    ulps_uncut.take(other.ulps_uncut);
    ulps.take(other.ulps);
    absolute.take(other.absolute);
    lost_nans += other.lost_nans;
  }
  // One input, taken by all of a group. A result that is no number counts as an infinite error.
  template <typename Variant> SBK_FN void evaluate(unsigned input) {
    float s, group[Variant::GROUP], y[Variant::GROUP];
    memcpy(&s, &input, sizeof s);
    for (float& member : group) member = s;
    Variant::of(group, y);
    const double truth = Variant::truth(s);
    unsigned long long bits;
    memcpy(&bits, &truth, sizeof bits);
    bits = (2046 + 23 - (bits >> 52)) << 52;  // 2^(23 - exponent of truth), which is not negative
    double ulps_per_unit;
    memcpy(&ulps_per_unit, &bits, sizeof bits);
    for (float result : y) {
      if (s != s) {
        lost_nans += result == result;
        continue;
      }
      double error = result == truth ? 0. : fabs(result - truth);
      if (error != error) error = INFINITY;
      absolute.take({error, input});
      if (truth < MIN_RESULT) continue;
      ulps.take({error * ulps_per_unit, input});
      if (fabsf(s) <= UNCUT) ulps_uncut.take({error * ulps_per_unit, input});
    }
  }
};

// Errors of a variant on a GPU over the inputs with bits from `begin` on, in parts for the caller to join, and its logits per
// clock per SM. Both return when done; std::invalid_argument for an unknown variant, std::runtime_error for CUDA's errors.
std::vector<Errors> errors_on_gpu(const std::string& variant, unsigned begin, unsigned count, int device, void* stream);
double throughput_on_gpu(const std::string& variant, int device, void* stream);

}  // namespace sbk
