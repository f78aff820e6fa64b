// What holds for every meter: masked tokens are not there, batches join, dropped choices count as
// the options say, and rows of logits may lie anywhere.
#include <moeroute/metrics/load.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
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
#include "support/compare.hpp"
#include "support/sized.hpp"
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

TEST_CASE("with every option at once meters of choices say what plain loops say") {
  test::random rng(79);
  for (index_t round = 0; round < test::sized(150, 40); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const count_basis basis = coin() ? count_basis::all_choices : count_basis::first_choice;
    const drop_stage drops = coin() ? drop_stage::before_drop : drop_stage::after_drop;
    meters seen;
    load_meter load(experts);
    drop_meter tenths;
    // The tokens of all batches that are there: the experts that count.
    std::vector<std::vector<expert_id>> text;
    std::vector<double> most, least;
    std::int64_t choices = 0, dropped = 0, missing = 0, lost = 0;
    std::int64_t made_at[10] = {}, dropped_at[10] = {};
    for (std::int64_t batch = rng.below(4); batch > 0; --batch) {
      const index_t tokens = rng.below(26);
      assignment a = coin() ? test::ragged_choices(rng, tokens, experts, 3)
                            : test::fixed_choices(rng, tokens, experts, k, 4);
      test::drop_some(rng, a, 3);
      std::vector<std::uint8_t> mask;
      for (index_t t = 0; t < tokens; ++t)
        mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      count_options what{.basis = basis, .drops = drops};
      if (coin()) what.mask = mask;
      seen.add(a, what);
      load.add(a, what);
      tenths.add(a, what.mask);
      std::vector<double> here(experts, 0.0);
      double all = 0.0;
      for (index_t t = 0; t < tokens; ++t) {
        if (!what.mask.empty() && mask[static_cast<std::size_t>(t)] == 0) continue;
        std::vector<expert_id> counted;
        std::int64_t made = 0, kept = 0;
        for (index_t r = 0; r < a.count(t); ++r) {
          const expert_id e = a.ids(t)[static_cast<std::size_t>(r)];
          const bool stays = a.kept(a.first(t) + r);
          missing += e == no_expert;
          if (e == no_expert) continue;
          ++made;
          kept += stays;
          if (basis == count_basis::first_choice && r > 0) continue;
          if (drops == drop_stage::after_drop && !stays) continue;
          counted.push_back(e);
          here[static_cast<std::size_t>(e)] += 1.0;
          all += 1.0;
        }
        choices += made;
        dropped += made - kept;
        made_at[10 * t / tokens] += made;
        dropped_at[10 * t / tokens] += made - kept;
        lost += made > 0 && kept == 0;
        text.push_back(counted);
      }
      if (all == 0.0) continue;
      most.push_back(*std::max_element(here.begin(), here.end()) * experts / all - 1.0);
      least.push_back(1.0 - *std::min_element(here.begin(), here.end()) * experts / all);
    }
    const auto uses = [&](std::size_t t, index_t e) {
      return std::find(text[t].begin(), text[t].end(), static_cast<expert_id>(e)) != text[t].end();
    };
    const auto n = static_cast<index_t>(text.size());
    std::vector<double> expected;
    for (index_t e = 0; e < experts; ++e) {
      expected.push_back(0.0);
      for (std::size_t t = 0; t < text.size(); ++t) expected.back() += uses(t, e);
    }
    for (index_t i = 0; i < experts; ++i)
      for (index_t j = 0; j < experts; ++j) {
        expected.push_back(0.0);
        for (std::size_t t = 0; t < text.size(); ++t) expected.back() += uses(t, i) && uses(t, j);
      }
    const std::vector<double> loads(expected.begin(), expected.begin() + experts);
    expected.insert(expected.end(), experts, 0.0);
    expected.insert(expected.end(), loads.begin(), loads.end());
    double used = 0.0, active = 0.0;
    for (const double x : loads) used += x;
    const index_t chunks = n / 3;
    for (index_t c = 0; c < chunks; ++c)
      for (index_t e = 0; e < experts; ++e) {
        const auto t = static_cast<std::size_t>(3 * c);
        active += uses(t, e) || uses(t + 1, e) || uses(t + 2, e);
      }
    const auto unused = [&](double x, index_t places) {
      return places == 0 ? 0.0 : 1.0 - x / static_cast<double>(places * experts);
    };
    expected.insert(expected.end(), {static_cast<double>(n), static_cast<double>(chunks),
                                     unused(used, n), unused(active, chunks)});
    const index_t windows = std::max<index_t>(0, n - 3);
    expected.push_back(static_cast<double>(windows));
    // The best threshold of windows of four, the lowest of several.
    const auto segment = [&](index_t first, index_t last) {
      segment_score best;
      for (index_t a = 0; a <= 4; ++a) {
        double matches = 0.0, predicted = 0.0, there = 0.0;
        for (index_t e = first; e < last; ++e)
          for (index_t w = 0; w < windows; ++w) {
            index_t f = 0;
            for (index_t t = w; t < w + 4; ++t) f += uses(static_cast<std::size_t>(t), e);
            there += static_cast<double>(f);
            if (f < a) continue;
            matches += static_cast<double>(f);
            predicted += 4.0;
          }
        if (there == 0.0) return best;
        const double f1 = 2.0 * matches / (predicted + there);
        if (f1 > best.f1) best = {f1, a, predicted / there};
      }
      return best;
    };
    for (index_t e = 0; e < experts; ++e) {
      const segment_score s = segment(e, e + 1);
      expected.insert(expected.end(), {s.f1, static_cast<double>(s.threshold), s.size_ratio});
    }
    expected.push_back(segment(0, experts).f1);
    double with = 0.0;
    std::size_t longest = 0;
    std::vector<double> trace;
    for (const auto& token : text) {
      with += !token.empty();
      longest = std::max(longest, token.size());
      for (const expert_id e : token) trace.push_back(static_cast<double>(e));
    }
    expected.insert(expected.end(), {with, static_cast<double>(longest)});
    expected.insert(expected.end(), trace.begin(), trace.end());
    for (const std::int64_t x : {std::int64_t{n}, choices, dropped, missing, lost})
      expected.push_back(static_cast<double>(x));
    INFO("round " << round << " tokens " << n);
    CHECK(test::difference(seen.numbers(), expected, 1e-12) == "");
    const auto mean = [](const std::vector<double>& list) {
      double sum = 0.0;
      for (const double x : list) sum += x / static_cast<double>(list.size());
      return sum;
    };
    CHECK(load.batches() == static_cast<std::int64_t>(most.size()));
    CHECK(test::near(load.batch_max_violation(), mean(most)));
    CHECK(test::near(load.batch_min_violation(), mean(least)));
    for (int tenth = 0; tenth < 10; ++tenth) {
      const auto made = static_cast<double>(made_at[tenth]);
      CHECK(tenths.rate_at(tenth) ==
            (made == 0.0 ? 0.0 : static_cast<double>(dropped_at[tenth]) / made));
    }
    CHECK(tenths.rate() ==
          (choices == 0 ? 0.0 : static_cast<double>(dropped) / static_cast<double>(choices)));
  }
}

