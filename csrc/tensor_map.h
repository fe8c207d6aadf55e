// Tensor maps: how the copy engine addresses the tensors of a call.
#pragma once
#include "hopper_params.h"

namespace sbk {

constexpr int MAP_COLUMNS = 64;  // of a box: rows of 128 bytes, swizzled

// Rows of a tensor [batch, heads, rows, width] of 16-bit elements (is_half: float16, else bfloat16) in boxes of box_rows by 64. What
// lies beyond the rows or columns of a head is read as zeros, and not written. Strides: multiples of 16 bytes.
TensorMap map_rows(const char* name, const Tensor& x, bool is_half, int batch, int heads, int rows, int width, int box_rows);

// The same in whole blocks of `block` rows in the key order of tile.cuh: block / 4 rows apart for each of 4 runs, in pairs. packed: blocks
// may start on any row.
MappedKeys map_keys(const char* name, const Tensor& x, bool is_half, int batch, int heads, int rows, int width, int block, bool packed);

}  // namespace sbk
