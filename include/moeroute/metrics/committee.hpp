// The standing committee: the few experts of a layer that serve every domain, and how much of the
// routing they hold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute {

struct committee_options {
  index_t k = 1;          ///< an expert is present in a domain where it is among its k best
  double presence = 0.8;  ///< share of domains that makes a candidate
};

struct standing_committee {
  std::vector<expert_id> members;  ///< ascending
  double coverage = 0.0;           ///< their share of the routing mass, mean over domains
  double ratio = 0.0;              ///< odds of the coverage over those of an even routing
  double jaccard = 0.0;            ///< mean over pairs of domains of their k best experts
};

/// Mean softmax per domain, fed batch by batch, and the audit of it.
///
/// Cost: add one exponential per logit; no allocation once the widest row was seen. Source:
/// CommitteeAudit (arXiv 2601.03425), stage III.
class committee_meter {
 public:
  /// Throws: error where D is outside [1, 2^16] or E outside [1, 2^20].
  committee_meter(index_t domains, index_t experts) : domains_(domains), experts_(experts) {
    check_range("committee_meter", "domains", domains, 1, index_t{1} << 16);
    check_range("committee_meter", "experts", experts, 1, max_experts);
    sum_.assign(static_cast<std::size_t>(domains * experts), 0.0);
    tokens_.assign(static_cast<std::size_t>(domains), 0);
    row_.resize(experts);
  }

  /// Shapes: logits [T, E]; mask [T] or empty. A row without a finite logit does not count. Throws:
  /// error where a size differs or the domain is outside [0, D).
  template <class A = simd::default_arch>
  void add(index_t domain, matrix_view<const float> logits,
           std::span<const std::uint8_t> mask = {}) {
    check_range("committee_meter", "domain", domain, 0, domains_ - 1);
    check_size("committee_meter", "logits.cols", logits.cols, experts_);
    check_stride("committee_meter", "logits", logits);
    if (!mask.empty())
      check_size("committee_meter", "mask.size()", static_cast<index_t>(mask.size()), logits.rows);
    double* const sum = sum_.data() + domain * experts_;
    for (index_t t = 0; t < logits.rows; ++t) {
      if (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0) continue;
      const float max = simd::row_max<A>(logits.row(t), experts_);
      if (!(max > simd::minus_infinity)) continue;
      const float total = simd::row_exp<A>(logits.row(t), experts_, max, row_.data());
      for (index_t e = 0; e < experts_; ++e) sum[e] += static_cast<double>(row_[e] / total);
      ++tokens_[static_cast<std::size_t>(domain)];
    }
  }

  /// Mean probability of the expert in the domain; even where the domain has no tokens.
  ///
  /// Throws: error where one is out of range.
  double contribution(index_t domain, index_t expert) const {
    check_range("committee_meter", "domain", domain, 0, domains_ - 1);
    check_range("committee_meter", "expert", expert, 0, experts_ - 1);
    const auto n = static_cast<double>(tokens_[static_cast<std::size_t>(domain)]);
    return n > 0.0 ? sum_[static_cast<std::size_t>(domain * experts_ + expert)] / n
                   : 1.0 / static_cast<double>(experts_);
  }

  /// Candidates are present in at least `presence` of the domains; of them stay those that no other
  /// beats in both the mean and the variance of its rank (1 the best, k + 1 outside the k best).
  ///
  /// Throws: error where k is outside [1, E] or presence outside [0, 1]. Cost: O(D E log E + E^2).
  standing_committee audit(const committee_options& options) const {
    check_range("committee_meter", "k", options.k, 1, experts_);
    if (!(options.presence >= 0.0 && options.presence <= 1.0))
      fail("committee_meter", "presence is outside 0 to 1");
    const std::vector<index_t> rank = ranks(options.k);
    struct seat {
      expert_id expert;
      double mean, variance;
    };
    std::vector<seat> candidates;
    const auto domains = static_cast<double>(domains_);
    for (index_t e = 0; e < experts_; ++e) {
      double present = 0.0, sum = 0.0, squares = 0.0;
      for (index_t d = 0; d < domains_; ++d) {
        const auto r = static_cast<double>(rank[static_cast<std::size_t>(d * experts_ + e)]);
        present += r <= static_cast<double>(options.k);
        sum += r;
        squares += r * r;
      }
      // A hair of room: 0.8 of five domains is four.
      if (present + 1e-9 < options.presence * domains) continue;
      // D times the mean and D^2 times the variance: whole numbers, so that equal ones are equal.
      candidates.push_back({static_cast<expert_id>(e), sum, squares * domains - sum * sum});
    }
    standing_committee out;
    for (const seat& a : candidates)
      if (std::none_of(candidates.begin(), candidates.end(), [&](const seat& b) {
            return b.mean <= a.mean && b.variance <= a.variance &&
                   (b.mean < a.mean || b.variance < a.variance);
          }))
        out.members.push_back(a.expert);
    measure(rank, options.k, out);
    return out;
  }

  index_t domains() const { return domains_; }
  index_t experts() const { return experts_; }

 private:
  // [D, E], 1 for the largest contribution, the lower expert first among equals, at most k + 1.
  std::vector<index_t> ranks(index_t k) const {
    std::vector<index_t> rank(sum_.size()), order(static_cast<std::size_t>(experts_));
    for (index_t d = 0; d < domains_; ++d) {
      for (index_t e = 0; e < experts_; ++e) order[static_cast<std::size_t>(e)] = e;
      std::sort(order.begin(), order.end(), [&](index_t a, index_t b) {
        const auto x = contribution(d, a), y = contribution(d, b);
        return x > y || (x == y && a < b);
      });
      for (index_t r = 0; r < experts_; ++r)
        rank[static_cast<std::size_t>(d * experts_ + order[static_cast<std::size_t>(r)])] =
            std::min(r, k) + 1;
    }
    return rank;
  }

  void measure(const std::vector<index_t>& rank, index_t k, standing_committee& out) const {
    for (index_t d = 0; d < domains_; ++d)
      for (const expert_id e : out.members)
        out.coverage += contribution(d, e) / static_cast<double>(domains_);
    const auto members = static_cast<double>(out.members.size());
    const double others = static_cast<double>(experts_) - members;
    if (members > 0.0 && others > 0.0)
      out.ratio = out.coverage / (1.0 - out.coverage) * others / members;
    double pairs = 0.0;
    for (index_t a = 0; a < domains_; ++a)
      for (index_t b = a + 1; b < domains_; ++b) {
        double both = 0.0, either = 0.0;
        for (index_t e = 0; e < experts_; ++e) {
          const bool in_a = rank[static_cast<std::size_t>(a * experts_ + e)] <= k;
          const bool in_b = rank[static_cast<std::size_t>(b * experts_ + e)] <= k;
          both += in_a && in_b;
          either += in_a || in_b;
        }
        out.jaccard += both / either;
        ++pairs;
      }
    out.jaccard = pairs > 0.0 ? out.jaccard / pairs : 1.0;
  }

  index_t domains_, experts_;
  std::vector<double> sum_;
  std::vector<std::int64_t> tokens_;
  buffer<float> row_;
};

}  // namespace moeroute
