// The placing half of simd/rows/counting_sort.hpp, on every instruction set of this build.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/simd/rows/counting_sort.hpp>
#include <span>
#include <vector>

#include "support/arches.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"

using namespace moeroute;

namespace {

using ints = std::vector<std::int32_t>;

struct placed {
  ints start, place, group_at;
  bool operator==(const placed&) const = default;
};

// One key value after the other: all indices are looked at.
placed by_brute_force(const ints& key, index_t values, const ints& group) {
  placed p;
  p.place.assign(key.size(), -1);
  for (std::int32_t v = 0; v < values; ++v) {
    p.start.push_back(static_cast<std::int32_t>(p.group_at.size()));
    for (std::size_t i = 0; i < key.size(); ++i) {
      if (key[i] != v) continue;
      p.place[i] = static_cast<std::int32_t>(p.group_at.size());
      p.group_at.push_back(group[i]);
    }
  }
  p.start.push_back(static_cast<std::int32_t>(p.group_at.size()));
  return p;
}

ints random_keys(test::random& rng, std::size_t n, index_t values, bool with_negatives) {
  ints key(n);
  for (auto& v : key)
    v = with_negatives && rng.below(4) == 0 ? -1 : static_cast<std::int32_t>(rng.below(values));
  return key;
}

template <class A>
placed by_counting(const ints& key, index_t values, simd::groups g, bool in_place) {
  // Every array ends where memory does, or begins there, in turn.
  static test::edges memory(4 * 5000);
  static int turn = 0;
  const auto n = static_cast<index_t>(key.size());
  memory.begin(++turn % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
  const std::int32_t* const keys = memory.copy(key);
  std::int32_t *const start = memory.room<std::int32_t>(values + 1), *const place = memory.copy(
                                                                         in_place ? key
                                                                                  : ints(key.size(),
                                                                                         99));
  CHECK(simd::rank_keys<A>(in_place ? place : keys, n, values, start, place));
  const index_t total = simd::exclusive_scan<A>(start, values, start);
  std::int32_t* const group_at = memory.room<std::int32_t>(total);
  if (g.list != nullptr) g.list = memory.copy(std::span<const std::int32_t>(g.list, key.size()));
  simd::place_keys<A>(keys, n, g, start, place, group_at);
  return {{start, start + values + 1}, {place, place + n}, {group_at, group_at + total}};
}

}  // namespace

TEST_CASE("every key's place is its stable rank among all keys") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    test::random rng(1);
    for (const std::size_t n : {0u, 1u, 7u, 15u, 16u, 17u, 31u, 32u, 33u, 100u, 1000u})
      for (const index_t values : {1, 2, 5, 64, 300})
        for (const index_t size : {1, 2, 3, 5, 8, 16, 17, 100})
          for (const bool negatives : {false, true}) {
            const ints key = random_keys(rng, n, values, negatives);
            ints group(n);
            for (std::size_t i = 0; i < n; ++i)
              group[i] = static_cast<std::int32_t>(static_cast<index_t>(i) / size);
            const placed expected = by_brute_force(key, values, group);
            INFO("n=" << n << " values=" << values << " size=" << size);
            CHECK(by_counting<A>(key, values, {nullptr, size}, false) == expected);
            CHECK(by_counting<A>(key, values, {nullptr, size}, true) == expected);
            for (auto& g : group) g = static_cast<std::int32_t>(rng.below(1000));
            CHECK(by_counting<A>(key, values, {group.data(), 1}, false) ==
                  by_brute_force(key, values, group));
          }
  });
}

TEST_CASE("so many keys that they are placed one by one have the same places") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    test::random rng(3);
    for (const std::size_t n : {4095u, 4096u, 4101u})
      for (const index_t size : {1, 3, 8})
        for (const bool negatives : {false, true}) {
          const ints key = random_keys(rng, n, 20, negatives);
          ints group(n);
          for (std::size_t i = 0; i < n; ++i)
            group[i] = static_cast<std::int32_t>(static_cast<index_t>(i) / size);
          INFO("n=" << n << " size=" << size);
          const placed expected = by_brute_force(key, 20, group);
          CHECK((by_counting<A>(key, 20, {nullptr, size}, false) == expected));
          CHECK((by_counting<A>(key, 20, {group.data(), 1}, true) == expected));
        }
  });
}

