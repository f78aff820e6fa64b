// What a layer does beyond the plain sum: few tokens without copies, executors, kinds of routers
// and experts, capacity, shared experts, exceptions.
#include <moeroute/layer/moe_layer_options.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/exec/callable.hpp>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/top_p.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"
#include "support/strided.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif
#if defined(MOEROUTE_HAS_TBB)
#include <moeroute/exec/tbb.hpp>
#endif

namespace moe_layer_options_test {

using namespace moeroute;

namespace {

constexpr index_t d = 40, experts = 12, k = 3;

// Element by element, so a row depends on no other: out = tanh(x) * (e + 1) + e.
struct curves {
  expert_id fails = no_expert;
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    if (e == fails) throw std::runtime_error("expert");
    const auto f = static_cast<float>(e);
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < in.cols; ++c) out(r, c) = std::fma(std::tanh(in(r, c)), f + 1.0f, f);
  }
};

simd::packed_matrix<> gate_weights() {
  const row_matrix<float> w = test::random_rows(experts, d, 1);
  return simd::packed_matrix<>(const_view(w));
}

router<softmax> mixtral() { return {.selection = {.k = k}, .weight = sum_normalized}; }

swiglu_experts<> networks(index_t n, index_t ff) {
  swiglu_experts<> list(n, d, ff);
  for (expert_id e = 0; e < n; ++e) {
    const auto seed = static_cast<std::uint64_t>(10 + 3 * e);
    list.set_gate(e, const_view(test::random_rows(ff, d, seed)));
    list.set_up(e, const_view(test::random_rows(ff, d, seed + 1)));
    list.set_down(e, const_view(test::random_rows(d, ff, seed + 2)));
  }
  return list;
}

template <class Layer, class Exec = serial>
row_matrix<float> run(Layer& layer, const row_matrix<float>& x, const Exec& exec = {},
                      const side_inputs& side = {}) {
  row_matrix<float> y = row_matrix<float>::Constant(x.rows(), x.cols(), 77.0f);
  layer.forward(matrix_view<const float>(x.data(), x.rows(), x.cols()),
                matrix_view<float>(y.data(), y.rows(), y.cols()), side, exec);
  return y;
}

// The sum as one writes it down, from the layer's own choices.
template <class Layer, class Expert>
row_matrix<float> by_choices(const Layer& layer, const row_matrix<float>& x, Expert&& expert,
                             weight_on where = weight_on::output) {
  row_matrix<float> y = row_matrix<float>::Zero(x.rows(), x.cols());
  std::vector<float> in(d), out(d);
  const assignment& a = layer.choices();
  for (index_t t = 0; t < x.rows(); ++t)
    for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
      const expert_id e = a.ids()[static_cast<std::size_t>(c)];
      if (e < 0 || !a.kept(c)) continue;
      const float w = a.weights()[static_cast<std::size_t>(c)];
      for (index_t i = 0; i < d; ++i)
        in[static_cast<std::size_t>(i)] = (where == weight_on::input ? w : 1.0f) * x(t, i);
      expert(e, matrix_view<const float>(in.data(), 1, d), matrix_view<float>(out.data(), 1, d));
      for (index_t i = 0; i < d; ++i)
        y(t, i) = std::fma(where == weight_on::input ? 1.0f : w, out[static_cast<std::size_t>(i)],
                           y(t, i));
    }
  return y;
}

std::string differ(const row_matrix<float>& a, const row_matrix<float>& b) {
  return test::bit_difference(test::values(a), test::values(b));
}

auto threads() {
  return callable_executor(
      [](index_t n, index_t grain, loop_body body) {
        std::vector<std::thread> pool;
        for (index_t b = 0; b < n; b += grain)
          pool.emplace_back([=] { body(b, std::min(n, b + grain)); });
        for (auto& t : pool) t.join();
      },
      3);
}

template <class F>
void for_each_executor(F&& f) {
  f(serial{});
  f(threads());
#if defined(_OPENMP)
  for (const int n : {1, 2, 5}) f(openmp{n});
#endif
#if defined(MOEROUTE_HAS_TBB)
  f(onetbb{});
#endif
}

}  // namespace

