// Each instruction of compute capability 9.0a that the Hopper kernels use, wrapped once: barriers in shared memory, copies by
// tensor maps and in bulk, matrix products by warpgroups of 128 threads. Shared memory is named by its address (shared_address).
//
// Tiles lie in slabs of 64 columns: rows of 128 bytes, row after row, swizzled by 128 bytes (the 16-byte piece c of row r lies in
// place c ^ r % 8), as tensor maps with CU_TENSOR_MAP_SWIZZLE_128B and boxes 64 elements wide write them. A slab starts on a
// multiple of SWIZZLE_BYTES.
#pragma once
#include "instructions.cuh"
#include "hopper_params.h"

namespace sbk {

using uint64 = unsigned long long;
using Barrier = uint64;  // an mbarrier, in shared memory

constexpr int SLAB_COLUMNS = 64, SLAB_ROW_BYTES = 128;
constexpr int SWIZZLE_BYTES = 1024;  // the swizzle repeats after as much: 8 rows

// ---- Barriers: a phase ends with its last arrival and the last of the bytes expected; the first phase is 0 ----

SBK_FN void barrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init, before other threads or the copy engine see the barriers (with a __syncthreads).
SBK_FN void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Of the threads with `yes`. NOTE: a predicate, not a branch: behind branches of single lanes the compiler was seen to leave out a
// __syncwarp(), which made results wrong.
SBK_FN void barrier_arrive(unsigned barrier, bool yes = true) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(barrier), "r"((int)yes) : "memory");
}
// Arrives, and holds the phase up for as many bytes of copies.
SBK_FN void barrier_arrive_expecting(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Whether the latest phase of this parity has ended, waiting a while for it, as long as the hardware likes. A phase before the first
// counts as ended and as odd, so that whoever fills a buffer first waits for nothing.
SBK_FN bool barrier_try_wait(unsigned barrier, int parity) {
  unsigned done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done;
}
// Until it has, or `limit` tries have been made; whether it has.
SBK_FN bool barrier_wait(unsigned barrier, int parity, int limit) {
  for (int i = 0; i < limit; i++)
    if (barrier_try_wait(barrier, parity)) return true;
  return false;
}
// Whether it has by now, without a wait. A wait takes some 60 clocks even when it has: asked early, they pass behind other work. Not so
// early that the phase before may still be under way, which has the other parity and would pass for it.
SBK_FN bool barrier_test(unsigned barrier, int parity) {
  unsigned done;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done;
}

// The lane that arrives for a warp, whose __syncwarp() has ordered what the others did before. compute-sanitizer follows threads, not
// warps, and wants each phase waited for: built with SBK_CHECKED, all lanes arrive for themselves, and all wait.
#if defined(SBK_CHECKED)
constexpr bool CHECKED = true;
#else
constexpr bool CHECKED = false;
#endif
constexpr int WARP_ARRIVALS = CHECKED ? 32 : 1;
SBK_FN bool arrives(int lane) { return CHECKED || lane == 0; }

// The hardware's 16 barriers, for whole warps: waits for `threads` threads to have come to it, those that only arrive included.
SBK_FN void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// The same; whether `yes` held for all of them.
SBK_FN bool named_all(int id, int threads, bool yes) {
  unsigned all;
  asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; barrier.cta.red.and.pred p, %1, %2, p; selp.u32 %0, 1, 0, p;}"
               : "=r"(all) : "r"(id), "r"(threads), "r"((int)yes) : "memory");
  return all;
}
SBK_FN void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- Registers: a warpgroup gives some back, or waits for some; multiples of 8 ----

// What a block of so many threads has to share out. NOTE: who waits for more than there are waits for ever.
constexpr int registers_at_start(int threads) { return 65536 / threads / 8 * 8 * threads; }

template <int COUNT> SBK_FN void registers_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> SBK_FN void registers_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// ---- Flags in global memory, between blocks ----

SBK_FN int load_acquire(const int* p) {
  int x; asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory"); return x;
}
SBK_FN void store_release(int* p, int x) { asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }

// ---- Copies ----

