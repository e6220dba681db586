// A CUDA device for a build of PyTorch that has none: its tensors say "cuda:0" and lie in host memory, its operators are
// those of the CPU. What a GPU refuses is refused here too: operands on different devices, and more memory than it has.
// It counts what its allocator handed out and how often the host waited for it. Time it knows nothing of.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

using c10::DeviceIndex;
const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);  // all work is done when it is asked for: any event will do
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

// The device's random numbers are the CPU's.
struct DeviceGenerator : c10::GeneratorImpl {
  DeviceGenerator() : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator();
    copy->host = host.clone();
    return copy;
  }
  at::Generator host = at::detail::createCPUGenerator();
};

std::atomic<int64_t> allocated{0}, peak{0}, limit{INT64_MAX}, waits{0};
// What pools of graphs hold beside what is allocated; the most that was allocated and held at once.
std::atomic<int64_t> idle{0}, peak_reserved{0};
void (*on_wait)() = nullptr;
// What a call outside of PyTorch has left behind: the next operator that looks takes it for its own.
bool failed = false;

void wait() {
  ++waits;
  if (on_wait != nullptr) on_wait();
}


// Rounded as PyTorch's CUDA allocator rounds.
int64_t rounded(int64_t bytes) { return (bytes + 511) / 512 * 512; }

// The memory of recordings: what is freed in it stays theirs while one of them lives, for their replays.
struct Pool {
  int64_t active = 0, reserved = 0, graphs = 0;

  // Changes what is allocated in it, and what it holds.
  void change(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    idle -= reserved - active;
    active += bytes;
    reserved = graphs > 0 ? std::max(reserved, active) : active;
    idle += reserved - active;
  }
  int64_t more(int64_t bytes) const { return std::max<int64_t>(0, active + bytes - reserved); }

  static inline std::mutex mutex;
};
std::unordered_map<int64_t, std::shared_ptr<Pool>> pools;
std::shared_ptr<Pool> recording;  // the pool of the present recording

struct Owned {
  c10::Storage host;
  int64_t bytes;
  std::shared_ptr<Pool> pool;
};

void release(void* context) {
  auto* owned = static_cast<Owned*>(context);
  allocated -= owned->bytes;
  if (owned->pool) owned->pool->change(-owned->bytes);
  delete owned;
}

void raise_to(std::atomic<int64_t>& most, int64_t value) {
  for (int64_t seen = most; seen < value && !most.compare_exchange_weak(seen, value);) {
  }
}

// The host's memory with the device's name on it, counted until it is let go.
c10::Storage on_device(const c10::Storage& host) {
  const auto bytes = static_cast<int64_t>(host.nbytes());
  const int64_t charged = rounded(bytes);
  const int64_t more = recording ? recording->more(charged) : charged;
  TORCH_CHECK_WITH(OutOfMemoryError, allocated + idle + more <= limit, "CUDA out of memory. Tried to allocate ", bytes,
                   " bytes of an emulated device.");
  allocated += charged;
  if (recording) recording->change(charged);
  raise_to(peak, allocated);
  raise_to(peak_reserved, allocated + idle);
  auto* owned = new Owned{host, charged, recording};
  c10::DataPtr data(host.mutable_data(), owned, release, kDevice);
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), nullptr, false);
}

at::Tensor shaped(at::Tensor result, const at::Tensor& like) {
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return result;
}

at::Tensor tensor_of(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  const c10::DispatchKeySet keys(key);
  return shaped(at::detail::make_tensor<at::TensorImpl>(std::move(storage), keys, like.dtype()), like);
}

// Whether a view belongs to inference mode or to autograd depends on what it is a view of.
at::Tensor view_of(const at::Tensor& x, c10::Storage storage, const at::Tensor& like) {
  constexpr auto kView = c10::TensorImpl::VIEW;
  return shaped(at::detail::make_tensor<at::TensorImpl>(kView, std::move(storage), x.key_set(), like.dtype()), like);
}

