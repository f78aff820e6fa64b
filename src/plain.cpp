// What needs no registers: handles that hold data, descriptions, capacity, layouts, bias updates.
#include "handles.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include <moeroute/data/expert_load.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/plan_layouts.hpp>

#include "spec.hpp"

extern "C" const moeroute::sets::plain_code moeroute_plain;

namespace moeroute::sets {

namespace {

static_assert(int(capacity_formula::soft_moe) == MOEROUTE_CAPACITY_SOFT_MOE);

template <class Handle>
Handle* make(handle_kind kind) {
  auto* const made = new Handle{};
  made->kind = kind;
  return made;
}
template <class Handle>
void free_handle(Handle* h) {
  delete h;
}

const char* model_name(std::int32_t i) {
  return i >= 0 && i < std::ssize(catalog) ? catalog[i].name.data() : nullptr;
}

bool spec_of_model(const char* name, moeroute_spec& out) {
  if (*name != '\0') moeroute::spec_of_model(name);  // refuses what is not there
  const catalog_entry* const entry = find_in_catalog(name);
  if (entry != nullptr && !compiled::can_describe(entry->spec))
    fail("spec_of_model", "'" + std::string(name) +
                              "' has words that the compiled library does not have: make_router() "
                              "or make_rare_router() of the headers makes it");
  out = c_spec_of(entry == nullptr ? router_spec{} : entry->spec);
  return entry != nullptr;
}

void spec_capacity(const moeroute_spec& s, moeroute_capacity& out) {
  const router_spec spec = router_spec_of(s);
  check(spec);
  const capacity_policy policy = capacity_of(spec);
  out = {};
  out.formula = static_cast<std::int32_t>(policy.rule.formula);
  out.order = static_cast<std::int32_t>(policy.order);
  out.factor = policy.rule.factor;
  out.count = policy.rule.count;
  out.minimum = policy.rule.minimum;
  out.multiple = policy.rule.multiple;
  out.renormalize = static_cast<std::int32_t>(policy.renormalize);
  out.eps = policy.eps;
}

void assignment_set(moeroute_assignment& a, std::int64_t tokens, std::int64_t experts,
                    std::int64_t k, const std::int32_t* ids, const float* weights) {
  constexpr const char* where = "assignment_set";
  check_range(where, "tokens", tokens, 0, std::int32_t{0x7fffffff});
  check_range(where, "experts", experts, 1, max_experts);
  check_range(where, "k", k, 1, experts);
  const auto given = span_of(ids, tokens * k);
  for (std::size_t c = 0; c < given.size(); ++c)
    if (given[c] < no_expert || given[c] >= experts)
      fail(where, "ids[" + std::to_string(c) + "] is " + std::to_string(given[c]) +
                      ", expected -1 to " + std::to_string(experts - 1));
  const auto weighed = span_of(weights, tokens * k);
  for (std::size_t c = 0; c < weighed.size(); ++c)
    if (given[c] != no_expert && !std::isfinite(weighed[c]))
      fail(where, "weights[" + std::to_string(c) + "] is " + std::to_string(weighed[c]) +
                      ", expected a finite number");
  a.choices.reset(tokens, experts, k);
  std::copy(given.begin(), given.end(), a.choices.ids().begin());
  for (std::size_t c = 0; c < weighed.size(); ++c)
    a.choices.weights()[c] = given[c] == no_expert ? 0.0f : weighed[c];
}

void assignment_get(const moeroute_assignment& a, moeroute_assignment_view& v) {
  const assignment& c = a.choices;
  v = {};
  v.tokens = c.tokens();
  v.experts = c.experts();
  v.k = c.k();
  v.choices = c.choices();
  v.ids = c.ids().data();
  v.weights = c.weights().data();
  v.offsets = c.ragged() ? c.offsets().data() : nullptr;
  v.kept = c.drops() ? c.kept().data() : nullptr;
}

capacity_policy policy_of(const moeroute_capacity& c, index_t tokens) {
  constexpr const char* where = "apply_capacity";
  return {.rule = {.formula = enum_of(where, "formula", c.formula, capacity_formula::soft_moe),
                   .factor = c.factor,
                   .count = c.count,
                   .minimum = c.minimum,
                   .multiple = c.multiple == 0 ? 1 : c.multiple},
          .order = enum_of(where, "order", c.order, drop_order::random),
          .renormalize = enum_of(where, "renormalize", c.renormalize, renormalization::after_drop),
          .eps = c.eps,
          .priority = span_of(c.priority, tokens),
          .seed = c.seed,
          .step = c.step};
}

void run_capacity(moeroute_assignment& a, const moeroute_capacity& c,
                  moeroute_capacity_result& out) {
  const capacity_result r =
      apply_capacity(a.choices, policy_of(c, a.choices.tokens()), a.workspace);
  out = {r.capacity, r.kept, r.dropped, r.unrouted};
}

void assignment_warm(moeroute_assignment& a) {
  // The order that takes the most scratch; flags for every choice that there is room for.
  a.workspace.carve([&](scratch& tape) {
    return moeroute::detail::capacity_memory::carve(tape, a.choices, drop_order::by_weight);
  });
  assignment& c = a.choices;
  const index_t tokens = c.tokens(), experts = c.experts(), most = c.k();
  if (c.ragged()) {
    // As many flags as there may be choices; then no choices.
    c.reset(tokens, experts, most);
    c.kept_to_fill();
    c.reset_ragged(tokens, experts, most);
    std::fill_n(c.to_fill().offsets, tokens + 1, 0);
    c.close();
  } else {
    c.kept_to_fill();
  }
}

void count(const moeroute_assignment& a, bool first_only, bool kept_only, const std::uint8_t* mask,
           double* counts, std::int64_t size) {
  count_choices(a.choices,
                {.basis = first_only ? count_basis::first_choice : count_basis::all_choices,
                 .drops = kept_only ? drop_stage::after_drop : drop_stage::before_drop,
                 .mask = span_of(mask, a.choices.tokens())},
                span_of(counts, size));
}

void once(const moeroute_assignment& a, std::int64_t ranks, std::int64_t ranks_per_node,
          std::int32_t* per_expert, std::int32_t* per_rank, std::uint8_t* in_rank,
          std::int32_t* per_node) {
  const assignment& c = a.choices;
  check_range("export_once_counts", "ranks", ranks, 1, c.experts());
  if (per_node != nullptr)
    check_range("export_once_counts", "ranks_per_node", ranks_per_node, 1, ranks);
  export_once_counts(
      c, {.tokens_per_expert = span_of(per_expert, c.experts()),
          .tokens_per_rank = span_of(per_rank, ranks),
          .token_in_rank = span_of(in_rank, c.tokens() * ranks),
          .tokens_per_node = span_of(per_node, per_node == nullptr ? 0 : ranks / ranks_per_node),
          .ranks_per_node = ranks_per_node});
}

void plan_get(const moeroute_plan& plan, moeroute_plan_view& v) {
  const dispatch_plan& p = plan.slots;
  v = {};
  v.tokens = p.tokens();
  v.experts = p.experts();
  v.k = p.k();
  v.choices = p.choices();
  v.slots = p.slots();
  v.kept = p.kept();
  v.dropped = p.dropped();
  v.elsewhere = p.elsewhere();
  v.unrouted = p.unrouted();
  v.offsets = p.offsets().data();
  v.loads = plan.loads.data();
  v.token_of_slot = p.token_of_slot().data();
  v.slot_of_choice = p.slot_of_choice().data();
}

void aligned_blocks(const moeroute_plan& plan, std::int64_t block, std::int32_t tail_expert,
                    std::int32_t* sorted, std::int64_t sorted_size, std::int32_t* block_experts,
                    std::int32_t* block_starts, std::int64_t blocks_size) {
  export_aligned_blocks(plan.slots, block,
                        {.sorted_choices = span_of(sorted, sorted_size),
                         .block_experts = span_of(block_experts, blocks_size),
                         .block_starts = span_of(block_starts, blocks_size),
                         .tail_expert = tail_expert});
}

void row_id_map(const moeroute_plan& plan, std::int32_t* map, std::int64_t size) {
  export_row_id_map(plan.slots, span_of(map, size));
}

void soft_plan_reserve(moeroute_soft_plan& plan, std::int64_t tokens, std::int64_t slots,
                       std::int64_t slots_per_expert) {
  plan.slots.reset(tokens, slots, slots_per_expert);
  plan.slots.reset(0, slots, slots_per_expert);  // nothing is planned yet
}

void soft_plan_get(const moeroute_soft_plan& plan, moeroute_soft_plan_view& v) {
  const soft_plan& p = plan.slots;
  v = {};
  v.tokens = p.tokens();
  v.slots = p.slots();
  v.slots_per_expert = p.slots_per_expert();
  v.dispatch = p.dispatch().data;
  v.combine = p.combine().data;
}

moeroute_bias* bias_new(std::int64_t experts, const moeroute_bias_options* o) {
  constexpr const char* where = "bias_controller";
  bias_options options;
  if (o != nullptr)
    options = {.rule = enum_of(where, "rule", o->rule, bias_rule::multiplicative),
               .error = enum_of(where, "error", o->error, bias_error::tokens),
               .decay = enum_of(where, "decay", o->decay, step_decay::inverse),
               .centre = enum_of(where, "centre", o->centre, bias_centre::mean),
               .step = o->step,
               .least_factor = o->least_factor};
  return new moeroute_bias(experts, options);
}

void bias_update(moeroute_bias& bias, const double* counts, std::int64_t size) {
  bias.controller.update(span_of(counts, size));
}

void bias_get(moeroute_bias& bias, float*& values, std::int64_t& experts) {
  values = bias.controller.bias().data();
  experts = std::ssize(bias.controller.bias());
}

}  // namespace

}  // namespace moeroute::sets