TEST_CASE("with every option at once the committee is what its definition says") {
  test::random rng(83);
  for (index_t round = 0; round < test::sized(100, 40); ++round) {
    const index_t domains = 1 + rng.below(5), count = 1 + rng.below(7);
    const committee_options o{.k = 1 + rng.below(count),
                              .presence = 0.125 * static_cast<double>(rng.below(9))};
    committee_meter meter(domains, count);
    std::vector<std::vector<double>> share;
    for (index_t d = 0; d < domains; ++d) {
      std::vector<double> sum(static_cast<std::size_t>(count), 0.0);
      double n = 0.0;
      for (std::int64_t batch = rng.below(3); batch > 0; --batch) {
        const index_t tokens = rng.below(4);
        const std::vector<float> z = test::numbers(rng, tokens * count);
        std::vector<std::uint8_t> mask;
        for (index_t t = 0; t < tokens; ++t)
          mask.push_back(static_cast<std::uint8_t>(2 * rng.below(3)));
        meter.add(d, {z.data(), tokens, count}, mask);
        for (index_t t = 0; t < tokens; ++t) {
          if (mask[static_cast<std::size_t>(t)] == 0) continue;
          double total = 0.0;
          const float* const row = z.data() + t * count;
          for (index_t e = 0; e < count; ++e) total += std::exp(static_cast<double>(row[e]));
          for (index_t e = 0; e < count; ++e)
            sum[static_cast<std::size_t>(e)] += std::exp(static_cast<double>(row[e])) / total;
          n += 1.0;
        }
      }
      for (double& x : sum) x = n > 0.0 ? x / n : 1.0 / static_cast<double>(count);
      share.push_back(sum);
    }
    const auto rank = [&](std::size_t d, std::size_t e) {
      index_t before = 0;
      for (std::size_t f = 0; f < share[d].size(); ++f)
        before += share[d][f] > share[d][e] || (share[d][f] == share[d][e] && f < e);
      return static_cast<double>(std::min(before, o.k) + 1);
    };
    const auto D = static_cast<std::size_t>(domains), E = static_cast<std::size_t>(count);
    std::vector<double> mean(E, 0.0), variance(E, 0.0), present(E, 0.0);
    for (std::size_t e = 0; e < E; ++e) {
      for (std::size_t d = 0; d < D; ++d) {
        mean[e] += rank(d, e) / static_cast<double>(domains);
        present[e] += rank(d, e) <= static_cast<double>(o.k);
      }
      for (std::size_t d = 0; d < D; ++d)
        variance[e] += (rank(d, e) - mean[e]) * (rank(d, e) - mean[e]);
      variance[e] /= static_cast<double>(domains);
    }
    const auto candidate = [&](std::size_t e) {
      return present[e] >= o.presence * static_cast<double>(domains) - 1e-9;
    };
    standing_committee expected;
    for (std::size_t e = 0; e < E; ++e) {
      bool beaten = !candidate(e);
      for (std::size_t f = 0; f < E; ++f) {
        // Equal to a hair is equal.
        const double m = mean[f] - mean[e], v = variance[f] - variance[e];
        beaten = beaten || (candidate(f) && m < 1e-9 && v < 1e-9 && (m < -1e-9 || v < -1e-9));
      }
      if (!beaten) expected.members.push_back(static_cast<expert_id>(e));
    }
    for (const auto& of : share)
      for (const expert_id e : expected.members)
        expected.coverage += of[static_cast<std::size_t>(e)] / static_cast<double>(domains);
    const auto size = static_cast<double>(expected.members.size());
    if (size > 0.0 && size < static_cast<double>(count))
      expected.ratio = (expected.coverage / (1.0 - expected.coverage)) /
                       (size / (static_cast<double>(count) - size));
    double pairs = 0.0;
    for (std::size_t a = 0; a < D; ++a)
      for (std::size_t b = a + 1; b < D; ++b) {
        double both = 0.0, either = 0.0;
        for (std::size_t e = 0; e < E; ++e) {
          const bool in_a = rank(a, e) <= static_cast<double>(o.k),
                     in_b = rank(b, e) <= static_cast<double>(o.k);
          both += in_a && in_b;
          either += in_a || in_b;
        }
        expected.jaccard += both / either;
        pairs += 1.0;
      }
    expected.jaccard = pairs > 0.0 ? expected.jaccard / pairs : 1.0;
    const standing_committee seen = meter.audit(o);
    INFO("round " << round << " D=" << domains << " E=" << count << " k=" << o.k << " presence "
                  << o.presence);
    CHECK(seen.members == expected.members);
    CHECK(std::abs(seen.coverage - expected.coverage) < 1e-5);
    CHECK(std::abs(seen.ratio - expected.ratio) < 1e-4 * (1.0 + expected.ratio));
    CHECK(test::near(seen.jaccard, expected.jaccard));
  }
}