TEST_CASE("a few tokens, run on the rows of x itself, have the bits that they have among many") {
  moe_layer few(gate_weights(), mixtral(), networks(experts, 24));
  moe_layer many(gate_weights(), mixtral(), networks(experts, 24));
  const row_matrix<float> x = test::random_rows(64, d, 5);
  const row_matrix<float> y = run(many, x);
  CHECK(many.plan().tokens() > decode_tokens);
  for (const index_t tokens : {1, 2, 3, 4, 5, 6, 7, 8})
    for (const index_t first : {0, 11, 56}) {
      const row_matrix<float> part = x.middleRows(first, tokens);
      const row_matrix<float> expected = y.middleRows(first, tokens);
      CHECK(differ(run(few, part), expected) == "");
    }
}

TEST_CASE("equal tokens go to one expert as one block, whatever their distances") {
  // Tokens of two kinds in patterns: their experts see runs of every distance.
  const row_matrix<float> kinds = test::random_rows(2, d, 6);
  moe_layer layer(gate_weights(), mixtral(), curves{});
  for (int pattern = 0; pattern < 256; ++pattern) {
    row_matrix<float> x(8, d);
    for (int t = 0; t < 8; ++t) x.row(t) = kinds.row(pattern >> t & 1);
    const row_matrix<float> y = run(layer, x);
    CHECK(differ(y, by_choices(layer, x, curves{})) == "");
  }
}

TEST_CASE("a layer has the same bits under every executor and any number of threads") {
  const row_matrix<float> x = test::random_rows(300, d, 7);
  moe_layer reference(gate_weights(), mixtral(), networks(experts, 24), {}, networks(1, 32));
  for (const index_t tokens : {0, 1, 5, 8, 9, 300}) {
    const row_matrix<float> part = x.topRows(tokens);
    const row_matrix<float> expected = run(reference, part);
    for_each_executor([&](const auto& exec) {
      moe_layer layer(gate_weights(), mixtral(), networks(experts, 24), {.rows_per_call = 7},
                      networks(1, 32));
      CHECK(differ(run(layer, part, exec), expected) == "");
    });
  }
}

TEST_CASE("routers with a varying k and routers of the whole batch run through a layer") {
  const row_matrix<float> x = test::random_rows(50, d, 8);
  for (const index_t tokens : {1, 8, 50}) {
    const row_matrix<float> part = x.topRows(tokens);
    moe_layer ragged(gate_weights(), top_p{.p = 0.7f, .max_k = 6}, curves{});
    const row_matrix<float> y = run(ragged, part);
    CHECK(differ(y, by_choices(ragged, part, curves{})) == "");
    CHECK(ragged.choices().ragged());
    moe_layer batch(gate_weights(), expert_choice<softmax>{}, curves{});
    const row_matrix<float> z = run(batch, part);
    CHECK(differ(z, by_choices(batch, part, curves{})) == "");
    CHECK(batch.plan().kept() == batch.choices().choices());
  }
}

TEST_CASE("fewer choices than tokens are made of rows of every type") {
  // Of 3 experts with one token each: rows that were widened outnumber the slots.
  const row_matrix<float> w = test::random_rows(3, d, 21);
  const expert_choice<> one_each{.capacity = {.fixed = 1}};
  for (const index_t tokens : {4, 8, 9}) {
    moe_layer layer(simd::packed_matrix<>(const_view(w)), one_each, curves{});
    const row_matrix<float> drawn = test::random_rows(tokens, d, 22);
    const auto n = static_cast<std::size_t>(tokens * d);
    const auto agrees = [&]<class T>(T) {
      std::vector<T> narrow(drawn.data(), drawn.data() + n);
      row_matrix<float> wide(tokens, d);
      std::copy(narrow.begin(), narrow.end(), wide.data());
      row_matrix<float> y(tokens, d);
      layer.forward(matrix_view<const T>(narrow.data(), tokens, d),
                    matrix_view<float>(y.data(), tokens, d));
      CHECK(layer.choices().choices() == 3);
      CHECK(differ(y, by_choices(layer, wide, curves{})) == "");
    };
    agrees(float{});
    agrees(bfloat16{});
    agrees(float16{});
  }
}

TEST_CASE("weights on the input scale what an expert gets, not what it gives") {
  moe_layer layer(gate_weights(), mixtral(), curves{}, {.weights = weight_on::input});
  for (const index_t tokens : {1, 8, 40}) {
    const row_matrix<float> x = test::random_rows(tokens, d, 9);
    const row_matrix<float> y = run(layer, x);
    CHECK(differ(y, by_choices(layer, x, curves{}, weight_on::input)) == "");
  }
}

