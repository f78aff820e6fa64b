#include <moeroute/metrics/load.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <limits>
#include <moeroute/metrics/co_activation.hpp>
#include <moeroute/metrics/drops.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <vector>

#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/compare.hpp"
#include "support/counting_new.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/split.hpp"

using namespace moeroute;
using test::near;

namespace {

std::span<const std::int64_t> of(const std::vector<std::int64_t>& n) { return n; }

}  // namespace

TEST_CASE("measures of an even load, of one expert with everything, and of nothing") {
  const std::vector<std::int64_t> even{3, 3, 3, 3}, one{12, 0, 0, 0}, none{0, 0, 0, 0};
  CHECK(max_violation(of(even)) == 0);
  CHECK(max_violation(of(one)) == 3);
  CHECK(min_violation(of(one)) == 1);
  CHECK(balancedness(of(one)) == 0.25);
  CHECK(near(load_cv(of(one)), std::sqrt(3.0)));
  CHECK(near(load_cv(of(one), spread::sample), 2));
  CHECK(near(gini(of(one)), 0.75));
  CHECK(near(gini(of(even)), 0));
  CHECK(near(jain_index(of(one)), 0.25));
  CHECK(near(normalized_load_entropy(of(even)), 1));
  CHECK(load_entropy(of(one)) == 0);
  CHECK(near(load_kl_to_uniform(of(one)), std::log(4.0)));
  CHECK(max_violation(of(none)) == 0);
  CHECK(gini(of(none)) == 0);
  CHECK(jain_index(of(none)) == 1);
  CHECK(load_kl_to_uniform(of(none)) == 0);
  CHECK(max_violation(std::span<const int>{}) == 0);
  CHECK(load_cv(std::span<const std::int64_t>(one.data(), 1), spread::sample) == 0);
}

TEST_CASE(
    "Gini is the mean difference of pairs, Jain 1 / (1 + CV^2); both ignore scale and order") {
  const std::vector<std::int64_t> n{7, 1, 4, 0, 12}, more{0, 21, 12, 36, 3};
  double pairs = 0, sum = 0, squares = 0;
  for (const auto a : n) {
    for (const auto b : n) pairs += static_cast<double>(std::abs(a - b));
    sum += static_cast<double>(a);
    squares += static_cast<double>(a * a);
  }
  CHECK(near(gini(of(n)), pairs / (2 * 5 * sum)));
  CHECK(near(jain_index(of(n)), sum * sum / (5 * squares)));
  CHECK(near(gini(of(more)), gini(of(n))));
  CHECK(near(load_cv(of(more)), load_cv(of(n))));
}

TEST_CASE(
    "a load fed batch by batch has one shot's global measures; means of equal batches are never "
    "below them") {
  test::random rng(2);
  const assignment whole = test::fixed_choices(rng, 120, 12, 3, 0, 1.0);
  load_meter one(12), many(12), left(12), right(12);
  one.add(whole);
  int i = 0;
  test::for_each_part(whole, {40, 0, 40, 40}, [&](const assignment& part) {
    many.add(part);
    (i++ < 2 ? left : right).add(part);
  });
  left.add(right);
  CHECK(std::ranges::equal(many.load(), one.load()));
  CHECK(std::ranges::equal(left.load(), one.load()));
  CHECK(many.batches() == 3);
  CHECK(one.global_max_violation() == one.batch_max_violation());
  CHECK(many.global_max_violation() == one.global_max_violation());
  CHECK(many.batch_max_violation() >= many.global_max_violation());
  CHECK(many.batch_min_violation() >= many.global_min_violation());
  CHECK(left.batches() == 3);
  CHECK(near(left.batch_max_violation(), many.batch_max_violation()));
  CHECK(near(left.batch_min_violation(), many.batch_min_violation()));
}

TEST_CASE("token entropy is ln E for equal logits, 0 for one expert, whatever is masked") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  CHECK(std::abs(token_entropy(std::vector<float>(37, 5.0f)) - std::log(37.0)) < 1e-6);
  CHECK(token_entropy(std::vector<float>{3.0f, -inf, nan}) == 0);
  CHECK(token_entropy(std::vector<float>{-inf, nan}) == 0);
  CHECK(token_entropy(std::span<const float>{}) == 0);
  CHECK(std::abs(token_entropy(std::vector<float>{inf, inf, 0.0f}) - std::log(2.0)) < 1e-6);
  test::random rng(4);
  for (int n = 1; n < 70; n += 7) {
    std::vector<float> z;
    double total = 0, expected = 0;
    for (int i = 0; i < n; ++i) z.push_back(3 * rng.normal());
    for (const float x : z) total += std::exp(static_cast<double>(x));
    for (const float x : z) {
      const double p = std::exp(static_cast<double>(x)) / total;
      expected -= p * std::log(p);
    }
    CHECK(std::abs(token_entropy(z) - expected) < 2e-6);
  }
}