// Makes this thread's writes to shared memory visible to the copy engine and the tensor cores; then a barrier, then the reader.
SBK_FN void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for what this thread has seen of global memory.
SBK_FN void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A map's box at these coordinates (in elements, fastest dimension first) -> shared; the bytes count towards the barrier's phase.
SBK_FN void load_box(unsigned shared, const void* map, unsigned barrier, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(shared), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
SBK_FN void load_box(unsigned shared, const void* map, unsigned barrier, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
               ::"r"(shared), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}
// Shared -> a map's box, part of this thread's bulk group; elements beyond the tensor are dropped.
SBK_FN void store_box(unsigned shared, const void* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
SBK_FN void store_box(unsigned shared, const void* map, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(map), "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}
// Bytes of shared -> global memory, and floats in shared added to those in global memory, part of this thread's bulk group.
// Addresses and bytes: multiples of 16.
SBK_FN void store_bulk(void* global, unsigned shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes) : "memory");
}
SBK_FN void reduce_add(float* global, unsigned shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes) : "memory");
}
SBK_FN void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's latest bulk groups are still under way ...
template <int PENDING> SBK_FN void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory"); }
// ... or still have shared memory to read.
template <int PENDING> SBK_FN void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"); }

// box(shared, map, c0, ...) for each slab of a whole block of keys from `row` on of a head: the tile's slabs lie slab_bytes apart.
template <int SLABS, typename Box>
SBK_FN void each_box(const MappedKeys& x, unsigned tile, int slab_bytes, int batch, int head, int row, Box box) {
  const int at = batch * x.batch_rows + row;
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++)
    box(tile + slab * slab_bytes, &x.blocks[at % 2], slab * SLAB_COLUMNS, 0, 0, at / 2, batch * x.batch_slices + head);
}
// Global -> shared; the bytes count towards the barrier's phase.
template <int SLABS>
SBK_FN void load_keys(const MappedKeys& x, unsigned tile, int slab_bytes, int batch, int head, int row, unsigned barrier) {
  each_box<SLABS>(x, tile, slab_bytes, batch, head, row,
                  [&](unsigned shared, const TensorMap* map, auto... at) { load_box(shared, map, barrier, at...); });
}
// Shared -> global, part of this thread's bulk group.
template <int SLABS> SBK_FN void store_keys(const MappedKeys& x, unsigned tile, int slab_bytes, int batch, int head, int row) {
  each_box<SLABS>(x, tile, slab_bytes, batch, head, row,
                  [&](unsigned shared, const TensorMap* map, auto... at) { store_box(shared, map, at...); });
}

// ---- Blocks that no box can take, since rows behind a sequence's last belong to others: by threads, 16 bytes a time ----

// Rows of a matrix: where row 0 is, how far apart they are, how many of what width, and which row a tile begins with.
template <typename T> struct Rows {
  T* data;
  int64 stride;
  int count, width, first;
};

// piece(shared, global) for each of THREADS threads' pieces of a tile of ROWS rows, in slabs slab_bytes apart; global: null beyond the rows.
template <int ROWS, int SLABS, class Order, int THREADS, typename T, typename Piece>
SBK_FN void each_piece(unsigned tile, int slab_bytes, const Rows<T>& x, int thread, Piece piece) {
#pragma unroll 1
  for (int i = thread; i < ROWS * 8 * SLABS; i += THREADS) {
    const int c = i % 8, r = i / 8 % ROWS, slab = i / 8 / ROWS, row = x.first + Order::offset(r), column = slab * SLAB_COLUMNS + c * 8;
    const bool there = row < x.count && column < x.width;
    piece(tile + slab * slab_bytes + r * SLAB_ROW_BYTES + ((c ^ r % 8) << 4), there ? x.data + row * x.stride + column : nullptr);
  }
}
// Global -> shared by a warp, zeros for what is not there; then its first lane arrives at the barrier.
template <int ROWS, int SLABS, class Order, typename T>
SBK_FN void load_pieces(unsigned tile, int slab_bytes, const Rows<T>& x, unsigned barrier, int lane) {
  each_piece<ROWS, SLABS, Order, 32>(tile, slab_bytes, x, lane, [&](unsigned shared, const T* from) {
    copy_async_16(shared, from == nullptr ? x.data : from, from == nullptr ? 0 : 16);
  });
  copy_async_commit();
  copy_async_wait<0>();
  fence_async_shared();
  __syncwarp();
  barrier_arrive(barrier, lane == 0);
}
SBK_FN uint4 load_shared_16(unsigned address) {
  uint4 x; asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}
// Shared -> global by THREADS threads: what is there.
template <int ROWS, int SLABS, class Order, int THREADS, typename T>
SBK_FN void store_pieces(unsigned tile, int slab_bytes, const Rows<T>& x, int thread) {
  each_piece<ROWS, SLABS, Order, THREADS>(tile, slab_bytes, x, thread, [&](unsigned shared, T* to) {
    if (to != nullptr) *reinterpret_cast<uint4*>(to) = load_shared_16(shared);
  });
}

