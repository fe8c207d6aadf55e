// What Python sees: the table of compiled kernels, and their launch from packed parameters (params.h). Arguments were checked in
// Python; here only what would crash the process is looked at.
#include "hopper_params.h"
#include "instances.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string_view>

namespace py = pybind11;

void bind_math(py::module_& module);  // bind_math.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CUDA kernels of sbkernels; sbkernels.backends.cuda plans their launches.";
#if defined(SBK_CHECKED)
  m.attr("CHECKED") = true;
#else
  m.attr("CHECKED") = false;
#endif
  m.def(
      "instances",
      [] {
        py::list all;
        for (const sbk::Instance& it : sbk::instances())
          all.append(py::dict(py::arg("kernel") = it.kernel, py::arg("dtype") = it.dtype, py::arg("block_d") = it.block_d,
                              py::arg("config") = py::dict(py::cast(std::map<std::string, int>(it.config.begin(), it.config.end()))),
                              py::arg("threads") = it.threads, py::arg("shared_bytes") = it.shared_bytes,
                              py::arg("params_bytes") = it.params_bytes));
        return all;
      },
      "The compiled kernels, in the order `launch` counts them.");
  m.def(
      "hopper_backward_scratch", [](long long blocks, int head_dim) { return sbk::hopper_backward_scratch(blocks, head_dim).bytes; },
      py::arg("blocks"), py::arg("head_dim"), "Bytes of scratch the Hopper backward of a width takes for blocks of 64 query rows.");
  m.def(
      "launch",
      [](int instance, int grid, const py::bytes& params, unsigned long long stream, int device) {
        const std::string_view bytes = params;
        const int expected = sbk::instances().at(instance).params_bytes;
        if (int(bytes.size()) != expected)
          throw std::invalid_argument("params has " + std::to_string(bytes.size()) + " bytes: expected " + std::to_string(expected));
        sbk::launch(instance, grid, bytes.data(), stream, device);
      },
      py::arg("instance"), py::arg("grid"), py::arg("params"), py::arg("stream"), py::arg("device"),
      "Enqueue a kernel of the table: `grid` blocks, `params` the bytes of its parameter struct, `stream` a cudaStream_t as an integer.");
  bind_math(m);
}
