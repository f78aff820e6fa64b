// The one file that knows moeroute.
#include <moeroute/compiled.hpp>

#include "engine.hpp"

#include <vector>

namespace mr = moeroute::compiled;

struct moe::state {
  mr::router router;
  mr::gate_weight gate;
  std::int64_t width;
  mr::assignment choices{};
  mr::dispatch_plan plan{};
  std::vector<float> logits{}, in{}, out{};
};

static mr::tensors with_bias(const mr::spec& spec, const float* bias) {
  mr::tensors t;
  if (spec.selection_bias) t.bias = {bias, static_cast<std::size_t>(spec.experts)};
  return t;
}

moe::moe(const char* model, const float* gate, std::int64_t width, const float* bias) {
  const mr::spec spec = mr::spec_of_model(model);
  state_ = new state{mr::router(spec, with_bias(spec, bias)),
                     mr::gate_weight({gate, spec.experts, width}), width};
}

moe::~moe() { delete state_; }

std::int64_t moe::experts() const { return state_->router.experts(); }

void moe::operator()(const float* hidden, float* out, std::int64_t tokens) {
  state& s = *state_;
  const std::int64_t experts = s.router.experts();
  s.logits.resize(tokens * experts);
  mr::gate({hidden, tokens, s.width}, s.gate, {s.logits.data(), tokens, experts});
  mr::route(s.router, {s.logits.data(), tokens, experts}, s.choices);
  mr::plan(s.choices, s.plan);
  const std::int64_t slots = s.plan.slots();
  s.in.resize(slots * s.width);
  s.out.resize(slots * s.width);
  mr::dispatch({hidden, tokens, s.width}, s.plan, {s.in.data(), slots, s.width});
  for (std::int64_t e = 0; e < experts; ++e)
    if (const std::int64_t rows = s.plan.loads()[e]; rows > 0) {
      const std::int64_t first = s.plan.offsets()[e] * s.width;
      run_expert(static_cast<int>(e), s.in.data() + first, s.out.data() + first, rows, s.width);
    }
  mr::combine({s.out.data(), slots, s.width}, s.plan, s.choices, {out, tokens, s.width});
}