TEST_CASE("mean token entropy honours the mask and does not depend on how batches are cut") {
  test::random rng(5);
  std::vector<float> z(60 * 9);
  for (float& x : z) x = rng.normal();
  const matrix_view<const float> all(z.data(), 60, 9);
  std::vector<std::uint8_t> mask(60, 1);
  std::fill(mask.begin() + 40, mask.end(), std::uint8_t{0});
  entropy_meter one, many;
  one.add(all, mask);
  many.add(all.middle_rows(0, 13));
  many.add(all.middle_rows(13, 0));
  many.add(all.middle_rows(13, 27));
  CHECK(one.tokens() == 40);
  CHECK(one.mean() == many.mean());
  CHECK(one.normalized() < 1);
  CHECK(entropy_meter{}.mean() == 0);
  // A batch of no tokens says nothing of the experts either.
  const double share = one.normalized();
  one.add(matrix_view<const float>(nullptr, 0, 70));
  CHECK(one.normalized() == share);
  CHECK(test::refusal([&] { one.add(all, std::vector<std::uint8_t>(3)); }) ==
        "moeroute::entropy_meter: mask.size() is 3, expected 60");
}

TEST_CASE("a batch without tokens changes no entropy") {
  const std::vector<float> even(8, 0.5f);
  entropy_meter meter;
  meter.add(matrix_view<const float>(even.data(), 2, 4));
  meter.add(matrix_view<const float>(even.data(), 0, 0));
  CHECK(meter.tokens() == 2);
  CHECK(near(meter.mean(), std::log(4.0)));
  CHECK(near(meter.normalized(), 1));
}

TEST_CASE("drops are counted by choice, by token and by place; missing picks are not drops") {
  assignment a;
  a.reset(10, 4, 2);
  for (std::size_t c = 0; c < 20; ++c) a.ids()[c] = static_cast<expert_id>(c % 2);
  a.ids()[19] = no_expert;
  const auto kept = a.kept_to_change();
  kept[16] = kept[17] = kept[18] = 0;
  drop_meter m;
  m.add(a);
  CHECK(m.choices() == 19);
  CHECK(m.dropped() == 3);
  CHECK(m.missing() == 1);
  CHECK(m.lost_tokens() == 2);
  CHECK(near(m.rate(), 3.0 / 19));
  CHECK(m.rate_at(0) == 0);
  CHECK(m.rate_at(8) == 1);
  CHECK(m.rate_at(9) == 1);
  std::vector<std::uint8_t> mask(10, 1);
  mask[8] = mask[9] = 0;
  drop_meter masked;
  masked.add(a, mask);
  CHECK(masked.rate() == 0);
  CHECK(drop_meter{}.rate() == 0);
  // A tenth of 25 tokens is 2 or 3 of them; who chose nothing has lost nothing.
  assignment odd;
  odd.reset(25, 4, 1);
  std::fill(odd.ids().begin(), odd.ids().end(), 1);
  odd.ids()[7] = no_expert;
  odd.kept_to_change()[4] = odd.kept_to_change()[24] = 0;
  drop_meter tenths;
  tenths.add(odd);
  CHECK(tenths.lost_tokens() == 2);
  CHECK(tenths.rate_at(0) == 0);
  CHECK(tenths.rate_at(1) == 0.5);
  CHECK(tenths.rate_at(2) == 0);
  CHECK(near(tenths.rate_at(9), 1.0 / 2));
  CHECK(test::refusal([&] { (void)m.rate_at(10); }) ==
        "moeroute::drop_meter: tenth is 10, expected 0 to 9");
}

TEST_CASE("pairs of an expert add up to k - 1 times its own count, in one shot or in batches") {
  test::random rng(6);
  const assignment whole = test::fixed_choices(rng, 90, 11, 4);
  co_activation one(11), many(11);
  one.add(whole);
  test::for_each_part(whole, {1, 39, 50}, [&](const assignment& part) { many.add(part); });
  for (index_t i = 0; i < 11; ++i) {
    std::int64_t others = 0;
    double rates = 0;
    for (index_t j = 0; j < 11; ++j) {
      CHECK(one.pairs(i, j) == many.pairs(i, j));
      CHECK(one.pairs(i, j) == one.pairs(j, i));
      if (j == i) continue;
      others += one.pairs(i, j);
      rates += one.rate(i, j);
    }
    CHECK(others == 3 * one.pairs(i, i));
    if (one.pairs(i, i) > 0) CHECK(near(rates, 3));
  }
  // Experts that are chosen once, twice and never.
  assignment two;
  two.reset(2, 4, 2);
  for (std::size_t i = 0; i < 4; ++i) two.ids()[i] = static_cast<expert_id>((i + 1) / 2);
  co_activation few(4);
  few.add(two);
  CHECK(few.rate(0, 1) == 1.0);
  CHECK(few.rate(1, 0) == 0.5);
  CHECK(few.rate(1, 1) == 1.0);
  CHECK(few.rate(3, 0) == 0.0);
}

