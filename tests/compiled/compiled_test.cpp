#include <moeroute/compiled.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <limits>
#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "properties/hold.hpp"
#include "properties/isa.hpp"
#include "support/counting_new.hpp"

namespace {

namespace compiled = moeroute::compiled;
using Catch::Matchers::ContainsSubstring;
using moeroute::index_t;

template <class A, class B>
bool same_bits(const A& a, const B& b) {
  const auto bits = [](float w) { return std::bit_cast<std::uint32_t>(w); };
  return std::ranges::equal(a, b, {}, bits, bits);
}

// What a described router is given, drawn anew for every model.
struct inputs {
  std::vector<float> logits, bias, scale;
  std::vector<std::int32_t> table, token_ids;
  std::vector<std::uint8_t> mask;

  inputs(const moeroute::router_spec& spec, index_t tokens, std::mt19937& engine) {
    std::normal_distribution<float> normal;
    const auto experts = static_cast<std::size_t>(spec.experts);
    logits.resize(static_cast<std::size_t>(tokens * spec.columns()));
    for (float& x : logits) {
      x = 3.0f * normal(engine);
      if (engine() % 4 == 0) x = std::round(x);
      if (engine() % 50 == 0) x = std::numeric_limits<float>::quiet_NaN();
    }
    bias.resize(spec.selection_bias ? experts : 0);
    scale.resize(spec.per_expert_scale ? experts : 0);
    for (float& x : bias) x = 0.1f * normal(engine);
    for (float& x : scale) x = 1.0f + 0.1f * normal(engine);
    if (spec.selection == moeroute::selection_kind::expert_table)
      for (int id = 0; id < 50; ++id)
        for (index_t r = 0; r < spec.k; ++r)
          table.push_back(static_cast<std::int32_t>((7 * id + r) % spec.experts));
    for (index_t t = 0; t < tokens; ++t) {
      token_ids.push_back(static_cast<std::int32_t>(engine() % 50));
      mask.push_back(engine() % 8 != 0);
    }
  }
};

// The instruction sets of this machine, one after the other.
template <class F>
void on_every_isa(F&& f) {
  for (int i = 0; const char* isa = moeroute_isa_name(i); ++i) {
    INFO(isa);
    REQUIRE(moeroute_use_isa(isa) == MOEROUTE_OK);
    f();
  }
  REQUIRE(moeroute_use_isa(moeroute_isa_name(0)) == MOEROUTE_OK);
}

// Runs the pieces from the last to the first, as two threads might.
struct backwards {
  template <class Body>
  void operator()(std::int64_t n, std::int64_t grain, const Body& body) {
    for (std::int64_t begin = (n - 1) / grain * grain; begin >= 0; begin -= grain)
      body(begin, std::min(n, begin + grain));
  }
};

void check_same(const compiled::assignment& got, const moeroute::assignment& expected) {
  CHECK(std::ranges::equal(got.ids(), expected.ids()));
  CHECK(same_bits(got.weights(), expected.weights()));
  CHECK(std::ranges::equal(got.offsets(), expected.offsets()));
}

}  // namespace

TEST_CASE("the compiled library routes the catalogue as the headers do, bit by bit, on every set") {
  REQUIRE(std::string(moeroute_isa_name(0)) == moeroute_isa());
  std::mt19937 engine(11);
  int models = 0;
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    INFO(entry.name);
    const index_t tokens = 37;
    const inputs in(entry.spec, tokens, engine);
    moeroute::expert_table table;
    if (!in.table.empty())
      table = moeroute::expert_table(in.table, entry.spec.k, entry.spec.experts);
    const auto router =
        moeroute::make_router(entry.spec, {.bias = in.bias,
                                           .per_expert_scale = in.scale,
                                           .table = in.table.empty() ? nullptr : &table});
    moeroute::workspace workspace;
    moeroute::assignment expected;
    const bool by_id = !in.table.empty();
    moeroute::route(router,
                    moeroute::matrix_view<const float>(in.logits.data(), tokens, router.columns()),
                    {.token_ids = by_id ? std::span(in.token_ids) : std::span<const std::int32_t>(),
                     .mask = in.mask,
                     .seed = 3},
                    workspace, expected);

    REQUIRE(moeroute_model_name(models) == entry.name);
    ++models;
    const compiled::spec spec = compiled::spec_of_model(std::string(entry.name).c_str());
    on_every_isa([&] {
      const compiled::router got(
          spec, {.bias = in.bias, .per_expert_scale = in.scale, .table = in.table});
      REQUIRE(got.columns() == router.columns());
      compiled::side_inputs side{};
      if (by_id) side.token_ids = in.token_ids.data();
      side.mask = in.mask.data();
      side.seed = 3;
      compiled::assignment choices;
      backwards pool;
      compiled::route(got, {in.logits.data(), tokens, got.columns()}, side, choices, {pool, 2});
      check_same(choices, expected);
      if (got.ragged()) return;
      std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * got.k()));
      std::vector<float> weights(ids.size());
      REQUIRE(moeroute_route_to(
                  got.get(), compiled::const_rows(in.logits.data(), tokens, got.columns()), &side,
                  nullptr, choices.get(), ids.data(), weights.data()) == MOEROUTE_OK);
      CHECK(std::ranges::equal(ids, expected.ids()));
      CHECK(same_bits(weights, expected.weights()));
    });
  }
  CHECK(moeroute_model_name(models) == nullptr);
  CHECK(moeroute_model_name(-1) == nullptr);
}

