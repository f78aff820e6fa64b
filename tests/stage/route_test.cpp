#include <moeroute/stage/route.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <utility>
#include <vector>

#include "oracle/routing.hpp"
#include "support/allocations.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using test::shape;

namespace {

/// A user's router, from the concept alone: expert (token + r) % E with weight 1 / k.
struct round_robin {
  index_t choices = 2;

  index_t k() const { return choices; }
  static index_t experts(index_t columns) { return columns; }
  void check(index_t experts) const { check_range("round_robin", "k", choices, 1, experts); }
  static int carve(scratch&, index_t) { return 0; }
  void route_block(const logit_block& z, int, choice_block& c) const {
    for (int r = 0; r < c.k; ++r)
      for (int i = 0; i < z.rows; ++i) {
        c.id[r * block_rows + i] = static_cast<expert_id>((z.first_token + i + r) % z.experts);
        c.value[r * block_rows + i] = 1.0f / static_cast<float>(c.k);
      }
  }
};
static_assert(token_router<round_robin>);

/// A score of a user's, who says nothing about its rows: it looks at them.
struct spread {
  static constexpr score_traits traits{.monotone = true, .shift_invariant = false};

  template <class A = simd::default_arch>
  static void score_choices(const logit_block& z, choice_block& c, score_scale) {
    for (int r = 0; r < c.k; ++r)
      for (int i = 0; i < z.rows; ++i)
        c.value[r * block_rows + i] =
            1.0f + std::abs(z.row(i)[0]) + std::abs(z.row(i)[z.experts - 1]);
  }
  template <class A = simd::default_arch>
  static void score_row(const float* z, index_t experts, float* score) {
    std::copy_n(z, experts, score);
  }
};

template <class Router>
std::string narrow_differs(const Router& r, shape s, index_t tokens, index_t experts) {
  std::vector<bfloat16> narrow;
  std::vector<float> wide;
  for (const float x : test::make_logits(s, 21, tokens, experts)) {
    narrow.push_back(static_cast<bfloat16>(x));
    wide.push_back(static_cast<float>(narrow.back()));
  }
  workspace memory;
  assignment got, expected;
  route(r, matrix_view<const bfloat16>(narrow.data(), tokens, experts), memory, got);
  route(r, matrix_view<const float>(wide.data(), tokens, experts), memory, expected);
  return test::bit_difference(got.ids(), expected.ids()) +
         test::bit_difference(got.weights(), expected.weights());
}

assignment routed(const router<softmax>& r, const std::vector<float>& z, index_t tokens,
                  index_t experts, const side_inputs& side = {}) {
  workspace memory;
  assignment out;
  route(r, matrix_view<const float>(z.data(), tokens, experts), side, memory, out);
  return out;
}

}  // namespace

TEST_CASE("a user's own router plugs in, and hears each block's first token") {
  const index_t tokens = 5000, experts = 7;
  const std::vector<float> z(static_cast<std::size_t>(tokens * experts));
  workspace memory;
  assignment out;
  route(round_robin{3}, matrix_view<const float>(z.data(), tokens, experts), memory, out);
  bool right = out.k() == 3;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t r = 0; r < 3; ++r)
      right &= out.ids(t)[static_cast<std::size_t>(r)] == (t + r) % experts;
  CHECK(right);
}

namespace {

/// The ragged kind, from the concept alone: token t goes to (t * 7) % (most + 1) experts, or to all
/// that it may from the token `full` on.
struct uneven {
  index_t most = 2, full = 0;

  index_t max_choices(index_t) const { return most; }
  static index_t experts(index_t columns) { return columns; }
  void check(index_t experts) const { check_range("uneven", "most", most, 1, experts); }
  static int carve(scratch&, index_t) { return 0; }
  index_t count(index_t t) const { return t >= full ? most : (t * 7) % (most + 1); }
  index_t route_block(const logit_block& z, int, expert_id* id, float* weight,
                      std::int32_t* counts) const {
    index_t sum = 0;
    for (int i = 0; i < z.rows; ++i) {
      const index_t t = z.first_token + i;
      counts[i] = static_cast<std::int32_t>(count(t));
      sum += counts[i];
      for (index_t r = 0; r < counts[i]; ++r) {
        *id++ = static_cast<expert_id>((t + r) % z.experts);
        *weight++ = static_cast<float>(t + r);
      }
    }
    return sum;
  }
};
static_assert(ragged_router<uneven>);

}  // namespace