extern "C" const moeroute::sets::plain_code moeroute_plain = {
    moeroute::sets::model_name,
    moeroute::sets::spec_of_model,
    moeroute::sets::spec_capacity,
    [] {
      using namespace moeroute::sets;
      return make<moeroute_assignment>(handle_kind::assignment);
    },
    moeroute::sets::free_handle<moeroute_assignment>,
    moeroute::sets::assignment_set,
    moeroute::sets::assignment_get,
    moeroute::sets::assignment_warm,
    moeroute::sets::run_capacity,
    moeroute::sets::count,
    moeroute::sets::once,
    [] {
      using namespace moeroute::sets;
      return make<moeroute_plan>(handle_kind::plan);
    },
    moeroute::sets::free_handle<moeroute_plan>,
    moeroute::sets::plan_get,
    moeroute::sets::aligned_blocks,
    moeroute::sets::row_id_map,
    [] {
      using namespace moeroute::sets;
      return make<moeroute_soft_plan>(handle_kind::soft_plan);
    },
    moeroute::sets::free_handle<moeroute_soft_plan>,
    moeroute::sets::soft_plan_reserve,
    moeroute::sets::soft_plan_get,
    moeroute::sets::bias_new,
    moeroute::sets::free_handle<moeroute_bias>,
    moeroute::sets::bias_update,
    moeroute::sets::bias_get,
};