TEST_CASE("rules that see the batch are those of the headers, bit by bit, on every set") {
  std::mt19937 engine(5);
  const index_t tokens = 96, experts = 12;
  const inputs in({.experts = experts}, tokens, engine);
  const moeroute::matrix_view<const float> z(in.logits.data(), tokens, experts);
  compiled::spec spec = compiled::plain_spec();
  spec.experts = experts;
  moeroute::workspace workspace;
  moeroute::assignment expected;
  const auto check_on_every_isa = [&] {
    on_every_isa([&] {
      compiled::assignment choices;
      compiled::route(compiled::router(spec), {in.logits.data(), tokens, experts}, choices);
      check_same(choices, expected);
    });
  };
  // The same by a spec of the headers.
  using moeroute::selection_kind;
  const auto check_described = [&](selection_kind rule, auto change) {
    moeroute::router_spec s = moeroute::plain_spec(rule);
    s.experts = experts;
    change(s);
    check(s);
    spec = compiled::describe(s);
    check_on_every_isa();
  };
  SECTION("expert choice") {
    spec.selection = MOEROUTE_EXPERT_CHOICE;
    spec.sequence_length = 32;
    spec.normalize = MOEROUTE_NORMALIZE_SUM;
    moeroute::route(moeroute::expert_choice<>{.normalize = moeroute::token_renormalization::sum,
                                              .sequence_length = 32},
                    z, workspace, expected);
    check_on_every_isa();
    check_described(selection_kind::expert_choice, [](moeroute::router_spec& s) {
      s.normalize = moeroute::normalization::sum;
      s.sequence = 32;
    });
    moeroute::route(
        moeroute::expert_choice<>{
            .capacity = {.factor = 1.3, .multiple_of = 3}, .scale = 2.5f, .most_experts = 2},
        z, workspace, expected);
    check_described(selection_kind::expert_choice, [](moeroute::router_spec& s) {
      s.take.factor = 1.3;
      s.take.multiple_of = 3;
      s.scale = 2.5f;
      s.max_k = 2;
    });
  }
  SECTION("Sinkhorn") {
    spec.selection = MOEROUTE_SINKHORN;
    moeroute::route(moeroute::sinkhorn{.k = 2}, z, workspace, expected);
    check_on_every_isa();
    check_described(selection_kind::sinkhorn, [](moeroute::router_spec&) {});
    moeroute::sinkhorn other{.k = 3, .weights = moeroute::plan_weights::plan};
    other.scaling.temperature = 0.5f;
    other.scaling.most_iterations = 7;
    moeroute::route(other, z, workspace, expected);
    check_described(selection_kind::sinkhorn, [&](moeroute::router_spec& s) {
      s.k = 3;
      s.plan_weights = other.weights;
      s.plan = other.scaling;
    });
  }
  SECTION("expert choice on a balanced plan") {
    spec.selection = MOEROUTE_SINKHORN_EXPERT_CHOICE;
    spec.scaling = 1;
    spec.plan_weights = 2;
    moeroute::route(moeroute::sinkhorn_expert_choice{.scaling = moeroute::kl_projection_scaling}, z,
                    workspace, expected);
    check_on_every_isa();
    check_described(selection_kind::sinkhorn_expert_choice,
                    [](moeroute::router_spec& s) { s.plan = moeroute::kl_projection_scaling; });
  }
  SECTION("selective Sinkhorn, on both sides of its coin") {
    spec.selection = MOEROUTE_SELECTIVE_SINKHORN;
    for (const float probability : {0.0f, 1.0f}) {
      spec.probability = probability;
      moeroute::route(moeroute::selective_sinkhorn{.k = 2, .probability = probability}, z,
                      workspace, expected);
      check_on_every_isa();
      check_described(selection_kind::selective_sinkhorn,
                      [&](moeroute::router_spec& s) { s.probability = probability; });
      spec = compiled::plain_spec();
      spec.experts = experts;
      spec.selection = MOEROUTE_SELECTIVE_SINKHORN;
    }
  }
  SECTION("BASE, trained and evaluated") {
    spec.selection = MOEROUTE_BASE;
    spec.k = 1;
    for (const int optimal : {0, 1}) {
      spec.optimal = optimal;
      moeroute::route(
          moeroute::base_assignment{.solver = static_cast<moeroute::assignment_solver>(optimal)}, z,
          workspace, expected);
      check_on_every_isa();
    }
    spec.evaluation = 1;
    moeroute::route(moeroute::base_assignment{.phase = moeroute::routing_phase::evaluation}, z,
                    workspace, expected);
    check_on_every_isa();
    check_described(selection_kind::base, [](moeroute::router_spec& s) {
      s.phase = moeroute::routing_phase::evaluation;
    });
    moeroute::route(moeroute::base_assignment{.solver = moeroute::assignment_solver::optimal}, z,
                    workspace, expected);
    check_described(selection_kind::base, [](moeroute::router_spec& s) {
      s.solver = moeroute::assignment_solver::optimal;
    });
  }
}

