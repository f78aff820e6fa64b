// Which experts serve which domain, and how differently domains are routed.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/expert_load.hpp>

namespace moeroute {

/// Choices per domain and expert, fed batch by batch.
///
/// Cost: add O(T k + E), no allocation; memory D E counts.
class specialisation_meter {
 public:
  /// Throws: error where D is outside [1, 2^16] or E outside [1, 2^20].
  specialisation_meter(index_t domains, index_t experts) : domains_(domains), experts_(experts) {
    check_range("specialisation_meter", "domains", domains, 1, index_t{1} << 16);
    check_range("specialisation_meter", "experts", experts, 1, max_experts);
    counts_.assign(static_cast<std::size_t>(domains * experts), 0);
    batch_.assign(static_cast<std::size_t>(experts), 0);
  }

  /// Throws: error where the domain is outside [0, D), the assignment has another number of experts
  /// or the mask another length.
  template <class A = simd::default_arch>
  void add(index_t domain, const assignment& a, const count_options& what = {}) {
    check_range("specialisation_meter", "domain", domain, 0, domains_ - 1);
    check_size("specialisation_meter", "experts", a.experts(), experts_);
    count_choices<std::int64_t, A>(a, what, std::span(batch_));
    for (index_t e = 0; e < experts_; ++e)
      counts_[at(domain, e)] += batch_[static_cast<std::size_t>(e)];
  }

  std::span<const std::int64_t> counts(index_t domain) const {
    check_range("specialisation_meter", "domain", domain, 0, domains_ - 1);
    return std::span(counts_).subspan(at(domain, 0), static_cast<std::size_t>(experts_));
  }

  /// Share of a domain's choices that go to the expert, with `smoothing` added to every count; even
  /// where there are none. Throws: error where one is out of range.
  double share(index_t domain, index_t expert, double smoothing = 0.0) const {
    check_range("specialisation_meter", "expert", expert, 0, experts_ - 1);
    double sum = 0.0;
    for (const std::int64_t n : counts(domain)) sum += static_cast<double>(n) + smoothing;
    const double own = static_cast<double>(counts_[at(domain, expert)]) + smoothing;
    return sum > 0.0 ? own / sum : 1.0 / static_cast<double>(experts_);
  }

  /// KL(domain from || domain to) of their loads, in nats. Not symmetric; infinite where `from`
  /// uses an expert that `to` never does and nothing smooths. Cost: O(E^2).
  double kl(index_t from, index_t to, double smoothing = 0.5) const {
    double sum = 0.0;
    for (index_t e = 0; e < experts_; ++e) {
      const double p = share(from, e, smoothing);
      if (p > 0.0) sum += p * std::log(p / share(to, e, smoothing));
    }
    return sum;
  }

  /// Jensen-Shannon divergence of two domains' loads over ln 2: symmetric, in [0, 1].
  double divergence(index_t a, index_t b) const {
    double sum = 0.0;
    for (index_t e = 0; e < experts_; ++e) {
      const double p = share(a, e), q = share(b, e), middle = 0.5 * (p + q);
      if (p > 0.0) sum += 0.5 * p * std::log(p / middle);
      if (q > 0.0) sum += 0.5 * q * std::log(q / middle);
    }
    return sum / std::log(2.0);
  }

  /// The domain's share over the mean of all domains' shares of the expert: 1 where it serves all
  /// alike, D where it serves this one only; 0 where it serves nobody.
  double preference(index_t expert, index_t domain) const {
    double sum = 0.0;
    for (index_t d = 0; d < domains_; ++d) sum += share(d, expert);
    return sum > 0.0 ? share(domain, expert) * static_cast<double>(domains_) / sum : 0.0;
  }

  index_t domains() const { return domains_; }
  index_t experts() const { return experts_; }

 private:
  std::size_t at(index_t domain, index_t expert) const {
    return static_cast<std::size_t>(domain * experts_ + expert);
  }

  index_t domains_, experts_;
  std::vector<std::int64_t> counts_, batch_;
};

}  // namespace moeroute
