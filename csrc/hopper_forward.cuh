// Forward of stick-breaking attention on compute capability 9.0: equations (1) to (5), as forward.cuh, whose row step it shares.
//
//     grid    as many blocks as multiprocessors, each taking one query block after the other, longest first within a group of heads
//     roles   one warp loads: q of Q_STAGES query blocks, and tiles of k and v in permuted key order into STAGES of shared memory;
//             CONSUMERS warpgroups of 64 query rows compute, and store their output through q's place
//     k, v    tiles of BLOCK_N keys from key 0 on; rows beyond M and N, and columns beyond D and Dv up to BLOCK_D, enter as zeros
//     out     [M, Dv] of those rows and columns
//
// A warpgroup has the logits of the next tile, of the next query block after a block's last, computed while the tensor cores still add
// this one's A v, and weighs them meanwhile. Warpgroups take turns in 2^s, of which a multiprocessor computes 16 a clock.
#pragma once
#include "hopper_forward_loader.cuh"

namespace sbk {

template <class C> SBK_FN void attend(const HopperForwardParams& p, HopperForwardShared<C>& shared, int works, int consumer) {
  using T = typename C::T;
  using Run = typename C::Run;
  using Logits = Wgmma<T, C::BLOCK_N>;
  using Output = Wgmma<T, C::BLOCK_D>;
  const Shape& shape = p.forward.shape;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4;
  const int warp_row = consumer * 64 + warp * WARP_ROWS, my_row = warp_row + lane / 4;
  const float scale_log2 = shape.scale * LOG2_E;
  Ring<C::Q_STAGES> blocks;
  Ring<C::STAGES> keys, values;
  // Turns: barrier 1 + i is consumer i's, and starts with the first.
  auto take_turn = [&] { named_sync(1 + consumer, 256); };
  auto pass_turn = [&] { named_arrive(1 + (consumer + 1) % C::CONSUMERS, 256); };
  auto release = [&](Barrier& empty) { barrier_arrive(shared_address(&empty), arrives(lane)); };
  auto same = [](int x) { return __shfl_sync(ALL_LANES, x, 0); };  // of all lanes, as the compiler has to know of what a branch depends on
  if (consumer == C::CONSUMERS - 1) pass_turn();

  float s[C::BLOCK_N / 2], out[C::BLOCK_D / 2];
  auto& s_rows = reinterpret_cast<float(&)[1][C::NT][4]>(s);
  unsigned weights[1][C::NT / 2][4];
  ForwardRow rows[1][2];
  int first_end, tile;
  bool idle = false;  // whether the sticks of all of the warp's rows are used up
  bool k_ready = false, pending = false, storing = false;  // pending: an output not yet stored

  // The next query block, if there is one, and its newest tile.
  auto enter = [&] {
    barrier_wait(shared_address(&shared.q_full[blocks.stage]), blocks.parity, WAIT_LIMIT);
    const Work& work = shared.work[blocks.stage];
    first_end = same(work.first_end);
    tile = same(work.tiles_seen) - 1;
    return tile >= 0;
  };
  auto begin_rows = [&] {
    const Work& work = shared.work[blocks.stage];
    const int rows_left = work.at.M - work.m_begin;
    idle = false;
#pragma unroll
    for (int h = 0; h < 2; h++) rows[0][h] = {my_row + h * 8 < rows_left ? Run::WHOLE : Run::NONE, Run::WHOLE, tile + 1};
  };
  // What is known of the query block before.
  auto end_rows = [&] {
    const Work& work = shared.work[blocks.before().stage];
    const int64 statistic = statistic_of(shape, work.at) + work.m_begin;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = my_row + h * 8;
      if (q == 0 && work.m_begin + row < work.at.M) {
        p.forward.remainder[statistic + row] = Run::stick(rows[0][h].carry);
        if (p.forward.oldest_carry != nullptr) p.forward.oldest_carry[statistic + row] = rows[0][h].oldest_carry;
        if (p.forward.oldest_tile != nullptr) p.forward.oldest_tile[statistic + row] = rows[0][h].oldest_tile;
      }
    }
  };
  // The output of the block before, through this warp's rows of its q: since the last product with them there was a turn.
  auto store = [&] {
    const int stage = blocks.before().stage;
    const Work& work = shared.work[stage];
    const unsigned q_tile = shared_address(shared.q[stage]), tile = q_tile + warp_row * SLAB_ROW_BYTES;
    const int first = work.m_begin + warp_row;
    store_accumulator<T>(q_tile + consumer * 64 * SLAB_ROW_BYTES, C::Q_SLAB, matrix_place(threadIdx.x % 128), out, 1.f, [](int i) { return 2 * i; });
    fence_async_shared();
    __syncwarp();
    if (shape.cu_seqlens != nullptr && first + WARP_ROWS > work.at.M) {  // else the map knows the last row
      const Rows<T> rows = {rows_of<T>(p.forward.out, work.at, 1), p.forward.out.stride_row, work.at.M, shape.value_dim, first};
      store_pieces<WARP_ROWS, C::SLABS, NaturalOrder, 32>(tile, C::Q_SLAB, rows, lane);
    } else if (lane == 0) {
#pragma unroll
      for (int slab = 0; slab < C::SLABS; slab++)
        store_box(tile + slab * C::Q_SLAB, &p.out, slab * SLAB_COLUMNS, (int)work.at.token + first, work.at.head, work.at.batch);
    }
    bulk_commit();
    pending = false;
    storing = true;
  };
  // As soon as it is read from there.
  auto release_q = [&] {
    if (!storing) return;
    storing = false;
    bulk_wait_read<0>();
    __syncwarp();
    release(shared.q_empty[blocks.before().stage]);
  };
  auto await_keys = [&] {
    if (!k_ready) barrier_wait(shared_address(&shared.k_full[keys.stage]), keys.parity, WAIT_LIMIT);
    k_ready = true;
  };
  auto leave_keys = [&] {
    release(shared.k_empty[keys.stage]);
    keys.advance();
    k_ready = false;
  };
  auto start_logits = [&] {
    const uint64 q_rows = operand(shared_address(shared.q[blocks.stage]) + consumer * 64 * SLAB_ROW_BYTES, 16);
    const uint64 k_tile = operand(shared_address(shared.tiles.k[keys.stage]), 16);
#pragma unroll
    for (int k = 0; k < C::BLOCK_D / 16; k++) {
      const uint64 a = q_rows + along_k(k, C::Q_SLAB), b = k_tile + along_k(k, C::KEY_SLAB);
      if (k == 0)
        Logits::template set<ALONG_K, ALONG_K>(s, a, b);
      else
        Logits::template add<ALONG_K, ALONG_K>(s, a, b, 1);
    }
    wgmma_commit();
  };
  auto start_output = [&](bool first) {
    const uint64 v_tile = operand(shared_address(shared.tiles.v[values.stage]), C::KEY_SLAB);
#pragma unroll
    for (int k = 0; k < C::BLOCK_N / 16; k++) Output::template add<ACROSS_K>(out, weights[0][k], v_tile + across_k(k), k > 0 || !first);
    wgmma_commit();
  };
  auto weigh_tile = [&] {
    Run runs[1][2];
    const int visible = first_end + my_row - tile * C::BLOCK_N - q * C::RUN;
    take_turn();
    if (idle) {
#pragma unroll
      for (int i = 0; i < C::BLOCK_N / 2; i++) s[i] = 0.f;
      pass_turn();
      return;
    }
    if (tile >= first_end / C::BLOCK_N)
      absorb<true>(runs, s_rows, scale_log2, visible);
    else
      absorb<false>(runs, s_rows, scale_log2, 0);
    pass_turn();
    weigh<C>(s_rows, runs, rows, tile, q);
    if (shape.skip_below > 0.f) {
      // NOTE: a warp whose rows have all used up their sticks takes what is left of them away: tiles that still come until the loader
      // knows would else change results, and how many do is a matter of time.
      const bool used_up = Run::stick(rows[0][0].carry) < shape.skip_below && Run::stick(rows[0][1].carry) < shape.skip_below;  // not NaN
      idle = __all_sync(ALL_LANES, used_up);
      if (idle) {
        rows[0][0].carry = rows[0][1].carry = Run::NONE;
        if (lane == 0) atomicExch(&shared.used_up[consumer * 4 + warp], shared.work[blocks.stage].index + 1);
      }
    }
  };

