// Only this file includes torch, and only its stable ABI, so one build serves torch 2.10 and every later version.
// The caller (alignprop_fast/ops/group_norm_silu.py) checks the inputs and allocates outputs and workspaces.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "group_norm_silu.h"

namespace alignprop_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "group_norm_silu: x must be float32, bfloat16 or float16");
  }
}

GroupNormSiluParams params(const Tensor& x, const std::optional<Tensor>& t, const Tensor& gamma, const Tensor& beta,
                           bool silu, const Tensor& out, const Tensor& statistics, const Tensor& partial) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.size(1) == 1 || x.stride(1) == 1), "group_norm_silu: x must be channels_last");
  GroupNormSiluParams p{};
  p.dtype = dtype_of(x);
  for (const Tensor& other : {gamma, beta, out, t.value_or(x)})
    STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), "group_norm_silu: all tensors must have x's dtype");
  p.x = x.const_data_ptr();
  p.t = t.has_value() ? t->const_data_ptr() : nullptr;
  p.gamma = gamma.const_data_ptr();
  p.beta = beta.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  p.images = x.size(0);
  p.channels = x.size(1);
  p.rows = x.size(2) * x.size(3);
  p.groups = partial.size(1);
  p.mean = static_cast<float*>(statistics.data_ptr());
  p.rstd = p.mean + p.images * p.groups;
  p.chunks = partial.size(2);
  p.silu = silu;
  return p;
}

// Uses torch's threads, so that torch.set_num_threads counts here too.
void spread(const GroupNormSiluParams& p, CpuPhase phase) {
  torch::stable::parallel_for(0, p.images * p.chunks, 1, [&](int64_t begin, int64_t end) { phase(p, begin, end); });
}

void forward_cpu(Tensor x, std::optional<Tensor> t, Tensor gamma, Tensor beta, double eps, bool silu, Tensor y,
                 Tensor statistics, Tensor partial) {
  GroupNormSiluParams p = params(x, t, gamma, beta, silu, y, statistics, partial);
  STD_TORCH_CHECK(p.dtype != DType::float16, "group_norm_silu: no float16 on the CPU");
  p.eps = static_cast<float>(eps);
  spread(p, cpu_statistics);
  cpu_join_statistics(p);
  spread(p, cpu_apply);
}

void backward_cpu(Tensor g, Tensor x, std::optional<Tensor> t, Tensor gamma, Tensor beta, Tensor statistics,
                  bool silu, Tensor dx, Tensor partial, Tensor moments) {
  GroupNormSiluParams p = params(x, t, gamma, beta, silu, dx, statistics, partial);
  STD_TORCH_CHECK(p.dtype != DType::float16, "group_norm_silu: no float16 on the CPU");
  p.g = g.const_data_ptr();
  p.moments = static_cast<float*>(moments.mutable_data_ptr());
  spread(p, cpu_reduce);
  cpu_join_moments(p);
  spread(p, cpu_input_gradient);
}

#ifdef USE_CUDA

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "group_norm_silu: the device has no current stream");
  return stream;
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "group_norm_silu: ", error == nullptr ? "" : error); }

void forward_cuda(Tensor x, std::optional<Tensor> t, Tensor gamma, Tensor beta, double eps, bool silu, Tensor y,
                  Tensor statistics, Tensor partial) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  GroupNormSiluParams p = params(x, t, gamma, beta, silu, y, statistics, partial);
  p.eps = static_cast<float>(eps);
  check(cuda_forward(p, current_stream(x)));
}

void backward_cuda(Tensor g, Tensor x, std::optional<Tensor> t, Tensor gamma, Tensor beta, Tensor statistics,
                   bool silu, Tensor dx, Tensor partial, Tensor moments) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  GroupNormSiluParams p = params(x, t, gamma, beta, silu, dx, statistics, partial);
  p.g = g.const_data_ptr();
  p.moments = static_cast<float*>(moments.mutable_data_ptr());
  check(cuda_backward(p, current_stream(x)));
}

#endif  // USE_CUDA

}  // namespace
}  // namespace alignprop_fast

// A fragment, because the Python code of this package defines ops in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(alignprop_fast, m) {
  m.def(
      "group_norm_silu_forward(Tensor x, Tensor? t, Tensor gamma, Tensor beta, float eps, bool silu, Tensor(a!) y, "
      "Tensor(b!) statistics, Tensor(c!) partial) -> ()");
  m.def(
      "group_norm_silu_backward(Tensor g, Tensor x, Tensor? t, Tensor gamma, Tensor beta, Tensor statistics, "
      "bool silu, Tensor(a!) dx, Tensor(b!) partial, Tensor(c!) moments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(alignprop_fast, CPU, m) {
  m.impl("group_norm_silu_forward", TORCH_BOX(&alignprop_fast::forward_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&alignprop_fast::backward_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(alignprop_fast, CUDA, m) {
  m.impl("group_norm_silu_forward", TORCH_BOX(&alignprop_fast::forward_cuda));
  m.impl("group_norm_silu_backward", TORCH_BOX(&alignprop_fast::backward_cuda));
}
#endif
