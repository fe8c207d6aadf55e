// The machine of emulator.h.
#include "machine.h"

#include <sys/mman.h>

#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr int SHARED_BYTES = 256 << 10, SHARED_ALIGNMENT = 1024;

jmp_buf scheduler;
Lane* self = nullptr;
std::mt19937 random_numbers;
int eagerness = 50;  // percent of what is asynchronous that happens at once
std::vector<std::function<bool()>> engine;
uint64_t progress = 0;
std::string error;
const std::function<void()>* kernel = nullptr;
std::vector<void*> stacks;  // free ones
std::vector<unsigned char*> memories;
unsigned char* in_memory = nullptr;

// NOTE: not swapcontext, which is a system call.
void leave() {
  if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
}

void run_lane() {
  (*kernel)();
  self->ended = true;
  progress++;
  leave();
}

void* new_stack() {
  void* made = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) throw std::bad_alloc();
  return made;
}
// The last of those that are free, or a new one.
template <typename X, typename Make> X take(std::vector<X>& free, Make make) {
  if (free.empty()) return make();
  const X last = free.back();
  free.pop_back();
  return last;
}

std::unique_ptr<Block> make_block(int index, int threads) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->threads = threads;
  block->shared = take(memories, [] { return (unsigned char*)aligned_alloc(SHARED_ALIGNMENT, SHARED_BYTES); });
  for (int i = 0; i < SHARED_BYTES; i += 4) *(uint32_t*)(block->shared + i) = 0x7fffffff;  // NaN, in 16 bits too
  block->warpgroups.resize((threads + 127) / 128);
  for (int w = 0; w < threads / 32; w++) {
    block->warps.push_back(std::make_unique<Warp>());
    Warp& warp = *block->warps.back();
    warp.block = block.get();
    warp.number = w;
    for (unsigned i = 0; i < 32; i++) {
      Lane& lane = warp.lanes[i];
      lane.warp = &warp;
      lane.number = i;
      lane.stack = take(stacks, new_stack);
      getcontext(&lane.context);
      lane.context.uc_stack = {lane.stack, 0, STACK_BYTES};
      lane.context.uc_link = nullptr;
      makecontext(&lane.context, run_lane, 0);
    }
  }
  return block;
}
void give_back(const Block& block) {
  for (const auto& warp : block.warps)
    for (const Lane& lane : warp->lanes) stacks.push_back(lane.stack);
  memories.push_back(block.shared);
}
bool has_ended(const Block& block) {
  for (const auto& warp : block.warps)
    for (const Lane& lane : warp->lanes)
      if (!lane.ended) return false;
  return true;
}

// Each lane of a warp once, those that wait for others of it only when all have come; whether there is more to do.
bool run(Warp& warp) {
  bool left = false;
  for (Lane& lane : warp.lanes) {
    if (lane.ended) continue;
    left = true;
    if (lane.together && lane.generation == warp.generation) continue;
    lane.together = false;
    self = &lane;
    if (_setjmp(scheduler) == 0) {
      if (lane.started) _longjmp(lane.at, 1);
      lane.started = true;
      setcontext(&lane.context);
    }
    if (!error.empty()) return false;
  }
  return left;
}

void step_engine() {
  const size_t i = draw(engine.size());
  auto step = std::move(engine[i]);
  engine.erase(engine.begin() + i);
  if (!step()) engine.push_back(std::move(step));
  progress++;
}

std::string who_waits(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string all;
  for (const auto& block : blocks)
    for (const auto& warp : block->warps) {
      const Lane& lane = warp->lanes[0];
      if (lane.ended) continue;
      all += "\n  block " + std::to_string(block->index) + " warp " + std::to_string(warp->number) + ": ";
      all += lane.together ? std::string(warp->what) + ", " + std::to_string(warp->come) + " lanes there" : lane.waits_for ? lane.waits_for
             : lane.barrier < 0 ? "a flag in global memory" : "mbarrier at " + std::to_string(lane.barrier) + ", parity " + std::to_string(lane.parity);
    }
  return all;
}

}  // namespace

Place thread() { return {self->warp->number * 32 + self->number}; }
Place block() { return {self->warp->block->index}; }
unsigned lane() { return self->number; }
int warp_in_group() { return self->warp->number % 4; }
unsigned char* shared() { return in_memory ? in_memory : self->warp->block->shared; }
InMemory::InMemory(unsigned char* memory) { in_memory = memory; }
InMemory::~InMemory() { in_memory = nullptr; }
int threads_of_block() { return self->warp->block->threads; }
unsigned draw(unsigned end) { return random_numbers() % end; }
void note_progress() { progress++; }

void refuse(const char* what) {
  error = std::string(what) + " (block " + std::to_string(self->warp->block->index) + ", warp " + std::to_string(self->warp->number) + ", lane " +
          std::to_string(self->number) + ")";
  for (;;) leave();
}

void pass(int barrier, int parity) {
  self->barrier = barrier;
  self->parity = parity;
  leave();
}

void wait_until(const char* what, const std::function<bool()>& done) {
  self->waits_for = what;
  while (!done()) leave();
  self->waits_for = nullptr;
}

