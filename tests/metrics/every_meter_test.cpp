// What holds for every meter: masked tokens are not there, batches join, dropped choices count as
// the options say, and rows of logits may lie anywhere.
#include <moeroute/metrics/load.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/metrics/cache.hpp>
#include <moeroute/metrics/co_activation.hpp>
#include <moeroute/metrics/committee.hpp>
#include <moeroute/metrics/drops.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/segment.hpp>
#include <moeroute/metrics/sparsity.hpp>
#include <moeroute/metrics/specialisation.hpp>
#include <vector>

#include "support/assignments.hpp"
#include "support/split.hpp"
#include "support/strided.hpp"

using namespace moeroute;

namespace {

constexpr index_t experts = 7, k = 2;

// Every number that a meter of choices gives.
class meters {
 public:
  void add(const assignment& a, const count_options& what = {}) {
    load_.add(a, what);
    pairs_.add(a, what);
    domains_.add(1, a, what);
    sparsity_.add(a, what);
    segment_.add(a, what);
    trace_.add(a, what);
    drops_.add(a, what.mask);
  }

  // Without what is a mean per batch or a place in one.
  std::vector<double> numbers() const {
    std::vector<double> out;
    const auto say = [&](auto x) { out.push_back(static_cast<double>(x)); };
    for (const std::int64_t n : load_.load()) say(n);
    for (index_t i = 0; i < experts; ++i)
      for (index_t j = 0; j < experts; ++j) say(pairs_.pairs(i, j));
    for (const std::int64_t n : domains_.counts(0)) say(n);
    for (const std::int64_t n : domains_.counts(1)) say(n);
    say(sparsity_.tokens());
    say(sparsity_.chunks());
    say(sparsity_.token_level());
    say(sparsity_.chunk_level());
    say(segment_.windows());
    for (index_t e = 0; e < experts; ++e) {
      const segment_score s = segment_.of(e);
      say(s.f1);
      say(s.threshold);
      say(s.size_ratio);
    }
    say(segment_.all().f1);
    say(trace_.tokens());
    say(trace_.most());
    for (const expert_id e : trace_.ids()) say(e);
    say(drops_.tokens());
    say(drops_.choices());
    say(drops_.dropped());
    say(drops_.missing());
    say(drops_.lost_tokens());
    return out;
  }

 private:
  load_meter load_{experts};
  co_activation pairs_{experts};
  specialisation_meter domains_{2, experts};
  sparsity_meter sparsity_{experts, 3};
  segment_meter segment_{experts, 4};
  expert_trace trace_{experts};
  drop_meter drops_;
};

// The tokens that stand for themselves.
assignment unmasked(const assignment& a, const std::vector<std::uint8_t>& mask) {
  std::vector<index_t> taken;
  for (index_t t = 0; t < a.tokens(); ++t)
    if (mask[static_cast<std::size_t>(t)] != 0) taken.push_back(t);
  assignment out;
  out.reset(static_cast<index_t>(taken.size()), a.experts(), k);
  for (index_t i = 0; i < out.choices(); ++i) {
    const index_t from = taken[static_cast<std::size_t>(i / k)] * k + i % k;
    out.ids()[static_cast<std::size_t>(i)] = a.ids()[static_cast<std::size_t>(from)];
    out.weights()[static_cast<std::size_t>(i)] = a.weights()[static_cast<std::size_t>(from)];
    out.kept_to_change()[static_cast<std::size_t>(i)] = a.kept(from);
  }
  return out;
}

std::vector<std::uint8_t> some_masked(index_t tokens) {
  std::vector<std::uint8_t> mask;
  for (index_t t = 0; t < tokens; ++t) mask.push_back(t % 4 != 1 && t != 0 && t + 1 != tokens);
  return mask;
}

}  // namespace

