#include <moeroute/stage/weigh.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/spec_text.hpp>
#include <moeroute/policy/weigh/any_router.hpp>
#include <moeroute/policy/weigh/batch_routers.hpp>
#include <moeroute/policy/weigh/rare_router.hpp>
#include <moeroute/policy/weigh/row_routers.hpp>
#include <moeroute/stage/route.hpp>
#include <moeroute/stage/transform_rows.hpp>
#include <string>
#include <vector>

#include "oracle/losses.hpp"
#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/threads.hpp"

using namespace moeroute;

namespace {

constexpr index_t tokens = 6, experts = 8;

// A score of one's own: exp(z / 2).
struct half_exponential : elementwise_score<half_exponential> {
  template <class A>
  static simd::vfloat<A> value(simd::vfloat<A> z) {
    return simd::exp<A>(z * simd::vfloat<A>(0.5f));
  }
  static double value(double z) { return std::exp(0.5 * z); }
  static double slope(double, double value) { return 0.5 * value; }
};

// f(name, router, columns, side inputs) for a router of every kind and every part.
template <class F>
void for_each_router(F&& f) {
  static const std::vector<float> scale = {1.5f, 0.5f, -1.0f, 2.0f, 0.25f, 1.0f, 3.0f, 0.75f};
  static const std::vector<float> add = {0.3f, -0.2f, 0.1f, 0.4f, -0.5f, 0.0f, 0.2f, -0.1f};
  static const std::vector<float> bias = {0.1f, -0.1f, 0.2f, 0.0f, 0.3f, -0.2f, 0.0f, 0.1f};
  static const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  static const std::vector<std::uint8_t> modality = {0, 1, 1, 0, 1, 0};
  static const std::vector<float> shared = {0.5f, 0.25f, 1.0f, 2.0f, 0.1f, 0.0f};
  static const std::vector<std::int32_t> ids = {0, 3, 1, 2, 3, 0};
  static const expert_table table({0, 1, 2, 3, 4, no_expert, 7, 6, 5, 1, 4, 7}, 3, experts);
  static const routing_record<std::uint8_t> record = [] {
    routing_record<std::uint8_t> r;
    assignment a;
    a.reset(tokens, experts, 2);
    for (index_t c = 0; c < 2 * tokens; ++c)
      a.ids()[static_cast<std::size_t>(c)] = static_cast<expert_id>((5 * c + c / 2) % experts);
    r.record(a);
    return r;
  }();
  static const std::vector<float> width(test::make_logits(test::shape::normal, 9, tokens, experts));
  constexpr auto sum = normalization::sum;
  constexpr auto lp = normalization::lp;
  const top_k three{.k = 3};
  const side_inputs plain{.seed = 5, .step = 2};
  const auto eight = [&](const char* name, const auto& router, const side_inputs& side) {
    f(name, router, experts, side);
  };
  eight("softmax", router<softmax>{.selection = three, .weight = {.scale = 2.5f}}, plain);
  static const std::vector<std::int32_t> own_k = {3, 1, 2, 0, 3, 2};
  eight("softmax, sum, own k", router<softmax>{.selection = three, .weight = {.normalize = sum}},
        {.k_of_token = own_k});
  eight("softmax of the selected, own k", router<softmax_selected>{.selection = three},
        {.k_of_token = own_k});
  eight("top-p, own k", top_p{.p = 0.9f, .weight = {.normalize = sum}}, {.k_of_token = own_k});
  eight("softmax, sum", router<softmax>{.selection = three, .weight = {.normalize = sum}},
        {.mask = mask});
  eight("softmax, bias, clamp",
        router<softmax>{.selection = three,
                        .weight = {.normalize = sum, .eps_where = eps_mode::clamp, .eps = 0.7f},
                        .bias = selection_bias(bias)},
        plain);
  eight("softmax, L3, experts' scale",
        router<softmax>{
            .selection = three,
            .weight = {.normalize = lp, .p = 3.0f, .divide = 3.0f, .expert_scale = scale}},
        plain);
  eight("softmax, L2 + eps",
        router<softmax>{
            .selection = three,
            .weight = {.normalize = lp, .p = 2.0f, .eps_where = eps_mode::add, .eps = 0.125f}},
        plain);
  eight("softmax of the selected, transformed",
        router<softmax_selected>{.selection = three,
                                 .transform = {.temperature = 0.75f, .softcap = 2.0f, .add = add}},
        plain);
  eight("sigmoid, noise",
        router<sigmoid>{.selection = three,
                        .weight = {.normalize = sum},
                        .transform = {.noise = {.kind = noise_kind::gaussian, .sigma = 0.5f}}},
        plain);
  eight("softmax, learned noise",
        router<softmax>{.selection = three, .transform = {.noise = {.kind = noise_kind::gumbel}}},
        {.noise_logits = test::rows_of(width, experts), .seed = 3, .step = 1});
  eight("sqrt softplus, groups",
        router<sqrt_softplus>{.selection = {.k = 3, .groups = 4, .topk_group = 2},
                              .weight = {.normalize = lp, .p = 2.0f}},
        plain);
  eight("softplus, sum + eps",
        router<softplus>{.selection = three,
                         .weight = {.normalize = sum, .eps_where = eps_mode::add, .eps = 0.5f}},
        plain);
  eight("a score of one's own",
        router<half_exponential>{.selection = three, .weight = {.normalize = sum}}, plain);
  eight("identity", router<identity_score>{.selection = three}, plain);
  eight("identity, sum, own k",
        router<identity_score>{.selection = three, .weight = {.normalize = sum}},
        {.k_of_token = own_k});
  eight("top-p", top_p{.p = 0.7f, .weight = {.normalize = sum}}, plain);
  eight("a percentile of the batch", batch_percentile<>{.weight = {.normalize = sum}},
        {.mask = mask});
  eight("relu, rms",
        threshold_router<relu>{.norm = threshold_norm::rms, .scale = 2.0f, .gamma = scale}, plain);
  eight("sigmoid over a threshold, sum",
        threshold_router<sigmoid>{
            .threshold = 0.25f, .norm = threshold_norm::sum, .eps = 0.125f, .norm_scale = 0.5f},
        plain);
  eight("a table", table_router<softmax>{&table}, {.token_ids = ids});
  eight("a table without a gate", table_router<uniform_score>{&table, {}, {.normalize = sum}},
        {.token_ids = ids});
  eight("product keys, selected", product_keys<>{.choices = 5}, plain);
  eight("product keys, softmax of all", product_keys<softmax>{.choices = 5}, plain);
  eight("keys of a rectangle", product_keys<softmax>{.choices = 5, .first_keys = 3}, plain);
  eight("keys of a rectangle, selected", product_keys<>{.choices = 5, .first_keys = 5}, plain);
  eight("SparseMixer", sparsemixer{.jitter = 0.25f}, plain);
  eight("replay", replay<softmax, std::uint8_t>{.record = &record, .weight = {.normalize = sum}},
        plain);
  eight("GShard's two", gshard_top2{.policy = second_expert::random, .weight = {.normalize = sum}},
        plain);
  eight("random", random_choice{.choices = 3}, plain);
  const router<softmax> two{.selection = {.k = 2}, .weight = {.scale = 2.0f}};
  // By name: clang 16 makes a wrong address of a router that is a member of an unnamed one.
  const router<sigmoid> two_sigmoids{.selection = {.k = 2}};
  eight("two modalities", by_modality<router<softmax>, router<sigmoid>>{two, two_sigmoids, 5},
        {.modality = modality});
  constexpr logit_noise gaussian{.kind = noise_kind::gaussian};
  const router<softmax> noisy{.selection = {.k = 2}, .transform = {.noise = gaussian}};
  const router<sigmoid> noisy_sigmoids{.selection = {.k = 2}, .transform = {.noise = gaussian}};
  eight("two modalities, learned noise",
        by_modality<router<softmax>, router<sigmoid>>{noisy, noisy_sigmoids, 5},
        {.modality = modality, .noise_logits = test::rows_of(width, experts), .seed = 9});
  eight("two modalities, of which the second has learned noise",
        by_modality<router<softmax>, router<sigmoid>>{two, noisy_sigmoids, 5},
        {.modality = modality, .noise_logits = test::rows_of(width, experts), .seed = 9});
  eight("shared experts with a gate", with_shared<router<softmax>>{two, 2},
        {.shared_weight = shared});
  eight("shared experts", with_shared<router<softmax>>{two, 1, 0.5f}, plain);
  eight("expert choice", expert_choice<>{.capacity = {.factor = 2.0}}, plain);
  eight("expert choice, sum",
        expert_choice<sigmoid>{
            .capacity = {.factor = 3.0}, .normalize = token_renormalization::sum, .scale = 2.0f},
        {.mask = mask});
  eight("Sinkhorn", sinkhorn{.k = 2}, plain);
  eight("Sinkhorn, one", sinkhorn{.k = 1}, plain);
  eight("selective Sinkhorn",
        selective_sinkhorn{
            .k = 2, .probability = 0.0f, .noise = {.kind = noise_kind::gaussian, .sigma = 0.25f}},
        plain);
  eight("Sinkhorn by experts", sinkhorn_expert_choice{.capacity = {.factor = 2.0}}, plain);
  eight("sparse transport", sparse_transport{.capacity = {.factor = 2.0}}, plain);
  eight("sparse transport by tokens", sparse_transport_token_choice{.k = 2}, plain);
  eight("as many as the row says",
        counted<>{.count = {.ratio = 0.25f, .max_k = 4}, .weight = {.normalize = sum}}, plain);
  eight("all where undecided", dense_if{.rule = {.p = 0.5f, .max_k = 5}, .threshold = 0.95f},
        plain);
  eight("BASE", base_assignment{.phase = routing_phase::evaluation}, plain);
}

template <class F>
matrix_view<const F> view_of(const std::vector<F>& z, index_t columns) {
  return {z.data(), static_cast<index_t>(z.size()) / columns, columns};
}

std::vector<double> random_doubles(std::size_t n, std::uint64_t seed) {
  test::random rng(seed);
  std::vector<double> x(n);
  for (double& v : x) v = static_cast<double>(rng.normal());
  return x;
}

template <class Router, class Exec = serial>
std::vector<double> gradient(const Router& router, const std::vector<double>& z, index_t columns,
                             const side_inputs& side, const assignment& a,
                             const std::vector<double>& dw, const Exec& exec = {},
                             const router_gradients<double>& own = {}) {
  workspace ws;
  std::vector<double> dz(z.size(), 3.0);
  weigh_backward(router, view_of(z, columns), side, a, dw, gradient_to::write,
                 matrix_view<double>(dz.data(), static_cast<index_t>(z.size()) / columns, columns),
                 ws, exec, own);
  return dz;
}

}  // namespace