TEST_CASE("identity experts give the token, zero experts nothing, and neither is called") {
  const special_experts special{
      .identity_first = 4, .identity_end = 7, .zero_first = 7, .zero_end = 12};
  moe_layer layer(gate_weights(), mixtral(), curves{}, {.special = special});
  const auto each = [&](expert_id e, matrix_view<const float> in, matrix_view<float> out) {
    if (e < 4) return curves{}(e, in, out);
    for (index_t i = 0; i < d; ++i) out(0, i) = e < 7 ? in(0, i) : 0.0f;
  };
  for (const index_t tokens : {1, 8, 60}) {
    const row_matrix<float> x = test::random_rows(tokens, d, 10);
    const row_matrix<float> y = run(layer, x);
    CHECK((y - by_choices(layer, x, each)).cwiseAbs().maxCoeff() == 0.0f);
    for (index_t e = 4; e < 12; ++e) CHECK(layer.plan().load(e) == 0);
    CHECK(layer.plan().kept() + layer.plan().elsewhere() == tokens * k);
  }
}

TEST_CASE("a layer drops by its capacity, and lost tokens are zero or pass through") {
  for (const lost_token lost : {lost_token::zero, lost_token::residual}) {
    moe_layer layer(
        gate_weights(), mixtral(), curves{},
        {.capacity = capacity_policy{.rule = {.formula = capacity_formula::fixed, .count = 5}},
         .lost = lost});
    const row_matrix<float> x = test::random_rows(60, d, 11);
    const row_matrix<float> y = run(layer, x);
    row_matrix<float> expected = by_choices(layer, x, curves{});
    index_t lost_tokens = 0;
    for (index_t t = 0; t < 60; ++t) {
      bool all = true;
      for (index_t c = t * k; c < (t + 1) * k; ++c) all &= !layer.choices().kept(c);
      lost_tokens += all;
      if (all && lost == lost_token::residual) expected.row(t) = x.row(t);
    }
    CHECK(lost_tokens > 0);
    CHECK(differ(y, expected) == "");
    for (index_t e = 0; e < experts; ++e) CHECK(layer.plan().load(e) <= 5);
  }
}

TEST_CASE("with a capacity of 0 every choice is dropped, and no expert is called") {
  const capacity_policy none{.rule = {.formula = capacity_formula::fixed, .count = 0}};
  for (const lost_token lost : {lost_token::zero, lost_token::residual}) {
    moe_layer layer(gate_weights(), mixtral(),
                    [](expert_id, matrix_view<const float>, matrix_view<float>) { FAIL("called"); },
                    {.capacity = none, .lost = lost});
    for (const index_t tokens : {1, 8, 30}) {
      const row_matrix<float> x = test::random_rows(tokens, d, 19);
      const row_matrix<float> zero = row_matrix<float>::Zero(tokens, d);
      CHECK(differ(run(layer, x), lost == lost_token::residual ? x : zero) == "");
      CHECK(layer.plan().dropped() == tokens * k);
    }
  }
}

TEST_CASE("shared experts see every token and are added with weight 1") {
  moe_layer layer(gate_weights(), mixtral(), curves{}, {}, curves{});
  for (const index_t tokens : {1, 8, 200}) {
    const row_matrix<float> x = test::random_rows(tokens, d, 12);
    const row_matrix<float> y = run(layer, x);
    row_matrix<float> expected = by_choices(layer, x, curves{});
    for (index_t t = 0; t < tokens; ++t)
      for (index_t i = 0; i < d; ++i) expected(t, i) += std::fma(std::tanh(x(t, i)), 1.0f, 0.0f);
    CHECK(differ(y, expected) == "");
    const row_matrix<bfloat16> x16 = x.cast<bfloat16>();
    const row_matrix<float> wide = x16.cast<float>();
    row_matrix<float> y16(tokens, d);
    layer.forward(x16, y16);
    CHECK(differ(y16, run(layer, wide)) == "");
  }
}

