// CUDA version of group_norm_silu.h. A block owns one chunk of rows of one image and all channels. A thread owns V
// neighbouring channels and every R-th row. Per-channel results go to shared memory, one warp sums each group, and one
// warp of a second launch sums the chunks. The order of every sum is fixed and there are no atomics.
#include "group_norm_silu_cuda.h"

#include <climits>

namespace alignprop_fast {
namespace {

// Stores the chunk's two numbers of one group, from lane 0 of a warp.
template <int V>
__device__ void write_partial(const Params& p, const Place<V>& at, int group, float first, float second) {
  if (threadIdx.x % 32 == 0)
    reinterpret_cast<float2*>(p.partial)[(at.image * p.groups + group) * p.chunks + at.chunk] =
        make_float2(first, second);
}

// Mean and squared deviations by Welford's method, per channel and then per group of the chunk.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) statistics_kernel(const Params p) {
  extern __shared__ __align__(16) float shared[];
  const Place<V> at(p, blockIdx.y, blockIdx.x);
  const int C = at.C, D = at.D;
  float *means = shared, *squares = shared + at.R * C;
  if (at.active) {
    const T* x = static_cast<const T*>(p.x) + at.offset;
    Vec<float, V> mean{}, square{};
    float n = 0.0f;
    constexpr int N = kLoads<T>;
    for (int row = at.slot; row < at.rows; row += at.R * N) {
      Vec<T, V> in[N];
      at.load(in, x, row);
#pragma unroll
      for (int u = 0; u < N; ++u)
        if (at.has(row, u)) {
          n += 1.0f;
          const float share = __frcp_rn(n);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float value = to_float(in[u].v[i]), delta = value - mean.v[i];
            mean.v[i] += delta * share;
            square.v[i] += delta * (value - mean.v[i]);
          }
        }
    }
    store(means + at.slot * C + at.channel, mean);
    store(squares + at.slot * C + at.channel, square);
  }
  __syncthreads();
  for (int c = int(threadIdx.x); c < C; c += int(blockDim.x)) {
    float seen = 0.0f, mean = 0.0f, square = 0.0f;
    for (int r = 0; r < at.R && r < at.rows; ++r) {
      const float n = float((at.rows - r + at.R - 1) / at.R), share = n / (seen + n);
      const float delta = means[r * C + c] - mean;
      mean += delta * share;
      square += squares[r * C + c] + delta * delta * seen * share;
      seen += n;
    }
    means[c] = mean + (p.t == nullptr ? 0.0f : to_float(static_cast<const T*>(p.t)[at.image * C + c]));
    squares[c] = square;
  }
  __syncthreads();
  const int lane = int(threadIdx.x) % 32;
  for (int group = int(threadIdx.x) / 32; group < int(p.groups); group += int(blockDim.x) / 32) {
    float mean = 0.0f, square = 0.0f;
    for (int d = lane; d < D; d += 32) mean += means[group * D + d];
    mean = warp_sum(mean) / float(D);
    for (int d = lane; d < D; d += 32) {
      const float delta = means[group * D + d] - mean;
      square += squares[group * D + d] + float(at.rows) * delta * delta;
    }
    write_partial(p, at, group, mean, warp_sum(square));
  }
}

// One warp per image and group: first the mean over all chunks, then the deviations from it.
__global__ void __launch_bounds__(32) join_statistics_kernel(const Params p) {
  const float2* partial = reinterpret_cast<const float2*>(p.partial) + blockIdx.x * p.chunks;
  const Chunks chunks(p);
  const float D = float(int(p.channels) / int(p.groups));
  float mean = 0.0f, square = 0.0f;
#pragma unroll 8
  for (int k = int(threadIdx.x); k < chunks.chunks; k += 32) mean += float(chunks.rows(k)) * partial[k].x;
  mean = warp_sum(mean) / float(p.rows);
#pragma unroll 8
  for (int k = int(threadIdx.x); k < chunks.chunks; k += 32) {
    const float2 chunk = partial[k];
    const float delta = chunk.x - mean;
    square += chunk.y + D * float(chunks.rows(k)) * delta * delta;
  }
  square = warp_sum(square);
  if (threadIdx.x == 0) {
    p.mean[blockIdx.x] = mean;
    p.rstd[blockIdx.x] = 1.0f / sqrtf(square / (D * float(p.rows)) + p.eps);
  }
}

