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

// An encoded CUtensorMap, and how many heads lie side by side in a row of the matrix it describes: 1 for [B * H, rows, D], H for
// [B, rows, H * D].
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};
struct MappedTensor {
  TensorMap map;
  int heads_in_row;
};

struct HopperForwardParams {
  MappedTensor q, k, v;
  ForwardParams forward;
  int head_group;  // heads whose blocks are worked on side by side, so that their keys and values stay in the L2 cache
};

// What Python packs for the backward.
struct HopperBackwardArguments : BackwardArguments {
  void* scratch;  // of hopper_backward_scratch
  int* error;     // set to a nonzero code if a wait ran out; results are then void
};

#if !defined(__CUDACC_RTC__)  // which takes no host functions
// Scratch: byte offsets in one piece of memory, for rows = batch * heads * queries.
struct HopperBackwardScratch {
  int64 dq_sum, state, block_oldest, state_turn, dq_turn, ticket, bytes;
};
constexpr HopperBackwardScratch hopper_backward_scratch(int64 rows, int head_dim) {
  const int64 state = rows * head_dim * 4, ints = rows / 64 * 4, block_oldest = state + rows * 8, ticket = block_oldest + 3 * ints;
  return {0, state, block_oldest, block_oldest + ints, block_oldest + 2 * ints, ticket, ticket + 16};
}
#endif

struct HopperBackwardParams {
  MappedTensor q, dout, k, v, dk, dv;  // see hopper_backward.cuh
  Tensor dq;
  Shape shape;
  const float* remainder;
  const float* dremainder;    // null: 0
  const float* oldest_carry;  // of tiles of 128 keys
  const int* oldest_tile;
  float* dq_sum;      // [B * H, M / 64, 2, 64 * D / 2]: q's gradient before scaling, in the order of the products' registers
  float* state;       // [B * H, M, 2]: per row, the carry on entry of the last tile done, and dr r + sum of a over the tiles done
  int* block_oldest;  // [B * H, M / 64]: oldest tile a block of 64 queries visits
  int* state_turn;    // [B * H, M / 64]: the tile whose turn it is to take the block's state ...
  int* dq_turn;       // [B * H, M / 64]: ... and to add to its dq_sum
  int* ticket;
  int* error;           // set to a nonzero code if a wait ran out; results are then void
  int heads_per_group;  // key heads whose tiles are taken in turns
  float scale_log2;     // scale * log2(e)
};

}  // namespace sbk