TEST_CASE("lists that experts chose have the plan and the sums of the headers, bit by bit") {
  const index_t tokens = 7, experts = 4, capacity = 3, d = 5;
  const std::vector<std::int32_t> token{4, 0, 2, 6, 4, -1, -1, -1, -1, 2, 1, 4};
  std::vector<float> weight(token.size()), x(static_cast<std::size_t>(tokens * d));
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = 0.1f + static_cast<float>(i) / 7.0f;
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 11) / 3.0f;
  moeroute::dispatch_plan expected;
  std::vector<float> by_choice(weight.size()), of_headers(x.size());
  moeroute::plan(moeroute::expert_lists{tokens, experts, capacity, token, weight}, expected,
                 {.block = 2}, by_choice);
  const auto choices = static_cast<std::size_t>(expected.choices());
  REQUIRE(choices == 8);
  std::vector<float> slots(static_cast<std::size_t>(expected.slots() * d));
  const moeroute::matrix_view<float> in(slots.data(), expected.slots(), d);
  moeroute::dispatch(moeroute::matrix_view<const float>(x.data(), tokens, d), expected, in);
  moeroute::combine(in, expected, std::span<const float>(by_choice).first(choices),
                    moeroute::matrix_view<float>(of_headers.data(), tokens, d));
  on_every_isa([&] {
    compiled::dispatch_plan plan;
    compiled::plan_options options{};
    options.block = 2;
    std::vector<float> weights(weight.size()), rows(slots.size()), y(x.size());
    const compiled::expert_lists lists{tokens, experts, capacity, token.data(), weight.data()};
    compiled::plan(lists, plan, options, weights);
    CHECK(std::ranges::equal(plan.offsets(), expected.offsets()));
    CHECK(std::ranges::equal(plan.slot_of_choice(), expected.slot_of_choice()));
    CHECK(std::ranges::equal(plan.token_of_slot(), expected.token_of_slot()));
    CHECK(same_bits(weights, by_choice));
    REQUIRE(plan.slots() == expected.slots());
    compiled::dispatch({x.data(), tokens, d}, plan, {rows.data(), plan.slots(), d});
    compiled::combine({rows.data(), plan.slots(), d}, plan,
                      std::span<const float>(weights).first(choices), {y.data(), tokens, d});
    CHECK(same_bits(y, of_headers));
    CHECK_THROWS_WITH(
        compiled::combine({rows.data(), plan.slots(), d}, plan,
                          std::span<const float>(weights).first(3), {y.data(), tokens, d}),
        ContainsSubstring("weights.size() is 3, expected 8"));
    CHECK_THROWS_WITH(compiled::plan(lists, plan, options, std::span<float>(weights).first(3)),
                      ContainsSubstring("less than lists.experts * capacity"));
  });
}

TEST_CASE("16-bit logits give what their values give as floats") {
  std::mt19937 engine(6);
  const index_t tokens = 20, experts = 64;
  const compiled::router router(compiled::spec_of_model("deepseek_v2"));
  REQUIRE(router.columns() >= experts);
  const index_t n = tokens * router.columns();
  std::vector<float> wide(static_cast<std::size_t>(n));
  std::vector<moeroute::bfloat16> narrow(wide.size());
  for (std::size_t i = 0; i < wide.size(); ++i) {
    narrow[i] = moeroute::bfloat16(static_cast<float>(engine() % 512) / 64.0f);
    wide[i] = static_cast<float>(narrow[i]);
  }
  compiled::assignment a, b;
  compiled::route(router, {wide.data(), tokens, router.columns()}, a);
  compiled::route(router, {narrow.data(), MOEROUTE_BFLOAT16, tokens, router.columns()}, b);
  CHECK(std::ranges::equal(a.ids(), b.ids()));
  CHECK(same_bits(a.weights(), b.weights()));
}

