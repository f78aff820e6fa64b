#include "support/depth_routers.hpp"

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "oracle/layer.hpp"
#include "support/compare.hpp"
#include "support/float_rows.hpp"
#include "support/random.hpp"

namespace depth_routers_test {

using namespace example;
using test::as_rows;
using test::floats;
using test::into_rows;
using test::random_floats;
using test::wide;
using packed = moeroute::simd::packed_matrix<>;

namespace {

constexpr index_t d = 10;
const std::vector<std::int32_t> cuts{0, 7, 8, 8, 20, 33, 40};
constexpr std::size_t sequences = 6;

std::vector<double> mean(const floats& x, index_t first, index_t end) {
  std::vector<double> sum(d);
  for (index_t t = first; t < end; ++t)
    for (index_t c = 0; c < d; ++c)
      sum[static_cast<std::size_t>(c)] +=
          static_cast<double>(x[static_cast<std::size_t>(t * d + c)]) / double(end - first);
  return sum;
}
oracle::matrix means(const floats& x) {
  oracle::matrix m(sequences, d);
  for (std::size_t s = 0; s < sequences; ++s)
    for (index_t c = 0; cuts[s + 1] > cuts[s] && c < d; ++c)
      m(static_cast<index_t>(s), c) = mean(x, cuts[s], cuts[s + 1])[static_cast<std::size_t>(c)];
  return m;
}
void plus_one(index_t, matrix_view<float> part) {
  for (index_t t = 0; t < part.rows; ++t)
    for (index_t c = 0; c < part.cols; ++c) part(t, c) += 1.0f;
}
// How often plus_one ran on a row, from the row before and after.
int runs(const floats& before, const floats& after, std::size_t t) {
  int count = 0;
  for (float v = before[t * d]; v != after[t * d] && count < 9; v += 1.0f) ++count;
  return count;
}

}  // namespace

TEST_CASE("a sequence skips a block by the mean of its prompt, and so do tokens decoded later") {
  const floats w = random_floats(d, 1), x = random_floats(40 * d, 2);
  const oracle::matrix z = oracle::linear(means(x), wide(w, d));
  mind_skip router{packed(as_rows(w, d))};
  router.decide(as_rows(x, d), cuts);
  floats y = x;
  router.run(into_rows(y, d), cuts, plus_one);
  const std::vector<std::int32_t> ones{0, 1, 2, 3, 4, 5, 6};
  const floats token = random_floats(sequences * d, 3);
  floats decoded = token;
  router.run(into_rows(decoded, d), ones, plus_one);
  int skipped = 0;
  for (std::size_t s = 0; s < sequences; ++s) {
    const int expected = z(static_cast<index_t>(s), 0) > 0.0 ? 1 : 0;
    skipped += 1 - expected;
    for (std::size_t t = static_cast<std::size_t>(cuts[s]);
         t < static_cast<std::size_t>(cuts[s + 1]); ++t)
      CHECK(runs(x, y, t) == expected);
    CHECK(runs(token, decoded, s) == expected);
  }
  CHECK((skipped > 0 && skipped < 6));
}

TEST_CASE("a layer is skipped, executed or repeated by the mean logits of windows") {
  constexpr index_t hidden = 9, window = 5;
  std::vector<int> seen(3);
  for (std::uint64_t seed = 20; seed < 26; ++seed) {
    const floats first = random_floats(hidden * d, seed),
                 second = random_floats(3 * hidden, seed + 50),
                 x = random_floats(40 * d, seed + 90);
    skip_execute_repeat layer(
        moeroute::mlp_gate<>(packed(as_rows(first, d)), packed(as_rows(second, hidden)),
                             moeroute::gate_activation::silu),
        window);
    floats y = x;
    layer.run(into_rows(y, d), cuts, plus_one);
    for (std::size_t s = 0; s < sequences; ++s) {
      if (cuts[s + 1] == cuts[s]) continue;
      std::vector<double> sum(3);
      for (index_t t = cuts[s]; t < cuts[s + 1]; t += window) {
        oracle::matrix pooled(1, d);
        pooled.value = mean(x, t, std::min<index_t>(t + window, cuts[s + 1]));
        oracle::matrix h = oracle::linear(pooled, wide(first, d));
        for (double& v : h.value) v /= 1.0 + std::exp(-v);
        const oracle::matrix z = oracle::linear(h, wide(second, hidden));
        for (std::size_t e = 0; e < 3; ++e) sum[e] += z.value[e];
      }
      const auto times = std::max_element(sum.begin(), sum.end()) - sum.begin();
      ++seen[static_cast<std::size_t>(times)];
      for (std::size_t t = static_cast<std::size_t>(cuts[s]);
           t < static_cast<std::size_t>(cuts[s + 1]); ++t)
        CHECK(runs(x, y, t) == times);
    }
  }

  CHECK((seen[0] > 0 && seen[1] > 0 && seen[2] > 0));
}

TEST_CASE("a union of all slices is the dense network; of some, their part of it") {
  constexpr index_t experts = 4, slice = 3, ff = experts * slice;
  const floats w = random_floats(experts * d, 7), up = random_floats(ff * d, 8),
               down = random_floats(d * ff, 9), x = random_floats(40 * d, 10);
  const auto run_slice = [&](expert_id e, matrix_view<const float> in, matrix_view<float> out) {
    for (index_t r = 0; r < in.rows; ++r) {
      std::fill_n(out.row(r), d, 0.0f);
      for (index_t f = e * slice; f < (e + 1) * slice; ++f) {
        float h = 0.0f;
        for (index_t c = 0; c < d; ++c) h += up[static_cast<std::size_t>(f * d + c)] * in(r, c);
        h = std::max(h, 0.0f);
        for (index_t c = 0; c < d; ++c) out(r, c) += down[static_cast<std::size_t>(c * ff + f)] * h;
      }
    }
  };
  const oracle::matrix z = oracle::linear(means(x), wide(w, d));
  oracle::matrix h = oracle::linear(wide(x, d), wide(up, d));
  for (double& v : h.value) v = std::max(v, 0.0);
  for (const index_t k : {experts, index_t{2}}) {
    union_of_experts layer(packed(as_rows(w, d)), k);
    floats y(x.size());
    layer.forward(as_rows(x, d), cuts, into_rows(y, d), run_slice);
    oracle::matrix kept = h;
    for (std::size_t s = 0; s < sequences; ++s) {
      const auto seq = static_cast<index_t>(s);
      for (index_t e = 0; e < experts; ++e) {
        index_t better = 0;
        for (index_t other = 0; other < experts; ++other) better += z(seq, other) > z(seq, e);
        for (index_t t = cuts[s]; better >= k && t < cuts[s + 1]; ++t)
          for (index_t f = e * slice; f < (e + 1) * slice; ++f) kept(t, f) = 0.0;
      }
    }
    CHECK(test::difference(y, oracle::linear(kept, wide(down, ff)).value, 2e-5, 2e-5) == "");
  }
}

TEST_CASE("tokens are pruned by figures of theirs, whatever their states are") {
  constexpr index_t length = 20;
  const floats w = random_floats(4, 11), figures = random_floats(2 * length * 4, 12),
               x = random_floats(2 * length * d, 13);
  const auto block = [](expert_id, matrix_view<const float> in, matrix_view<float> out) {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < in.cols; ++c) out(r, c) = 3.0f * in(r, c);
  };
  auto layer = pruned_tokens(packed(as_rows(w, 4)), block, 0.3, length, d);
  floats y = x;
  layer.forward(into_rows(y, d), as_rows(figures, 4), into_rows(y, d));
  const oracle::matrix z = oracle::linear(wide(figures, 4), wide(w, 4));
  for (index_t t = 0; t < 2 * length; ++t) {
    index_t better = 0;
    for (index_t u = t / length * length; u < (t / length + 1) * length; ++u)
      better += z(u, 0) > z(t, 0);
    const double weight = better < 6 ? 1.0 / (1.0 + std::exp(-z(t, 0))) : 0.0;
    for (index_t c = 0; c < d; ++c) {
      const auto at = static_cast<std::size_t>(t * d + c);
      const double before = static_cast<double>(x[at]);
      if (better >= 6)
        CHECK(y[at] == x[at]);
      else
        CHECK(std::abs(static_cast<double>(y[at]) - (1.0 + 3.0 * weight) * before) <
              1e-5 * (1.0 + std::abs(before)));
    }
  }
}