TEST_CASE("pieces of a ragged decision are moved together, in room that ends where it must") {
  test::random rng(31);
  const index_t experts = 2048;  // pieces of 16 tokens
  const std::vector<float> z(static_cast<std::size_t>(64 * experts));
  for (const test::guarded_end end : {test::guarded_end::front, test::guarded_end::back})
    for (const index_t tokens : {1, 15, 16, 17, 32, 47, 48, 63, 64})
      for (const index_t full : {index_t{0}, index_t{16}, tokens})
        for (const bool masked : {false, true}) {
          const test::forbidden_memory around(end);
          const uneven r{2, full};
          std::vector<std::uint8_t> mask;
          for (index_t t = 0; masked && t < tokens; ++t)
            mask.push_back(static_cast<std::uint8_t>(t + 1 == tokens ? 3 : rng.below(3)));
          workspace memory;
          assignment out;
          route(r, matrix_view<const float>(z.data(), tokens, experts), {.mask = mask}, memory,
                out);
          index_t wrong = 0, at = 0;
          for (index_t t = 0; t < tokens; ++t) {
            const bool there = !masked || mask[static_cast<std::size_t>(t)] != 0;
            const index_t n = there ? r.count(t) : 0;
            wrong += out.first(t) != at || out.count(t) != n;
            for (index_t i = 0; i < n; ++i, ++at) {
              wrong += out.ids()[static_cast<std::size_t>(at)] != (t + i) % experts;
              wrong += out.weights()[static_cast<std::size_t>(at)] != static_cast<float>(t + i);
            }
          }
          INFO("T=" << tokens << " full from " << full << " masked " << masked);
          CHECK(wrong == 0);
          CHECK(out.choices() == at);
        }
}

namespace {

/// A router picked at run time, of either kind.
struct either {
  bool is_ragged;

  bool ragged() const { return is_ragged; }
  static round_robin as_token_router() { return {2}; }
  static uneven as_ragged_router() { return {}; }
  static index_t columns() { return 4; }
};

}  // namespace

TEST_CASE("plain memory takes a router picked at run time, where its k is fixed") {
  const std::vector<float> z(3 * 4);
  std::vector<expert_id> ids(6, -7);
  std::vector<float> weights(6);
  workspace memory;
  const auto said = [&](bool ragged) {
    return test::refusal(
        [&] { route(either{ragged}, z.data(), 3, 4, memory, ids.data(), weights.data()); });
  };
  CHECK(said(true) ==
        "moeroute::route: the router's k varies, expected a fixed k: give an assignment");
  CHECK(ids[0] == -7);
  CHECK(said(false) == "accepted");
  CHECK(ids == std::vector<expert_id>{0, 1, 1, 2, 2, 3});
}

TEST_CASE("a router that does not fit is refused by name, and nothing is routed") {
  const std::vector<float> z(12, 1.0f);
  const auto refusal = [&](const router<softmax>& r, index_t experts) {
    return test::refusal([&] { routed(r, z, 12 / experts, experts); });
  };
  CHECK(refusal({.selection = {.k = 0}}, 4) == "moeroute::top_k: k is 0, expected 1 to 4");
  CHECK(refusal({.selection = {.k = 5}}, 4) == "moeroute::top_k: k is 5, expected 1 to 4");
  CHECK(refusal({.selection = {.k = 4}}, 4) == "accepted");
  CHECK(test::refusal([&] { routed({}, z, 3, 0); }) == "moeroute::top_k: k is 2, expected 1 to 0");
}

TEST_CASE("any row-major Eigen matrix is routed") {
  const std::vector<float> z = test::make_logits(shape::normal, 1, 20, 8);
  row_matrix<float> wide(20, 11);
  wide.leftCols(8) = Eigen::Map<const row_matrix<float>>(z.data(), 20, 8);
  workspace memory;
  assignment out;
  route(router<softmax>{}, wide.leftCols(8), memory, out);
  const assignment expected = routed({}, z, 20, 8);
  CHECK(test::bit_difference(out.ids(), expected.ids()) == "");
  CHECK(test::bit_difference(out.weights(), expected.weights()) == "");
}