// One call of an operator: its tensors under the host's name, and back again.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op) {}

  at::Tensor to_host(const at::Tensor& x) {
    if (!x.defined()) return x;
    if (!x.is_cuda()) {
      if (x.dim() > 0) other_device_ = true;
      return x;
    }
    any_device_ = true;
    const auto host = tensor_of(host_storage(x.storage()), c10::DispatchKey::CPU, x);
    if (x.is_conj()) host._set_conj(true);
    arguments_.emplace_back(host, x);
    return host;
  }

  at::Tensor to_device(const at::Tensor& host) {
    if (!host.defined()) return host;
    for (const auto& [was_host, x] : arguments_)
      if (was_host.unsafeGetTensorImpl() == host.unsafeGetTensorImpl()) return moved(x, host);
    if (!any_device_ && !made_here_) return host;
    auto storage = device_storage(host.storage());
    for (const auto& [was_host, x] : arguments_)
      if (x.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return view_of(x, storage, host);
    return tensor_of(storage, c10::DispatchKey::CUDA, host);
  }

  c10::IValue argument(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> hosts;
      for (const at::Tensor& x : value.toTensorVector()) hosts.push_back(to_host(x));
      return hosts;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> hosts;
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorList())
        hosts.push_back(x.has_value() ? std::optional<at::Tensor>(to_host(*x)) : std::nullopt);
      return hosts;
    }
    if (value.isStorage() && value.toStorage().device().is_cuda()) return host_storage(value.toStorage());
    if (value.isGenerator() && value.toGenerator().device().is_cuda()) return static_cast<DeviceGenerator*>(value.toGenerator().unsafeGetGeneratorImpl())->host;
    if (value.isDevice() && value.toDevice().is_cuda()) {
      made_here_ = true;
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  c10::IValue result(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> results;
      for (const at::Tensor& x : value.toTensorVector()) results.push_back(to_device(x));
      return results;
    }
    return value;
  }

  // A GPU takes numbers of the host, and indices into its tensors; nothing else.
  void check_devices() const {
    const std::string& name = op_.schema().operator_name().name;
    if (!other_device_ || !any_device_ || name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_") return;
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
                name, ")");
  }

  void update_arguments() {
    for (const auto& [host, x] : arguments_) moved(x, host);
  }

 private:
  c10::Storage host_storage(const c10::Storage& storage) {
    auto found = hosts_.find(storage.unsafeGetStorageImpl());
    if (found == hosts_.end()) {
      c10::DataPtr data(storage.mutable_data(), c10::Device(c10::kCPU));
      const auto bytes = storage.nbytes();
      c10::Storage host(c10::Storage::use_byte_size_t(), bytes, std::move(data), c10::GetAllocator(c10::kCPU), true);
      devices_.emplace(host.unsafeGetStorageImpl(), storage);
      found = hosts_.emplace(storage.unsafeGetStorageImpl(), host).first;
    }
    return found->second;
  }

  // x after what the operator did to the shape and the memory of its host.
  at::Tensor moved(const at::Tensor& x, const at::Tensor& host) {
    auto* impl = x.unsafeGetTensorImpl();
    if (host.storage().data() != x.storage().data()) impl->set_storage_keep_dtype(device_storage(host.storage()));
    if (x.sizes() != host.sizes() || x.strides() != host.strides() || x.storage_offset() != host.storage_offset())
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    return x;
  }

  c10::Storage device_storage(const c10::Storage& host) {
    auto* key = host.unsafeGetStorageImpl();
    const auto found = devices_.find(key);
    if (found != devices_.end() && found->second.data() == host.data()) return found->second;
    return devices_.insert_or_assign(key, on_device(host)).first->second;
  }

  const c10::OperatorHandle& op_;
  bool any_device_ = false, other_device_ = false, made_here_ = false;
  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts_, devices_;
  std::vector<std::pair<at::Tensor, at::Tensor>> arguments_;
};

