// Caches of experts: which share of lookups a cache of so many experts would have met.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/expert_load.hpp>

namespace moeroute {

/// The experts of each token in order: what a cache sees. Fed batch by batch.
class expert_trace {
 public:
  /// Throws: error where E is outside [1, 2^20].
  explicit expert_trace(index_t experts) : experts_(experts) {
    check_range("expert_trace", "experts", experts, 1, max_experts);
  }

  /// Tokens without a choice that counts are not there. Throws: error where the assignment has
  /// another number of experts or the mask another length. Cost: O(T k); grows.
  template <class A = simd::default_arch>
  void add(const assignment& a, const count_options& what = {}) {
    check_size("expert_trace", "experts", a.experts(), experts_);
    detail::check_counted<A>("expert_trace", a, what);
    for (index_t t = 0; t < a.tokens(); ++t) {
      detail::for_each_counted(a, what, t,
                               [&](index_t e) { ids_.push_back(static_cast<expert_id>(e)); });
      const auto end = static_cast<index_t>(ids_.size());
      if (end == first_.back()) continue;
      most_ = std::max(most_, end - first_.back());
      first_.push_back(end);
    }
  }

  index_t experts() const { return experts_; }
  index_t tokens() const { return static_cast<index_t>(first_.size()) - 1; }
  index_t lookups() const { return static_cast<index_t>(ids_.size()); }
  /// Most experts of one token.
  index_t most() const { return most_; }
  index_t first(index_t token) const { return first_[static_cast<std::size_t>(token)]; }
  std::span<const expert_id> ids() const { return ids_; }
  std::span<const expert_id> ids(index_t token) const {
    return std::span(ids_).subspan(static_cast<std::size_t>(first(token)),
                                   static_cast<std::size_t>(first(token + 1) - first(token)));
  }

 private:
  index_t experts_, most_ = 0;
  std::vector<expert_id> ids_;
  std::vector<index_t> first_{0};
};

/// Who leaves a full cache. The token's own experts never do.
enum class cache_policy {
  lru,      ///< the longest unused
  lfu,      ///< the least used since the start, the longest unused among equals
  segment,  ///< the least used within the next window - 1 tokens, then as lru (SCH)
  belady,   ///< the one whose next use is farthest: no cache does better
};

/// Whether an expert's first load into a cache that is not yet full counts as a miss.
enum class cold_misses {
  counted,  ///< it does, as it costs a transfer
  free,     ///< it does not, as the code of SCH has it
};

struct cache_options {
  cache_policy policy = cache_policy::lru;
  index_t capacity = 1;  ///< experts held, at least those of any one token
  index_t window = 16;   ///< tokens, of segment
  cold_misses cold = cold_misses::counted;
};

struct cache_result {
  index_t lookups = 0;
  index_t hits = 0;

  double hit_rate() const {
    return lookups == 0 ? 0.0 : static_cast<double>(hits) / static_cast<double>(lookups);
  }
};

namespace detail {

class cache_run {
 public:
  cache_run(const expert_trace& trace, const cache_options& options)
      : trace_(trace), options_(options), lines_(static_cast<std::size_t>(trace.experts())) {
    if (options.policy == cache_policy::belady) look_ahead();
  }

  cache_result run() {
    cache_result out{.lookups = trace_.lookups()};
    for (index_t t = 0; t < trace_.tokens(); ++t) {
      if (options_.policy == cache_policy::segment) move_window(t);
      // All of a token's experts are looked up before any is loaded.
      for (const expert_id e : trace_.ids(t)) out.hits += line(e).held;
      for (index_t i = trace_.first(t); i < trace_.first(t + 1); ++i) {
        const expert_id e = trace_.ids()[static_cast<std::size_t>(i)];
        line_state& l = line(e);
        l.last = t;
        ++l.uses;
        if (!next_.empty()) l.next = next_[static_cast<std::size_t>(i)];
      }
      for (const expert_id e : trace_.ids(t)) {
        if (line(e).held) continue;
        if (held_ < options_.capacity) {
          ++held_;
          out.hits += options_.cold == cold_misses::free;
        } else {
          evict(t);
        }
        line(e).held = true;
      }
    }
    return out;
  }

 private:
  static constexpr index_t never = std::numeric_limits<index_t>::max();
  struct line_state {
    bool held = false;
    index_t last = -1, uses = 0, next = never, ahead = 0;
  };
  line_state& line(expert_id e) { return lines_[static_cast<std::size_t>(e)]; }

  // The token after this one that uses each choice's expert again.
  void look_ahead() {
    next_.assign(trace_.ids().size(), never);
    std::vector<index_t> next(lines_.size(), never);
    for (index_t t = trace_.tokens() - 1; t >= 0; --t)
      for (index_t i = trace_.first(t); i < trace_.first(t + 1); ++i) {
        const auto e = static_cast<std::size_t>(trace_.ids()[static_cast<std::size_t>(i)]);
        next_[static_cast<std::size_t>(i)] = next[e];
        next[e] = t;
      }
  }

  // Uses within the tokens (t, t + window).
  void move_window(index_t t) {
    for (; seen_ < std::min(trace_.tokens(), t + options_.window); ++seen_)
      for (const expert_id e : trace_.ids(seen_)) ++line(e).ahead;
    for (const expert_id e : trace_.ids(t)) --line(e).ahead;
  }

  bool leaves_before(const line_state& a, const line_state& b) const {
    switch (options_.policy) {
      case cache_policy::lru: break;
      case cache_policy::lfu:
        if (a.uses != b.uses) return a.uses < b.uses;
        break;
      case cache_policy::segment:
        if (a.ahead != b.ahead) return a.ahead < b.ahead;
        break;
      case cache_policy::belady:
        if (a.next != b.next) return a.next > b.next;
        break;
    }
    return a.last < b.last;
  }

  void evict(index_t t) {
    line_state* victim = nullptr;
    for (auto& l : lines_)
      if (l.held && l.last != t && (victim == nullptr || leaves_before(l, *victim))) victim = &l;
    victim->held = false;
  }

  const expert_trace& trace_;
  const cache_options& options_;
  std::vector<line_state> lines_;
  std::vector<index_t> next_;
  index_t held_ = 0, seen_ = 0;
};

}  // namespace detail

/// What a cache of one size would have met of the trace.
///
/// Throws: error where the capacity is below the experts of some token or above E, or window < 1.
/// Cost: O(lookups + misses E). Determinism: exact; among equals the lowest expert leaves.
/// Source: Segment routing and caching (arXiv 2505.16056); Belady 1966.
inline cache_result simulate_cache(const expert_trace& trace, const cache_options& options) {
  check_range("simulate_cache", "capacity", options.capacity, std::max<index_t>(1, trace.most()),
              trace.experts());
  check_range("simulate_cache", "window", options.window, 1, index_t{1} << 40);
  return detail::cache_run(trace, options).run();
}

}  // namespace moeroute
