// What a launch is told, as plain structs: shared by kernels, launchers, bindings and, packed field by field, by Python
// (sbkernels/backends/launches.py). 8-byte fields first, so that no compiler pads. Strides are in elements; last strides are 1.
#pragma once

namespace sbk {

typedef long long int64;

// A [B, H, rows, width] tensor; packed sequences: [1, H, tokens, width].
struct Tensor {
  void* data;
  int64 stride_b, stride_h, stride_row;
};

// What every kernel of a call shares. Statistics are float32 or int32 [B, H, stat_rows], dense.
struct Shape {
  const int* cu_seqlens;  // [B + 1] cuts the one token dimension into sequences, M = N each; null: all have M queries, N keys
  int batch, heads, group;  // heads of q; query heads that share a key head
  int queries, keys;        // M and N, the longest sequence's
  int head_dim, value_dim;  // D and Dv
  int stat_rows;            // rows of a statistic per head: M, or all tokens
  int attend_current;       // whether a query sees the key at its own position
  int aligned;              // whether rows of all tensors start on multiples of 16 bytes
  float scale;              // factor on q . k
  float skip_below;         // stop once no row of a block has as much of its stick left; 0: never
};

struct ForwardParams {
  Tensor q, k, v, out;
  Shape shape;
  float* remainder;     // r, eq. (5)
  // For the backward, both null where none follows:
  float* oldest_carry;  // per row: the carry on entry of its oldest_tile (see math.cuh)
  int* oldest_tile;     // per row: the oldest visited key tile in which it still had stick left

  int* ticket;  // Hopper: the next query block to take, 0 at the start
};

// What every kernel of a backward is told.
struct BackwardArguments {
  Tensor q, k, v, dout, dq, dk, dv;
  Shape shape;
  const float* remainder;
  const float* dremainder;
  const float* oldest_carry;
  const int* oldest_tile;
};

struct BackwardParams : BackwardArguments {
  // Scratch of one chunk: `units` (batch, key head) pairs from unit_begin on (as many as the grid is for), chunk_rows query rows of
  // each from row_begin on. Key groups cover whole tiles of the dq kernel.
  float* state_carry;   // [units * group, key_groups, chunk_rows]: carry on entry of each group of keys
  float* state_sum;     // [units * group, key_groups, chunk_rows]: dr r + sum of a over the older groups
  int* block_oldest;    // [units * group, chunk_rows / rows_per_oldest]: oldest key those rows visit
  float* dk_sum;        // [units, N, D] and
  float* dv_sum;        // [units, N, Dv]: sums over chunks of rows; null where one chunk holds all rows
  int unit_begin, row_begin, chunk_rows, key_groups;
  int rows_per_oldest;        // BLOCK_M of the dq kernel
  int first_rows, last_rows;  // whether this chunk holds the first and the last rows
};

// ---- Hopper: what the launcher makes of packed parameters for kernels that load through tensor maps ----

// An encoded CUtensorMap. Of rows: [width, rows, heads, batch], in boxes of 64 columns.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};
// Keys of a tensor in the key order of tile.cuh, a box for each whole block of 4 quarters: [width, 2, 4, rows / 2, slices], from row 0
// and from row 1 on, for blocks that start on an even and an odd row. Blocks that are not whole do without (hopper.cuh).
struct MappedKeys {
  TensorMap blocks[2];
  int batch_rows, batch_slices;  // what a batch entry is further on; a head is a slice
};

struct HopperForwardParams {
  TensorMap q;
  MappedKeys k, v;
  ForwardParams forward;
  int head_group;  // heads whose blocks are worked on side by side, so that their keys and values stay in the L2 cache
};

// What Python packs for the backward.
struct HopperBackwardArguments : BackwardArguments {
  void* scratch;  // of hopper_backward_scratch
  int* error;     // set to a nonzero code if a wait ran out; results are then void
};

#if !defined(__CUDACC_RTC__)  // which takes no host functions
// Scratch: byte offsets in one piece of memory, for `blocks` blocks of 64 rows; head_dim is the kernel's.
struct HopperBackwardScratch {
  int64 dq_sum, state, oldest_tile, block_oldest, state_turn, dq_turn, ticket, bytes;
};
constexpr HopperBackwardScratch hopper_backward_scratch(int64 blocks, int head_dim) {
  const int64 rows = blocks * 64, ints = blocks * 4, state = rows * head_dim * 4, oldest_tile = state + rows * 8;
  const int64 block_oldest = oldest_tile + rows * 4, ticket = block_oldest + 3 * ints;
  return {0, state, oldest_tile, block_oldest, block_oldest + ints, block_oldest + 2 * ints, ticket, ticket + 16};
}
#endif

// Of each head there are ceil(M / 64) blocks of 64 query rows, rows beyond the last included: those have no stick in any tile. Of packed
// sequences each has blocks of its own: at most tokens / 64 and one a sequence.
struct HopperBackwardParams {
  TensorMap q, dout;
  MappedKeys k, v, dk, dv;  // see hopper_backward.cuh
  HopperBackwardArguments given;  // oldest_carry, oldest_tile: of tiles of 128 keys
  float* dq_sum;      // [blocks, 2, 64 * D / 2]: q's gradient before scaling, in the order of the products' registers
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