TEST_CASE(
    "shared experts have the weight that they are given: a constant, or a gate of their own") {
  const row_matrix<float> gate = 0.2f * test::random_rows(1, d, 17);
  const std::span<const float> gates(gate.data(), static_cast<std::size_t>(d));
  for (const shared_expert_weight& weight :
       {shared_expert_weight{.scale = 0.25f}, shared_expert_weight{.gate = gates},
        shared_expert_weight{.scale = -1.5f, .gate = gates}}) {
    moe_layer layer(gate_weights(), mixtral(), curves{}, {.shared = weight}, curves{});
    moe_layer routed(gate_weights(), mixtral(), curves{});
    for (const index_t tokens : {0, 1, 8, 200}) {
      const row_matrix<float> x = test::random_rows(tokens, d, 18);
      const row_matrix<float> y = run(layer, x), without = run(routed, x);
      std::vector<double> expected;
      for (index_t t = 0; t < tokens; ++t) {
        double z = 0.0;
        for (index_t i = 0; i < d; ++i)
          z += static_cast<double>(x(t, i)) * static_cast<double>(gate(0, i));
        const double own = static_cast<double>(weight.scale) *
                           (weight.gate.empty() ? 1.0 : 1.0 / (1.0 + std::exp(-z)));
        for (index_t i = 0; i < d; ++i)
          expected.push_back(static_cast<double>(without(t, i)) +
                             own * std::tanh(static_cast<double>(x(t, i))));
      }
      CHECK(test::difference(test::values(y), expected, 1e-5, 1e-5) == "");
    }
  }
}

TEST_CASE("a masked token gets zeros and costs no expert a row") {
  moe_layer layer(gate_weights(), mixtral(), curves{});
  const row_matrix<float> x = test::random_rows(20, d, 13);
  std::vector<std::uint8_t> mask(20);
  for (std::size_t t = 0; t < 20; ++t) mask[t] = t % 3 != 0;
  const row_matrix<float> y = run(layer, x, serial{}, {.mask = mask});
  for (index_t t = 0; t < 20; t += 3) CHECK(y.row(t).isZero(0.0f));
  CHECK(layer.plan().kept() == 13 * k);
}

namespace {

// The first number of tokens whose output depends on where the rows of x and y lie.
template <class T, class Layer>
std::string layer_differs(Layer&& layer) {
  for (const index_t tokens : {1, 3, 40}) {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens), 1);
    mask[0] = tokens == 1;
    const std::string broken = test::differs_by_stride([&](test::layout& l) {
      test::random rng(static_cast<std::uint64_t>(tokens));
      const auto x = l.in(test::numbers<T>(rng, tokens * d), tokens, d);
      layer.forward(x, l.template out<T>(tokens, d), {.mask = mask}, serial{});
      l.result(layer.choices().weights());
    });
    if (!broken.empty()) return std::to_string(tokens) + " tokens: " + broken;
  }
  return "";
}

}  // namespace

TEST_CASE("a layer of any kind gives the same rows wherever they lie") {
  const row_matrix<float> gate = test::random_rows(1, d, 17);
  const shared_expert_weight gated{.gate = {gate.data(), static_cast<std::size_t>(d)}};
  const capacity_policy five{.rule = {.formula = capacity_formula::fixed, .count = 5}};
  const auto both = [](auto&& layer) {
    CHECK(layer_differs<float>(layer) == "");
    CHECK(layer_differs<bfloat16>(layer) == "");
  };
  both(moe_layer(gate_weights(), mixtral(), curves{}));
  both(moe_layer(gate_weights(), mixtral(), curves{}, {.weights = weight_on::input}));
  both(moe_layer(gate_weights(), mixtral(), curves{},
                 {.special = {.identity_first = 4, .identity_end = 7}}));
  both(moe_layer(gate_weights(), mixtral(), curves{},
                 {.capacity = five, .lost = lost_token::residual}));
  both(moe_layer(gate_weights(), mixtral(), curves{}, {.shared = gated}, curves{}));
}

TEST_CASE("after an expert has thrown the layer gives what it gave before") {
  const row_matrix<float> x = test::random_rows(40, d, 14);
  for_each_executor([&](const auto& exec) {
    expert_id fails = no_expert;
    moe_layer layer(gate_weights(), mixtral(),
                    [&](expert_id e, matrix_view<const float> in, matrix_view<float> out) {
                      curves{fails}(e, in, out);
                    });
    for (const index_t tokens : {3, 40}) {
      const row_matrix<float> part = x.topRows(tokens);
      fails = no_expert;
      const row_matrix<float> y = run(layer, part, exec);
      fails = layer.choices().ids()[0];
      CHECK_THROWS_AS(run(layer, part, exec), std::runtime_error);
      fails = no_expert;
      CHECK(differ(run(layer, part, exec), y) == "");
    }
  });
}

