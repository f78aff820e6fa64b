// Segment routing best performance (SRP): how well one fixed choice per window of tokens would
// serve an expert.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/expert_load.hpp>

namespace moeroute {

/// The best F1 of predicting an expert active for the whole of each window in which at least a
/// tokens use it, over all a.
struct segment_score {
  double f1 = 0.0;
  index_t threshold = 0;    ///< the best a, the lowest of several
  double size_ratio = 0.0;  ///< activations predicted over activations
};

/// Windows of m consecutive tokens, one starting at every token, fed batch by batch as if the
/// batches were one text.
///
/// Cost: add O(T k); memory E (m + 1) counts. Source: arXiv 2505.16056.
class segment_meter {
 public:
  /// Throws: error where E is outside [1, 2^20] or m outside [1, 2^16].
  segment_meter(index_t experts, index_t window) : experts_(experts), window_(window) {
    check_range("segment_meter", "experts", experts, 1, max_experts);
    check_range("segment_meter", "window", window, 1, index_t{1} << 16);
    windows_.assign(static_cast<std::size_t>(experts * (window + 1)), 0);
    inside_.assign(static_cast<std::size_t>(experts), 0);
    since_.assign(static_cast<std::size_t>(experts), 0);
    ring_.resize(static_cast<std::size_t>(window));
  }

  /// Masked tokens are not there. Throws: error where the assignment has another number of experts
  /// or the mask another length.
  template <class A = simd::default_arch>
  void add(const assignment& a, const count_options& what = {}) {
    check_size("segment_meter", "experts", a.experts(), experts_);
    detail::check_counted<A>("segment_meter", a, what);
    for (index_t t = 0; t < a.tokens(); ++t) {
      if (!what.mask.empty() && what.mask[static_cast<std::size_t>(t)] == 0) continue;
      // The window that ends with this token is the one numbered tokens_ - m + 1.
      auto& place = ring_[static_cast<std::size_t>(tokens_ % window_)];
      for (const expert_id e : place) change(e, -1);
      place.clear();
      detail::for_each_counted(a, what, t, [&](index_t e) {
        place.push_back(static_cast<expert_id>(e));
        change(static_cast<expert_id>(e), 1);
      });
      ++tokens_;
    }
  }

  index_t windows() const { return std::max<index_t>(0, tokens_ - window_ + 1); }

  /// Of one expert. One that is never active scores 0.
  segment_score of(index_t expert) const {
    check_range("segment_meter", "expert", expert, 0, experts_ - 1);
    return best(expert, expert + 1);
  }
  /// Of all experts of the layer with one threshold: sums are joined before the best is taken.
  segment_score all() const { return best(0, experts_); }

 private:
  index_t current() const { return std::max<index_t>(0, tokens_ - window_ + 1); }

  // Up to here the count was what it was: those windows are booked when it changes.
  void change(expert_id expert, index_t by) {
    const auto e = static_cast<std::size_t>(expert);
    windows_[booking(expert, inside_[e])] += current() - since_[e];
    since_[e] = current();
    inside_[e] += by;
  }
  std::size_t booking(index_t expert, index_t count) const {
    return static_cast<std::size_t>(expert * (window_ + 1) + count);
  }

  segment_score best(index_t first, index_t last) const {
    std::vector<std::int64_t> with(static_cast<std::size_t>(window_ + 1), 0);
    for (index_t e = first; e < last; ++e) {
      for (index_t f = 0; f <= window_; ++f)
        with[static_cast<std::size_t>(f)] += windows_[booking(e, f)];
      const auto i = static_cast<std::size_t>(e);
      with[static_cast<std::size_t>(inside_[i])] += windows() - since_[i];
    }
    double active = 0.0;
    for (std::size_t f = 0; f < with.size(); ++f)
      active += static_cast<double>(f) * static_cast<double>(with[f]);
    segment_score out;
    if (!(active > 0.0)) return out;
    double matches = 0.0, predicted = 0.0;
    for (index_t a = window_; a >= 0; --a) {
      const auto n = static_cast<double>(with[static_cast<std::size_t>(a)]);
      matches += static_cast<double>(a) * n;
      predicted += static_cast<double>(window_) * n;
      const double f1 = 2.0 * matches / (predicted + active);
      if (f1 >= out.f1) out = {f1, a, predicted / active};
    }
    return out;
  }

  index_t experts_, window_, tokens_ = 0;
  std::vector<std::int64_t> windows_;  // [E, m + 1]: windows with so many active tokens
  std::vector<index_t> inside_, since_;
  std::vector<std::vector<expert_id>> ring_;
};

}  // namespace moeroute
