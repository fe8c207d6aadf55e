// CUDA on a CPU, for tests of csrc where there is no GPU: each thread of a block is a fiber, a scheduler picks whose warp runs next, at
// random, and what the hardware does asynchronously (copies, products by warpgroups) happens at any moment that its rules allow. Included
// ahead of csrc's files, in which build.py puts instructions.inc and hopper.inc in the place of functions that wrap PTX.
//
// Shared memory begins as NaN. Refused, where a GPU would hang or give wrong results: lanes of a warp, or warps of a warpgroup, that come
// to different collective instructions; barriers that more arrive at than they are for; copies off their alignment; blocks in which
// nobody can go on. Not modelled: registers, time, fences, and memory that threads see in different orders.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda.h"

#define __CUDACC__
#define __CUDA_ARCH_FEAT_SM90_ALL
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __shared__ static  // such kernels run one block at a time

// ---- Vectors ----

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

// ---- The machine ----

namespace emulator {

struct Place { unsigned x; };
Place thread();
Place block();
unsigned lane();             // of the running thread, in its warp
int warp_in_group();         // of four
unsigned char* shared();     // the block's shared memory; addresses count from here
int threads_of_block();
unsigned draw(unsigned end);  // a random number below end

// A scope in which `shared` is a certain block's, whoever runs.
class InMemory {
 public:
  explicit InMemory(unsigned char* memory);
  ~InMemory();
};

// Ends the launch with an error.
[[noreturn]] void refuse(const char* what);
// Lets others run: once, for a thread that tries an mbarrier (its address and the parity; -1: a flag in global memory) again and again ...
void pass(int barrier, int parity);
// ... or until `done`.
void wait_until(const char* what, const std::function<bool()>& done);
// Something happened that a waiting thread may have waited for.
void note_progress();

// All lanes of the warp come here, each with an address in its stack; the last one does `act` for all.
void together(const char* what, const void* mine, const std::function<void(const void* const (&)[32])>& act);

// What the hardware does at some time from now on: at most one step of it at a time, until it returns true.
void later(std::function<bool()> step);

// Hardware barrier `id` (bar.sync): comes to it for one thread; `wait`: until as many as `threads` have come. All votes held?
bool named_barrier(int id, int threads, bool wait, bool vote);

// Products of a warpgroup, by a warp: its part of the next one, which is under way once all four have come to it with the same `operands`;
// the group that ends with it; until at most `pending` groups are still under way, for any warp.
void add_product(uint64_t operands, std::function<void()> part);
void commit_products();
void wait_for_products(int pending);

// Of the thread: bulk copies under way, in groups.
struct Bulk { bool read = false, written = false; };
void add_bulk(std::function<void()> read, std::function<void()> write);
void commit_bulk();
void wait_for_bulk(int pending, bool only_read);

// The launcher's: `kernel` in `grid` blocks of `threads`, `at_once` side by side; std::runtime_error with what was refused.
void run_grid(const std::function<void()>& kernel, int grid, int threads, int at_once);
// What runs when follows from the seed; eagerness: percent of asynchronous work that is done at once.
void schedule(unsigned seed, int eagerness);

}  // namespace emulator

#define threadIdx emulator::thread()
#define blockIdx emulator::block()

inline void __syncwarp() { emulator::together("__syncwarp", nullptr, [](auto&) {}); }
inline void __nanosleep(unsigned) {}

template <typename X> X __shfl_sync(unsigned, X x, int source) {
  struct { X mine; int source; X got; } own = {x, source & 31, x};
  using Own = decltype(own);
  emulator::together("__shfl_sync", &own, [](const void* const (&lanes)[32]) {
    for (const void* at : lanes) {
      Own& to = *(Own*)at;
      to.got = ((const Own*)lanes[to.source])->mine;
    }
  });
  return own.got;
}
template <typename X> X __shfl_xor_sync(unsigned all, X x, int mask) { return __shfl_sync(all, x, emulator::lane() ^ mask); }
inline unsigned __ballot_sync(unsigned, bool yes) {
  struct { bool yes; unsigned all; } own = {yes, 0};
  using Own = decltype(own);
  emulator::together("__ballot_sync", &own, [](const void* const (&lanes)[32]) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++) all |= (unsigned)((const Own*)lanes[i])->yes << i;
    for (const void* at : lanes) ((Own*)at)->all = all;
  });
  return own.all;
}
inline bool __all_sync(unsigned all, bool yes) { return __ballot_sync(all, yes) == ~0u; }
inline bool __any_sync(unsigned all, bool yes) { return __ballot_sync(all, yes) != 0; }
inline int __reduce_min_sync(unsigned, int x) {
  struct { int x; } own = {x};
  using Own = decltype(own);
  emulator::together("__reduce_min_sync", &own, [](const void* const (&lanes)[32]) {
    int least = ((const Own*)lanes[0])->x;
    for (const void* at : lanes) least = min(least, ((const Own*)at)->x);
    for (const void* at : lanes) ((Own*)at)->x = least;
  });
  return own.x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }

template <typename X> X __ldcg(const X* from) { return *from; }
template <typename X> void __stcg(X* to, X x) { *to = x; }
template <typename F> int atomically(int* at, F change) {
  const int before = *at;
  *at = change(before);
  emulator::note_progress();
  return before;
}
inline int atomicAdd(int* at, int x) { return x ? atomically(at, [=](int y) { return y + x; }) : *at; }
inline int atomicExch(int* at, int x) { return atomically(at, [=](int) { return x; }); }
inline int atomicMin(int* at, int x) { return atomically(at, [=](int y) { return min(x, y); }); }
inline int atomicMax(int* at, int x) { return atomically(at, [=](int y) { return max(x, y); }); }
inline int atomicCAS(int* at, int expected, int x) { return atomically(at, [=](int y) { return y == expected ? x : y; }); }

inline void __syncthreads() { emulator::named_barrier(0, emulator::threads_of_block(), true, true); }
inline int __syncthreads_or(int yes) { return !emulator::named_barrier(0, emulator::threads_of_block(), true, !yes); }