TEST_CASE("weights of given choices are those that route wrote, for every router") {
  for (const auto shape : {test::shape::normal, test::shape::masked, test::shape::half_nan,
                           test::shape::plus_infs, test::shape::quantised})
    for_each_router([&](const char* name, const auto& router, index_t columns, const auto& side) {
      INFO(name << ", " << test::name(shape));
      const std::vector<float> z = test::make_logits(shape, 2, tokens, columns);
      const assignment a = test::routed(router, z, columns, side);
      std::vector<float> w(static_cast<std::size_t>(a.choices()), -9.0f);
      workspace ws;
      weigh(router, view_of(z, columns), side, a, std::span(w), ws);
      CHECK(test::difference(w, a.weights(), 3e-6, 1e-30) == "");
    });
}

TEST_CASE("gradients of weights are their derivatives, for every router") {
  for_each_router([](const char* name, const auto& router, index_t columns, const auto& side) {
    INFO(name);
    const std::vector<float> near = test::make_logits(test::shape::normal, 4, tokens, columns);
    const assignment a = test::routed(router, near, columns, side);
    const std::vector<double> z(near.begin(), near.end());
    const std::vector<double> dw = random_doubles(static_cast<std::size_t>(a.choices()), 3);
    workspace ws;
    std::vector<double> w(dw.size());
    const auto value = [&](const std::vector<double>& x) {
      weigh(router, view_of(x, columns), side, a, std::span(w), ws);
      double sum = 0.0;
      for (std::size_t c = 0; c < w.size(); ++c)
        if (a.ids()[c] != no_expert) sum += dw[c] * w[c];
      return sum;
    };
    const std::vector<double> dz = gradient(router, z, columns, side, a, dw);
    CHECK(test::difference(dz, oracle::derivative(z, value), 1e-7, 2e-9) == "");
    std::vector<float> in_float(z.size());
    const std::vector<float> dw_float(dw.begin(), dw.end());
    weigh_backward(router, view_of(near, columns), side, a, dw_float, gradient_to::write,
                   matrix_view<float>(in_float.data(), tokens, columns), ws);
    CHECK(test::difference(in_float, dz, 1e-5, 5e-6) == "");
  });
}

namespace {

// Differences of the widths of noise, which are floats, against what weigh_backward adds to them.
template <class Router>
void noise_gate_agrees(const Router& r, std::span<const std::uint8_t> modality) {
  const std::vector<double> z = random_doubles(tokens * experts, 5);
  std::vector<float> width = test::make_logits(test::shape::normal, 6, tokens, experts);
  const side_inputs side{
      .modality = modality, .noise_logits = test::rows_of(width, experts), .seed = 7};
  const assignment a = test::routed(r, {z.begin(), z.end()}, experts, side);
  const std::vector<double> dw = random_doubles(static_cast<std::size_t>(a.choices()), 8);
  std::vector<double> dwidth(z.size());
  gradient(r, z, experts, side, a, dw, serial{},
           {.noise_logits = matrix_view<double>(dwidth.data(), tokens, experts)});
  workspace ws;
  std::vector<double> w(dw.size());
  const auto value = [&] {
    weigh(r, view_of(z, experts), side, a, std::span(w), ws);
    double sum = 0.0;
    for (std::size_t c = 0; c < w.size(); ++c) sum += dw[c] * w[c];
    return sum;
  };
  for (std::size_t i = 0; i < width.size(); ++i) {
    const float was = width[i];
    width[i] = was + 0x1p-8f;  // differences of floats are exact
    const double far = static_cast<double>(width[i]), up = value();
    width[i] = was - 0x1p-8f;
    const double slope = (up - value()) / (far - static_cast<double>(width[i]));
    width[i] = was;
    CHECK(std::abs(slope - dwidth[i]) < 2e-5);
  }
}

}  // namespace

TEST_CASE("the gradient of a noise gate is its derivative, in the columns of each modality too") {
  constexpr logit_noise gaussian{.kind = noise_kind::gaussian};
  const router<softmax> warm{.selection = {.k = 3},
                             .transform = {.temperature = 0.5f, .noise = gaussian}};
  const router<softmax> two{.selection = {.k = 2}, .transform = {.noise = gaussian}};
  const std::vector<std::uint8_t> modality = {0, 1, 1, 0, 1, 0};
  noise_gate_agrees(warm, {});
  noise_gate_agrees(by_modality<router<softmax>>{two, two, 5}, modality);
}

TEST_CASE("logits that are not finite have no gradient, and spoil no other's, for every router") {
  for (const auto shape : {test::shape::plus_infs, test::shape::half_nan, test::shape::masked})
    for_each_router([&](const char* name, const auto& router, index_t columns, const auto& side) {
      INFO(name << ", " << test::name(shape));
      const std::vector<float> near = test::make_logits(shape, 2, tokens, columns);
      const std::vector<double> z(near.begin(), near.end());
      const assignment a = test::routed(router, near, columns, side);
      const std::vector<double> dz = gradient(
          router, z, columns, side, a, random_doubles(static_cast<std::size_t>(a.choices()), 3));
      int wrong = 0;
      for (std::size_t i = 0; i < z.size(); ++i)
        wrong += !(std::isfinite(z[i]) ? std::isfinite(dz[i]) : dz[i] == 0.0);
      CHECK(wrong == 0);
    });
}

