// Backward on Hopper, before and after the kernel of hopper_backward.cuh: each query block's first state, and dq from its sums.
//
//     hopper_backward_begin_kernel    a warp for each block of 64 queries, 8 a block of threads
//     hopper_backward_end_kernel      a block of threads for each block of 64 queries
#pragma once
#include "tile.cuh"

namespace sbk {

constexpr int HOPPER_BLOCK_M = 64, HOPPER_BLOCK_N = 128;
constexpr int HOPPER_EDGE_THREADS = 256;

// Where blocks of query rows and key tiles meet, M queries being the last of N positions: blocks of a head; the newest tile that some
// row of a block sees or, for attend_current, would see; the first block of which a tile is not newer than that.
SBK_FN int query_blocks(const Shape& shape) { return ceil_div(shape.queries, HOPPER_BLOCK_M); }
SBK_FN int newest_tile(const Shape& shape, int block) {
  return (min(shape.keys - shape.queries + (block + 1) * HOPPER_BLOCK_M, shape.keys) - 1) / HOPPER_BLOCK_N;
}
SBK_FN int first_block(const Shape& shape, int tile) {
  return max(tile * HOPPER_BLOCK_N - (shape.keys - shape.queries), 0) / HOPPER_BLOCK_M;
}

// Grid: ceil(blocks / 8), for blocks = B * H * query_blocks.
static __global__ void __launch_bounds__(HOPPER_EDGE_THREADS)
hopper_backward_begin_kernel(const __grid_constant__ HopperBackwardParams p) {
  const Shape& shape = p.given.shape;
  const int blocks = query_blocks(shape), lane = threadIdx.x % 32;
  const int block = blockIdx.x * (HOPPER_EDGE_THREADS / 32) + threadIdx.x / 32;
  if (block == 0 && lane == 0) *p.ticket = 0;
  if (block >= shape.batch * shape.heads * blocks) return;
  int oldest = newest_tile(shape, block % blocks);  // if no row has an older one
#pragma unroll
  for (int i = 0; i < HOPPER_BLOCK_M / 32; i++) {
    const int row = block % blocks * HOPPER_BLOCK_M + i * 32 + lane;
    const int64 to = (int64)block * HOPPER_BLOCK_M + i * 32 + lane, from = (int64)(block / blocks) * shape.queries + row;
    const bool there = row < shape.queries;
    const float older_sum = there && p.given.dremainder != nullptr ? p.given.remainder[from] * p.given.dremainder[from] : 0.f;
    const int oldest_tile = there ? p.given.oldest_tile[from] : shape.keys;
    reinterpret_cast<float2*>(p.state)[to] = make_float2(there ? p.given.oldest_carry[from] : 0.f, older_sum);
    p.oldest_tile[to] = oldest_tile;
    oldest = min(oldest, oldest_tile);
  }
  oldest = __reduce_min_sync(ALL_LANES, oldest);
  if (lane == 0) p.block_oldest[block] = p.state_turn[block] = p.dq_turn[block] = oldest;
}

// Grid: as many blocks.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(HOPPER_EDGE_THREADS)
hopper_backward_end_kernel(const __grid_constant__ HopperBackwardParams p) {
  constexpr int PIECES = HEAD_DIM / 8, HALF_PIECES = HOPPER_BLOCK_M * HEAD_DIM / 8;  // 16 bytes: in a row, in half a block's sums
  __shared__ uint4 tile[HOPPER_BLOCK_M][PIECES + 1];               // a piece more, so that rows fall on different banks
  const int half = threadIdx.x / 128, thread = threadIdx.x % 128;  // as in the kernel that left the sums
  const int row = thread / 32 * 16 + thread % 32 / 4, q = thread % 4;

  // Take the sums apart.
  const float4* sums = reinterpret_cast<const float4*>(p.dq_sum) + ((int64)blockIdx.x * 2 + half) * HALF_PIECES + thread;
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 16; j++) {
    const float4 x = sums[j * 128];
    const int piece = half * (PIECES / 2) + j;
    reinterpret_cast<unsigned*>(&tile[row][piece])[q] = pack<T>(x.x * p.given.shape.scale, x.y * p.given.shape.scale);
    reinterpret_cast<unsigned*>(&tile[row + 8][piece])[q] = pack<T>(x.z * p.given.shape.scale, x.w * p.given.shape.scale);
  }
  __syncthreads();

  // Store rows.
  const Shape& shape = p.given.shape;
  const Tensor& target = p.given.dq;
  const int blocks = query_blocks(shape), head = blockIdx.x / blocks;
  T* dq = static_cast<T*>(target.data) + head / shape.heads * target.stride_b + head % shape.heads * target.stride_h;
#pragma unroll
  for (int i = threadIdx.x; i < HOPPER_BLOCK_M * PIECES; i += HOPPER_EDGE_THREADS) {
    const int64 at = blockIdx.x % blocks * HOPPER_BLOCK_M + i / PIECES;
    const int column = i % PIECES * 8;
    if (at < shape.queries && column < shape.head_dim)
      *reinterpret_cast<uint4*>(dq + at * target.stride_row + column) = tile[i / PIECES][i % PIECES];
  }
}

}  // namespace sbk
