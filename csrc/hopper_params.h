// What the launcher makes of packed parameters (params.h) for Hopper's kernels, which load through tensor maps.
#pragma once
#include "params.h"

namespace sbk {

// An encoded CUtensorMap. Of rows: [width, rows, heads, batch], in boxes 64 columns wide.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};
// Keys of a tensor in the key order of tile.cuh, a box for each whole block of 4 quarters: [width, 2, 4, rows / 2, slices], from row 0
// and from row 1 on, for blocks that start on an even and an odd row. Blocks that are not whole do without (hopper.cuh).
struct MappedKeys {
  TensorMap blocks[2];
  int batch_rows, batch_slices;  // what a batch entry is further on; a head is a slice
};

constexpr int WARP_ROWS = 16;  // of a product's 64

struct HopperForwardParams {
  TensorMap q, out;
  MappedKeys k, v;
  ForwardParams forward;
  int head_group;  // heads whose blocks are worked on side by side, so that their keys and values stay in the L2 cache
};

// What Python packs for the backward.
struct HopperBackwardArguments : BackwardArguments {
  void* scratch;  // of hopper_backward_scratch
  int* error;     // set to a nonzero code if a wait ran out; results are then void
};

// Scratch: byte offsets in one piece of memory, for `blocks` blocks of 64 rows; head_dim is the kernel's.
struct HopperBackwardScratch {
  int64 dq_sum, state, oldest_tile, block_oldest, state_turn, dq_turn, ticket, bytes;
};
constexpr HopperBackwardScratch hopper_backward_scratch(int64 blocks, int head_dim) {
  const int64 rows = blocks * 64, ints = blocks * 4, state = rows * head_dim * 4, oldest_tile = state + rows * 8;
  const int64 block_oldest = oldest_tile + rows * 4, ticket = block_oldest + 3 * ints;
  return {0, state, oldest_tile, block_oldest, block_oldest + ints, block_oldest + 2 * ints, ticket, ticket + 16};
}

// Keys of the backward's tiles.
constexpr int hopper_backward_keys(int head_dim) { return head_dim > 128 ? 64 : 128; }

// Of each head there are ceil(M / 64) blocks of 64 query rows, rows beyond the last included: those have no stick in any tile. Of packed
// sequences each has blocks of its own: at most tokens / 64 and one a sequence.
struct HopperBackwardParams {
  TensorMap q, dout, dq;
  MappedKeys k, v, dk, dv;  // see hopper_backward.cuh
  HopperBackwardArguments given;  // oldest_carry, oldest_tile: of the kernel's tiles
  float* dq_sum;      // [blocks, 1 or, of 256 columns, 2, 2, 64 rows, half the columns]: q's gradient before scaling, in the order of the
                      // products' registers
  float* state;       // [blocks, 64, 2]: per row, the carry on entry of the last tile done, and dr r + sum of a over the tiles done
  int* oldest_tile;   // [blocks, 64]: as given; of rows beyond the last, beyond the last tile
  int* block_oldest;  // [blocks]: oldest tile a block visits
  int* state_turn;    // [blocks]: the tile whose turn it is to take the block's state ...
  int* dq_turn;       // [blocks]: ... and to add to its dq_sum
  int* ticket;
  int head_blocks;      // of a head, of all its packed sequences
  int heads_per_group;  // key heads whose tiles are taken in turns
  float scale_log2;     // scale * log2(e)
};

}  // namespace sbk
