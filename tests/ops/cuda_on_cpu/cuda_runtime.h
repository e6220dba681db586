// As much of CUDA as csrc/ uses, for a C++ compiler. Blocks run one after another, the threads of a block are fibers of
// one thread: each runs until it ends or waits at a barrier or a shuffle. Nothing is concurrent, so every fault shows
// each time. It says nothing about speed. A launch fails, with a word of why, if
//   - some threads wait at a barrier, or lanes of a mask at a shuffle, that others do not reach;
//   - a thread touches memory that is not there (the test ends its buffers at the end of a page) or, compiled with
//     -fsanitize=undefined -fsanitize-undefined-trap-on-error, at an address of the wrong alignment for its type;
//   - it asks for more threads, blocks or shared memory than a GPU has.
// Races show as other results in another `order`: blocks and, between two barriers, threads run forwards, backwards or
// shuffled. Shared memory is not a number until written.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __syncthreads() cuda_on_cpu::wait_for_block(__LINE__)
#define __shfl_xor_sync(mask, value, offset) \
  cuda_on_cpu::shuffle(__LINE__, mask, value, int(threadIdx.x % 32) ^ (offset))
#define __shfl_down_sync(mask, value, offset) \
  cuda_on_cpu::shuffle(__LINE__, mask, value, int(threadIdx.x % 32) + (offset))
using std::max;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

enum class Order { forwards, backwards, shuffled };
enum class State { ready, at_barrier, at_shuffle, ended };

struct Thread {
  ucontext_t start;
  jmp_buf context;
  bool started = false;
  State state = State::ready;
  int line;              // of the barrier or shuffle it waits at
  unsigned mask;         // of a shuffle
  int source;            // the lane it reads
  float value, received;
};

constexpr size_t kStackBytes = 64 * 1024, kSharedLimitBytes = 48 * 1024;
inline Order order = Order::forwards;
inline char failure[256];  // of a launch since the last cudaGetLastError; empty: none
inline std::vector<Thread> threads;
inline int running;
inline jmp_buf scheduler;
inline sigjmp_buf after_fault;
inline std::function<void()> kernel;
inline char* shared_memory;  // ends where the memory does

template <typename... Values>
void fail(const char* format, Values... values) {
  const int n = std::snprintf(failure, sizeof failure, "block (%u, %u): ", blockIdx.x, blockIdx.y);
  std::snprintf(failure + n, sizeof failure - n, format, values...);
}

// From a thread back to the scheduler.
[[gnu::noinline]] inline void leave(State state) {
  Thread& me = threads[running];
  me.state = state;
  if (!_setjmp(me.context)) _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(int t) {
  running = t;
  threadIdx = dim3(t);
  Thread& next = threads[t];
  if (_setjmp(scheduler)) return;
  if (next.started) _longjmp(next.context, 1);
  next.started = true;
  setcontext(&next.start);
}

inline void thread_main() {
  for (;;) {  // a fiber serves every block of the launch
    kernel();
    leave(State::ended);
  }
}

inline void wait_for_block(int line) {
  threads[running].line = line;
  leave(State::at_barrier);
}

inline float shuffle(int line, unsigned mask, float value, int source) {
  Thread& me = threads[running];
  const int lane = running % 32;
  me.line = line;
  me.mask = mask;
  me.value = value;
  me.source = source < 32 ? source : lane;
  if (!(mask >> lane & 1) || !(mask >> me.source & 1))
    fail("lane %d reads lane %d at a shuffle in line %d, whose mask 0x%x lacks one", lane, me.source, line, mask);
  leave(State::at_shuffle);
  return threads[running].received;
}

// Whether all lanes of this one's mask wait at its shuffle; if so they go on.
inline bool release_shuffle(int t) {
  const Thread first = threads[t];
  const int warp = t / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    if (warp + lane >= int(threads.size())) return false;
    const Thread& other = threads[warp + lane];
    if (other.state != State::at_shuffle || other.line != first.line || other.mask != first.mask) return false;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (first.mask >> lane & 1) {
      Thread& other = threads[warp + lane];
      other.received = threads[warp + other.source].value;
      other.state = State::ready;
    }
  return true;
}

inline bool release_barrier() {
  for (const Thread& t : threads)
    if (t.state != State::at_barrier || t.line != threads[0].line) return false;
  for (Thread& t : threads) t.state = State::ready;
  return true;
}

inline void fail_as_stuck() {
  int first = 0;
  while (threads[first].state == State::ended) ++first;
  int together = 0, ended = 0;
  for (const Thread& t : threads) {
    ended += t.state == State::ended;
    together += t.state == threads[first].state && t.line == threads[first].line;
  }
  fail("%d of %zu threads wait at the %s in line %d for others; %d have ended", together, threads.size(),
       threads[first].state == State::at_barrier ? "barrier" : "shuffle", threads[first].line, ended);
}

inline void run_block(const std::vector<int>& in_order) {
  for (Thread& t : threads) t.state = State::ready;
  for (;;) {
    for (int t : in_order) {
      if (threads[t].state == State::ready) resume(t);
      if (*failure) return;
    }
    bool all_ended = true, released = release_barrier();
    for (int t = 0; t < int(threads.size()); ++t) {
      all_ended &= threads[t].state == State::ended;
      if (threads[t].state == State::at_shuffle) released |= release_shuffle(t);
    }
    if (all_ended) return;
    if (!released) return fail_as_stuck();
  }
}

inline std::vector<int> ordered(int n) {
  std::vector<int> indices(n);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::backwards) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), std::mt19937(n));
  return indices;
}