// Products of bf16 by way of fp32, in which a GPU sums them too: a CPU without AVX-512 takes fifty times as long for its
// own. Operands of several dtypes are left to the operator, which refuses them.
void call_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> products{"aten::mm",      "aten::addmm",       "aten::bmm",
                                              "aten::baddbmm", "aten::convolution", "aten::convolution_backward"};
  const auto each = [stack](size_t count, const auto& change) {
    for (auto value = stack->end() - count; value != stack->end(); ++value)
      if (value->isTensor() && value->toTensor().defined()) change(*value);
  };
  const auto& name = op.schema().operator_name();
  const auto arguments = op.schema().arguments().size();
  bool narrow = name.overload_name.empty() && products.count(name.name) > 0;
  each(arguments, [&](c10::IValue& value) { narrow &= value.toTensor().scalar_type() == at::kBFloat16; });
  if (narrow) each(arguments, [](c10::IValue& value) { value = value.toTensor().to(at::kFloat); });
  op.callBoxed(stack);
  if (narrow)
    each(op.schema().returns().size(), [](c10::IValue& value) { value = value.toTensor().to(at::kBFloat16); });
}

void drop(void* context) { delete static_cast<c10::Storage*>(context); }

// x where it lies now, also if its owner is freed or gets other memory: a graph knows addresses, not owners.
at::Tensor address_of(const at::Tensor& x) {
  if (!x.defined() || !x.is_cuda() || x.storage().data_ptr().get_deleter() != &release) return x;
  const auto* owned = static_cast<const Owned*>(x.storage().data_ptr().get_context());
  c10::DataPtr data(owned->host.mutable_data(), new c10::Storage(owned->host), drop, kDevice);
  c10::Storage place(c10::Storage::use_byte_size_t(), x.storage().nbytes(), std::move(data), nullptr, false);
  auto there = tensor_of(std::move(place), c10::DispatchKey::CUDA, x);
  if (x.is_conj()) there._set_conj(true);
  return there;
}

c10::IValue address_of(const c10::IValue& value) {
  if (value.isTensor()) return address_of(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> places;
    for (const at::Tensor& x : value.toTensorVector()) places.push_back(address_of(x));
    return places;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> places;
    for (const std::optional<at::Tensor>& x : value.toOptionalTensorList())
      places.push_back(x.has_value() ? std::optional<at::Tensor>(address_of(*x)) : std::nullopt);
    return places;
  }
  return value;
}

// A graph: operators with the addresses of their operands and of what they returned.
struct Node {
  Node(const c10::OperatorHandle& op, const std::vector<c10::IValue>& with, const std::vector<at::Tensor>& returned)
      : op(op) {
    for (const auto& value : with) arguments.push_back(address_of(value));
    for (const auto& x : returned) results.push_back(address_of(x));
  }
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;
  std::vector<at::Tensor> results;
};
struct Graph {
  explicit Graph(std::shared_ptr<Pool> of) : pool(std::move(of)) { ++pool->graphs; }
  ~Graph() {
    --pool->graphs;
    pool->change(0);
  }
  std::vector<Node> nodes;
  std::shared_ptr<Pool> pool;
};
Graph* capturing = nullptr;

void collect(const c10::IValue& value, std::vector<at::Tensor>& into) {
  if (value.isTensor()) into.push_back(value.toTensor());
  if (value.isTensorList())
    for (const at::Tensor& x : value.toTensorVector()) into.push_back(x);
}

