// What csrc's launcher does, on the emulator, and what Python says to it.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "hopper_params.h"
#include "instances.h"

namespace sbk {

constexpr int MOST_SHARED_BYTES = 227 << 10;  // of a block

std::vector<Instance>& instances() {
  static std::vector<Instance> all;
  return all;
}

template <typename Params> static std::function<void()> with_params(const void* function, const void* params) {
  auto kernel = reinterpret_cast<void (*)(Params)>(const_cast<void*>(function));
  auto given = std::make_shared<Params>(*static_cast<const Params*>(params));
  return [=] { kernel(*given); };
}

void launch(int instance, int grid, const void* params, unsigned long long, int) {
  const Instance& it = instances().at(instance);
  if (it.shared_bytes > MOST_SHARED_BYTES) throw std::runtime_error(it.kernel + " takes more shared memory than a multiprocessor has");
  alignas(128) unsigned char prepared[MAX_PARAMS_BYTES];
  if (it.prepare != nullptr) {
    const Clear clear = it.prepare(params, prepared);
    if (clear.bytes) memset(clear.data, 0, clear.bytes);
    params = prepared;
  }
  const bool hopper = it.kernel.rfind("hopper_", 0) == 0, backward = it.kernel.find("backward") != std::string::npos;
  const auto kernel = hopper ? backward ? with_params<HopperBackwardParams>(it.function, params) : with_params<HopperForwardParams>(it.function, params)
                            : backward ? with_params<BackwardParams>(it.function, params) : with_params<ForwardParams>(it.function, params);
  const bool persistent = it.kernel == "hopper_forward" || it.kernel == "hopper_backward";
  emulator::run_grid(kernel, grid, it.threads, persistent ? grid : 1);
}

}  // namespace sbk

// Beside csrc's bindings, which call this: how the machine goes on.
void bind_math(pybind11::module_& module) {
  module.def("schedule", &emulator::schedule, pybind11::arg("seed"), pybind11::arg("eagerness"));
}
