#include <moeroute/metrics/segment.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/metrics/committee.hpp>
#include <moeroute/metrics/saturation.hpp>
#include <moeroute/metrics/sparsity.hpp>
#include <moeroute/metrics/specialisation.hpp>
#include <vector>

#include "support/assignments.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/split.hpp"

using namespace moeroute;
using test::near;

namespace {

bool uses(const assignment& a, index_t t, index_t e) {
  const auto ids = a.ids(t);
  return std::find(ids.begin(), ids.end(), static_cast<expert_id>(e)) != ids.end();
}

// The definition, window by window.
double srp(const assignment& a, index_t first, index_t last, index_t m) {
  double best = 0;
  for (index_t threshold = 0; threshold <= m; ++threshold) {
    double matches = 0, predicted = 0, active = 0;
    for (index_t e = first; e < last; ++e)
      for (index_t w = 0; w + m <= a.tokens(); ++w) {
        index_t f = 0;
        for (index_t t = w; t < w + m; ++t) f += uses(a, t, e);
        active += static_cast<double>(f);
        if (f < threshold) continue;
        matches += static_cast<double>(f);
        predicted += static_cast<double>(m);
      }
    if (active > 0) best = std::max(best, 2 * matches / (predicted + active));
  }
  return best;
}

}  // namespace

TEST_CASE("segment performance is its definition, for an expert, for all, and fed in batches") {
  test::random rng(1);
  const assignment a = test::fixed_choices(rng, 83, 7, 2, 0, 1.0);
  for (const index_t m : {1, 4, 16, 83}) {
    segment_meter one(7, m), many(7, m);
    one.add(a);
    test::for_each_part(a, {3, 0, 30, 50}, [&](const assignment& part) { many.add(part); });
    CHECK(one.windows() == 84 - m);
    CHECK(near(one.all().f1, srp(a, 0, 7, m)));
    for (index_t e = 0; e < 7; ++e) {
      CHECK(near(one.of(e).f1, srp(a, e, e + 1, m)));
      CHECK(one.of(e).f1 == many.of(e).f1);
    }
    CHECK(many.all().threshold == one.all().threshold);
  }
}

TEST_CASE("always active scores 1, never active 0, and windows of one token 1") {
  assignment a;
  a.reset(20, 3, 2);
  for (std::size_t t = 0; t < 20; ++t) {
    a.ids()[2 * t] = 0;
    a.ids()[2 * t + 1] = t % 2 == 0 ? 1 : no_expert;
  }
  segment_meter four(3, 4), single(3, 1), longer(3, 21);
  four.add(a);
  single.add(a);
  longer.add(a);
  CHECK(four.of(0).f1 == 1);
  CHECK(four.of(2).f1 == 0);
  CHECK(single.of(1).f1 == 1);
  CHECK(near(four.of(1).f1, 2.0 / 3));
  CHECK(longer.windows() == 0);
  CHECK(longer.all().f1 == 0);
  CHECK(test::refusal([] { segment_meter(3, 0); }) ==
        "moeroute::segment_meter: window is 0, expected 1 to 65536");
}

TEST_CASE("chunks of one token have the token's sparsity; longer ones never more; batches join") {
  test::random rng(2);
  const assignment a = test::fixed_choices(rng, 64, 10, 2, 5);
  double last = 1;
  // The first five divide the text; what the others leave over is no chunk.
  for (const index_t length : {1, 2, 4, 8, 64, 5, 40, 63, 65}) {
    const index_t chunks = 64 / length;
    sparsity_meter one(10, length), many(10, length);
    one.add(a);
    test::for_each_part(a, {3, 40, 21}, [&](const assignment& part) { many.add(part); });
    CHECK(one.chunk_level() == many.chunk_level());
    CHECK(one.chunks() == chunks);
    if (64 % length == 0) {
      CHECK(one.chunk_level() <= last);
      last = one.chunk_level();
    }
    if (length == 1) CHECK(one.chunk_level() == one.token_level());
    double expected = 0;
    for (index_t c = 0; c < chunks; ++c)
      for (index_t e = 0; e < 10; ++e) {
        bool any = false;
        for (index_t t = c * length; t < (c + 1) * length; ++t) any |= uses(a, t, e);
        expected += any;
      }
    const double level = chunks == 0 ? 0.0 : 1 - expected / (10.0 * static_cast<double>(chunks));
    CHECK(near(one.chunk_level(), level));
  }
  CHECK(sparsity_meter(4, 2).chunk_level() == 0);
}