TEST_CASE("scores that are all 0 have the gradient that eps leaves them, whatever the norm") {
  const std::vector<double> z(tokens * experts, 0.0);
  for (const float p : {2.0f, 3.0f}) {
    const router<identity_score> r{
        .selection = {.k = 2},
        .weight = {
            .normalize = normalization::lp, .p = p, .eps_where = eps_mode::add, .eps = 0.125f}};
    const assignment a = test::routed(r, test::zeros(tokens, experts), experts);
    const std::vector<double> dw = random_doubles(static_cast<std::size_t>(a.choices()), 4);
    const std::vector<double> dz = gradient(r, z, experts, {}, a, dw);
    std::vector<double> expected(z.size());
    for (std::size_t c = 0; c < dw.size(); ++c)
      expected[c / 2 * static_cast<std::size_t>(experts) + static_cast<std::size_t>(a.ids()[c])] =
          dw[c] / 0.125;
    CHECK(dz == expected);
  }
  // Without eps they are divided by nothing, and have none.
  router<identity_score> r{.selection = {.k = 2}, .weight = sum_normalized};
  const assignment a = test::routed(r, test::zeros(tokens, experts), experts);
  CHECK(gradient(r, z, experts, {}, a, random_doubles(static_cast<std::size_t>(a.choices()), 4)) ==
        std::vector<double>(z.size(), 0.0));
  // Nor have scores a weight whose sum is 0. A sum that is eps itself is held by it.
  const std::vector<float> two{1.0f, -1.0f, 1.0f, 1.0f};
  const assignment both = test::routed(r, two, 2);
  std::vector<float> w(4, 7.0f);
  workspace ws;
  weigh(r, view_of(two, 2), side_inputs{}, both, std::span(w), ws);
  CHECK(w == std::vector<float>{0.0f, 0.0f, 0.5f, 0.5f});
  CHECK(test::bit_difference(both.weights(), w) == "");
  r.weight.eps_where = eps_mode::clamp, r.weight.eps = 2.0f;
  CHECK(gradient(r, {1.0, 1.0}, 2, {}, test::routed(r, {1.0f, 1.0f}, 2), {3.0, 5.0}) ==
        std::vector<double>{1.5, 2.5});
}

TEST_CASE("a logit of +inf has a gradient in nothing but what is added to it") {
  const std::vector<float> add(2, 0.5f);
  const router<sigmoid> bent{.selection = {.k = 2},
                             .transform = {.temperature = 0.5f, .softcap = 2.0f, .add = add}};
  const assignment a = test::routed(bent, {test::infinity, 0.25f}, 2);
  std::vector<double> dt(1), dadd(2);
  const auto dz = gradient(bent, {HUGE_VAL, 0.25}, 2, {}, a, {1.0, 0.0}, serial{},
                           {.add = dadd, .temperature = dt});
  CHECK(dz == std::vector<double>{0.0, 0.0});
  CHECK(dt[0] == 0.0);
  CHECK(dadd[0] > 0.0);
  // And beside another one it has the whole weight of a threshold, as the other.
  const threshold_router<relu> open{.norm = threshold_norm::sum};
  const std::vector<float> wild{test::infinity, 1.0f, test::infinity};
  const assignment many = test::routed(open, wild, 3);
  std::vector<float> w(3, 7.0f);
  workspace ws;
  weigh(open, view_of(wild, 3), side_inputs{}, many, std::span(w), ws);
  CHECK(test::bit_difference(many.weights(), w) == "");
}

TEST_CASE("what is absent has no part in a gradient, though its weight's be beyond a float") {
  std::vector<float> z{0.5f, 1.0f, -test::infinity, 0.25f};
  assignment a;
  a.reset(1, 4, 3);
  std::copy_n(std::vector<expert_id>{1, 2, 3}.begin(), 3, a.ids().begin());
  const auto gradient_of = [&](const auto& r, float absent) {
    const std::vector<float> dw{1e-38f, absent, 2e-38f};
    std::vector<float> dz(4);
    workspace ws;
    weigh_backward(r, view_of(z, 4), side_inputs{}, a, dw, gradient_to::write,
                   matrix_view<float>(dz.data(), 1, 4), ws);
    return dz;
  };
  const router<softmax> over_all{.selection = {.k = 3}, .weight = {.scale = 3e38f}};
  const router<softmax_selected> among{.selection = {.k = 3}, .weight = {.scale = 3e38f}};
  for (const float absent : {-test::infinity, -200.0f}) {  // or as good as absent
    z[2] = absent;
    CHECK(gradient_of(over_all, 10.0f) == gradient_of(over_all, 0.0f));
    CHECK(gradient_of(among, 10.0f) == gradient_of(among, 0.0f));
  }
  std::copy_n(std::vector<expert_id>{1, 0, 3}.begin(), 3, a.ids().begin());
  CHECK(gradient_of(over_all, 10.0f)[2] == 0.0f);  // nor has one that nobody chose
  // Nor has an expert that was not close to the best, though its weight has no finite one.
  std::copy_n(std::vector<expert_id>{3, 1, no_expert}.begin(), 3, a.ids().begin());
  const std::vector<float> dz = [&] {
    const std::vector<float> dw{test::infinity, 1.0f, 1.0f};
    std::vector<float> to(4);
    workspace ws;
    weigh_backward(sparsemixer{}, view_of(z, 4), side_inputs{}, a, dw, gradient_to::write,
                   matrix_view<float>(to.data(), 1, 4), ws);
    return to;
  }();
  CHECK(dz[3] == 0.0f);
  const weight_map plain{};
  CHECK((plain.p == 2.0f && plain.sum_factor == 1.0f && plain.eps == 0.0f && plain.factor == 1.0f &&
         plain.divide == 1.0f && plain.jitter == 0.0f && plain.first_keys == 0));
  const weight_maps both{};
  CHECK((both.first_columns == 0 && both.shared == 0 && both.shared_weight == 0.0f));
}

TEST_CASE("SparseMixer's estimator is the softmax's derivative, not that of the weights it draws") {
  const sparsemixer_training router{.jitter = 0.4f};
  const std::vector<float> near = test::make_logits(test::shape::normal, 4, tokens, experts);
  const std::vector<double> z(near.begin(), near.end());
  const std::vector<double> dw = random_doubles(2 * tokens, 3);
  index_t thirds = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const side_inputs side{.seed = seed, .step = 3};
    const assignment a = test::routed(router, near, experts, side);
    std::vector<float> w(2 * tokens);
    workspace ws;
    weigh(router, view_of(near, experts), side, a, std::span(w), ws);
    CHECK(test::difference(w, a.weights(), 3e-6, 1e-30) == "");
    std::vector<double> expected(z.size(), 0.0);
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<double> left(z.begin() + t * experts, z.begin() + (t + 1) * experts);
      for (index_t r = 0; r < 2; ++r) {
        const auto c = static_cast<std::size_t>(2 * t + r);
        const auto e = static_cast<std::size_t>(a.ids()[c]);
        const double top = *std::max_element(left.begin(), left.end());
        std::vector<double> p(left.size(), 0.0);
        double sum = 0.0;
        for (std::size_t j = 0; j < left.size(); ++j)
          if (std::isfinite(left[j]) &&
              (top - left[j]) / std::max(std::abs(left[j]), top) <= 2.0 * 0.4f)
            sum += p[j] = std::exp(left[j] - top);
        REQUIRE(p[e] > 0.0);  // only what is close is drawn
        for (double& v : p) v /= sum;
        for (std::size_t j = 0; j < p.size(); ++j)
          expected[static_cast<std::size_t>(t * experts) + j] +=
              dw[c] * p[e] * ((j == e ? 1.0 : 0.0) - p[j]);
        // Whole for the best, a third for three quarters of the others.
        const double share = static_cast<double>(a.weights()[c]) / p[e];
        const bool third = std::abs(3.0 * share - 1.0) < 1e-5;
        CHECK((third || std::abs(share - 1.0) < 1e-5));
        if (left[e] == top) CHECK_FALSE(third);
        thirds += third;
        left[e] = -HUGE_VAL;
      }
    }
    CHECK(test::difference(gradient(router, z, experts, side, a, dw), expected, 1e-12, 1e-14) ==
          "");
  }
  CHECK(thirds > 20);
}

