// Compiled once per instruction set, for one program.
#include <moeroute/balance/loss_chunk.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_load.hpp>
#include <moeroute/balance/loss_relu.hpp>
#include <moeroute/balance/loss_router.hpp>
#include <moeroute/balance/loss_selected.hpp>
#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/balance/loss_token.hpp>
#include <moeroute/data/expert_load.hpp>
#include <moeroute/data/routing_record.hpp>
#include <moeroute/metrics/committee.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>
#include <moeroute/stage/weigh.hpp>
#include <span>
#include <string>
#include <vector>

#include "isa_kernels.hpp"

namespace {

using namespace moeroute;

// A score that says for whom the code that asks for it was compiled.
struct witness : elementwise_score<witness> {
  static inline std::string seen;
  template <class A>
  static simd::vfloat<A> value(simd::vfloat<A> z) {
    seen = A::name();
    return z;
  }
};

template <class Router>
void decide(const Router& router, const isa_input& in, isa_output& out) {
  workspace ws;
  assignment choices;
  dispatch_plan slots;
  const matrix_view<const float> logits(in.logits.data(), in.tokens, in.experts);
  route(router, logits, ws, choices);
  plan(choices, slots);
  // No matrices of Eigen: how they allocate depends on the flags, and the linker keeps one way.
  buffer<float> row_memory(slots.slots() * in.experts), y(in.tokens * in.experts);
  const matrix_view<float> rows(row_memory.data(), slots.slots(), in.experts);
  dispatch(logits, slots, rows);
  for (float& x : std::span<float>(row_memory))
    if (!(x > -1e30f && x < 1e30f)) x = 0.0f;
  combine(rows, slots, choices, matrix_view<float>(y.data(), in.tokens, in.experts));
  out.ids.insert(out.ids.end(), choices.ids().begin(), choices.ids().end());
  out.weights.insert(out.weights.end(), choices.weights().begin(), choices.weights().end());
  out.weights.insert(out.weights.end(), y.data(), y.data() + y.size());
}

// Losses and meters are not promised to agree between instruction sets, but each must be its own:
// shared_kernels looks at what they became.
void learn(const isa_input& in) {
  workspace ws;
  buffer<float> gradient(in.tokens * in.experts);
  const matrix_view<const float> z(in.logits.data(), in.tokens, in.experts);
  const matrix_view<float> dz(gradient.data(), in.tokens, in.experts);
  const std::vector<double> counts(static_cast<std::size_t>(in.experts), 1.0);
  balance_loss<float>({}, z, dz, ws, serial{}, switch_loss{.counts = counts}, router_z_loss{},
                      token_entropy_loss{});
  balance_loss<float>({}, z, dz, ws, serial{}, importance_loss{});
  chunk_sparsity<float>({.chunk = 2}, {}, z, dz, ws, serial{});
  relu_balance_loss<float>({}, {}, z, dz, ws, serial{});
  const float one = 1.0f;
  noisy_load_loss<float>({}, {}, z, z, {&one, 1, 1}, dz, ws, serial{});
  assignment choices;
  route(router{softmax{}, top_k{.k = 2}}, z, ws, choices);
  selected_importance_loss<float>({}, drop_stage::before_drop, {}, choices, z, dz, ws, serial{});
  apply_capacity(choices, {.rule = {.formula = capacity_formula::megatron}}, ws);
  entropy_meter().add(z);
  committee_meter(1, in.experts).add(0, z);
  load_meter(in.experts).add(choices);
  routing_record<std::uint8_t> record;
  record.record(choices);
  std::vector<float> weights(static_cast<std::size_t>(choices.choices()));
  weigh(router{softmax{}, top_k{.k = 2}}, z, {}, choices, std::span(weights), ws);
  std::vector<float16> halves(static_cast<std::size_t>(in.experts) + 3);
  simd::convert_row(in.logits.data(), in.experts, halves.data() + 3);
}

isa_output run(const isa_input& in) {
  isa_output out;
  decide(router{softmax{}, top_k{.k = 6}, sum_normalized}, in, out);
  decide(router{sigmoid{}, top_k{.k = 8, .groups = 8, .topk_group = 4}, sum_normalized,
                selection_bias(in.bias)},
         in, out);
  decide(expert_choice<>{}, in, out);
  decide(router{witness{}, top_k{.k = 2}}, in, out);
  learn(in);
  out.compiled_for = simd::default_arch::name();
  out.ran = witness::seen;
  return out;
}

}  // namespace

extern const isa_kernels MOEROUTE_LINK_TABLE;
const isa_kernels MOEROUTE_LINK_TABLE{run};