TEST_CASE("after shared experts or a side input have failed the layer gives what it gave before") {
  const row_matrix<float> x = test::random_rows(40, d, 20);
  std::vector<std::int32_t> own(40, k);
  for_each_executor([&](const auto& exec) {
    bool fails = false;
    moe_layer layer(gate_weights(), mixtral(), curves{}, {},
                    [&](expert_id e, matrix_view<const float> in, matrix_view<float> out) {
                      if (fails) throw std::runtime_error("shared");
                      curves{}(e, in, out);
                    });
    const row_matrix<float> y = run(layer, x, exec);
    fails = true;
    CHECK_THROWS_AS(run(layer, x, exec), std::runtime_error);
    fails = false;
    CHECK(differ(run(layer, x, exec), y) == "");
    own[39] = k + 1;
    CHECK(test::refusal([&] { run(layer, x, exec, {.k_of_token = own}); }) ==
          "moeroute::route: k_of_token is 4, expected 0 to 3");
    CHECK(differ(run(layer, x, exec), y) == "");
  });
}

TEST_CASE("a warm layer of any kind never allocates") {
  const row_matrix<float> x = test::random_rows(60, d, 15);
  row_matrix<float> y(60, d);
  const std::vector<float> gate_row(d, 0.1f);
  moe_layer plain(gate_weights(), mixtral(), networks(experts, 24),
                  {.capacity = capacity_policy{.rule = {.formula = capacity_formula::megatron},
                                               .order = drop_order::by_weight},
                   .shared = {.gate = gate_row}},
                  networks(1, 32));
  moe_layer ragged(gate_weights(), top_p{.p = 0.7f, .max_k = 6}, curves{});
  const auto all = [&] {
    for (const index_t tokens : {60, 8, 1}) {
      const matrix_view<const float> in(x.data(), tokens, d);
      const matrix_view<float> out(y.data(), tokens, d);
      plain.forward(in, out);
      ragged.forward(in, out);
    }
  };
  all();
  CHECK(test::allocations_during(all) == 0);
}