TEST_CASE("to every meter of choices masked tokens are not there") {
  test::random rng(1);
  for (const drop_stage drops : {drop_stage::before_drop, drop_stage::after_drop})
    for (const count_basis basis : {count_basis::all_choices, count_basis::first_choice}) {
      assignment a = test::fixed_choices(rng, 50, experts, k, 5);
      test::drop_some(rng, a, 4);
      const auto mask = some_masked(50);
      meters masked, without;
      masked.add(a, {.basis = basis, .drops = drops, .mask = mask});
      without.add(unmasked(a, mask), {.basis = basis, .drops = drops});
      CHECK(masked.numbers() == without.numbers());
    }
}

TEST_CASE("to every meter of choices batches are one text") {
  test::random rng(2);
  assignment a = test::fixed_choices(rng, 50, experts, k, 5);
  meters one, many;
  one.add(a);
  test::for_each_part(a, {1, 0, 20, 29}, [&](const assignment& part) { many.add(part); });
  CHECK(one.numbers() == many.numbers());
}

TEST_CASE("to meters of logits masked rows are not there, wherever rows lie") {
  test::random rng(3);
  const std::vector<float> z = test::numbers(rng, 40 * experts);
  const auto mask = some_masked(40);
  std::vector<float> rest;
  for (index_t t = 0; t < 40; ++t)
    if (mask[static_cast<std::size_t>(t)] != 0)
      rest.insert(rest.end(), z.begin() + t * experts, z.begin() + (t + 1) * experts);
  const auto measure = [](test::layout& l, matrix_view<const float> rows,
                          std::span<const std::uint8_t> of) {
    committee_meter committee(2, experts);
    committee.add(1, rows, of);
    entropy_meter entropy;
    entropy.add(rows, of);
    for (index_t e = 0; e < experts; ++e) l.result(committee.contribution(1, e));
    l.result(entropy.mean());
    l.result(entropy.normalized());
    l.result(static_cast<double>(entropy.tokens()));
  };
  const auto numbers = [&](const std::vector<float>& values, std::span<const std::uint8_t> of) {
    test::layout l(test::spacing::none);
    measure(l, {values.data(), static_cast<index_t>(values.size()) / experts, experts}, of);
    return l.bytes();
  };
  CHECK(numbers(z, mask) == numbers(rest, {}));
  CHECK(test::differs_by_stride([&](test::layout& l) { measure(l, l.in(z, 40, experts), mask); }) ==
        "");
}

TEST_CASE("of several thresholds with the best F1 a segment takes the lowest") {
  // Expert 0 is always active: whatever the threshold, all windows and no others are predicted.
  // Expert 1 is active in every other token: windows of four have two each.
  assignment a;
  a.reset(12, 2, 2);
  for (std::size_t t = 0; t < 12; ++t) {
    a.ids()[2 * t] = 0;
    a.ids()[2 * t + 1] = t % 2 == 0 ? 1 : no_expert;
  }
  segment_meter m(2, 4);
  m.add(a);
  CHECK(m.windows() == 9);
  CHECK(m.of(0).threshold == 0);
  CHECK(m.of(0).size_ratio == 1.0);
  CHECK(m.of(1).threshold == 0);
  CHECK(m.of(1).size_ratio == 2.0);
}

TEST_CASE("the measures of loads by hand") {
  // Loads 1, 3, 0, 4: mean 2.
  const std::vector<std::int64_t> load{1, 3, 0, 4};
  CHECK(max_violation(std::span<const std::int64_t>(load)) == 1.0);
  CHECK(min_violation(std::span<const std::int64_t>(load)) == 1.0);
  load_meter m(4);
  m.add_counts(load);
  m.add_counts(std::vector<std::int64_t>{2, 2, 2, 2});
  m.add_counts(std::vector<std::int64_t>{0, 0, 0, 0});  // no choices: no batch
  CHECK(m.batches() == 2);
  CHECK(m.batch_max_violation() == 0.5);
  CHECK(m.batch_min_violation() == 0.5);
  CHECK(m.global_max_violation() == 0.5);  // 3, 5, 2, 6: mean 4
  CHECK(m.global_min_violation() == 0.5);
}