TEST_CASE("one choice that is divided by its sum has no gradient") {
  const std::vector<double> z = random_doubles(tokens * experts, 11);
  const std::vector<double> dw = random_doubles(tokens, 12);
  const auto gradient_of = [&](const auto& router) {
    const assignment a = test::routed(router, {z.begin(), z.end()}, experts);
    return gradient(router, z, experts, {}, a, dw);
  };
  CHECK(gradient_of(router<softmax>{.selection = {.k = 1}, .weight = sum_normalized}) ==
        std::vector<double>(z.size(), 0.0));
  CHECK(gradient_of(router<softmax_selected>{.selection = {.k = 1}}) ==
        std::vector<double>(z.size(), 0.0));
  CHECK(gradient_of(router<softmax>{.selection = {.k = 1}}) != std::vector<double>(z.size(), 0.0));
}

TEST_CASE("a NaN in the gradient of a weight stays in its token's row") {
  const std::vector<double> z = random_doubles(tokens * experts, 13);
  const router<softmax> r{.selection = {.k = 2}};
  const assignment a = test::routed(r, {z.begin(), z.end()}, experts);
  std::vector<double> dw(static_cast<std::size_t>(a.choices()), 1.0);
  dw[5] = std::nan("");
  const std::vector<double> dz = gradient(r, z, experts, {}, a, dw);
  for (std::size_t i = 0; i < dz.size(); ++i)
    CHECK(std::isnan(dz[i]) == (i / static_cast<std::size_t>(experts) == 2));
}

TEST_CASE("gradients have the same bits for every executor, and are added where asked") {
  constexpr index_t many = 3000;
  const std::vector<float> near = test::make_logits(test::shape::normal, 1, many, experts);
  const std::vector<double> z(near.begin(), near.end());
  const std::vector<float> scale(experts, 1.5f);
  const router<softmax> r{.selection = {.k = 3}, .weight = {.expert_scale = scale}};
  const assignment a = test::routed(r, near, experts);
  const std::vector<double> dw = random_doubles(static_cast<std::size_t>(a.choices()), 2);
  const auto alone = gradient(r, z, experts, {}, a, dw);
  CHECK(gradient(r, z, experts, {}, a, dw, test::backwards{}) == alone);
  CHECK(gradient(r, z, experts, {}, a, dw, test::several_threads{}) == alone);
  std::vector<double> dscale(experts), again(experts);
  CHECK(gradient(r, z, experts, {}, a, dw, serial{}, {.expert_factor = dscale}) == alone);
  CHECK(gradient(r, z, experts, {}, a, dw, test::backwards{}, {.expert_factor = again}) == alone);
  CHECK(dscale == again);
  const router<softmax> warm{.selection = {.k = 3}, .transform = {.temperature = 0.5f}};
  std::vector<double> dheat(1), dheat_again(1);
  gradient(warm, z, experts, {}, a, dw, serial{}, {.temperature = dheat});
  gradient(warm, z, experts, {}, a, dw, test::backwards{}, {.temperature = dheat_again});
  CHECK(dheat == dheat_again);

  workspace ws;
  std::vector<double> dz = z;
  const matrix_view<double> out(dz.data(), many, experts);
  weigh_backward(r, view_of(z, experts), {}, a, dw, gradient_to::add, out, ws);
  for (std::size_t i = 0; i < dz.size(); ++i) dz[i] -= z[i];
  CHECK(test::difference(dz, alone, 0.0, 1e-14) == "");
  std::vector<double> w(dw.size());
  CHECK(test::allocations_during([&] {
          weigh(r, view_of(z, experts), {}, a, std::span(w), ws);
          weigh_backward(r, view_of(z, experts), {}, a, dw, gradient_to::write, out, ws);
        }) == 0);
  weigh_backward(r, view_of(z, experts), {}, a, dw, gradient_to::nowhere, matrix_view<double>{},
                 ws);
}

TEST_CASE("a router picked at run time has the weights and gradients of its kind") {
  const std::vector<float> near = test::make_logits(test::shape::normal, 21, tokens, experts);
  const std::vector<double> z(near.begin(), near.end());
  router_spec spec;
  spec.experts = experts;
  spec.k = 3;
  spec.score = score_kind::sigmoid;
  spec.normalize = normalization::sum;
  const router<sigmoid> same{.selection = {.k = 3}, .weight = sum_normalized};
  const assignment a = test::routed(same, near, experts);
  const std::vector<double> dw = random_doubles(static_cast<std::size_t>(a.choices()), 22);
  CHECK(gradient(make_router(spec), z, experts, {}, a, dw) ==
        gradient(same, z, experts, {}, a, dw));
}

TEST_CASE("a router of rare words has the gradients of its kind, and steps on logits are refused") {
  const std::vector<float> near = test::make_logits(test::shape::normal, 23, tokens, experts);
  const std::vector<double> z(near.begin(), near.end());
  const std::vector<float> bias(experts, 0.1f);
  const auto same = [&](const std::string& text, const auto& router,
                        const router_tensors& tensors = {}) {
    INFO(text);
    const any_rare_router made = make_rare_router(parse_spec(text), tensors);
    const side_inputs side{.seed = 4, .step = 2};
    const assignment a = test::routed(made, near, experts, side);
    const std::vector<double> dw = random_doubles(static_cast<std::size_t>(a.choices()), 24);
    CHECK(gradient(made, z, experts, side, a, dw) == gradient(router, z, experts, side, a, dw));
  };
  const router<sigmoid> sigmoids{.selection = {.k = 3}, .weight = sum_normalized};
  const router<softmax_selected> winners{.selection = {.k = 3}};
  same("E=8 k=3 score=sigmoid normalize=sum ties=higher_id", sigmoids);
  same("E=8 k=3 score=sigmoid normalize=sum explore=0.5", sigmoids);
  same("E=8 k=3 score=sigmoid bias=selection weight_score=softmax weight_domain=selected", winners,
       {.bias = bias});
  same("E=8 k=4 score=softmax selection=each_group groups=4",
       router<softmax>{.selection = {.k = 4}});
  same("E=8 k=3 score=softmax selection=counted count=ratio ratio=0.25 max_k=4",
       router<softmax>{.selection = {.k = 3}});
  const auto refused = [&](const std::string& text) {
    const any_rare_router made = make_rare_router(parse_spec(text));
    std::vector<float> own(static_cast<std::size_t>(tokens * made.columns()), 0.5f);
    const assignment a = test::routed(made, own, made.columns());
    std::vector<float> w(static_cast<std::size_t>(a.choices()));
    workspace ws;
    return test::refusal(
        [&] { weigh(made, test::rows_of(own, made.columns()), {}, a, std::span(w), ws); });
  };
  const std::string step =
      "moeroute::weigh: transformed changes logits before its router sees them: weigh the router "
      "inside on the changed rows, and go on with the step's own derivative";
  CHECK(refused("E=8 k=2 score=softmax standardize=2") == step);
  CHECK(refused("E=8 k=2 score=softmax candidates=4") == step);
  CHECK(refused("E=8 k=2 score=softmax second_logits=weigh") ==
        "moeroute::weigh: weighed_by_second weighs by the second half of the columns: weigh a "
        "router of its score and weight rule on that half");
}

TEST_CASE("no token, no choice, no gradient") {
  const router<softmax> r{.selection = {.k = 2}};
  const assignment a = test::routed(r, {}, experts);
  CHECK(gradient(r, {}, experts, {}, a, {}).empty());
}

