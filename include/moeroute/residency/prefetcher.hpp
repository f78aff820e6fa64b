// Loads ahead of need, within a budget, by whatever predicts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/data/expert_cache.hpp>
#include <moeroute/residency/predictor.hpp>

namespace moeroute {

struct prefetch_options {
  index_t per_layer = 1;  ///< experts brought in ahead of a layer, at most
  index_t ahead = 1;      ///< layers
  /// Prefetched experts per one that is used above which it stops: bytes that nobody reads cost
  /// what they cost. It is looked at from `trial` prefetches on.
  double most_per_use = 2.0;
  std::int64_t trial = 64;
};

struct prefetch_counts {
  std::int64_t tokens = 0;
  std::int64_t loads = 0;  ///< on demand
  std::int64_t prefetched = 0;
  std::int64_t useful = 0;        ///< prefetched, and used while they were there
  std::int64_t wasted = 0;        ///< prefetched, and gone before anybody asked
  std::int64_t layers_early = 0;  ///< of useful ones, steps between load and use, summed

  /// Prefetched experts per useful one.
  double per_use() const {
    return prefetched == 0 ? 0.0
                           : static_cast<double>(prefetched) /
                                 static_cast<double>(std::max<std::int64_t>(useful, 1));
  }
};

/// A cache that loads on demand, and ahead of it what a predictor ranks first.
///
/// Never evicts what the current step uses. Stops by itself where too many of its loads are for
/// nothing, and says so. Throws: error where an option is out of its range.
template <expert_predictor Predictor>
class prefetcher {
 public:
  prefetcher(expert_cache& cache, Predictor predictor, const prefetch_options& options = {})
      : cache_(cache), predictor_(std::move(predictor)), options_(options) {
    constexpr const char* where = "prefetcher";
    check_range(where, "per_layer", options.per_layer, 0, cache.experts());
    check_range(where, "ahead", options.ahead, 1, std::max<index_t>(1, cache.layers()));
    if (!(options.most_per_use >= 1.0))
      fail_value(where, "most_per_use", options.most_per_use, "1 or more");
    since_.assign(static_cast<std::size_t>(cache.keys()), -1);
    guess_.resize(static_cast<std::size_t>(cache.experts()));
  }

  Predictor& predictor() { return predictor_; }
  const prefetch_counts& counts() const { return counts_; }
  bool stopped() const { return stopped_; }

  /// A layer uses experts: they are loaded where missing, then the layer `ahead` is prepared.
  /// Throws: error where the layer or an id is none of the cache's; nothing has changed then.
  expert_cache::step_result step(index_t layer, std::span<const expert_id> ids) {
    detail::check_seen("prefetcher", layer, cache_.layers(), ids, cache_.experts());
    ++now_;
    counts_.tokens += layer == 0;
    for (const expert_id e : ids) {
      if (e == no_expert) continue;
      std::int64_t& since = at(layer, e);
      if (since >= 0 && cache_.would_hit(e, layer)) {
        ++counts_.useful;
        counts_.layers_early += now_ - since;
        since = -1;
      }
    }
    const auto found = cache_.step(ids, layer);
    counts_.loads += static_cast<std::int64_t>(found.loads.size());
    demanded_.assign(found.loads.begin(), found.loads.end());
    evicted_.assign(found.evictions.begin(), found.evictions.end());
    gone(found.evictions);
    predictor_.saw(layer, ids);
    prepare((layer + options_.ahead) % cache_.layers());
    return {found.hits, demanded_, evicted_};
  }
  /// Keys that the last step brought in ahead, to read when there is time.
  std::span<const std::int32_t> ahead() const { return early_; }

 private:
  std::int64_t& at(index_t layer, expert_id e) {
    return since_[static_cast<std::size_t>(layer * cache_.experts() + e)];
  }
  void gone(std::span<const std::int32_t> keys) {
    for (const std::int32_t key : keys) {
      std::int64_t& since = since_[static_cast<std::size_t>(key)];
      counts_.wasted += since >= 0;
      since = -1;
    }
  }

  void prepare(index_t layer) {
    early_.clear();
    stopped_ = stopped_ ||
               (counts_.prefetched >= options_.trial && counts_.per_use() > options_.most_per_use);
    if (stopped_ || options_.per_layer == 0) return;
    const index_t n = predictor_.rank(layer, guess_);
    const auto found = cache_.prefetch(std::span(guess_).first(static_cast<std::size_t>(n)), layer,
                                       options_.per_layer);
    counts_.prefetched += static_cast<std::int64_t>(found.loads.size());
    for (const std::int32_t key : found.loads) since_[static_cast<std::size_t>(key)] = now_;
    early_.assign(found.loads.begin(), found.loads.end());
    gone(found.evictions);
  }

  expert_cache& cache_;
  Predictor predictor_;
  prefetch_options options_;
  prefetch_counts counts_;
  std::vector<std::int64_t>
      since_;  // of each key, when it was prefetched; -1: it was not, or is used
  std::vector<expert_id> guess_;
  std::vector<std::int32_t> early_, demanded_, evicted_;
  std::int64_t now_ = 0;
  bool stopped_ = false;
};

}  // namespace moeroute
