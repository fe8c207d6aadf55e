// Each PTX instruction the kernels use, wrapped once. Compiles with nvcc, with NVRTC (no headers there) and, for the scalar
// functions, as plain C++ on the CPU, where the library's functions stand in for the approximations.
#pragma once

#if defined(__CUDACC__)
#define SBK_FN __device__ __forceinline__
#else
#include <math.h>
#define SBK_FN inline
#endif

namespace sbk {

// ---- Scalars: relative errors over all inputs are printed by `sbk softplus` ----

#if defined(__CUDACC__)
// 2^x; results below 2^-126 flushed to 0.
SBK_FN float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// log2(x) to 2^-22 absolute.
SBK_FN float lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// 1/x to one ulp; 0 beyond 2^126.
SBK_FN float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// tanh(x) to 2^-11.
SBK_FN float tanh_approx(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// The larger or smaller of two, NaN if either is (fmaxf and fminf drop a NaN).
SBK_FN float min_nan(float x, float y) { float z; asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y)); return z; }
SBK_FN float max_nan(float x, float y) { float z; asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y)); return z; }
#else
SBK_FN float flush(float y) { return fabsf(y) < 1.17549435e-38f ? 0.f : y; }
SBK_FN float ex2(float x) { return flush(exp2f(x)); }
SBK_FN float lg2(float x) { return log2f(x); }
SBK_FN float rcp(float x) { return flush(1.f / x); }
SBK_FN float tanh_approx(float x) { return tanhf(x); }
SBK_FN float min_nan(float x, float y) { return x != x || x < y ? x : y; }
SBK_FN float max_nan(float x, float y) { return x != x || x > y ? x : y; }
SBK_FN float from_lane_xor(float x, int) { return x; }  // no lanes here
#endif

#if defined(__CUDACC__)

// ---- Types of the tensors ----

struct half { unsigned short bits; };
struct bfloat { unsigned short bits; };

// Two floats rounded to T, the first in the lower half.
template <typename T> SBK_FN unsigned pack(float low, float high);
template <> SBK_FN unsigned pack<half>(float low, float high) {
  unsigned y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y;
}
template <> SBK_FN unsigned pack<bfloat>(float low, float high) {
  unsigned y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y;
}

// ---- Shared memory ----

SBK_FN unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes global -> shared, asynchronously; all but the first `bytes` are filled with zeros.
SBK_FN void copy_async_16(unsigned shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
SBK_FN void copy_async_4(unsigned shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
SBK_FN void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's latest groups are still under way.
template <int PENDING> SBK_FN void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lanes 8i to 8i + 7 give the rows of matrix i. A lane receives elements
// [lane / 4][lane % 4 * 2 + (0, 1)] of each or, TRANSPOSED, of its transpose.
template <bool TRANSPOSED> SBK_FN void load_matrices(unsigned (&r)[4], unsigned address) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

SBK_FN void store_shared(unsigned address, unsigned short x) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory"); }
SBK_FN void store_shared(unsigned address, unsigned x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }
template <int OFFSET = 0> SBK_FN void store_shared(unsigned address, float x) {
  asm volatile("st.shared.f32 [%0 + %2], %1;" ::"r"(address), "f"(x), "n"(OFFSET) : "memory");
}
SBK_FN void store_shared(unsigned address, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
// At address + OFFSET.
template <int OFFSET = 0> SBK_FN float load_shared(unsigned address) {
  float x; asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(x) : "r"(address), "n"(OFFSET) : "memory"); return x;
}
SBK_FN int load_shared_int(unsigned address) {
  int x; asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(address) : "memory"); return x;
}

// ---- Between lanes ----

// An 8 x 8 matrix held as by load_matrices -> its transpose.
SBK_FN unsigned transpose_matrix(unsigned x) {
  unsigned y; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x)); return y;
}
constexpr unsigned ALL_LANES = 0xffffffffu;
// x of the lane whose number differs in the bits of `mask`.
SBK_FN float from_lane_xor(float x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }

// ---- Tensor cores ----

// c[16, 8] += a[16, 16] b[16, 8]. Lane l holds rows l / 4 and l / 4 + 8: of c columns l % 4 * 2 + (0, 1) of the first row, then of
// the second; a[0..3]: rows (first, second, first, second), columns l % 4 * 2 + (0, 1), the last two + 8; b: rows as a's columns.
template <typename T> SBK_FN void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <> SBK_FN void multiply_add<half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> SBK_FN void multiply_add<bfloat>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // __CUDACC__

}  // namespace sbk
