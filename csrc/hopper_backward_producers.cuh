// Backward on Hopper: the four warps that feed the consumers of hopper_backward.cuh, and take their results.
#pragma once
#include "hopper_backward_shared.cuh"

namespace sbk {
namespace hopper_backward {

template <class C> SBK_FN void load_rows(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work& work = s.work;  // there are no registers for it
  const Barriers barriers = barriers_of(s, p);
  using T = typename C::T;
  const int group = p.given.shape.group;
  auto load_tile = [&](const MappedKeys& mapped, const Tensor& x, int width, char* tile, int barrier) {
    const unsigned full = barriers.at(barrier);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      const int first = work.tile * C::BLOCK_N + half * C::HALF_N;
      const unsigned to = shared_address(tile) + half * C::HALF_BYTES;
      if (first + C::HALF_N > work.at.N) {
        const Rows<T> rows = {rows_of<T>(x, work.at, 1), x.stride_row, work.at.N, width, first};
        load_pieces<C::HALF_N, C::SLABS, KeyOrder<C::HALF_N>>(to, C::K_SLAB_BYTES, rows, full, lane);
      } else if (lane == 0) {
        barrier_arrive_expecting(full, C::K_BYTES / 2);
        load_keys<C::SLABS>(mapped, to, C::K_SLAB_BYTES, work.at.batch, work.at.head, (int)work.at.token + first, full);
      }
    }
  };
  VisitingBlocks blocks(p, s.work);
  const int diagonal = work.tile * C::BLOCK_N - (p.given.shape.keys - p.given.shape.queries);  // query row at the tile's first key
  auto load_queries = [&](const TensorMap& mapped, const Tensor& x, int width, char (&tiles)[C::STAGES][C::Q_BYTES], int n, Visit visit, int full,
                          int empty) {
    const int stage = n % C::STAGES, first = visit.block * C::BLOCK_M;
    const unsigned barrier = barriers.at(full + stage), to = shared_address(tiles[stage]);
    barriers.wait(empty + stage, n / C::STAGES % 2 ^ 1);
    if (full == Q_FULL && lane == 0) s.visible[stage] = first - diagonal + p.given.shape.attend_current;
    Sequence at = work.at;
    at.head = at.head * group + visit.head;
    if (p.given.shape.cu_seqlens != nullptr && first + C::BLOCK_M > at.M) {  // else the map knows the last row
      const Rows<T> rows = {rows_of<T>(x, at, 1), x.stride_row, at.M, width, first};
      load_pieces<C::BLOCK_M, C::SLABS, NaturalOrder>(to, C::Q_SLAB_BYTES, rows, barrier, lane);
    } else if (lane == 0) {
      barrier_arrive_expecting(barrier, C::Q_BYTES);
      for (int i = 0; i < C::SLABS; i++)
        load_box(to + i * C::Q_SLAB_BYTES, &mapped, barrier, i * SLAB_COLUMNS, (int)at.token + first, at.head, at.batch);
    }
  };
  const BackwardArguments& given = p.given;
  const int D = given.shape.head_dim, Dv = given.shape.value_dim;
  Visit visit = blocks.next(lane);
  load_tile(p.k, given.k, D, s.k, K_FULL);
  load_queries(p.q, given.q, D, s.q, 0, visit, Q_FULL, Q_EMPTY);
  load_tile(p.v, given.v, Dv, s.v, V_FULL);
  for (int n = 0; n < work.steps; n++) {  // a step ahead with q
    const Visit after = n + 1 < work.steps ? blocks.next(lane) : visit;
    load_queries(p.dout, given.dout, Dv, s.dout, n, visit, DOUT_FULL, DOUT_EMPTY);
    if (n + 1 < work.steps) load_queries(p.q, given.q, D, s.q, n + 1, after, Q_FULL, Q_EMPTY);
    visit = after;
  }
}

// What a row's walk starts from, in one number. > 0: the stick left by the tiles done. < 0: minus the stick on entry from the newer
// side, which is whole in the newest tile and what the forward kept in the oldest. 0: the row's stick does not reach this tile.
SBK_FN float encode_carry(float carry, int oldest_tile, int tile, bool newest) {
  return tile < oldest_tile ? 0.f : newest ? -1.f : tile == oldest_tile ? -carry : carry;
}

template <class C> SBK_FN void take_state(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work work = s.work;
  const Barriers barriers = barriers_of(s, p);
  VisitingBlocks blocks(p, s.work);
  const int all = query_blocks(work.at), newest_end = work.tile == newest_tile(work.at, all) ? all : first_block(work.at, work.tile + 1);
  for (int n = 0; n < work.steps; n++) {
    const int slot = n % C::SLOTS;
    const Visit visit = blocks.next(lane);
    const int index = blocks.index(visit);
    const bool newest = visit.block < newest_end;  // of a block: some of its rows may see none of its keys
    const unsigned rows = index * (C::BLOCK_M / 2) + lane;  // two a lane
    barriers.wait(STATE_EMPTY + slot, n / C::SLOTS % 2 ^ 1);
    const int2 oldest = reinterpret_cast<const int2*>(p.oldest_tile)[rows];
    barriers.wait_for_turn(p.state_turn + index, work.tile, STATE_TURN);
    __syncwarp();
    const float4 x = __ldcg(reinterpret_cast<const float4*>(p.state) + rows);
    reinterpret_cast<float4*>(s.state[slot])[lane] = make_float4(encode_carry(x.x, oldest.x, work.tile, newest), x.y,
                                                                 encode_carry(x.z, oldest.y, work.tile, newest), x.w);
    __syncwarp();
    barriers.arrive(STATE_FULL + slot, arrives(lane));
  }
}

template <class C> SBK_FN void pass_state_on(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work work = s.work;
  const Barriers barriers = barriers_of(s, p);
  VisitingBlocks blocks(p, s.work);
  for (int n = 0; n < work.steps; n++) {
    const int slot = n % C::SLOTS;
    const int index = blocks.index(blocks.next(lane));
    barriers.wait(NEXT_FULL + slot, n / C::SLOTS % 2);
    const float4 x = reinterpret_cast<const float4*>(s.next[slot])[lane];
    float2* rows = reinterpret_cast<float2*>(p.state) + (int64)index * C::BLOCK_M + 2 * lane;
    if (x.x != 0.f) __stcg(rows, make_float2(x.x, x.y));
    if (x.z != 0.f) __stcg(rows + 1, make_float2(x.z, x.w));
    __syncwarp();
    barriers.arrive(NEXT_EMPTY + slot, arrives(lane));
    if (lane == 0) store_release(p.state_turn + index, work.tile + 1);
  }
}

// The first tile of a query block stores its part of dq, the others add theirs in turn, so that sums are the same each time.
template <class C> SBK_FN void add_dq(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Work work = s.work;
  const Barriers barriers = barriers_of(s, p);
  VisitingBlocks blocks(p, s.work);
  for (int n = 0; n < work.steps; n++) {
    const int index = blocks.index(blocks.next(lane));
    if (lane == 0) {
      const bool first = p.block_oldest[index] == work.tile;
      float* sum = p.dq_sum + (int64)index * (2 * C::DQ_FLOATS);
      barriers.wait_for_turn(p.dq_turn + index, work.tile, DQ_TURN);
      fence_async_global();
      for (int half = 0; half < 2; half++, sum += C::DQ_FLOATS) {
        barriers.wait(DQ_FULL + half, n % 2);
        fence_async_shared();  // for all who wrote it
        if (first)
          store_bulk(sum, shared_address(s.dq[half]), C::DQ_FLOATS * 4);
        else
          reduce_add(sum, shared_address(s.dq[half]), C::DQ_FLOATS * 4);
        bulk_commit();
      }
      bulk_wait_read<1>();
      barriers.arrive(DQ_EMPTY);
      bulk_wait_read<0>();
      barriers.arrive(DQ_EMPTY + 1);
      bulk_wait<0>();
      fence_async_global();
      store_release(p.dq_turn + index, work.tile + 1);
    }
    __syncwarp();
  }
}

}  // namespace hopper_backward
}  // namespace sbk
