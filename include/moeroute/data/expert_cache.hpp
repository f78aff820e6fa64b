// A cache of experts: which are in memory, who leaves when another one comes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/data/resident_set.hpp>

namespace moeroute {

/// Who leaves a full cache. What the current step uses and what is pinned does not.
enum class cache_policy {
  lru,        ///< the longest unused
  lfu,        ///< the least used, where older uses count less by `decay`; then the longest unused
  fifo,       ///< the first that came
  segmented,  ///< the longest unused of those used once, while they are enough; then of the others
  least_stale,  ///< what layers that are behind did not touch in this pass; then the longest unused
  cost_aware,   ///< the least bytes times (decayed) uses
  segment,      ///< the least used within the next window - 1 tokens, then as lru (SCH)
  belady,       ///< the one whose next use is farthest: no cache of experts of one size does better
};

inline constexpr cache_policy live_policies[] = {
    cache_policy::lru,       cache_policy::lfu,         cache_policy::fifo,
    cache_policy::segmented, cache_policy::least_stale, cache_policy::cost_aware};

inline const char* to_string(cache_policy policy) {
  switch (policy) {
    case cache_policy::lru: return "lru";
    case cache_policy::lfu: return "lfu";
    case cache_policy::fifo: return "fifo";
    case cache_policy::segmented: return "segmented";
    case cache_policy::least_stale: return "least_stale";
    case cache_policy::cost_aware: return "cost_aware";
    case cache_policy::segment: return "segment";
    case cache_policy::belady: return "belady";
  }
  return "?";
}

/// Of which size a cache is, and how it is run. A key is layer * experts + expert.
struct expert_cache_options {
  index_t experts = 1;   ///< E of a layer
  index_t layers = 1;    ///< that share the cache
  index_t capacity = 1;  ///< experts held; bytes where `bytes` is given
  cache_policy policy = cache_policy::lru;
  std::span<const std::int32_t> pinned{};  ///< keys that are there from the start and never leave
  std::span<const std::int64_t> bytes{};   ///< [layers * E], the size of each; empty: 1 each
  double decay = 1.0;            ///< of lfu and cost_aware: a use of n steps ago counts decay^n
  double protected_share = 0.5;  ///< of segmented: the part of the capacity for what was used twice
};

/// A cache of experts, live: told what each step uses, it says what has to be read and what may be
/// overwritten.
///
/// Cost: O(1) per access under lru, fifo and segmented, O(layers) per load under least_stale,
/// O(log capacity) under the others; of a step larger than the cache O(capacity) per load under lru
/// and least_stale; O(layers E) per prefetch() that lets some leave where sizes are given; no
/// allocation warm. Memory: E / 8 bytes per layer for the set, about 64 per key for the order.
/// Determinism: exact; use is ordered, so that nothing ties. Source: segment: arXiv 2505.16056;
/// least-stale: arXiv 2602.03921; Belady 1966.
///
///     expert_cache cache({.experts = 64, .layers = 32, .capacity = 800});
///     const resident_router careful(plain, rule, cache.resident(layer));
///     ...
///     for (const std::int32_t key : cache.step(choices.ids(0), layer).loads) read_expert(key);
///
class expert_cache {
 public:
  static constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();

  /// What a step found. The lists hold until the next call.
  struct step_result {
    index_t hits = 0;
    std::span<const std::int32_t> loads{};      ///< keys to read, in the order of use
    std::span<const std::int32_t> evictions{};  ///< keys that left for them
  };

