// One bug for each tool of compute-sanitizer to find, and none: planted memcheck | racecheck | initcheck | synccheck | none.

#include <cstdio>
#include <cstring>

constexpr int THREADS = 64;

// One thread writes behind the end of x [THREADS].
__global__ void writes_behind(int* x) { x[threadIdx.x + 1] = threadIdx.x; }

// Threads read what threads of another warp write, without a barrier in between.
__global__ void races(int* x) {
  __shared__ int shared[THREADS];
  shared[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = shared[THREADS - 1 - threadIdx.x];
}

// x [THREADS] was never written.
__global__ void reads_unwritten(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }

// A thread comes to a barrier of its warp whose mask does not name it.
__global__ void is_not_named(int* x) {
  __shared__ int shared[THREADS];
  if (threadIdx.x <= 16) {
    shared[threadIdx.x] = x[threadIdx.x];
    __syncwarp(0xffff);
    x[threadIdx.x] = shared[16 - threadIdx.x];
  }
}

__global__ void is_right(int* x) {
  __shared__ int shared[THREADS];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = shared[THREADS - 1 - threadIdx.x];
}

int main(int count, char** words) {
  int *x = nullptr, *y = nullptr;
  const size_t bytes = THREADS * sizeof(int);
  const char* bug = count == 2 ? words[1] : "";
  const bool unwritten = std::strcmp(bug, "initcheck") == 0;
  if (cudaMalloc(&x, bytes) != cudaSuccess || cudaMalloc(&y, bytes) != cudaSuccess ||
      (!unwritten && cudaMemset(x, 0, bytes) != cudaSuccess)) {
    std::fprintf(stderr, "planted: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 3;
  }
  if (std::strcmp(bug, "memcheck") == 0) {
    writes_behind<<<1, THREADS>>>(x);
  } else if (std::strcmp(bug, "racecheck") == 0) {
    races<<<1, THREADS>>>(x);
  } else if (unwritten) {
    reads_unwritten<<<1, THREADS>>>(x, y);
  } else if (std::strcmp(bug, "synccheck") == 0) {
    is_not_named<<<1, THREADS>>>(x);
  } else if (std::strcmp(bug, "none") == 0) {
    is_right<<<1, THREADS>>>(x);
  } else {
    std::fprintf(stderr, "planted: expected memcheck, racecheck, initcheck, synccheck or none\n");
    return 2;
  }
  const bool failed = cudaDeviceSynchronize() != cudaSuccess;  // where the tool stops the kernel
  cudaFree(x);
  cudaFree(y);
  return failed;
}
