#include <moeroute/base/rng.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>

using namespace moeroute;

static_assert(random_u01(1, 2, 3) == random_u01(1, 2, 3));

TEST_CASE("the words are those of Philox4x32-10") {
  // The published known answers: counter words c0 c1 c2 c3, key words k0 k1.
  struct answer {
    std::uint64_t seed, stream, counter;
    std::uint32_t word[4];
  };
  constexpr std::uint64_t ones = ~std::uint64_t{0};
  const answer answers[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {ones, ones, ones, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822,
       0x0370734413198a2e,
       0x85a308d3243f6a88,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const answer& a : answers) {
    const random_words r = random_block(a.seed, a.stream, a.counter);
    for (int i = 0; i < 4; ++i) CHECK(r.word[i] == a.word[i]);
  }
}

TEST_CASE("uniform numbers stay below 1, open ones above 0") {
  CHECK(u01_of(0) == 0.0f);
  CHECK(u01_of(0xffffffffu) == 1.0f - 0x1p-24f);
  CHECK(open_u01_of(0) == 0x1p-24f);
  CHECK(open_u01_of(0xffffffffu) == 1.0f - 0x1p-24f);
}

TEST_CASE("numbers along counter, stream and seed are uniform and unrelated") {
  constexpr int n = 100000;
  for (int axis = 0; axis < 3; ++axis) {
    double sum = 0, squares = 0, products = 0, before = 0;
    for (std::uint64_t i = 0; i < n; ++i) {
      const double x =
          static_cast<double>(random_u01(axis == 0 ? i : 7, axis == 1 ? i : 8, axis == 2 ? i : 9)) -
          0.5;
      sum += x;
      squares += x * x;
      products += x * before;
      before = x;
    }
    // Standard errors of the means: 0.0009, 0.00024 and 0.00026.
    CHECK(std::abs(sum / n) < 0.005);
    CHECK(std::abs(squares / n - 1.0 / 12) < 0.0012);
    CHECK(std::abs(products / n) < 0.0013);
  }
}

TEST_CASE("bits and uniform numbers are those of the block's words, which replays rest on") {
  for (const std::uint64_t counter : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 40}) {
    const random_words r = random_block(7, 8, counter);
    CHECK(random_bits(7, 8, counter) == (std::uint64_t{r.word[1]} << 32 | r.word[0]));
    CHECK(random_u01(7, 8, counter) == u01_of(r.word[0]));
    for (const std::uint32_t n : {1u, 3u, 1000u, 0xffffffffu}) {
      const std::uint32_t drawn = random_below(n, 7, 8, counter);
      CHECK(drawn == std::uint64_t{r.word[0]} * n / (std::uint64_t{1} << 32));
      CHECK(drawn < n);
    }
  }
  CHECK(u01_of(0x80000000u) == 0.5f);
  CHECK(u01_of(0xff) == 0.0f);
  CHECK(u01_of(0x100) == 0x1p-24f);
  CHECK(open_u01_of(0x200) == 3 * 0x1p-24f);
}