TEST_CASE("an oracle's path is the best of all that fit, and a larger budget is never worse") {
  constexpr index_t layers = 4;
  const std::vector<double> cost{0.0, 1.0, 3.0};  // skip, small, big
  const floats gain = random_floats(61, layers * 3), pair = random_floats(62, 9);
  const auto loss = [&](std::span<const std::int32_t> path) {
    double sum = 0.0;
    for (std::size_t l = 0; l < path.size(); ++l) {
      sum += static_cast<double>(gain[l * 3 + static_cast<std::size_t>(path[l])]);
      // A layer is worth less after some.
      if (l > 0)
        sum += static_cast<double>(pair[static_cast<std::size_t>(path[l - 1] * 3 + path[l])]);
    }
    return sum;
  };
  double before = std::numeric_limits<double>::infinity();
  for (const double budget : {0.0, 1.0, 2.5, 4.0, 7.0, 12.0}) {
    double least = std::numeric_limits<double>::infinity();
    for (std::int32_t code = 0; code < 81; ++code) {
      const std::vector<std::int32_t> path{code / 27, code / 9 % 3, code / 3 % 3, code % 3};
      double spent = 0.0;
      for (const std::int32_t option : path) spent += cost[static_cast<std::size_t>(option)];
      if (spent <= budget) least = std::min(least, loss(path));
    }
    const auto [path, found] = oracle_path(layers, cost, budget, loss);
    CHECK(found == least);
    REQUIRE(path.size() == 4);
    CHECK(loss(path) == found);
    CHECK(found <= before);
    before = found;
  }
  // Where nothing is gained nothing is spent; where nothing fits there is no path.
  const auto even = [](std::span<const std::int32_t>) { return 1.0; };
  const std::vector<double> first_is_dear{2.0, 0.5};
  CHECK(oracle_path(3, first_is_dear, 9.0, even).first == std::vector<std::int32_t>{1, 1, 1});
  CHECK(oracle_path(3, first_is_dear, 1.0, even).first.empty());
  CHECK(oracle_path(3, {}, 1.0, even).first.empty());
}

}  // namespace depth_routers_test
