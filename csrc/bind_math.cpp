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

// Totals as rows of floats: a number alone, or those of MixedPath's struct.
template <class Total> constexpr int COLUMNS = 3;
template <> constexpr int COLUMNS<float> = 1;

static void put_total(float* to, float x) { *to = x; }
static float get_total(const float* from, float) { return *from; }
static void make_exact(float&) {}
template <class Total> static void put_total(float* to, const Total& x) {
  to[0] = x.excess;
  to[1] = x.rest;
  to[2] = x.simple;
}
template <class Total> static Total get_total(const float* from, Total) { return {from[0], from[1], from[2] != 0.f}; }
template <class Total> static void make_exact(Total& x) { x.simple = false; }

// use(run, R, path) for an empty run of R keys and its Path<simple>.
template <template <int> class Run, typename Use> static auto with_path(py::ssize_t size, bool simple, Use use) {
  const auto of_size = [&](auto r) {
    using R = decltype(r);
    using Of = Run<R::value>;
    return simple ? use(Of{}, r, typename Of::template Path<true>{}) : use(Of{}, r, typename Of::template Path<false>{});
  };
  switch (size) {
    case 4: return of_size(std::integral_constant<int, 4>{});
    case 8: return of_size(std::integral_constant<int, 8>{});
    case 16: return of_size(std::integral_constant<int, 16>{});
    case 32: return of_size(std::integral_constant<int, 32>{});
  }
  throw py::value_error("s: expected shape [n, R] with R one of 4, 8, 16, 32");
}

template <int R> using DefaultLogRun = sbk::LogRun<R>;

template <typename Use> static auto with_run(const std::string& formulation, const std::string& path, py::ssize_t size, Use use) {
  const bool simple = path == "simple";
  if (!simple && path != "mixed" && path != "exact") throw py::value_error("path '" + path + "': expected 'simple', 'mixed' or 'exact'");
  if (formulation == "linear") return with_path<sbk::LinearRun>(size, simple, use);
  if (formulation == "log") return with_path<DefaultLogRun>(size, simple, use);
  throw py::value_error("formulation '" + formulation + "': expected 'linear' or 'log'");
}

static py::dict run(const std::string& formulation, const std::string& path_name, const Array& s, const Array& carry, const Array& a,
                    const Array& older) {
  return with_run(formulation, path_name, s.ndim() == 2 ? s.shape(1) : 0, [&](auto keys, auto size, auto path) {
    using Run = decltype(keys);
    using Path = decltype(path);
    using Total = typename Path::Total;
    constexpr int R = decltype(size)::value;
    const py::ssize_t n = s.shape(0);
    check_shape("carry", carry, {n});
    check_shape("a", a, {n, R});
    check_shape("older", older, {n, R});
    py::array_t<bool> simples(n), alive(n);
    Array totals({n, py::ssize_t(COLUMNS<Total>)}), weights({n, py::ssize_t(R)}), gradients({n, py::ssize_t(R)});
    Array entered(n), advanced(n), undone(n), sticks(n);
    for (py::ssize_t i = 0; i < n; i++) {
      keys.absorb(*(const float(*)[R])s.data(i));
      simples.mutable_at(i) = keys.simple();
      Total total = Path::total(keys);
      if (path_name == "exact") make_exact(total);
      Path::settle(total, total);  // the only run of its row
      const float entry = carry.at(i), exit = Path::advance(entry, total);
      put_total(totals.mutable_data(i), total);
      entered.mutable_at(i) = Path::enter(entry, total);
      advanced.mutable_at(i) = exit;
      undone.mutable_at(i) = Path::undo(exit, total);
      alive.mutable_at(i) = Run::alive(exit);
      sticks.mutable_at(i) = Run::stick(exit);
      Path::weights(keys, entry, total, *(float(*)[R])weights.mutable_data(i));
      for (int t = 0; t < R; t++) gradients.mutable_at(i, t) = keys.gradient(t, a.at(i, t), older.at(i, t));
    }
    return py::dict(py::arg("simple") = simples, py::arg("total") = totals, py::arg("enter") = entered, py::arg("advance") = advanced,
                    py::arg("undo") = undone, py::arg("alive") = alive, py::arg("stick") = sticks, py::arg("weights") = weights,
                    py::arg("gradient") = gradients);
  });
}

