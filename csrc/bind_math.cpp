// Python bindings of math.cuh: its host build on arrays, for tests, and the measurements of softplus.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "softplus.h"

namespace py = pybind11;

using Array = py::array_t<float, py::array::c_style>;  // float32; others are refused, not converted

static void check_shape(const char* name, const Array& array, const std::vector<py::ssize_t>& expected) {
  const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  if (shape == expected) return;
  throw py::value_error(py::str("{} has shape {}: expected {}").format(name, py::tuple(py::cast(shape)), py::tuple(py::cast(expected))));
}

// ---- Variants of softplus2 and 1 - beta ----

static py::list variants() {
  py::list found;
  sbk::for_each_variant([&](const char* name, double special, auto v) { found.append(py::make_tuple(name, special, v.GROUP)); });
  return found;
}

static Array evaluate(const std::string& variant, const Array& s) {
  Array results(s.size());
  sbk::with_variant(variant, [&](auto v) {
    constexpr int G = decltype(v)::GROUP;
    check_shape("s", s, {s.size() / G * G});
    const float* from = s.data();
    float* to = results.mutable_data();
    for (py::ssize_t i = 0; i < s.size(); i += G) v.of(*(const float(*)[G])(from + i), *(float(*)[G])(to + i));
  });
  return results;
}

static sbk::Errors no_errors() {
  sbk::Errors errors;
  errors.clear();
  return errors;
}

static sbk::Errors errors_on_cpu(const std::string& variant, const Array& s) {
  sbk::Errors errors = no_errors();
  const float* inputs = s.data();
  const py::ssize_t n = s.size();
  py::gil_scoped_release released;
  sbk::with_variant(variant, [&](auto v) {
    for (py::ssize_t i = 0; i < n; i++) {
      unsigned bits;
      memcpy(&bits, inputs + i, sizeof bits);
      errors.evaluate<decltype(v)>(bits);
    }
  });
  return errors;
}

static sbk::Errors errors_on_gpu(const std::string& variant, unsigned begin, unsigned count, int device, uintptr_t stream) {
  sbk::Errors errors = no_errors();
  for (const sbk::Errors& part : sbk::errors_on_gpu(variant, begin, count, device, (void*)stream)) errors.take(part);
  return errors;
}

static double throughput_on_gpu(const std::string& variant, int device, uintptr_t stream) {
  return sbk::throughput_on_gpu(variant, device, (void*)stream);
}

