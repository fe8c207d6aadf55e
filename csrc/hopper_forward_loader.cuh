// Forward on Hopper: the warp that hands out query blocks and loads for the consumers of hopper_forward.cuh.
#pragma once
#include "hopper_forward_shared.cuh"

namespace sbk {

template <class C> SBK_FN Work work_of(const HopperForwardParams& p, int index) {
  const Shape& shape = p.forward.shape;
  const int m_blocks = ceil_div(shape.queries, C::BLOCK_M), heads = shape.batch * shape.heads;
  const int group = index / (p.head_group * m_blocks), in_group = min(p.head_group, heads - group * p.head_group);
  const int within = index - group * p.head_group * m_blocks, head = group * p.head_group + within % in_group;
  Work work;
  work.index = index;
  work.at = sequence_of(shape, head / shape.heads, head % shape.heads);
  work.m_begin = (m_blocks - 1 - within / in_group) * C::BLOCK_M;
  work.first_end = first_invisible(shape, work.at, work.m_begin);
  work.tiles_seen = ceil_div(min(work.first_end + C::BLOCK_M - 1, work.at.N), C::BLOCK_N);
  return work;
}

// By a warp.
template <class C> SBK_FN void load_tiles(const HopperForwardParams& p, HopperForwardShared<C>& shared, int works, int lane) {
  using T = typename C::T;
  const Shape& shape = p.forward.shape;
  Ring<C::Q_STAGES> blocks;
  Ring<C::STAGES> keys, values;
  auto load_tile = [&](unsigned char* tile, const MappedKeys& mapped, const Tensor& x, int width, const Sequence& at, Barrier& full, int n_tile) {
    const int first = n_tile * C::BLOCK_N;
    const unsigned barrier = shared_address(&full);
    if (first + C::BLOCK_N > at.N) {
      const Rows<T> rows = {rows_of<T>(x, at, shape.group), x.stride_row, at.N, width, first};
      load_pieces<C::BLOCK_N, C::SLABS, KeyOrder<C::BLOCK_N>>(shared_address(tile), C::KEY_SLAB, rows, barrier, lane);
    } else if (lane == 0) {
      barrier_arrive_expecting(barrier, C::KEY_BYTES);
      load_keys<C::SLABS>(mapped, shared_address(tile), C::KEY_SLAB, at.batch, at.head / shape.group, (int)at.token + first, barrier);
    }
  };
  // Values follow a tile behind, so that the first keys of the next query block are asked for before the last values of this one.
  Sequence last;
  int last_tile = -1;
  auto load_values = [&] {
    if (last_tile < 0) return;
    if constexpr (C::ONE_PLACE)
      barrier_wait(shared_address(&shared.k_empty[values.stage]), values.parity, WAIT_LIMIT);
    else
      barrier_wait(shared_address(&shared.v_empty[values.stage]), values.parity ^ 1, WAIT_LIMIT);
    load_tile(shared.tiles.v[values.stage], p.v, p.forward.v, shape.value_dim, last, shared.v_full[values.stage], last_tile);
    if constexpr (C::ONE_PLACE)
      values = keys.before();
    else
      values.advance();
    last_tile = -1;
  };
  for (;; blocks.advance()) {
    // Take the next query block that is there.
    barrier_wait(shared_address(&shared.q_empty[blocks.stage]), blocks.parity ^ 1, WAIT_LIMIT);
    int w;
    Work work;
    do {
      w = __shfl_sync(ALL_LANES, lane == 0 ? atomicAdd(p.forward.ticket, 1) : 0, 0);
      work = work_of<C>(p, min(w, works - 1));
    } while (w < works && work.m_begin >= work.at.M);
    if (w >= works) work.tiles_seen = 0;
    if (lane == 0) shared.work[blocks.stage] = work;
    const unsigned q_full = shared_address(&shared.q_full[blocks.stage]);
    if (w >= works) {
      barrier_arrive(q_full, lane == 0);
      load_values();
      break;
    }
    const Sequence& at = work.at;
    if (lane == 0) {
      barrier_arrive_expecting(q_full, C::Q_BYTES);
#pragma unroll
      for (int slab = 0; slab < C::SLABS; slab++)
        load_box(shared_address(shared.q[blocks.stage]) + slab * C::Q_SLAB, &p.q, q_full, slab * SLAB_COLUMNS, (int)at.token + work.m_begin, at.head,
                 at.batch);
    }

    for (int tile = work.tiles_seen - 1; tile >= 0; tile--) {
      barrier_wait(shared_address(&(C::ONE_PLACE ? shared.v_empty : shared.k_empty)[keys.stage]), keys.parity ^ 1, WAIT_LIMIT);
      bool stop = false;
      if (shape.skip_below > 0.f && tile < work.tiles_seen - 1)
        stop = __all_sync(ALL_LANES, lane >= 4 * C::CONSUMERS || atomicAdd(&shared.used_up[lane], 0) == w + 1);
      if (lane == 0) shared.stop[keys.stage] = stop;
      if (stop) {
        barrier_arrive(shared_address(&shared.k_full[keys.stage]), lane == 0);
        if constexpr (C::ONE_PLACE) barrier_arrive(shared_address(&shared.v_full[keys.stage]), lane == 0);
        if (C::ONE_PLACE && CHECKED) barrier_wait(shared_address(&shared.k_empty[keys.stage]), keys.parity, WAIT_LIMIT);
        keys.advance();
        break;
      }
      load_tile(shared.tiles.k[keys.stage], p.k, p.forward.k, shape.head_dim, at, shared.k_full[keys.stage], tile);
      keys.advance();
      load_values();
      last = at;
      last_tile = tile;
    }
  }
}

}  // namespace sbk