TEST_CASE("plain memory is routed as a view of it, and nothing past the choices is written") {
  const router r{softmax{}, top_k{.k = 3}, sum_normalized};
  workspace memory;
  for (const index_t tokens : {0, 1, 7, 16, 45}) {
    const std::vector<float> z = test::make_logits(shape::normal, 4, tokens, 12);
    assignment expected;
    const matrix_view<const float> rows(z.data(), tokens, 10, 12);
    route(r, rows, memory, expected);
    const auto n = static_cast<std::size_t>(tokens * 3);
    std::vector<expert_id> ids(n + 1, -7);
    std::vector<float> weights(n + 1, -7.0f);
    route(r, z.data(), tokens, 10, 12, memory, ids.data(), weights.data());
    CHECK(std::equal(expected.ids().begin(), expected.ids().end(), ids.begin()));
    CHECK(std::equal(expected.weights().begin(), expected.weights().end(), weights.begin()));
    CHECK((ids[n] == -7 && weights[n] == -7.0f));
    assignment lent = assignment::over({ids.data(), n}, {weights.data(), n});
    route(r, rows, memory, lent);
    CHECK((lent.ids().data() == ids.data() && lent.weights().data() == weights.data()));
  }
}

TEST_CASE("plain memory that does not fit is refused by name") {
  const router r{softmax{}, top_k{.k = 2}};
  workspace memory;
  float z[24] = {}, weights[4];
  expert_id ids[4];
  const auto said = [&](const float* logits, index_t tokens, index_t stride, expert_id* i,
                        float* w) {
    return test::refusal([&] { route(r, logits, tokens, 8, stride, memory, i, w); });
  };
  CHECK(said(z, 2, 7, ids, weights) == "moeroute::route: logits.stride is 7, expected at least 8");
  CHECK(said(z, -1, 8, ids, weights) == "moeroute::route: tokens is -1, expected 0 to 2147483647");
  for (const index_t tokens : {1, 2})
    CHECK(said(nullptr, tokens, 8, ids, weights) ==
          "moeroute::route: logits is null, expected rows");
  CHECK(said(z, 2, 8, nullptr, weights) ==
        "moeroute::route: ids is null, expected room for tokens * k");
  CHECK(said(z, 2, 8, ids, nullptr) ==
        "moeroute::route: weights is null, expected room for tokens * k");
  CHECK(said(nullptr, 0, 8, nullptr, nullptr) == "accepted");
  assignment small = assignment::over(ids, {weights, 3});
  CHECK(test::refusal([&] { route(r, matrix_view<const float>(z, 2, 8), memory, small); }) ==
        "moeroute::assignment: weights.size() is 3, expected room for 4");
  assignment out;
  CHECK(test::refusal([&] { route(r, matrix_view<const float>(z, 3, 8, 5), memory, out); }) ==
        "moeroute::route: logits.stride is 5, expected at least 8");
}

TEST_CASE("a masked token has no choices, and the others are as without the mask") {
  const std::vector<float> z = test::make_logits(shape::normal, 2, 40, 8);
  std::vector<std::uint8_t> mask(40, 1);
  for (std::size_t t = 0; t < 40; t += 3) mask[t] = 0;
  // As blocks, with rows left over, and with rows alone.
  for (const index_t tokens : {40, 19, 3, 1}) {
    const std::span<const std::uint8_t> own(mask.data(), static_cast<std::size_t>(tokens));
    const assignment out = routed({}, z, tokens, 8, {.mask = own});
    assignment open = routed({}, z, tokens, 8);
    for (index_t t = 0; t < tokens; ++t)
      for (std::size_t r = 0; r < 2; ++r) {
        const bool there = mask[static_cast<std::size_t>(t)] != 0;
        CHECK(out.ids(t)[r] == (there ? open.ids(t)[r] : no_expert));
        CHECK(out.weights(t)[r] == (there ? open.weights(t)[r] : 0.0f));
      }
    // In an assignment that held the choices of all.
    workspace memory;
    route(router<softmax>{}, matrix_view<const float>(z.data(), tokens, 8), {.mask = own}, memory,
          open);
    CHECK(test::bit_difference(open.ids(), out.ids()) == "");
    CHECK(test::bit_difference(open.weights(), out.weights()) == "");
  }
}