TEST_CASE("a step through the compiled library is the sum over the chosen experts") {
  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  const index_t tokens = 70, experts = 9, k = 3, d = 33, stride = 40;
  std::vector<float> x(static_cast<std::size_t>(tokens * stride)),
      w(static_cast<std::size_t>(experts * d));
  for (float& v : x) v = normal(engine);
  for (float& v : w) v = normal(engine);
  std::vector<float> bias(static_cast<std::size_t>(experts), 0.25f);
  compiled::spec spec = compiled::plain_spec();
  spec.experts = experts;
  spec.k = k;
  spec.capacity = 25;
  on_every_isa([&] {
    const compiled::gate_weight gate_weight({w.data(), experts, d}, bias);
    const compiled::router router(spec);
    compiled::assignment choices;
    compiled::dispatch_plan plan;
    std::vector<float> logits(static_cast<std::size_t>(tokens * experts));
    compiled::gate({x.data(), tokens, d, stride}, gate_weight, {logits.data(), tokens, experts});
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e) {
        double sum = 0.25;
        for (index_t c = 0; c < d; ++c)
          sum += static_cast<double>(x[static_cast<std::size_t>(t * stride + c)]) *
                 static_cast<double>(w[static_cast<std::size_t>(e * d + c)]);
        CHECK(std::abs(sum - static_cast<double>(
                                 logits[static_cast<std::size_t>(t * experts + e)])) < 1e-4);
      }
    backwards pool;
    compiled::route(router, {logits.data(), tokens, experts}, choices, {pool, 3});
    const auto result = compiled::apply_capacity(choices, compiled::capacity_of(spec));
    CHECK(result.kept + result.dropped == tokens * k);
    CHECK(result.capacity == 25);
    compiled::plan_options blocks{};
    blocks.block = 8;
    compiled::plan(choices, plan, blocks);
    CHECK(plan.counts().kept == result.kept);
    CHECK(plan.slots() % 8 == 0);
    std::vector<float> slots(static_cast<std::size_t>(plan.slots() * d), -1.0f), y(x.size());
    compiled::dispatch({x.data(), tokens, d, stride}, plan, {slots.data(), plan.slots(), d},
                       {pool, 3});
    // Expert e multiplies by e + 1.
    for (index_t e = 0; e < experts; ++e)
      for (index_t s = plan.offsets()[static_cast<std::size_t>(e)];
           s < plan.offsets()[static_cast<std::size_t>(e) + 1]; ++s)
        for (index_t c = 0; c < d; ++c)
          slots[static_cast<std::size_t>(s * d + c)] *= static_cast<float>(e + 1);
    compiled::combine({slots.data(), plan.slots(), d}, plan, choices, {y.data(), tokens, d, stride},
                      {pool, 3});
    for (index_t t = 0; t < tokens; ++t) {
      float factor = 0.0f;
      for (index_t r = 0; r < k; ++r) {
        const auto c = static_cast<std::size_t>(t * k + r);
        factor += choices.weights()[c] * static_cast<float>(choices.ids()[c] + 1);
      }
      for (index_t c = 0; c < d; ++c)
        CHECK(std::abs(y[static_cast<std::size_t>(t * stride + c)] -
                       factor * x[static_cast<std::size_t>(t * stride + c)]) < 1e-4f);
    }

    // The same from one row per choice, in the order of the choices.
    std::vector<float> by_choice(static_cast<std::size_t>(tokens * k * d)), again(y.size());
    for (std::size_t c = 0; c < plan.slot_of_choice().size(); ++c)
      if (const std::int32_t s = plan.slot_of_choice()[c]; s >= 0)
        std::copy_n(slots.begin() + s * d, d, by_choice.begin() + static_cast<index_t>(c) * d);
    compiled::combine({by_choice.data(), tokens * k, d}, choices, {again.data(), tokens, d, stride},
                      {pool, 3});
    CHECK(same_bits(again, y));

    // The arrays that other kernels read name every kept choice once.
    std::vector<std::int32_t> sorted(static_cast<std::size_t>(plan.slots())),
        of_block(sorted.size() / 8 + 2), starts(of_block.size());
    REQUIRE(moeroute_plan_aligned_blocks(plan.get(), 8, 77, sorted.data(), std::ssize(sorted),
                                         of_block.data(), starts.data(),
                                         std::ssize(of_block)) == MOEROUTE_OK);
    CHECK(std::count(of_block.begin(), of_block.end(), 77) == 2);  // behind the last block
    CHECK((of_block.back() == 77 && *(of_block.end() - 2) == 77));
    std::set<std::int32_t> named;
    for (const std::int32_t c : sorted)
      if (c < tokens * k) CHECK(named.insert(c).second);
    CHECK(std::ssize(named) == result.kept);

    // Quantised rows are moved as they are.
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(tokens * 5)),
        moved(static_cast<std::size_t>(plan.slots() * 5));
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(i);
    compiled::dispatch({bytes.data(), MOEROUTE_BYTES, tokens, 5}, plan,
                       {moved.data(), MOEROUTE_BYTES, plan.slots(), 5});
    for (index_t s = 0; s < plan.slots(); ++s) {
      const index_t t = plan.token_of_slot()[static_cast<std::size_t>(s)];
      CHECK(moved[static_cast<std::size_t>(5 * s)] ==
            (t < 0 ? 0 : bytes[static_cast<std::size_t>(5 * t)]));
    }
  });
}