TEST_CASE("sizes that do not fit, shared memory and foreign ids are refused by name") {
  std::vector<double> z = random_doubles(tokens * experts, 31);
  const router<softmax> r{.selection = {.k = 2}};
  assignment a = test::routed(r, {z.begin(), z.end()}, experts);
  std::vector<double> dw(12), dz(z.size());
  workspace ws;
  const auto refused = [&](index_t rows, std::size_t weights, matrix_view<double> out,
                           const router_gradients<double>& own = {}, const side_inputs& side = {}) {
    return test::refusal([&] {
      weigh_backward(r, matrix_view<const double>(z.data(), rows, experts), side, a,
                     std::span<const double>(dw.data(), weights), gradient_to::write, out, ws,
                     serial{}, own);
    });
  };
  const matrix_view<double> out(dz.data(), tokens, experts);
  CHECK(refused(5, 12, out) == "moeroute::weigh_backward: logits.rows is 5, expected 6");
  CHECK(refused(6, 11, out) == "moeroute::weigh_backward: weights.size() is 11, expected 12");
  CHECK(refused(6, 12, out.middle_rows(0, 5)) ==
        "moeroute::weigh_backward: dlogits.rows is 5, expected 6");
  CHECK(refused(6, 12, {z.data(), tokens, experts}) ==
        "moeroute::weigh_backward: logits and dlogits overlap, expected memory of their own");
  std::vector<double> scale(7);
  CHECK(refused(6, 12, out, {.expert_factor = scale}) ==
        "moeroute::weigh_backward: own.expert_factor.size() is 7, expected 8");
  const auto weighed = [&](const auto& router, const side_inputs& side = {}) {
    std::vector<double> w(12);
    return test::refusal([&] { weigh(router, view_of(z, experts), side, a, std::span(w), ws); });
  };
  const std::vector<float> seven(7, 1.0f);
  CHECK(weighed(router<softmax>{.selection = {.k = 2}, .weight = {.expert_scale = seven}}) ==
        "moeroute::weigh: factors of experts is 7, expected 8");
  router<softmax> added = r;
  added.transform.add = seven;
  CHECK(weighed(added) == "moeroute::weigh: transform.add.size() is 7, expected 8");
  router<softmax> noisy = r;
  noisy.transform.noise.kind = noise_kind::gaussian;
  const matrix_view<const float> wide(seven.data(), 1, 7);
  CHECK(weighed(noisy, {.noise_logits = wide}) ==
        "moeroute::weigh: noise_logits.rows is 1, expected 6");
  matrix_view<const float> narrow(seven.data(), 6, experts);
  narrow.stride = 0;  // would read one row six times
  CHECK(weighed(noisy, {.noise_logits = narrow}) ==
        "moeroute::weigh: noise_logits.stride is 0, expected at least 8");
  narrow.cols = 7;
  CHECK(weighed(noisy, {.noise_logits = narrow}) ==
        "moeroute::weigh: noise_logits.cols is 7, expected 8");
  CHECK(weighed(product_keys<>{.choices = 2}) ==
        "moeroute::weigh: choices.experts() is 8, expected 16");
  const auto keys = [&](index_t columns, index_t first_keys) {
    std::vector<double> w(12);
    return test::refusal([&] {
      weigh(product_keys<>{.choices = 2, .first_keys = first_keys},
            matrix_view<const double>(z.data(), tokens, columns, experts), {}, a, std::span(w), ws);
    });
  };
  CHECK(keys(1, 0) == "moeroute::weigh: logits.cols is 1, expected 2 to 2097152");
  CHECK(keys(7, 0) == "moeroute::weigh: logits.cols % 2 is 1, expected 0");
  CHECK(keys(8, 8) == "moeroute::weigh: first_keys is 8, expected 1 to 7");
  CHECK(refused(6, 12, {dz.data(), tokens, 7, experts}) ==
        "moeroute::weigh_backward: dlogits.cols is 7, expected 8");
  CHECK(refused(6, 12, {dz.data(), tokens, experts, 7}) ==
        "moeroute::weigh_backward: dlogits.stride is 7, expected at least 8");
  CHECK(refused(6, 12, out, {.add = scale}) ==
        "moeroute::weigh_backward: own.add.size() is 7, expected 8");
  CHECK(refused(6, 12, out, {.temperature = scale}) ==
        "moeroute::weigh_backward: own.temperature.size() is 7, expected 1");
  CHECK(refused(6, 12, out, {.shared_weight = scale}) ==
        "moeroute::weigh_backward: own.shared_weight.size() is 7, expected 6");
  // Each modality has the columns of its own.
  const std::vector<std::uint8_t> modality(6, 1);
  for (const index_t first : {3, 4}) {
    router<softmax> scaled = r, shifted = r;
    scaled.weight.expert_scale = seven;
    shifted.transform.add = seven;
    const std::string one = std::to_string(first), other = std::to_string(8 - first);
    const auto both = [&](const router<softmax>& of_first, const router<softmax>& of_second) {
      return weighed(by_modality<router<softmax>>{of_first, of_second, first},
                     {.modality = modality});
    };
    CHECK(both(scaled, r) == "moeroute::weigh: factors of experts is 7, expected " + one);
    CHECK(both(r, scaled) == "moeroute::weigh: factors of experts is 7, expected " + other);
    CHECK(both(shifted, r) == "moeroute::weigh: transform.add.size() is 7, expected " + one);
    CHECK(both(r, shifted) == "moeroute::weigh: transform.add.size() is 7, expected " + other);
    CHECK(both(r, r) == "accepted");
  }
  std::vector<double> noise(40);
  CHECK(refused(6, 12, out, {.noise_logits = {noise.data(), 5, experts}}) ==
        "moeroute::weigh_backward: own.noise_logits.rows is 5, expected 6");
  CHECK(refused(6, 12, out, {.noise_logits = {noise.data(), 6, 6}}) ==
        "moeroute::weigh_backward: own.noise_logits.cols is 6, expected 0");
  // Experts are not columns where keys make pairs of them, or some are shared.
  const product_keys<softmax> pairs{.choices = 2};
  const with_shared<router<softmax>> shared{r, 1};
  const assignment of_pairs = test::routed(pairs, {z.begin(), z.end()}, experts);
  const auto learned = [&](const auto& router, index_t columns, const assignment& of,
                           const router_gradients<double>& to, const side_inputs& side = {}) {
    return test::refusal([&] {
      weigh_backward(router, matrix_view<const double>(z.data(), 6, columns), side, of,
                     std::span<const double>(dw), gradient_to::write,
                     matrix_view<double>(dz.data(), 6, columns), ws, serial{}, to);
    });
  };
  std::vector<double> eight(8), sixteen(16);
  CHECK(learned(pairs, 8, of_pairs, {.expert_factor = eight}) ==
        "moeroute::weigh_backward: own.expert_factor.size() is 8, expected 16");
  CHECK(learned(pairs, 8, of_pairs, {.add = sixteen}) ==
        "moeroute::weigh_backward: own.add.size() is 16, expected 8");
  CHECK(learned(pairs, 8, of_pairs, {.expert_factor = sixteen, .add = eight}) == "accepted");
  CHECK(learned(product_keys<softmax>{.choices = 2, .weight = {.expert_scale = seven}}, 8, of_pairs,
                {}) == "moeroute::weigh_backward: factors of experts is 7, expected 16");
  CHECK(learned(shared, 7, a, {.expert_factor = eight}) ==
        "moeroute::weigh_backward: own.expert_factor.size() is 8, expected 7");
  CHECK(learned(shared, 7, a, {}, {.shared_weight = seven}) ==
        "moeroute::weigh_backward: shared_weight.size() is 7, expected 6");
  CHECK(learned(by_modality<router<softmax>>{r, r, 4}, 8, a, {.temperature = eight},
                {.modality = modality}) ==
        "moeroute::weigh_backward: own.temperature.size() is 8, expected 2");
  // Noise that only the second modality has has its logits too; nobody's are not looked at.
  CHECK(weighed(by_modality<router<softmax>>{r, noisy, 4},
                {.modality = modality, .noise_logits = wide}) ==
        "moeroute::weigh: noise_logits.rows is 1, expected 6");
  CHECK(weighed(r, {.noise_logits = wide}) == "accepted");
  test::random rng(33);
  assignment ragged = test::ragged_choices(rng, tokens, experts, 3);
  std::vector<double> own(static_cast<std::size_t>(ragged.choices()));
  ragged.to_fill().offsets[4] = 99;
  CHECK(test::refusal([&] { weigh(r, view_of(z, experts), {}, ragged, std::span(own), ws); }) ==
        "moeroute::weigh: token 3 has the choices from " + std::to_string(ragged.offsets()[3]) +
            " to 99, expected 0 to k = 3 of them, from 0 on");
  a.ids()[3] = 8;
  CHECK(refused(6, 12, out) == "moeroute::weigh_backward: an id is 8, expected -1 to 7");
  a.ids()[3] = 1;
  a.ids()[2] = 8;
  CHECK(refused(6, 12, out) == "moeroute::weigh_backward: an id is 8, expected -1 to 7");
  a.ids()[2] = 0;
  a.ids()[3] = -2;
  CHECK(refused(6, 12, out) == "moeroute::weigh_backward: an id is -2, expected -1 to 7");
  a.ids()[3] = 1;
  const by_modality<router<softmax>> two{r, r, 4};
  CHECK(test::refusal([&] {
          weigh_backward(two, view_of(z, experts), {}, a, dw, gradient_to::write, out, ws);
        }) == "moeroute::weigh_backward: modality.size() is 0, expected 6");
  CHECK(test::refusal([&] {
          weigh_backward(sinkhorn{.weights = plan_weights::plan}, view_of(z, experts), {}, a, dw,
                         gradient_to::write, out, ws);
        }) ==
        "moeroute::weigh: sinkhorn.weights is plan: it couples the tokens, use weigh_plan and "
        "weigh_plan_backward");
  CHECK(weighed(sparse_transport{.weights = transport_weights::plan}) ==
        "moeroute::weigh: sparse_transport.weights is plan: it couples the tokens, use "
        "weigh_transport and weigh_transport_backward");
  const auto unmapped = [](const auto& router) {
    return test::refusal([&] { (void)weight_maps_of(router, side_inputs{}); });
  };
  CHECK(unmapped(sinkhorn_expert_choice{.weights = plan_weights::plan}) ==
        "moeroute::weigh: sinkhorn_expert_choice.weights is plan: it couples the tokens, use "
        "weigh_plan and weigh_plan_backward");
  CHECK(unmapped(selective_sinkhorn{.probability = 1.0f}) ==
        "moeroute::weigh: selective_sinkhorn.weights is plan: it couples the tokens, use "
        "weigh_plan and weigh_plan_backward");
  CHECK(
      unmapped(sparse_transport_token_choice{.transport = {.weights = transport_weights::plan}}) ==
      "moeroute::weigh: sparse_transport_token_choice.transport.weights is plan: it couples the "
      "tokens, use weigh_transport and weigh_transport_backward");
}

