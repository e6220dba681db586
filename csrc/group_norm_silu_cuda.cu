// CUDA version of group_norm_silu.h. A block owns one chunk of rows of one image and all channels; a thread owns V
// neighbouring channels (16 bytes) and every R-th row. Per-channel results meet in shared memory, groups are summed by
// one warp each, chunks by one warp in a launch of their own: the order of every sum is fixed, there are no atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "group_norm_silu.h"

namespace alignprop_fast {
namespace {

using Params = GroupNormSiluParams;
constexpr int kMaxThreads = 640;    // fp32 rows of 2560 channels, the widest of SDXL, in vectors of 4
constexpr int kBlockThreads = 256;  // aimed at where a row is narrower
constexpr int kUnroll = 4;          // loads in flight per thread

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ void from_float(float v, float& to) { to = v; }
__device__ void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T v[V];
};

template <typename T, int V>
__device__ Vec<T, V> load(const T* from) {
  return *reinterpret_cast<const Vec<T, V>*>(from);
}

// The fast intrinsics err by some 2 units in the last place of fp32: nothing beside 16-bit rounding, too much in fp32.
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

// Where this thread works: channels [channel, channel + V), rows from `row` in steps of R.
template <int V>
struct Place {
  int lanes, R, slot, channel;
  bool active;
  int64_t image, chunk, begin, end, offset;

  __device__ Place(const Params& p, int64_t chunk_index) {
    lanes = int(p.channels) / V;
    R = max(1, kBlockThreads / lanes);
    slot = int(threadIdx.x) / lanes;
    channel = (int(threadIdx.x) - slot * lanes) * V;
    active = slot < R;
    image = blockIdx.y;
    chunk = chunk_index;
    begin = first_row(p.rows, p.chunks, chunk);
    end = first_row(p.rows, p.chunks, chunk + 1);
    offset = image * p.rows * p.channels + channel;
  }
};

// Per channel: z = (x - centre) scale + shift.
template <typename T, int V>
struct Affine {
  float centre[V], scale[V], shift[V];

  __device__ Affine(const Params& p, int64_t image, int channel) {
    const int D = int(p.channels / p.groups);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int c = channel + i;
      const int64_t group = image * p.groups + c / D;
      const float t = p.t == nullptr ? 0.0f : to_float(static_cast<const T*>(p.t)[image * p.channels + c]);
      centre[i] = p.mean[group] - t;
      scale[i] = p.rstd[group] * to_float(static_cast<const T*>(p.gamma)[c]);
      shift[i] = to_float(static_cast<const T*>(p.beta)[c]);
    }
  }
};

// Mean and squared deviations per channel by Welford's method, then per group of the chunk.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) statistics_kernel(const Params p) {
  extern __shared__ float shared[];
  const Place<V> at(p, blockIdx.x);
  const int C = int(p.channels), D = C / int(p.groups), rows = int(at.end - at.begin);
  float *means = shared, *squares = shared + at.R * C;
  if (at.active) {
    const T* x = static_cast<const T*>(p.x) + at.offset;
    float mean[V] = {}, square[V] = {};
    float n = 0.0f;
    for (int64_t row = at.begin + at.slot; row < at.end; row += at.R * kUnroll) {
      Vec<T, V> in[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (row + u * at.R < at.end) in[u] = load<T, V>(x + (row + u * at.R) * C);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (row + u * at.R < at.end) {
          n += 1.0f;
          const float share = __frcp_rn(n);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float value = to_float(in[u].v[i]), delta = value - mean[i];
            mean[i] += delta * share;
            square[i] += delta * (value - mean[i]);
          }
        }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      means[at.slot * C + at.channel + i] = mean[i];
      squares[at.slot * C + at.channel + i] = square[i];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    float seen = 0.0f, mean = 0.0f, square = 0.0f;
    for (int r = 0; r < at.R && r < rows; ++r) {
      const float n = float((rows - r + at.R - 1) / at.R), delta = means[r * C + c] - mean, share = n / (seen + n);
      mean += delta * share;
      square += squares[r * C + c] + delta * delta * seen * share;
      seen += n;
    }
    means[c] = mean + (p.t == nullptr ? 0.0f : to_float(static_cast<const T*>(p.t)[at.image * C + c]));
    squares[c] = square;
  }
  __syncthreads();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int group = warp; group < int(p.groups); group += int(blockDim.x) / 32) {
    float mean = 0.0f, square = 0.0f;
    for (int d = lane; d < D; d += 32) mean += means[group * D + d];
    mean = warp_sum(mean) / float(D);
    for (int d = lane; d < D; d += 32) {
      const float delta = means[group * D + d] - mean;
      square += squares[group * D + d] + float(rows) * delta * delta;
    }
    square = warp_sum(square);
    if (lane == 0) {
      float2* partial = reinterpret_cast<float2*>(p.partial);
      partial[(at.image * p.groups + group) * p.chunks + at.chunk] = make_float2(mean, square);
    }
  }
}

