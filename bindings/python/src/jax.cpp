// The door for JAX: routing as a foreign function of XLA on the CPU. Headers alone: what is built
// here runs beside any jaxlib that knows their version, and without one.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <xla/ffi/api/ffi.h>

#include <moeroute/compiled.hpp>

#include "python.hpp"

namespace ffi = xla::ffi;
namespace mr = moeroute::compiled;

using namespace moeroute_python;

namespace {

using router_handle = decltype(std::declval<const mr::router&>().get());

// Compiled programs name a router by its number here. They may outlive every object of Python's, so
// that what has a number stays; a number that nobody gave is refused.
struct numbered_routers {
  std::mutex mutex{};
  std::vector<router_handle> handles{};
  std::vector<nb::object> kept{};
};

numbered_routers& numbered() {
  static auto* const all = new numbered_routers;  // programs may run until the very end
  return *all;
}

std::int64_t number_of(nb::object router) {
  const nb::capsule capsule = nb::cast<nb::capsule>(router.attr("_handle"));
  const auto handle = static_cast<router_handle>(capsule.data("moeroute_router"));
  numbered_routers& all = numbered();
  const std::lock_guard alone(all.mutex);
  const auto found = std::find(all.handles.begin(), all.handles.end(), handle);
  const std::int64_t number = found - all.handles.begin();
  if (found == all.handles.end()) {
    all.kept.push_back(std::move(router));
    all.handles.push_back(handle);
  }
  return number;
}

std::optional<router_handle> router_of(std::int64_t number) {
  numbered_routers& all = numbered();
  const std::lock_guard alone(all.mutex);
  if (number < 0 || number >= std::ssize(all.handles)) return {};
  return all.handles[static_cast<std::size_t>(number)];
}

ffi::Error refused(const std::string& sentence) {
  return ffi::Error::InvalidArgument("moeroute::jax.route: " + sentence);
}

// Empty: not given.
template <class Buffer>
bool fits(const Buffer& buffer, std::int64_t tokens) {
  return buffer.element_count() == 0 || static_cast<std::int64_t>(buffer.element_count()) == tokens;
}

ffi::Error route(std::int64_t number, ffi::AnyBuffer logits, ffi::BufferR1<ffi::PRED> mask,
                 ffi::BufferR1<ffi::S32> token_ids, ffi::BufferR1<ffi::U32> when,
                 ffi::ResultBufferR2<ffi::S32> ids, ffi::ResultBufferR2<ffi::F32> weights) {
  const auto router = router_of(number);
  if (!router) return refused("there is no router " + std::to_string(number) + " in this process");
  const auto shape = logits.dimensions();
  if (shape.size() != 2)
    return refused("logits has " + std::to_string(shape.size()) + " axes, expected 2");
  std::int32_t type = MOEROUTE_FLOAT;
  switch (logits.element_type()) {
    case ffi::F32: break;
    case ffi::BF16: type = MOEROUTE_BFLOAT16; break;
    case ffi::F16: type = MOEROUTE_FLOAT16; break;
    default: return refused("expected logits in float32, bfloat16 or float16");
  }
  const std::int64_t tokens = shape[0];
  if (!fits(mask, tokens) || !fits(token_ids, tokens) || when.element_count() != 2)
    return refused("expected a mask and token_ids of " + std::to_string(tokens) + " values");
  try {
    thread_local mr::assignment choices;
    mr::side_inputs side{};
    if (mask.element_count() > 0) side.mask = static_cast<const std::uint8_t*>(mask.untyped_data());
    if (token_ids.element_count() > 0) side.token_ids = token_ids.typed_data();
    side.seed = when.typed_data()[0];
    side.step = when.typed_data()[1];
    choices.refresh_after(moeroute_route(*router,
                                         {logits.untyped_data(), tokens, shape[1], shape[1], type},
                                         &side, nullptr, choices.get()));
    const auto size = ids->element_count();
    if (choices.ids().size() != size || weights->element_count() != size)
      return refused(std::to_string(choices.ids().size()) + " choices, expected " +
                     std::to_string(size));
    std::copy_n(choices.ids().data(), size, ids->typed_data());
    std::copy_n(choices.weights().data(), size, weights->typed_data());
  } catch (const std::exception& e) {
    return ffi::Error::InvalidArgument(e.what());
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(route_handler, route,
                       ffi::Ffi::Bind()
                           .Attr<std::int64_t>("router")
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::PRED>>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Arg<ffi::BufferR1<ffi::U32>>()
                           .Ret<ffi::BufferR2<ffi::S32>>()
                           .Ret<ffi::BufferR2<ffi::F32>>());

}  // namespace

void moeroute_python::bind_jax(nb::module_& m) {
  m.def("_jax_route", [] { return nb::capsule(reinterpret_cast<void*>(route_handler)); });
  m.def(
      "_jax_number",
      [own = nb::object(m.attr("Router"))](nb::object router) {
        if (!nb::isinstance(router, own))
          refuse("moeroute::jax.route: router is " + kind_of(router) + ", expected a Router");
        return number_of(std::move(router));
      },
      nb::arg("router").none());
}