TEST_CASE("a token's own k cuts its choices short") {
  const std::vector<float> z = test::make_logits(shape::normal, 3, 17, 16);
  std::vector<std::int32_t> own;
  for (int t = 0; t < 17; ++t) own.push_back(t % 5);
  const router<softmax> r{.selection = {.k = 4}};
  const assignment out = routed(r, z, 17, 16, {.k_of_token = own}), full = routed(r, z, 17, 16);
  for (index_t t = 0; t < 17; ++t)
    for (std::size_t i = 0; i < 4; ++i) {
      const bool there = static_cast<std::int32_t>(i) < own[static_cast<std::size_t>(t)];
      CHECK(out.ids(t)[i] == (there ? full.ids(t)[i] : no_expert));
    }
}

TEST_CASE("where one choice is all a token has, its own k is 0 or 1") {
  const std::vector<float> z = test::make_logits(shape::normal, 3, 3, 4);
  const std::vector<std::int32_t> own{1, 0, 1}, more{1, 2, 1}, less{1, -1, 1};
  const router<softmax> r{.selection = {.k = 1}};
  const assignment out = routed(r, z, 3, 4, {.k_of_token = own}), full = routed(r, z, 3, 4);
  CHECK(out.ids()[0] == full.ids()[0]);
  CHECK(out.ids()[1] == no_expert);
  CHECK(out.ids()[2] == full.ids()[2]);
  CHECK(test::refusal([&] { routed(r, z, 3, 4, {.k_of_token = more}); }) ==
        "moeroute::route: k_of_token is 2, expected 0 to 1");
  CHECK(test::refusal([&] { routed(r, z, 3, 4, {.k_of_token = less}); }) ==
        "moeroute::route: k_of_token is -1, expected 0 to 1");
}

TEST_CASE("side inputs of another length than T are refused") {
  const std::vector<float> z(12);
  const std::vector<std::uint8_t> mask(2, 1);
  const std::vector<std::int32_t> own = {1, 3, 1};
  CHECK(test::refusal([&] { routed({}, z, 3, 4, {.mask = mask}); }) ==
        "moeroute::route: mask.size() is 2, expected 3");
  CHECK(test::refusal([&] { routed({}, z, 3, 4, {.k_of_token = own}); }) ==
        "moeroute::route: k_of_token is 3, expected 0 to 2");
}

TEST_CASE("pieces are whole blocks, and one piece needs one worker") {
  for (const index_t experts : {1, 7, 64, 2048, 1 << 20}) {
    const index_t grain = detail::route_grain(experts);
    CHECK(grain % block_rows == 0);
    CHECK((grain >= block_rows && grain <= 4096));
    CHECK(detail::route_workers(serial{}, grain, experts) == 1);
  }
}

TEST_CASE("a piece is about 2^15 logits, and several have a worker each") {
  const std::pair<index_t, index_t> grains[] = {{1, 4096},  {8, 4096},  {9, 3648},  {64, 512},
                                                {100, 336}, {2047, 16}, {2048, 16}, {4096, 16}};
  for (const auto& [experts, grain] : grains) {
    CHECK(detail::route_grain(experts) == grain);
    CHECK(detail::route_workers(test::backwards{}, grain, experts) == 1);
    CHECK(detail::route_workers(test::several_threads{}, grain + 1, experts) ==
          test::several_threads{}.concurrency());
  }
}

TEST_CASE("the largest E is routed") {
  std::vector<float> z(static_cast<std::size_t>(max_experts), -1.0f);
  z.back() = 3.0f;
  z[12345] = 2.0f;
  const assignment out = routed({.weight = sum_normalized}, z, 1, max_experts);
  CHECK((out.ids(0)[0] == max_experts - 1 && out.ids(0)[1] == 12345));
}