TEST_CASE("no keys have no places, whatever the groups") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    const std::int32_t start = 0;
    simd::place_keys<A>(nullptr, 0, {nullptr, 0}, &start, nullptr, nullptr);
  });
  SUCCEED();
}

TEST_CASE("sixteen equal keys in one register keep their order") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    const ints key(48, 3);
    ints group(48);
    for (std::size_t i = 0; i < group.size(); ++i) group[i] = static_cast<std::int32_t>(i);
    CHECK(by_counting<A>(key, 5, {nullptr, 1}, false) == by_brute_force(key, 5, group));
  });
}

TEST_CASE("few keys are sorted to the same result as many, and nothing is written behind it") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    test::random rng(2);
    test::edges memory(4 * 300);
    for (const std::size_t n : {0u, 1u, 2u, 3u, 5u, 8u, 9u, 15u, 16u, 17u, 64u, 65u, 254u, 255u})
      for (const index_t values :
           {1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256}) {
        if (n > 16 && values > 8) continue;
        for (const bool negatives : {false, true})
          for (const bool listed : {false, true}) {
            const ints key = random_keys(rng, n, values, negatives);
            const index_t size = 1 + rng.below(20);
            ints group(n);
            for (std::size_t i = 0; i < n; ++i)
              group[i] = static_cast<std::int32_t>(static_cast<index_t>(i) / size);
            if (listed)
              for (auto& g : group) g = static_cast<std::int32_t>(rng.below(1000));
            const placed expected = by_brute_force(key, values, group);
            const auto length = static_cast<index_t>(n);
            const index_t total = std::ssize(expected.group_at);
            INFO("n=" << n << " values=" << values << " size=" << size);
            test::at_both_ends(memory, [&] {
              const simd::groups g{listed ? memory.copy(group) : nullptr, size};
              std::int32_t *const start = memory.room<std::int32_t>(values + 1),
                                  *const place = memory.room<std::int32_t>(length),
                                  *const group_at = memory.room<std::int32_t>(total);
              CHECK(simd::sort_few_keys<A>(memory.copy(key), length, values, g, start, place,
                                           group_at));
              const placed p{{start, start + values + 1},
                             {place, place + length},
                             {group_at, group_at + total}};
              CHECK((p == expected));
            });
          }
      }
    CHECK_FALSE(simd::are_few_keys<A>(256, 8));
    CHECK_FALSE(simd::are_few_keys<A>(17, 9));
    constexpr index_t few = simd::detail::scatters_keys<A> ? 64 : 8;
    CHECK((simd::are_few_keys<A>(few, 8) && !simd::are_few_keys<A>(few + 1, 8)));
    constexpr bool in_bytes = simd::detail::counts_in_bytes<A>;
    CHECK((simd::are_few_keys<A>(16, 256) == in_bytes && simd::are_few_keys<A>(1, 9) == in_bytes));
    CHECK_FALSE(simd::are_few_keys<A>(16, 257));
  });
}

TEST_CASE("a key outside of [-1, values) is found wherever it is, by ranking and by sorting too") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    test::edges memory(4 * 100);
    for (const std::size_t n : {1u, 5u, 16u, 40u, 100u})
      for (std::size_t at = 0; at < n; ++at) {
        ints key(n, 6), rank(n), start(8), group(n);
        const auto length = static_cast<index_t>(n);
        const auto accepted = [&] {
          memory.begin(test::guarded_end::back);
          const std::int32_t* const keys = memory.copy(key);
          const bool in_range = simd::keys_in_range<A>(keys, length, 7);
          const bool ranked = simd::rank_keys<A>(keys, length, 7, start.data(), rank.data());
          const bool sorted = simd::sort_few_keys<A>(keys, length, 7, {nullptr, 1}, start.data(),
                                                     rank.data(), group.data());
          CHECK((in_range == ranked && sorted == ranked));
          return in_range;
        };
        for (const std::int32_t good : {-1, 0, 6}) {
          key[at] = good;
          CHECK(accepted());
        }
        for (const std::int32_t bad : {7, -2, 1 << 30, -(1 << 30)}) {
          key[at] = bad;
          CHECK_FALSE(accepted());
        }
      }
    CHECK(simd::keys_in_range<A>(nullptr, 0, 0));
  });
}
