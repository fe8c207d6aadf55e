// Backward on Hopper, before and after the kernel of hopper_backward.cuh: each query block's first state, and dq from its sums.
//
//     hopper_backward_begin_kernel    a warp for each block of 64 queries, 8 a block of threads
//     hopper_backward_end_kernel      a block of threads for each block of 64 queries; where sums are apart, see convert_dq
#pragma once
#include "hopper.cuh"
#include "tile.cuh"

namespace sbk {

constexpr int HOPPER_BLOCK_M = 64;
constexpr int HOPPER_EDGE_THREADS = 256;

// Where blocks of query rows and key tiles meet, M queries being the last of N positions: blocks of a head; the newest tile that some
// row of a block sees or, for attend_current, would see; the first block of which a tile is not newer than that; the first of which it is
// older.
SBK_FN int query_blocks(const Sequence& at) { return ceil_div(at.M, HOPPER_BLOCK_M); }
template <int BLOCK_N> SBK_FN int newest_tile(const Sequence& at, int block) {
  return (min(at.N - at.M + (block + 1) * HOPPER_BLOCK_M, at.N) - 1) / BLOCK_N;
}
template <int BLOCK_N> SBK_FN int first_block(const Sequence& at, int tile) { return max(tile * BLOCK_N - (at.N - at.M), 0) / HOPPER_BLOCK_M; }
template <int BLOCK_N> SBK_FN int blocks_end(const Sequence& at, int tile) {
  const int all = query_blocks(at);
  return tile == newest_tile<BLOCK_N>(at, all) ? all : first_block<BLOCK_N>(at, tile + 1);
}

// Number of block 0 of a query head among all blocks. Packed sequences follow each other in a head, each on blocks of its own.
SBK_FN int blocks_before(const HopperBackwardParams& p, const Sequence& at, int entry, int head) {
  const Shape& shape = p.given.shape;
  return shape.cu_seqlens == nullptr ? (entry * shape.heads + head) * p.head_blocks
                                     : head * p.head_blocks + (int)at.token / HOPPER_BLOCK_M + entry;
}
// A block of query rows: the `number`th of B * H * ceil(M / 64), M the longest sequence's.
struct QueryBlock {
  Sequence at;
  int first_row, index;  // index: among all blocks
  bool there;            // whether its sequence is as long

  SBK_FN QueryBlock(const HopperBackwardParams& p, int number) {
    const Shape& shape = p.given.shape;
    const int blocks = ceil_div(shape.queries, HOPPER_BLOCK_M), head = number / blocks;
    at = sequence_of(shape, head / shape.heads, head % shape.heads);
    first_row = number % blocks * HOPPER_BLOCK_M;
    index = blocks_before(p, at, head / shape.heads, head % shape.heads) + number % blocks;
    there = first_row < at.M;
  }
};

// Grid: ceil(blocks / 8), for blocks = B * H * ceil(M / 64).
template <int BLOCK_N> __global__ void __launch_bounds__(HOPPER_EDGE_THREADS)
hopper_backward_begin_kernel(const __grid_constant__ HopperBackwardParams p) {
  const Shape& shape = p.given.shape;
  const int number = blockIdx.x * (HOPPER_EDGE_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (number == 0 && lane == 0) *p.ticket = 0;
  if (number >= shape.batch * shape.heads * ceil_div(shape.queries, HOPPER_BLOCK_M)) return;
  const QueryBlock block(p, number);
  if (!block.there) return;
  int oldest = newest_tile<BLOCK_N>(block.at, block.first_row / HOPPER_BLOCK_M);  // if no row has an older one
#pragma unroll
  for (int i = 0; i < HOPPER_BLOCK_M / 32; i++) {
    const int row = block.first_row + i * 32 + lane;
    const int64 to = (int64)block.index * HOPPER_BLOCK_M + i * 32 + lane, from = statistic_of(shape, block.at) + row;
    const bool there = row < block.at.M;
    const float older_sum = there && p.given.dremainder != nullptr ? p.given.remainder[from] * p.given.dremainder[from] : 0.f;
    const int oldest_tile = there ? p.given.oldest_tile[from] : shape.keys;
    reinterpret_cast<float2*>(p.state)[to] = make_float2(there ? p.given.oldest_carry[from] : 0.f, older_sum);
    p.oldest_tile[to] = oldest_tile;
    oldest = min(oldest, oldest_tile);
  }
  oldest = __reduce_min_sync(ALL_LANES, oldest);
  if (lane == 0) p.block_oldest[block.index] = p.state_turn[block.index] = p.dq_turn[block.index] = oldest;
}

// Grid: as many blocks.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(HOPPER_EDGE_THREADS)
hopper_backward_end_kernel(const __grid_constant__ HopperBackwardParams p) {
  constexpr int PIECES = HEAD_DIM / 8, HALF_PIECES = HOPPER_BLOCK_M * HEAD_DIM / 8;  // 16 bytes: in a row, in half a block's sums
  __shared__ uint4 tile[HOPPER_BLOCK_M][PIECES + 1];               // a piece more, so that rows fall on different banks
  const int half = threadIdx.x / 128, thread = threadIdx.x % 128;  // as in the kernel that left the sums
  const int row = thread / 32 * 16 + thread % 32 / 4, q = thread % 4;
  const QueryBlock block(p, blockIdx.x);
  if (!block.there) return;

  // Take the sums apart.
  const float4* sums = reinterpret_cast<const float4*>(p.dq_sum) + ((int64)block.index * 2 + half) * HALF_PIECES + thread;
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 16; j++) {
    const float4 x = sums[j * 128];
    const int piece = half * (PIECES / 2) + j;
    reinterpret_cast<unsigned*>(&tile[row][piece])[q] = pack<T>(x.x * p.given.shape.scale, x.y * p.given.shape.scale);
    reinterpret_cast<unsigned*>(&tile[row + 8][piece])[q] = pack<T>(x.z * p.given.shape.scale, x.w * p.given.shape.scale);
  }
  __syncthreads();

  // Store rows.
  const Tensor& target = p.given.dq;
  T* dq = rows_of<T>(target, block.at, 1);
#pragma unroll
  for (int i = threadIdx.x; i < HOPPER_BLOCK_M * PIECES; i += HOPPER_EDGE_THREADS) {
    const int64 at = block.first_row + i / PIECES;
    const int column = i % PIECES * 8;
    if (at < block.at.M && column < p.given.shape.head_dim)
      *reinterpret_cast<uint4*>(dq + at * target.stride_row + column) = tile[i / PIECES][i % PIECES];
  }
}

}  // namespace sbk
