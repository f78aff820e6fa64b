#include <moeroute/simd/random.hpp>
//
#include <catch2/catch_test_macros.hpp>

#include "support/arches.hpp"

using namespace moeroute;

TEST_CASE("16 lanes of random numbers are the blocks at their places") {
  test::for_each_arch<test::widths>([](auto tag) {
    simd::random_lanes<decltype(tag)> lanes;
    const std::uint64_t seed = 0x123456789abcdef0u, stream = 0xfedcba9876543210u,
                        first = 0xfffffffffffffff0u, step = 3;
    lanes.place_all(stream, first, step);
    lanes.place(5, 7, 11);
    lanes.draw(seed);
    bool same = true;
    for (int i = 0; i < 16; ++i) {
      const std::uint64_t counter = first + static_cast<std::uint64_t>(i) * step;
      const random_words block =
          i == 5 ? random_block(seed, 7, 11) : random_block(seed, stream, counter);
      for (int j = 0; j < 4; ++j) same = same && lanes.word(j, i) == block.word[j];
      same = same && lanes.below(1000, i) == (i == 5 ? random_below(1000, seed, 7, 11)
                                                     : random_below(1000, seed, stream, counter));
    }
    for (int n = 0; n <= 16; ++n) {
      lanes.place_all(stream, 5, 2, n);
      lanes.draw(seed, n);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < 4; ++j)
          same = same && lanes.word(j, i) ==
                             random_block(seed, stream, 5 + 2 * static_cast<unsigned>(i)).word[j];
    }
    CHECK(same);
  });
}