  /// Throws: error where a size, a pin or a share is out of its range, pins alone exceed the
  /// capacity, one expert does, or the sum of sizes exceeds 64 bits.
  explicit expert_cache(const expert_cache_options& options)
      : experts_(options.experts),
        layers_(options.layers),
        capacity_(options.capacity),
        policy_(options.policy),
        decay_(options.decay) {
    constexpr const char* where = "expert_cache";
    check_range(where, "experts", experts_, 1, max_experts);
    check_range(where, "layers", layers_, 1, std::int32_t{0x7fffffff} / experts_);
    const auto keys = static_cast<std::size_t>(this->keys());
    std::int64_t all = this->keys(), largest = 1;
    if (!options.bytes.empty()) {
      check_size(where, "bytes.size()", static_cast<index_t>(options.bytes.size()), this->keys());
      bytes_.assign(options.bytes.begin(), options.bytes.end());
      all = 0;
      for (const std::int64_t b : bytes_) {
        if (b <= 0) fail_value(where, "bytes", index_t{b}, "above 0");
        if (b > never - all) fail(where, "the sum of bytes is beyond 64 bits, expected less");
        all += b;
        largest = std::max(largest, b);
      }
    }
    check_range(where, "capacity", capacity_, largest, all);
    if (!(decay_ > 0.0 && decay_ <= 1.0)) fail_value(where, "decay", decay_, "above 0, at most 1");
    if (!(options.protected_share >= 0.0 && options.protected_share < 1.0))
      fail_value(where, "protected_share", options.protected_share, "0 to below 1");
    protected_most_ =
        static_cast<std::int64_t>(options.protected_share * static_cast<double>(capacity_));
    sets_.assign(static_cast<std::size_t>(layers_), resident_set(experts_));
    entries_.resize(keys);
    for (std::size_t key = 0; key < keys; ++key) {
      entries_[key].layer = static_cast<std::int32_t>(static_cast<index_t>(key) / experts_);
      entries_[key].expert = static_cast<expert_id>(static_cast<index_t>(key) % experts_);
    }
    if (by_rank()) {
      heap_.reserve(keys);
      ahead_.resize(policy_ == cache_policy::segment ? keys : 0);
      next_.resize(policy_ == cache_policy::belady ? keys : 0, never);
    } else {
      links_.resize(keys +
                    (policy_ == cache_policy::least_stale ? static_cast<std::size_t>(layers_) : 2));
      for (std::size_t i = 0; i < links_.size(); ++i)
        links_[i] = {static_cast<std::int32_t>(i), static_cast<std::int32_t>(i)};
    }
    // A miss is written before it is known to be one.
    loads_.resize(static_cast<std::size_t>(experts_) + 1);
    evictions_.reserve(static_cast<std::size_t>(experts_));
    for (const std::int32_t key : options.pinned) {
      check_range(where, "pinned", key, 0, this->keys() - 1);
      entry& e = entries_[static_cast<std::size_t>(key)];
      if (e.pinned) continue;
      e.pinned = e.held = true;
      set_of(key).insert(at(key).expert);
      used_ += size_of(key);
    }
    pinned_ = used_;
    if (used_ > capacity_)
      fail_value(where, "the size of what is pinned", used_, "at most ", capacity_);
  }

  index_t experts() const { return experts_; }
  index_t layers() const { return layers_; }
  index_t keys() const { return experts_ * layers_; }
  index_t capacity() const { return capacity_; }
  cache_policy policy() const { return policy_; }
  /// Experts, or bytes, that are held.
  index_t held() const { return used_; }

  /// Bits of a layer's experts that are in memory; stays valid and changes with the cache.
  resident_view resident(index_t layer = 0) const {
    check_range("expert_cache", "layer", layer, 0, layers_ - 1);
    return sets_[static_cast<std::size_t>(layer)].view();
  }
  /// Throws: error where the id is no expert.
  bool would_hit(expert_id e, index_t layer = 0) const { return at(key_of(e, layer)).held; }

