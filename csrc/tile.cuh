// Tiles: from global to shared memory, and matrix products of them on tensor cores, with a tile's keys in permuted order.
//
// In the accumulator of multiply_add, lane l holds of a row the columns c = 8j + 2q + b (q = l % 4, b in 0..1). Key rows enter
// shared memory so that column c stands for key offset q * (N / 4) + 2j + b: a lane then owns one contiguous run of N / 4 keys of
// each of its rows, scans are local to a thread, and only the run totals of 4 lanes meet (`scan_newer`, `scan_older`). Weights
// leave in the same order, so the values' rows are permuted alike.
//
//     an accumulator is float [MT][NT][4]: MT by NT blocks of 16 x 8; element [mt][j][2 * h + b] of a lane is row
//     16 mt + 8 h + lane / 4, column 8 j + 2 (lane % 4) + b, which is key 2 j + b of the lane's run
#pragma once
#include "math.cuh"
#include "params.h"

namespace sbk {

// ---- Where a block works ----

// One sequence of one head: lengths, and its first token in the tensors.
struct Sequence {
  int M, N, batch, head;
  int64 token;
};

SBK_FN Sequence sequence_of(const Shape& shape, int batch, int head) {
  if (shape.cu_seqlens == nullptr) return {shape.queries, shape.keys, batch, head, 0};
  const int begin = shape.cu_seqlens[batch], length = shape.cu_seqlens[batch + 1] - begin;
  return {length, length, 0, head, begin};
}

// Row 0 of the sequence in a tensor whose heads are `group` times fewer than the queries'.
template <typename T> SBK_FN T* rows_of(const Tensor& x, const Sequence& at, int group) {
  return static_cast<T*>(x.data) + at.batch * x.stride_b + at.head / group * x.stride_h + at.token * x.stride_row;
}
SBK_FN int64 statistic_of(const Shape& shape, const Sequence& at) {
  return (int64)(at.batch * shape.heads + at.head) * shape.stat_rows + at.token;
}
// First key that the first of these rows does not see; each later row sees one more.
SBK_FN int first_invisible(const Shape& shape, const Sequence& at, int row) { return at.N - at.M + row + shape.attend_current; }

SBK_FN int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- Global to shared ----

// Rows lie 16 bytes further than they are wide, so that 8 rows of 16 bytes fall on different banks.
template <int WIDTH> constexpr int tile_stride = WIDTH + 8;
template <int ROWS, int WIDTH> constexpr int tile_bytes = ROWS * tile_stride<WIDTH> * 2;

// Which row of the matrix each row of a tile holds.
struct NaturalOrder {
  static constexpr int PERIOD = 1, STEP = 1;  // offset(row + PERIOD) = offset(row) + STEP
  static SBK_FN int offset(int row) { return row; }
};
// N keys of a tile as described above, block after block of N.
template <int N> struct KeyOrder {
  static constexpr int PERIOD = 8, STEP = 2;  // within a block
  static SBK_FN int offset(int c) { return c / N * N + (c >> 1 & 3) * (N / 4) + (c % N >> 3) * 2 + (c & 1); }
};

// Tile of ROWS rows from `begin` on of a matrix with `count` rows of `width` elements; zeros beyond either. The caller commits.
template <int ROWS, int WIDTH, int THREADS, class Order, int BLOCK = ROWS, typename T>
SBK_FN void load_tile(unsigned tile, const T* matrix, int64 stride, int begin, int count, int width, int aligned) {
  constexpr int CHUNKS = WIDTH / 8, AT_ONCE = THREADS / CHUNKS, BYTES = sizeof(T);
  constexpr bool REGULAR = THREADS % CHUNKS == 0 && ROWS % AT_ONCE == 0 && AT_ONCE % Order::PERIOD == 0 && BLOCK == ROWS;
  if constexpr (REGULAR) {
    if (aligned && width == WIDTH && begin + ROWS <= count) {
      const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * 8;
      const T* from = matrix + (begin + Order::offset(row)) * stride + column;
      const int64 step = stride * (AT_ONCE / Order::PERIOD * Order::STEP);
      const unsigned to = tile + (row * tile_stride<WIDTH> + column) * BYTES;
#pragma unroll
      for (int i = 0; i < ROWS / AT_ONCE; i++, from += step) copy_async_16(to + i * AT_ONCE * tile_stride<WIDTH> * BYTES, from, 16);
      return;
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, column = i % CHUNKS * 8, source = begin + Order::offset(row);
    const int elements = source < count ? min(max(width - column, 0), 8) : 0;
    const T* from = matrix + (elements ? source * stride + column : 0);
    const unsigned to = tile + (row * tile_stride<WIDTH> + column) * BYTES;
    if (aligned) {
      copy_async_16(to, from, elements * BYTES);
    } else {
#pragma unroll
      for (int e = 0; e < 8; e++) store_shared(to + e * BYTES, e < elements ? from[e].bits : (unsigned short)0);
    }
  }
}

// ---- Products ----

// What a lane adds to a tile's address for load_matrices: of 16 x 16 elements as operand a, and transposed as b with rows as k ...
template <int WIDTH> SBK_FN unsigned lane_offset_rows(int lane) { return ((lane % 16) * tile_stride<WIDTH> + lane / 16 * 8) * 2; }
// ... and, not transposed, as b with rows as n.
template <int WIDTH> SBK_FN unsigned lane_offset_columns(int lane) {
  return ((lane % 8 + lane / 16 * 8) * tile_stride<WIDTH> + lane / 8 % 2 * 8) * 2;
}

template <int MT, int NT> SBK_FN void zero(float (&acc)[MT][NT][4]) {
#pragma unroll
  for (int i = 0; i < MT * NT * 4; i++) (&acc[0][0][0])[i] = 0.f;
}

// acc [16 MT, 8 NT] += a b^T over WIDTH: a the tile rows from its address on (lane offsets included), b's rows 16 n on and columns
// 16 k on what get(columns, n, k) leaves in `columns`.
template <typename T, int WIDTH, int MT, int NT, typename Get> SBK_FN void multiply_rows(float (&acc)[MT][NT][4], unsigned a, Get get) {
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++) {
    unsigned rows[MT][4];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) load_matrices<false>(rows[mt], a + (mt * 16 * tile_stride<WIDTH> + k * 16) * 2);
#pragma unroll
    for (int n = 0; n < NT / 2; n++) {
      unsigned columns[4];
      get(columns, n, k);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        multiply_add<T>(acc[mt][2 * n], rows[mt], columns[0], columns[1]);
        multiply_add<T>(acc[mt][2 * n + 1], rows[mt], columns[2], columns[3]);
      }
    }
  }
}
// b the tile rows from its address on.
template <typename T, int WIDTH, int MT, int NT> SBK_FN void multiply_rows(float (&acc)[MT][NT][4], unsigned a, unsigned b) {
  multiply_rows<T, WIDTH>(acc, a, [&](unsigned (&columns)[4], int n, int k) {
    load_matrices<false>(columns, b + (n * 16 * tile_stride<WIDTH> + k * 16) * 2);
  });
}

