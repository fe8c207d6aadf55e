// What the machine of emulator.h consists of: blocks of warps of lanes, and what is under way for them.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>

#include "emulator.h"

namespace emulator {

struct Warp;
struct Lane {
  ucontext_t context;  // where it starts
  jmp_buf at;          // where it goes on
  bool started = false;
  void* stack = nullptr;
  Warp* warp = nullptr;
  unsigned number = 0;
  bool ended = false, together = false;  // together: waits for the rest of its warp, in `generation`
  unsigned generation = 0;
  const char* waits_for = nullptr;
  int barrier = 0, parity = 0;  // that it tried last
  std::vector<std::shared_ptr<Bulk>> open;
  std::deque<std::vector<std::shared_ptr<Bulk>>> bulks;
};

struct Block;
struct Warp {
  Block* block;
  int number;
  Lane lanes[32];
  // The collective that lanes are coming to.
  const char* what = nullptr;
  const void* addresses[32];
  int come = 0;
  unsigned generation = 0;
  int products = 0, groups = 0;  // that it has come to
};

struct Product {
  int group;
  uint64_t operands;
  std::vector<std::function<void()>> parts;
};
struct Warpgroup {
  std::deque<Product> products;  // under way
  int done = 0;                  // of all
};

struct NamedBarrier {
  int come = 0;
  unsigned generation = 0;
  bool all = true, result = true;
};

struct Block {
  unsigned index;
  int threads;
  unsigned char* shared;
  std::vector<std::unique_ptr<Warp>> warps;
  NamedBarrier barriers[16];
  std::vector<Warpgroup> warpgroups;
};

}  // namespace emulator
