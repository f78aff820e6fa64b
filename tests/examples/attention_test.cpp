#include "support/attention.hpp"

#include "support/norm_rope.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

namespace attention_test {

using namespace example;

namespace {

struct problem {
  index_t kv_heads, group, dim, positions;
  std::vector<float> queries, keys, values;  // [positions, heads * dim]

  problem(index_t kv, index_t per_kv, index_t width, index_t count)
      : kv_heads(kv), group(per_kv), dim(width), positions(count) {
    std::mt19937 bits(17);
    std::normal_distribution<float> normal;
    for (auto* memory : {&queries, &keys, &values}) {
      const index_t heads = memory == &queries ? kv * group : kv;
      memory->resize(static_cast<std::size_t>(positions * heads * dim));
      std::generate(memory->begin(), memory->end(), [&] { return normal(bits); });
    }
  }
  [[nodiscard]] index_t width() const { return kv_heads * group * dim; }

  void store(kv_cache& cache, index_t position) const {
    for (index_t h = 0; h < kv_heads; ++h) {
      const index_t at = (position * kv_heads + h) * dim;
      cache.store(h, position, keys.data() + at, values.data() + at);
    }
  }

  /// The rows of all positions, `step` of them at a time.
  template <class Exec>
  [[nodiscard]] std::vector<float> attended(index_t step, const Exec& exec) const {
    kv_cache cache(kv_heads, dim, positions);
    std::vector<float> out(queries.size());
    for (index_t first = 0; first < positions; first += step) {
      const index_t rows = std::min(step, positions - first);
      for (index_t t = 0; t < rows; ++t) {
        store(cache, first + t);
      }
      attend(cache, first,
             matrix_view<const float>(queries.data() + first * width(), rows, width()),
             matrix_view<float>(out.data() + first * width(), rows, width()), exec);
    }
    return out;
  }

  /// One head's row by the definition, in double.
  [[nodiscard]] std::vector<double> expected(index_t t, index_t head) const {
    const float* query = queries.data() + (t * kv_heads * group + head) * dim;
    std::vector<double> row(static_cast<std::size_t>(dim));
    double sum = 0;
    for (index_t j = 0; j <= t; ++j) {
      const index_t at = (j * kv_heads + head / group) * dim;
      double score = 0;
      for (index_t i = 0; i < dim; ++i) {
        score += double{query[i]} * double{keys[static_cast<std::size_t>(at + i)]};
      }
      sum += std::exp(score);
      for (index_t i = 0; i < dim; ++i) {
        row[static_cast<std::size_t>(i)] +=
            std::exp(score) * double{values[static_cast<std::size_t>(at + i)]};
      }
    }
    for (double& value : row) {
      value /= sum;
    }
    return row;
  }
};

}  // namespace

TEST_CASE("attention is the softmax-weighted mean of the values so far, for any head shape") {
  const index_t dim = GENERATE(2, 20, 32, 80);
  const index_t group = GENERATE(1, 2, 3, 4);
  const problem p(2, group, dim, 70);
  const auto out = p.attended(p.positions, moeroute::serial{});
  double worst = 0;
  for (index_t t = 0; t < p.positions; ++t) {
    for (index_t head = 0; head < p.kv_heads * group; ++head) {
      const std::vector<double> row = p.expected(t, head);
      const float* found = out.data() + t * p.width() + head * dim;
      for (index_t i = 0; i < dim; ++i) {
        worst = std::max(worst, std::abs(double{found[i]} - row[static_cast<std::size_t>(i)]));
      }
    }
  }
  CHECK(worst < 2e-4);
}

TEST_CASE("attention has the same bits however the positions are cut") {
  const problem p(2, 3, 20, 150);
  const auto whole = p.attended(150, moeroute::serial{});
  for (const index_t step : {1, 2, 7, 64, 100}) {
    CHECK(p.attended(step, moeroute::serial{}) == whole);
  }
}

#if defined(_OPENMP)
TEST_CASE("attention has the same bits on any number of threads") {
  const problem p(2, 2, 32, 300);
  const auto alone = p.attended(300, moeroute::serial{});
  CHECK(p.attended(300, moeroute::openmp{2}) == alone);
  CHECK(p.attended(300, moeroute::openmp{3}) == alone);
}
#endif

TEST_CASE("scores far apart leave no infinity behind") {
  kv_cache cache(1, 2, 3);
  const float key[3][2] = {{1e4F, 0}, {-1e4F, 0}, {0, 1}};
  for (index_t j = 0; j < 3; ++j) {
    const float value[2] = {static_cast<float>(j), 1};
    cache.store(0, j, key[j], value);
  }
  const float query[2] = {100, 0};
  float out[2];
  attend(cache, 2, matrix_view<const float>(query, 1, 2), matrix_view<float>(out, 1, 2),
         moeroute::serial{});
  CHECK(out[0] == 0.0F);
  CHECK(out[1] == 1.0F);
}

}  // namespace attention_test