static float value_of(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- Runs ----

template <typename Use> static auto with_run(const std::string& formulation, const Array& s, Use use) {
  const py::ssize_t size = s.ndim() == 2 ? s.shape(1) : 0;
  if (size != 8 && size != 16) throw py::value_error("s: expected shape [n, 8] or [n, 16]");
  const std::integral_constant<int, 8> eight;
  const std::integral_constant<int, 16> sixteen;
  if (formulation == "linear") return size == 8 ? use(sbk::LinearRun<8>{}, eight) : use(sbk::LinearRun<16>{}, sixteen);
  if (formulation == "log") return size == 8 ? use(sbk::LogRun<8>{}, eight) : use(sbk::LogRun<16>{}, sixteen);
  throw py::value_error("formulation '" + formulation + "': expected 'linear' or 'log'");
}

static py::tuple run(const std::string& formulation, const Array& s, const Array& carry) {
  return with_run(formulation, s, [&](auto step, auto size) -> py::tuple {
    constexpr int R = decltype(size)::value;
    const py::ssize_t n = s.shape(0);
    check_shape("carry", carry, {n});
    Array weights({n, py::ssize_t(R)}), rests({n, py::ssize_t(R)}), totals(n), exits(n), entries(n);
    for (py::ssize_t i = 0; i < n; i++) {
      const float entry = carry.at(i), total = step.absorb(*(const float(*)[R])s.data(i));
      for (int t = 0; t < R; t++) {
        weights.mutable_at(i, t) = step.weight(t, entry);
        rests.mutable_at(i, t) = step.gradient(t, 1.f, 0.f);
      }
      totals.mutable_at(i) = total;
      exits.mutable_at(i) = step.advance(entry, total);
      entries.mutable_at(i) = step.undo(exits.at(i), total);
    }
    return py::make_tuple(weights, rests, totals, exits, entries);
  });
}

static Array gradient(const std::string& formulation, const Array& s, const Array& a, const Array& older) {
  return with_run(formulation, s, [&](auto step, auto size) -> Array {
    constexpr int R = decltype(size)::value;
    const py::ssize_t n = s.shape(0);
    check_shape("a", a, {n, R});
    check_shape("older", older, {n, R});
    Array gradients({n, py::ssize_t(R)});
    for (py::ssize_t i = 0; i < n; i++) {
      step.absorb(*(const float(*)[R])s.data(i));
      for (int t = 0; t < R; t++) gradients.mutable_at(i, t) = step.gradient(t, a.at(i, t), older.at(i, t));
    }
    return gradients;
  });
}

void bind_math(py::module_& module) {
  py::module_ m = module.def_submodule("math", "csrc/math.cuh built for the CPU, on float32 arrays; errors and throughput on a GPU.");
  m.attr("MAX_LOGIT2") = sbk::MAX_LOGIT2;
  m.attr("MIN_STICK") = sbk::MIN_STICK;
  m.attr("INVISIBLE") = sbk::INVISIBLE;
  m.attr("UNCUT") = sbk::UNCUT;

  py::class_<sbk::Errors>(m, "Errors", "The largest errors of a variant, and the smallest inputs (by their bits) that have them.")
      .def(py::init(&no_errors))
      .def("take", &sbk::Errors::take, "Join with the errors of other inputs.")
      .def_property_readonly("ulps_uncut", [](const sbk::Errors& e) { return e.ulps_uncut.error; }, "Of inputs within +-UNCUT.")
      .def_property_readonly("ulps_uncut_at", [](const sbk::Errors& e) { return value_of(e.ulps_uncut.input); })
      .def_property_readonly("ulps", [](const sbk::Errors& e) { return e.ulps.error; }, "Of results of at least 2^-125.")
      .def_property_readonly("ulps_at", [](const sbk::Errors& e) { return value_of(e.ulps.input); })
      .def_property_readonly("absolute", [](const sbk::Errors& e) { return e.absolute.error; })
      .def_property_readonly("absolute_at", [](const sbk::Errors& e) { return value_of(e.absolute.input); })
      .def_readonly("lost_nans", &sbk::Errors::lost_nans, "Number of NaNs that gave a number.");

  m.def("variants", &variants, "(name, special functions per logit, logits per group) of each variant.");
  m.def("evaluate", &evaluate, py::arg("variant"), py::arg("s"), "Results [n] of base-2 logits s [n], groups one after the other.");
  m.def("errors_on_cpu", &errors_on_cpu, py::arg("variant"), py::arg("s"), "Errors of the host build over base-2 logits s.");
  m.def("errors_on_gpu", &errors_on_gpu, py::arg("variant"), py::arg("begin"), py::arg("count"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(), "Errors over the floats with bits begin to begin + count - 1.");
  m.def("throughput_on_gpu", &throughput_on_gpu, py::arg("variant"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(), "Logits per clock per multiprocessor, from registers.");
  m.def("run", &run, py::arg("formulation"), py::arg("s"), py::arg("carry"),
        "One run of base-2 logits s [n, 8 or 16], oldest first, entered with carry [n], 'linear' or 'log': weights [n, R],\n"
        "1 - beta [n, R], totals [n], carries on exit [n], and on entry [n] as undone from those on exit.");
  m.def("gradient", &gradient, py::arg("formulation"), py::arg("s"), py::arg("a"), py::arg("older"),
        "dz [n, R] by eq. (9) of base-2 logits s [n, R]: from a [n, R], eq. (8), and older [n, R], dr r + sum of a over the older keys.");
}
