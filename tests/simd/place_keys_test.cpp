// The placing half of simd/rows/counting_sort.hpp, on every instruction set of this build.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/simd/rows/counting_sort.hpp>
#include <vector>

#include "support/arches.hpp"
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
placed by_counting(ints key, index_t values, simd::groups g, bool in_place) {
  const auto n = static_cast<index_t>(key.size());
  placed p;
  ints count(static_cast<std::size_t>(values));
  p.start.resize(static_cast<std::size_t>(values + 1));
  p.place.assign(key.size(), 99);
  simd::count_keys(key.data(), n, values, count.data());
  p.group_at.resize(
      static_cast<std::size_t>(simd::exclusive_scan(count.data(), values, p.start.data())));
  std::copy_n(p.start.begin(), values, count.begin());
  simd::place_keys<A>(key.data(), n, g, count.data(), in_place ? key.data() : p.place.data(),
                      p.group_at.data());
  if (in_place) p.place = key;
  return p;
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

TEST_CASE("sixteen equal keys in one register keep their order") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    const ints key(48, 3);
    ints group(48);
    for (std::size_t i = 0; i < group.size(); ++i) group[i] = static_cast<std::int32_t>(i);
    CHECK(by_counting<A>(key, 5, {nullptr, 1}, false) == by_brute_force(key, 5, group));
  });
}

TEST_CASE("few keys are sorted to the same result as many") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    test::random rng(2);
    for (int n = 0; n <= simd::few_keys; ++n)
      for (const index_t values : {1, 2, 3, 15, 16, 17, 33, 256, 1000, 1 << 20})
        for (const bool negatives : {false, true}) {
          const ints key = random_keys(rng, static_cast<std::size_t>(n), values, negatives);
          const index_t size = 1 + rng.below(8);
          ints group(key.size());
          for (std::size_t i = 0; i < group.size(); ++i)
            group[i] = static_cast<std::int32_t>(static_cast<index_t>(i) / size);
          const placed expected = by_counting<A>(key, values, {nullptr, size}, false);
          placed p;
          p.start.assign(static_cast<std::size_t>(values + 1), 99);
          p.place.assign(key.size(), 99);
          p.group_at.assign(key.size(), 99);
          const std::int32_t used =
              simd::sort_few_keys<A>(key.data(), n, values, {nullptr, size}, p.start.data(),
                                     p.place.data(), p.group_at.data());
          p.group_at.resize(static_cast<std::size_t>(used));
          INFO("n=" << n << " values=" << values);
          CHECK((p == expected));
        }
  });
}

TEST_CASE("a key outside of [-1, values) is found wherever it is") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    for (const std::size_t n : {1u, 5u, 16u, 40u, 100u})
      for (std::size_t at = 0; at < n; ++at) {
        ints key(n, 6);
        key[at] = -1;
        CHECK(simd::keys_in_range<A>(key.data(), static_cast<index_t>(n), 7));
        key[at] = 7;
        CHECK_FALSE(simd::keys_in_range<A>(key.data(), static_cast<index_t>(n), 7));
        key[at] = -2;
        CHECK_FALSE(simd::keys_in_range<A>(key.data(), static_cast<index_t>(n), 7));
      }
    CHECK(simd::keys_in_range<A>(nullptr, 0, 0));
  });
}