  if (enter()) {
    await_keys();
    wgmma_fence();
    start_logits();
    begin_rows();
    wgmma_wait<0>();
    leave_keys();
    weigh_tile();
    to_operand<T>(weights, s_rows);

    // Each next tile: its logits and the last one's output are under way together.
    bool first = true;
#pragma unroll 1
    for (;;) {
      bool ended = tile-- == 0;
      if (!ended && shape.skip_below > 0.f) {
        await_keys();
        ended = same(shared.stop[keys.stage]);
        if (ended) {
          leave_keys();
          if constexpr (C::ONE_PLACE) {
            const auto stopped = keys.before();
            if (CHECKED) barrier_wait(shared_address(&shared.v_full[stopped.stage]), stopped.parity, WAIT_LIMIT);
            release(shared.v_empty[stopped.stage]);
          }
        }
      }
      if (ended) {
        if (pending) store();  // a query block of one tile
        release_q();
        blocks.advance();
        if (!enter()) break;
      }
      await_keys();
      const bool v_ready = barrier_test(shared_address(&shared.v_full[values.stage]), values.parity);
      wgmma_fence();
      start_logits();
      if (pending) store();
      if (ended) {
        end_rows();
        begin_rows();
      }
      if (!v_ready) barrier_wait(shared_address(&shared.v_full[values.stage]), values.parity, WAIT_LIMIT);
      wgmma_fence();
      start_output(first);
      release_q();
      wgmma_wait<1>();
      leave_keys();
      weigh_tile();
      k_ready = barrier_test(shared_address(&shared.k_full[keys.stage]), keys.parity);
      wgmma_wait<0>();
      release(shared.v_empty[values.stage]);
      if constexpr (C::ONE_PLACE)
        values = keys.before();
      else
        values.advance();
      to_operand<T>(weights, s_rows);
      first = pending = ended;
    }

    // The last one's output.
    end_rows();
    barrier_wait(shared_address(&shared.v_full[values.stage]), values.parity, WAIT_LIMIT);
    wgmma_fence();
    start_output(first);
    wgmma_wait<0>();
    release(shared.v_empty[values.stage]);
    store();
    release_q();
  }
  if (consumer == 0) take_turn();
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) hopper_forward_kernel(const __grid_constant__ HopperForwardParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // other architectures get an empty kernel, which nobody launches
  extern __shared__ __align__(SWIZZLE_BYTES) unsigned char hopper_shared[];
  auto& shared = *reinterpret_cast<HopperForwardShared<C>*>(hopper_shared);
  const Shape& shape = p.forward.shape;
  const int works = shape.batch * shape.heads * ceil_div(shape.queries, C::BLOCK_M);
  const int role = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);  // NOTE: so that the compiler knows it to be uniform

  if (threadIdx.x == 0) {
    for (int i = 0; i < C::Q_STAGES; i++) {
      barrier_init(shared_address(&shared.q_full[i]), 1);
      barrier_init(shared_address(&shared.q_empty[i]), 4 * C::CONSUMERS * WARP_ARRIVALS);
    }
    for (int i = 0; i < C::STAGES; i++) {
      barrier_init(shared_address(&shared.k_full[i]), 1);
      barrier_init(shared_address(&shared.k_empty[i]), 4 * C::CONSUMERS * WARP_ARRIVALS);
      barrier_init(shared_address(&shared.v_full[i]), 1);
      barrier_init(shared_address(&shared.v_empty[i]), 4 * C::CONSUMERS * WARP_ARRIVALS);
    }
    fence_barrier_init();
  }
  if (threadIdx.x < 4 * C::CONSUMERS) shared.used_up[threadIdx.x] = 0;
  __syncthreads();

  if (role == C::CONSUMERS) {
    registers_decrease<C::LOADER_REGISTERS>();
    if (threadIdx.x < C::CONSUMERS * 128 + 32) load_tiles(p, shared, works, threadIdx.x % 32);
  } else {
    registers_increase<C::CONSUMER_REGISTERS>();
    attend(p, shared, works, role);
  }
#endif
}

}  // namespace sbk