TEST_CASE("each token is weighed in the columns of its modality, in whichever piece it is") {
  constexpr index_t columns = 1025, rows = 40;  // pieces of 16 tokens
  const std::vector<float> z = test::make_logits(test::shape::normal, 61, rows, columns);
  std::vector<std::uint8_t> modality;
  for (index_t t = 0; t < rows; ++t) modality.push_back(static_cast<std::uint8_t>(t % 7 % 2));
  for (const index_t first : {1, 600}) {
    const by_modality<router<softmax>, router<sigmoid>> two{
        {.selection = {.k = 1}},
        {.selection = {.k = 1}, .transform = {.temperature = 2.0f}},
        first};
    const side_inputs side{.modality = modality};
    const assignment a = test::routed(two, z, columns, side);
    std::vector<float> w(a.weights().size());
    workspace ws;
    weigh(two, view_of(z, columns), side, a, std::span(w), ws);
    CHECK(test::difference(w, a.weights(), 3e-6) == "");
    // All that the second modality's temperature is pulled by is its own.
    const std::vector<std::uint8_t> second(rows, 1);
    const side_inputs all{.modality = second};
    const assignment b = test::routed(two, z, columns, all);
    std::vector<float> dz(z.size()), temperature(2);
    const std::vector<float> dw(w.size(), 1.0f);
    weigh_backward(two, view_of(z, columns), all, b, dw, gradient_to::write,
                   matrix_view<float>(dz.data(), rows, columns), ws, serial{},
                   router_gradients<float>{.temperature = temperature});
    CHECK((temperature[0] == 0.0f && temperature[1] != 0.0f));
  }
}

TEST_CASE("the weight of shared experts is pulled by each of their choices, on top of what was") {
  constexpr index_t columns = 5;
  const with_shared<router<softmax>> shared{{.selection = {.k = 1}}, 2};
  const std::vector<double> z = random_doubles(3 * columns, 62);
  const std::vector<float> weights(3, 0.5f);
  assignment a;
  a.reset(3, columns + 2, 3);
  const std::vector<expert_id> ids{1, 5, 6, 6, 0, 5, 4, no_expert, 5};
  std::copy(ids.begin(), ids.end(), a.ids().begin());
  const std::vector<double> dw{1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0};
  std::vector<double> dz(z.size()), own(3, 0.5);
  workspace ws;
  weigh_backward(shared, view_of(z, columns), {.shared_weight = weights}, a, dw, gradient_to::write,
                 matrix_view<double>(dz.data(), 3, columns), ws, serial{},
                 router_gradients<double>{.shared_weight = own});
  CHECK(own == std::vector<double>{6.5, 40.5, 256.5});
}

namespace {

// The derivative of a transform, from a formula of its own in double; what a router sees is that of
// transform_rows in float.
template <class Transform, class Formula>
void transform_agrees(const char* name, const Transform& transform, index_t columns,
                      Formula&& formula, bool with_infinities = true) {
  INFO(name);
  const side_inputs side{.seed = 4, .step = 1};
  std::vector<float> near = test::make_logits(test::shape::normal, 5, tokens, columns);
  if (with_infinities) near[1] = -test::infinity;
  const std::vector<double> z(near.begin(), near.end());
  const index_t out = transform.experts(columns);
  const std::vector<double> up = random_doubles(static_cast<std::size_t>(tokens * out), 6);
  std::vector<float> seen(up.size());
  transform_rows(transform, view_of(near, columns), side,
                 matrix_view<float>(seen.data(), tokens, out), test::backwards{});
  std::vector<double> expected = formula(z, seen);
  std::vector<float> finite = seen;
  for (std::size_t i = 0; i < finite.size(); ++i)
    if (expected[i] == -HUGE_VAL && finite[i] == -test::infinity) expected[i] = finite[i] = 0.0f;
  CHECK(test::difference(finite, expected, 1e-5, 1e-5) == "");
  const auto value = [&](const std::vector<double>& x) {
    const std::vector<double> y = formula(x, seen);
    double sum = 0.0;
    for (std::size_t i = 0; i < y.size(); ++i)
      if (std::isfinite(y[i])) sum += up[i] * y[i];
    return sum;
  };
  std::vector<double> dz(z.size(), 9.0);
  const matrix_view<double> into(dz.data(), tokens, columns);
  transform_rows_backward(transform, view_of(z, columns), side, view_of(up, out),
                          gradient_to::write, into, test::backwards{});
  const std::vector<double> once = dz;
  CHECK(test::difference(once, oracle::derivative(z, value), 1e-6, 1e-8) == "");
  transform_rows_backward(transform, view_of(z, columns), side, view_of(up, out), gradient_to::add,
                          into);
  for (std::size_t i = 0; i < dz.size(); ++i) CHECK(std::abs(dz[i] - 2.0 * once[i]) < 1e-12);
}

struct logit_moments {
  double mean = 0.0, deviation = 0.0;
  logit_moments(const double* z, index_t n) {
    double count = 0.0;
    for (index_t e = 0; e < n; ++e)
      if (std::isfinite(z[e])) mean += z[e], count += 1.0;
    mean /= count;
    for (index_t e = 0; e < n; ++e)
      if (std::isfinite(z[e])) deviation += (z[e] - mean) * (z[e] - mean) / count;
    deviation = std::sqrt(deviation);
  }
};

}  // namespace