void together(const char* what, const void* mine, const std::function<void(const void* const (&)[32])>& act) {
  Warp& warp = *self->warp;
  if (warp.come == 0) warp.what = what;
  if (strcmp(warp.what, what) != 0) refuse((std::string("lanes of a warp part: some are at ") + warp.what + ", this one at " + what).c_str());
  warp.addresses[self->number] = mine;
  if (++warp.come == 32) {
    act(warp.addresses);
    warp.come = 0;
    warp.generation++;
    progress++;
    return;
  }
  self->together = true;
  self->generation = warp.generation;
  leave();
}

void later(std::function<bool()> step) {
  if ((int)draw(100) < eagerness && step()) {
    progress++;
    return;
  }
  engine.push_back(std::move(step));
}

bool named_barrier(int id, int threads, bool wait, bool vote) {
  NamedBarrier& barrier = self->warp->block->barriers[id];
  const unsigned mine = barrier.generation;
  barrier.all &= vote;
  if (++barrier.come > threads) refuse("more threads at a hardware barrier than it is for");
  if (barrier.come == threads) {
    barrier.result = barrier.all;
    barrier.come = 0;
    barrier.all = true;
    barrier.generation++;
    progress++;
  } else if (wait) {
    wait_until("a hardware barrier", [&] { return barrier.generation != mine; });
  }
  return barrier.result;
}

void add_product(uint64_t operands, std::function<void()> part) {
  Warp& warp = *self->warp;
  Warpgroup& all = warp.block->warpgroups[warp.number / 4];
  const int i = warp.products++ - all.done;
  if (i == (int)all.products.size()) all.products.push_back({warp.groups, operands, {}});
  Product& product = all.products[i];
  if (product.group != warp.groups || product.operands != operands) refuse("warps of a warpgroup part: another one has begun another product here");
  product.parts.push_back(std::move(part));
  if (product.parts.size() < 4) return;
  later([&all] {  // in their order, whichever this is
    for (const auto& part : all.products.front().parts) part();
    all.products.pop_front();
    all.done++;
    return true;
  });
}
void commit_products() { self->warp->groups++; }
void wait_for_products(int pending) {
  Warp& warp = *self->warp;
  const Warpgroup& all = warp.block->warpgroups[warp.number / 4];
  const int last = warp.groups - pending - 1;
  wait_until("products of a warpgroup", [&] { return all.products.empty() || all.products.front().group > last; });
}

void add_bulk(std::function<void()> read, std::function<void()> write) {
  auto state = std::make_shared<Bulk>();
  self->open.push_back(state);
  later([=] {
    if (state->read) {
      write();
      state->written = true;
      return true;
    }
    read();
    state->read = true;
    return false;
  });
}
void commit_bulk() {
  self->bulks.push_back(std::move(self->open));
  self->open.clear();
}
void wait_for_bulk(int pending, bool only_read) {
  Lane& lane = *self;
  wait_until(only_read ? "bulk copies to have read" : "bulk copies", [&] {
    for (size_t i = 0; i + pending < lane.bulks.size(); i++)
      for (const auto& bulk : lane.bulks[i])
        if (!(only_read ? bulk->read : bulk->written)) return false;
    return true;
  });
  while (!only_read && lane.bulks.size() > (size_t)pending) lane.bulks.pop_front();
}

void run_grid(const std::function<void()>& given, int grid, int threads, int at_once) {
  kernel = &given;
  error.clear();
  engine.clear();
  std::vector<std::unique_ptr<Block>> blocks;
  uint64_t seen = progress;
  for (int next = 0, idle = 0; next < grid || !blocks.empty();) {
    while (next < grid && (int)blocks.size() < at_once) blocks.push_back(make_block(next++, threads));

    // Somebody for a while, and what the hardware has to do.
    const size_t b = draw(blocks.size());
    Block& block = *blocks[b];
    Warp& warp = *block.warps[draw(block.warps.size())];
    for (int turns = 1 + draw(30); turns > 0; turns--) {
      const uint64_t before = progress;
      if (!run(warp) || progress == before) break;
    }
    while (error.empty() && !engine.empty() && (int)draw(100) < eagerness) step_engine();

    // Nobody has got on for as long as it takes to try everybody.
    const int sweep = (1 + blocks.size()) * (threads / 32);
    idle = progress == seen ? idle + 1 : 0;
    if (idle % (2 * sweep) == 2 * sweep - 1 && !engine.empty()) step_engine();
    if (idle > 200 * sweep) error = "nobody can go on" + who_waits(blocks);
    seen = progress;

    const bool over = has_ended(block);
    for (const Warpgroup& group : block.warpgroups)
      if (over && !group.products.empty()) error = "a warpgroup ends with products under way";
    if (!error.empty()) {
      for (const auto& each : blocks) give_back(*each);
      throw std::runtime_error("emulator: " + error);
    }
    if (over) {
      give_back(block);
      blocks.erase(blocks.begin() + b);
    }
  }
  while (!engine.empty()) step_engine();
}

void schedule(unsigned seed, int given) {
  random_numbers.seed(seed);
  eagerness = given;
}

}  // namespace emulator