TEST_CASE("soft mixtures, losses and biases answer on every set") {
  std::mt19937 engine(8);
  std::normal_distribution<float> normal;
  const index_t tokens = 24, experts = 6, d = 10;
  std::vector<float> z(static_cast<std::size_t>(tokens * experts)),
      x(static_cast<std::size_t>(tokens * d));
  for (float& v : z) v = normal(engine);
  for (float& v : x) v = normal(engine);
  compiled::spec spec = compiled::plain_spec();
  spec.experts = experts;
  on_every_isa([&] {
    compiled::soft_plan soft;
    compiled::plan_soft({z.data(), tokens, experts}, 2, soft);
    for (index_t s = 0; s < experts; ++s) {
      float sum = 0.0f;
      for (index_t t = 0; t < tokens; ++t) sum += soft.view().dispatch[s * tokens + t];
      CHECK(std::abs(sum - 1.0f) < 1e-5f);
    }
    std::vector<float> slots(static_cast<std::size_t>(experts * d)), y(x.size());
    compiled::dispatch({x.data(), tokens, d}, soft, {slots.data(), experts, d});
    compiled::combine({slots.data(), experts, d}, soft, {y.data(), tokens, d});
    CHECK(std::ranges::all_of(y, [](float v) { return std::isfinite(v); }));

    const compiled::router router(spec);
    compiled::assignment choices;
    compiled::route(router, {z.data(), tokens, experts}, choices);
    compiled::losses what{};
    what.switch_coefficient = 0.01;
    what.z_coefficient = 0.001;
    what.sequence_coefficient = 0.1;
    what.sequence_length = 8;
    std::vector<float> dz(z.size());
    const auto losses = compiled::balance_loss(what, {z.data(), tokens, experts}, choices,
                                               {dz.data(), tokens, experts});
    CHECK(losses.switch_loss > 0.009);
    CHECK(losses.z_loss > 0.0);
    CHECK(losses.sequence_loss > 0.09);
    // The gradient is that of the sum, by finite differences.
    const double h = 1e-2;
    for (const std::size_t i : {std::size_t{0}, std::size_t{17}, z.size() - 1}) {
      const auto sum_at = [&](double shift) {
        std::vector<float> moved = z;
        moved[i] += static_cast<float>(shift);
        const auto v = compiled::balance_loss(what, {moved.data(), tokens, experts}, choices);
        return v.switch_loss + v.z_loss + v.sequence_loss;
      };
      CHECK(std::abs((sum_at(h) - sum_at(-h)) / (2 * h) - static_cast<double>(dz[i])) < 1e-5);
    }

    std::vector<double> counts(static_cast<std::size_t>(experts));
    REQUIRE(moeroute_count_choices(choices.get(), 0, 0, nullptr, counts.data(), experts) ==
            MOEROUTE_OK);
    compiled::bias bias(experts);
    bias.update(counts);
    const double mean = 2.0 * tokens / experts;
    for (std::size_t e = 0; e < counts.size(); ++e) {
      const float expected = counts[e] < mean ? 1e-3f : counts[e] > mean ? -1e-3f : 0.0f;
      CHECK(bias.values()[e] == expected);
    }
  });
}

TEST_CASE("capacity through the face is that of the headers, whatever field says it") {
  const index_t tokens = 60, experts = 5, k = 2;
  std::vector<std::int32_t> ids;
  std::vector<float> weights, priority;
  std::mt19937 engine(29);
  for (index_t c = 0; c < tokens * k; ++c) {
    const auto first = static_cast<std::int32_t>(engine() % 5);
    ids.push_back(c % k == 0 ? first : (ids.back() + 1 + first % 4) % 5);
    weights.push_back(static_cast<float>(engine() % 100) / 128.0f);
  }
  for (index_t t = 0; t < tokens; ++t) priority.push_back(static_cast<float>(engine() % 50));
  const auto agrees = [&](const moeroute::capacity_policy& policy) {
    moeroute::assignment expected;
    expected.reset(tokens, experts, k);
    std::ranges::copy(ids, expected.ids().begin());
    std::ranges::copy(weights, expected.weights().begin());
    moeroute::workspace ws;
    const moeroute::capacity_result by = moeroute::apply_capacity(expected, policy, ws);
    compiled::capacity said{};
    said.formula = static_cast<std::int32_t>(policy.rule.formula);
    said.order = static_cast<std::int32_t>(policy.order);
    said.factor = policy.rule.factor;
    said.count = policy.rule.count;
    said.minimum = policy.rule.minimum;
    said.multiple = policy.rule.multiple;
    said.renormalize = static_cast<std::int32_t>(policy.renormalize);
    said.eps = policy.eps;
    said.priority = policy.priority.data();
    said.seed = policy.seed;
    said.step = policy.step;
    compiled::assignment choices;
    choices.set(ids, weights, experts, k);
    const auto got = compiled::apply_capacity(choices, said);
    CHECK(by.dropped > 0);
    CHECK((got.capacity == by.capacity && got.kept == by.kept && got.dropped == by.dropped));
    CHECK(std::ranges::equal(choices.weights(), expected.weights()));
  };
  using enum moeroute::capacity_formula;
  using moeroute::drop_order;
  using moeroute::renormalization;
  for (const std::uint64_t seed : {0u, 1u})
    for (const std::uint64_t step : {0u, 1u, 2u})
      agrees({.rule = {.formula = fixed, .count = 9},
              .order = drop_order::random,
              .seed = seed,
              .step = step});
  agrees({.rule = {.formula = fixed, .count = 9},
          .order = drop_order::batch_priority,
          .priority = priority});
  agrees({.rule = {.formula = megatron, .factor = 0.4, .minimum = 11, .multiple = 4},
          .order = drop_order::token_major,
          .renormalize = renormalization::after_drop,
          .eps = 0.75f});
  agrees({.rule = {.formula = deepspeed, .factor = 0.5},
          .order = drop_order::by_weight,
          .renormalize = renormalization::before_drop});
}