// acc [16 MT, 8 NT] += p b for p in registers (operand a, [MT][KT]) and the tile rows from address b on, 16 for each KT.
template <typename T, int WIDTH, int MT, int KT, int NT>
SBK_FN void multiply_registers(float (&acc)[MT][NT][4], const unsigned (&p)[MT][KT][4], unsigned b) {
#pragma unroll
  for (int k = 0; k < KT; k++) {
#pragma unroll
    for (int n = 0; n < NT / 2; n++) {
      unsigned rows[4];
      load_matrices<true>(rows, b + (k * 16 * tile_stride<WIDTH> + n * 16) * 2);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        multiply_add<T>(acc[mt][2 * n], p[mt][k], rows[0], rows[1]);
        multiply_add<T>(acc[mt][2 * n + 1], p[mt][k], rows[2], rows[3]);
      }
    }
  }
}

// Accumulator -> operand a of the next product, rounded to T.
template <typename T, int MT, int NT> SBK_FN void to_operand(unsigned (&p)[MT][NT / 2][4], const float (&acc)[MT][NT][4]) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
#pragma unroll
    for (int i = 0; i < NT * 2; i++) {
      const float* x = &acc[mt][i / 2][i % 2 * 2];
      p[mt][i / 4][i % 4] = pack<T>(x[0], x[1]);
    }
  }
}

// ---- Rows of accumulators ----

// Row h of block mt, as the lane's run of keys, oldest to newest.
template <int NT> SBK_FN void get_row(float (&run)[2 * NT], const float (&block)[NT][4], int h) {
#pragma unroll
  for (int t = 0; t < 2 * NT; t++) run[t] = block[t / 2][2 * h + t % 2];
}
template <int NT> SBK_FN void put_row(float (&block)[NT][4], int h, const float (&run)[2 * NT]) {
#pragma unroll
  for (int t = 0; t < 2 * NT; t++) block[t / 2][2 * h + t % 2] = run[t];
}