inline void on_fault(int signal, siginfo_t* info, void*) {
  if (signal == SIGSEGV || signal == SIGBUS)
    fail("thread %d touches %p, outside of every buffer", running, info->si_addr);
  else
    fail("thread %d does what C++ leaves undefined: a misaligned access, an overflow or an index too large", running);
  siglongjmp(after_fault, 1);
}

// Memory between two pages that cannot be touched.
struct Pages {
  size_t page = sysconf(_SC_PAGESIZE), bytes;
  char* begin;
  explicit Pages(size_t wanted) : bytes((wanted + page - 1) / page * page) {
    begin = static_cast<char*>(mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) + page;
    mprotect(begin, bytes, PROT_READ | PROT_WRITE);
  }
  ~Pages() { munmap(begin - page, bytes + 2 * page); }
};

// Faults of the launch are caught: memory and arithmetic, on a stack of their own.
struct Faults {
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction before[5];
  stack_t stack_before;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Faults() {
    const stack_t ours{stack.data(), 0, stack.size()};
    sigaltstack(&ours, &stack_before);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &action, &before[i]);
  }
  ~Faults() {
    for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// kernel<<<grid, block, shared_bytes, stream>>>(p), with the kernel's launch bound.
inline void launch(unsigned bound, dim3 grid, unsigned block, size_t shared_bytes, void*, std::function<void()> run) {
  blockIdx = dim3(0, 0);
  if (*failure) return;
  if (block < 1 || block > bound || block > 1024 || grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 ||
      grid.y > 65535 || shared_bytes > kSharedLimitBytes)
    return fail("(%u, %u) blocks of %u threads with %zu bytes cannot be launched", grid.x, grid.y, block, shared_bytes);
  gridDim = grid;
  blockDim = dim3(block);
  kernel = std::move(run);
  const Pages stacks(block * kStackBytes), shared(shared_bytes);
  shared_memory = shared.begin + shared.bytes - (shared_bytes + 15) / 16 * 16;
  threads = std::vector<Thread>(block);
  for (unsigned t = 0; t < block; ++t) {
    getcontext(&threads[t].start);
    threads[t].start.uc_stack = {stacks.begin + t * kStackBytes, 0, kStackBytes};
    makecontext(&threads[t].start, thread_main, 0);
  }
  const std::vector<int> xs = ordered(grid.x), ys = ordered(grid.y), in_order = ordered(block);
  const Faults faults;
  if (sigsetjmp(after_fault, 1)) return;
  for (int y : ys)
    for (int x : xs) {
      blockIdx = dim3(x, y);
      std::memset(shared.begin, 0xff, shared.bytes);
      run_block(in_order);
      if (*failure) return;
    }
}

// Off by as much as the CUDA programming guide lets the fast intrinsics be, up or down by the last bit.
inline float off_by(float value, int units) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  if (!std::isfinite(value) || (bits & 0x7fffffff) < units) return value;
  bits += bits & 1 ? units : -units;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace cuda_on_cpu

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float a) {
  return cuda_on_cpu::off_by(std::exp(a), std::isfinite(a) ? 2 + int(std::fabs(1.173f * a)) : 0);
}
inline float __fdividef(float a, float b) {
  return std::fabs(b) > 0x1p126f ? 0.0f * a : cuda_on_cpu::off_by(a / b, 2);
}
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return *cuda_on_cpu::failure != 0; }
inline const char* cudaGetErrorString(cudaError_t) {
  static char text[sizeof cuda_on_cpu::failure];
  std::strcpy(text, cuda_on_cpu::failure);
  *cuda_on_cpu::failure = 0;
  return text;
}
inline cudaError_t cudaGetDeviceCount(int*) { return cudaSuccess; }