TEST_CASE("a description of the headers is the same description here") {
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    INFO(entry.name);
    const compiled::spec named = compiled::spec_of_model(std::string(entry.name).c_str());
    const compiled::spec described = compiled::describe(entry.spec);
    CHECK(named.size == described.size);
    CHECK(std::ranges::equal(std::as_bytes(std::span(&named, 1)),
                             std::as_bytes(std::span(&described, 1))));
  }
}

TEST_CASE("a published router is that of the headers, or refused where a word would be lost") {
  std::mt19937 engine(12);
  moeroute::workspace workspace;
  std::vector<std::string> refused;
  for (const moeroute::catalog_entry& entry : moeroute::newer_catalog) {
    INFO(entry.name);
    const std::string name(entry.name);
    if (entry.spec.has_rare_words()) {
      refused.push_back(name);
      CHECK_THROWS_WITH(compiled::spec_of_model(name.c_str()),
                        ContainsSubstring("moeroute::spec_of_model: '" + name + "' has words"));
      CHECK_THROWS_WITH(compiled::describe(entry.spec), ContainsSubstring("has words"));
      continue;
    }
    const index_t tokens = 9;
    const inputs in(entry.spec, tokens, engine);
    moeroute::assignment expected;
    moeroute::route(
        moeroute::make_router(entry.spec, {.bias = in.bias, .per_expert_scale = in.scale}),
        moeroute::matrix_view<const float>(in.logits.data(), tokens, entry.spec.columns()),
        workspace, expected);
    const compiled::router got(compiled::spec_of_model(name.c_str()),
                               {.bias = in.bias, .per_expert_scale = in.scale});
    compiled::assignment choices;
    compiled::route(got, {in.logits.data(), tokens, got.columns()}, choices);
    check_same(choices, expected);
  }
  CHECK(refused == std::vector<std::string>{"kolibri1", "deepseek_v4_vision", "pangu_pro",
                                            "intern_s1_pro", "grove_moe", "skywork_moe"});
}

TEST_CASE("a spec is described whole or not at all") {
  using moeroute::selection_kind;
  CHECK(compiled::can_describe(moeroute::router_spec{}));
  CHECK(compiled::can_describe(moeroute::router_spec{.selection = selection_kind::random}));
  for (const moeroute::router_spec& spec : {
           moeroute::router_spec{.score = moeroute::score_kind::softplus},
           moeroute::router_spec{.selection = selection_kind::sparse_transport},
           moeroute::router_spec{.selection = selection_kind::sinkhorn, .plan = {.eps = 1e-3f}},
           moeroute::router_spec{.score = moeroute::score_kind::relu,
                                 .selection = selection_kind::expert_choice},
           moeroute::router_spec{.selection = selection_kind::expert_choice,
                                 .take = {.at_least = 2}},
           moeroute::router_spec{.selection = selection_kind::soft},
           moeroute::router_spec{.groups = 2, .group_score = moeroute::group_score::sum},
           moeroute::router_spec{.groups = 2, .lost_weight = moeroute::lost_weight::zero},
           moeroute::router_spec{.second = moeroute::second_expert::random},
           moeroute::router_spec{.table_key = moeroute::table_key::bigram},
           moeroute::router_spec{.first_keys = 4},
           moeroute::router_spec{.standardize = 1.0f},
           moeroute::router_spec{.noise = moeroute::noise_kind::gumbel},
           moeroute::router_spec{.explore = 0.1f},
       })
    CHECK_THROWS_WITH(compiled::describe(spec),
                      ContainsSubstring("moeroute::describe: the spec has words"));
}

