#include "cuda/shim/shim.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace memos::shim {

dim3 thread_index, block_index, block_size, grid_size;
char* shared;

namespace {

constexpr std::size_t kStackBytes = 256 << 10;  // ASan's frames are large

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "shim: block %u, thread %u: %s\n", block_index.x, thread_index.x, what);
  std::abort();
}

std::uint64_t random_state = 1;

std::uint64_t random_bits() {  // SplitMix64
  std::uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// One stack and where it stopped. swapcontext() would do, but it enters the kernel twice.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void memos_shim_switch(void** from, void* to);
asm(R"(
.text
.type memos_shim_switch, @function
memos_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size memos_shim_switch, .-memos_shim_switch
)");
void make_context(Context& context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-2] = reinterpret_cast<void*>(entry);  // returned to; the stack is aligned as after a call
  context.stack_pointer = top - 8;           // six registers below it
}
void switch_context(Context& from, Context& to) {
  memos_shim_switch(&from.stack_pointer, to.stack_pointer);
}
#else
struct Context {
  ucontext_t context;
};
void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  State state = State::kDone;
  void* fake_stack = nullptr;  // ASan's
};

struct Warp {
  unsigned live = 0, waiting = 0;
  std::uint32_t values[32];
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned> ready;
Context scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
unsigned current, live, waiting;
const std::function<void()>* body;

void to_scheduler(bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fibers[current]->fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  (void)for_good;
  switch_context(fibers[current]->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibers[current]->fake_stack, nullptr, nullptr);
#endif
}

void release(State state, unsigned first, unsigned last) {
  for (unsigned i = first; i < last; ++i)
    if (fibers[i]->state == state) {
      fibers[i]->state = State::kReady;
      ready.push_back(i);
    }
}

void release_full_barriers(unsigned warp) {
  const unsigned threads = block_size.x;
  if (warps[warp].live && warps[warp].waiting == warps[warp].live) {
    warps[warp].waiting = 0;
    release(State::kAtWarpBarrier, 32 * warp, 32 * warp + 32 < threads ? 32 * warp + 32 : threads);
  }
  if (live && waiting == live) {
    waiting = 0;
    release(State::kAtBlockBarrier, 0, threads);
  }
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  fibers[current]->state = State::kDone;
  --live;
  --warps[current / 32].live;
  to_scheduler(true);
  std::abort();
}

void run_block(std::size_t shared_bytes) {
  const unsigned threads = block_size.x;
  const std::unique_ptr<char[]> memory(new char[shared_bytes]);
  std::memset(memory.get(), 0xff, shared_bytes);
  shared = memory.get();
  warps.assign((threads + 31) / 32, Warp{});
  ready.clear();
  live = threads;
  waiting = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.index = dim3(i);
    fiber.state = State::kReady;
    ++warps[i / 32].live;
#if defined(__SANITIZE_ADDRESS__)  // of the frames that never returned
    __asan_unpoison_memory_region(fiber.stack.get() + kStackBytes - 4096, 4096);
#endif
    make_context(fiber.context, fiber.stack.get(), run_fiber);
    ready.push_back(i);
  }
  while (!ready.empty()) {
    const std::size_t pick = random_bits() % ready.size();
    current = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    thread_index = fibers[current]->index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fibers[current]->stack.get(),
                                   kStackBytes);
#endif
    switch_context(scheduler, fibers[current]->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    release_full_barriers(current / 32);
  }
  if (live) fail("threads wait at different barriers");
}

void wait(State state) {
  const unsigned self = current;
  fibers[self]->state = state;
  to_scheduler(false);
  current = self;
  thread_index = fibers[self]->index;
}

}  // namespace

void seed(std::uint64_t value) { random_state = value; }

void launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& run) {
  if (block.y * block.z * grid.y * grid.z != 1) fail("grids and blocks of one axis wanted");
  if (grid.x == 0 || block.x == 0 || block.x > 1024) fail("an empty or too large launch");
  while (fibers.size() < block.x) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new char[kStackBytes]);
  }
  block_size = block;
  grid_size = grid;
  body = &run;
  std::vector<unsigned> order(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
  for (unsigned i = grid.x - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);
  for (const unsigned i : order) {
    block_index = dim3(i);
    run_block(shared_bytes);
  }
}

void wait_for_block() {
  ++waiting;
  wait(State::kAtBlockBarrier);
}

void wait_for_warp() {
  ++warps[current / 32].waiting;
  wait(State::kAtWarpBarrier);
}

std::uint32_t exchange(std::uint32_t value, unsigned from) {
  const unsigned warp = current / 32;
  warps[warp].values[current % 32] = value;
  wait_for_warp();
  if (fibers[32 * warp + from]->state == State::kDone) fail("a shuffle from a thread that ended");
  const std::uint32_t result = warps[warp].values[from];
  wait_for_warp();
  return result;
}

std::uint64_t nanoseconds() {
  static std::uint64_t now = 0;
  return now += 1000;
}

}  // namespace memos::shim
