// Backward on Hopper, before and after the kernel of hopper_backward.cuh: each query block's first state, and dq from its sums.
//
//     hopper_backward_begin_kernel    a warp for each block of 64 queries, 8 a block of threads
//     hopper_backward_end_kernel      a block of threads for each block of 64 queries
#pragma once
#include "tile.cuh"

namespace sbk {

constexpr int HOPPER_BLOCK_M = 64, HOPPER_BLOCK_N = 128;
constexpr int HOPPER_EDGE_THREADS = 256;

// Grid: ceil(B * H * M / 64 / 8).
static __global__ void __launch_bounds__(HOPPER_EDGE_THREADS)
hopper_backward_begin_kernel(const __grid_constant__ HopperBackwardParams p) {
  const int blocks = p.shape.queries / HOPPER_BLOCK_M, lane = threadIdx.x % 32;
  const int block = blockIdx.x * (HOPPER_EDGE_THREADS / 32) + threadIdx.x / 32;
  if (block == 0 && lane == 0) *p.ticket = 0;
  if (block >= p.shape.batch * p.shape.heads * blocks) return;
  int oldest = block % blocks * HOPPER_BLOCK_M / HOPPER_BLOCK_N;  // the tile on the diagonal, if no row has an older one
#pragma unroll
  for (int i = 0; i < HOPPER_BLOCK_M / 32; i++) {
    const int64 row = (int64)block * HOPPER_BLOCK_M + i * 32 + lane;
    const float older_sum = p.dremainder == nullptr ? 0.f : p.remainder[row] * p.dremainder[row];
    reinterpret_cast<float2*>(p.state)[row] = make_float2(p.oldest_carry[row], older_sum);
    oldest = min(oldest, p.oldest_tile[row]);
  }
  oldest = __reduce_min_sync(ALL_LANES, oldest);
  if (lane == 0) p.block_oldest[block] = p.state_turn[block] = p.dq_turn[block] = oldest;
}

// Grid: B * H * M / 64.
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
    reinterpret_cast<unsigned*>(&tile[row][piece])[q] = pack<T>(x.x * p.shape.scale, x.y * p.shape.scale);
    reinterpret_cast<unsigned*>(&tile[row + 8][piece])[q] = pack<T>(x.z * p.shape.scale, x.w * p.shape.scale);
  }
  __syncthreads();

  // Store rows.
  const int blocks = p.shape.queries / HOPPER_BLOCK_M, head = blockIdx.x / blocks;
  T* dq = static_cast<T*>(p.dq.data) + head / p.shape.heads * p.dq.stride_b + head % p.shape.heads * p.dq.stride_h;
#pragma unroll
  for (int i = threadIdx.x; i < HOPPER_BLOCK_M * PIECES; i += HOPPER_EDGE_THREADS) {
    const int64 at = blockIdx.x % blocks * HOPPER_BLOCK_M + i / PIECES;
    *reinterpret_cast<uint4*>(dq + at * p.dq.stride_row + i % PIECES * 8) = tile[i / PIECES][i % PIECES];
  }
}

}  // namespace sbk