TEST_CASE("what was reserved runs without an allocation") {
  std::mt19937 engine(9);
  const index_t tokens = 300, d = 16;
  std::vector<float> bias(256);
  compiled::spec threshold = compiled::plain_spec();
  threshold.experts = 48;
  threshold.k = 48;
  threshold.score = MOEROUTE_RELU;
  threshold.selection = MOEROUTE_THRESHOLD;
  threshold.threshold = 5.0f;
  for (const compiled::spec& spec : {compiled::spec_of_model("deepseek_v3"), threshold}) {
    const compiled::router router =
        spec.selection_bias ? compiled::router(spec, {.bias = bias}) : compiled::router(spec);
    std::vector<float> z(static_cast<std::size_t>(tokens * router.columns())),
        x(static_cast<std::size_t>(tokens * d)), y(x.size());
    for (float& v : z) v = static_cast<float>(engine() % 1000) / 100.0f;
    std::vector<float> slots(
        static_cast<std::size_t>((tokens * router.k() + router.experts() * 3) * d));
    compiled::assignment choices;
    compiled::dispatch_plan plan;
    compiled::plan_options options{};
    options.block = 4;
    choices.reserve(router, tokens);
    plan.reserve(choices, options);
    CHECK(plan.slots() == 0);
    compiled::capacity capacity{};
    capacity.formula = MOEROUTE_CAPACITY_FIXED;
    capacity.count = 9;
    capacity.factor = 1.0;
    index_t dropped = 0;
    const long before = test::allocations();
    for (const index_t n : {tokens, index_t{1}, index_t{170}}) {
      compiled::route(router, {z.data(), n, router.columns()}, choices);
      dropped += compiled::apply_capacity(choices, capacity).dropped;
      compiled::plan(choices, plan, options);
      compiled::dispatch({x.data(), n, d}, plan, {slots.data(), plan.slots(), d});
      compiled::combine({slots.data(), plan.slots(), d}, plan, choices, {y.data(), n, d});
    }
    const long after = test::allocations();
    CHECK(after == before);
    CHECK(dropped > 0);
  }

  // A rule that tosses a coin has room for both of its sides.
  compiled::spec coin = compiled::plain_spec();
  coin.selection = MOEROUTE_SELECTIVE_SINKHORN;
  coin.probability = 0.5f;
  const compiled::router router(coin);
  std::vector<float> z(64 * 8);
  for (float& v : z) v = static_cast<float>(engine() % 1000) / 100.0f;
  compiled::assignment choices;
  choices.reserve(router, 64);
  const long before = test::allocations();
  for (std::uint64_t step = 0; step < 16; ++step) {
    compiled::side_inputs side{};
    side.step = step;
    compiled::route(router, {z.data(), 64, 8}, side, choices);
  }
  const long after = test::allocations();
  CHECK(after == before);
}

