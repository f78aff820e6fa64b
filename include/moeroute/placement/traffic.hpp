// Traffic: which experts tokens ask for, made up: Zipf loads that drift and switch, and batches of
// tokens drawn from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/placement/loads.hpp>

namespace moeroute {

struct traffic_options {
  index_t experts = 256;
  double zipf = 1.0;       ///< popularity of the n-th expert: n^-zipf
  double noise = 0.15;     ///< relative, uniform
  double drift = 0.0;      ///< standard deviation of the logarithm per step
  index_t switch_at = -1;  ///< step from which experts have other popularities; -1: never
  std::uint64_t seed = 1;
};

/// One layer's traffic over steps: popularity() of the current step, draw() batches of it.
///
/// Determinism: a function of the options, layer and step, but for the last bits of log and exp.
class expert_traffic {
 public:
  /// Throws: error where an option is out of range.
  explicit expert_traffic(const traffic_options& o, index_t layer = 0)
      : options_(o), layer_(static_cast<std::uint64_t>(layer)) {
    check_range("traffic", "experts", o.experts, 1, max_experts);
    for (const double v : {o.zipf, o.noise, o.drift})
      if (!(v >= 0.0 && std::isfinite(v)))
        fail_value("traffic", "an option", v, "a finite number >= 0");
    shuffle(0);
  }

  index_t experts() const { return options_.experts; }
  index_t step() const { return step_; }
  /// Parts of the choices, they sum to 1: [E].
  std::span<const double> popularity() const { return part_; }

  /// Goes on by one step.
  void advance() {
    ++step_;
    if (step_ == options_.switch_at) {
      shuffle(1);
    } else if (options_.drift > 0.0) {
      for (index_t e = 0; e < experts(); ++e)
        log_[detail::at(e)] +=
            options_.drift * normal(2, static_cast<std::uint64_t>(step_ * experts() + e));
      normalise();
    }
  }

  /// Choices of `tokens` tokens, k distinct experts each, by Gumbel keys: [tokens * k].
  ///
  /// Cost: O(tokens E).
  void draw(index_t tokens, index_t k, std::uint64_t batch, std::vector<expert_id>& ids) const {
    check_range("traffic", "k", k, 1, experts());
    ids.resize(detail::at(tokens * k));
    std::vector<std::pair<double, expert_id>> key(detail::at(experts()));
    for (index_t t = 0; t < tokens; ++t) {
      // The smallest of exponential times with the popularities as rates.
      for (index_t e = 0; e < experts(); e += 4) {
        const random_words r = random_block(options_.seed ^ 0x5bd1e995u, layer_ << 40 | batch,
                                            static_cast<std::uint64_t>(t * experts() + e));
        for (index_t i = 0; i < 4 && e + i < experts(); ++i)
          key[detail::at(e + i)] = {
              -std::log(static_cast<double>(open_u01_of(r.word[i]))) / part_[detail::at(e + i)],
              static_cast<expert_id>(e + i)};
      }
      std::partial_sort(key.begin(), key.begin() + k, key.end());
      for (index_t i = 0; i < k; ++i) ids[detail::at(t * k + i)] = key[detail::at(i)].second;
    }
  }

  /// Counts of a batch of n independent choices, as far as a normal approximation goes: [E].
  void sample(double n, std::uint64_t batch, std::vector<double>& count) const {
    count.resize(part_.size());
    for (index_t e = 0; e < experts(); ++e) {
      const double mean = n * part_[detail::at(e)];
      const double z = normal(3, (batch << 24) + static_cast<std::uint64_t>(e));
      count[detail::at(e)] = std::max(
          0.0, std::floor(mean + z * std::sqrt(mean * (1.0 - part_[detail::at(e)])) + 0.5));
    }
  }

 private:
  void shuffle(std::uint64_t which) {
    const index_t n = experts();
    log_.resize(detail::at(n));
    for (index_t e = 0; e < n; ++e) {
      const double u = static_cast<double>(
          random_u01(options_.seed, layer_ << 8 | which, static_cast<std::uint64_t>(e)));
      log_[detail::at(e)] = -options_.zipf * std::log(static_cast<double>(e + 1)) +
                            std::log(1.0 + std::min(options_.noise, 0.999) * (2.0 * u - 1.0));
    }
    for (index_t e = n - 1; e > 0; --e)
      std::swap(log_[detail::at(e)],
                log_[random_below(static_cast<std::uint32_t>(e + 1), options_.seed + 17,
                                  layer_ << 8 | which, static_cast<std::uint64_t>(e))]);
    normalise();
  }
  void normalise() {
    const double top = *std::max_element(log_.begin(), log_.end());
    double sum = 0.0;
    part_.resize(log_.size());
    for (std::size_t e = 0; e < log_.size(); ++e) sum += part_[e] = std::exp(log_[e] - top);
    for (double& p : part_) p /= sum;
  }
  // Box and Muller's, one of the pair.
  double normal(std::uint64_t use, std::uint64_t place) const {
    const random_words r = random_block(options_.seed, layer_ << 8 | use, place);
    return std::sqrt(-2.0 * std::log(static_cast<double>(open_u01_of(r.word[0])))) *
           std::cos(6.283185307179586 * static_cast<double>(u01_of(r.word[1])));
  }

  traffic_options options_;
  std::uint64_t layer_;
  index_t step_ = 0;
  std::vector<double> log_, part_;
};

}  // namespace moeroute
