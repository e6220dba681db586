// As much of CUDA as csrc/ uses, for a C++ compiler: a thread block is a set of threads that meet at barriers. It shows
// whether indices, sums and their order are right; nothing about speed or memory ordering. One block at a time.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
using std::max;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

struct Block {
  explicit Block(int threads, size_t shared_bytes)
      : shared(shared_bytes / sizeof(float) + 1, NAN), all(threads), lanes(threads) {
    for (int warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
  std::vector<float> shared;  // not a number until written
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<float> lanes;
};
inline Block* block;

inline void __syncthreads() { block->all.arrive_and_wait(); }
inline float shuffle(float value, unsigned source_lane) {
  const unsigned warp = threadIdx.x / 32;
  block->lanes[threadIdx.x] = value;
  block->warps[warp]->arrive_and_wait();
  const float read = source_lane < 32 ? block->lanes[warp * 32 + source_lane] : value;
  block->warps[warp]->arrive_and_wait();
  return read;
}
inline float __shfl_xor_sync(unsigned, float value, int offset) { return shuffle(value, threadIdx.x % 32 ^ offset); }
inline float __shfl_down_sync(unsigned, float value, int offset) { return shuffle(value, threadIdx.x % 32 + offset); }

inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float a) { return std::exp(a); }
inline float __fdividef(float a, float b) { return a / b; }
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

template <typename Kernel>
void launch_on_cpu(dim3 grid, int threads, size_t shared_bytes, cudaStream_t, Kernel kernel) {
  gridDim = grid;
  blockDim = dim3(threads);
  Block present(threads, shared_bytes);
  block = &present;
  std::vector<std::jthread> running;
  for (int t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      threadIdx = dim3(t);
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y);
          if (t == 0) std::fill(present.shared.begin(), present.shared.end(), NAN);
          __syncthreads();
          kernel();
          __syncthreads();
        }
    });
}
