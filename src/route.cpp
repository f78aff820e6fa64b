// Routers, routing and plans on one instruction set, and the set's table.
#include "set.hpp"

#include <memory>
#include <optional>
#include <variant>

#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>

#include "spec.hpp"

namespace {

using moeroute::index_t;

using batch_kinds = std::variant<moeroute::expert_choice<moeroute::softmax>,
                                 moeroute::expert_choice<moeroute::sigmoid>, moeroute::sinkhorn,
                                 moeroute::sinkhorn_expert_choice, moeroute::selective_sinkhorn,
                                 moeroute::base_assignment>;

}  // namespace

struct moeroute_router : moeroute::sets::handle {
  std::optional<moeroute::any_router> rows;  // one of the two
  std::optional<batch_kinds> batch;
  moeroute::expert_table table;
  moeroute_router_shape shape{};
};

namespace moeroute::sets {

namespace {

batch_kinds batch_router_of(const moeroute_spec& s) {
  constexpr const char* where = "router_spec";
  check_range(where, "selection", s.selection, MOEROUTE_EXPERT_CHOICE, MOEROUTE_BASE);
  const routing_phase phase =
      s.evaluation != 0 ? routing_phase::evaluation : routing_phase::training;
  if (s.selection == MOEROUTE_BASE) {
    check_size(where, "k of MOEROUTE_BASE", s.k, 1);
    base_assignment rule{
        .phase = phase, .solver = enum_of(where, "optimal", s.optimal, assignment_solver::optimal)};
    if (s.rounds != 0) rule.most_rounds = s.rounds;
    return rule;
  }
  const tokens_per_expert capacity{
      .factor = s.capacity_factor,
      .rounding = enum_of(where, "capacity_rounding", s.capacity_rounding, capacity_rounding::up),
      .multiple_of = s.capacity_multiple,
      .fixed = s.capacity};
  check_range(where, "scaling", s.scaling, 0, 1);
  const bool selective = s.selection == MOEROUTE_SELECTIVE_SINKHORN;
  sinkhorn_scaling scaling = s.scaling != 0 ? kl_projection_scaling
                             : selective    ? selective_scaling
                                            : megatron_scaling;
  if (s.plan_temperature != 0.0f) scaling.temperature = s.plan_temperature;
  if (s.plan_tolerance >= 0.0f) scaling.tolerance = s.plan_tolerance;
  if (s.plan_iterations != 0) scaling.most_iterations = s.plan_iterations;
  if (selective)
    return selective_sinkhorn{
        .k = s.k, .probability = s.probability, .phase = phase, .scaling = scaling};
  const plan_weights weights = enum_of(where, "plan_weights", s.plan_weights, plan_weights::plan);
  if (s.selection == MOEROUTE_SINKHORN)
    return sinkhorn{.k = s.k, .phase = phase, .weights = weights, .scaling = scaling};
  if (s.selection == MOEROUTE_SINKHORN_EXPERT_CHOICE)
    return sinkhorn_expert_choice{.capacity = capacity, .weights = weights, .scaling = scaling};
  const auto with = [&]<class Score>(Score) {
    return expert_choice<Score>{.capacity = capacity,
                                .normalize = static_cast<token_renormalization>(s.normalize),
                                .eps = s.eps,
                                .scale = s.scale,
                                .sequence_length = s.sequence_length,
                                .most_experts = s.most_experts};
  };
  check_range(where, "normalize", s.normalize, MOEROUTE_NORMALIZE_NONE, MOEROUTE_NORMALIZE_SUM);
  check_range(where, "score of expert choice", s.score, MOEROUTE_SOFTMAX, MOEROUTE_SIGMOID);
  if (s.score == MOEROUTE_SOFTMAX) return with(softmax{});
  return with(sigmoid{});
}

void make_batch_router(const moeroute_spec& s, const moeroute_tensors& t, moeroute_router& made) {
  constexpr const char* where = "router_spec";
  check_range(where, "experts", s.experts, 1, max_experts);
  check_size(where, "bias_size", t.bias_size, 0);
  check_size(where, "per_expert_scale_size", t.per_expert_scale_size, 0);
  check_size(where, "gamma_size", t.gamma_size, 0);
  check_size(where, "table_size", t.table_size, 0);
  made.batch = batch_router_of(s);
  std::visit([&](const auto& r) { r.check(0, s.experts); }, *made.batch);  // whatever T will be
  const bool capped = s.selection == MOEROUTE_EXPERT_CHOICE && s.most_experts > 0;
  made.shape = {s.experts, s.experts, capped ? s.most_experts : s.experts, 1, 0};
  if (s.selection == MOEROUTE_SINKHORN || s.selection == MOEROUTE_SELECTIVE_SINKHORN ||
      s.selection == MOEROUTE_BASE)
    made.shape = {s.experts, s.experts, s.k, 0, 0};
}

void make_row_router(const moeroute_spec& s, const moeroute_tensors& t, moeroute_router& made) {
  const router_spec spec = router_spec_of(s);
  check(spec);
  router_tensors tensors;
  tensors.bias = {t.bias, static_cast<std::size_t>(t.bias_size)};
  tensors.per_expert_scale = {t.per_expert_scale,
                              static_cast<std::size_t>(t.per_expert_scale_size)};
  tensors.gamma = {t.gamma, static_cast<std::size_t>(t.gamma_size)};
  if (t.table != nullptr) {
    made.table = expert_table({t.table, t.table + t.table_size}, spec.k, spec.experts);
    tensors.table = &made.table;
  }
  made.rows = make_router(spec, tensors);
  const index_t columns = spec.columns();
  made.rows->visit([&]<class Kind>(const Kind& kind) {
    kind.check(columns);
    made.shape = {columns, spec.experts, moeroute::detail::most_choices(kind, columns),
                  ragged_router<Kind>, t.table != nullptr};
  });
}

moeroute_router* router_new(const moeroute_spec& s, const moeroute_tensors& t) {
  auto made = std::make_unique<moeroute_router>();
  made->kind = handle_kind::router;
  made->set = &MOEROUTE_TABLE;
  if (s.selection >= MOEROUTE_EXPERT_CHOICE) {
    make_batch_router(s, t, *made);
  } else {
    make_row_router(s, t, *made);
  }
  return made.release();
}

void router_free(moeroute_router* router) { delete router; }

void router_shape(const moeroute_router& router, moeroute_router_shape& shape) {
  shape = router.shape;
}

void run_router(const moeroute_router& router, const moeroute_const_matrix& logits,
                const moeroute_side& side, const moeroute_executor* with,
                moeroute_assignment& out) {
  const side_inputs given{.token_ids = span_of(side.token_ids, logits.rows),
                          .mask = span_of(side.mask, logits.rows),
                          .k_of_token = span_of(side.k_of_token, logits.rows),
                          .seed = side.seed,
                          .step = side.step};
  const pool exec(with);
  try {
    if (router.rows) {
      return with_type(logits.type, [&]<class T>(T) {
        route(*router.rows, rows_of<T>(logits), given, out.workspace, out.choices, exec);
      });
    }
    check_size("route", "logits.cols", logits.cols, router.shape.columns);
    if (logits.type != MOEROUTE_FLOAT)
      fail("route", "logits are of 16 bits, expected float: the rule sees the whole batch");
    std::visit(
        [&](const auto& kind) {
          route(kind, rows_of<float>(logits), given, out.workspace, out.choices, exec);
        },
        *router.batch);
  } catch (...) {
    out.choices.reset(0, 1, 1);  // what was refused half-way is no assignment
    throw;
  }
}

// A dry run takes what a run takes. Of a rule that tosses a coin both sides are run.
void reserve_router(const moeroute_router& router, const moeroute_const_matrix& logits,
                    const moeroute_side& side, const moeroute_executor* with,
                    moeroute_assignment& out) {
  run_router(router, logits, side, with, out);
  reserve_losses(with, out);
  if (!router.batch) return;
  const auto* const coin = std::get_if<selective_sinkhorn>(&*router.batch);
  if (coin == nullptr || coin->phase == routing_phase::evaluation) return;
  for (const float probability : {0.0f, 1.0f}) {
    selective_sinkhorn one_side = *coin;
    one_side.probability = probability;
    route(one_side, rows_of<float>(logits), out.workspace, out.choices, pool(with));
  }
}

plan_options options_of(const moeroute_plan_options& o, index_t tokens, index_t experts) {
  return {.block = o.block == 0 ? 1 : o.block,
          .capacity = o.capacity == 0 ? as_needed : o.capacity,
          .padding = o.spare_tokens != 0 ? slot_padding::spare_tokens : slot_padding::empty,
          .owned = span_of(o.owned, experts),
          .mask = span_of(o.mask, tokens)};
}

// What a plan holds depends on the room of the assignment and on the options, not on the choices.
void plan_reserve(const moeroute_assignment& assignment, const moeroute_plan_options& o,
                  moeroute_plan& out) {
  const moeroute::assignment& choices = assignment.choices;
  const plan_options options = options_of(o, choices.tokens(), choices.experts());
  moeroute::detail::check_plan_options(options, choices.tokens(), choices.experts());
  const index_t room = choices.room();
  out.slots.reset(choices.tokens(), choices.experts(), choices.k(), room,
                  moeroute::detail::most_slots(room, choices.experts(), options));
  out.slots.loads_to_fill();
  if (choices.ragged()) {
    out.slots.first_to_fill();
    out.slots.token_of_choice();
  }
  out.loads.resize(choices.experts());
  out.slots.reset(0, 0, 0);  // nothing is planned yet
}

void plan_make(const moeroute_assignment& assignment, const moeroute_plan_options& o,
               moeroute_plan& out) {
  const moeroute::assignment& choices = assignment.choices;
  try {
    out.loads.resize(choices.experts());
    plan(choices, out.slots, options_of(o, choices.tokens(), choices.experts()));
  } catch (...) {
    out.slots.reset(0, 0, 0);  // what was refused is no plan
    throw;
  }
  for (index_t e = 0; e < choices.experts(); ++e)
    out.loads[e] = static_cast<std::int32_t>(out.slots.load(e));
}

void plan_of_lists(const moeroute_expert_lists& lists, const moeroute_plan_options& o,
                   float* weights, moeroute_plan& out) {
  const index_t n = lists.experts * lists.capacity;
  try {
    if (weights != nullptr && lists.weight == nullptr)
      fail("plan", "weights is given and lists.weight is null, expected both");
    out.loads.resize(lists.experts);
    plan(expert_lists{.tokens = lists.tokens,
                      .experts = lists.experts,
                      .capacity = lists.capacity,
                      .token = span_of(lists.token, n),
                      .weight = span_of(lists.weight, n)},
         out.slots, options_of(o, lists.tokens, lists.experts), span_of(weights, n));
  } catch (...) {
    out.slots.reset(0, 0, 0);
    throw;
  }
  for (index_t e = 0; e < lists.experts; ++e)
    out.loads[e] = static_cast<std::int32_t>(out.slots.load(e));
}

}  // namespace

}  // namespace moeroute::sets

extern "C" const moeroute::sets::kernels MOEROUTE_TABLE = {
    MOEROUTE_TEXT(MOEROUTE_SET),   moeroute::sets::router_new,    moeroute::sets::router_free,
    moeroute::sets::router_shape,  moeroute::sets::run_router,    moeroute::sets::reserve_router,
    moeroute::sets::gate_new,      moeroute::sets::gate_free,     moeroute::sets::gate_run,
    moeroute::sets::plan_make,     moeroute::sets::plan_of_lists, moeroute::sets::plan_reserve,
    moeroute::sets::dispatch_rows, moeroute::sets::combine_rows,  moeroute::sets::soft_plan_make,
    moeroute::sets::soft_dispatch, moeroute::sets::soft_combine,  moeroute::sets::loss_of,
};
