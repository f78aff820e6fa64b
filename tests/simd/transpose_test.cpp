#include <moeroute/simd/transpose.hpp>

#include <algorithm>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <vector>

#include "support/arches.hpp"

using namespace moeroute;

TEMPLATE_LIST_TEST_CASE("a transposed load holds column c + j in register j, padded past the end",
                        "", test::arches) {
  constexpr int w = simd::width<TestType>;
  for (index_t cols = 1; cols <= 2 * w + 1; ++cols) {
    // Rows of exactly cols values each, so that the sanitizer sees a read beyond them.
    std::vector<std::vector<float>> row(w);
    const float* pointer[w];
    for (int i = 0; i < w; ++i) {
      auto& values = row[static_cast<std::size_t>(i)];
      for (index_t c = 0; c < cols; ++c) values.push_back(static_cast<float>(100 * i + c));
      pointer[i] = values.data();
    }
    for (index_t c = 0; c <= cols; c += w) {
      simd::vfloat<TestType> out[w];
      simd::load_transposed<TestType>(pointer, c, cols, -1.0f, out);
      bool right = true;
      for (int j = 0; j < w; ++j)
        for (int i = 0; i < w; ++i)
          right &= out[j].get(static_cast<std::size_t>(i)) ==
                   (c + j < cols ? static_cast<float>(100 * i + c + j) : -1.0f);
      CHECK(right);
    }
  }
}

TEMPLATE_LIST_TEST_CASE("store_ranks lays the ranks of a row side by side and writes nothing else",
                        "", test::arches) {
  for (int k = 1; k <= 40; ++k)
    for (int n = 1; n <= block_rows; ++n) {
      std::vector<float> ranks(static_cast<std::size_t>(k * block_rows));
      for (std::size_t i = 0; i < ranks.size(); ++i) ranks[i] = static_cast<float>(i);
      const auto size = static_cast<std::size_t>(n * k);
      // What a register writes too many may be more than one.
      std::vector<float> out(size + 16, -1.0f);
      simd::store_ranks<TestType>(ranks.data(), k, n, out.data());
      bool right = std::count(out.begin() + n * k, out.end(), -1.0f) == 16;
      for (int i = 0; i < n; ++i)
        for (int r = 0; r < k; ++r)
          right &=
              out[static_cast<std::size_t>(i * k + r)] == static_cast<float>(r * block_rows + i);
      INFO("k " << k << ", n " << n);
      CHECK(right);
    }
}