// The operators once more on the same memory: no Python runs.
void replay(const Graph& graph) {
  at::NoGradGuard no_grad;
  for (const Node& node : graph.nodes) {
    Call call(node.op);
    torch::jit::Stack stack;
    for (const auto& value : node.arguments) stack.push_back(call.argument(value));
    call_on_host(node.op, &stack);
    std::vector<at::Tensor> hosts;
    for (const auto& value : stack) collect(value, hosts);
    for (size_t i = 0; i < hosts.size(); ++i) {
      // What was made empty, to be given its size by the operator after it, has that size now.
      if (!hosts[i].defined() || !node.results[i].is_cuda() || hosts[i].sizes() != node.results[i].sizes()) continue;
      const at::Tensor there = call.to_host(node.results[i]);
      if (there.storage().data() != hosts[i].storage().data()) there.copy_(hosts[i]);
    }
  }
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  TORCH_CHECK(!std::exchange(failed, false), "CUDA error: the error of an earlier call");
  const auto count = op.schema().arguments().size();
  Call call(op);
  std::vector<c10::IValue> arguments(stack->end() - count, stack->end());
  stack->resize(stack->size() - count);
  for (const auto& value : arguments) stack->push_back(call.argument(value));
  call.check_devices();
  call_on_host(op, stack);
  call.update_arguments();
  for (auto value = stack->end() - op.schema().returns().size(); value != stack->end(); ++value)
    *value = call.result(*value);
  if (capturing != nullptr) {
    std::vector<at::Tensor> results;
    for (auto value = stack->end() - op.schema().returns().size(); value != stack->end(); ++value)
      collect(*value, results);
    capturing->nodes.emplace_back(op, arguments, results);
  }
}

// A convolution takes a workspace from the allocator for as long as it runs, as cuDNN's do.
void with_workspace(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto count = op.schema().arguments().size();
  const at::Tensor x = (stack->end() - count)->toTensor();
  const at::Tensor workspace = at::empty({static_cast<int64_t>(x.nbytes())}, x.options().dtype(at::kByte));
  on_host(op, stack);
}

// The one operator that may join devices. Copies to the host are waited for, those from it only without non_blocking.
at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda() && !non_blocking) wait();
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  if (capturing != nullptr) {
    TORCH_CHECK(to.is_cuda() && from.is_cuda(), "operation not permitted when stream is capturing");
    capturing->nodes.emplace_back(op, std::vector<c10::IValue>{to, from, non_blocking}, std::vector<at::Tensor>{to});
  }
  Call call(op);
  call.to_host(to).copy_(call.to_host(from));
  return to;
}

at::Scalar item(const at::Tensor& x) {
  TORCH_CHECK(capturing == nullptr, "operation not permitted when stream is capturing");
  wait();
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_local_scalar_dense", "");
  return at::_local_scalar_dense(Call(op).to_host(x));
}

int64_t plain_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                        bool, std::optional<double>, bool) {
  return 0;
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<DeviceGenerator>(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static const Generator generator = make_generator<DeviceGenerator>();
    return generator;
  }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("_fused_sdp_choice", &plain_attention);
  for (const char* name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&with_workspace>());
}

extern "C" {
int64_t emulated_allocated() { return allocated; }
int64_t emulated_peak() { return peak; }
void emulated_reset_peak() {
  peak = allocated.load();
  peak_reserved = allocated + idle;
}
int64_t emulated_reserved() { return allocated + idle; }
int64_t emulated_peak_reserved() { return peak_reserved; }
void emulated_set_limit(int64_t bytes) { limit = bytes; }
int64_t emulated_limit() { return limit; }
void emulated_fail() { failed = true; }
void* emulated_capture_begin(int64_t pool) {
  auto& found = pools[pool];
  if (!found) found = std::make_shared<Pool>();
  recording = found;
  return capturing = new Graph(found);
}
void emulated_capture_end() {
  capturing = nullptr;
  recording.reset();
}
bool emulated_is_capturing() { return capturing != nullptr; }
void emulated_replay(void* graph) { replay(*static_cast<Graph*>(graph)); }
void emulated_forget(void* graph) { delete static_cast<Graph*>(graph); }
int64_t emulated_waits() { return waits; }
void emulated_on_wait(void (*callback)()) { on_wait = callback; }
}