// Joins (n, mean, squares) of two sets; either may be empty.
__device__ void join(float& n, float& mean, float& square, float n2, float mean2, float square2) {
  const float total = n + n2, share = total > 0.0f ? n2 / total : 0.0f, delta = mean2 - mean;
  mean += delta * share;
  square += square2 + delta * delta * n * share;
  n = total;
}

// One warp per image and group.
__global__ void __launch_bounds__(32) join_statistics_kernel(const Params p) {
  const float2* partial = reinterpret_cast<const float2*>(p.partial) + blockIdx.x * p.chunks;
  const int64_t D = p.channels / p.groups;
  float n = 0.0f, mean = 0.0f, square = 0.0f;
  for (int64_t k = threadIdx.x; k < p.chunks; k += 32) {
    const int64_t rows = first_row(p.rows, p.chunks, k + 1) - first_row(p.rows, p.chunks, k);
    join(n, mean, square, float(D * rows), partial[k].x, partial[k].y);
  }
  // Towards lane 0 alone: joining is not symmetric in its rounding.
  for (int offset = 16; offset > 0; offset /= 2)
    join(n, mean, square, __shfl_down_sync(~0u, n, offset), __shfl_down_sync(~0u, mean, offset),
         __shfl_down_sync(~0u, square, offset));
  if (threadIdx.x == 0) {
    p.mean[blockIdx.x] = mean;
    p.rstd[blockIdx.x] = 1.0f / sqrtf(square / n + p.eps);
  }
}

// From the last chunk to the first: what the statistics pass read last is still in the second-level cache.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) apply_kernel(const Params p) {
  const Place<V> at(p, p.chunks - 1 - blockIdx.x);
  if (!at.active) return;
  const int C = int(p.channels);
  const T* x = static_cast<const T*>(p.x) + at.offset;
  T* y = static_cast<T*>(p.out) + at.offset;
  const Affine<T, V> f(p, at.image, at.channel);
  for (int64_t row = at.begin + at.slot; row < at.end; row += at.R * kUnroll) {
    Vec<T, V> in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * at.R < at.end) in[u] = load<T, V>(x + (row + u * at.R) * C);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * at.R < at.end) {
        Vec<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float z = (to_float(in[u].v[i]) - f.centre[i]) * f.scale[i] + f.shift[i];
          from_float(p.silu ? z * sigmoid<T>(z) : z, out.v[i]);
        }
        *reinterpret_cast<Vec<T, V>*>(y + (row + u * at.R) * C) = out;
      }
  }
}

// Per group of the chunk: sums of gamma dz and gamma dz xhat.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) reduce_kernel(const Params p) {
  extern __shared__ float shared[];
  const Place<V> at(p, blockIdx.x);
  const int C = int(p.channels), D = C / int(p.groups);
  float *sums = shared, *sums_x = shared + at.R * C;
  if (at.active) {
    const T* x = static_cast<const T*>(p.x) + at.offset;
    const T* g = static_cast<const T*>(p.g) + at.offset;
    const Affine<T, V> f(p, at.image, at.channel);
    float sum[V] = {}, sum_x[V] = {};
    constexpr int kPairs = kUnroll / 2;
    for (int64_t row = at.begin + at.slot; row < at.end; row += at.R * kPairs) {
      Vec<T, V> in[kPairs], gradient[kPairs];
#pragma unroll
      for (int u = 0; u < kPairs; ++u)
        if (row + u * at.R < at.end) {
          in[u] = load<T, V>(x + (row + u * at.R) * C);
          gradient[u] = load<T, V>(g + (row + u * at.R) * C);
        }
#pragma unroll
      for (int u = 0; u < kPairs; ++u)
        if (row + u * at.R < at.end) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float d = to_float(in[u].v[i]) - f.centre[i];
            const float dz =
                activation_gradient<T>(to_float(gradient[u].v[i]), d * f.scale[i] + f.shift[i], p.silu);
            sum[i] += dz;
            sum_x[i] += dz * d;
          }
        }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[at.slot * C + at.channel + i] = sum[i];
      sums_x[at.slot * C + at.channel + i] = sum_x[i];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    const float gamma = to_float(static_cast<const T*>(p.gamma)[c]);
    float sum = 0.0f, sum_x = 0.0f;
    for (int r = 0; r < at.R; ++r) {
      sum += sums[r * C + c];
      sum_x += sums_x[r * C + c];
    }
    sums[c] = gamma * sum;
    sums_x[c] = gamma * sum_x;
  }
  __syncthreads();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int group = warp; group < int(p.groups); group += int(blockDim.x) / 32) {
    float sum = 0.0f, sum_x = 0.0f;
    for (int d = lane; d < D; d += 32) {
      sum += sums[group * D + d];
      sum_x += sums_x[group * D + d];
    }
    sum = warp_sum(sum);
    sum_x = warp_sum(sum_x) * p.rstd[at.image * p.groups + group];
    if (lane == 0) {
      float2* partial = reinterpret_cast<float2*>(p.partial);
      partial[(at.image * p.groups + group) * p.chunks + at.chunk] = make_float2(sum, sum_x);
    }
  }
}

