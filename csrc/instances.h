// The compiled kernels: each translation unit of instance.cu adds its own to one table, which the launcher and Python read.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace sbk {

struct Clear {
  void* data;
  size_t bytes;
};

struct Instance {
  std::string kernel, dtype;  // "forward", "backward_queries", "backward_keys"; "float16", "bfloat16"
  int block_d;                // widest D and Dv
  std::vector<std::pair<std::string, int>> config;
  const void* function;
  int threads, shared_bytes, params_bytes;
  // Makes what the kernel takes out of what Python packs, and says what is to be zero before; null where there is nothing to do.
  Clear (*prepare)(const void* packed, void* params) = nullptr;
};
constexpr int MAX_PARAMS_BYTES = 4096;  // of a kernel

std::vector<Instance>& instances();

// Launches on a stream (a cudaStream_t as an integer) of a device. std::runtime_error with CUDA's reason if it cannot.
void launch(int instance, int grid, const void* params, unsigned long long stream, int device);

}  // namespace sbk