TEST_CASE("saturation against itself is 1; change is what the later one lacks") {
  test::random rng(3);
  const assignment a = test::fixed_choices(rng, 40, 6, 2), b = test::fixed_choices(rng, 40, 6, 2);
  saturation_meter self, other, back;
  self.add(a, a);
  other.add(a, b);
  back.add(b, a);
  CHECK(self.saturation() == 1);
  CHECK(self.change() == 0);
  CHECK(near(other.saturation() + other.change(), 1));
  CHECK(near(other.saturation(), back.saturation()));
  CHECK(saturation_meter{}.saturation() == 0);
  // Half of the first token's, none of the second's; the third chose nothing and is no token.
  assignment early, late;
  early.reset(3, 6, 2);
  late.reset(3, 6, 2);
  const expert_id then[] = {0, 1, 2, 3, no_expert, no_expert}, now[] = {4, 0, 0, 1, 0, 1};
  std::copy(then, then + 6, early.ids().begin());
  std::copy(now, now + 6, late.ids().begin());
  saturation_meter hand;
  hand.add(early, late);
  CHECK(hand.tokens() == 2);
  CHECK(hand.saturation() == 0.25);
  CHECK(hand.change() == 0.75);
  CHECK(test::refusal([&] { self.add(a, assignment{}); }) ==
        "moeroute::saturation_meter: later.tokens is 0, expected 40");
}

TEST_CASE("fluctuation: the last checkpoint with another target, never rising, 0 at the end") {
  fluctuation_meter m;
  const expert_id targets[4][3] = {{0, 0, 0}, {0, 1, 1}, {0, 1, 0}, {0, 1, 2}};
  for (const auto& row : targets) {
    // Second choices may change as they like.
    assignment a;
    a.reset(3, 4, 2);
    for (std::size_t t = 0; t < 3; ++t) {
      a.ids()[2 * t] = row[t];
      a.ids()[2 * t + 1] = static_cast<expert_id>(3 - m.checkpoints() % 2 * 3);
      if (a.ids()[2 * t + 1] == row[t]) a.ids()[2 * t + 1] = no_expert;
    }
    m.add(a);
  }
  CHECK(near(m.still_changing_after(1), 2.0 / 3));
  CHECK(near(m.still_changing_after(2), 1.0 / 3));
  CHECK(near(m.still_changing_after(3), 1.0 / 3));
  CHECK(m.still_changing_after(4) == 0);
  CHECK(test::refusal([&] { (void)m.still_changing_after(5); }) ==
        "moeroute::fluctuation_meter: n is 5, expected 1 to 4");
}

TEST_CASE("domains that use the same experts do not diverge; disjoint ones do wholly") {
  specialisation_meter m(3, 4);
  const expert_id used[3][2] = {{0, 1}, {1, 0}, {2, 3}};
  for (index_t d = 0; d < 3; ++d) {
    assignment a;
    a.reset(2, 4, 1);
    std::copy(used[d], used[d] + 2, a.ids().begin());
    m.add(d, a);
  }
  CHECK(m.divergence(0, 1) == 0);
  CHECK(near(m.divergence(0, 2), 1));
  CHECK(near(m.divergence(2, 0), m.divergence(0, 2)));
  CHECK(m.kl(0, 1) == 0);
  CHECK(m.kl(0, 2) > 0);
  CHECK(std::isinf(m.kl(0, 2, 0.0)));
  CHECK(near(m.preference(2, 2), 3));
  CHECK(near(m.preference(0, 0), 1.5));
  CHECK(test::refusal([&] { m.add(3, assignment{}); }) ==
        "moeroute::specialisation_meter: domain is 3, expected 0 to 2");
}

