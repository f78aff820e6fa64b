// The kernels for one instruction set: compiled once per set, with MOEROUTE_DISPATCH_ISA as its
// name. Everything in the object but its table is made local afterwards, so no inline function of
// one set can stand in for another's.
#include <algorithm>
#include <cstring>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/route.hpp>

#include "moeroute_dispatch.hpp"

namespace {

struct state {
  moeroute::any_router router;
  moeroute::workspace workspace;
  moeroute::assignment choices;
};

void* open(const void* spec_bytes, std::size_t spec_size, const float* bias, std::int64_t bias_size,
           const float* scale, std::int64_t scale_size) {
  moeroute::router_spec spec;
  moeroute::check_size("dispatch", "sizeof(router_spec)", static_cast<std::ptrdiff_t>(spec_size),
                       sizeof spec);
  std::memcpy(static_cast<void*>(&spec), spec_bytes, sizeof spec);
  if (spec.selection == moeroute::selection_kind::top_p ||
      spec.selection == moeroute::selection_kind::threshold)
    moeroute::fail("dispatch", "the router's k varies, expected a fixed k");
  moeroute::router_tensors tensors;
  tensors.bias = {bias, static_cast<std::size_t>(bias_size)};
  tensors.per_expert_scale = {scale, static_cast<std::size_t>(scale_size)};
  return new state{moeroute::make_router(spec, tensors), {}, {}};
}

void route(void* session, const float* logits, std::int64_t tokens, std::int64_t columns,
           std::int64_t stride, std::int32_t* ids, float* weights) {
  state& s = *static_cast<state*>(session);
  moeroute::route(s.router, moeroute::matrix_view<const float>(logits, tokens, columns, stride),
                  s.workspace, s.choices);
  std::copy(s.choices.ids().begin(), s.choices.ids().end(), ids);
  std::copy(s.choices.weights().begin(), s.choices.weights().end(), weights);
}

void close(void* session) { delete static_cast<state*>(session); }

}  // namespace

#define MOEROUTE_TEXT2(x) #x
#define MOEROUTE_TEXT(x) MOEROUTE_TEXT2(x)
#define MOEROUTE_JOIN2(a, b) a##b
#define MOEROUTE_JOIN(a, b) MOEROUTE_JOIN2(a, b)

extern "C" const moeroute::dispatch::kernels MOEROUTE_JOIN(moeroute_kernels_,
                                                           MOEROUTE_DISPATCH_ISA);
extern "C" const moeroute::dispatch::kernels MOEROUTE_JOIN(moeroute_kernels_,
                                                           MOEROUTE_DISPATCH_ISA) = {
    MOEROUTE_TEXT(MOEROUTE_DISPATCH_ISA), open, route, close};
