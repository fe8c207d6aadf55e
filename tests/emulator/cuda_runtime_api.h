// What tensor_map.cpp asks of the CUDA runtime.
#pragma once
#include "cuda.h"

typedef int cudaError_t;
typedef int cudaDriverEntryPointQueryResult;
enum { cudaSuccess, cudaEnableDefault, cudaDriverEntryPointSuccess };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, int, int, cudaDriverEntryPointQueryResult* result) {
  *found = (void*)cuTensorMapEncodeTiled;
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
