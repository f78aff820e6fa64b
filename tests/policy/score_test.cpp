#include <moeroute/policy/parts/score.hpp>

#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::shape;

namespace {

constexpr index_t lengths[] = {1, 2, 3, 8, 15, 16, 17, 60, 64, 257};

template <class A, class Score>
std::vector<float> scores(const std::vector<float>& z) {
  std::vector<float> s(z.size(), -7.0f);
  Score::template score_row<A>(z.data(), static_cast<index_t>(z.size()), s.data());
  return s;
}

/// The winners of one row: its ids in descending order, scored as a block of one row.
template <class A, class Score>
std::vector<float> winners(const std::vector<float>& z, const std::vector<expert_id>& ids,
                           score_scale scale) {
  std::vector<expert_id> id(ids.size() * block_rows, no_expert);
  std::vector<float> value(ids.size() * block_rows, 0.0f), out;
  for (std::size_t r = 0; r < ids.size(); ++r) {
    id[r * block_rows] = ids[r];
    value[r * block_rows] =
        ids[r] == no_expert ? simd::minus_infinity : z[static_cast<std::size_t>(ids[r])];
  }
  const index_t n = static_cast<index_t>(z.size());
  const side_inputs side;
  const logit_block block{z.data(), n, 1, n, 0, &side};
  choice_block c{static_cast<int>(ids.size()), id.data(), value.data()};
  Score::template score_choices<A>(block, c, scale);
  for (std::size_t r = 0; r < ids.size(); ++r) out.push_back(value[r * block_rows]);
  return out;
}

}  // namespace

TEST_CASE("softmax scores of a row are positive shares that sum to 1, or zeros") {
  for (const shape s : test::all_shapes)
    for (const index_t n : lengths) {
      const std::vector<float> z = test::make_logits(s, 1, 1, n);
      const std::vector<double> expected = oracle::softmax(z.data(), n, oracle::order(z.data(), n));
      INFO(test::name(s) << " E=" << n);
      CHECK(test::difference(scores<simd::default_arch, softmax>(z), expected, 3e-6, 2e-38) == "");
    }
}

TEST_CASE("winners have the scores of the whole row, to the bit") {
  for (const shape s : test::all_shapes)
    for (const index_t n : lengths) {
      const std::vector<float> z = test::make_logits(s, 2, 1, n);
      const std::vector<float> all = scores<simd::default_arch, softmax>(z);
      const auto ids = oracle::top_k(z.data(), n, std::min<index_t>(n, 6));
      std::vector<float> expected;
      for (const expert_id e : ids)
        expected.push_back(e == no_expert ? 0.0f : all[static_cast<std::size_t>(e)]);
      INFO(test::name(s) << " E=" << n);
      CHECK(test::bit_difference(winners<simd::default_arch, softmax>(z, ids, score_scale::exact),
                                 expected) == "");
    }
}

TEST_CASE("up to a row factor, winners keep their ratios and the best has 1") {
  for (const shape s : {shape::normal, shape::zipf, shape::masked, shape::plus_infs}) {
    const std::vector<float> z = test::make_logits(s, 3, 1, 60);
    const auto ids = oracle::top_k(z.data(), 60, 5);
    const auto exact = winners<simd::default_arch, softmax>(z, ids, score_scale::exact);
    const auto loose = winners<simd::default_arch, softmax>(z, ids, score_scale::up_to_row_factor);
    CHECK(loose[0] == 1.0f);
    for (std::size_t r = 0; r < ids.size(); ++r)
      CHECK(std::abs(loose[r] * exact[0] - exact[r]) <= 1e-6f * exact[r]);
  }
}

