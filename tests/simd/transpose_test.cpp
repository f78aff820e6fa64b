#include <moeroute/simd/transpose.hpp>

#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>

#include "support/arches.hpp"
#include "support/edges.hpp"

using namespace moeroute;

TEMPLATE_LIST_TEST_CASE("a transposed load holds column c + j in register j, padded past the end",
                        "", test::arches) {
  constexpr int w = simd::width<TestType>;
  test::edges memory(4 * (2 * w + 1));
  for (index_t cols = 1; cols <= 2 * w + 1; ++cols) {
    memory.begin(cols % 3 == 0 ? test::guarded_end::front : test::guarded_end::back);
    const float** const pointer = memory.room<const float*>(w);
    for (int i = 0; i < w; ++i) {
      float* const values = memory.room<float>(cols);
      for (index_t c = 0; c < cols; ++c) values[c] = static_cast<float>(100 * i + c);
      pointer[i] = values;
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
  test::edges memory(4 * 40 * block_rows);
  for (int k = 1; k <= 40; ++k)
    for (int n = 1; n <= block_rows; ++n)
      test::at_both_ends(memory, [&] {
        float* const ranks = memory.room<float>(k * block_rows);
        for (int i = 0; i < k * block_rows; ++i) ranks[i] = static_cast<float>(i);
        float* const out = memory.room<float>(n * k);
        simd::store_ranks<TestType>(ranks, k, n, out);
        bool right = true;
        for (int i = 0; i < n; ++i)
          for (int r = 0; r < k; ++r)
            right &= out[i * k + r] == static_cast<float>(r * block_rows + i);
        INFO("k " << k << ", n " << n);
        CHECK(right);
      });
}
