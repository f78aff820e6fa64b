// Caches of experts: which share of lookups a cache of so many experts would have met.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/expert_cache.hpp>
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
  std::span<const std::int32_t> pinned{};  ///< experts that are there from the start and stay
  double decay = 1.0;                      ///< of lfu
};

struct cache_result {
  index_t lookups = 0;
  index_t hits = 0;

  double hit_rate() const {
    return lookups == 0 ? 0.0 : static_cast<double>(hits) / static_cast<double>(lookups);
  }
};

namespace detail {

// For each choice of a trace the token that uses its expert again.
inline std::vector<std::int64_t> next_uses(const expert_trace& trace) {
  std::vector<std::int64_t> after(trace.ids().size(), expert_cache::never);
  std::vector<std::int64_t> next(static_cast<std::size_t>(trace.experts()), expert_cache::never);
  for (index_t t = trace.tokens() - 1; t >= 0; --t)
    for (index_t i = trace.first(t); i < trace.first(t + 1); ++i) {
      const auto e = static_cast<std::size_t>(trace.ids()[static_cast<std::size_t>(i)]);
      after[static_cast<std::size_t>(i)] = next[e];
      next[e] = t;
    }
  return after;
}

}  // namespace detail

/// What a cache of one size would have met of the trace.
///
/// Throws: error where the capacity is below the experts of some token or above E, or window < 1.
/// Cost: that of the cache (data/expert_cache.hpp), which is what runs. Determinism: exact.
/// Source: Segment routing and caching (arXiv 2505.16056); Belady 1966.
inline cache_result simulate_cache(const expert_trace& trace, const cache_options& options) {
  check_range("simulate_cache", "capacity", options.capacity, std::max<index_t>(1, trace.most()),
              trace.experts());
  check_range("simulate_cache", "window", options.window, 1, index_t{1} << 40);
  expert_cache cache({.experts = trace.experts(),
                      .capacity = options.capacity,
                      .policy = options.policy,
                      .pinned = options.pinned,
                      .decay = options.decay});
  const bool foresees = options.policy == cache_policy::belady;
  const std::vector<std::int64_t> next =
      foresees ? detail::next_uses(trace) : std::vector<std::int64_t>{};
  cache_result out{.lookups = trace.lookups()};
  index_t seen = 0;
  for (index_t t = 0; t < trace.tokens(); ++t) {
    if (options.policy == cache_policy::segment) {
      for (; seen < std::min(trace.tokens(), t + options.window); ++seen)
        for (const expert_id e : trace.ids(seen)) cache.expect(e, 0, 1);
      for (const expert_id e : trace.ids(t)) cache.expect(e, 0, -1);
    }
    const index_t before = cache.held();
    const auto step = cache.step(
        trace.ids(t), 0,
        foresees
            ? std::span(next).subspan(static_cast<std::size_t>(trace.first(t)), trace.ids(t).size())
            : std::span<const std::int64_t>{});
    out.hits += step.hits;
    if (options.cold == cold_misses::free) out.hits += cache.held() - before;
  }
  return out;
}

/// What an LRU cache of every size would have met: hits[c] with c experts held, 0 to E.
///
/// From the most experts of one token on it is simulate_cache's, one pass for all. Below, a token's
/// experts would push one another out, and what is said is an upper bound. Cost: O(lookups * the
/// distance in the order of use), at most E. Source: stack distances, Mattson et al. 1970.
inline std::vector<index_t> lru_hits(const expert_trace& trace) {
  const auto experts = static_cast<std::size_t>(trace.experts());
  std::vector<index_t> hits(experts + 1, 0);
  std::vector<expert_id> order;  // the last used in front
  for (index_t t = 0; t < trace.tokens(); ++t) {
    const auto ids = trace.ids(t);
    // All are looked up before any is used; what is named again is there, whatever the size.
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const expert_id e = ids[i];
      const auto named = ids.begin() + static_cast<std::ptrdiff_t>(i);
      if (std::find(ids.begin(), named, e) != named) {
        ++hits[1];
        continue;
      }
      const auto at =
          static_cast<std::size_t>(std::find(order.begin(), order.end(), e) - order.begin());
      if (at < order.size()) ++hits[at + 1];
    }
    for (const expert_id e : ids) {
      auto at = std::find(order.begin(), order.end(), e);
      if (at == order.end()) at = order.insert(order.end(), e);
      std::copy_backward(order.begin(), at, at + 1);
      order.front() = e;
    }
  }
  for (std::size_t c = 1; c < hits.size(); ++c) hits[c] += hits[c - 1];
  return hits;
}

}  // namespace moeroute
