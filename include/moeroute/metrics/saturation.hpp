// How routing settles over a training: saturation against the last checkpoint, change from one to
// the next, and when each token's target stops moving.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>

namespace moeroute {

/// Agreement of one checkpoint's routing with a later one's, fed batch by batch.
///
/// saturation() with the final checkpoint as `later` is router saturation; change() with the next
/// one is the router change rate. Means over tokens of shares of the earlier set; tokens without a
/// choice do not count. Cost: add O(T k^2), no allocation. Source: OLMoE (2024); arXiv 2505.10860.
class saturation_meter {
 public:
  /// Throws: error where the numbers of tokens or of experts differ.
  void add(const assignment& earlier, const assignment& later) {
    check_size("saturation_meter", "later.tokens", later.tokens(), earlier.tokens());
    check_size("saturation_meter", "later.experts", later.experts(), earlier.experts());
    check_offsets("saturation_meter", earlier);
    check_offsets("saturation_meter", later);
    for (index_t t = 0; t < earlier.tokens(); ++t) {
      const auto mine = earlier.ids(t), other = later.ids(t);
      index_t own = 0, both = 0;
      for (const expert_id e : mine) {
        if (e == no_expert) continue;
        ++own;
        both += std::find(other.begin(), other.end(), e) != other.end();
      }
      if (own == 0) continue;
      ++tokens_;
      shared_ += static_cast<double>(both) / static_cast<double>(own);
    }
  }

  std::int64_t tokens() const { return tokens_; }
  /// 0 where there are no tokens.
  double saturation() const { return tokens_ == 0 ? 0.0 : shared_ / static_cast<double>(tokens_); }
  double change() const { return tokens_ == 0 ? 0.0 : 1.0 - saturation(); }

 private:
  std::int64_t tokens_ = 0;
  double shared_ = 0.0;
};

/// Routing fluctuation: for each of the same tokens the last checkpoint at which its first choice
/// was not yet the final one.
///
/// Checkpoints are fed in order; each is all tokens in one call. Cost: add O(T), no allocation once
/// the first has been seen. Source: StableMoE (Dai et al. 2022).
class fluctuation_meter {
 public:
  /// Throws: error where a checkpoint has another number of tokens than the first.
  void add(const assignment& a) {
    if (checkpoints_ == 0) {
      target_.assign(static_cast<std::size_t>(a.tokens()), no_expert);
      changed_.assign(target_.size(), 0);
    }
    check_size("fluctuation_meter", "tokens", a.tokens(), static_cast<index_t>(target_.size()));
    check_offsets("fluctuation_meter", a);
    for (index_t t = 0; t < a.tokens(); ++t) {
      const auto ids = a.ids(t);
      const expert_id first = ids.empty() ? no_expert : ids[0];
      auto& target = target_[static_cast<std::size_t>(t)];
      // Where the target moves now, the checkpoint before was the last one with another.
      if (first != target) changed_[static_cast<std::size_t>(t)] = checkpoints_;
      target = first;
    }
    ++checkpoints_;
  }

  index_t checkpoints() const { return checkpoints_; }

  /// Share of tokens whose target still changes after the first n checkpoints: 0 for all of them,
  /// never rising with n. Throws: error where n is outside [1, checkpoints()].
  double still_changing_after(index_t n) const {
    check_range("fluctuation_meter", "n", n, 1, checkpoints_);
    if (changed_.empty()) return 0.0;
    const auto late =
        std::count_if(changed_.begin(), changed_.end(), [n](index_t at) { return at >= n; });
    return static_cast<double>(late) / static_cast<double>(changed_.size());
  }

 private:
  std::vector<expert_id> target_;
  std::vector<index_t> changed_;
  index_t checkpoints_ = 0;
};

}  // namespace moeroute
