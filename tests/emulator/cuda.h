// Tensor maps for tensor_map.cpp: what the encoder is told, as it is.
#pragma once
#include <stdint.h>

typedef uint64_t cuuint64_t;
typedef uint32_t cuuint32_t;
typedef int CUresult;
struct alignas(64) CUtensorMap {
  char* data;
  uint64_t sizes[5], strides[4];  // elements; bytes, of all dimensions but the first
  uint32_t box[5];
  uint32_t rank;
};
enum { CUDA_SUCCESS, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, int, uint32_t rank, void* data, const uint64_t* sizes, const uint64_t* strides,
                                       const uint32_t* box, const uint32_t*, int, int, int, int) {
  *map = {(char*)data, {}, {}, {}, rank};
  if ((uintptr_t)data % 16) return 1;
  for (uint32_t i = 0; i < rank; i++) {
    map->sizes[i] = sizes[i], map->box[i] = box[i];
    if (sizes[i] == 0 || box[i] == 0 || box[i] > 256) return 1;
    if (i > 0 && (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return 1;
    if (i > 0) map->strides[i - 1] = strides[i - 1];
  }
  return CUDA_SUCCESS;
}
