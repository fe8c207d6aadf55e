// Tensor maps through the driver's encoder, found at run time: the extension does not link the driver.
#include "tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace sbk {
namespace {

constexpr int BYTES = 2;  // of an element
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

// A map has one slowest dimension for batch entries and heads: either they fold into it, or the heads lie side by side in a row.
struct Fold {
  int heads_in_row;
  int64 columns, slices, slice_stride;
};

Fold fold(const char* name, const Tensor& x, int batch, int heads, int width) {
  if (heads == 1 && x.stride_b > 0) return {1, width, batch, x.stride_b};
  if (x.stride_h > 0 && (batch == 1 || x.stride_b == heads * x.stride_h)) return {1, width, int64(batch) * heads, x.stride_h};
  if (x.stride_h == width && x.stride_b > 0) return {heads, int64(heads) * width, batch, x.stride_b};
  throw std::invalid_argument(std::string(name) + " has strides " + std::to_string(x.stride_b) + ", " + std::to_string(x.stride_h) + ", " +
                              std::to_string(x.stride_row) + " for batch, heads, rows: expected batch and heads to fold into one dimension");
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

}  // namespace

MappedTensor map_rows(const char* name, const Tensor& x, bool is_half, int batch, int heads, int rows, int width, int box_rows) {
  const Fold f = fold(name, x, batch, heads, width);
  MappedTensor made = {{}, f.heads_in_row};
  encode<3>(made.map, name, x, is_half, {cuuint64_t(f.columns), cuuint64_t(rows), cuuint64_t(f.slices)}, {x.stride_row, f.slice_stride},
            {MAP_COLUMNS, cuuint32_t(box_rows), 1});
  return made;
}

MappedTensor map_keys(const char* name, const Tensor& x, bool is_half, int batch, int heads, int rows, int width, int block) {
  const Fold f = fold(name, x, batch, heads, width);
  MappedTensor made = {{}, f.heads_in_row};
  encode<5>(made.map, name, x, is_half, {cuuint64_t(f.columns), 2, 4, cuuint64_t(rows / 2), cuuint64_t(f.slices)},
            {x.stride_row, block / 4 * x.stride_row, 2 * x.stride_row, f.slice_stride}, {MAP_COLUMNS, 2, 4, cuuint32_t(block / 8), 1});
  return made;
}

}  // namespace sbk