TEST_CASE("scores of the selected sum to 1 over the selected") {
  for (const shape s : test::all_shapes)
    for (const index_t n : lengths) {
      const std::vector<float> z = test::make_logits(s, 4, 1, n);
      const auto ids = oracle::top_k(z.data(), n, std::min<index_t>(n, 6));
      const std::vector<double> by_expert = oracle::softmax(z.data(), n, ids);
      std::vector<double> expected;
      for (const expert_id e : ids)
        expected.push_back(e == no_expert ? 0.0 : by_expert[static_cast<std::size_t>(e)]);
      INFO(test::name(s) << " E=" << n);
      CHECK(test::difference(
                winners<simd::default_arch, softmax_selected>(z, ids, score_scale::exact), expected,
                3e-6, 2e-38) == "");
    }
}

TEST_CASE("a winner's softmax does not need the row's maximum among the winners") {
  for (const float largest : {5.0f, 80.0f, 200.0f, test::infinity}) {
    const std::vector<float> z = {1.0f, largest, 2.0f, 3.0f};
    const auto got = winners<simd::default_arch, softmax>(z, {2, 0}, score_scale::exact);
    const std::vector<double> all = oracle::softmax(z.data(), 4, {0, 1, 2, 3});
    CHECK(test::difference(got, std::vector<double>{all[2], all[0]}, 5e-6, 2e-38) == "");
  }
}

TEMPLATE_LIST_TEST_CASE("scores have the same bits on every instruction set", "", test::widths) {
  for (const shape s : test::all_shapes)
    for (const index_t n : lengths) {
      const std::vector<float> z = test::make_logits(s, 5, 1, n);
      INFO(test::name(s) << " E=" << n);
      CHECK(test::bit_difference(scores<TestType, softmax>(z),
                                 scores<simd::default_arch, softmax>(z)) == "");
      // A NaN that comes out has no promised sign.
      std::vector<float> clean = z;
      for (float& x : clean) x = x == x ? x : simd::minus_infinity;
      CHECK(test::bit_difference(scores<TestType, sigmoid>(clean),
                                 scores<simd::default_arch, sigmoid>(clean)) == "");
      CHECK(test::bit_difference(scores<TestType, sqrt_softplus>(clean),
                                 scores<simd::default_arch, sqrt_softplus>(clean)) == "");
    }
}

TEST_CASE("sqrt_softplus is near the one in double, also where exp underflows") {
  std::vector<float> z;
  std::vector<double> expected;
  for (float x = -170.0f; x < 100.0f; x += 0.37f) {
    z.push_back(x);
    expected.push_back(std::sqrt(std::log1p(std::exp(static_cast<double>(x)))));
  }
  CHECK(test::difference(scores<simd::default_arch, sqrt_softplus>(z), expected, 1e-6) == "");
}

TEST_CASE("relu, identity and uniform are what they say") {
  const std::vector<float> z = {-2.0f, -0.0f, 0.5f, 3.0f, 1e30f};
  CHECK(test::difference(scores<simd::default_arch, relu>(z),
                         std::vector<float>{0, 0, 0.5f, 3, 1e30f}, 0.0) == "");
  CHECK(test::bit_difference(scores<simd::default_arch, identity_score>(z), z) == "");
  CHECK(test::bit_difference(scores<simd::default_arch, uniform_score>(z),
                             std::vector<float>(5, 1.0f)) == "");
}

TEST_CASE("a choice without an expert has the score 0 under every score function") {
  const std::vector<float> z = {2.0f, 1.0f};
  const auto absent = [&]<class Score>(Score) {
    return winners<simd::default_arch, Score>(z, {0, no_expert}, score_scale::exact)[1];
  };
  CHECK(absent(softmax{}) == 0.0f);
  CHECK(absent(softmax_selected{}) == 0.0f);
  CHECK(absent(sigmoid{}) == 0.0f);
  CHECK(absent(sqrt_softplus{}) == 0.0f);
  CHECK(absent(relu{}) == 0.0f);
  CHECK(absent(identity_score{}) == 0.0f);
  CHECK(absent(uniform_score{}) == 0.0f);
}
