// Split: how many of an expert's tokens each of its replicas takes, for one batch.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

/// A batch cut over a placement's slots.
struct slot_split {
  std::vector<std::int64_t> of_slot;    ///< [P]
  std::vector<std::int64_t> rank_load;  ///< [R]
  std::int64_t max_load = 0;
};

namespace detail {

inline void check_counts(const char* where, const placement& p,
                         std::span<const std::int64_t> count) {
  check_size(where, "count.size()", static_cast<index_t>(count.size()), p.experts());
  check_range(where, "placement.ranks()", p.ranks(), 1, max_ranks);
  for (index_t e = 0; e < p.experts(); ++e) {
    if (count[at(e)] < 0 || count[at(e)] > std::int64_t{1} << 40)
      fail_value(where, "count", static_cast<index_t>(count[at(e)]), "0 to 2^40");
    if (count[at(e)] > 0 && p.replicas(e) == 0)
      fail(where, "expert " + std::to_string(e) + " has tokens and no live slot");
  }
}

inline void finish_split(const placement& p, slot_split& s) {
  s.rank_load.assign(at(p.ranks()), 0);
  for (index_t i = 0; i < p.slots(); ++i)
    s.rank_load[at(p.rank_of_slot()[at(i)])] += s.of_slot[at(i)];
  s.max_load = *std::max_element(s.rank_load.begin(), s.rank_load.end());
}

}  // namespace detail

/// Every expert's tokens in equal parts, as replica_rule::even cuts them.
inline slot_split split_even(const placement& p, std::span<const std::int64_t> count) {
  using detail::at;
  detail::check_counts("split_even", p, count);
  slot_split s{std::vector<std::int64_t>(at(p.slots()), 0), {}, 0};
  for (index_t e = 0; e < p.experts(); ++e) {
    const index_t m = p.replicas(e);
    for (index_t j = 0; j < m; ++j)
      s.of_slot[at(p.slots_of_expert(e)[at(j)])] =
          count[at(e)] * (j + 1) / m - count[at(e)] * j / m;
  }
  detail::finish_split(p, s);
  return s;
}

/// A split that pours each expert's tokens, the heaviest first, onto the least loaded of its ranks,
/// `passes` times over: within a percent of the best, in O(P log P).
///
/// Throws: error where counts do not fit or a lost expert has tokens. Determinism: exact.
inline slot_split split_by_filling(const placement& p, std::span<const std::int64_t> count,
                                   index_t passes = 3) {
  using detail::at;
  detail::check_counts("split_by_filling", p, count);
  slot_split s = split_even(p, count);
  std::vector<index_t> order(at(p.experts()));
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(), greatest_first([&](index_t i) { return count[at(i)]; }));
  std::vector<slot_id> slots;
  const auto load_of = [&](slot_id i) -> std::int64_t& {
    return s.rank_load[at(p.rank_of_slot()[at(i)])];
  };
  for (index_t pass = 0; pass < passes; ++pass)
    for (const index_t e : order) {
      if (p.replicas(e) < 2 || count[at(e)] == 0) continue;
      slots.clear();
      for (const slot_id i : p.slots_of_expert(e)) {
        load_of(i) -= s.of_slot[at(i)];
        s.of_slot[at(i)] = 0;
        // Of a rank's slots with the expert the first takes all.
        if (slots.empty() || p.rank_of_slot()[at(slots.back())] != p.rank_of_slot()[at(i)])
          slots.push_back(i);
      }
      std::sort(slots.begin(), slots.end(), greatest_first([&](slot_id i) { return -load_of(i); }));
      // The water level over the n lowest ranks.
      std::int64_t left = count[at(e)], below = 0;
      std::size_t n = 0;
      while (n < slots.size() && load_of(slots[n]) * static_cast<std::int64_t>(n) - below < left)
        below += load_of(slots[n++]);
      const std::int64_t level = (left + below) / static_cast<std::int64_t>(n),
                         rest = (left + below) % static_cast<std::int64_t>(n);
      for (std::size_t i = 0; i < n; ++i) {
        const std::int64_t add =
            level + (static_cast<std::int64_t>(i) < rest ? 1 : 0) - load_of(slots[i]);
        s.of_slot[at(slots[i])] = add;
        load_of(slots[i]) += add;
      }
    }
  detail::finish_split(p, s);
  return s;
}

namespace detail {

// Whether every token finds a place where no rank takes more than `most`: a flow from experts to
// ranks, Dinic's way. What flows is left in of_slot.
class split_flow {
 public:
  split_flow(const placement& p, std::span<const std::int64_t> count) : p_(p), count_(count) {
    for (index_t e = 0; e < p.experts(); ++e) {
      first_.push_back(edge_rank_.size());
      std::int32_t last = -1;
      for (const slot_id s : p.slots_of_expert(e))
        if (const std::int32_t r = p.rank_of_slot()[at(s)]; r != last) {
          edge_rank_.push_back(r);
          edge_slot_.push_back(s);
          edge_expert_.push_back(static_cast<std::int32_t>(e));
          last = r;
        }
    }
    first_.push_back(edge_rank_.size());
    in_.resize(at(p.ranks()));
    for (std::size_t i = 0; i < edge_rank_.size(); ++i) in_[at(edge_rank_[i])].push_back(i);
  }