// Base-2 logits of a lane's run; of a MASKED one only the first `visible` keys.
template <bool MASKED, int R> SBK_FN void to_logits(float (&s)[R], float scale_log2, int visible) {
#pragma unroll
  for (int t = 0; t < R; t++) s[t] = MASKED && t >= visible ? INVISIBLE : s[t] * scale_log2;
}

// Logits of a tile -> runs.
template <bool MASKED, class Run, int MT, int NT>
SBK_FN void absorb(Run (&runs)[MT][2], const float (&s)[MT][NT][4], float scale_log2, int visible) {
#pragma unroll
  for (int i = 0; i < MT * 2; i++) {
    float logits[2 * NT];
    get_row(logits, s[i / 2], i % 2);
    to_logits<MASKED>(logits, scale_log2, visible + i * 8);
    runs[i / 2][i % 2].absorb(logits);
  }
}

// ---- Scans over the 4 runs of a row, two shuffles each ----

template <typename Total> struct Scan {
  Total before;  // of the runs ahead of this lane's
  Total total;   // of all 4
};

// Of a Run::Path's totals, newest run first.
template <class Path> SBK_FN Scan<typename Path::Total> scan_newer(const typename Path::Total& x, int q) {
  using Total = typename Path::Total;
  const Total other = Path::from_lane(x, 1), pair = Path::combine(x, other), outer = Path::from_lane(pair, 2);
  const Total near = q & 1 ? Path::identity() : other, far = q & 2 ? Path::identity() : outer;
  Scan<Total> scan = {Path::combine(near, far), Path::combine(pair, outer)};
  Path::settle(scan.before, scan.total);
  return scan;
}
// Sums, oldest run first.
SBK_FN Scan<float> scan_older(float x, int q) {
  const float other = from_lane_xor(x, 1), pair = x + other, outer = from_lane_xor(pair, 2);
  return {(q & 1 ? other : 0.f) + (q & 2 ? outer : 0.f), pair + outer};
}

// A run's a of eq. (8) -> gradients of its logits, from dr r + sum of a over the older keys.
template <class Run, int R> SBK_FN void differentiate(const Run& run, float (&a)[R], float older) {
#pragma unroll
  for (int t = 0; t < R; t++) {
    const float sum = older + a[t];
    a[t] = run.gradient(t, a[t], older);
    older = sum;
  }
}

// step(path, scan, i) for each row of runs, path as all of the warp's runs want it, scan newest run first.
// NOTE: scanned as simple ones before the branch, in the time that the vote takes.
template <class Run, int MT, typename Vote, typename Step> SBK_FN void each_row(Run (&runs)[MT][2], int q, Vote vote, Step step) {
  using Simple = typename Run::template Path<true>;
  using Mixed = typename Run::template Path<false>;
  bool simple = true;
#pragma unroll
  for (int i = 0; i < MT * 2; i++) simple &= runs[i / 2][i % 2].simple();
  simple = vote(simple);
  Scan<typename Simple::Total> scans[MT * 2];
#pragma unroll
  for (int i = 0; i < MT * 2; i++) scans[i] = scan_newer<Simple>(Simple::total(runs[i / 2][i % 2]), q);
  if (simple) {
#pragma unroll
    for (int i = 0; i < MT * 2; i++) step(Simple(), scans[i], i);
  } else {
#pragma unroll
    for (int i = 0; i < MT * 2; i++) step(Mixed(), scan_newer<Mixed>(Mixed::total(runs[i / 2][i % 2]), q), i);
  }
}

// ---- Registers to global ----

// Rows of acc [16 MT, 8 NT] that exist, rounded, to a matrix of `width` columns; row(i) gives the matrix row of row i, negative
// for none. In 4-byte pieces where rows are aligned.
template <typename T, int MT, int NT, typename RowOf>
SBK_FN void store_rows(T* matrix, int64 stride, const float (&acc)[MT][NT][4], int width, int aligned, int lane, RowOf row_of) {
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = row_of(mt * 16 + h * 8 + lane / 4);
      if (row < 0) continue;
      T* to = matrix + row * stride + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const unsigned both = pack<T>(acc[mt][j][2 * h], acc[mt][j][2 * h + 1]);
        const int column = 8 * j + lane % 4 * 2;
        if (aligned) {
          if (column < width) *reinterpret_cast<unsigned*>(to + 8 * j) = both;
        } else {
          if (column < width) to[8 * j].bits = (unsigned short)both;
          if (column + 1 < width) to[8 * j + 1].bits = (unsigned short)(both >> 16);
        }
      }
    }
  }
}

}  // namespace sbk