TEST_CASE("what does not fit is refused by name, and nothing of it is done") {
  compiled::spec spec = compiled::plain_spec();
  const compiled::router router(spec);
  compiled::assignment choices;
  std::vector<float> z(64);
  CHECK_THROWS_WITH(compiled::route(router, {z.data(), 4, 7}, choices),
                    ContainsSubstring("logits.cols is 7, expected 8"));
  CHECK_THROWS_WITH(compiled::route(router, {z.data(), 4, 8, 3}, choices),
                    ContainsSubstring("logits.stride is 3, expected at least 8"));
  CHECK_THROWS_WITH(compiled::route(router, {z.data(), -4, 8}, choices),
                    ContainsSubstring("logits.rows is -4"));
  CHECK_THROWS_WITH(compiled::route(router, {static_cast<const float*>(nullptr), 4, 8}, choices),
                    ContainsSubstring("logits.data is null, expected 4 rows"));
  CHECK_THROWS_WITH(compiled::spec_of_model("gpt_9"),
                    ContainsSubstring("'gpt_9' is not in the catalogue: docs/models.md"));
  CHECK_THROWS_WITH(compiled::spec_of_model("DeepSeek-V3"),
                    ContainsSubstring("did you mean 'deepseek_v3'?"));
  CHECK_THROWS_WITH(compiled::gate_weight({z.data(), 8, 8}, std::span(z).first(7)),
                    ContainsSubstring("gate_new: bias_size is 7, expected weight.rows = 8"));
  {
    // What is moved as bytes is counted in what it was given in.
    compiled::route(router, {z.data(), 4, 8}, choices);
    compiled::dispatch_plan plan;
    CHECK_THROWS_WITH(compiled::dispatch({z.data(), 4, 2}, plan, {z.data() + 8, 8, 2}),
                      ContainsSubstring("dispatch: the plan has no tokens"));
    compiled::plan(choices, plan);
    CHECK_THROWS_WITH(compiled::dispatch({z.data(), 4, 2}, plan, {z.data() + 8, 8, 3}),
                      ContainsSubstring("moeroute::dispatch: slots.cols is 3, expected 2"));
    std::vector<std::int32_t> ids(8);
    std::vector<float> weights(8);
    compiled::route_to(router, {z.data(), 4, 8}, choices, ids, weights);
    CHECK(std::equal(ids.begin(), ids.end(), choices.ids().begin(), choices.ids().end()));
    CHECK(std::equal(weights.begin(), weights.end(), choices.weights().begin()));
    CHECK_THROWS_WITH(
        compiled::route_to(router, {z.data(), 4, 8}, choices, std::span(ids).first(7), weights),
        ContainsSubstring("route_to: ids and weights are not two lists of T * k values"));
  }
  spec.k = 9;
  CHECK_THROWS_WITH(compiled::router(spec), ContainsSubstring("k is 9, expected 1 to 8"));
  spec.k = 2;
  spec.score = 77;
  CHECK_THROWS_WITH(compiled::router(spec), ContainsSubstring("score is 77, expected 0 to 5"));
  spec = compiled::plain_spec();
  spec.selection = MOEROUTE_BASE;
  CHECK_THROWS_WITH(compiled::router(spec),
                    ContainsSubstring("k of MOEROUTE_BASE is 2, expected 1"));
  spec.k = 1;
  CHECK_THROWS_WITH(compiled::route(compiled::router(spec), {z.data(), 7, 8}, choices),
                    ContainsSubstring("tokens is 7, expected a multiple of experts = 8"));
  spec.rounds = -1;
  CHECK_THROWS_WITH(compiled::router(spec), ContainsSubstring("most_rounds is -1"));
  spec.rounds = 0;
  spec.optimal = 2;
  CHECK_THROWS_WITH(compiled::router(spec), ContainsSubstring("optimal is 2, expected 0 to 1"));
  spec = compiled::plain_spec();
  spec.selection = MOEROUTE_SELECTIVE_SINKHORN;
  spec.probability = 2.0f;
  CHECK_THROWS_WITH(compiled::router(spec), ContainsSubstring("probability is 2"));
  spec.selection = MOEROUTE_BASE + 1;
  CHECK_THROWS_WITH(compiled::router(spec), ContainsSubstring("selection is 105"));
  spec = compiled::spec_of_model("deepseek_v3");
  CHECK_THROWS_WITH(compiled::router(spec), ContainsSubstring("bias"));
  CHECK_THROWS_WITH(choices.set(std::vector<std::int32_t>{0, 9}, std::vector<float>{1, 1}, 8, 2),
                    ContainsSubstring("ids[1] is 9, expected -1 to 7"));

  compiled::route(router, {z.data(), 4, 8}, choices);
  CHECK(choices.ids().size() == 8);
  compiled::dispatch_plan plan;
  compiled::plan(choices, plan);
  CHECK(plan.slots() == 8);
  // What was refused half-way is nothing, and those who hold it see that.
  compiled::plan_options tight{};
  tight.capacity = 1;
  CHECK_THROWS_WITH(compiled::plan(choices, plan, tight),
                    ContainsSubstring("at most the capacity"));
  CHECK(plan.slots() == 0);
  CHECK(plan.slot_of_choice().empty());
  CHECK(plan.offsets().size() <= 1);
  compiled::plan(choices, plan);
  CHECK(plan.slots() == 8);
  const std::vector<std::int32_t> seven(4, 7);
  compiled::side_inputs wrong{};
  wrong.k_of_token = seven.data();
  CHECK_THROWS_WITH(compiled::route(router, {z.data(), 4, 8}, wrong, choices),
                    ContainsSubstring("k_of_token"));
  CHECK(choices.ids().empty());
  CHECK(choices.weights().empty());
  compiled::route(router, {z.data(), 4, 8}, choices);
  {
    std::vector<float> y(32);
    compiled::combine_options identity{};
    identity.identity_first = -1;
    identity.identity_end = 2;
    identity.x = compiled::const_rows(z.data(), 4, 8);
    CHECK_THROWS_WITH(
        compiled::combine({z.data(), 8, 8}, plan, choices, {y.data(), 4, 8}, {}, identity),
        ContainsSubstring("identity_first is -1, expected 0 to"));
  }
  std::vector<float> small(3);
  CHECK_THROWS_WITH(compiled::dispatch({z.data(), 4, 3}, plan, {small.data(), 1, 3}),
                    ContainsSubstring("slots.rows is 1, expected 8"));

  // A pool that leaves pieces out, and one that invents some.
  const compiled::spec wide = [] {
    compiled::spec s = compiled::plain_spec();
    s.experts = 4096;
    return s;
  }();
  std::vector<float> many(4096 * 64);
  const compiled::router big(wide);
  auto lazy = [](std::int64_t, std::int64_t grain, const auto& body) { body(0, grain); };
  CHECK_THROWS_WITH(compiled::route(big, {many.data(), 64, 4096}, choices, {lazy, 2}),
                    ContainsSubstring("is 16, expected 64"));
  auto wild = [](std::int64_t n, std::int64_t, const auto& body) { body(0, n + 16); };
  CHECK_THROWS_WITH(compiled::route(big, {many.data(), 64, 4096}, choices, {wild, 2}),
                    ContainsSubstring("is 0, expected 64"));
}

TEST_CASE("20,000 random specs route alike on every instruction set, bit by bit") {
  test::hold(test::isa_property, 20000);
}
