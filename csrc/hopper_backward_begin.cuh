// Backward on Hopper, before the kernel of hopper_backward.cuh: where query blocks and key tiles meet, and each block's first state.
#pragma once
#include "hopper.cuh"
#include "tile.cuh"

namespace sbk {

constexpr int HOPPER_BLOCK_M = 64;
constexpr int HOPPER_BEGIN_THREADS = 256;

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

// A warp for each block of query rows, B * H * ceil(M / 64), M the longest sequence's. Grid: ceil(blocks / 8).
template <int BLOCK_N> __global__ void __launch_bounds__(HOPPER_BEGIN_THREADS)
hopper_backward_begin_kernel(const __grid_constant__ HopperBackwardParams p) {
  const Shape& shape = p.given.shape;
  const int number = blockIdx.x * (HOPPER_BEGIN_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (number == 0 && lane == 0) *p.ticket = 0;
  const int blocks = ceil_div(shape.queries, HOPPER_BLOCK_M), head = number / blocks, block = number % blocks;
  if (head >= shape.batch * shape.heads) return;
  const Sequence at = sequence_of(shape, head / shape.heads, head % shape.heads);
  if (block * HOPPER_BLOCK_M >= at.M) return;
  const int index = blocks_before(p, at, head / shape.heads, head % shape.heads) + block;
  int oldest = newest_tile<BLOCK_N>(at, block);  // if no row has an older one
#pragma unroll
  for (int i = 0; i < HOPPER_BLOCK_M / 32; i++) {
    const int row = block * HOPPER_BLOCK_M + i * 32 + lane;
    const int64 to = (int64)index * HOPPER_BLOCK_M + i * 32 + lane, from = statistic_of(shape, at) + row;
    const bool there = row < at.M;
    const float older_sum = there && p.given.dremainder != nullptr ? p.given.remainder[from] * p.given.dremainder[from] : 0.f;
    const int oldest_tile = there ? p.given.oldest_tile[from] : shape.keys;
    reinterpret_cast<float2*>(p.state)[to] = make_float2(there ? p.given.oldest_carry[from] : 0.f, older_sum);
    p.oldest_tile[to] = oldest_tile;
    oldest = min(oldest, oldest_tile);
  }
  oldest = __reduce_min_sync(ALL_LANES, oldest);
  if (lane == 0) p.block_oldest[index] = p.state_turn[index] = p.dq_turn[index] = oldest;
}

}  // namespace sbk