TEST_CASE("gradients through a transform of logits are derivatives, for every transform") {
  using list = std::vector<double>;
  const auto by_row = [](index_t columns, auto f) {
    return [=](const list& z, const std::vector<float>&) {
      list out;
      for (index_t t = 0; t < tokens; ++t) f(z.data() + t * columns, out);
      return out;
    };
  };
  constexpr index_t n = experts;
  transform_agrees(
      "sigmoid_sum", sigmoid_sum{}, 2 * n, by_row(2 * n, [](const double* z, list& out) {
        for (index_t e = 0; e < n; ++e)
          out.push_back(std::isfinite(z[e])
                            ? 1.0 / (1.0 + std::exp(-z[e])) + 1.0 / (1.0 + std::exp(-z[n + e]))
                            : z[e]);
      }));
  for (const auto rule : {pass_rule::bound, pass_rule::ratio}) {
    const pass_logits how{.passes = 3, .rule = rule, .lambda = 0.5f};
    transform_agrees("pass_logits", how, 3 * n, by_row(3 * n, [=](const double* z, list& out) {
                       for (index_t e = 0; e < n; ++e) {
                         const double of[] = {z[e], z[n + e], z[2 * n + e]};
                         const logit_moments m(of, 3);
                         out.push_back(!std::isfinite(z[e])       ? z[e]
                                       : rule == pass_rule::bound ? m.mean - 0.5 * m.deviation
                                                                  : m.mean / m.deviation);
                       }
                     }));
  }
  transform_agrees(
      "standardized", standardized{.lambda = 2.0f}, n, by_row(n, [](const double* z, list& out) {
        const logit_moments m(z, n);
        for (index_t e = 0; e < n; ++e)
          out.push_back(std::isfinite(z[e]) ? 2.0 * (z[e] - m.mean) / m.deviation : z[e]);
      }));
  const expert_id promote[] = {2, 5}, suppress[] = {3};
  const steering soft{.promote = promote, .suppress = suppress, .lambda = 0.75f};
  const auto promoted = [](index_t e) { return e == 2 || e == 5; };
  transform_agrees(
      "soft steering", soft, n, by_row(n, [=](const double* z, list& out) {
        const logit_moments m(z, n);
        for (index_t e = 0; e < n; ++e)
          out.push_back(e == 3 ? -HUGE_VAL : promoted(e) ? z[e] + 0.75 * m.deviation : z[e]);
      }));
  steering hard = soft;
  hard.how = promotion::hard;
  transform_agrees("hard steering", hard, n, by_row(n, [=](const double* z, list& out) {
                     const double top = *std::max_element(z, z + n);
                     for (index_t e = 0; e < n; ++e)
                       out.push_back(e == 3 ? -HUGE_VAL : promoted(e) ? top : z[e]);
                   }));
  transform_agrees("candidates", candidates{.active = 5}, n,
                   [](const list& z, const std::vector<float>& seen) {
                     list out = z;
                     for (std::size_t i = 0; i < out.size(); ++i)
                       if (!std::isfinite(seen[i])) out[i] = -HUGE_VAL;
                     return out;
                   });
  std::vector<float> z(tokens * n), out(z.size());
  CHECK(test::refusal([&] {
          transform_rows_backward(standardized{}, view_of(z, n), {}, view_of(z, n),
                                  gradient_to::write, matrix_view<float>(z.data(), tokens, n));
        }) ==
        "moeroute::transform_rows_backward: logits and dlogits overlap, expected memory of "
        "their own");
  CHECK(test::refusal([&] {
          transform_rows_backward(sigmoid_sum{}, view_of(z, n), {}, view_of(z, n),
                                  gradient_to::write, matrix_view<float>(out.data(), tokens, n));
        }) == "moeroute::transform_rows_backward: dout.cols() is 8, expected 4");
  // The largest logit is looked for behind a NaN, wherever it stands.
  const expert_id last[] = {2};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> behind{nan, 3.0f, 1.0f}, third{0.0f, 0.0f, 1.0f};
  std::vector<float> moved(3, 9.0f);
  transform_rows_backward(steering{.promote = last, .how = promotion::hard}, view_of(behind, 3), {},
                          view_of(third, 3), gradient_to::write,
                          matrix_view<float>(moved.data(), 1, 3));
  CHECK(moved == std::vector<float>{0.0f, 1.0f, 0.0f});
}

TEST_CASE("rows of equal logits have no gradient through what they deviate by") {
  constexpr index_t n = 64;
  std::vector<float> z(3 * n, 0.1f), out(n, 0.0f), dz(z.size());
  out[0] = 1.0f;
  transform_rows_backward(standardized{}, matrix_view<const float>(z.data(), 1, n), {},
                          matrix_view<const float>(out.data(), 1, n), gradient_to::write,
                          matrix_view<float>(dz.data(), 1, n));
  for (index_t e = 0; e < n; ++e) CHECK(dz[static_cast<std::size_t>(e)] == 0.0f);
  // Each of three equal passes carries a third.
  transform_rows_backward(pass_logits{.passes = 3}, matrix_view<const float>(z.data(), 1, 3 * n),
                          {}, matrix_view<const float>(out.data(), 1, n), gradient_to::write,
                          matrix_view<float>(dz.data(), 1, 3 * n));
  for (index_t p = 0; p < 3; ++p)
    CHECK(std::abs(dz[static_cast<std::size_t>(p * n)] - 1.0f / 3.0f) < 1e-6f);
}

