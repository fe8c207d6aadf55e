// The kernels of one dtype (SBK_DTYPE: half or bfloat) and one width (SBK_BLOCK_D) that the extension is built with.
#include "backward_keys.cuh"
#include "backward_queries.cuh"
#include "forward.cuh"
#include "instances.h"

namespace sbk {
namespace {

using T = SBK_DTYPE;

template <typename Params> bool add(const char* kernel, int block_d, void (*function)(Params), int threads, int shared_bytes,
                                    std::vector<std::pair<std::string, int>> config) {
  const bool is_half = std::is_same<T, half>::value;
  instances().push_back({kernel, is_half ? "float16" : "bfloat16", block_d, std::move(config), reinterpret_cast<const void*>(function),
                         threads, shared_bytes, int(sizeof(Params))});
  return true;
}

template <int BLOCK_D, int BLOCK_M, int BLOCK_N, int NUM_WARPS, int NUM_STAGES> void forward() {
  using C = ForwardConfig<T, LinearRun, BLOCK_D, BLOCK_D, BLOCK_M, BLOCK_N, NUM_WARPS, NUM_STAGES>;
  add("forward", BLOCK_D, forward_kernel<C>, C::THREADS, C::SHARED_BYTES,
      {{"BLOCK_M", BLOCK_M}, {"BLOCK_N", BLOCK_N}, {"NUM_WARPS", NUM_WARPS}, {"NUM_STAGES", NUM_STAGES}});
}

template <int BLOCK_D, int BLOCK_M, int BLOCK_N, int NUM_WARPS, int NUM_STAGES, int KEY_GROUP> void backward_queries() {
  using C = QueriesConfig<T, LinearRun, BLOCK_D, BLOCK_D, BLOCK_M, BLOCK_N, NUM_WARPS, NUM_STAGES, KEY_GROUP>;
  add("backward_queries", BLOCK_D, backward_queries_kernel<C>, C::THREADS, C::SHARED_BYTES,
      {{"BLOCK_M", BLOCK_M}, {"BLOCK_N", BLOCK_N}, {"NUM_WARPS", NUM_WARPS}, {"NUM_STAGES", NUM_STAGES}, {"KEY_GROUP", KEY_GROUP}});
}

template <int BLOCK_D, int BLOCK_M, int ROWS, int NUM_WARPS, int NUM_STAGES, int KEY_GROUP, int SPLIT> void backward_keys() {
  using C = KeysConfig<T, LinearRun, BLOCK_D, BLOCK_D, BLOCK_M, ROWS / 16, NUM_WARPS, NUM_STAGES, KEY_GROUP, SPLIT>;
  add("backward_keys", BLOCK_D, backward_keys_kernel<C>, C::THREADS, C::SHARED_BYTES,
      {{"BLOCK_M", BLOCK_M}, {"ROWS", ROWS}, {"NUM_WARPS", NUM_WARPS}, {"NUM_STAGES", NUM_STAGES}, {"KEY_GROUP", KEY_GROUP}, {"SPLIT", SPLIT}});
}

// The table: the first line of each kernel is the default for the width.
template <int D> bool add_all() {
  if constexpr (D == 64) {
    forward<D, 128, 64, 4, 2>();
    forward<D, 64, 64, 4, 2>();
    backward_queries<D, 64, 64, 4, 2, 16>();
    backward_keys<D, 64, 16, 4, 2, 16, 1>();
    backward_keys<D, 64, 32, 4, 2, 16, 1>();
  } else if constexpr (D == 128) {
    forward<D, 128, 64, 4, 2>();
    forward<D, 64, 64, 4, 2>();
    forward<D, 128, 32, 4, 2>();
    backward_queries<D, 64, 64, 4, 2, 16>();
    backward_queries<D, 64, 32, 4, 2, 16>();
    backward_keys<D, 64, 16, 8, 2, 16, 1>();
    backward_keys<D, 32, 16, 8, 2, 16, 1>();
  } else {
    forward<D, 64, 32, 4, 2>();
    backward_queries<D, 64, 32, 4, 2, 16>();
    backward_keys<D, 32, 16, 4, 2, 16, 2>();
  }
  return true;
}

const bool added = add_all<SBK_BLOCK_D>();

}  // namespace
}  // namespace sbk