// Walks over images, chunks and rows from last to first, because what the statistics pass read last is still in the L2
// cache. If all blocks run at once, that is the end of every chunk.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) apply_kernel(const Params p) {
  const Place<V> at(p, gridDim.y - 1 - blockIdx.y, p.chunks - 1 - blockIdx.x);
  if (!at.active) return;
  const T* x = static_cast<const T*>(p.x) + at.offset;
  T* y = static_cast<T*>(p.out) + at.offset;
  const Affine<T, V> f(p, at);
  constexpr int N = kLoads<T>;
  for (int row = at.template last_batch<N>(); row >= 0; row -= at.R * N) {
    Vec<T, V> in[N];
    at.load(in, x, row);
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (at.has(row, u)) {
        Vec<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float z = (to_float(in[u].v[i]) - f.centre[i]) * f.scale[i] + f.shift[i];
          from_float(p.silu ? z * sigmoid<T>(z) : z, out.v[i]);
        }
        store(y + (row + u * at.R) * at.C, out);
      }
  }
}

// Per group of the chunk: sums of gamma dz and gamma dz xhat.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) reduce_kernel(const Params p) {
  extern __shared__ __align__(16) float shared[];
  const Place<V> at(p, blockIdx.y, blockIdx.x);
  const int C = at.C, D = at.D;
  float *sums = shared, *sums_x = shared + at.R * C;
  if (at.active) {
    const T* x = static_cast<const T*>(p.x) + at.offset;
    const T* g = static_cast<const T*>(p.g) + at.offset;
    const Affine<T, V> f(p, at);
    Vec<float, V> sum{}, sum_x{};
    constexpr int N = kLoads<T> / 2;
    for (int row = at.slot; row < at.rows; row += at.R * N) {
      Vec<T, V> in[N], gradient[N];
      at.load(in, x, row);
      at.load(gradient, g, row);
#pragma unroll
      for (int u = 0; u < N; ++u)
        if (at.has(row, u)) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float d = to_float(in[u].v[i]) - f.centre[i], z = d * f.scale[i] + f.shift[i];
            const float dz = activation_gradient<T>(to_float(gradient[u].v[i]), z, p.silu);
            sum.v[i] += dz;
            sum_x.v[i] += dz * d;
          }
        }
    }
    store(sums + at.slot * C + at.channel, sum);
    store(sums_x + at.slot * C + at.channel, sum_x);
  }
  __syncthreads();
  for (int c = int(threadIdx.x); c < C; c += int(blockDim.x)) {
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
  const int lane = int(threadIdx.x) % 32;
  for (int group = int(threadIdx.x) / 32; group < int(p.groups); group += int(blockDim.x) / 32) {
    float sum = 0.0f, sum_x = 0.0f;
    for (int d = lane; d < D; d += 32) {
      sum += sums[group * D + d];
      sum_x += sums_x[group * D + d];
    }
    sum = warp_sum(sum);
    write_partial(p, at, group, sum, warp_sum(sum_x) * p.rstd[at.image * p.groups + group]);
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
__global__ void __launch_bounds__(kMaxThreads) input_gradient_kernel(const Params p) {
  const Place<V> at(p, gridDim.y - 1 - blockIdx.y, p.chunks - 1 - blockIdx.x);
  if (!at.active) return;
  const T* x = static_cast<const T*>(p.x) + at.offset;
  const T* g = static_cast<const T*>(p.g) + at.offset;
  T* dx = static_cast<T*>(p.out) + at.offset;
  const Affine<T, V> f(p, at);
  float d1[V], d2[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int64_t group = at.image * p.groups + (at.channel + i) / at.D;
    const float rstd = p.rstd[group];
    d1[i] = rstd * p.moments[2 * group];
    d2[i] = rstd * rstd * p.moments[2 * group + 1];
  }
  constexpr int N = kLoads<T> / 2;
  for (int row = at.template last_batch<N>(); row >= 0; row -= at.R * N) {
    Vec<T, V> in[N], gradient[N];
    at.load(in, x, row);
    at.load(gradient, g, row);
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (at.has(row, u)) {
        Vec<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float d = to_float(in[u].v[i]) - f.centre[i], z = d * f.scale[i] + f.shift[i];
          const float dz = activation_gradient<T>(to_float(gradient[u].v[i]), z, p.silu);
          from_float(f.scale[i] * dz - d1[i] - d * d2[i], out.v[i]);
        }
        store(dx + (row + u * at.R) * at.C, out);
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
  constexpr int64_t kMaxChunks = 32768;  // whose square an int holds
  if (p.rows > INT_MAX || p.chunks > kMaxChunks || (p.rows / p.chunks + 1) * p.channels > INT_MAX)
    return "too many rows or chunks";
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
  const auto aligned = [](const void* to) { return reinterpret_cast<uintptr_t>(to) % sizeof(Vec<T, kVector>) == 0; };
  if (p.channels % kVector == 0 && aligned(p.x) && aligned(p.g) && aligned(p.out))
    return launch<T, kVector>(p, backward, stream);
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

// Null if this library's CUDA runtime works with the driver, else the reason. Creates no context on any device.
extern "C" const char* alignprop_fast_cuda_error() {
  int devices;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
