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

}  // namespace sbk