TEST_CASE("options that do not fit the gate are refused by name") {
  const auto made = [](const moe_layer_options& o) {
    return test::refusal([&] { moe_layer(gate_weights(), mixtral(), curves{}, o); });
  };
  CHECK(made({}) == "accepted");
  CHECK(made({.special = {.identity_first = 3, .identity_end = 13}}) ==
        "moeroute::moe_layer: identity_end is 13, expected 0 to 12");
  CHECK(made({.special = {.zero_first = 5, .zero_end = 4}}) ==
        "moeroute::moe_layer: zero_first is 5, expected 0 to 4");
  CHECK(
      made({.special = {.identity_first = 3, .identity_end = 6, .zero_first = 5, .zero_end = 8}}) ==
      "moeroute::moe_layer: identity experts [3, 6) and zero experts [5, 8) overlap, expected "
      "ranges of their own");
  CHECK(
      made({.special = {.identity_first = 3, .identity_end = 6, .zero_first = 6, .zero_end = 8}}) ==
      "accepted");
  const std::string where = "moeroute::moe_layer: ";
  for (const index_t e : {-1, 5}) {
    const auto first = static_cast<expert_id>(e), end = static_cast<expert_id>(e < 0 ? 0 : 4);
    const std::string range = " is " + std::to_string(e) + ", expected 0 to " + std::to_string(end);
    CHECK(made({.special = {.identity_first = first, .identity_end = end}}) ==
          where + "identity_first" + range);
    CHECK(made({.special = {.zero_first = first, .zero_end = end}}) ==
          where + "zero_first" + range);
  }
  CHECK(made({.special = {.zero_end = 13}}) == where + "zero_end is 13, expected 0 to 12");
  CHECK(made({.special = {.identity_first = 12, .identity_end = 12, .zero_end = 12}}) ==
        "accepted");
  CHECK(made({.special = {.identity_first = 3, .identity_end = 6, .zero_end = 3}}) == "accepted");
  CHECK(
      made({.special = {.identity_first = 3, .identity_end = 6, .zero_end = 4}}) ==
      where +
          "identity experts [3, 6) and zero experts [0, 4) overlap, expected ranges of their own");
  for (const index_t wide : {index_t{-1}, (index_t{1} << 40) + 1})
    CHECK(made({.d = wide}) ==
          where + "d is " + std::to_string(wide) + ", expected 1 to 1099511627776");
  // x in the output is as wide as that; what is zero may have any width.
  CHECK(made({.d_out = 7, .special = {.identity_end = 1}}) ==
        where + "d_out with x in the output is 7, expected 40");
  CHECK(made({.d_out = 7, .lost = lost_token::mix}) ==
        where + "d_out with x in the output is 7, expected 40");
  CHECK(made({.d_out = 7, .special = {.zero_end = 1}}) == "accepted");
  CHECK(made({.weights = weight_on::input, .lost = lost_token::mix}) ==
        where + "lost_token::mix shares x by the weights of outputs, not of inputs");
  CHECK(made({.weights = weight_on::input, .lost = lost_token::residual}) == "accepted");
  struct wide_curves : curves {
    index_t d_out() const { return 31; }
  };
  CHECK(moe_layer(gate_weights(), mixtral(), wide_curves{}).d_out() == 31);
  for (const index_t wide : {30, 31, 40})
    CHECK(test::refusal([&] {
            moe_layer(gate_weights(), mixtral(), wide_curves{}, {.d_out = wide});
          }) == (wide == 31 ? "accepted"
                            : where + "experts.d_out() is 31, expected " + std::to_string(wide)));
  CHECK(made({.capacity = capacity_policy{.rule = {.formula = capacity_formula::megatron,
                                                   .factor = -1.0}}}) ==
        "moeroute::capacity_rule: factor is -1.000000, expected > 0");
  CHECK(made({.d_out = -1}) == "moeroute::moe_layer: d_out is -1, expected 1 to 1099511627776");
  CHECK(made({.d_out = (index_t{1} << 40) + 1}) ==
        "moeroute::moe_layer: d_out is 1099511627777, expected 1 to 1099511627776");
  const std::vector<float> three(3);
  CHECK(made({.shared = {.scale = 2.0f}}) ==
        "moeroute::moe_layer: shared experts have a weight, but there are none");
  const auto with_shared = [](const shared_expert_weight& w) {
    return test::refusal(
        [&] { moe_layer(gate_weights(), mixtral(), curves{}, {.shared = w}, curves{}); });
  };
  CHECK(with_shared({.scale = 0.0f}) == "accepted");
  CHECK(with_shared({.gate = three}) ==
        "moeroute::moe_layer: shared.gate.size() is 3, expected 40");
  const std::vector<float> more(41);
  CHECK(with_shared({.gate = more}) ==
        "moeroute::moe_layer: shared.gate.size() is 41, expected 40");
  CHECK(made({.shared = {.gate = three}}) ==
        "moeroute::moe_layer: shared experts have a weight, but there are none");
  CHECK(with_shared({.scale = NAN}) ==
        "moeroute::moe_layer: shared.scale is nan, expected a finite number");
  CHECK(with_shared({.scale = INFINITY}) ==
        "moeroute::moe_layer: shared.scale is inf, expected a finite number");
  CHECK(test::refusal([] { moe_layer(gate_weights(), mixtral(), networks(11, 8)); }) ==
        "moeroute::moe_layer: experts.experts() is 11, expected 12");
  // Beside special experts networks are as many as the last that is none of them, or more.
  const moe_layer_options special{
      .special = {.identity_first = 8, .identity_end = 10, .zero_first = 11, .zero_end = 12}};
  for (const index_t n : {10, 11, 12, 13})
    CHECK(test::refusal([&] { moe_layer(gate_weights(), mixtral(), networks(n, 8), special); }) ==
          (n == 11 || n == 12 ? "accepted"
                              : "moeroute::moe_layer: experts.experts() is " + std::to_string(n) +
                                    ", expected 11 to 12"));
  moe_layer layer(gate_weights(), mixtral(), curves{});
  row_matrix<float> x = test::random_rows(20, d, 16);
  CHECK(test::refusal([&] {
          layer.forward(matrix_view<const float>(x.data(), 10, d),
                        matrix_view<float>(x.data() + d, 10, d));
        }) == "moeroute::moe_layer: x and y overlap, expected memory of their own");
  const auto close_rows = [](float* data, index_t rows) {
    matrix_view<float> v(data, rows, d);
    v.stride = d - 1;
    return v;
  };
  row_matrix<float> y(10, d);
  CHECK(test::refusal([&] { layer.forward(close_rows(x.data(), 10), y); }) ==
        "moeroute::moe_layer: x.stride is 39, expected at least 40");
  const matrix_view<const float> ten(x.data(), 10, d);
  CHECK(test::refusal([&] { layer.forward(ten, close_rows(y.data(), 10)); }) ==
        "moeroute::moe_layer: y.stride is 39, expected at least 40");
}

