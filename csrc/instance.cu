// The kernels of one dtype (SBK_DTYPE: half or bfloat) and one width (SBK_BLOCK_D) that the extension is built with.
#include "backward_keys.cuh"
#include "backward_queries.cuh"
#include "forward.cuh"
#include "hopper_backward.cuh"
#include "hopper_forward.cuh"
#include "instances.h"
#include "tensor_map.h"

namespace sbk {
namespace {

using T = SBK_DTYPE;

constexpr bool IS_HALF = std::is_same<T, half>::value;

template <typename Params> void add(const char* kernel, int block_d, void (*function)(Params), int threads, int shared_bytes,
                                    std::vector<std::pair<std::string, int>> config, int packed_bytes = sizeof(Params),
                                    Clear (*prepare)(const void*, void*) = nullptr) {
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
[[maybe_unused]] constexpr int64 L2_BUDGET = 24 << 20;  // bytes of keys and values that blocks side by side should share
[[maybe_unused]] constexpr int CHAIN_COLUMNS = 4096;    // of the query heads whose tiles are taken in turns, so that few tiles wait for the one before

// Heads whose keys and values fit, at least one.
[[maybe_unused]] int heads_side_by_side(const Shape& shape) { return int(L2_BUDGET / (int64(shape.keys) * (shape.head_dim + shape.value_dim) * sizeof(T))) + 1; }

template <class C> Clear prepare_hopper_forward(const void* packed, void* params) {
  auto& made = *static_cast<HopperForwardParams*>(params);
  const auto& p = made.forward = *static_cast<const ForwardParams*>(packed);
  const Shape& shape = p.shape;
  const bool packed_rows = shape.cu_seqlens != nullptr;
  const int B = packed_rows ? 1 : shape.batch, Hk = shape.heads / shape.group, N = packed_rows ? shape.stat_rows : shape.keys;
  made.q = map_rows("q", p.q, IS_HALF, B, shape.heads, packed_rows ? N : shape.queries, shape.head_dim, C::BLOCK_M);
  made.out = map_rows("out", p.out, IS_HALF, B, shape.heads, packed_rows ? N : shape.queries, shape.value_dim, WARP_ROWS);
  made.k = map_keys("k", p.k, IS_HALF, B, Hk, N, shape.head_dim, C::BLOCK_N, packed_rows);
  made.v = map_keys("v", p.v, IS_HALF, B, Hk, N, shape.value_dim, C::BLOCK_N, packed_rows);
  made.head_group = heads_side_by_side(shape);
  return {p.ticket, sizeof(int)};
}

template <int BLOCK_D, int CONSUMERS, int NUM_STAGES> void hopper_forward() {
  using C = HopperForwardConfig<T, BLOCK_D, CONSUMERS, NUM_STAGES>;
  add("hopper_forward", BLOCK_D, hopper_forward_kernel<C>, C::THREADS, sizeof(HopperForwardShared<C>),
      {{"BLOCK_M", C::BLOCK_M}, {"BLOCK_N", C::BLOCK_N}, {"NUM_WARPS", C::THREADS / 32}, {"NUM_STAGES", NUM_STAGES}}, sizeof(ForwardParams),
      prepare_hopper_forward<C>);
}

template <int BLOCK_D, bool MAPS> Clear prepare_hopper_backward(const void* packed, void* params) {
  auto& made = *static_cast<HopperBackwardParams*>(params);
  const auto& p = *static_cast<const HopperBackwardArguments*>(packed);
  const Shape& shape = p.shape;
  const bool packed_rows = shape.cu_seqlens != nullptr;
  const int H = shape.heads, Hk = H / shape.group, D = shape.head_dim, Dv = shape.value_dim;
  if (MAPS) {
    const int B = packed_rows ? 1 : shape.batch, M = packed_rows ? shape.stat_rows : shape.queries, N = packed_rows ? M : shape.keys;
    made.q = map_rows("q", p.q, IS_HALF, B, H, M, D, HOPPER_BLOCK_M);
    made.dout = map_rows("dout", p.dout, IS_HALF, B, H, M, Dv, HOPPER_BLOCK_M);
    made.dq = map_rows("dq", p.dq, IS_HALF, B, H, M, D, HOPPER_BLOCK_M);
    made.k = map_keys("k", p.k, IS_HALF, B, Hk, N, D, hopper_backward_keys(BLOCK_D) / 2, packed_rows);
    made.v = map_keys("v", p.v, IS_HALF, B, Hk, N, Dv, hopper_backward_keys(BLOCK_D) / 2, packed_rows);
    made.dk = map_keys("dk", p.dk, IS_HALF, B, Hk, N, D, hopper_backward_keys(BLOCK_D) / 2, packed_rows);
    made.dv = map_keys("dv", p.dv, IS_HALF, B, Hk, N, Dv, hopper_backward_keys(BLOCK_D) / 2, packed_rows);
  }
  made.given = p;
  made.head_blocks = packed_rows ? shape.stat_rows / HOPPER_BLOCK_M + shape.batch : (shape.queries + HOPPER_BLOCK_M - 1) / HOPPER_BLOCK_M;
  const HopperBackwardScratch at = hopper_backward_scratch(int64(packed_rows ? 1 : shape.batch) * H * made.head_blocks, BLOCK_D);
  char* scratch = static_cast<char*>(p.scratch);
  made.dq_sum = reinterpret_cast<float*>(scratch + at.dq_sum);
  made.state = reinterpret_cast<float*>(scratch + at.state);
  made.oldest_tile = reinterpret_cast<int*>(scratch + at.oldest_tile);
  made.block_oldest = reinterpret_cast<int*>(scratch + at.block_oldest);
  made.state_turn = reinterpret_cast<int*>(scratch + at.state_turn);
  made.dq_turn = reinterpret_cast<int*>(scratch + at.dq_turn);
  made.ticket = reinterpret_cast<int*>(scratch + at.ticket);
  made.heads_per_group = CHAIN_COLUMNS / BLOCK_D / shape.group > 0 ? CHAIN_COLUMNS / BLOCK_D / shape.group : 1;
  made.scale_log2 = shape.scale * LOG2_E;
  return {nullptr, 0};
}

template <int BLOCK_D> void hopper_backward() {
  using C = HopperBackwardConfig<T, BLOCK_D>;
  constexpr int BYTES = sizeof(HopperBackwardArguments);
  add("hopper_backward_begin", BLOCK_D, hopper_backward_begin_kernel<C::BLOCK_N>, HOPPER_BEGIN_THREADS, 0, {}, BYTES,
      prepare_hopper_backward<BLOCK_D, false>);
  add("hopper_backward", BLOCK_D, hopper_backward_kernel<C>, C::THREADS, sizeof(hopper_backward::Shared<C>), {}, BYTES,
      prepare_hopper_backward<BLOCK_D, true>);
}
#endif

// The table: the first line of each kernel is the default for the width.
template <int D> bool add_all() {
#ifdef SBK_SM90A
  hopper_forward<D, 2, D == 128 || D == 192 ? 2 : 3>();
  hopper_backward<D>();
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
