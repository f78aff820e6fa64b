// What holds for every meter: masked tokens are not there, batches join, dropped choices count as
// the options say, and rows of logits may lie anywhere.
#include <moeroute/metrics/load.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/metrics/agreement.hpp>
#include <moeroute/metrics/cache.hpp>
#include <moeroute/metrics/co_activation.hpp>
#include <moeroute/metrics/committee.hpp>
#include <moeroute/metrics/drops.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/saliency.hpp>
#include <moeroute/metrics/saturation.hpp>
#include <moeroute/metrics/segment.hpp>
#include <moeroute/metrics/sparsity.hpp>
#include <moeroute/metrics/specialisation.hpp>
#include <moeroute/stage/plan.hpp>
#include <set>
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"
#include "support/split.hpp"
#include "support/strided.hpp"

namespace every_meter_test {

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

TEST_CASE("meters of two routings say what their sets of experts say, whatever the form") {
  test::random rng(87);
  for (index_t round = 0; round < test::sized(150, 40); ++round) {
    const index_t tokens = rng.below(6), checkpoints = 2 + rng.below(4);
    saturation_meter all;
    fluctuation_meter moves;
    double shared = 0.0;
    std::int64_t seen = 0;
    std::vector<assignment> text;
    std::vector<std::vector<expert_id>> first(static_cast<std::size_t>(tokens));
    for (index_t c = 0; c < checkpoints; ++c) {
      const bool ragged = rng.below(2) == 0;
      text.push_back(ragged ? test::ragged_choices(rng, tokens, 5, 3)
                            : test::fixed_choices(rng, tokens, 5, 2, 4));
      const assignment& now = text.back();
      moves.add(now);
      for (index_t t = 0; t < tokens; ++t)
        first[static_cast<std::size_t>(t)].push_back(now.count(t) == 0 ? no_expert : now.ids(t)[0]);
      if (c == 0) continue;
      const assignment& before = text[text.size() - 2];
      all.add(before, now);
      const disagreement between = selection_disagreement(before, now);
      index_t choices = 0, gone = 0, differing = 0;
      for (index_t t = 0; t < tokens; ++t) {
        const auto set = [&](const assignment& a) {
          std::set<expert_id> used(a.ids(t).begin(), a.ids(t).end());
          used.erase(no_expert);
          return used;
        };
        const std::set<expert_id> mine = set(before), other = set(now);
        index_t both = 0;
        for (const expert_id e : mine) both += other.contains(e);
        const auto own = static_cast<index_t>(mine.size());
        choices += own;
        gone += own - both;
        differing += mine != other;
        if (own == 0) continue;
        ++seen;
        shared += static_cast<double>(both) / static_cast<double>(own);
      }
      const auto rate = [](index_t part, index_t of) {
        return of == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(of);
      };
      CHECK((between.tokens == tokens && between.choices == choices &&
             between.differing_choices == gone && between.differing_tokens == differing));
      CHECK(between.token_rate() == rate(differing, tokens));
      CHECK(between.choice_rate() == rate(gone, choices));
    }
    INFO("round " << round << " tokens " << tokens);
    CHECK(all.tokens() == seen);
    CHECK(test::near(all.saturation(), seen == 0 ? 0.0 : shared / static_cast<double>(seen)));
    CHECK(test::near(all.change(), seen == 0 ? 0.0 : 1.0 - shared / static_cast<double>(seen)));
    CHECK(moves.checkpoints() == checkpoints);
    for (index_t n = 1; n <= checkpoints; ++n) {
      double late = 0.0;
      for (const auto& path : first) {
        bool moved = false;
        for (std::size_t c = static_cast<std::size_t>(n - 1); c < path.size(); ++c)
          moved = moved || path[c] != path.back();
        late += moved;
      }
      CHECK(test::near(moves.still_changing_after(n),
                       tokens == 0 ? 0.0 : late / static_cast<double>(tokens)));
    }
  }
}

TEST_CASE("each of two routings is checked before it is read") {
  const auto with = [](std::int32_t middle) {
    assignment a;
    a.reset_ragged(2, experts, 3);
    const auto fill = a.to_fill();
    std::fill_n(fill.ids, 6, 0);
    const std::int32_t offsets[] = {0, middle, 2};
    std::copy_n(offsets, 3, fill.offsets);
    a.close();
    return a;
  };
  const assignment whole = with(1), broken = with(3);
  const std::string after =
      ": token 1 has the choices from 3 to 2, expected 0 to k = 3 of them, from 0 on";
  for (const bool first : {true, false}) {
    const assignment &a = first ? broken : whole, &b = first ? whole : broken;
    CHECK(test::refusal([&] { selection_disagreement(a, b); }) ==
          "moeroute::selection_disagreement" + after);
    CHECK(test::refusal([&] { saturation_meter{}.add(a, b); }) ==
          "moeroute::saturation_meter" + after);
  }
}

TEST_CASE("what experts contribute is what plain loops add up, of those that serve a token") {
  test::random rng(89);
  for (index_t round = 0; round < test::sized(40, 10); ++round) {
    saliency_meter meter(experts), other(experts);
    std::vector<double> expected(4 * experts, 0.0);
    for (int batch = 0; batch < 3; ++batch) {
      const index_t tokens = rng.below(9), width = 1 + rng.below(20);
      assignment a = test::fixed_choices(rng, tokens, experts, k, 4);
      test::drop_some(rng, a, 4);
      dispatch_plan p;
      plan(a, p);
      const std::vector<float> out = test::numbers(rng, p.slots() * width);
      const matrix_view<const float> rows(out.data(), p.slots(), width);
      (batch == 1 ? other : meter).add(p, a, rows);
      for (index_t c = 0; c < a.choices(); ++c) {
        const slot_id slot = p.slot_of_choice()[static_cast<std::size_t>(c)];
        if (slot == no_slot) continue;
        double square = 0.0;
        for (index_t i = 0; i < width; ++i)
          square += static_cast<double>(rows(slot, i)) * static_cast<double>(rows(slot, i));
        double* const of = expected.data() + 4 * a.ids()[static_cast<std::size_t>(c)];
        const auto g = static_cast<double>(a.weights()[static_cast<std::size_t>(c)]);
        of[0] += 1.0;
        of[1] += g;
        of[2] += std::sqrt(square);
        of[3] += g * std::sqrt(square);
      }
    }
    meter.merge(other);
    std::vector<double> seen;
    for (index_t e = 0; e < experts; ++e) {
      const auto n = static_cast<double>(meter.tokens(e)), some = n == 0.0 ? 1.0 : n;
      seen.insert(seen.end(), {n, meter.mean_weight(e) * some, meter.mean_length(e) * some,
                               meter.weighted_length(e)});
      CHECK(test::near(meter.reap(e) * some, meter.weighted_length(e)));
    }
    CHECK(test::difference(seen, expected, 1e-5, 1e-6) == "");
  }
}

TEST_CASE("a meter of contributions refuses by name what is not of one call") {
  test::random rng(91);
  const assignment a = test::fixed_choices(rng, 4, experts, k),
                   fewer = test::fixed_choices(rng, 3, experts, k);
  assignment wild = a;
  dispatch_plan p;
  plan(a, p);
  const std::vector<float> out(static_cast<std::size_t>(p.slots() * 3), 1.0f);
  const matrix_view<const float> rows(out.data(), p.slots(), 3);
  saliency_meter meter(experts);
  const float z[] = {0, 1, 2};
  const auto least = [&](double mass, double share) {
    return [&z, mass, share] { least_experts({z, 1, 3}, mass, share); };
  };
  const test::refusals all{
      {[] { saliency_meter(0); }, "saliency_meter: experts is 0, expected 1 to 1048576"},
      {[] { saliency_meter(1048577); },
       "saliency_meter: experts is 1048577, expected 1 to 1048576"},
      {[&] { saliency_meter(6).add(p, a, rows); },
       "saliency_meter: plan.experts() is 7, expected 6"},
      {[&] { meter.add(p, fewer, rows); }, "saliency_meter: choices.choices() is 6, expected 8"},
      {[&] { meter.add(p, a, rows.middle_rows(0, 2)); },
       "saliency_meter: out.rows is 2, expected 8"},
      {[&] { meter.add(p, a, {out.data(), p.slots(), 3, 2}); },
       "saliency_meter: out.stride is 2, expected at least 3"},
      {[&] {
         wild.ids()[0] = 7;
         meter.add(p, wild, rows);
       },
       "saliency_meter: expert is 7, expected 0 to 6"},
      {[&] {
         wild.ids()[0] = no_expert;
         meter.add(p, wild, rows);
       },
       "saliency_meter: expert is -1, expected 0 to 6"},
      {[&] { meter.merge(saliency_meter(6)); }, "saliency_meter: experts is 6, expected 7"},
      {[&] { (void)meter.tokens(7); }, "saliency_meter: expert is 7, expected 0 to 6"},
      {[&] { (void)meter.reap(-1); }, "saliency_meter: expert is -1, expected 0 to 6"},
      {[&] { least_experts({z, 2, 2, 1}, 0.5, 0.5); },
       "least_experts: logits.stride is 1, expected at least 2"},
      {least(0.0, 0.5), "least_experts: mass is 0.000000, expected above 0, at most 1"},
      {least(-0.5, 0.5), "least_experts: mass is -0.500000, expected above 0, at most 1"},
      {least(1.000001, 0.5), "least_experts: mass is 1.000001, expected above 0, at most 1"},
      {least(std::nan(""), 0.5), "least_experts: mass is nan, expected above 0, at most 1"},
      {least(0.5, 0.0), "least_experts: share is 0.000000, expected above 0, at most 1"},
      {least(0.5, 1.000001), "least_experts: share is 1.000001, expected above 0, at most 1"},
      {least(0.5, std::nan("")), "least_experts: share is nan, expected above 0, at most 1"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK((meter.tokens(0) == 0 && saliency_meter(1048576).experts() == 1048576));
}

TEST_CASE("the least number of experts is that of sorted probabilities, of any shape") {
  test::random rng(93);
  for (index_t round = 0; round < test::sized(100, 30); ++round) {
    const index_t tokens = rng.below(12), count = 1 + rng.below(20);
    const std::vector<float> z = test::numbers(rng, tokens * count);
    const double mass = 0.05 + 0.9 * static_cast<double>(rng.uniform());
    const double share = 0.01 + 0.99 * static_cast<double>(rng.uniform());
    std::vector<index_t> each;
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<double> p;
      double total = 0.0, sum = 0.0;
      for (index_t e = 0; e < count; ++e)
        p.push_back(std::exp(static_cast<double>(z[static_cast<std::size_t>(t * count + e)])));
      for (const double x : p) total += x;
      std::sort(p.rbegin(), p.rend());
      index_t n = 0;
      while (sum < mass * total) sum += p[static_cast<std::size_t>(n++)];
      each.push_back(n);
    }
    std::sort(each.begin(), each.end());
    index_t expected = 1;
    while (static_cast<double>(std::upper_bound(each.begin(), each.end(), expected) -
                               each.begin()) < share * static_cast<double>(tokens))
      ++expected;
    INFO("round " << round << " T=" << tokens << " E=" << count << " mass " << mass);
    CHECK(least_experts({z.data(), tokens, count}, mass, share) == expected);
  }
  // Nothing but NaN needs nobody, and one is the least; a float sum of many is off by more than a
  // millionth, and may be above what they add up to.
  const std::vector<float> nothing(5, std::nanf(""));
  CHECK(least_experts({nothing.data(), 1, 5}, 1.0, 1.0) == 1);
  for (const double rest : {0.9e-6, 1.1e-6}) {
    const float pair[] = {static_cast<float>(std::log(rest)), 0.0f};
    CHECK(least_experts({pair, 1, 2}, 1.0, 1.0) == (rest < 1e-6 ? 1 : 2));
  }
  constexpr index_t many = 1 << 16;
  index_t whole = 0;
  for (const float level : {-0.7f, -1.0f, -1.1f, -1.3f, -1.7f, -2.0f, -2.2f, -2.6f}) {
    std::vector<float> row(many, level);
    row[0] = 0.0f;
    const index_t needed = least_experts({row.data(), 1, many}, 1.0, 1.0);
    whole += needed == many;
    CHECK(needed <= many);
  }
  CHECK(whole > 0);
}

TEST_CASE("meters say of fractional loads and of single choices what they say of others") {
  const std::vector<double> load{0.125, 0.25, 0.0, 0.125};  // a mean of an eighth
  const std::span<const double> n(load);
  CHECK(mean_load(n) == 0.125);
  CHECK(max_violation(n) == 1.0);
  CHECK(min_violation(n) == 1.0);
  CHECK(balancedness(n) == 0.5);
  CHECK(test::near(load_cv(n), std::sqrt(0.5)));
  CHECK(test::near(jain_index(n), 1.0 / 1.5));
  CHECK(test::near(gini(n), 0.375));
  CHECK(test::near(load_entropy(n), 1.5 * std::log(2.0)));
  CHECK(test::near(load_kl_to_uniform(n), 0.5 * std::log(2.0)));
  const std::vector<int> two{1, 3};
  CHECK(test::near(load_cv(std::span<const int>(two), spread::sample), std::sqrt(0.5)));
  CHECK(
      test::near(normalized_load_entropy(std::span<const int>(two)), 2.0 - 0.75 * std::log2(3.0)));
  entropy_meter pair;
  const float z[] = {0.0f, std::log(3.0f)};
  pair.add({z, 1, 2});
  CHECK(std::abs(pair.normalized() - (2.0 - 0.75 * std::log2(3.0))) < 1e-6);

  assignment one;
  one.reset(1, 3, 1);
  one.ids()[0] = 2;
  segment_meter segment(3, 1);
  segment.add(one);
  CHECK((segment.of(2).f1 == 1.0 && segment.all().f1 == 1.0));
  specialisation_meter domain(1, 3);
  domain.add(0, one);
  CHECK((domain.share(0, 2) == 1.0 && domain.share(0, 0) == 0.0));
  expert_trace trace(3);
  trace.add(one);
  const std::vector<std::int32_t> pins{2};
  CHECK(simulate_cache(trace, {.pinned = pins}).hit_rate() == 1.0);
  CHECK(simulate_cache(trace, {}).hit_rate() == 0.0);
  const cache_options cache;
  CHECK((cache.policy == cache_policy::lru && cache.capacity == 1 && cache.window == 16 &&
         cache.cold == cold_misses::counted && cache.decay == 1.0));
  CHECK((committee_options{}.k == 1 && committee_options{}.presence == 0.8));
}

TEST_CASE("the entropy of a token reads as many logits as there are") {
  test::guarded<float> memory(130);
  test::random rng(95);
  for (index_t n = 0; n <= 130; ++n) {
    const std::vector<float> z = test::numbers(rng, n);
    for (const auto end : {test::guarded_end::front, test::guarded_end::back}) {
      float* const at = memory.window(n, end);
      std::copy(z.begin(), z.end(), at);
      REQUIRE(token_entropy({at, static_cast<std::size_t>(n)}) == token_entropy(z));
    }
  }
}

}  // namespace every_meter_test