TEST_CASE("the ends of what a transform pulls back: limits, ties, floors") {
  using list = std::vector<double>;
  constexpr double most = std::numeric_limits<float>::max(), inf = HUGE_VAL, nan = NAN;
  const auto pulled = [](const auto& how, const list& z, const list& dout) {
    list dz(z.size());
    transform_rows_backward(how, matrix_view<const double>(z.data(), 1, std::ssize(z)), {},
                            matrix_view<const double>(dout.data(), 1, std::ssize(dout)),
                            gradient_to::add, matrix_view<double>(dz.data(), 1, std::ssize(dz)));
    return dz;
  };
  CHECK(pulled(candidates{.active = 6}, {most, -most, 2 * most, -2 * most, inf, -inf},
               list(6, 3.0)) == list{3.0, 3.0, 0.0, 0.0, 0.0, 0.0});
  // Of the two that are added one is no number, whatever comes from above.
  const list halves = pulled(sigmoid_sum{}, {0.0, inf, 0.0, -inf, 2.0, inf}, {1.0, nan, nan});
  CHECK((halves[0] == 0.0 && halves[1] == 0.0 && halves[3] == 0.0 && halves[5] == 0.0));
  CHECK((std::isnan(halves[4]) && std::isnan(halves[2])));
  // Passes whose first and last agree are not equal.
  const list bound = pulled(pass_logits{.passes = 3}, {1.0, 2.0, 1.0}, {3.0});
  const double deviation = std::sqrt(2.0) / 3.0;
  CHECK(std::abs(bound[0] - (1.0 + 1.0 / 3.0 / deviation)) < 1e-12);
  CHECK(std::abs(bound[1] - (1.0 - 2.0 / 3.0 / deviation)) < 1e-12);
  // A ratio is of the deviation above its floor, and of the floor at it and below.
  const pass_logits ratio{.passes = 2, .rule = pass_rule::ratio};
  constexpr double floor = 1e-6f;
  const list above = pulled(ratio, {0.0, 1e-5}, {1.0});
  CHECK(std::abs(above[0] - 2e5) < 1e-3);
  CHECK(std::abs(above[1]) < 1e-3);
  for (const double width : {1e-6, 2 * floor})
    for (const double dz : pulled(ratio, {0.0, width}, {1.0}))
      CHECK(std::abs(dz - 0.5 / floor) < 1e-3);
  // The first of the largest carries what stands above it; an infinite one carries nothing.
  const expert_id first[] = {0};
  const steering hard{.promote = first, .how = promotion::hard}, soft{.promote = first};
  CHECK(pulled(hard, {1.0, 3.0, 3.0}, {5.0, 0.0, 0.0}) == list{0.0, 5.0, 0.0});
  CHECK(pulled(hard, {1.0, inf}, {5.0, 7.0}) == list{0.0, 0.0});
  CHECK(pulled(soft, {0.5, 0.5}, {1.0, 2.0}) == list{1.0, 2.0});

  // A transform is asked whether it fits; what goes nowhere is asked for nothing.
  constexpr index_t rows = 70, n = 8;
  std::vector<float> z = test::make_logits(test::shape::normal, 41, rows, n), out(z.size()),
                     up(z.size(), 1.0f), dz(z.size());
  const pass_logits thirds{.passes = 3};
  const std::string unfit = test::refusal([&] { thirds.check(n, 1); });
  CHECK(unfit != "accepted");
  CHECK(test::refusal([&] {
          transform_rows(thirds, view_of(z, n), {}, matrix_view<float>(out.data(), rows, n));
        }) == unfit);
  const auto back = [&](gradient_to to, matrix_view<float> into) {
    return test::refusal(
        [&] { transform_rows_backward(thirds, view_of(z, n), {}, view_of(up, n), to, into); });
  };
  CHECK(back(gradient_to::write, {dz.data(), rows, n}) == unfit);
  CHECK(back(gradient_to::nowhere, {}) == "accepted");
  // Each token has its own draw, in whichever piece it is.
  const candidates drawn{.active = 3};
  const side_inputs seeded{.seed = 7};
  transform_rows(drawn, view_of(z, n), seeded, matrix_view<float>(out.data(), rows, n));
  transform_rows_backward(drawn, view_of(z, n), seeded, view_of(up, n), gradient_to::write,
                          matrix_view<float>(dz.data(), rows, n));
  index_t wrong = 0;
  for (index_t t = 0; t < rows; ++t) {
    float own[n];
    drawn.apply_row(z.data() + t * n, n, t, seeded, own);
    for (index_t e = 0; e < n; ++e) {
      const auto at = static_cast<std::size_t>(t * n + e);
      wrong += out[at] != own[e] || dz[at] != (own[e] == z[at] ? 1.0f : 0.0f);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("strides, columns and shapes of what is weighed or transformed are refused by name") {
  const router<softmax> r{.selection = {.k = 2}};
  std::vector<double> z = random_doubles(tokens * experts, 31), w(12), dz(z.size());
  const assignment a = test::routed(r, {z.begin(), z.end()}, experts);
  workspace ws;
  const auto close = [](auto m) {
    m.stride = m.cols - 1;
    return m;
  };
  const auto weighed = [&](const auto& router, matrix_view<const double> logits,
                           const side_inputs& side = {}) {
    return [&, router, logits, side] { weigh(router, logits, side, a, std::span(w), ws); };
  };
  const matrix_view<const double> logits = view_of(z, experts);
  const std::vector<std::uint8_t> modality(6, 1);
  const auto both = [&](index_t first) {
    return weighed(by_modality<router<softmax>>{r, r, first}, logits, {.modality = modality});
  };
  const auto keys = [&](index_t columns, index_t first_keys) {
    return weighed(product_keys<>{.choices = 2, .first_keys = first_keys},
                   {z.data(), tokens, columns, columns});
  };
  std::vector<float> in(6 * 8, 0.5f), out(6 * 8);
  std::vector<double> up(6 * 8), down(6 * 8), own(6 * 8, 0.5);
  const standardized transform;
  const auto moved = [&](matrix_view<const float> from, matrix_view<float> to) {
    return [&, from, to] { transform_rows(transform, from, {}, to); };
  };
  const auto pulled = [&](matrix_view<const double> from, matrix_view<const double> dout,
                          matrix_view<double> to) {
    return [&, from, dout, to] {
      transform_rows_backward<standardized, double>(transform, from, {}, dout, gradient_to::write,
                                                    to);
    };
  };
  const matrix_view<const float> x(in.data(), 6, 8);
  const matrix_view<float> y(out.data(), 6, 8);
  const matrix_view<double> dx(down.data(), 6, 8), dy(up.data(), 6, 8), from(own.data(), 6, 8);
  const std::string at_least = ".stride is 7, expected at least 8",
                    apart = " overlap, expected memory of their own";
  const test::refusals refused{
      {weighed(r, close(logits)), "weigh: logits" + at_least},
      {[&] {
         weigh_backward<router<softmax>, double>(r, close(logits), {}, a, w, gradient_to::write,
                                                 {dz.data(), tokens, experts}, ws);
       },
       "weigh_backward: logits" + at_least},
      {both(8), "weigh: first_experts is 8, expected 1 to 7"},
      {keys(2 * max_experts + 1, 0), "weigh: logits.cols is 2097153, expected 2 to 2097152"},
      {keys(8, -1), "weigh: first_keys is -1, expected 1 to 7"},
      {moved(x, y.middle_rows(0, 5)), "transform_rows: out.rows() is 5, expected 6"},
      {moved(x, {out.data(), 6, 7}), "transform_rows: out.cols() is 7, expected 8"},
      {moved(close(x), y), "transform_rows: logits" + at_least},
      {moved(x, close(y)), "transform_rows: out" + at_least},
      {moved(x, {in.data(), 6, 8}), "transform_rows: logits and out" + apart},
      {pulled(from, dy.middle_rows(0, 5), dx),
       "transform_rows_backward: dout.rows() is 5, expected 6"},
      {pulled(from, {up.data(), 6, 7}, dx),
       "transform_rows_backward: dout.cols() is 7, expected 8"},
      {pulled(from, dy, dx.middle_rows(0, 5)),
       "transform_rows_backward: dlogits.rows() is 5, expected 6"},
      {pulled(from, dy, {down.data(), 6, 7}),
       "transform_rows_backward: dlogits.cols() is 7, expected 8"},
      {pulled(close(from), dy, dx), "transform_rows_backward: logits" + at_least},
      {pulled(from, close(dy), dx), "transform_rows_backward: dout" + at_least},
      {pulled(from, dy, close(dx)), "transform_rows_backward: dlogits" + at_least},
      {pulled(from, dy, from), "transform_rows_backward: logits and dlogits" + apart},
      {pulled(from, dy, dy), "transform_rows_backward: dout and dlogits" + apart},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(test::refusal(pulled(from, dy, dx)) == "accepted");
  CHECK(test::refusal(moved(x, y)) == "accepted");
}

TEST_CASE("sums of +inf share the weight of a row of product keys, and leave none to the others") {
  const std::vector<float> z{test::infinity, 0.0f, 1.0f, 2.0f};
  const product_keys<softmax> pairs{.choices = 3};
  const assignment a = test::routed(pairs, z, 4);
  std::vector<float> w(3, 7.0f);
  workspace ws;
  weigh(pairs, matrix_view<const float>(z.data(), 1, 4), {}, a, std::span(w), ws);
  CHECK(w == std::vector<float>{0.5f, 0.5f, 0.0f});
  CHECK(test::bit_difference(a.weights(), w) == "");
  // Sums of -inf are not among them, nor is nobody's, whatever it is divided by.
  const std::vector<float> mixed{test::infinity, -test::infinity, 0.0f, 1.0f};
  const product_keys<softmax> divided{
      .choices = 3,
      .weight = {.normalize = normalization::sum, .eps_where = eps_mode::add, .eps = 0.25f}};
  const std::vector<std::int32_t> own{2};
  for (const std::vector<float>& row : {mixed, z}) {
    const assignment b = test::routed(divided, row, 4, {.k_of_token = own});
    weigh(divided, matrix_view<const float>(row.data(), 1, 4), {}, b, std::span(w), ws);
    CHECK(w == std::vector<float>{0.4f, 0.4f, 0.0f});
    CHECK(test::bit_difference(b.weights(), w) == "");
  }
}

TEST_CASE("scratch to weigh with is a list of workers and as much for each as for one") {
  using memory = detail::weigh_memory<double>;
  const auto bytes = [](bool transforms, int workers) {
    scratch tape;
    memory::carve(tape, 9, 3, transforms, workers);
    return tape.used() - round_up(static_cast<index_t>(sizeof(memory)) * workers, 64);
  };
  // Columns of probabilities and two scores of the choices; with a transform three rows more.
  for (const int workers : {0, 1, 5}) {
    CHECK(bytes(false, workers) == workers * (128 + 2 * 64));
    CHECK(bytes(true, workers) == workers * (128 + 2 * 64 + 2 * 128 + 256));
  }
}
