// The kernels of one dtype (SBK_DTYPE: half or bfloat) and one width (SBK_BLOCK_D) that the extension is built with.
#include "backward_keys.cuh"
#include "backward_queries.cuh"
#include "forward.cuh"
#include "hopper_forward.cuh"
#include "instances.h"
#include "tensor_map.h"

namespace sbk {
namespace {

using T = SBK_DTYPE;

constexpr bool IS_HALF = std::is_same<T, half>::value;

template <typename Params> void add(const char* kernel, int block_d, void (*function)(Params), int threads, int shared_bytes,
                                    std::vector<std::pair<std::string, int>> config, int packed_bytes = sizeof(Params),
                                    void (*prepare)(const void*, void*) = nullptr) {
  static_assert(sizeof(Params) <= MAX_PARAMS_BYTES);
  instances().push_back({kernel, IS_HALF ? "float16" : "bfloat16", block_d, std::move(config), reinterpret_cast<const void*>(function),
                         threads, shared_bytes, packed_bytes, prepare});
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

#ifdef SBK_SM90A  // defined where sm_90a is among the architectures
constexpr int64 L2_BUDGET = 24 << 20;  // bytes of keys and values that blocks side by side should share

template <class C> void prepare_hopper_forward(const void* packed, void* params) {
  auto& made = *static_cast<HopperForwardParams*>(params);
  const auto& p = made.forward = *static_cast<const ForwardParams*>(packed);
  const Shape& shape = p.shape;
  const int kv_heads = shape.heads / shape.group;
  made.q_index = map_rows(made.q, "q", p.q, IS_HALF, shape.batch, shape.heads, shape.queries, shape.head_dim, C::BLOCK_M);
  made.k_index = map_keys(made.k, "k", p.k, IS_HALF, shape.batch, kv_heads, shape.keys, shape.head_dim, C::BLOCK_N);
  made.v_index = map_keys(made.v, "v", p.v, IS_HALF, shape.batch, kv_heads, shape.keys, shape.value_dim, C::BLOCK_N);
  made.head_group = L2_BUDGET / (int64(shape.keys) * C::BLOCK_D * 4) + 1;
}

template <int BLOCK_D, int CONSUMERS, int NUM_STAGES, bool TURNS> void hopper_forward() {
  using C = HopperForwardConfig<T, BLOCK_D, CONSUMERS, NUM_STAGES, TURNS>;
  add("hopper_forward", BLOCK_D, hopper_forward_kernel<C>, C::THREADS, sizeof(HopperForwardShared<C>),
      {{"BLOCK_M", C::BLOCK_M}, {"BLOCK_N", C::BLOCK_N}, {"NUM_WARPS", C::THREADS / 32}, {"NUM_STAGES", NUM_STAGES}, {"TURNS", TURNS}}, sizeof(ForwardParams),
      prepare_hopper_forward<C>);
}
#endif

// The table: the first line of each kernel is the default for the width.
template <int D> bool add_all() {
#ifdef SBK_SM90A
  if constexpr (D == 64) {
    hopper_forward<D, 2, 2, true>();
    hopper_forward<D, 2, 4, true>();
    hopper_forward<D, 2, 4, false>();
    hopper_forward<D, 3, 4, true>();
  } else if constexpr (D == 128) {
    hopper_forward<D, 2, 2, true>();
    hopper_forward<D, 2, 3, true>();
    hopper_forward<D, 2, 3, false>();
  }
#endif
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
