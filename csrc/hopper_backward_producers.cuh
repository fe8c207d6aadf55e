// Backward on Hopper: the four warps that feed the consumers of hopper_backward.cuh, and take their results.
#pragma once
#include "hopper_backward_results.cuh"

namespace sbk {
namespace hopper_backward {

// The next tile that is there and visited, by the warp; zeros for dk and dv of those that nobody visits.
// NOTE: what is known of it goes through shared memory at once, since there are no registers for it.
template <class C> SBK_FN void take_tile(const HopperBackwardParams& p, Work& work, int lane) {
  const Shape& shape = p.given.shape;
  for (;; __syncwarp()) {  // lane 0 writes what the others have read
    if (lane == 0) {
      int tiles = ceil_div(shape.keys, C::BLOCK_N), key_heads = shape.heads / shape.group;
      asm volatile("" : "+r"(tiles), "+r"(key_heads));  // NOTE: else divisions by them are prepared, and kept, ahead of the loop
      const int all = shape.batch * key_heads;
      const int ticket = atomicAdd(p.ticket, 1);
      const int group = ticket / (p.heads_per_group * tiles), heads = min(p.heads_per_group, all - group * p.heads_per_group);
      const int in_group = ticket - group * p.heads_per_group * tiles;
      work.tile = -1;
      if (ticket < all * tiles) {
        const int head = group * p.heads_per_group + in_group % heads;
        work.tile = in_group / heads;
        work.at = sequence_of(shape, head / key_heads, head % key_heads);
        work.blocks = blocks_before(p, work.at, head / key_heads, head % key_heads * shape.group);
        work.first_block = first_block<C::BLOCK_N>(work.at, work.tile);
      }
      work.steps = 0;
    }
    __syncwarp();
    if (work.tile < 0) return;
    if (work.tile * C::BLOCK_N >= work.at.N) continue;
    const int blocks = query_blocks(work.at) - work.first_block;  // of a head that may visit
    int steps = 0;
#pragma unroll 1
    for (int i = lane; i - lane < shape.group * blocks; i += 32) {
      const int* oldest = p.block_oldest + work.blocks + work.first_block + i / blocks * p.head_blocks + i % blocks;
      steps += __popc(__ballot_sync(ALL_LANES, i < shape.group * blocks && *oldest <= work.tile));
    }
    if (steps > 0) {
      if (lane == 0) work.steps = steps;
      __syncwarp();
      return;
    }
    store_zeros<C>(p, work, lane);
  }
}

template <class C> SBK_FN void load_rows(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Barriers barriers = barriers_of(s, p);
  using T = typename C::T;
  const BackwardArguments& given = p.given;
  const int group = given.shape.group, D = given.shape.head_dim, Dv = given.shape.value_dim;
  Work& work = s.loading;  // there are no registers for it
  if (lane == 0) work.number = work.begin = 0;
  for (;;) {
    __syncwarp();
    barriers.wait(WORK_EMPTY + work.number % 2, work.number / 2 % 2 ^ 1);
    take_tile<C>(p, work, lane);
    if (lane == 0) s.work[work.number % 4] = work;
    barriers.arrive(WORK_FULL + work.number % 2, lane == 0);
    if (__shfl_sync(ALL_LANES, work.steps, 0) == 0) break;
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
    VisitingBlocks blocks(p, work);
    auto load_queries = [&](const TensorMap& mapped, const Tensor& x, int width, auto& tiles, int n, int full, int empty) {
      constexpr int STAGES = sizeof(tiles) / C::Q_BYTES;
      const int g = work.begin + n, stage = g % STAGES, first = s.visits[n % 2].block * C::BLOCK_M;
      const unsigned barrier = barriers.at(full + stage), to = shared_address(tiles[stage]);
      barriers.wait(empty + stage, g / STAGES % 2 ^ 1);
      if (full == Q_FULL && lane == 0)  // less the query row at the tile's first key
        s.visible[stage] = first - (work.tile * C::BLOCK_N - (given.shape.keys - given.shape.queries)) + given.shape.attend_current;
      Sequence at = work.at;
      at.head = at.head * group + s.visits[n % 2].head;
      if (given.shape.cu_seqlens != nullptr && first + C::BLOCK_M > at.M) {  // else the map knows the last row
        const Rows<T> rows = {rows_of<T>(x, at, 1), x.stride_row, at.M, width, first};
        load_pieces<C::BLOCK_M, C::SLABS, NaturalOrder>(to, C::Q_SLAB_BYTES, rows, barrier, lane);
      } else if (lane == 0) {
        barrier_arrive_expecting(barrier, C::Q_BYTES);
        for (int i = 0; i < C::SLABS; i++)
          load_box(to + i * C::Q_SLAB_BYTES, &mapped, barrier, i * SLAB_COLUMNS, (int)at.token + first, at.head, at.batch);
      }
    };
    auto next = [&](int n) {
      const Visit visit = blocks.next(lane);
      if (lane == 0) s.visits[n % 2] = visit;
      __syncwarp();
    };
    next(0);
    load_queries(p.q, given.q, D, s.q, 0, Q_FULL, Q_EMPTY);
    const int key_stage = work.number % C::KEY_STAGES;
    const int key_parity = work.number / C::KEY_STAGES % 2;
    barriers.wait(K_EMPTY + key_stage, key_parity ^ 1);
    load_tile(p.k, given.k, D, s.k[key_stage], K_FULL + key_stage);
    barriers.wait(V_EMPTY + key_stage, key_parity ^ 1);
    load_tile(p.v, given.v, Dv, s.v[key_stage], V_FULL + key_stage);
    for (int n = 0; n < work.steps; n++) {
      load_queries(p.dout, given.dout, Dv, s.dout, n, DOUT_FULL, DOUT_EMPTY);
      if (n + 1 < work.steps) {  // a step ahead with q
        next(n + 1);
        load_queries(p.q, given.q, D, s.q, n + 1, Q_FULL, Q_EMPTY);
      }
    }
    __syncwarp();
    if (lane == 0) work.number++, work.begin += work.steps;
  }
}

// The other warps' way through the tiles: step(work, blocks, n) for each step of each, n counting on, and end_tile(work).
template <class C, typename Step, typename EndTile>
SBK_FN void each_step(const HopperBackwardParams& p, Shared<C>& s, int lane, Step step, EndTile end_tile) {
  const Barriers barriers = barriers_of(s, p);
  int g = 0;
  for (int t = 0;; t++) {
    barriers.wait(WORK_FULL + t % 2, t / 2 % 2);
    const Work& work = s.work[t % 4];
    const int end = g + __shfl_sync(ALL_LANES, work.steps, 0);
    if (end == g) break;
    VisitingBlocks blocks(p, work);
    for (; g < end; g++) step(work, blocks, g);
    end_tile(work);
    __syncwarp();
    barriers.arrive(WORK_EMPTY + t % 2, arrives(lane));
  }
}

// What a row's walk starts from, in one number. > 0: the stick left by the tiles done. < 0: minus the stick on entry from the newer
// side, which is whole in the newest tile and what the forward kept in the oldest. 0: the row's stick does not reach this tile.
SBK_FN float encode_carry(float carry, int oldest_tile, int tile, bool newest) {
  return tile < oldest_tile ? 0.f : newest ? -1.f : tile == oldest_tile ? -carry : carry;
}

template <class C> SBK_FN void take_state(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Barriers barriers = barriers_of(s, p);
  each_step<C>(p, s, lane, [&](const Work& work, VisitingBlocks& blocks, int n) {
    const int slot = n % C::SLOTS, tile = work.tile;
    const Visit visit = blocks.next(lane);
    const int index = blocks.index(visit);
    // Of a block: some of its rows may see none of its keys.
    const bool newest = visit.block < blocks_end<C::BLOCK_N>(work.at, tile);
    const unsigned rows = index * (C::BLOCK_M / 2) + lane;  // two a lane
    barriers.wait(STATE_EMPTY + slot, n / C::SLOTS % 2 ^ 1);
    const int2 oldest = reinterpret_cast<const int2*>(p.oldest_tile)[rows];
    barriers.wait_for_turn(p.state_turn + index, tile, STATE_TURN);
    __syncwarp();
    const float4 x = __ldcg(reinterpret_cast<const float4*>(p.state) + rows);
    reinterpret_cast<float4*>(s.state[slot])[lane] =
        make_float4(encode_carry(x.x, oldest.x, tile, newest), x.y, encode_carry(x.z, oldest.y, tile, newest), x.w);
    __syncwarp();
    barriers.arrive(STATE_FULL + slot, arrives(lane));
  }, [](const Work&) {});
}

template <class C> SBK_FN void pass_state_on(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Barriers barriers = barriers_of(s, p);
  each_step<C>(p, s, lane, [&](const Work& work, VisitingBlocks& blocks, int n) {
    const int slot = n % C::SLOTS, index = blocks.index(blocks.next(lane));
    barriers.wait(NEXT_FULL + slot, n / C::SLOTS % 2);
    const float4 x = reinterpret_cast<const float4*>(s.next[slot])[lane];
    float2* rows = reinterpret_cast<float2*>(p.state) + (int64)index * C::BLOCK_M + 2 * lane;
    if (x.x != 0.f) __stcg(rows, make_float2(x.x, x.y));
    if (x.z != 0.f) __stcg(rows + 1, make_float2(x.z, x.w));
    __syncwarp();
    barriers.arrive(NEXT_EMPTY + slot, arrives(lane));
    if (lane == 0) store_release(p.state_turn + index, work.tile + 1);
  }, [](const Work&) {});
}

// The first tile of a query block stores its part of dq, the others add theirs in turn, so that sums are the same each time.
// NOTE: what a step takes here, one wait for memory after the other, has to stay below what it takes the consumers. So what comes next is
// looked up while the sum before is under way.
template <class C> SBK_FN void add_dq(const HopperBackwardParams& p, Shared<C>& s, int lane) {
  const Barriers barriers = barriers_of(s, p);
  constexpr int FLOATS = 2 * C::DQ_FLOATS;  // of a part
  // Turns not passed on yet, of this tile: lane i has the number of the block of the i-th. The last one's sum may be under way.
  // NOTE: some at a time, since what it takes to pass one on, a wait for sums to be there and a release, is most of a step. But none is
  // kept beyond its tile: the next one may wait for blocks of threads that wait for it.
  int turns = 0, mine = 0;
  auto pass_on = [&](const Work& work, int at_least) {
    if (turns == 0) return;
    const bool passing = turns >= at_least;
    if (lane == 0) {
      bulk_wait_read<0>();
      barriers.arrive(DQ_EMPTY);
      if (passing) {
        bulk_wait<0>();
        fence_async_global();
      }
    }
    __syncwarp();
    if (!passing) return;
    if (lane < turns) store_release(p.dq_turn + mine, work.tile + 1);
    turns = 0;
  };
  each_step<C>(p, s, lane, [&](const Work& work, VisitingBlocks& blocks, int n) {
    const int index = blocks.index(blocks.next(lane));
    const bool first = p.block_oldest[index] == work.tile;
    pass_on(work, C::TURNS);
    if (lane == turns++) mine = index;
    if (lane == 0) {
      float* sum = p.dq_sum + (int64)index * C::DQ_PARTS * FLOATS;
      barriers.wait_for_turn(p.dq_turn + index, work.tile, DQ_TURN);
#pragma unroll
      for (int part = 0; part < C::DQ_PARTS; part++) {
        barriers.wait(DQ_FULL, (n * C::DQ_PARTS + part) % 2);
        fence_async_global();
        fence_async_shared();  // for all who wrote it
        if (first)
          store_bulk(sum + part * FLOATS, shared_address(s.dq), FLOATS * 4);
        else
          reduce_add(sum + part * FLOATS, shared_address(s.dq), FLOATS * 4);
        bulk_commit();
        if (part + 1 == C::DQ_PARTS) break;
        bulk_wait_read<0>();
        barriers.arrive(DQ_EMPTY);
      }
    }
    __syncwarp();
  }, [&](const Work& work) {
    pass_on(work, 1);
    barriers.arrive(SUMMED + work.number % 2, arrives(lane));
  });
}

}  // namespace hopper_backward
}  // namespace sbk
