// The launcher: one kernel of the table on a stream of a device.
#include "instances.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <set>
#include <stdexcept>

namespace sbk {
namespace {

constexpr int STATIC_SHARED_LIMIT = 48 * 1024;  // bytes of dynamic shared memory beyond which a kernel has to ask, on each device

void check(cudaError_t error, const std::string& doing) {
  if (error != cudaSuccess) throw std::runtime_error(doing + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Makes a device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

void allow_shared(int instance, int device) {
  static std::mutex mutex;
  static std::set<std::pair<int, int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({instance, device})) return;
  const Instance& it = instances()[instance];
  check(cudaFuncSetAttribute(it.function, cudaFuncAttributeMaxDynamicSharedMemorySize, it.shared_bytes),
        it.kernel + ": " + std::to_string(it.shared_bytes) + " bytes of shared memory");
  done.insert({instance, device});
}

}  // namespace

std::vector<Instance>& instances() {
  static std::vector<Instance> all;
  return all;
}

void launch(int instance, int grid, const void* params, unsigned long long stream, int device) {
  const Instance& it = instances().at(instance);
  const OnDevice on(device);
  if (it.shared_bytes > STATIC_SHARED_LIMIT) allow_shared(instance, device);
  alignas(128) unsigned char prepared[MAX_PARAMS_BYTES];
  if (it.prepare != nullptr) {
    const Clear clear = it.prepare(params, prepared);
    if (clear.bytes) check(cudaMemsetAsync(clear.data, 0, clear.bytes, reinterpret_cast<cudaStream_t>(stream)), it.kernel + ": cudaMemsetAsync");
  }
  void* arguments[] = {it.prepare != nullptr ? prepared : const_cast<void*>(params)};
  check(cudaLaunchKernel(it.function, dim3(grid), dim3(it.threads), arguments, it.shared_bytes, reinterpret_cast<cudaStream_t>(stream)),
        it.kernel + " on device " + std::to_string(device));
}

}  // namespace sbk