TEST_CASE("meters allocate nothing per batch and refuse what does not fit") {
  test::random rng(7);
  const assignment a = test::fixed_choices(rng, 64, 8, 2);
  load_meter load(8);
  co_activation pairs(8);
  drop_meter drops;
  CHECK(test::allocations_during([&] {
          load.add(a);
          pairs.add(a);
          drops.add(a);
        }) == 0);
  CHECK(test::refusal([] { load_meter(0); }) ==
        "moeroute::load_meter: experts is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { load_meter(1048577); }) ==
        "moeroute::load_meter: experts is 1048577, expected 1 to 1048576");
  CHECK(test::refusal([] { load_meter(1048576); }) == "accepted");
  CHECK(test::refusal([&] { load_meter(9).add(a); }) ==
        "moeroute::load_meter: experts is 8, expected 9");
  CHECK(test::refusal([&] { load.add_counts(std::vector<std::int64_t>{1}); }) ==
        "moeroute::load_meter: counts.size() is 1, expected 8");
  const std::vector<std::uint8_t> short_mask(63, 1);
  const std::vector<float> logits(6);
  const test::refusals all{
      {[] { co_activation(0); }, "co_activation: experts is 0, expected 1 to 16384"},
      {[] { co_activation(16385); }, "co_activation: experts is 16385, expected 1 to 16384"},
      {[&] { co_activation(9).add(a); }, "co_activation: experts is 8, expected 9"},
      {[&] { pairs.add(a, {.mask = short_mask}); }, "co_activation: mask.size is 63, expected 64"},
      {[&] { (void)pairs.pairs(8, 0); }, "co_activation: expert is 8, expected 0 to 7"},
      {[&] { (void)pairs.pairs(-1, 0); }, "co_activation: expert is -1, expected 0 to 7"},
      {[&] { (void)pairs.pairs(0, 8); }, "co_activation: expert is 8, expected 0 to 7"},
      {[&] { (void)pairs.rate(0, -1); }, "co_activation: expert is -1, expected 0 to 7"},
      {[&] { drops.add(a, short_mask); }, "drop_meter: mask.size() is 63, expected 64"},
      {[&] { (void)drops.rate_at(-1); }, "drop_meter: tenth is -1, expected 0 to 9"},
      {[&] { entropy_meter{}.add({logits.data(), 2, 3, 2}); },
       "entropy_meter: logits.stride is 2, expected at least 3"},
      {[&] { load.add_counts(std::vector<std::int64_t>{1, 1, 1, 1, 1, 1, 1, -1}); },
       "load_meter: a count is -1, expected >= 0"},
      {[&] { load.add(load_meter(7)); }, "load_meter: experts is 7, expected 8"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK((load.batches() == 1 && pairs.experts() == 8));
  const std::vector<std::uint8_t> none(64, 0);
  load_meter masked(8);
  masked.add(a, {.mask = none});
  CHECK(masked.batches() == 0);
  CHECK(masked.batch_max_violation() == 0);
}

TEST_CASE("measures of an uneven load by hand, and of no experts at all") {
  const std::vector<std::int64_t> n{1, 3, 0, 4}, single{5};
  const double entropy = std::log(8.0) - (3 * std::log(3.0) + 4 * std::log(4.0)) / 8;
  CHECK(mean_load(of(n)) == 2);
  CHECK(balancedness(of(n)) == 0.5);
  CHECK(near(load_cv(of(n)), std::sqrt(10.0 / 4) / 2));
  CHECK(near(load_cv(of(n), spread::sample), std::sqrt(10.0 / 3) / 2));
  CHECK(near(load_entropy(of(n)), entropy));
  CHECK(near(normalized_load_entropy(of(n)), entropy / std::log(4.0)));
  CHECK(near(load_kl_to_uniform(of(n)), std::log(4.0) - entropy));
  CHECK(normalized_load_entropy(of(single)) == 1);
  CHECK(load_entropy(of(single)) == 0);
  const std::span<const std::int64_t> none;
  CHECK(mean_load(none) == 0);
  CHECK(min_violation(none) == 0);
  CHECK(load_entropy(none) == 0);
  CHECK(load_kl_to_uniform(none) == 0);
  CHECK(normalized_load_entropy(none) == 1);
  CHECK(balancedness(none) == 1);
  CHECK(gini(none) == 0);
  // Scratch that held more before.
  std::vector<double> sorted(9, 7.0);
  CHECK(near(gini(of(n), sorted), gini(of(n))));
  entropy_meter of_one;
  of_one.add(matrix_view<const float>(std::vector<float>(3, 1.0f).data(), 3, 1));
  CHECK((of_one.tokens() == 3 && of_one.mean() == 0 && of_one.normalized() == 0));
}