TEST_CASE(
    "the committee is present everywhere, undominated, and does not depend on the domains' order") {
  // Expert 0 first in every domain, 1 second in most, the others by turns.
  const std::vector<std::vector<float>> logits{
      {5, 4, 3, 0, 0, 0}, {5, 4, 0, 3, 0, 0}, {5, 0, 0, 4, 3, 0}, {5, 4, 0, 0, 0, 3}};
  const auto audit = [&](const std::vector<std::size_t>& order, double presence) {
    committee_meter m(4, 6);
    for (std::size_t d = 0; d < 4; ++d)
      m.add(static_cast<index_t>(d), matrix_view<const float>(logits[order[d]].data(), 1, 6));
    return m.audit({.k = 3, .presence = presence});
  };
  const standing_committee all = audit({0, 1, 2, 3}, 0.8), some = audit({0, 1, 2, 3}, 0.75);
  CHECK(all.members == std::vector<expert_id>{0});
  // Expert 1 is a candidate now, but expert 0 beats it in mean and in variance.
  CHECK(some.members == std::vector<expert_id>{0});
  const standing_committee turned = audit({3, 1, 0, 2}, 0.8);
  CHECK(turned.members == all.members);
  CHECK(near(turned.coverage, all.coverage));
  CHECK(near(turned.jaccard, all.jaccard));
  CHECK(all.coverage > 0.5);
  CHECK(near(all.ratio, all.coverage / (1 - all.coverage) * 5));
  CHECK(all.jaccard < 1);
}

TEST_CASE("a share of the domains is as many as it says, whatever its product rounds to") {
  // The best of 7, 9 and 9 of 25 domains; none beats another in both mean and variance. In double
  // 0.28 * 25 is a hair above 7.
  committee_meter m(25, 3);
  for (index_t d = 0; d < 25; ++d) {
    float row[3] = {};
    row[d < 7 ? 0 : 1 + d % 2] = 5.0f;
    m.add(d, matrix_view<const float>(row, 1, 3));
  }
  const standing_committee everyone = m.audit({.k = 1, .presence = 0.28});
  CHECK(everyone.members == std::vector<expert_id>{0, 1, 2});
  CHECK(everyone.ratio == 0.0);  // nobody is left to compare with
  CHECK(m.audit({.k = 1, .presence = 0.3}).members == std::vector<expert_id>{1, 2});
}

TEST_CASE("a committee's figures are those of plain loops, ties among them") {
  test::random rng(10);
  constexpr index_t domains = 4, experts = 40;  // more than a sort inserts one by one
  for (int draw = 0; draw < 40; ++draw) {
    INFO(draw);
    const auto k = static_cast<index_t>(1 + rng.below(experts));
    committee_meter m(domains, experts);
    for (index_t d = 0; d < domains; ++d) {
      float row[experts];
      for (float& z : row) z = static_cast<float>(rng.below(3));  // equals in most domains
      m.add(d, matrix_view<const float>(row, 1, experts));
    }
    const standing_committee found = m.audit({.k = k, .presence = 0.5});
    // Who has more, and of equals who is lower, comes before; k + 1 is all that is behind.
    const auto rank = [&](index_t d, index_t e) {
      index_t before = 0;
      for (index_t o = 0; o < experts; ++o)
        before += m.contribution(d, o) > m.contribution(d, e) ||
                  (m.contribution(d, o) == m.contribution(d, e) && o < e);
      return std::min(before, k) + 1;
    };
    double coverage = 0.0, jaccard = 0.0;
    for (const expert_id e : found.members)
      for (index_t d = 0; d < domains; ++d) coverage += m.contribution(d, e) / domains;
    for (index_t a = 0; a < domains; ++a)
      for (index_t b = a + 1; b < domains; ++b) {
        int both = 0, either = 0;
        for (index_t e = 0; e < experts; ++e) {
          both += rank(a, e) <= k && rank(b, e) <= k;
          either += rank(a, e) <= k || rank(b, e) <= k;
        }
        jaccard += both / static_cast<double>(either) / 6.0;
      }
    CHECK(near(found.coverage, coverage));
    CHECK(near(found.jaccard, jaccard));
    // Moments in whole numbers: domains times the mean, domains squared times the variance.
    struct standing {
      index_t sum = 0, spread = 0;
      bool candidate = false;
    };
    std::vector<standing> of(experts);
    for (index_t e = 0; e < experts; ++e) {
      index_t present = 0, squares = 0;
      standing& s = of[static_cast<std::size_t>(e)];
      for (index_t d = 0; d < domains; ++d) {
        present += rank(d, e) <= k;
        s.sum += rank(d, e);
        squares += rank(d, e) * rank(d, e);
      }
      s.spread = domains * squares - s.sum * s.sum;
      s.candidate = 2 * present >= domains;
    }
    std::vector<expert_id> members;
    for (index_t e = 0; e < experts; ++e) {
      const standing& a = of[static_cast<std::size_t>(e)];
      const bool beaten = std::any_of(of.begin(), of.end(), [&](const standing& b) {
        return b.candidate && b.sum <= a.sum && b.spread <= a.spread &&
               (b.sum < a.sum || b.spread < a.spread);
      });
      if (a.candidate && !beaten) members.push_back(static_cast<expert_id>(e));
    }
    CHECK(found.members == members);
  }
  const standing_committee alone = committee_meter(1, 1).audit({});
  CHECK(alone.coverage == 1.0);
  CHECK(alone.ratio == 0.0);
}

