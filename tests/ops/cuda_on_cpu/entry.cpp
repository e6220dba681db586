// What the test calls, and what bindings.cpp takes from CUDA's part of torch.
#include <cuda_runtime.h>

#include "group_norm_silu.h"

extern "C" {

void set_order(int order) { cuda_on_cpu::order = static_cast<cuda_on_cpu::Order>(order); }

const char* run(int dtype, bool backward, const void* x, const void* t, const void* gamma, const void* beta,
                const void* g, void* out, float* mean, float* rstd, float* partial, float* moments, int64_t images,
                int64_t rows, int64_t channels, int64_t groups, int64_t chunks, float eps, bool silu) {
  using namespace alignprop_fast;
  const GroupNormSiluParams p{static_cast<DType>(dtype), x, t, gamma, beta, g, out, mean, rstd, partial, moments,
                              images, rows, channels, groups, chunks, eps, silu};
  return backward ? cuda_backward(p, nullptr) : cuda_forward(p, nullptr);
}

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
}