namespace {

// Sums in double, from the choices alone, of what a layer with these options adds up for a token.
std::vector<double> sums_by_options(const moe_layer_options& o, const assignment& a,
                                    const row_matrix<float>& x, const row_matrix<float>& before,
                                    bool with_shared, std::span<const float> shared_gate) {
  std::vector<double> sums;
  for (index_t t = 0; t < x.rows(); ++t) {
    double gate = 0.0, rest = 1.0;
    for (index_t i = 0; i < d && !shared_gate.empty(); ++i)
      gate += double{x(t, i)} * double{shared_gate[static_cast<std::size_t>(i)]};
    const double shared =
        !with_shared
            ? 0.0
            : double{o.shared.scale} * (shared_gate.empty() ? 1.0 : 1.0 / (1.0 + std::exp(-gate)));
    bool lost = true;
    std::vector<double> row(d, 0.0);
    for (index_t i = 0; i < d && o.output == combine_output::accumulate; ++i)
      row[static_cast<std::size_t>(i)] = double{before(t, i)};
    for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
      const expert_id e = a.ids()[static_cast<std::size_t>(c)];
      const double w = double{a.weights()[static_cast<std::size_t>(c)]};
      if (e < 0 || !a.kept(c) || (e >= o.special.zero_first && e < o.special.zero_end)) continue;
      lost = false;
      rest -= w;
      const bool identity = e >= o.special.identity_first && e < o.special.identity_end;
      for (index_t i = 0; i < d; ++i) {
        const double in = double{x(t, i)};
        row[static_cast<std::size_t>(i)] += identity ? w * in
                                            : o.weights == weight_on::input
                                                ? std::tanh(w * in) * (e + 1) + e
                                                : w * (std::tanh(in) * (e + 1) + e);
      }
    }
    const double own = lost                        ? (o.lost == lost_token::zero ? 0.0 : 1.0)
                       : o.lost == lost_token::mix ? rest
                                                   : 0.0;
    for (index_t i = 0; i < d; ++i)
      sums.push_back(row[static_cast<std::size_t>(i)] + own * double{x(t, i)} +
                     shared * std::tanh(double{x(t, i)}));
  }
  return sums;
}

moe_layer_options drawn_layer_options(test::random& rng) {
  moe_layer_options o;
  if (rng.below(2) == 0) {
    const auto first = static_cast<expert_id>(rng.below(6));
    o.special.identity_first = first;
    o.special.identity_end = first + static_cast<expert_id>(rng.below(4));
    o.special.zero_first = o.special.identity_end;
    o.special.zero_end = o.special.zero_first + static_cast<expert_id>(rng.below(4));
  }
  if (rng.below(2) == 0) {
    const drop_order orders[] = {drop_order::choice_major, drop_order::token_major,
                                 drop_order::by_weight, drop_order::batch_priority,
                                 drop_order::random};
    const renormalization sums[] = {renormalization::none, renormalization::before_drop,
                                    renormalization::after_drop};
    o.capacity =
        capacity_policy{.rule = {.formula = capacity_formula::fixed, .count = rng.below(4)},
                        .order = orders[rng.below(5)],
                        .renormalize = sums[rng.below(3)],
                        .seed = 5,
                        .step = static_cast<std::uint64_t>(rng.below(9))};
  }
  const lost_token lost[] = {lost_token::zero, lost_token::residual, lost_token::mix};
  o.weights = rng.below(3) == 0 ? weight_on::input : weight_on::output;
  o.lost = lost[rng.below(o.weights == weight_on::input ? 2 : 3)];
  o.output = rng.below(3) == 0 ? combine_output::accumulate : combine_output::overwrite;
  o.rows_per_call = rng.below(4);
  return o;
}

