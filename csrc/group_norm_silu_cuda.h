// Shared by the kernels of group_norm_silu_cuda.cu: vectors of channels, the place of a thread, per-channel numbers.
//
// A vector is 4 channels in every dtype. With 8 channels of 16 bits the per-channel numbers took 80 to 96 registers, so
// an SM had room for only two blocks, 512 threads: too few to hide the memory latency of an H100. With 4 channels a
// kernel takes at most 64 registers, an SM has room for four blocks, and each thread has 64 bytes in flight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "group_norm_silu.h"

namespace alignprop_fast {
namespace {

using Params = GroupNormSiluParams;
constexpr int kVector = 4;
constexpr int kMaxThreads = 1024;   // 4096 channels in vectors of 4; SDXL has 2560 at most
constexpr int kBlockThreads = 256;  // the target where a row needs fewer threads

// Vectors in flight per thread.
template <typename T>
constexpr int kLoads = 64 / (kVector * sizeof(T));

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
// From sm_90 on __bfloat162float is an instruction that the compiler moves up to the load, which doubles the registers.
__device__ float to_float(__nv_bfloat16 v) { return __uint_as_float(unsigned(__bfloat16_as_ushort(v)) << 16); }
__device__ void from_float(float v, float& to) { to = v; }
__device__ void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T v[V];
};

template <typename T, int V>
__device__ void store(T* to, const Vec<T, V>& values) {
  *reinterpret_cast<Vec<T, V>*>(to) = values;
}

// The fast intrinsics are off by about 2 units in the last place of fp32: small beside 16-bit rounding, too much in
// fp32.
template <typename T>
__device__ float sigmoid(float z) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-z));
  return 1.0f / (1.0f + expf(-z));
}

template <typename T>
__device__ float activation_gradient(float g, float z, bool silu) {
  if (!silu) return g;
  const float s = sigmoid<T>(z);
  return g * s * (1.0f + z * (1.0f - s));
}

__device__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// first_row of group_norm_silu.h in 32 bits: k rows / chunks = k (rows / chunks) + k (rows mod chunks) / chunks.
struct Chunks {
  int chunks, quotient, remainder;

  __device__ explicit Chunks(const Params& p)
      : chunks(int(p.chunks)), quotient(int(p.rows) / chunks), remainder(int(p.rows) - quotient * chunks) {}

  __device__ int first_row(int k) const { return k * quotient + k * remainder / chunks; }
  __device__ int rows(int k) const { return first_row(k + 1) - first_row(k); }
};

// Where this thread works: channels [channel, channel + V), rows slot, slot + R, ... of the chunk.
template <int V>
struct Place {
  int C, D, R, slot, channel, rows;
  bool active;
  int64_t image, chunk, offset;  // offset: of the chunk's first row, at `channel`

  __device__ Place(const Params& p, int64_t image_index, int64_t chunk_index) {
    C = int(p.channels);
    D = C / int(p.groups);
    const int lanes = C / V;
    R = max(1, kBlockThreads / lanes);
    slot = int(threadIdx.x) / lanes;
    channel = (int(threadIdx.x) - slot * lanes) * V;
    active = slot < R;
    image = image_index;
    chunk = chunk_index;
    const Chunks chunks(p);
    rows = chunks.rows(int(chunk));
    offset = (image * p.rows + chunks.first_row(int(chunk))) * C + channel;
  }

  // Where the last batch of N rows begins, for a walk backwards.
  template <int N>
  __device__ int last_batch() const {
    return slot + (rows - 1 - slot) / (R * N) * (R * N);
  }

  // Row u of a batch, if there is one.
  __device__ bool has(int row, int u) const { return row + u * R < rows; }

  template <typename T, int N>
  __device__ void load(Vec<T, V> (&batch)[N], const T* from, int row) const {
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (has(row, u)) batch[u] = *reinterpret_cast<const Vec<T, V>*>(from + (row + u * R) * C);
  }
};

// Per channel: z = (x - centre) scale + shift.
template <typename T, int V>
struct Affine {
  float centre[V], scale[V], shift[V];

  __device__ Affine(const Params& p, const Place<V>& at) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int c = at.channel + i;
      const int64_t group = at.image * p.groups + c / at.D;
      const float t = p.t == nullptr ? 0.0f : to_float(static_cast<const T*>(p.t)[at.image * at.C + c]);
      centre[i] = p.mean[group] - t;
      scale[i] = p.rstd[group] * to_float(static_cast<const T*>(p.gamma)[c]);
      shift[i] = to_float(static_cast<const T*>(p.beta)[c]);
    }
  }
};

}  // namespace
}  // namespace alignprop_fast