// Path's step of this name on pairs of carry (of combine: total) and total.
static Array step(const std::string& formulation, const std::string& path_name, const std::string& name, const Array& x, const Array& y) {
  return with_run(formulation, path_name, 4, [&](auto, auto, auto path) {
    using Path = decltype(path);
    using Total = typename Path::Total;
    const bool combine = name == "combine";
    if (!combine && name != "enter" && name != "advance" && name != "undo")
      throw py::value_error("step '" + name + "': expected 'combine', 'enter', 'advance' or 'undo'");
    const py::ssize_t n = x.ndim() ? x.shape(0) : 0;
    const std::vector<py::ssize_t> numbers = {n}, totals = {n, COLUMNS<Total>};
    check_shape("x", x, combine ? totals : numbers);
    check_shape("y", y, totals);
    Array results(combine ? totals : numbers);
    for (py::ssize_t i = 0; i < n; i++) {
      const float carry = *x.data(i);
      float* to = results.mutable_data(i);
      const Total total = get_total(y.data(i), Total{});
      if (combine) put_total(to, Path::combine(get_total(x.data(i), Total{}), total));
      if (name == "enter") *to = Path::enter(carry, total);
      if (name == "advance") *to = Path::advance(carry, total);
      if (name == "undo") *to = Path::undo(carry, total);
    }
    return results;
  });
}

static py::dict constants(const std::string& formulation, const std::string& path_name) {
  return with_run(formulation, path_name, 4, [&](auto keys, auto, auto path) {
    using Run = decltype(keys);
    using Total = typename decltype(path)::Total;
    Total identity = decltype(path)::identity();
    if (path_name == "exact") make_exact(identity);
    Array columns(COLUMNS<Total>);
    put_total(columns.mutable_data(), identity);
    return py::dict(py::arg("WHOLE") = +Run::WHOLE, py::arg("NONE") = +Run::NONE, py::arg("IDENTITY") = columns);
  });
}

void bind_math(py::module_& module) {
  py::module_ m = module.def_submodule("math", "csrc/math.cuh built for the CPU, on float32 arrays; errors and throughput on a GPU.");
  m.attr("MAX_LOGIT2") = sbk::MAX_LOGIT2;
  m.attr("SIMPLE_LIMIT") = sbk::SIMPLE_LIMIT;
  m.attr("MAX_EXCESS") = sbk::MAX_EXCESS;
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
  m.def("run", &run, py::arg("formulation"), py::arg("path"), py::arg("s"), py::arg("carry"), py::arg("a"), py::arg("older"),
        "One run ('linear' or 'log') of base-2 logits s [n, R], oldest first, a row of its own, entered with carry [n] and taken\n"
        "through a path: 'simple', Path<true>, simple() or not; 'mixed', Path<false>; or 'exact', the same, with no row taken for\n"
        "simple. By name, [n]: simple; enter and advance of both; undo of what advance left; alive and stick of that; [n, R]:\n"
        "weights, and gradient by eq. (9) from a, eq. (8), and older, dr r + sum of a over the older keys; and total: [n, 1], of\n"
        "the linear run's 'mixed' and 'exact' [n, 3]: excess, rest, simple.");
  m.def("step", &step, py::arg("formulation"), py::arg("path"), py::arg("name"), py::arg("x"), py::arg("y"),
        "combine of totals x and y, shaped as by run; or enter, advance or undo of carries x [n] and totals y.");
  m.def("constants", &constants, py::arg("formulation"), py::arg("path"), "The carries WHOLE and NONE, the total IDENTITY.");
}
