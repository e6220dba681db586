// Kernels that are broken on purpose, one fault each, to test that the stand-in notices; two blocks of 64 threads.
#include <cuda_runtime.h>

#include <cstring>

struct alignas(16) Four {
  float v[4];
};

__global__ void __launch_bounds__(64) healthy(float* out) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  float sum = shared[63 - threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const float below = __shfl_down_sync(~0u, sum, 31);
  out[64 * blockIdx.x + threadIdx.x] = below;
}

__global__ void __launch_bounds__(64) missing_barrier(float* out) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = float(threadIdx.x);
  out[64 * blockIdx.x + threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void __launch_bounds__(64) overwritten_too_early(float* out) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const float value = shared[63 - threadIdx.x];
  shared[threadIdx.x] = -1.0f;
  out[64 * blockIdx.x + threadIdx.x] = value;
}

__global__ void __launch_bounds__(64) dependent_blocks(float* out) {
  out[64 * blockIdx.x + threadIdx.x] = blockIdx.x == 0 ? 1.0f : out[threadIdx.x];
}

__global__ void __launch_bounds__(64) barrier_of_some(float*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void __launch_bounds__(64) two_barriers(float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void __launch_bounds__(64) half_a_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 8);
}

__global__ void __launch_bounds__(64) lane_outside_the_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void __launch_bounds__(64) shuffle_of_some(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 8);
}

__global__ void __launch_bounds__(64) beyond_the_buffer(float* out) { out[64 * blockIdx.x + threadIdx.x + 1] = 1.0f; }

__global__ void __launch_bounds__(64) beyond_shared_memory(float*) {
  extern __shared__ float shared[];
  shared[threadIdx.x + 1] = 1.0f;
}

__global__ void __launch_bounds__(64) misaligned_vector(float* out) {
  *reinterpret_cast<Four*>(out + 1) = Four{};
}

__global__ void __launch_bounds__(64) local_array_overrun(float* out) {
  float local[4] = {};
  for (unsigned i = 0; i <= 4 + blockIdx.x; ++i) local[i] += 1.0f;
  out[threadIdx.x] = local[threadIdx.x % 4];
}

__global__ void __launch_bounds__(32) too_many_threads(float*) {}

extern "C" void set_order(int order) { cuda_on_cpu::order = static_cast<cuda_on_cpu::Order>(order); }

extern "C" const char* run(const char* name, float* out) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("healthy")) healthy<<<2, 64, 256, nullptr>>>(out);
  if (is("missing_barrier")) missing_barrier<<<2, 64, 256, nullptr>>>(out);
  if (is("overwritten_too_early")) overwritten_too_early<<<2, 64, 256, nullptr>>>(out);
  if (is("dependent_blocks")) dependent_blocks<<<2, 64, 256, nullptr>>>(out);
  if (is("barrier_of_some")) barrier_of_some<<<2, 64, 0, nullptr>>>(out);
  if (is("two_barriers")) two_barriers<<<2, 64, 0, nullptr>>>(out);
  if (is("half_a_mask")) half_a_mask<<<2, 64, 0, nullptr>>>(out);
  if (is("lane_outside_the_mask")) lane_outside_the_mask<<<2, 64, 0, nullptr>>>(out);
  if (is("shuffle_of_some")) shuffle_of_some<<<2, 64, 0, nullptr>>>(out);
  if (is("beyond_the_buffer")) beyond_the_buffer<<<2, 64, 0, nullptr>>>(out);
  if (is("beyond_shared_memory")) beyond_shared_memory<<<2, 64, 256, nullptr>>>(out);
  if (is("misaligned_vector")) misaligned_vector<<<2, 64, 0, nullptr>>>(out);
  if (is("local_array_overrun")) local_array_overrun<<<2, 64, 0, nullptr>>>(out);
  if (is("too_many_threads")) too_many_threads<<<2, 64, 0, nullptr>>>(out);
  return cudaGetLastError() == cudaSuccess ? nullptr : cudaGetErrorString(1);
}
