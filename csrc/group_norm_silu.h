// y = silu(group_norm(x + t)) for channels_last tensors, and its gradient for x; gamma and beta are frozen.
//
// Forward, per image b and group of D = C / G channels over N = H W rows, u = x + t:
//     mean = sum(u) / (D N)    rstd = (sum((u - mean)^2) / (D N) + eps)^-1/2
//     z = (u - mean) rstd gamma + beta    y = z sigmoid(z), or y = z without SiLU
// Backward, for the gradient g of y, with xhat = (u - mean) rstd and dz = g silu'(z):
//     m1 = mean(gamma dz)    m2 = mean(gamma dz xhat)    dx = rstd (gamma dz - m1 - xhat m2)
//
// Shapes: x, g, y, dx [B, N, C] in memory; t [B, C]; gamma, beta [C]; all of one dtype. In fp32: mean, rstd [B, G], one
// after the other in a tensor of [2, B, G]; partial [B, G, chunks, 2]; moments [B, G, 2]. All sums are fp32 (float64
// when the CPU joins chunks).
// Bytes moved, in units of x: forward 2 reads and 1 write, backward 4 reads and 1 write. An element takes about 10 and
// 25 FLOP, so memory is the bound. The statistics of a block of rows are (mean, sum of squared deviations), joined as
// in Chan, Golub & LeVeque (1979), so that a large mean costs no precision. Every sum has a fixed order, so two runs
// give the same bits. It loses on tiny tensors, because each pass is a launch, and when a group fits into one thread
// block, which could then read x once.
#pragma once

#include <cstdint>

namespace alignprop_fast {

enum class DType { float32, bfloat16, float16 };

struct GroupNormSiluParams {
  DType dtype;
  const void* x;
  const void* t;  // null: no time embedding
  const void* gamma;
  const void* beta;
  const void* g;   // backward only
  void* out;       // y or dx
  float* mean;     // written by the forward pass, read by the backward pass
  float* rstd;
  float* partial;  // (mean, squared deviations) or (sum gamma dz, sum gamma dz xhat) of each chunk of rows
  float* moments;  // (m1, m2), backward only
  int64_t images, rows, channels, groups, chunks;
  float eps;
  bool silu;
};

// Rows that chunk k of an image covers: [first_row(k), first_row(k + 1)).
#ifdef __CUDACC__
__host__ __device__
#endif
inline int64_t first_row(int64_t rows, int64_t chunks, int64_t k) {
  return rows * k / chunks;
}

// One phase of the CPU version over tasks [begin, end). A task is one chunk of one image (tasks = images * chunks).
// The caller spreads each phase over its threads and waits for all of them before the next phase.
using CpuPhase = void (*)(const GroupNormSiluParams&, int64_t begin, int64_t end);
void cpu_statistics(const GroupNormSiluParams& p, int64_t begin, int64_t end);
void cpu_join_statistics(const GroupNormSiluParams& p);
void cpu_apply(const GroupNormSiluParams& p, int64_t begin, int64_t end);
void cpu_reduce(const GroupNormSiluParams& p, int64_t begin, int64_t end);
void cpu_join_moments(const GroupNormSiluParams& p);
void cpu_input_gradient(const GroupNormSiluParams& p, int64_t begin, int64_t end);

// Launch on a stream of the current device (a cudaStream_t). Returns null, or a message about the error.
const char* cuda_forward(const GroupNormSiluParams& p, void* stream);
const char* cuda_backward(const GroupNormSiluParams& p, void* stream);

}  // namespace alignprop_fast