// A layer's calls of changing sizes: in place, of 16 bits, with rows apart, on threads, masked.
template <bool with_shared, class Layer>
void expect_sums_by_options(Layer& layer, std::span<const float> shared_gate, test::random& rng) {
  const moe_layer_options& o = layer.options();
  for (int call = 0; call < 4; ++call) {
    const index_t tokens = rng.below(3) == 0 ? 9 + rng.below(30) : rng.below(9);
    std::vector<std::uint8_t> mask;
    std::vector<std::int32_t> own;
    for (index_t t = 0, masked = rng.below(2), fewer = rng.below(2); t < tokens; ++t) {
      if (masked != 0) mask.push_back(static_cast<std::uint8_t>(2 * rng.below(3)));
      if (with_shared && fewer != 0) own.push_back(static_cast<std::int32_t>(rng.below(k + 1)));
    }
    const side_inputs side{.mask = mask, .k_of_token = own};
    const index_t stride = d + (rng.below(2) == 0 ? 0 : 5);
    row_matrix<float> x = test::random_rows(tokens, stride, rng.bits());
    if (rng.below(4) == 0 && tokens > 1) x.row(tokens - 1) = x.row(0);
    const int way = static_cast<int>(rng.below(4));
    const row_matrix<bfloat16> narrow = x.cast<bfloat16>();
    if (way == 0) x = narrow.cast<float>();
    row_matrix<float> y = test::random_rows(tokens, stride, rng.bits());
    if (way == 1) y = x;
    const row_matrix<float> given = x.leftCols(d), before = y.leftCols(d);
    matrix_view<float> out(y.data(), tokens, d);
    out.stride = stride;
    matrix_view<const float> in(way == 1 ? y.data() : x.data(), tokens, d);
    in.stride = stride;
    if (way == 0) {
      matrix_view<const bfloat16> rows(narrow.data(), tokens, d);
      rows.stride = stride;
      layer.forward(rows, out, side);
    } else if (with_shared && way == 2) {
      layer.forward(in, out, side, threads());
    } else {
      layer.forward(in, out, side);
    }
    if constexpr (with_shared) {
      assignment choices;
      workspace ws;
      route(layer.router(), layer.logits(), side, ws, choices);
      if (o.capacity) apply_capacity(choices, *o.capacity, ws);
      REQUIRE(std::ranges::equal(choices.ids(), layer.choices().ids()));
      REQUIRE(std::ranges::equal(choices.weights(), layer.choices().weights()));
      REQUIRE(choices.drops() == layer.choices().drops());
      REQUIRE(std::ranges::equal(choices.kept(), layer.choices().kept()));
    }
    const row_matrix<float> got = y.leftCols(d);
    INFO("call " << call << ", way " << way << ", tokens " << tokens << ", stride " << stride);
    REQUIRE(test::difference(
                test::values(got),
                sums_by_options(o, layer.choices(), given, before, with_shared, shared_gate), 1e-4,
                1e-4) == "");
  }
}

}  // namespace

TEST_CASE("a layer of any options adds up what its choices say, in every call and every way") {
  test::random rng(91);
  const row_matrix<float> gate = 0.2f * test::random_rows(1, d, 17);
  const std::span<const float> row(gate.data(), static_cast<std::size_t>(d));
  for (int draw = 0; draw < 150; ++draw) {
    INFO("draw " << draw);
    moe_layer_options o = drawn_layer_options(rng);
    const expert_choice<softmax> few{.capacity = {.fixed = 1 + rng.below(3)}};
    moe_layer ragged(gate_weights(), top_p{.p = 0.7f, .max_k = 6}, curves{}, o);
    moe_layer batch(gate_weights(), few, curves{}, o);
    expect_sums_by_options<false>(ragged, {}, rng);
    expect_sums_by_options<false>(batch, {}, rng);
    o.shared.scale = rng.below(2) == 0 ? 1.0f : -0.75f;
    const std::span<const float> gated = rng.below(2) == 0 ? row : row.first(0);
    o.shared.gate = gated;
    moe_layer shared(gate_weights(), mixtral(), curves{}, o, curves{});
    expect_sums_by_options<true>(shared, gated, rng);
  }
}

}  // namespace moe_layer_options_test