TEST_CASE("bfloat16 logits are routed as the floats they widen to, whatever the score needs") {
  static_assert(bfloat16_router<router<softmax>> && bfloat16_router<router<sigmoid>>);
  for (const shape s : test::all_shapes)
    for (const index_t experts : {9, 64, 160}) {
      if (experts > test::sized(160, 64)) continue;
      for (const index_t tokens : {1, 16, 37})
        for (const index_t k : {1, 4, 8}) {
          const top_k selection{.k = k};
          INFO(to_string(test::reproducer{s, 21, tokens, experts, k}));
          for (const weight_rule& weight : {raw_weights, sum_normalized}) {
            CHECK(narrow_differs(router<softmax>{.selection = selection, .weight = weight}, s,
                                 tokens, experts) == "");
            CHECK(narrow_differs(router<softmax_selected>{.selection = selection, .weight = weight},
                                 s, tokens, experts) == "");
            CHECK(narrow_differs(router<sigmoid>{.selection = selection, .weight = weight}, s,
                                 tokens, experts) == "");
          }
          CHECK(narrow_differs(
                    router<softmax>{.selection = selection, .transform = {.temperature = 0.7f}}, s,
                    tokens, experts) == "");
          if (s == shape::normal)
            CHECK(narrow_differs(router<spread>{.selection = selection}, s, tokens, experts) == "");
        }
    }
}

TEST_CASE("a side input that a router does not read is refused, one that it reads is measured") {
  const std::vector<std::int32_t> three(3), two(2), own{0, 2, 1}, zeros{0, 0, 0};
  const std::vector<std::uint8_t> flags(3, 1), few(2, 1);
  const std::vector<float> weights(3), less(2), noise(12);
  const auto rows = [&](index_t n, index_t cols, index_t stride = 4) {
    matrix_view<const float> v(noise.data(), n, cols, 4);
    v.stride = stride;
    return v;
  };
  const auto said = [](const side_inputs& side, const side_use& use) {
    const std::string text = test::refusal([&] { detail::check_side(side, 3, 4, use); });
    const std::string front = "moeroute::route: ";
    return text.starts_with(front) ? text.substr(front.size()) : text;
  };
  const side_use all{
      .token_ids = true, .own_k = 2, .modality = true, .shared_weight = true, .noise_logits = true};
  const std::string unread = " is given, which this router does not read: leave it out";
  const side_inputs ids{.token_ids = three}, masked{.mask = flags}, k{.k_of_token = own},
      kinds{.modality = flags}, shared{.shared_weight = weights}, noisy{.noise_logits = rows(3, 4)};
  for (const side_inputs& side : {ids, masked, k, kinds, shared, noisy})
    CHECK(said(side, all) == "accepted");
  CHECK(said(masked, {}) == "accepted");
  CHECK(said({}, {}) == "accepted");
  CHECK(said(ids, {}) == "token_ids" + unread);
  CHECK(said(k, {}) == "k_of_token" + unread);
  CHECK(said({.k_of_token = zeros}, {}) == "k_of_token" + unread);
  CHECK(said(kinds, {}) == "modality" + unread);
  CHECK(said(shared, {}) == "shared_weight" + unread);
  CHECK(said(noisy, {}) == "noise_logits" + unread);
  // Each alone is enough to be read.
  CHECK(said(ids, {.token_ids = true}) == "accepted");
  CHECK(said({.k_of_token = zeros}, {.own_k = 1}) == "accepted");
  CHECK(said(kinds, {.modality = true}) == "accepted");
  CHECK(said(shared, {.shared_weight = true}) == "accepted");
  CHECK(said(noisy, {.noise_logits = true}) == "accepted");
  CHECK(said({.token_ids = two}, all) == "token_ids.size() is 2, expected 3");
  CHECK(said({.mask = few}, all) == "mask.size() is 2, expected 3");
  CHECK(said({.k_of_token = two}, all) == "k_of_token.size() is 2, expected 3");
  CHECK(said({.modality = few}, all) == "modality.size() is 2, expected 3");
  CHECK(said({.shared_weight = less}, all) == "shared_weight.size() is 2, expected 3");
  CHECK(said({.noise_logits = rows(2, 4)}, all) == "noise_logits.rows is 2, expected 3");
  CHECK(said({.noise_logits = rows(3, 3)}, all) == "noise_logits.cols is 3, expected 4");
  CHECK(said({.noise_logits = rows(3, 4, 3)}, all) ==
        "noise_logits.stride is 3, expected at least 4");
  CHECK(said(k, {.own_k = 1}) == "k_of_token is 2, expected 0 to 1");
}

TEST_CASE("a few rows in 16 bits are routed alone, however long they are") {
  for (const index_t experts : {1023, 1024, 1025, 1040, 1041, 3000})
    for (const index_t tokens : {1, 3, 17})
      CHECK(narrow_differs(router<softmax>{.selection = {.k = 2}}, shape::normal, tokens,
                           experts) == "");
}