TEST_CASE("the committee fed in batches is one shot's; rows without a logit do not count") {
  test::random rng(8);
  std::vector<float> z(30 * 5);
  for (float& x : z) x = rng.normal();
  const matrix_view<const float> rows(z.data(), 30, 5);
  committee_meter one(1, 5), many(1, 5);
  one.add(0, rows);
  many.add(0, rows.middle_rows(0, 11));
  many.add(0, rows.middle_rows(11, 19));
  const std::vector<float> nothing(5, -HUGE_VALF);
  many.add(0, matrix_view<const float>(nothing.data(), 1, 5));
  for (index_t e = 0; e < 5; ++e) CHECK(near(one.contribution(0, e), many.contribution(0, e)));
  const standing_committee c = committee_meter(2, 5).audit({.k = 5});
  CHECK(c.jaccard == 1);
  CHECK(test::refusal([&] { one.add(0, matrix_view<const float>(z.data(), 1, 4)); }) ==
        "moeroute::committee_meter: logits.cols is 4, expected 5");
  for (const index_t domain : {-1, 1})
    CHECK(test::refusal([&] { one.add(domain, rows); }) ==
          "moeroute::committee_meter: domain is " + std::to_string(domain) + ", expected 0 to 0");
}

TEST_CASE("of equal contributions the lower expert is the better one") {
  const std::vector<float> even(6, 1.0f);
  committee_meter meter(1, 3);
  meter.add(0, matrix_view<const float>(even.data(), 2, 3));
  CHECK(meter.audit({.k = 1}).members == std::vector<expert_id>{0});
  CHECK(meter.audit({.k = 2}).members == std::vector<expert_id>{0});
}

