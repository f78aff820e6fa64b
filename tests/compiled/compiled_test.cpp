#include <moeroute/compiled.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_token.hpp>
#include <moeroute/base/version.hpp>
#include <moeroute/data/expert_load.hpp>
#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/plan_layouts.hpp>
#include <moeroute/stage/route.hpp>
#include <new>
#include <random>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../src/spec.hpp"
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

bool same_bytes(const compiled::spec& a, const compiled::spec& b) {
  return std::ranges::equal(std::as_bytes(std::span(&a, 1)), std::as_bytes(std::span(&b, 1)));
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

// A field of a struct of the C face and how each side says it. What is handed on is seen only where
// it is not the default, so each has a base that it changes something of.
template <class There, class Here>
struct said_field {
  const char* name;
  There base;
  std::function<void(Here&)> here;
  std::function<void(There&)> there;
  bool seen = true;  // the result depends on it
};
using spec_field = said_field<moeroute::router_spec, compiled::spec>;

template <class T>
void put(T& field, double value) {
  field = static_cast<T>(value);
}
template <class F>
spec_field alike(const char* name, const moeroute::router_spec& base, F change) {
  return {name, base, change, change};
}

// Gives every matrix of a call a stride of its own.
std::vector<float> strided(index_t rows, index_t stride, std::mt19937& engine) {
  std::vector<float> all(static_cast<std::size_t>(rows * stride));
  for (float& v : all) v = static_cast<float>(engine() % 997) / 331.0f - 1.0f;
  return all;
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

TEST_CASE("what a status becomes in C++, and which version this is") {
  CHECK_THROWS_AS(compiled::fail(MOEROUTE_NO_MEMORY), std::bad_alloc);
  CHECK_THROWS_AS(compiled::fail(MOEROUTE_FAILED), std::runtime_error);
  CHECK_THROWS_AS(compiled::fail(MOEROUTE_INVALID), std::invalid_argument);
  CHECK_THROWS_AS(compiled::refuse("a sentence"), std::invalid_argument);
  CHECK_THROWS_WITH(compiled::refuse("a sentence"), "a sentence");
  CHECK_NOTHROW(compiled::check(MOEROUTE_OK));
  CHECK_THROWS_AS(compiled::check(MOEROUTE_FAILED), std::runtime_error);
  CHECK(moeroute_version() == std::to_string(MOEROUTE_VERSION_MAJOR) + "." +
                                  std::to_string(MOEROUTE_VERSION_MINOR) + "." +
                                  std::to_string(MOEROUTE_VERSION_PATCH));
}

TEST_CASE("a handle has one owner, and lists of two sizes are refused before they are read") {
  compiled::assignment one, other;
  moeroute_assignment *const of_one = one.get(), *const of_other = other.get();
  one = std::move(other);
  CHECK((one.get() == of_other && other.get() == of_one));
  compiled::assignment last(std::move(one));
  CHECK((last.get() == of_other && one.get() == nullptr));

  const std::vector<std::int32_t> ids{0, 1, 2, 3};
  const std::vector<float> weights(4), z(16);
  CHECK_THROWS_WITH(last.set(ids, std::span(weights).first(3), 8, 2),
                    "moeroute::assignment_set: ids and weights are not two lists of T * k values");
  std::vector<std::int32_t> to_ids(6);
  std::vector<float> to_weights(6);
  const compiled::router router(compiled::plain_spec());
  CHECK_THROWS_WITH(compiled::route_to(router, {z.data(), 2, 8}, last, to_ids, to_weights),
                    "moeroute::route_to: ids and weights are not two lists of T * k values");
  const std::vector<std::int32_t> tokens{0, 1, 1, 2};
  compiled::expert_lists lists{};
  lists.tokens = 3;
  lists.experts = lists.capacity = 2;
  lists.token = tokens.data();
  lists.weight = weights.data();
  compiled::dispatch_plan plan;
  CHECK_THROWS_WITH(
      compiled::plan(lists, plan, {}, std::span(to_weights).first(3)),
      "moeroute::plan_make_of_lists: weights has less than lists.experts * capacity values");
}

TEST_CASE("a router says how many columns, experts and choices it has, and what else it needs") {
  const auto shape = [](compiled::spec spec, const compiled::tensors& tensors = {}) {
    const compiled::router r(spec, tensors);
    moeroute_router_shape s;
    REQUIRE(moeroute_router_get_shape(r.get(), &s) == MOEROUTE_OK);
    CHECK((r.columns() == s.columns && r.experts() == s.experts && r.k() == s.k));
    CHECK(r.ragged() == (s.ragged != 0));
    return std::vector<std::int64_t>{s.columns, s.experts, s.k, s.ragged, s.token_ids};
  };
  using numbers = std::vector<std::int64_t>;
  const auto plain = [](int selection, std::int64_t k = 2) {
    compiled::spec s = compiled::plain_spec();
    s.experts = 16;
    s.k = k;
    s.selection = selection;
    return s;
  };
  CHECK(shape(plain(MOEROUTE_TOP_K)) == numbers{16, 16, 2, 0, 0});
  compiled::spec mass = plain(MOEROUTE_TOP_P);
  mass.top_p = 0.5f;
  mass.max_k = 5;
  CHECK(shape(mass) == numbers{16, 16, 5, 1, 0});
  std::vector<std::int32_t> table;  // of ten token ids
  for (std::int32_t id = 0; id < 10; ++id) table.insert(table.end(), {id, id + 3});
  CHECK(shape(plain(MOEROUTE_EXPERT_TABLE), {.table = table}) == numbers{16, 16, 2, 0, 1});
  CHECK(shape(plain(MOEROUTE_EXPERT_CHOICE)) == numbers{16, 16, 16, 1, 0});
  compiled::spec capped = plain(MOEROUTE_EXPERT_CHOICE);
  capped.most_experts = 3;
  CHECK(shape(capped) == numbers{16, 16, 3, 1, 0});
  CHECK(shape(plain(MOEROUTE_SINKHORN, 3)) == numbers{16, 16, 3, 0, 0});
  CHECK(shape(plain(MOEROUTE_SELECTIVE_SINKHORN, 3)) == numbers{16, 16, 3, 0, 0});
  compiled::spec both = plain(MOEROUTE_SINKHORN_EXPERT_CHOICE);
  both.most_experts = 3;  // of expert choice alone
  both.plan_weights = 3;
  CHECK(shape(both) == numbers{16, 16, 16, 1, 0});
  CHECK(shape(plain(MOEROUTE_BASE, 1)) == numbers{16, 16, 1, 0, 0});

  // What varies has no table of k columns; what sees the batch takes floats of its own width.
  std::vector<float> z(64);
  std::vector<std::int32_t> ids(64);
  const compiled::router ragged(mass), batch(plain(MOEROUTE_SINKHORN));
  compiled::assignment choices;
  CHECK(moeroute_route_to(ragged.get(), compiled::const_rows(z.data(), 4, 16), nullptr, nullptr,
                          choices.get(), ids.data(), z.data()) == MOEROUTE_INVALID);
  CHECK(moeroute_last_error() == std::string("moeroute::route_to: the router's k varies, expected "
                                             "a fixed k: see moeroute_route"));
  CHECK_THROWS_WITH(compiled::route(batch, {z.data(), 4, 15}, choices),
                    "moeroute::route: logits.cols is 15, expected 16");
  CHECK_THROWS_WITH(
      compiled::route(batch, {z.data(), MOEROUTE_BFLOAT16, 4, 16}, choices),
      "moeroute::route: logits are of 16 bits, expected float: the rule sees the whole batch");
  // A table's router is reserved with ids, as it runs with them.
  const compiled::router by_id(plain(MOEROUTE_EXPERT_TABLE), {.table = table});
  choices.reserve(by_id, 4);
  choices.reserve(by_id, 4, MOEROUTE_BFLOAT16, 3);
  CHECK(choices.tokens() == 4);
  CHECK((choices.experts() == 16 && choices.k() == 2 && choices.choices() == 8));
}

TEST_CASE("rows of 16 bits go through gates, plans and mixtures as their values do as floats") {
  std::mt19937 engine(21);
  const index_t tokens = 21, experts = 6, d = 35;
  using moeroute::bfloat16;
  using moeroute::float16;
  struct rows {
    std::vector<float> wide;
    std::vector<bfloat16> brain;
    std::vector<float16> half;
    index_t count, cols;
    // Of values that all three types have.
    rows(index_t n, index_t c, std::mt19937& from) : count(n), cols(c) {
      for (index_t i = 0; i < n * c; ++i) {
        wide.push_back(static_cast<float>(from() % 255) / 64.0f - 2.0f);
        brain.push_back(bfloat16(wide.back()));
        half.push_back(float16(wide.back()));
      }
    }
    compiled::const_rows as(int type) const {
      const auto t = static_cast<moeroute_type>(type);
      if (t == MOEROUTE_BFLOAT16) return {brain.data(), t, count, cols};
      if (t == MOEROUTE_FLOAT16) return {half.data(), t, count, cols};
      return {wide.data(), count, cols};
    }
    compiled::rows to(int type) {
      const auto t = static_cast<moeroute_type>(type);
      if (t == MOEROUTE_BFLOAT16) return {brain.data(), t, count, cols};
      if (t == MOEROUTE_FLOAT16) return {half.data(), t, count, cols};
      return {wide.data(), count, cols};
    }
    // What stands in the rows of a type.
    std::vector<float> values(int type) const {
      std::vector<float> v = wide;
      for (std::size_t i = 0; i < v.size() && type != MOEROUTE_FLOAT; ++i)
        v[i] = static_cast<float>(type == MOEROUTE_BFLOAT16 ? static_cast<float>(brain[i])
                                                            : static_cast<float>(half[i]));
      return v;
    }
  };
  const rows x(tokens, d, engine), w(experts, d, engine), z(tokens, experts, engine);
  const std::vector<float> bias{0.5f, -1.0f, 2.0f, 0.25f, 0.0f, 1.0f};
  const auto furthest = [](const std::vector<float>& a, const std::vector<float>& b) {
    float most = a.size() == b.size() ? 0.0f : 1e9f;
    for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
      most = std::max(most, std::abs(a[i] - b[i]));
    return most;
  };
  // The same rounded as a type has it.
  const auto rounded = [](std::vector<float> v, int type) {
    for (float& one : v)
      one = type == MOEROUTE_BFLOAT16  ? static_cast<float>(bfloat16(one))
            : type == MOEROUTE_FLOAT16 ? static_cast<float>(float16(one))
                                       : one;
    return v;
  };
  compiled::spec spec = compiled::plain_spec();
  spec.experts = experts;
  on_every_isa([&] {
    std::vector<float> first_logits, first_cosines;
    for (int of_w = 0; of_w < 3; ++of_w)
      for (int of_x = 0; of_x < 3; ++of_x) {
        INFO("weights of type " << of_w << ", rows of type " << of_x);
        rows logits(tokens, experts, engine), cosines(tokens, experts, engine);
        compiled::gate(x.as(of_x), compiled::gate_weight(w.as(of_w), bias), logits.to(0));
        compiled::cosine_gate(x.as(of_x), compiled::gate_weight(w.as(of_w)), 2.0f, cosines.to(0));
        if (first_logits.empty()) {
          first_logits = logits.wide;
          first_cosines = cosines.wide;
        }
        CHECK(furthest(logits.wide, first_logits) < 1e-4f);
        CHECK(furthest(cosines.wide, first_cosines) < 1e-4f);
      }
    const compiled::router router(spec);
    compiled::assignment choices, again;
    compiled::dispatch_plan plan;
    compiled::soft_plan soft, soft_again;
    compiled::route(router, z.as(0), choices);
    compiled::plan(choices, plan);
    compiled::plan_soft(z.as(0), 2, soft);
    for (int of_z = 1; of_z < 3; ++of_z) {
      compiled::route(router, z.as(of_z), again);
      CHECK(std::ranges::equal(again.ids(), choices.ids()));
      CHECK(same_bits(again.weights(), choices.weights()));
      compiled::plan_soft(z.as(of_z), 2, soft_again);
      const auto list = [&](const compiled::soft_plan& p) {
        CHECK((p.view().tokens == tokens && p.view().slots == experts));
        return std::span(p.view().dispatch, static_cast<std::size_t>(tokens * experts));
      };
      CHECK(same_bits(list(soft_again), list(soft)));
    }
    rows slots(plan.slots(), d, engine), soft_slots(experts, d, engine);
    const rows terms = slots, soft_terms = soft_slots;
    rows y(tokens, d, engine), of_choices(tokens, d, engine), soft_y(tokens, d, engine);
    compiled::dispatch(x.as(0), plan, slots.to(0));
    compiled::dispatch(x.as(0), soft, soft_slots.to(0));
    compiled::combine(terms.as(0), plan, choices, y.to(0));
    compiled::combine(terms.as(0), choices, of_choices.to(0));
    compiled::combine(soft_terms.as(0), soft, soft_y.to(0));
    for (int from = 0; from < 3; ++from)
      for (int to = 0; to < 3; ++to) {
        INFO("from type " << from << " to type " << to);
        rows s = slots, q = soft_slots, r = y, c = of_choices, t = soft_y;
        if (from != to && from != 0 && to != 0) {
          const std::string two =
              "rows are of two 16-bit types, expected one of them to be float, or both the same";
          CHECK_THROWS_WITH(compiled::dispatch(x.as(from), plan, s.to(to)),
                            "moeroute::dispatch: " + two);
          CHECK_THROWS_WITH(compiled::dispatch(x.as(from), soft, q.to(to)),
                            "moeroute::soft_dispatch: dispatch: " + two);
          CHECK_THROWS_WITH(compiled::combine(terms.as(from), plan, choices, r.to(to)),
                            "moeroute::combine: " + two);
          CHECK_THROWS_WITH(compiled::combine(soft_terms.as(from), soft, t.to(to)),
                            "moeroute::soft_combine: combine: " + two);
          continue;
        }
        compiled::dispatch(x.as(from), plan, s.to(to));
        CHECK(s.values(to) == rounded(slots.wide, to));
        compiled::dispatch(x.as(from), plan, s.to(to), {}, choices.weights());
        compiled::combine(terms.as(from), plan, choices, r.to(to));
        CHECK(r.values(to) == rounded(y.wide, to));
        compiled::combine(terms.as(from), choices, c.to(to));
        CHECK(c.values(to) == rounded(of_choices.wide, to));
        compiled::dispatch(x.as(from), soft, q.to(to));
        CHECK(furthest(q.values(to), soft_slots.wide) < 0.02f);
        compiled::combine(soft_terms.as(from), soft, t.to(to));
        CHECK(furthest(t.values(to), soft_y.wide) < 0.02f);
      }
  });
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
    // Where each block begins without padding: an expert's tokens before it.
    const auto filled = static_cast<std::size_t>(plan.slots() / 8);
    for (std::size_t b = 0, of = 0, before = 0; b < filled; ++b) {
      const auto e = static_cast<std::size_t>(of_block[b]);
      if (b == 0 || e != static_cast<std::size_t>(of_block[b - 1])) {
        for (; of < e; ++of) before += static_cast<std::size_t>(plan.loads()[of]);
        CHECK(starts[b] == static_cast<std::int32_t>(before));
      } else {
        CHECK(starts[b] == starts[b - 1] + 8);
      }
    }

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

TEST_CASE("the pool that a call is given runs the call's loops") {
  const index_t tokens = 130, experts = 512, k = 2, slots = 32, d = 256;
  const auto zeros = [](index_t n) { return std::vector<float>(static_cast<std::size_t>(n)); };
  const std::vector<float> z = zeros(tokens * experts), x = zeros(tokens * d),
                           w = zeros(experts * d);
  std::vector<float> logits = zeros(tokens * experts), rows = zeros(tokens * k * d),
                     y = zeros(tokens * d), weights = zeros(tokens * k);
  std::vector<std::int32_t> ids(weights.size());
  int runs = 0;
  auto all_at_once = [&](std::int64_t n, std::int64_t, const auto& body) {
    ++runs;
    body(0, n);
  };
  const compiled::executor pool(all_at_once, 2);
  const auto run_by_it = [&](const char* call, auto f) {
    INFO(call);
    runs = 0;
    f();
    CHECK(runs > 0);
  };
  compiled::spec spec = compiled::plain_spec();
  spec.experts = experts;
  const compiled::router router(spec);
  const compiled::gate_weight gate_weight({w.data(), experts, d});
  const compiled::const_rows z_rows(z.data(), tokens, experts), x_rows(x.data(), tokens, d);
  const compiled::rows y_rows(y.data(), tokens, d), slot_rows(rows.data(), tokens * k, d),
      few_rows(rows.data(), slots, d), logit_rows(logits.data(), tokens, experts);
  compiled::assignment choices;
  compiled::dispatch_plan plan;
  compiled::soft_plan soft;
  compiled::losses what{};
  what.switch_coefficient = 1.0;
  run_by_it("gate", [&] { compiled::gate(x_rows, gate_weight, logit_rows, pool); });
  run_by_it("cosine_gate",
            [&] { compiled::cosine_gate(x_rows, gate_weight, 1.0f, logit_rows, pool); });
  run_by_it("route_to", [&] { compiled::route_to(router, z_rows, choices, ids, weights, pool); });
  run_by_it("route", [&] { compiled::route(router, z_rows, choices, pool); });
  compiled::plan(choices, plan);
  run_by_it("dispatch", [&] { compiled::dispatch(x_rows, plan, slot_rows, pool); });
  run_by_it("combine", [&] { compiled::combine(slot_rows, plan, choices, y_rows, pool); });
  run_by_it("combine by weights",
            [&] { compiled::combine(slot_rows, plan, choices.weights(), y_rows, pool); });
  run_by_it("combine by choices", [&] { compiled::combine(slot_rows, choices, y_rows, pool); });
  run_by_it("balance_loss",
            [&] { compiled::balance_loss(what, z_rows, choices, logit_rows, pool); });
  run_by_it("plan_soft",
            [&] { compiled::plan_soft({z.data(), tokens, slots, experts}, 1, soft, pool); });
  run_by_it("soft dispatch", [&] { compiled::dispatch(x_rows, soft, few_rows, pool); });
  run_by_it("soft combine", [&] { compiled::combine(few_rows, soft, y_rows, pool); });
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
    said.multiple = policy.rule.multiple == 1 ? 0 : policy.rule.multiple;
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
  agrees({.rule = {.formula = megatron, .factor = 0.4, .minimum = 14, .multiple = 4},
          .order = drop_order::token_major,
          .renormalize = renormalization::after_drop,
          .eps = 0.75f});
  agrees({.rule = {.formula = deepspeed, .factor = 0.5},
          .order = drop_order::by_weight,
          .renormalize = renormalization::before_drop});
}

TEST_CASE("every field of a description reaches the router of the library") {
  using moeroute::router_spec;
  using enum moeroute::selection_kind;
  using moeroute::normalization;
  using moeroute::score_kind;
  const router_spec plain{.experts = 12, .k = 3};
  const auto with = [&](auto change) {
    router_spec s = plain;
    change(s);
    return s;
  };
  const router_spec groups = with([](router_spec& s) { s.groups = 4, s.topk_group = 2; });
  const router_spec sums = with([](router_spec& s) {
    s.normalize = normalization::sum;
    s.eps_where = moeroute::eps_mode::add;
    s.eps = 0.25f;
  });
  const router_spec mass = with([](router_spec& s) { s.selection = top_p, s.top_p = 0.5f; });
  const router_spec gated = with([](router_spec& s) {
    s.score = score_kind::sigmoid;
    s.selection = threshold;
    s.threshold = 0.25f;
  });
  const router_spec bounded = with([](router_spec& s) {
    s.capacity = 9;
    s.normalize = normalization::sum;
  });
  const spec_field fields[] = {
      alike("experts", plain, [](auto& s) { put(s.experts, 16); }),
      alike("k", plain, [](auto& s) { put(s.k, 5); }),
      alike("score", plain, [](auto& s) { put(s.score, 1); }),
      {"score_selected", plain, [](auto& s) { s.score_selected = 1; },
       [](auto& s) { s.domain = moeroute::score_domain::selected; }},
      alike("selection", plain, [](auto& s) { put(s.selection, MOEROUTE_RANDOM); }),
      alike("selection_bias", plain, [](auto& s) { put(s.selection_bias, 1); }),
      alike("group_score", groups, [](auto& s) { put(s.group_score, MOEROUTE_GROUP_MAX); }),
      alike("groups", plain, [](auto& s) { put(s.groups, 4); }),
      alike("topk_group", groups, [](auto& s) { put(s.topk_group, 3); }),
      alike("group_fill", with([](router_spec& s) { s.groups = 4, s.selection_bias = true; }),
            [](auto& s) { put(s.group_fill, 0); }),
      alike("normalize", plain, [](auto& s) { put(s.normalize, 1); }),
      alike("lp_p", with([](router_spec& s) { s.normalize = normalization::lp; }),
            [](auto& s) { put(s.lp_p, 3); }),
      {"eps_mode", with([&](router_spec& s) { s = sums, s.eps = 2.0f; }),
       [](auto& s) { s.eps_mode = MOEROUTE_EPS_CLAMP; },
       [](auto& s) { s.eps_where = moeroute::eps_mode::clamp; }},
      alike("eps", sums, [](auto& s) { put(s.eps, 2); }),
      alike("scale", plain, [](auto& s) { put(s.scale, 3); }),
      {"scale_on_output", with([](router_spec& s) { s.scale = 3.0f; }),
       [](auto& s) { s.scale_on_output = 1; },
       [](auto& s) { s.scale_where = moeroute::scale_place::output; }},
      alike("divide_by_k", plain, [](auto& s) { put(s.divide_by_k, 1); }),
      alike("per_expert_scale", plain, [](auto& s) { put(s.per_expert_scale, 1); }),
      alike("softcap", plain, [](auto& s) { put(s.softcap, 2); }),
      alike("temperature", plain, [](auto& s) { put(s.temperature, 2); }),
      alike("jitter", with([](router_spec& s) { s.selection = sparsemixer, s.k = 2; }),
            [](auto& s) { put(s.jitter, 0.5); }),
      alike("top_p", mass, [](auto& s) { put(s.top_p, 0.875); }),
      alike("crossing", mass, [](auto& s) { put(s.crossing, 2); }),
      alike("min_k", mass, [](auto& s) { put(s.min_k, 4); }),
      alike("max_k", mass, [](auto& s) { put(s.max_k, 1); }),
      alike("threshold", gated, [](auto& s) { put(s.threshold, 0.75); }),
      alike("row_norm: sum", gated, [](auto& s) { put(s.row_norm, 1); }),
      alike("row_norm: rms", gated, [](auto& s) { put(s.row_norm, 2); }),
      alike("capacity", plain, [](auto& s) { put(s.capacity, 9); }),
      alike("drop_order", bounded, [](auto& s) { put(s.drop_order, MOEROUTE_DROP_BY_WEIGHT); }),
      {"normalize_after_drop", bounded, [](auto& s) { s.normalize_after_drop = 1; },
       [](auto& s) { s.normalize_before_drop = false; }},
      alike("eps after dropping", with([&](router_spec& s) {
              s = sums;
              s.eps_where = moeroute::eps_mode::clamp;
              s.capacity = 9;
              s.normalize_before_drop = false;
            }),
            [](auto& s) { put(s.eps, 2); }),
      // Of what comes before and after a router.
      {"output_scale", plain, [](auto& s) { s.output_scale = 2.0f; },
       [](auto& s) { s.output_scale = 2.0f; }, false},
      {"gate_bias", plain, [](auto& s) { s.gate_bias = 1; }, [](auto& s) { s.gate_bias = true; },
       false},
      {"zero_experts", plain, [](auto& s) { s.zero_experts = 2; },
       [](auto& s) { s.zero_experts = 2; }, false},
      {"shared_experts", plain, [](auto& s) { s.shared_experts = 2; },
       [](auto& s) { s.shared_experts = 2; }, false},
      {"weight_on_input", plain, [](auto& s) { s.weight_on_input = 1; },
       [](auto& s) { s.weight_on = moeroute::weight_place::input; }, false},
  };
  using bits = std::vector<std::uint32_t>;
  using answer = std::tuple<std::vector<std::int32_t>, bits, std::vector<std::int32_t>, int, int,
                            std::int64_t, int, float>;
  const auto answer_of = [](const auto& choices, const auto& c, int formula, std::int64_t count) {
    bits weights;
    for (const float w : choices.weights()) weights.push_back(std::bit_cast<std::uint32_t>(w));
    return answer({choices.ids().begin(), choices.ids().end()}, weights,
                  {choices.offsets().begin(), choices.offsets().end()}, formula,
                  static_cast<int>(c.order), count, static_cast<int>(c.renormalize), c.eps);
  };
  const index_t tokens = 40;
  std::vector<float> gamma;
  for (int e = 0; e < 12; ++e) gamma.push_back(0.5f + static_cast<float>(e) / 4.0f);
  moeroute::workspace workspace;
  for (const spec_field& field : fields) {
    INFO(field.name);
    router_spec there = field.base;
    field.there(there);
    compiled::spec here = compiled::describe(field.base);
    field.here(here);
    CHECK(same_bytes(here, compiled::describe(there)));
    CHECK(moeroute::sets::router_spec_of(here) == there);
    std::mt19937 engine(3);
    const inputs in(there, tokens, engine);
    const bool rms = there.row_norm == moeroute::threshold_norm::rms;
    const auto by_headers = [&](const router_spec& s) {
      moeroute::assignment choices;
      const auto lists = [](bool used, const std::vector<float>& list) {
        return used ? std::span(list) : std::span<const float>();
      };
      const auto router =
          moeroute::make_router(s, {.bias = lists(s.selection_bias, in.bias),
                                    .per_expert_scale = lists(s.per_expert_scale, in.scale),
                                    .gamma = lists(rms && s == there, gamma)});
      moeroute::route(router,
                      moeroute::matrix_view<const float>(in.logits.data(), tokens, s.columns()),
                      {.seed = 3}, workspace, choices);
      const moeroute::capacity_policy c = moeroute::capacity_of(s);
      return answer_of(choices, c, static_cast<int>(c.rule.formula), c.rule.count);
    };
    const answer expected = by_headers(there);
    if (field.seen) CHECK(expected != by_headers(field.base));
    const compiled::router router(here, {.bias = in.bias,
                                         .per_expert_scale = in.scale,
                                         .gamma = rms ? std::span(gamma) : std::span<float>()});
    compiled::assignment choices;
    compiled::side_inputs side{};
    side.seed = 3;
    compiled::route(router, {in.logits.data(), tokens, router.columns()}, side, choices);
    const compiled::capacity c = compiled::capacity_of(here);
    CHECK(answer_of(choices, c, c.formula, c.count) == expected);
    CHECK((c.factor == 1.0 && c.minimum == 0 && c.multiple == 1));
  }
  compiled::spec wrong = compiled::plain_spec();
  wrong.zero_experts = 8;
  CHECK_THROWS_WITH(compiled::router(wrong), ContainsSubstring("zero_experts is 8"));
  wrong = compiled::plain_spec();
  wrong.output_scale = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH(compiled::router(wrong), ContainsSubstring("output_scale is inf"));
}

TEST_CASE("every field of a rule over the batch, and every side input, reaches the library") {
  std::mt19937 engine(14);
  const index_t tokens = 96, experts = 12;
  const inputs in({.experts = experts}, tokens, engine);
  std::vector<std::int32_t> own;
  for (index_t t = 0; t < tokens; ++t) own.push_back(static_cast<std::int32_t>(t % 3));
  moeroute::workspace workspace;
  moeroute::side_inputs side_there{};
  compiled::side_inputs side_here{};
  const auto agrees = [&](const char* field, const auto& base, const auto& rule, auto change) {
    INFO(field);
    const moeroute::matrix_view<const float> z(in.logits.data(), tokens, experts);
    moeroute::assignment without, expected;
    moeroute::route(base, z, workspace, without);
    moeroute::route(rule, z, side_there, workspace, expected);
    CHECK_FALSE((std::ranges::equal(without.ids(), expected.ids()) &&
                 same_bits(without.weights(), expected.weights())));
    compiled::spec spec = compiled::plain_spec();
    spec.experts = experts;
    change(spec);
    compiled::assignment choices;
    compiled::route(compiled::router(spec), {in.logits.data(), tokens, experts}, side_here,
                    choices);
    check_same(choices, expected);
  };

  const moeroute::expert_choice<> choice{};
  const auto experts_choose = [&](const char* field, auto there, auto here) {
    moeroute::expert_choice<> base{.normalize = moeroute::token_renormalization::sum}, rule = base;
    base.capacity.factor = rule.capacity.factor = 1.3;
    there(rule);
    agrees(field, base, rule, [&](compiled::spec& s) {
      s.selection = MOEROUTE_EXPERT_CHOICE;
      s.normalize = MOEROUTE_NORMALIZE_SUM;
      s.capacity_factor = 1.3;
      here(s);
    });
  };
  agrees("score", choice, moeroute::expert_choice<moeroute::sigmoid>{}, [](compiled::spec& s) {
    s.selection = MOEROUTE_EXPERT_CHOICE;
    s.score = MOEROUTE_SIGMOID;
  });
  experts_choose(
      "normalize", [](auto& r) { r.normalize = moeroute::token_renormalization::none; },
      [](auto& s) { s.normalize = 0; });
  experts_choose("eps", [](auto& r) { r.eps = 0.5f; }, [](auto& s) { s.eps = 0.5f; });
  experts_choose("scale", [](auto& r) { r.scale = 3.0f; }, [](auto& s) { s.scale = 3.0f; });
  experts_choose(
      "sequence_length", [](auto& r) { r.sequence_length = 24; },
      [](auto& s) { s.sequence_length = 24; });
  experts_choose(
      "most_experts", [](auto& r) { r.most_experts = 1; }, [](auto& s) { s.most_experts = 1; });
  experts_choose(
      "capacity", [](auto& r) { r.capacity.fixed = 5; }, [](auto& s) { s.capacity = 5; });
  experts_choose(
      "capacity_factor", [](auto& r) { r.capacity.factor = 2.5; },
      [](auto& s) { s.capacity_factor = 2.5; });
  experts_choose(
      "capacity_rounding",
      [](auto& r) { r.capacity.rounding = moeroute::capacity_rounding::nearest; },
      [](auto& s) { s.capacity_rounding = 1; });
  experts_choose(
      "capacity_multiple", [](auto& r) { r.capacity.multiple_of = 8; },
      [](auto& s) { s.capacity_multiple = 8; });

  const moeroute::sinkhorn plan{.k = 2};
  const auto balances = [&](const char* field, auto there, auto here) {
    moeroute::sinkhorn rule = plan;
    there(rule);
    agrees(field, plan, rule, [&](compiled::spec& s) {
      s.selection = MOEROUTE_SINKHORN;
      here(s);
    });
  };
  balances("k", [](auto& r) { r.k = 3; }, [](auto& s) { s.k = 3; });
  balances(
      "plan_weights", [](auto& r) { r.weights = moeroute::plan_weights::plan; },
      [](auto& s) { s.plan_weights = 3; });
  moeroute::sinkhorn megatron = plan;
  megatron.weights = moeroute::plan_weights::plan;
  moeroute::sinkhorn projection = megatron;
  projection.scaling = moeroute::kl_projection_scaling;
  agrees("scaling", megatron, projection, [](compiled::spec& s) {
    s.selection = MOEROUTE_SINKHORN;
    s.plan_weights = 3;
    s.scaling = 1;
  });
  moeroute::sinkhorn to_the_end = megatron;
  to_the_end.scaling.tolerance = 0.0f;
  agrees("plan_tolerance 0", megatron, to_the_end, [](compiled::spec& s) {
    s.selection = MOEROUTE_SINKHORN;
    s.plan_weights = 3;
    s.plan_tolerance = 0.0f;
  });
  balances(
      "evaluation", [](auto& r) { r.phase = moeroute::routing_phase::evaluation; },
      [](auto& s) { s.evaluation = 1; });
  balances(
      "plan_temperature", [](auto& r) { r.scaling.temperature = 4.0f; },
      [](auto& s) { s.plan_temperature = 4.0f; });
  balances(
      "plan_tolerance", [](auto& r) { r.scaling.tolerance = 1.0f; },
      [](auto& s) { s.plan_tolerance = 1.0f; });
  balances(
      "plan_iterations", [](auto& r) { r.scaling.most_iterations = 1; },
      [](auto& s) { s.plan_iterations = 1; });

  const moeroute::selective_sinkhorn coin{.k = 2, .probability = 1.0f};
  const auto tosses = [&](const char* field, const moeroute::selective_sinkhorn& base, auto there,
                          auto here) {
    moeroute::selective_sinkhorn rule = base;
    there(rule);
    agrees(field, base, rule, [&](compiled::spec& s) {
      s.selection = MOEROUTE_SELECTIVE_SINKHORN;
      s.probability = 1.0f;
      here(s);
    });
  };
  tosses("k of a coin", coin, [](auto& r) { r.k = 3; }, [](auto& s) { s.k = 3; });
  tosses(
      "probability", moeroute::selective_sinkhorn{}, [](auto& r) { r.probability = 1.0f; },
      [](auto&) {});
  tosses(
      "evaluation of a coin", coin, [](auto& r) { r.phase = moeroute::routing_phase::evaluation; },
      [](auto& s) { s.evaluation = 1; });

  const moeroute::base_assignment auction{};
  const auto assigns = [&](const char* field, const moeroute::base_assignment& rule, auto here) {
    agrees(field, auction, rule, [&](compiled::spec& s) {
      s.selection = MOEROUTE_BASE;
      s.k = 1;
      here(s);
    });
  };
  assigns("evaluation of BASE", {.phase = moeroute::routing_phase::evaluation},
          [](auto& s) { s.evaluation = 1; });
  assigns("optimal", {.solver = moeroute::assignment_solver::optimal},
          [](auto& s) { s.optimal = 1; });
  assigns("rounds", {.most_rounds = 1}, [](auto& s) { s.rounds = 1; });

  // Side inputs, one after the other, at routers that read them.
  const auto top = moeroute::make_router({.experts = experts, .k = 2});
  const auto lots = moeroute::make_router(
      {.experts = experts, .k = 2, .selection = moeroute::selection_kind::random});
  const auto as_it_is = [](compiled::spec&) {};
  const auto random = [](compiled::spec& s) { s.selection = MOEROUTE_RANDOM; };
  const auto alone = [&](auto set_both) {
    side_there = {};
    side_here = {};
    set_both();
  };
  alone([&] { side_there.mask = in.mask, side_here.mask = in.mask.data(); });
  agrees("mask", top, top, as_it_is);
  alone([&] { side_there.k_of_token = own, side_here.k_of_token = own.data(); });
  agrees("k_of_token", top, top, as_it_is);
  alone([&] { side_there.seed = side_here.seed = 5; });
  agrees("seed", lots, lots, random);
  alone([&] { side_there.step = side_here.step = 5; });
  agrees("step", lots, lots, random);
}

TEST_CASE("every field of plans and of combining reaches the library, and no stride another") {
  std::mt19937 engine(15);
  const index_t tokens = 30, experts = 5, k = 2, d = 19;
  std::vector<std::int32_t> ids;
  std::vector<float> weights, gates;
  std::vector<std::uint8_t> owned{0, 1, 0, 1, 1}, mask;
  for (index_t t = 0; t < tokens; ++t) {
    const auto first = static_cast<std::int32_t>(engine() % 5);
    const bool lost = t % 7 == 3;
    ids.push_back(lost ? -1 : first);
    ids.push_back(lost ? -1 : (first + 1 + static_cast<std::int32_t>(engine() % 4)) % 5);
    for (int r = 0; r < 2; ++r) weights.push_back(static_cast<float>(1 + engine() % 100) / 128.0f);
    gates.push_back(0.25f + static_cast<float>(t) / 8.0f);
    mask.push_back(t % 4 != 1);
  }
  moeroute::assignment there;
  there.reset(tokens, experts, k);
  std::ranges::copy(ids, there.ids().begin());
  std::ranges::copy(weights, there.weights().begin());
  compiled::assignment here;
  here.set(ids, weights, experts, k);

  using plan_field = said_field<moeroute::plan_options, compiled::plan_options>;
  const plan_field plans[] = {
      {"block", {}, [](auto& o) { o.block = 4; }, [](auto& o) { o.block = 4; }},
      {"capacity", {}, [](auto& o) { o.capacity = 27; }, [](auto& o) { o.capacity = 27; }},
      {"spare_tokens",
       {.block = 8},
       [](auto& o) { o.block = 8, o.spare_tokens = 1; },
       [](auto& o) { o.padding = moeroute::slot_padding::spare_tokens; }},
      {"owned", {}, [&](auto& o) { o.owned = owned.data(); }, [&](auto& o) { o.owned = owned; }},
      {"mask", {}, [&](auto& o) { o.mask = mask.data(); }, [&](auto& o) { o.mask = mask; }},
  };
  for (const plan_field& field : plans) {
    INFO(field.name);
    moeroute::plan_options options = field.base;
    field.there(options);
    compiled::plan_options said{};
    field.here(said);
    moeroute::dispatch_plan without, expected;
    moeroute::plan(there, without, field.base);
    moeroute::plan(there, expected, options);
    CHECK_FALSE((std::ranges::equal(without.token_of_slot(), expected.token_of_slot()) &&
                 without.elsewhere() == expected.elsewhere()));
    compiled::dispatch_plan got;
    compiled::plan(here, got, said);
    CHECK(std::ranges::equal(got.offsets(), expected.offsets()));
    CHECK(std::ranges::equal(got.token_of_slot(), expected.token_of_slot()));
    CHECK(std::ranges::equal(got.slot_of_choice(), expected.slot_of_choice()));
    const moeroute_plan_view& v = got.counts();
    CHECK((v.tokens == tokens && v.experts == experts && v.k == k && v.choices == tokens * k));
    CHECK((v.kept == expected.kept() && v.dropped == expected.dropped()));
    CHECK((v.elsewhere == expected.elsewhere() && v.unrouted == expected.unrouted()));
    for (index_t e = 0; e < experts; ++e)
      CHECK(got.loads()[static_cast<std::size_t>(e)] == expected.load(e));
    std::vector<std::int32_t> map(static_cast<std::size_t>(tokens * (2 * experts + 1))),
        map_there = map;
    moeroute::export_row_id_map(expected, map_there);
    REQUIRE(moeroute_plan_row_id_map(got.get(), map.data(), std::ssize(map)) == MOEROUTE_OK);
    CHECK(map == map_there);
  }

  moeroute::dispatch_plan plan_there;
  compiled::dispatch_plan plan_here;
  moeroute::plan(there, plan_there, {.owned = owned});
  compiled::plan_options ours{};
  ours.owned = owned.data();
  compiled::plan(here, plan_here, ours);
  const index_t n = plan_there.slots();
  const std::vector<float> x = strided(tokens, d + 3, engine),
                           shared = strided(tokens, d + 7, engine),
                           expert_rows = strided(n, d + 1, engine),
                           before = strided(tokens, d + 5, engine);
  const moeroute::matrix_view<const float> x_there(x.data(), tokens, d, d + 3),
      shared_there(shared.data(), tokens, d, d + 7), rows_there(expert_rows.data(), n, d, d + 1);
  const compiled::const_rows x_here(x.data(), tokens, d, d + 3),
      shared_here(shared.data(), tokens, d, d + 7), rows_here(expert_rows.data(), n, d, d + 1);
  using combine_field = said_field<moeroute::combine_options<>, compiled::combine_options>;
  const combine_field sums[] = {
      {"strides alone", {}, [](auto&) {}, [](auto&) {}, false},
      {"weights_applied",
       {},
       [](auto& o) { o.weights_applied = 1; },
       [](auto& o) { o.weight = moeroute::combine_weight::one; }},
      {"accumulate",
       {},
       [](auto& o) { o.accumulate = 1; },
       [](auto& o) { o.output = moeroute::combine_output::accumulate; }},
      {"lost_residual, x",
       {},
       [&](auto& o) { o.lost_residual = 1, o.x = x_here; },
       [&](auto& o) { o.lost = moeroute::lost_token::residual, o.x = x_there; }},
      {"identity_first, identity_end",
       {},
       [&](auto& o) { o.identity_first = 2, o.identity_end = 3, o.x = x_here; },
       [&](auto& o) { o.identity_first = 2, o.identity_end = 3, o.x = x_there; }},
      {"shared",
       {},
       [&](auto& o) { o.shared = shared_here; },
       [&](auto& o) { o.shared = shared_there; }},
      {"shared_weight, and x and shared of strides apart",
       {.shared = shared_there},
       [&](auto& o) {
         o.shared = shared_here, o.shared_weight = gates.data();
         o.lost_residual = 1, o.x = x_here;
       },
       [&](auto& o) {
         o.shared_weight = gates;
         o.lost = moeroute::lost_token::residual, o.x = x_there;
       }},
  };
  const auto combined = [&](const moeroute::combine_options<>& o) {
    std::vector<float> y = before;
    moeroute::combine(rows_there, plan_there, there,
                      moeroute::matrix_view<float>(y.data(), tokens, d, d + 5), o);
    return y;
  };
  on_every_isa([&] {
    for (const combine_field& field : sums) {
      INFO(field.name);
      moeroute::combine_options<> options = field.base;
      field.there(options);
      compiled::combine_options said{};
      field.here(said);
      const std::vector<float> expected = combined(options);
      if (field.seen) CHECK_FALSE(same_bits(expected, combined(field.base)));
      std::vector<float> y = before;
      compiled::combine(rows_here, plan_here, here, {y.data(), tokens, d, d + 5}, {}, said);
      CHECK(same_bits(y, expected));
    }
    for (const bool scaled : {false, true}) {
      INFO("dispatch, scale " << scaled);
      std::vector<float> slots(expert_rows.size()), expected = slots;
      moeroute::dispatch(x_there, plan_there,
                         moeroute::matrix_view<float>(expected.data(), n, d, d + 1),
                         {.scale = scaled ? std::span(weights) : std::span<float>()});
      compiled::dispatch(x_here, plan_here, {slots.data(), n, d, d + 1}, {},
                         scaled ? std::span(weights) : std::span<float>());
      CHECK(same_bits(slots, expected));
    }
  });

  // What is counted of the choices, before and after dropping.
  const moeroute::capacity_policy tight{
      .rule = {.formula = moeroute::capacity_formula::fixed, .count = 6}};
  compiled::capacity tight_here{};
  tight_here.formula = MOEROUTE_CAPACITY_FIXED;
  tight_here.count = 6;
  moeroute::workspace workspace;
  const auto by = moeroute::apply_capacity(there, tight, workspace);
  const auto got = compiled::apply_capacity(here, tight_here);
  CHECK((by.unrouted > 0 && got.unrouted == by.unrouted && got.dropped == by.dropped));
  CHECK(std::ranges::equal(here.kept(), there.kept()));
  std::set<std::vector<double>> different;
  for (int i = 0; i < 8; ++i) {
    INFO("first_only " << (i & 1) << ", kept_only " << (i & 2) << ", mask " << (i & 4));
    using moeroute::count_basis;
    std::vector<double> counts(static_cast<std::size_t>(experts)), expected = counts;
    moeroute::count_choices(
        there,
        {.basis = (i & 1) != 0 ? count_basis::first_choice : count_basis::all_choices,
         .drops =
             (i & 2) != 0 ? moeroute::drop_stage::after_drop : moeroute::drop_stage::before_drop,
         .mask = (i & 4) != 0 ? std::span(mask) : std::span<std::uint8_t>()},
        std::span(expected));
    REQUIRE(moeroute_count_choices(here.get(), i & 1, i & 2, (i & 4) != 0 ? mask.data() : nullptr,
                                   counts.data(), experts) == MOEROUTE_OK);
    CHECK(counts == expected);
    different.insert(expected);
  }
  CHECK(different.size() == 8);

  // Who sends to whom: four experts on four ranks, two ranks to a node.
  std::vector<std::int32_t> to(static_cast<std::size_t>(tokens * k));
  for (std::size_t c = 0; c < to.size(); ++c) to[c] = static_cast<std::int32_t>((c + c / 6) % 4);
  moeroute::assignment four_there;
  four_there.reset(tokens, 4, k);
  std::ranges::copy(to, four_there.ids().begin());
  std::ranges::copy(weights, four_there.weights().begin());
  compiled::assignment four;
  four.set(to, weights, 4, k);
  struct once {
    std::vector<std::int32_t> expert, rank, node;
    std::vector<std::uint8_t> in_rank;
    bool operator==(const once&) const = default;
  };
  const once empty{std::vector<std::int32_t>(4), std::vector<std::int32_t>(4),
                   std::vector<std::int32_t>(2),
                   std::vector<std::uint8_t>(static_cast<std::size_t>(tokens * 4))};
  once a = empty, b = empty;
  moeroute::export_once_counts(four_there, {.tokens_per_expert = a.expert,
                                            .tokens_per_rank = a.rank,
                                            .token_in_rank = a.in_rank,
                                            .tokens_per_node = a.node,
                                            .ranks_per_node = 2});
  REQUIRE(moeroute_once_counts(four.get(), 4, 2, b.expert.data(), b.rank.data(), b.in_rank.data(),
                               b.node.data()) == MOEROUTE_OK);
  CHECK(a == b);
}

TEST_CASE("every field of gates, soft mixtures, losses and biases reaches the library") {
  std::mt19937 engine(16);
  const index_t tokens = 24, experts = 6, k = 2, d = 10;
  const auto at = [](const std::vector<float>& m, index_t stride, index_t r, index_t c) {
    return static_cast<double>(m[static_cast<std::size_t>(r * stride + c)]);
  };
  const std::vector<float> x = strided(tokens, d + 3, engine), w = strided(experts, d + 5, engine),
                           slots = strided(experts, d + 1, engine),
                           z = strided(tokens, experts + 2, engine);
  const compiled::const_rows x_here(x.data(), tokens, d, d + 3),
      z_here(z.data(), tokens, experts, experts + 2);
  std::vector<float> bias;
  for (index_t e = 0; e < experts; ++e) bias.push_back(static_cast<float>(e) / 4.0f);
  std::vector<std::uint8_t> mask;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  for (index_t t = 0; t < tokens; ++t) {
    mask.push_back(t % 5 != 2);
    const auto first = static_cast<std::int32_t>(engine() % 3);
    ids.push_back(first);
    ids.push_back(first + 1 + static_cast<std::int32_t>(engine() % 2));
  }
  weights.assign(ids.size(), 0.5f);
  moeroute::assignment there;
  there.reset(tokens, experts, k);
  std::ranges::copy(ids, there.ids().begin());
  std::ranges::copy(weights, there.weights().begin());

  using loss_field = said_field<compiled::losses, compiled::losses>;
  compiled::losses all{};
  all.switch_coefficient = 0.5;
  all.sequence_coefficient = 0.25;
  compiled::losses with_z = all;
  with_z.z_coefficient = 0.125;
  const auto loss = [](const char* name, const compiled::losses& base, auto change) {
    return loss_field{name, base, change, change};
  };
  const loss_field losses[] = {
      loss("switch_coefficient", all, [](auto& l) { l.switch_coefficient = 2.0; }),
      loss("z_coefficient", all, [](auto& l) { l.z_coefficient = 0.75; }),
      loss("sequence_coefficient", all, [](auto& l) { l.sequence_coefficient = 3.0; }),
      loss("sequence_length", all, [](auto& l) { l.sequence_length = 8; }),
      loss("scores: sigmoid", all, [](auto& l) { l.scores = 1; }),
      loss("scores: sqrt-softplus", all, [](auto& l) { l.scores = 2; }),
      loss("accumulate", with_z, [](auto& l) { l.accumulate = 1; }),
      loss("mask", with_z, [&](auto& l) { l.mask = mask.data(); }),
  };
  struct losses_of {
    double value[3];
    std::vector<float> gradient;
  };
  const std::vector<float> before = strided(tokens, experts + 4, engine);
  const auto by_headers = [&](const compiled::losses& l) {
    const std::span<const std::uint8_t> taken(l.mask, l.mask == nullptr ? 0 : mask.size());
    const index_t length = l.sequence_length > 0 ? l.sequence_length : tokens;
    std::vector<double> by_expert(static_cast<std::size_t>(experts)),
        by_sequence(static_cast<std::size_t>(tokens / length * experts));
    const moeroute::matrix_view<double> sequences(by_sequence.data(), tokens / length, experts);
    moeroute::count_choices(there, {.mask = taken}, std::span(by_expert));
    moeroute::count_choices_by_sequence(there, {.mask = taken}, length, sequences);
    losses_of answer{{}, before};
    moeroute::workspace ws;
    moeroute::loss_options how{
        .scores = static_cast<moeroute::probability>(l.scores),
        .gradient = l.accumulate != 0 ? moeroute::gradient_to::add : moeroute::gradient_to::write,
        .mask = taken,
        .sequence_length = length};
    const moeroute::matrix_view<const float> logits(z.data(), tokens, experts, experts + 2);
    const moeroute::matrix_view<float> dz(answer.gradient.data(), tokens, experts, experts + 4);
    const auto counted = moeroute::balance_loss<float>(
        how, logits, dz, ws, moeroute::serial{},
        moeroute::switch_loss::megatron(l.switch_coefficient, std::span<const double>(by_expert),
                                        k),
        moeroute::sequence_loss{l.sequence_coefficient, sequences, k});
    answer.value[0] = counted[0];
    answer.value[2] = counted[1];
    if (l.z_coefficient == 0.0) return answer;
    how.gradient = moeroute::gradient_to::add;
    answer.value[1] = moeroute::balance_loss<float>(how, logits, dz, ws, moeroute::serial{},
                                                    moeroute::router_z_loss{l.z_coefficient})[0];
    return answer;
  };
  const auto far = [](const std::vector<float>& a, const std::vector<float>& b) {
    float most = 0.0f;
    for (std::size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(a[i] - b[i]));
    return most;
  };

  on_every_isa([&] {
    for (const loss_field& field : losses) {
      INFO(field.name);
      compiled::losses said = field.base;
      field.here(said);
      const losses_of expected = by_headers(said);
      CHECK(far(expected.gradient, by_headers(field.base).gradient) > 1e-3f);
      compiled::assignment choices;
      choices.set(ids, weights, experts, k);
      std::vector<float> dz = before;
      const compiled::loss_values got =
          compiled::balance_loss(said, z_here, choices, {dz.data(), tokens, experts, experts + 4});
      CHECK(std::abs(got.switch_loss - expected.value[0]) < 1e-6);
      CHECK(std::abs(got.z_loss - expected.value[1]) < 1e-6);
      CHECK(std::abs(got.sequence_loss - expected.value[2]) < 1e-6);
      CHECK(far(dz, expected.gradient) < 1e-5f);
    }

    const compiled::gate_weight packed({w.data(), experts, d, d + 5}, bias);
    std::vector<float> plain = before, cosine = before;
    compiled::gate(x_here, packed, {plain.data(), tokens, experts, experts + 4});
    const compiled::gate_weight no_bias({w.data(), experts, d, d + 5});
    compiled::cosine_gate(x_here, no_bias, 4.0f, {cosine.data(), tokens, experts, experts + 4});
    compiled::soft_plan soft;
    compiled::plan_soft(z_here, 2, soft);
    REQUIRE((soft.view().slots == experts && soft.view().slots_per_expert == 2));
    std::vector<float> in = strided(experts, d + 4, engine), y = strided(tokens, d + 6, engine);
    compiled::dispatch(x_here, soft, {in.data(), experts, d, d + 4});
    compiled::combine({slots.data(), experts, d, d + 1}, soft, {y.data(), tokens, d, d + 6});
    double error = 0.0;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e) {
        double product = 0.0, square = 0.0;
        for (index_t c = 0; c < d; ++c) {
          product += at(x, d + 3, t, c) * at(w, d + 5, e, c);
          square += at(x, d + 3, t, c) * at(x, d + 3, t, c);
        }
        const double b = static_cast<double>(bias[static_cast<std::size_t>(e)]);
        error =
            std::max({error, std::abs(product + b - at(plain, experts + 4, t, e)),
                      std::abs(4.0 * product / std::sqrt(square) - at(cosine, experts + 4, t, e))});
      }
    CHECK(error < 1e-4);
    error = 0.0;
    for (index_t c = 0; c < d; ++c) {
      for (index_t s = 0; s < experts; ++s) {
        double sum = 0.0;
        for (index_t t = 0; t < tokens; ++t)
          sum += static_cast<double>(soft.view().dispatch[s * tokens + t]) * at(x, d + 3, t, c);
        error = std::max(error, std::abs(sum - at(in, d + 4, s, c)));
      }
      for (index_t t = 0; t < tokens; ++t) {
        double sum = 0.0;
        for (index_t s = 0; s < experts; ++s)
          sum += static_cast<double>(soft.view().combine[t * experts + s]) * at(slots, d + 1, s, c);
        error = std::max(error, std::abs(sum - at(y, d + 6, t, c)));
      }
    }
    CHECK(error < 1e-5);
  });

  using bias_field = said_field<moeroute::bias_options, moeroute_bias_options>;
  const auto step = [](const char* name, const moeroute::bias_options& base, auto change) {
    return bias_field{name, base, change, change};
  };
  const moeroute::bias_options shares{.rule = moeroute::bias_rule::proportional};
  const bias_field biases[] = {
      step("rule: proportional", {}, [](auto& o) { put(o.rule, 1); }),
      step("rule: multiplicative", {}, [](auto& o) { put(o.rule, 2); }),
      step("error: total", shares, [](auto& o) { put(o.error, 1); }),
      step("error: tokens", shares, [](auto& o) { put(o.error, 2); }),
      step("decay: inverse root", shares, [](auto& o) { put(o.decay, 1); }),
      step("decay: inverse", shares, [](auto& o) { put(o.decay, 2); }),
      step("centre", {}, [](auto& o) { put(o.centre, 1); }),
      step("step", {}, [](auto& o) { o.step = 0.25f; }),
      step("least_factor", {.rule = moeroute::bias_rule::multiplicative},
           [](auto& o) { o.least_factor = 0.9995f; }),
  };
  const double counts[2][4] = {{9, 1, 5, 1}, {7, 2, 0, 3}};
  for (const bias_field& field : biases) {
    INFO(field.name);
    const auto number = [](auto value) { return static_cast<std::int32_t>(value); };
    moeroute_bias_options said{number(field.base.rule),  number(field.base.error),
                               number(field.base.decay), number(field.base.centre),
                               field.base.step,          field.base.least_factor};
    moeroute::bias_options options = field.base;
    field.here(said);
    field.there(options);
    moeroute::bias_controller without(4, field.base), expected(4, options);
    compiled::bias got(4, said);
    for (const auto& batch : counts) {
      without.update(std::span<const double>(batch));
      expected.update(std::span<const double>(batch));
      got.update(batch);
    }
    CHECK_FALSE(same_bits(without.bias(), expected.bias()));
    CHECK(same_bits(got.values(), expected.bias()));
  }
}

TEST_CASE("a description of the headers is the same description here") {
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    INFO(entry.name);
    const compiled::spec named = compiled::spec_of_model(std::string(entry.name).c_str());
    const compiled::spec described = compiled::describe(entry.spec);
    CHECK(named.size == described.size);
    CHECK(same_bytes(named, described));
  }
}

TEST_CASE("a description of a rule over the batch has all of its words, each in its field") {
  using enum moeroute::selection_kind;
  const auto described = [](moeroute::selection_kind rule, auto there, auto here) {
    INFO(static_cast<int>(rule));
    moeroute::router_spec s = moeroute::plain_spec(rule);
    compiled::spec expected = compiled::describe(s);
    there(s);
    here(expected);
    CHECK(same_bytes(compiled::describe(s), expected));
  };
  described(
      expert_choice,
      [](auto& s) {
        s.experts = 16;
        s.score = moeroute::score_kind::sigmoid;
        s.normalize = moeroute::normalization::sum;
        s.eps_where = moeroute::eps_mode::add;
        s.eps = 0.25f;
        s.scale = 3.0f;
        s.gate_bias = true;
        s.max_k = 5;
        s.sequence = 24;
        s.take = {.factor = 1.5,
                  .rounding = moeroute::capacity_rounding::nearest,
                  .multiple_of = 4,
                  .fixed = 7};
      },
      [](auto& s) {
        s.experts = 16;
        s.score = MOEROUTE_SIGMOID;
        s.normalize = MOEROUTE_NORMALIZE_SUM;
        s.eps_mode = MOEROUTE_EPS_ADD;
        s.eps = 0.25f;
        s.scale = 3.0f;
        s.gate_bias = 1;
        s.max_k = s.most_experts = 5;
        s.sequence_length = 24;
        s.capacity_factor = 1.5;
        s.capacity_rounding = 1;
        s.capacity_multiple = 4;
        s.capacity = 7;
      });
  described(expert_choice, [](auto& s) { s.eps = 0.25f; }, [](auto&) {});  // of no sum
  described(
      sinkhorn,
      [](auto& s) {
        s.k = 3;
        s.gate_bias = true;
        s.phase = moeroute::routing_phase::evaluation;
        s.plan_weights = moeroute::plan_weights::sigmoid;
        s.plan = moeroute::kl_projection_scaling;
        s.plan.temperature = 0.5f;
        s.plan.tolerance = 0.25f;
        s.plan.most_iterations = 9;
      },
      [](auto& s) {
        s.k = 3;
        s.gate_bias = 1;
        s.evaluation = 1;
        s.plan_weights = 1;
        s.scaling = 1;
        s.plan_temperature = 0.5f;
        s.plan_tolerance = 0.25f;
        s.plan_iterations = 9;
      });
  described(
      selective_sinkhorn, [](auto& s) { s.probability = 0.5f; },
      [](auto& s) { s.probability = 0.5f; });
  described(
      sinkhorn_expert_choice, [](auto& s) { s.take.factor = 4.0; },
      [](auto& s) { s.capacity_factor = 4.0; });
  described(
      base,
      [](auto& s) {
        s.solver = moeroute::assignment_solver::optimal;
        s.rounds = 30;
      },
      [](auto& s) {
        s.optimal = 1;
        s.rounds = 30;
      });
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
           moeroute::router_spec{.score = moeroute::score_kind::sqrt_softplus,
                                 .selection = selection_kind::expert_choice},
           moeroute::router_spec{.selection = selection_kind::expert_choice,
                                 .normalize = moeroute::normalization::lp},
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
    CHECK_THROWS_WITH(
        compiled::describe(spec),
        "moeroute::describe: the spec has words that the compiled library does not have");
}

TEST_CASE("what was reserved runs without an allocation") {
  std::mt19937 engine(9);
  const index_t tokens = 300, d = 16;
  const int threads = 64;
  backwards run;
  const compiled::executor pool(run, threads);
  compiled::losses by_token{};  // sequences of one token take the most
  by_token.switch_coefficient = by_token.z_coefficient = by_token.sequence_coefficient = 1.0;
  by_token.sequence_length = 1;
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
    std::vector<float> z(static_cast<std::size_t>(tokens * router.columns())), dz(z.size()),
        x(static_cast<std::size_t>(tokens * d)), y(x.size());
    for (float& v : z) v = static_cast<float>(engine() % 1000) / 100.0f;
    std::vector<float> slots(
        static_cast<std::size_t>((tokens * router.k() + router.experts() * 3) * d));
    compiled::assignment choices;
    compiled::dispatch_plan plan;
    compiled::plan_options options{};
    options.block = 4;
    choices.reserve(router, tokens, MOEROUTE_FLOAT, threads);
    plan.reserve(choices, options);
    CHECK(plan.slots() == 0);
    compiled::capacity capacity{};
    capacity.formula = MOEROUTE_CAPACITY_FIXED;
    capacity.count = 9;
    capacity.factor = 1.0;
    index_t dropped = 0;
    const long before = test::allocations();
    for (const index_t n : {tokens, index_t{1}, index_t{170}}) {
      const compiled::const_rows logits(z.data(), n, router.columns());
      compiled::route(router, logits, choices, pool);
      compiled::balance_loss(by_token, logits, choices, {dz.data(), n, router.columns()}, pool);
      dropped += compiled::apply_capacity(choices, capacity).dropped;
      compiled::plan(choices, plan, options);
      compiled::dispatch({x.data(), n, d}, plan, {slots.data(), plan.slots(), d});
      compiled::combine({slots.data(), plan.slots(), d}, plan, choices, {y.data(), n, d});
    }
    const long after = test::allocations();
    CHECK(after == before);
    CHECK(dropped > 0);
  }

  // A rule that tosses a coin has room for both of its sides, also where step 0 shows the one that
  // takes less.
  const moeroute::selective_sinkhorn tossed{.k = 64, .probability = 0.01f};
  REQUIRE_FALSE(tossed.balances({}));
  std::uint64_t balanced = 1;
  while (!tossed.balances({.step = balanced})) ++balanced;
  compiled::spec coin = compiled::plain_spec();
  coin.experts = coin.k = 64;
  coin.selection = MOEROUTE_SELECTIVE_SINKHORN;
  coin.probability = tossed.probability;
  const compiled::router router(coin);
  std::vector<float> z(64 * 64);
  for (float& v : z) v = static_cast<float>(engine() % 1000) / 100.0f;
  compiled::assignment choices;
  choices.reserve(router, 64, MOEROUTE_FLOAT, threads);
  const long before = test::allocations();
  for (const std::uint64_t step : {std::uint64_t{0}, balanced}) {
    compiled::side_inputs side{};
    side.step = step;
    compiled::route(router, {z.data(), 64, 64}, side, choices, pool);
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

  // A pool that leaves pieces out, one that invents some, and one that cuts its own.
  const compiled::spec wide = [] {
    compiled::spec s = compiled::plain_spec();
    s.experts = 4096;
    return s;
  }();
  std::vector<float> many(4096 * 64);
  const compiled::router big(wide);
  auto lazy = [](std::int64_t, std::int64_t grain, const auto& body) { body(0, grain); };
  const std::string covered =
      "moeroute::route: callable_executor: what run covered of the loop is ";
  CHECK_THROWS_WITH(compiled::route(big, {many.data(), 64, 4096}, choices, {lazy, 2}),
                    covered + "16, expected 64");
  auto wild = [](std::int64_t n, std::int64_t, const auto& body) { body(0, n + 16); };
  CHECK_THROWS_WITH(compiled::route(big, {many.data(), 64, 4096}, choices, {wild, 2}),
                    covered + "0, expected 64");
  auto between = [](std::int64_t n, std::int64_t grain, const auto& body) {
    body(0, grain / 2);
    body(grain / 2, n);  // where no piece begins
  };
  CHECK_THROWS_WITH(compiled::route(big, {many.data(), 64, 4096}, choices, {between, 2}),
                    covered + "8, expected 64");
}

TEST_CASE("20,000 random specs route alike on every instruction set, bit by bit") {
  test::hold(test::isa_property, 20000);
}
