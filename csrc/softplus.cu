// Errors over all inputs and throughput of the variants in softplus.h, on a GPU.
#include "softplus.h"

#include <cuda_runtime.h>

#include <memory>

namespace sbk {

constexpr int ERROR_THREADS = 256;
constexpr int ERROR_BLOCKS = 2048;  // some for each of any GPU's multiprocessors
constexpr int TIME_THREADS = 1024;  // one block fills a multiprocessor
constexpr int TIME_LOGITS = 8;      // independent ones of each thread
constexpr int TIME_REPEATS = 1000;

// Inputs with bits begin to begin + count - 1; parts [gridDim.x].
template <typename Variant>
__global__ void __launch_bounds__(ERROR_THREADS) errors_kernel(unsigned begin, unsigned count, Errors* parts) {
  __shared__ Errors errors[ERROR_THREADS];
  Errors mine;
  mine.clear();
  for (unsigned long long i = blockIdx.x * ERROR_THREADS + threadIdx.x; i < count; i += gridDim.x * ERROR_THREADS)
    mine.evaluate<Variant>(begin + (unsigned)i);
  errors[threadIdx.x] = mine;
  for (int half = ERROR_THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) errors[threadIdx.x].take(errors[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) parts[blockIdx.x] = errors[0];
}

// A variant's results are its next inputs: nothing else runs in the loop. softplus2 grows by steps, 1 - beta nears 0.64.
template <typename Variant>
__global__ void __launch_bounds__(TIME_THREADS) time_kernel(int repeats, long long* clocks, float* results) {
  constexpr int G = Variant::GROUP;
  float s[TIME_LOGITS / G][G];
#pragma unroll
  for (int i = 0; i < TIME_LOGITS; i++) s[i / G][i % G] = -1e-3f * (threadIdx.x + i);
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int repeat = 0; repeat < repeats; repeat++)
#pragma unroll
    for (auto& group : s) {
      float y[G];
      Variant::of(group, y);
#pragma unroll
      for (int i = 0; i < G; i++) group[i] = y[i];
    }
  __syncthreads();
  if (threadIdx.x == 0) *clocks = clock64() - begin;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < TIME_LOGITS; i++) sum += s[i / G][i % G];
  results[threadIdx.x] = sum;
}

static void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <typename T> auto device_array(int n) {
  T* data;
  check(cudaMalloc(&data, n * sizeof(T)));
  return std::unique_ptr<T, decltype(&cudaFree)>(data, cudaFree);
}

std::vector<Errors> errors_on_gpu(const std::string& variant, unsigned begin, unsigned count, int device, void* stream) {
  check(cudaSetDevice(device));
  const auto parts = device_array<Errors>(ERROR_BLOCKS);
  with_variant(variant, [&](auto v) {
    errors_kernel<decltype(v)><<<ERROR_BLOCKS, ERROR_THREADS, 0, (cudaStream_t)stream>>>(begin, count, parts.get());
  });
  check(cudaGetLastError());
  std::vector<Errors> found(ERROR_BLOCKS);
  check(cudaMemcpyAsync(found.data(), parts.get(), ERROR_BLOCKS * sizeof(Errors), cudaMemcpyDeviceToHost, (cudaStream_t)stream));
  check(cudaStreamSynchronize((cudaStream_t)stream));
  return found;
}

double throughput_on_gpu(const std::string& variant, int device, void* stream) {
  check(cudaSetDevice(device));
  const auto clocks = device_array<long long>(1);
  const auto results = device_array<float>(TIME_THREADS);
  // The first launch only loads the instructions.
  for (int launch = 0; launch < 2; launch++)
    with_variant(variant, [&](auto v) {
      time_kernel<decltype(v)><<<1, TIME_THREADS, 0, (cudaStream_t)stream>>>(TIME_REPEATS, clocks.get(), results.get());
    });
  check(cudaGetLastError());
  long long elapsed;
  check(cudaMemcpyAsync(&elapsed, clocks.get(), sizeof elapsed, cudaMemcpyDeviceToHost, (cudaStream_t)stream));
  check(cudaStreamSynchronize((cudaStream_t)stream));
  return double(TIME_THREADS) * TIME_LOGITS * TIME_REPEATS / elapsed;
}

}  // namespace sbk