TEST_CASE("meters of text, of domains and of checkpoints refuse by name what does not fit") {
  test::random rng(9);
  const assignment a = test::fixed_choices(rng, 6, 7, 2), b = test::fixed_choices(rng, 6, 8, 2),
                   fewer = test::fixed_choices(rng, 5, 7, 2);
  const std::vector<float> z(18);
  const std::vector<std::uint8_t> short_mask(5, 1);
  constexpr index_t beyond = max_experts + 1, longest = index_t{1} << 40;
  committee_meter committee(2, 3);
  specialisation_meter domains(2, 7);
  fluctuation_meter checkpoints;
  checkpoints.add(a);
  const auto audited = [&](const committee_options& o) {
    return [&committee, o] { committee.audit(o); };
  };
  const test::refusals all{
      {[] { committee_meter(0, 3); }, "committee_meter: domains is 0, expected 1 to 65536"},
      {[] { committee_meter(65537, 1); }, "committee_meter: domains is 65537, expected 1 to 65536"},
      {[] { committee_meter(1, 0); }, "committee_meter: experts is 0, expected 1 to 1048576"},
      {[] { committee_meter(1, beyond); },
       "committee_meter: experts is 1048577, expected 1 to 1048576"},
      {[&] { committee.add(0, {z.data(), 6, 3}, short_mask); },
       "committee_meter: mask.size() is 5, expected 6"},
      {[&] { committee.add(0, {z.data(), 6, 3, 2}); },
       "committee_meter: logits.stride is 2, expected at least 3"},
      {[&] { (void)committee.contribution(2, 0); },
       "committee_meter: domain is 2, expected 0 to 1"},
      {[&] { (void)committee.contribution(-1, 0); },
       "committee_meter: domain is -1, expected 0 to 1"},
      {[&] { (void)committee.contribution(0, 3); },
       "committee_meter: expert is 3, expected 0 to 2"},
      {[&] { (void)committee.contribution(0, -1); },
       "committee_meter: expert is -1, expected 0 to 2"},
      {audited({.k = 0}), "committee_meter: k is 0, expected 1 to 3"},
      {audited({.k = 4}), "committee_meter: k is 4, expected 1 to 3"},
      {audited({.presence = -0.1}), "committee_meter: presence is outside 0 to 1"},
      {audited({.presence = 1.1}), "committee_meter: presence is outside 0 to 1"},
      {audited({.presence = std::nan("")}), "committee_meter: presence is outside 0 to 1"},
      {[&] { saturation_meter{}.add(a, b); }, "saturation_meter: later.experts is 8, expected 7"},
      {[&] { checkpoints.add(fewer); }, "fluctuation_meter: tokens is 5, expected 6"},
      {[&] { (void)checkpoints.still_changing_after(0); },
       "fluctuation_meter: n is 0, expected 1 to 1"},
      {[] { segment_meter(0, 1); }, "segment_meter: experts is 0, expected 1 to 1048576"},
      {[] { segment_meter(beyond, 1); },
       "segment_meter: experts is 1048577, expected 1 to 1048576"},
      {[] { segment_meter(1, 65537); }, "segment_meter: window is 65537, expected 1 to 65536"},
      {[&] { segment_meter(7, 1).add(b); }, "segment_meter: experts is 8, expected 7"},
      {[] { (void)segment_meter(7, 1).of(7); }, "segment_meter: expert is 7, expected 0 to 6"},
      {[] { (void)segment_meter(7, 1).of(-1); }, "segment_meter: expert is -1, expected 0 to 6"},
      {[] { sparsity_meter(0, 1); }, "sparsity_meter: experts is 0, expected 1 to 1048576"},
      {[] { sparsity_meter(beyond, 1); },
       "sparsity_meter: experts is 1048577, expected 1 to 1048576"},
      {[] { sparsity_meter(1, 0); }, "sparsity_meter: length is 0, expected 1 to 1099511627776"},
      {[] { sparsity_meter(1, longest + 1); },
       "sparsity_meter: length is 1099511627777, expected 1 to 1099511627776"},
      {[&] { sparsity_meter(7, 1).add(b); }, "sparsity_meter: experts is 8, expected 7"},
      {[&] { segment_meter(7, 1).add(a, {.mask = short_mask}); },
       "segment_meter: mask.size is 5, expected 6"},
      {[&] { sparsity_meter(7, 1).add(a, {.mask = short_mask}); },
       "sparsity_meter: mask.size is 5, expected 6"},
      {[] { specialisation_meter(0, 1); },
       "specialisation_meter: domains is 0, expected 1 to 65536"},
      {[] { specialisation_meter(65537, 1); },
       "specialisation_meter: domains is 65537, expected 1 to 65536"},
      {[] { specialisation_meter(1, beyond); },
       "specialisation_meter: experts is 1048577, expected 1 to 1048576"},
      {[] { specialisation_meter(1, 0); },
       "specialisation_meter: experts is 0, expected 1 to 1048576"},
      {[&] { domains.add(-1, a); }, "specialisation_meter: domain is -1, expected 0 to 1"},
      {[&] { domains.add(0, b); }, "specialisation_meter: experts is 8, expected 7"},
      {[&] { (void)domains.counts(2); }, "specialisation_meter: domain is 2, expected 0 to 1"},
      {[&] { (void)domains.counts(-1); }, "specialisation_meter: domain is -1, expected 0 to 1"},
      {[&] { (void)domains.share(-1, 0); }, "specialisation_meter: domain is -1, expected 0 to 1"},
      {[&] { (void)domains.kl(0, 2); }, "specialisation_meter: domain is 2, expected 0 to 1"},
      {[&] { (void)domains.share(0, 7); }, "specialisation_meter: expert is 7, expected 0 to 6"},
      {[&] { (void)domains.preference(-1, 0); },
       "specialisation_meter: expert is -1, expected 0 to 6"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  // The ends themselves are taken.
  CHECK(test::refusal([] {
          committee_meter(65536, 1);
          committee_meter(1, max_experts);
          segment_meter(max_experts, 1);
          segment_meter(1, 65536);
          sparsity_meter(max_experts, longest);
          specialisation_meter(65536, 1);
          specialisation_meter(1, max_experts);
        }) == "accepted");
  CHECK((committee.domains() == 2 && committee.experts() == 3));
  CHECK((domains.domains() == 2 && domains.experts() == 7));
  CHECK(committee.audit({.k = 3, .presence = 0.0}).members == std::vector<expert_id>{0});
  CHECK(committee.audit({.k = 3, .presence = 1.0}).members == std::vector<expert_id>{0});
}

TEST_CASE("shares of a domain, smoothed or not, and what differs between two, by hand") {
  specialisation_meter m(3, 4);
  const auto used = [&](index_t domain, const std::vector<expert_id>& ids) {
    assignment a;
    a.reset(static_cast<index_t>(ids.size()), 4, 1);
    std::copy(ids.begin(), ids.end(), a.ids().begin());
    m.add(domain, a);
  };
  used(0, {0, 0, 0, 1});
  used(1, {1, 1});
  used(0, {2, 2});  // a domain comes again
  CHECK(m.counts(0)[0] == 3);
  CHECK(m.counts(0)[2] == 2);
  CHECK(m.counts(2)[0] == 0);
  CHECK(near(m.share(0, 0), 0.5));
  CHECK(near(m.share(0, 0, 0.5), 3.5 / 8));
  CHECK(near(m.share(0, 3, 0.5), 0.5 / 8));
  CHECK(m.share(2, 3) == 0.25);  // even where nothing was seen
  CHECK(near(m.kl(0, 2, 0.0), 0.5 * std::log(2.0) + std::log(2.0 / 3) / 6 + std::log(4.0 / 3) / 3));
  const double p[] = {3.5 / 8, 1.5 / 8, 2.5 / 8, 0.5 / 8},
               q[] = {1.0 / 8, 5.0 / 8, 1.0 / 8, 1.0 / 8};
  double divergence = 0;
  for (int e = 0; e < 4; ++e) divergence += p[e] * std::log(p[e] / q[e]);
  CHECK(near(m.kl(0, 1), divergence));
  CHECK(near(m.divergence(0, 1), (0.5 * std::log(2.0) + std::log((1.0 / 6) / (7.0 / 12)) / 6 +
                                  std::log(2.0) / 3 + std::log(12.0 / 7)) /
                                     (2 * std::log(2.0))));
  CHECK(near(m.preference(0, 0), 3 * 0.5 / 0.75));
  specialisation_meter one(1, 2);
  one.add(0, [] {
    assignment a;
    a.reset(1, 2, 1);
    a.ids()[0] = 0;
    return a;
  }());
  CHECK(one.preference(0, 0) == 1.0);
  CHECK(one.preference(1, 0) == 0.0);
}
