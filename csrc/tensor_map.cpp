// Tensor maps through the driver's encoder, found at run time: the extension does not link the driver.
#include "tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace sbk {
namespace {

constexpr int BYTES = 2;       // of an element
constexpr int DRIVER = 12000;  // the driver's version that has the encoder

decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, DRIVER, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

template <int RANK>
void encode(TensorMap& map, const char* name, const Tensor& x, bool is_half, const cuuint64_t (&sizes)[RANK], const int64 (&strides)[RANK - 1],
            const cuuint32_t (&box)[RANK]) {
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap) && alignof(CUtensorMap) <= alignof(TensorMap));
  cuuint64_t bytes[RANK - 1];
  cuuint32_t steps[RANK];
  for (int i = 0; i < RANK - 1; i++) bytes[i] = cuuint64_t(strides[i]) * BYTES;
  for (int i = 0; i < RANK; i++) steps[i] = 1;
  const CUresult result = encoder()(
      reinterpret_cast<CUtensorMap*>(&map), is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, RANK, x.data, sizes,
      bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::invalid_argument(std::string(name) + ": cuTensorMapEncodeTiled returned " + std::to_string(result));
}

// Of a dimension with one entry a tensor may have any stride; a map's are multiples of 16 bytes.
int64 stride(int64 given, int entries) { return entries > 1 ? given : 16 / BYTES; }

}  // namespace

TensorMap map_rows(const char* name, const Tensor& x, bool is_half, int batch, int heads, int rows, int width, int box_rows) {
  TensorMap map;
  encode<4>(map, name, x, is_half, {cuuint64_t(width), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)},
            {stride(x.stride_row, rows), stride(x.stride_h, heads), stride(x.stride_b, batch)}, {MAP_COLUMNS, cuuint32_t(box_rows), 1, 1});
  return map;
}

// NOTE: a map has 5 dimensions, and the key order takes 4. Batch entries and heads share the fifth, or batch entries follow each
// other along the rows; where neither holds there would be a copy (sbkernels/backends/hopper.py).
MappedKeys map_keys(const char* name, const Tensor& x, bool is_half, int batch, int heads, int rows, int width, int block, bool packed) {
  MappedKeys made;
  const bool in_slices = batch == 1 || heads == 1 || x.stride_b == heads * x.stride_h;
  if (!in_slices && x.stride_b != rows * x.stride_row)
    throw std::invalid_argument(std::string(name) + ": strides of batch entries and heads that one dimension cannot say");
  made.batch_rows = in_slices ? 0 : rows;
  made.batch_slices = in_slices ? heads : 0;
  const int slices = in_slices ? batch * heads : heads, all_rows = in_slices ? rows : batch * rows;
  const int64 slice = heads > 1 ? x.stride_h : stride(x.stride_b, batch);
  for (int first = 0; first < (packed || made.batch_rows % 2 ? 2 : 1); first++) {
    Tensor from = x;
    from.data = static_cast<char*>(x.data) + first * x.stride_row * BYTES;
    encode<5>(made.blocks[first], name, from, is_half, {cuuint64_t(width), 2, 4, cuuint64_t((all_rows - first) / 2), cuuint64_t(slices)},
              {x.stride_row, block / 4 * x.stride_row, 2 * x.stride_row, slice}, {MAP_COLUMNS, 2, 4, cuuint32_t(block / 8), 1});
  }
  return made;
}

}  // namespace sbk
