#include <moeroute/layer/mixture_of_depths.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <numeric>
#include <vector>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace mixture_of_depths_test {

using namespace moeroute;
using floats = std::vector<float>;

namespace {

constexpr index_t width = 8;

struct square {
  std::vector<float>* seen = nullptr;  // first column of the rows, in the order of the call
  void operator()(expert_id, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r) {
      if (seen != nullptr) seen->push_back(in(r, 0));
      for (index_t c = 0; c < in.cols; ++c) out(r, c) = in(r, c) * in(r, c);
    }
  }
};

}  // namespace

TEST_CASE("the best tokens of every sequence pass the block, in order; others keep their bits") {
  for (const index_t length : {1, 8, 37}) {
    constexpr index_t sequences = 3;
    const index_t tokens = sequences * length;
    test::random rng(static_cast<std::uint64_t>(length));
    floats x(static_cast<std::size_t>(tokens * width)), w(width);
    for (float& v : x) v = rng.normal();
    for (float& v : w) v = rng.normal();
    std::vector<float> seen;
    auto depths = mixture_of_depths(
        linear_gate<>(simd::packed_matrix<>(matrix_view<const float>(w.data(), 1, width))),
        square{&seen}, {.share = 0.25, .sequence_length = length});
    floats y = x;
    const matrix_view<float> rows(y.data(), tokens, width);
    depths.forward(rows, rows);
    const index_t taken = (length + 3) / 4;
    CHECK(static_cast<index_t>(seen.size()) == sequences * taken);
    std::size_t at = 0;
    for (index_t s = 0; s < sequences; ++s) {
      std::vector<double> score;
      for (index_t t = s * length; t < (s + 1) * length; ++t)
        score.push_back(
            std::inner_product(x.begin() + t * width, x.begin() + (t + 1) * width, w.begin(), 0.0));
      std::vector<double> sorted = score;
      std::sort(sorted.rbegin(), sorted.rend());
      const double least = sorted[static_cast<std::size_t>(taken - 1)];
      for (index_t t = 0; t < length; ++t)
        for (index_t c = 0; c < width; ++c) {
          const float before = x[static_cast<std::size_t>((s * length + t) * width + c)];
          const double r = score[static_cast<std::size_t>(t)];
          if (r < least) {
            CHECK(rows(s * length + t, c) == before);
          } else {
            if (c == 0) CHECK(seen[at++] == before);
            const double wide = static_cast<double>(before);
            CHECK(std::abs(static_cast<double>(rows(s * length + t, c)) -
                           (wide + r * wide * wide)) < 1e-4 * (1.0 + wide * wide * std::abs(r)));
          }
        }
    }
    CHECK(at == seen.size());
  }
}

TEST_CASE("of eight scores the two best are tokens 5 and 7, with weights 9 and 6") {
  const floats scores{1, -2, 3, 0, 5, 9, 2, 6};
  floats x(8, 1.0f);
  auto depths = mixture_of_depths(no_gate(1), square{}, {.share = 0.25, .sequence_length = 8}, 1);
  depths.forward_logits(matrix_view<const float>(x.data(), 8, 1),
                        matrix_view<const float>(scores.data(), 8, 1),
                        matrix_view<float>(x.data(), 8, 1));
  CHECK(x == floats{1, 1, 1, 1, 1, 10, 1, 7});
  CHECK(depths.plan().load(0) == 2);
}

TEST_CASE("a mixture of depths refuses shares, gates and lengths that do not fit") {
  CHECK(test::refusal([] { mixture_of_depths(no_gate(2), square{}, {}, 4); }) ==
        "moeroute::mixture_of_depths: gate.columns() is 2, expected 1");
  CHECK(test::refusal([] { mixture_of_depths(no_gate(1), square{}, {.share = 1.5}, 4); }) ==
        "moeroute::mixture_of_depths: share is 1.500000, expected above 0 and at most 1");
  floats x(10);
  auto depths = mixture_of_depths(no_gate(1), square{}, {.sequence_length = 4}, 1);
  CHECK(test::refusal([&] {
          depths.forward_logits(matrix_view<const float>(x.data(), 10, 1),
                                matrix_view<const float>(x.data(), 10, 1),
                                matrix_view<float>(x.data(), 10, 1));
        }) == "moeroute::expert_choice: tokens is 10, expected a multiple of sequence_length = 4");
}

}  // namespace mixture_of_depths_test