// Four 8 x 8 matrices of 16-bit elements, held as load_matrices leaves them; lanes 8i to 8i + 7 give the rows of matrix i.
SBK_FN void store_matrices(unsigned address, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// Where a thread of a warpgroup is for store_matrices in a slab of 64 rows: row lane % 16 of its warp's, and there the piece lane / 16,
// swizzled. 16 columns on are 32 bytes, added without carry.
SBK_FN unsigned matrix_place(unsigned thread) {
  const unsigned lane = thread % 32;
  return (thread / 32 * 16 + lane % 16) * SLAB_ROW_BYTES + ((lane / 16 ^ lane % 8) << 4);
}
// A warpgroup's accumulator times scale, rounded to T, to the slabs of a tile: its i-th 16 columns to the columns from 8 eighth(i) on.
template <typename T, int COUNT, typename Eighth>
SBK_FN void store_accumulator(unsigned tile, int slab_bytes, unsigned place, const float (&x)[COUNT], float scale, Eighth eighth) {
#pragma unroll
  for (int i = 0; i < COUNT / 8; i++) {
    unsigned packed[4];
#pragma unroll
    for (int y = 0; y < 4; y++) packed[y] = pack<T>(x[8 * i + 2 * y] * scale, x[8 * i + 2 * y + 1] * scale);
    store_matrices(tile + eighth(i) / 8 * slab_bytes + (place ^ eighth(i) % 8 << 4), packed);
  }
}

// ---- Products of tiles by a warpgroup ----
//
// c[64, N] += a[64, 16] b[16, N], asynchronously. Lane l of warp w of the four holds of c the rows 16 w + l / 4 and that + 8;
// c[4 j] to c[4 j + 3]: columns 8 j + l % 4 * 2 + (0, 1) of the first row, then of the second. a in registers: as multiply_add's.

// Orders this warpgroup's use of registers before the products that follow.
SBK_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SBK_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING of the latest groups of products are still under way.
template <int PENDING> SBK_FN void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Which way an operand lies: rows of its tile are rows of a (columns of b), contiguous along k ...
constexpr int ALONG_K = 0;
// ... or rows of its tile are k, and it is transposed on the way: contiguous along m (n).
constexpr int ACROSS_K = 1;

// Descriptor of an operand in shared memory, in 16-byte units throughout: what a tile is further on is added to it.
//     bits 0-13   address
//     bits 16-29  "leading" offset. ACROSS_K: from one slab to the next, used where the operand is wider than a slab; else unused
//     bits 32-45  "stride" offset, from 8 rows to the next 8
//     bits 49-51  what the slab's start is off SWIZZLE_BYTES: 0
//     bits 62-63  1: swizzled by 128 bytes
SBK_FN uint64 operand(unsigned address, int slab_bytes) {
  return 1ull << 62 | (uint64)(SWIZZLE_BYTES / 16) << 32 | (uint64)(slab_bytes / 16) << 16 | address / 16;
}
SBK_FN constexpr int further(int bytes) { return bytes / 16; }
// What to add for step k of 16: ALONG_K in slabs of slab_bytes; ACROSS_K, within a slab of any height.
SBK_FN constexpr int along_k(int k, int slab_bytes) { return further(k / 4 * slab_bytes + k % 4 * 32); }
SBK_FN constexpr int across_k(int k) { return further(k * 16 * SLAB_ROW_BYTES); }

template <typename T, int N> struct Wgmma;
template <typename T, int A, int B, int COUNT> SBK_FN void wgmma_add(float (&c)[COUNT], uint64 a, uint64 b, int keep) {
  Wgmma<T, 2 * COUNT>::template add<A, B>(c, a, b, keep);
}
// Step k of a product that starts from nothing.
template <typename T, int A, int B, int COUNT> SBK_FN void wgmma_step(float (&c)[COUNT], uint64 a, uint64 b, int k) {
  if (k == 0)
    Wgmma<T, 2 * COUNT>::template set<A, B>(c, a, b);
  else
    Wgmma<T, 2 * COUNT>::template add<A, B>(c, a, b, 1);
}

// Four functions for each type and N: a from shared memory or from registers; `add` keeps what c holds unless `keep` is 0; `set`
// does not, and c is an output only.
// NOTE: with c as an in-out operand of a product that overwrites it, the compiler keeps it alive through the whole loop before.
#define SBK_C4(how, i) how(c[i]), how(c[i + 1]), how(c[i + 2]), how(c[i + 3])
#define SBK_C16(how, i) SBK_C4(how, i), SBK_C4(how, i + 4), SBK_C4(how, i + 8), SBK_C4(how, i + 12)
#define SBK_C32(how, i) SBK_C16(how, i), SBK_C16(how, i + 16)
#define SBK_C48(how, i) SBK_C32(how, i), SBK_C16(how, i + 32)
#define SBK_C64(how, i) SBK_C32(how, i), SBK_C32(how, i + 32)
#define SBK_C96(how, i) SBK_C64(how, i), SBK_C32(how, i + 64)
#define SBK_C128(how, i) SBK_C64(how, i), SBK_C64(how, i + 64)
#define SBK_LIST16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SBK_LIST32 SBK_LIST16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SBK_LIST48 SBK_LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SBK_LIST64                                                                                                                 \
  SBK_LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51"                \
             ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SBK_LIST96                                                                                                                 \
  SBK_LIST64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83"                \
             ", %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SBK_LIST128                                                                                                                \
  SBK_LIST96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112"                  \
             ", %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// P0 to P6: the numbers of the operands after the COUNT = N / 2 of c.
#define SBK_WGMMA(T, PTX, N, COUNT, P0, P1, P2, P3, P4, P5, P6)                                                                    \
  template <> struct Wgmma<T, N> {                                                                                                 \
    template <int A, int B> static SBK_FN void add(float (&c)[COUNT], uint64 a, uint64 b, int keep) {                              \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX        \
                   " {" SBK_LIST##COUNT "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";}"                                     \
                   : SBK_C##COUNT("+f", 0) : "l"(a), "l"(b), "r"(keep), "n"(A), "n"(B));                                           \
    }                                                                                                                              \
    template <int A, int B> static SBK_FN void set(float (&c)[COUNT], uint64 a, uint64 b) {                                        \
      asm volatile("{.reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX               \
                   " {" SBK_LIST##COUNT "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P2 ", %" #P3 ";}"                                     \
                   : SBK_C##COUNT("=f", 0) : "l"(a), "l"(b), "n"(A), "n"(B));                                                      \
    }                                                                                                                              \
    template <int B> static SBK_FN void add(float (&c)[COUNT], const unsigned (&a)[4], uint64 b, int keep) {                       \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX        \
                   " {" SBK_LIST##COUNT "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";}"               \
                   : SBK_C##COUNT("+f", 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(B));               \
    }                                                                                                                              \
    template <int B> static SBK_FN void set(float (&c)[COUNT], const unsigned (&a)[4], uint64 b) {                                 \
      asm volatile("{.reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX               \
                   " {" SBK_LIST##COUNT "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P5 ";}"               \
                   : SBK_C##COUNT("=f", 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B));                          \
    }                                                                                                                              \
  };
SBK_WGMMA(half, "f16", 32, 16, 16, 17, 18, 19, 20, 21, 22)
SBK_WGMMA(half, "f16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
SBK_WGMMA(half, "f16", 96, 48, 48, 49, 50, 51, 52, 53, 54)
SBK_WGMMA(half, "f16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
SBK_WGMMA(half, "f16", 192, 96, 96, 97, 98, 99, 100, 101, 102)
SBK_WGMMA(half, "f16", 256, 128, 128, 129, 130, 131, 132, 133, 134)
SBK_WGMMA(bfloat, "bf16", 32, 16, 16, 17, 18, 19, 20, 21, 22)
SBK_WGMMA(bfloat, "bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
SBK_WGMMA(bfloat, "bf16", 96, 48, 48, 49, 50, 51, 52, 53, 54)
SBK_WGMMA(bfloat, "bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
SBK_WGMMA(bfloat, "bf16", 192, 96, 96, 97, 98, 99, 100, 101, 102)
SBK_WGMMA(bfloat, "bf16", 256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef SBK_WGMMA
#undef SBK_LIST16
#undef SBK_LIST32
#undef SBK_LIST48
#undef SBK_LIST64
#undef SBK_LIST96
#undef SBK_LIST128
#undef SBK_C4
#undef SBK_C16
#undef SBK_C32
#undef SBK_C48
#undef SBK_C64
#undef SBK_C96
#undef SBK_C128

}  // namespace sbk