  /// Uses experts: all are looked up, then what is missing is loaded. -1 is skipped; an expert that
  /// is named again is there. A layer that does not come after the last one begins a new pass.
  ///
  /// Ensures: what the step uses stays, unless the step alone exceeds the capacity: then its first
  /// ones leave for its last. next: under belady when each is used again, as a number that grows
  /// with time (`never`: not at all). Throws: error where an id is no expert, or next has another
  /// length than ids (belady only).
  step_result step(std::span<const expert_id> ids, index_t layer = 0,
                   std::span<const std::int64_t> next = {}) {
    if (policy_ == cache_policy::belady)
      check_size("expert_cache", "next.size()", static_cast<index_t>(next.size()),
                 static_cast<index_t>(ids.size()));
    const std::int32_t first = key_of(0, layer);
    check_ids(ids);
    begin(layer);
    const bool ranked = by_rank();
    const bool by_use = lists_use();
    // What the step uses leaves the order at once, where all of it fits: who leaves is the first.
    const bool apart =
        by_use && bytes_.empty() && static_cast<index_t>(ids.size()) <= capacity_ - pinned_;
    step_result out;
    std::size_t loads = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] == no_expert) continue;
      const std::int32_t key = first + ids[i];
      entry& e = at(key);
      const bool there = e.held || e.last == step_;
      out.hits += there;
      loads_[loads] = key;
      loads += !there;
      if (ranked) e.uses = e.uses * forgotten(e.last) + 1.0;
      e.last = step_;
      e.clock = ++clock_;
      e.pass = pass_;
      ++e.total;
      if (!next.empty()) next_[static_cast<std::size_t>(key)] = next[i];
      if (apart)
        unlink(key);
      else if (e.held && !e.pinned && !by_use)
        used_again(key);
    }
    out.loads = std::span(loads_).first(loads);
    for (const std::int32_t key : out.loads) {
      if (apart)
        make_room_and_hold(key);
      else
        load(key);
    }
    // Hits and loads in the order of use.
    for (std::size_t i = 0; by_use && i < ids.size(); ++i) {
      if (ids[i] == no_expert) continue;
      const std::int32_t key = first + ids[i];
      if (at(key).held && !at(key).pinned) used_again(key);
    }
    out.evictions = evictions_;
    return out;
  }

  /// Brings experts in that were not asked for yet: the first `most` of the ids that are missing.
  /// What the last step used does not leave for them, nor does one of them for another; nobody
  /// leaves for one that finds no room then.
  step_result prefetch(std::span<const expert_id> ids, index_t layer, index_t most) {
    for (const expert_id id : ids)
      if (id != no_expert) key_of(id, layer);  // a call that is refused changes nothing
    evictions_.clear();
    early_ = clock_;
    // Bytes that leave for nobody in this call, counted when somebody has to leave.
    std::int64_t stay = -1;
    const auto room = [&](std::int64_t size) {
      if (bytes_.empty() || used_ + size <= capacity_) return true;
      if (stay < 0) stay = staying();
      return size <= capacity_ - stay;
    };
    step_result out;
    std::size_t loads = 0;
    for (const expert_id id : ids) {
      if (static_cast<index_t>(loads) >= most) break;
      if (id == no_expert) continue;
      const std::int32_t key = key_of(id, layer);
      entry& e = at(key);
      if (e.held) {
        ++out.hits;
        continue;
      }
      e.clock = ++clock_;
      e.pass = pass_;
      if (!room(size_of(key)) || !load(key, leaving::others)) continue;
      loads_[loads++] = key;
      if (stay >= 0) stay += size_of(key);
    }
    out.loads = std::span(loads_).first(loads);
    out.evictions = evictions_;
    return out;
  }

  /// Uses of an expert that the next window of tokens has more (or fewer), for `segment`.
  void expect(expert_id e, index_t layer, int more) {
    const std::int32_t key = key_of(e, layer);
    if (policy_ != cache_policy::segment) return;
    ahead_[static_cast<std::size_t>(key)] += more;
    if (at(key).held && !at(key).pinned) used_again(key);
  }

  /// How often each key was used so far, [layers * E]: a profile (data/expert_profile.hpp).
  void uses(std::span<std::int64_t> out) const {
    check_size("expert_cache", "out.size()", static_cast<index_t>(out.size()), keys());
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = entries_[i].total;
  }

 private:
  enum class leaving { any, others };

  struct entry {
    double uses = 0.0;
    std::int64_t last = -1, clock = 0, total = 0, pass = 0;
    std::int32_t place = 0;  // in the heap, or the list that it is in
    expert_id expert = 0;    // the key in its parts: dividing it takes as long as all the rest
    std::int32_t layer = 0;
    bool held = false, pinned = false;
  };
  // Neighbours in a list; who is in none has itself for both, so that nothing is asked.
  struct link {
    std::int32_t before, after;
  };
  struct order {
    double worth;
    std::int64_t clock;
    friend bool operator==(const order&, const order&) = default;
    // Without a branch: which is less, no processor can foretell.
    friend bool operator<(const order& a, const order& b) {
      return (a.worth < b.worth) | ((a.worth == b.worth) & (a.clock < b.clock));
    }
  };
  struct node {
    order rank;
    std::int32_t key;
  };

  entry& at(std::int32_t key) { return entries_[static_cast<std::size_t>(key)]; }
  const entry& at(std::int32_t key) const { return entries_[static_cast<std::size_t>(key)]; }
  std::int64_t size_of(std::int32_t key) const {
    return bytes_.empty() ? 1 : bytes_[static_cast<std::size_t>(key)];
  }
  resident_set& set_of(std::int32_t key) { return sets_[static_cast<std::size_t>(at(key).layer)]; }
  std::int32_t key_of(expert_id e, index_t layer) const {
    check_range("expert_cache", "layer", layer, 0, layers_ - 1);
    check_range("expert_cache", "expert", e, 0, experts_ - 1);
    return static_cast<std::int32_t>(layer * experts_ + e);
  }
  // All of them before anything changes: a step is taken as a whole or not at all.
  void check_ids(std::span<const expert_id> ids) const {
    const auto most = static_cast<std::uint32_t>(experts_);
    bool wrong = false;
    for (const expert_id id : ids) wrong |= static_cast<std::uint32_t>(id) + 1 > most;
    if (wrong) [[unlikely]]
      for (const expert_id id : ids)
        if (id != no_expert) check_range("expert_cache", "expert", id, 0, experts_ - 1);
  }
  double forgotten(std::int64_t since) const {
    return decay_ == 1.0 ? 1.0 : std::pow(decay_, static_cast<double>(step_ - since));
  }

  void begin(index_t layer) {
    evictions_.clear();
    early_ = never;
    ++step_;
    if (layer <= layer_) ++pass_;
    layer_ = layer;
  }

  // --- order: lists for what use alone decides, a heap for the rest ---

  bool by_rank() const {
    return policy_ == cache_policy::lfu || policy_ == cache_policy::cost_aware ||
           policy_ == cache_policy::segment || policy_ == cache_policy::belady;
  }

  // Lists in the order of use, which a step's own take when it is over.
  bool lists_use() const {
    return policy_ == cache_policy::lru || policy_ == cache_policy::least_stale;
  }

  // Use never makes a rank less: it is looked up again when a key is about to leave, not before.
  bool rises() const { return policy_ == cache_policy::lfu || policy_ == cache_policy::cost_aware; }

  // What leaves first is least.
  order rank(std::int32_t key) const {
    const entry& e = at(key);
    switch (policy_) {
      case cache_policy::segment:
        return {static_cast<double>(ahead_[static_cast<std::size_t>(key)]), e.clock};
      case cache_policy::belady:
        return {-static_cast<double>(next_[static_cast<std::size_t>(key)]), e.clock};
      case cache_policy::cost_aware: {
        const auto size = static_cast<double>(size_of(key));
        return {decay_ == 1.0 ? e.uses * size : worth(e) + std::log(size), e.clock};
      }
      default: return {worth(e), e.clock};
    }
  }
  // Decayed uses as they compare with those of others at any one time.
  double worth(const entry& e) const {
    if (decay_ == 1.0) return e.uses;
    // -inf, whatever the size: brought in ahead of its first use.
    return std::log(e.uses) - static_cast<double>(e.last) * std::log(decay_);
  }

  link& links(std::int32_t key) { return links_[static_cast<std::size_t>(key)]; }
  // A list begins and ends at a link of its own.
  std::int32_t ends(index_t list) const { return static_cast<std::int32_t>(keys() + list); }

  void append(std::int32_t key, index_t to) {
    const std::int32_t end = ends(to), last = links(end).before;
    at(key).place = static_cast<std::int32_t>(to);
    links(key) = {last, end};
    links(last).after = key;
    links(end).before = key;
    if (to == 1) protected_ += size_of(key);
  }
  void unlink(std::int32_t key) {
    const link l = links(key);
    links(l.before).after = l.after;
    links(l.after).before = l.before;
    links(key) = {key, key};
  }
  void unlink_protected(std::int32_t key) {
    if (at(key).place == 1) protected_ -= size_of(key);
    unlink(key);
  }

  void put(const node& n, std::size_t place) {
    heap_[place] = n;
    at(n.key).place = static_cast<std::int32_t>(place);
  }
  void sift(const node& own, std::size_t place) {
    while (place > 0 && own.rank < heap_[(place - 1) / 2].rank) {
      put(heap_[(place - 1) / 2], place);
      place = (place - 1) / 2;
    }
    for (std::size_t child; (child = 2 * place + 1) < heap_.size(); place = child) {
      if (child + 1 < heap_.size())
        child += static_cast<std::size_t>(heap_[child + 1].rank < heap_[child].rank);
      if (!(heap_[child].rank < own.rank)) break;
      put(heap_[child], place);
    }
    put(own, place);
  }

  void add(std::int32_t key) {
    if (by_rank()) {
      heap_.push_back({});
      sift({rank(key), key}, heap_.size() - 1);
    } else {
      append(key, policy_ == cache_policy::least_stale ? at(key).layer : 0);
    }
  }
  void remove(std::int32_t key) {
    if (!by_rank()) return unlink_protected(key);
    const auto place = static_cast<std::size_t>(at(key).place);
    const node moved = heap_.back();
    heap_.pop_back();
    if (moved.key != key) sift(moved, place);
  }
  void used_again(std::int32_t key) {
    if (by_rank()) {
      if (!rises()) sift({rank(key), key}, static_cast<std::size_t>(at(key).place));
      return;
    }
    if (policy_ == cache_policy::fifo) return;
    if (policy_ != cache_policy::segmented) {
      unlink(key);
      return append(key, policy_ == cache_policy::least_stale ? at(key).layer : 0);
    }
    unlink_protected(key);
    append(key, 1);
    // The protected part is full: its longest unused has to prove itself again.
    while (protected_ > protected_most_) {
      const std::int32_t old = links(ends(1)).after;
      unlink_protected(old);
      append(old, 0);
    }
  }

  // --- who leaves ---

  bool may_leave(std::int32_t key, leaving who) const {
    return who == leaving::any || (at(key).last != step_ && at(key).clock <= early_);
  }
  // -1 where there is none.
  std::int32_t first_of(index_t list, leaving who) {
    const std::int32_t end = ends(list);
    std::int32_t key = links(end).after;
    while (key != end && !may_leave(key, who)) key = links(key).after;
    if (key == end) return -1;
    // Nobody is left but the step's own.
    if (who == leaving::any && lists_use())
      for (std::int32_t next = key; (next = links(next).after) != end;)
        if (at(next).clock < at(key).clock) key = next;
    return key;
  }

  std::int32_t victim(leaving who) {
    if (by_rank()) {
      aside_.clear();
      std::int32_t found = -1;
      while (!heap_.empty() && found < 0) {
        const std::int32_t key = heap_.front().key;
        if (rises())
          if (const order now = rank(key); now != heap_.front().rank) {
            sift({now, key}, 0);
            continue;
          }
        if (may_leave(key, who))
          found = key;
        else
          aside_.push_back(key), remove(key);
      }
      for (const std::int32_t key : aside_) add(key);
      return found;
    }
    if (policy_ != cache_policy::least_stale) {
      const std::int32_t key = first_of(0, who);
      return key >= 0 ? key : first_of(1, who);
    }
    // Each layer's longest unused; those of layers behind that this pass has not touched go first.
    std::int32_t stale = -1, oldest = -1;
    for (index_t l = 0; l < layers_; ++l) {
      const std::int32_t key = first_of(l, who);
      if (key < 0) continue;
      if (oldest < 0 || at(key).clock < at(oldest).clock) oldest = key;
      if (l <= layer_ && at(key).pass < pass_ && (stale < 0 || at(key).clock < at(stale).clock))
        stale = key;
    }
    return stale >= 0 ? stale : oldest;
  }

  // False where there is no room that may be made: pins, or the step itself, take all of it.
  bool load(std::int32_t key, leaving who = leaving::any) {
    const std::int64_t size = size_of(key);
    if (size > capacity_ - pinned_) return false;  // nobody leaves for what cannot stay
    while (used_ + size > capacity_) {
      std::int32_t old = victim(leaving::others);
      if (old < 0 && who == leaving::any) old = victim(leaving::any);
      if (old < 0) return false;
      remove(old);
      let_go(old);
    }
    hold(key);
    add(key);
    return true;
  }

  // Bytes that leave for nobody who is brought in ahead.
  std::int64_t staying() const {
    std::int64_t sum = 0;
    for (std::int32_t key = 0; key < static_cast<std::int32_t>(entries_.size()); ++key)
      if (at(key).held && (at(key).pinned || !may_leave(key, leaving::others))) sum += size_of(key);
    return sum;
  }

  void let_go(std::int32_t key) {
    at(key).held = false;
    set_of(key).erase(at(key).expert);
    used_ -= size_of(key);
    evictions_.push_back(key);
  }
  void hold(std::int32_t key) {
    at(key).held = true;
    set_of(key).insert(at(key).expert);
    used_ += size_of(key);
  }

  // Where sizes are 1, there is room for the step, and what it uses is in no list.
  void make_room_and_hold(std::int32_t key) {
    if (used_ == capacity_) {
      const std::int32_t old =
          policy_ == cache_policy::lru ? links(ends(0)).after : victim(leaving::others);
      unlink(old);
      let_go(old);
    }
    hold(key);
  }

  index_t experts_, layers_, capacity_;
  cache_policy policy_;
  double decay_;
  std::int64_t protected_most_ = 0, protected_ = 0, pinned_ = 0, used_ = 0, clock_ = 0, step_ = 0,
               pass_ = 0;
  std::int64_t early_ = never;  // clock at which the current prefetch began: what it brings stays
  index_t layer_ = -1;
  std::vector<std::int64_t> bytes_, next_;
  std::vector<resident_set> sets_;
  std::vector<entry> entries_;
  std::vector<link> links_;  // of the keys, then of the lists
  std::vector<node> heap_;
  std::vector<std::int32_t> ahead_, aside_, loads_, evictions_;
};

}  // namespace moeroute
