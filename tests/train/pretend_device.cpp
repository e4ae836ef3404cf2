// Two devices that are not the CPU, on a machine without one: `pretend:0` and `pretend:1`, in PyTorch's place for
// outside devices (PrivateUse1). Their memory is the CPU's and their arithmetic is the CPU's kernels, but a tensor on
// one is a stranger to a tensor on the CPU or on the other, as a CUDA tensor is: what mixes them is refused, and
// whatever makes the host wait for a device is reported to a listener, which counts it.

#include <atomic>
#include <set>
#include <string>

#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex DEVICES = 2;
thread_local c10::DeviceIndex current = 0;
using Listener = void (*)(const char*);
Listener listener = nullptr;
thread_local int inside = 0;  // within a kernel of the device, what it copies for itself is nobody's wait

struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

void waits(const std::string& what) {
  if (listener != nullptr && inside == 0) listener(what.c_str());
}

// Memory -------------------------------------------------------------------------------------------------------------

std::atomic<int64_t> held{0}, peak{0};

struct Block {
  at::DataPtr data;
  int64_t bytes;
};

struct Memory final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{c10::GetCPUAllocator()->allocate(bytes), static_cast<int64_t>(bytes)};
    const int64_t now = held += block->bytes;
    if (now > peak) peak = now;
    return {block->data.get(), block, &release, c10::Device(KIND, current)};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    held -= block->bytes;
    delete block;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory)

c10::DeviceIndex change(c10::DeviceIndex to) {
  const auto before = current;
  if (to >= 0) current = to;
  return before;
}

// While it lives another device is the current one; a number below 0 changes nothing.
struct At {
  c10::DeviceIndex before;
  explicit At(c10::DeviceIndex to) : before(change(to)) {}
  ~At() { current = before; }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<KIND> {
  c10::Device exchangeDevice(c10::Device to) const override { return c10::Device(KIND, change(to.index())); }
  c10::Device getDevice() const override { return c10::Device(KIND, current); }
  void setDevice(c10::Device to) const override { change(to.index()); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { change(to.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Stream getStream(c10::Device d) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(KIND, d.has_index() ? d.index() : current));
  }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(getDevice()); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Random numbers: a CPU's generator under the device's name -----------------------------------------------------------

struct Random final : c10::GeneratorImpl {
  at::Generator inner;
  explicit Random(at::Generator made)
      : GeneratorImpl(c10::Device(KIND, 0), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(made)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override { return new Random(inner.clone()); }
};

const at::Generator& common() {
  static at::Generator one = at::make_generator<Random>(at::detail::createCPUGenerator(c10::default_rng_seed_val));
  return one;
}

at::Generator& inner_of(const at::Generator& given) {
  return static_cast<Random*>(given.unsafeGetGeneratorImpl())->inner;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex to) const override { change(to); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override { return change(to); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override { return change(to); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return common(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Random>(at::detail::createCPUGenerator(c10::default_rng_seed_val));
  }
  at::Device getDeviceFromPtr(void*) const override { return c10::Device(KIND, current); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    At there(storage.device().index());
    auto made = memory.allocate(bytes);
    std::memcpy(made.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(made));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// Tensors ------------------------------------------------------------------------------------------------------------

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  At there(device.has_value() ? device->index() : -1);
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  At there(device.has_value() ? device->index() : -1);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& x) {
  if (x.is_cpu()) return x;
  auto options = x.options().device(at::kCPU);
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), options);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (to.is_cpu()) waits("a copy to the CPU");
  if (from.is_cpu() && from.dim() > 0 && !non_blocking) waits("a copy from the CPU");
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar scalar(const at::Tensor& x) {
  waits("a number read");
  return at::native::_local_scalar_dense_cpu(x);
}

// Everything else: the CPU's kernel ----------------------------------------------------------------------------------

// Operations whose result's size depends on values, so that CUDA waits for them.
const std::set<std::string> COUNTED_FIRST = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave", "aten::_linalg_check_errors"};
// Operations that move their small arguments themselves, or that are meant to take tensors of two devices.
const std::set<std::string> MAY_MIX = {"aten::_copy_from", "aten::_copy_from_and_resize", "aten::_foreach_copy_"};

void refuse_strangers(const c10::OperatorHandle& op, const std::string& name, const at::Tensor& x, bool& mask,
                      c10::DeviceIndex& device) {
  if (!x.defined()) return;
  mask = mask || x.scalar_type() == at::kBool;
  TORCH_CHECK(!x.is_cpu() || x.dim() == 0 || MAY_MIX.count(name), "Expected all tensors to be on the same device, but ",
              op.schema().operator_name(), " was given tensors on pretend and on cpu of shape ", x.sizes());
  if (x.is_cpu()) return;
  if (device < 0) device = x.device().index();
  TORCH_CHECK(x.device().index() == device || MAY_MIX.count(name),
              "Expected all tensors to be on the same device, but ", op.schema().operator_name(),
              " was given tensors on pretend:", int(device), " and on ", x.device(), " of shape ", x.sizes());
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto& arguments = op.schema().arguments();
  const auto first = stack->size() - arguments.size();
  bool masks = false;
  c10::DeviceIndex device = -1;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    bool mask = false;
    if (value.isTensor()) {
      refuse_strangers(op, name, value.toTensor(), mask, device);
    } else if (value.isTensorList()) {
      for (const at::Tensor& x : value.toTensorList()) refuse_strangers(op, name, x, mask, device);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorList())
        if (x.has_value()) refuse_strangers(op, name, *x, mask, device);
      masks = masks || mask;  // an index by a mask
    } else if (value.isGenerator()) {
      auto given = value.toGenerator();
      TORCH_CHECK(given.device().type() == KIND, "Expected a 'pretend' device type for generator but found '",
                  given.device().type(), "' (", op.schema().operator_name(), ")");
      value = inner_of(given);
    } else if (value.isNone() && arguments[i].type()->str() == "Generator?") {
      value = inner_of(common());
    }
  }
  if (COUNTED_FIRST.count(name)) waits(name.substr(6));
  if (masks && name.find("index_put") != std::string::npos) waits("an index by a mask");
  Inside guard;
  At there(device);
  at::native::cpu_fallback(op, stack);
}

int64_t attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                  bool, std::optional<double>, bool) {
  return 0;  // the one written out, which every device has
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", [](at::Tensor& self, at::Storage source) -> at::Tensor& {
    return at::native::set_(self, source);
  });
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", scalar);
  m.impl("_fused_sdp_choice", attention);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }

TORCH_LIBRARY(pretend, m) {
  m.def("seed", [](int64_t seed) { inner_of(common()).set_current_seed(static_cast<uint64_t>(seed)); });
  m.def("rng_state", [](const at::Tensor&) { return inner_of(common()).get_state(); });
  m.def("set_rng_state", [](const at::Tensor& state) { inner_of(common()).set_state(state); });
}

}  // namespace

extern "C" int64_t pretend_current() { return current; }
extern "C" void pretend_set_current(int64_t to) { change(static_cast<c10::DeviceIndex>(to)); }
extern "C" void pretend_listen(Listener given) { listener = given; }
extern "C" int64_t pretend_peak() { return peak; }
extern "C" void pretend_reset_peak() { peak = held.load(); }
extern "C" void pretend_start() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