__global__ void __launch_bounds__(32) join_moments_kernel(const Params p) {
  const float2* partial = reinterpret_cast<const float2*>(p.partial) + blockIdx.x * p.chunks;
  float first = 0.0f, second = 0.0f;
  for (int64_t k = threadIdx.x; k < p.chunks; k += 32) {
    first += partial[k].x;
    second += partial[k].y;
  }
  first = warp_sum(first);
  second = warp_sum(second);
  const float n = float(p.channels / p.groups * p.rows);
  if (threadIdx.x == 0) reinterpret_cast<float2*>(p.moments)[blockIdx.x] = make_float2(first / n, second / n);
}

// dx = scale dz - d1 - (x - centre) d2, with d1 = rstd m1 and d2 = rstd^2 m2.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) input_gradient_kernel(const Params p) {
  const Place<V> at(p, p.chunks - 1 - blockIdx.x);
  if (!at.active) return;
  const int C = int(p.channels), D = C / int(p.groups);
  const T* x = static_cast<const T*>(p.x) + at.offset;
  const T* g = static_cast<const T*>(p.g) + at.offset;
  T* dx = static_cast<T*>(p.out) + at.offset;
  const Affine<T, V> f(p, at.image, at.channel);
  float d1[V], d2[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int64_t group = at.image * p.groups + (at.channel + i) / D;
    const float rstd = p.rstd[group];
    d1[i] = rstd * p.moments[2 * group];
    d2[i] = rstd * rstd * p.moments[2 * group + 1];
  }
  constexpr int kPairs = kUnroll / 2;
  for (int64_t row = at.begin + at.slot; row < at.end; row += at.R * kPairs) {
    Vec<T, V> in[kPairs], gradient[kPairs];
#pragma unroll
    for (int u = 0; u < kPairs; ++u)
      if (row + u * at.R < at.end) {
        in[u] = load<T, V>(x + (row + u * at.R) * C);
        gradient[u] = load<T, V>(g + (row + u * at.R) * C);
      }
#pragma unroll
    for (int u = 0; u < kPairs; ++u)
      if (row + u * at.R < at.end) {
        Vec<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float d = to_float(in[u].v[i]) - f.centre[i];
          const float dz = activation_gradient<T>(to_float(gradient[u].v[i]), d * f.scale[i] + f.shift[i], p.silu);
          from_float(f.scale[i] * dz - d1[i] - d * d2[i], out.v[i]);
        }
        *reinterpret_cast<Vec<T, V>*>(dx + (row + u * at.R) * C) = out;
      }
  }
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int V>
const char* launch(const Params& p, bool backward, cudaStream_t stream) {
  const int lanes = int(p.channels) / V;
  if (lanes > kMaxThreads) return "too many channels for one row per thread block";
  const int R = kBlockThreads / lanes > 1 ? kBlockThreads / lanes : 1;
  const int threads = (lanes * R + 31) / 32 * 32;
  const size_t shared = 2 * sizeof(float) * R * p.channels;
  const dim3 grid(unsigned(p.chunks), unsigned(p.images));
  const unsigned joins = unsigned(p.images * p.groups);
  if (backward) {
    reduce_kernel<T, V><<<grid, threads, shared, stream>>>(p);
    join_moments_kernel<<<joins, 32, 0, stream>>>(p);
    input_gradient_kernel<T, V><<<grid, threads, 0, stream>>>(p);
  } else {
    statistics_kernel<T, V><<<grid, threads, shared, stream>>>(p);
    join_statistics_kernel<<<joins, 32, 0, stream>>>(p);
    apply_kernel<T, V><<<grid, threads, 0, stream>>>(p);
  }
  return last_error();
}

template <typename T>
const char* launch_vectors(const Params& p, bool backward, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (p.channels % V == 0 && aligned(p.x) && aligned(p.g) && aligned(p.out)) return launch<T, V>(p, backward, stream);
  return launch<T, 1>(p, backward, stream);
}

const char* launch_dtype(const Params& p, bool backward, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::float32) return launch_vectors<float>(p, backward, on);
  if (p.dtype == DType::float16) return launch_vectors<__half>(p, backward, on);
  return launch_vectors<__nv_bfloat16>(p, backward, on);
}

}  // namespace

const char* cuda_forward(const GroupNormSiluParams& p, void* stream) { return launch_dtype(p, false, stream); }
const char* cuda_backward(const GroupNormSiluParams& p, void* stream) { return launch_dtype(p, true, stream); }

}  // namespace alignprop_fast