  bool fits(std::int64_t most) {
    flow_.assign(edge_rank_.size(), 0);
    left_.assign(count_.begin(), count_.end());
    room_.assign(in_.size(), most);
    std::int64_t rest = std::accumulate(left_.begin(), left_.end(), std::int64_t{0});
    while (rest > 0 && levels()) {
      next_.assign(first_.begin(), first_.end() - 1);
      next_in_.assign(in_.size(), 0);
      for (std::size_t e = 0; e < left_.size(); ++e)
        while (left_[e] > 0) {
          const std::int64_t sent = push_expert(e, left_[e]);
          if (sent == 0) break;
          left_[e] -= sent;
          rest -= sent;
        }
    }
    return rest == 0;
  }

  void write(slot_split& out) const {
    out.of_slot.assign(at(p_.slots()), 0);
    for (std::size_t i = 0; i < flow_.size(); ++i) out.of_slot[at(edge_slot_[i])] = flow_[i];
  }

 private:
  bool levels() {
    const std::size_t experts = left_.size();
    level_.assign(experts + in_.size(), -1);
    queue_.clear();
    for (std::size_t e = 0; e < experts; ++e)
      if (left_[e] > 0) {
        level_[e] = 0;
        queue_.push_back(e);
      }
    bool reached = false;
    for (std::size_t i = 0; i < queue_.size(); ++i) {
      const std::size_t v = queue_[i];
      const auto visit = [&](std::size_t to) {
        if (level_[to] >= 0) return;
        level_[to] = level_[v] + 1;
        queue_.push_back(to);
      };
      if (v < experts) {
        for (std::size_t k = first_[v]; k < first_[v + 1]; ++k) visit(experts + at(edge_rank_[k]));
      } else {
        reached = reached || room_[v - experts] > 0;
        for (const std::size_t k : in_[v - experts])
          if (flow_[k] > 0) visit(at(edge_expert_[k]));
      }
    }
    return reached;
  }
  std::int64_t push_expert(std::size_t e, std::int64_t want) {
    for (std::size_t& k = next_[e]; k < first_[e + 1]; ++k) {
      const std::size_t r = at(edge_rank_[k]);
      if (level_[left_.size() + r] != level_[e] + 1) continue;
      if (const std::int64_t sent = push_rank(r, want); sent > 0) {
        flow_[k] += sent;
        return sent;
      }
    }
    return 0;
  }
  std::int64_t push_rank(std::size_t r, std::int64_t want) {
    if (room_[r] > 0) {
      const std::int64_t sent = std::min(want, room_[r]);
      room_[r] -= sent;
      return sent;
    }
    for (std::size_t& i = next_in_[r]; i < in_[r].size(); ++i) {
      const std::size_t k = in_[r][i], e = at(edge_expert_[k]);
      if (flow_[k] == 0 || level_[e] != level_[left_.size() + r] + 1) continue;
      if (const std::int64_t sent = push_expert(e, std::min(want, flow_[k])); sent > 0) {
        flow_[k] -= sent;
        return sent;
      }
    }
    return 0;
  }

  const placement& p_;
  std::span<const std::int64_t> count_;
  std::vector<std::size_t> first_, next_, next_in_, queue_;
  std::vector<std::int32_t> edge_rank_, edge_expert_;
  std::vector<slot_id> edge_slot_;
  std::vector<std::vector<std::size_t>> in_;
  std::vector<std::int64_t> flow_, left_, room_;
  std::vector<std::int32_t> level_;
};

}  // namespace detail

/// The split with the smallest maximum of rank loads that the placement allows: exact, by flows.
///
/// Throws: error where counts do not fit or a lost expert has tokens. Cost: a flow over P edges for
/// each bit between the mean and what split_by_filling finds. Determinism: exact. Source: the
/// problem is LPLB's (DeepSeek).
inline slot_split split_optimal(const placement& p, std::span<const std::int64_t> count) {
  slot_split best = split_by_filling(p, count);
  detail::split_flow flow(p, count);
  index_t live = 0;
  for (const std::uint8_t a : p.alive()) live += a;
  const std::int64_t sum = std::accumulate(count.begin(), count.end(), std::int64_t{0});
  std::int64_t low = live > 0 ? (sum + live - 1) / live : 0;
  for (index_t e = 0; e < p.experts(); ++e) {
    if (count[detail::at(e)] == 0) continue;
    low = std::max(low, (count[detail::at(e)] + p.replicas(e) - 1) / p.replicas(e));
  }
  low = std::min(low, best.max_load);
  while (low < best.max_load) {
    const std::int64_t middle = low + (best.max_load - low) / 2;
    if (flow.fits(middle)) {
      flow.write(best);
      detail::finish_split(p, best);
    } else {
      low = middle + 1;
    }
  }
  return best;
}

/// A split as pieces of every expert's tokens, for replica_rule::ranges.
inline slot_ranges ranges_of(const placement& p, const slot_split& s) {
  slot_ranges out;
  for (index_t e = 0; e < p.experts(); ++e) {
    out.first.push_back(static_cast<std::int32_t>(out.range.size()));
    std::int64_t from = 0;
    for (const slot_id i : p.slots_of_expert(e)) {
      const std::int64_t n = s.of_slot[detail::at(i)];
      if (n > 0) out.range.push_back({i, from, from + n});
      from += n;
    }
  }
  out.first.push_back(static_cast<std::int32_t>(out.range.size()));
  return out;
}

}  // namespace moeroute
