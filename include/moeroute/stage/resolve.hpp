// Resolving: every choice's expert becomes one of the slots that hold it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>

#include <moeroute/base/error.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/data/placement.hpp>

namespace moeroute {

/// Which of its expert's live slots a choice goes to. The last three cut the expert's tokens of all
/// ranks, in the order of ranks and tokens, and need everybody's counts.
enum class replica_rule {
  only,         ///< the one that there is; an error where there are several
  nearest,      ///< on the own rank, else on the own node, else any: number (rank mod candidates)
  round_robin,  ///< in turn, by this rank's tokens of the expert
  even,         ///< of m slots, slot j takes [floor(c j / m), floor(c (j + 1) / m)) of c tokens
  shares,       ///< boundaries at round(c * prefix of the placement's shares)
  ranges,       ///< as given
};

/// What becomes of a choice whose expert has no live slot.
enum class lost_expert {
  error,
  drop,  ///< it gets no slot, and is counted
};

struct resolve_options {
  replica_rule rule = replica_rule::nearest;
  lost_expert lost = lost_expert::error;
  /// [R, E], every rank's choices of every expert, as count_choices makes a row of it: for even,
  /// shares and ranges.
  std::span<const std::int32_t> counts{};
  /// [E + 1] and what it points into (slot_ranges): for ranges.
  std::span<const std::int32_t> range_first{};
  std::span<const slot_range> range{};
  /// [E], 0: not an expert of the ranks (identity, zero); empty: all are.
  std::span<const std::uint8_t> owned{};
  /// [T], 0: the token takes no part; empty: all take part.
  std::span<const std::uint8_t> mask{};
};

/// What resolve found: kept + lost + (not taking part) = choices.
struct resolve_counts {
  index_t kept = 0;
  index_t lost = 0;
};

namespace detail {

inline void check_part(const char* where, const assignment& choices,
                       std::span<const std::uint8_t> owned, std::span<const std::uint8_t> mask) {
  check_choices(where, choices);
  if (!owned.empty())
    check_size(where, "owned.size()", static_cast<index_t>(owned.size()), choices.experts());
  if (!mask.empty())
    check_size(where, "mask.size()", static_cast<index_t>(mask.size()), choices.tokens());
}

// Calls f(choice, expert) for what takes part, in order.
template <class F>
void for_each_part(const assignment& choices, std::span<const std::uint8_t> owned,
                   std::span<const std::uint8_t> mask, F&& f) {
  const expert_id* const id = choices.ids().data();
  const auto part = [&](index_t c) {
    if (id[c] >= 0 && choices.kept(c) &&
        (owned.empty() || owned[static_cast<std::size_t>(id[c])] != 0))
      f(c, index_t{id[c]});
  };
  if (mask.empty()) {
    for (index_t c = 0; c < choices.choices(); ++c) part(c);
    return;
  }
  for (index_t t = 0; t < choices.tokens(); ++t)
    if (mask[static_cast<std::size_t>(t)] != 0)
      for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) part(c);
}

[[noreturn]] MOEROUTE_COLD inline void fail_lost(index_t e, index_t choice) {
  fail("resolve", "choice " + std::to_string(choice) + " is of expert " + std::to_string(e) +
                      ", which has no live slot");
}

[[noreturn]] MOEROUTE_COLD inline void fail_counts(index_t rank, index_t e) {
  fail("resolve", "the counts of rank " + std::to_string(rank) + " for expert " +
                      std::to_string(e) + " are not those of its choices");
}

// Ranges that partition what an expert has, in slots of its own.
inline void check_ranges(const placement& p, const resolve_options& o, index_t e,
                         std::int64_t total) {
  const auto first = o.range_first[static_cast<std::size_t>(e)];
  const auto last = o.range_first[static_cast<std::size_t>(e) + 1];
  std::int64_t at = 0;
  for (std::int32_t i = first; i < last; ++i) {
    const slot_range& r = o.range[static_cast<std::size_t>(i)];
    if (r.slot < 0 || r.slot >= p.slots() ||
        p.expert_of_slot()[static_cast<std::size_t>(r.slot)] != e ||
        p.alive()[static_cast<std::size_t>(p.rank_of_slot()[static_cast<std::size_t>(r.slot)])] ==
            0)
      fail("resolve", "a range of expert " + std::to_string(e) + " names slot " +
                          std::to_string(r.slot) + ", expected a live slot of that expert");
    if (r.begin != at || r.end < r.begin)
      fail("resolve", "the ranges of expert " + std::to_string(e) + " go from " +
                          std::to_string(r.begin) + " to " + std::to_string(r.end) +
                          ", expected to begin at " + std::to_string(at));
    at = r.end;
  }
  if (at != total && p.replicas(e) > 0)
    fail("resolve", "the ranges of expert " + std::to_string(e) + " end at " + std::to_string(at) +
                        ", expected " + std::to_string(total));
}

// What is left of the piece that an expert's next tokens go to: all that most choices look at.
struct replica_piece {
  std::int32_t left = 0;
  slot_id slot = no_slot;
};

// One expert's walk through its pieces.
struct replica_cursor {
  std::int64_t next = 0;   // number of the first token of the piece, or behind it, of all ranks'
  std::int64_t until = 0;  // where the piece ends
  std::int64_t total = 0;
  double prefix = 0.0;
  std::int32_t piece = -1;
  slot_id slot = no_slot;
};

inline void next_piece(const placement& p, const resolve_options& o, index_t rank, index_t e,
                       replica_cursor& c) {
  while (c.next >= c.until) {
    ++c.piece;
    if (o.rule == replica_rule::ranges) {
      const std::int32_t i = o.range_first[static_cast<std::size_t>(e)] + c.piece;
      if (i >= o.range_first[static_cast<std::size_t>(e) + 1]) fail_counts(rank, e);
      c.slot = o.range[static_cast<std::size_t>(i)].slot;
      c.until = o.range[static_cast<std::size_t>(i)].end;
      continue;
    }
    const index_t m = p.replicas(e);
    if (c.piece >= m) fail_counts(rank, e);
    c.slot = p.slots_of_expert(e)[static_cast<std::size_t>(c.piece)];
    if (o.rule == replica_rule::even) {
      c.until = c.total * (c.piece + 1) / m;
    } else {
      c.prefix += p.share()[static_cast<std::size_t>(c.slot)];
      const auto end =
          static_cast<std::int64_t>(std::floor(static_cast<double>(c.total) * c.prefix + 0.5));
      c.until = c.piece + 1 == m ? c.total : std::clamp(end, c.until, c.total);
    }
  }
}

// The next piece for this rank's tokens, which end at `end`; false where the expert has no slot.
// Out of line: few choices come here.
[[nodiscard]] MOEROUTE_OUT_OF_LINE inline bool take_piece(const placement& p,
                                                          const resolve_options& o, index_t rank,
                                                          index_t e, std::int64_t end,
                                                          replica_cursor& walk,
                                                          replica_piece& piece) {
  if (p.replicas(e) == 0) {
    ++walk.next;
    return false;
  }
  next_piece(p, o, rank, e, walk);
  // No further than this rank's tokens: behind them counts do not fit.
  const std::int64_t until = std::min(walk.until, end);
  if (until <= walk.next) fail_counts(rank, e);
  piece = {static_cast<std::int32_t>(until - walk.next), walk.slot};
  walk.next = until;
  return true;
}

// Every expert's slot from here.
inline slot_id nearest_slot(const placement& p, index_t rank, index_t e) {
  const std::span<const slot_id> slots = p.slots_of_expert(e);
  const auto first_slot = [&](auto&& here) {
    index_t n = 0;
    for (const slot_id s : slots) n += here(s) ? 1 : 0;
    if (n == 0) return no_slot;
    index_t pick = rank % n;
    for (const slot_id s : slots)
      if (here(s) && pick-- == 0) return s;
    return no_slot;
  };
  const auto rank_of = [&](slot_id s) { return p.rank_of_slot()[static_cast<std::size_t>(s)]; };
  const auto node_of = [&](index_t r) { return p.node_of_rank()[static_cast<std::size_t>(r)]; };
  if (const slot_id s = first_slot([&](slot_id i) { return rank_of(i) == rank; }); s >= 0) return s;
  if (const slot_id s = first_slot([&](slot_id i) { return node_of(rank_of(i)) == node_of(rank); });
      s >= 0)
    return s;
  return first_slot([](slot_id) { return true; });
}

}  // namespace detail

/// counts[e] = this rank's choices of expert e that take part: a row of resolve_options::counts.
///
/// Shapes: counts [E]. Throws: error where a size or an id does not fit. Cost: O(choices + E).
inline void count_choices(const assignment& choices, std::span<std::int32_t> counts,
                          std::span<const std::uint8_t> owned = {},
                          std::span<const std::uint8_t> mask = {}) {
  detail::check_part("count_choices", choices, owned, mask);
  check_size("count_choices", "counts.size()", static_cast<index_t>(counts.size()),
             choices.experts());
  std::fill(counts.begin(), counts.end(), 0);
  detail::for_each_part(choices, owned, mask,
                        [&](index_t, index_t e) { ++counts[static_cast<std::size_t>(e)]; });
}

/// slot[c] = where choice c of this rank is served: a slot of the placement, or no_slot where the
/// choice takes no part (no expert, dropped, masked, not owned) or its expert is lost and
/// options.lost says drop.
///
/// Shapes: slot [choices]. Ensures: over all ranks with one placement and one table of counts, the
/// rules even, shares and ranges partition each expert's tokens, whatever ranks have.
/// Throws: error where a size, an id, a count or a range does not fit, an expert is lost, or
/// `only` finds several slots. Cost: O(choices + R E), the last only for rules with counts; one
/// scratch array of E. Determinism: exact.
inline resolve_counts resolve(const assignment& choices, const placement& where_experts,
                              index_t rank, const resolve_options& options, workspace& memory,
                              std::span<slot_id> slot) {
  constexpr const char* where = "resolve";
  const placement& p = where_experts;
  const index_t experts = p.experts();
  check_size(where, "choices.experts()", choices.experts(), experts);
  check_range(where, "rank", rank, 0, p.ranks() - 1);
  check_size(where, "slot.size()", static_cast<index_t>(slot.size()), choices.choices());
  detail::check_part(where, choices, options.owned, options.mask);
  const bool counted = options.rule >= replica_rule::even;
  if (counted)
    check_size(where, "counts.size()", static_cast<index_t>(options.counts.size()),
               p.ranks() * experts);
  if (options.rule == replica_rule::ranges) {
    check_size(where, "range_first.size()", static_cast<index_t>(options.range_first.size()),
               experts + 1);
    check_size(where, "range_first[0]", options.range_first[0], 0);
    for (std::size_t e = 0; e < static_cast<std::size_t>(experts); ++e)
      if (options.range_first[e] > options.range_first[e + 1])
        fail(where,
             "range_first falls behind expert " + std::to_string(e) + ", expected to ascend");
    check_size(where, "range.size()", static_cast<index_t>(options.range.size()),
               options.range_first.back());
  }
  resolve_counts found;
  const auto lost = [&](index_t c, index_t e) {
    if (options.lost == lost_expert::error) detail::fail_lost(e, c);
    ++found.lost;
  };

  if (!counted && options.rule != replica_rule::round_robin) {
    slot_id* const of = memory.carve([&](scratch& s) { return s.take<slot_id>(experts + 1); }) + 1;
    of[-1] = no_slot;
    bool all_live = true;
    for (index_t e = 0; e < experts; ++e) {
      if (options.rule == replica_rule::only && p.replicas(e) > 1)
        fail(where, "expert " + std::to_string(e) + " has " + std::to_string(p.replicas(e)) +
                        " live slots, expected one where the rule is only");
      of[e] = p.replicas(e) == 1 ? p.slots_of_expert(e)[0] : detail::nearest_slot(p, rank, e);
      all_live = all_live && of[e] != no_slot;
    }
    if (all_live && options.owned.empty() && options.mask.empty() && !choices.drops()) {
      // Ids were checked: -1 or an expert.
      const expert_id* const id = choices.ids().data();
      for (std::size_t c = 0; c < slot.size(); ++c) {
        slot[c] = of[id[c]];
        found.kept += slot[c] != no_slot ? 1 : 0;
      }
      return found;
    }
    std::fill(slot.begin(), slot.end(), no_slot);
    detail::for_each_part(choices, options.owned, options.mask, [&](index_t c, index_t e) {
      if (of[e] == no_slot) return lost(c, e);
      slot[static_cast<std::size_t>(c)] = of[e];
      ++found.kept;
    });
    return found;
  }

  std::fill(slot.begin(), slot.end(), no_slot);
  if (!counted) {
    std::int32_t* const turn =
        memory.carve([&](scratch& s) { return s.take<std::int32_t>(experts); });
    std::fill_n(turn, experts, 0);
    detail::for_each_part(choices, options.owned, options.mask, [&](index_t c, index_t e) {
      const index_t m = p.replicas(e);
      if (m == 0) return lost(c, e);
      slot[static_cast<std::size_t>(c)] =
          p.slots_of_expert(e)[static_cast<std::size_t>(turn[e]++ % m)];
      ++found.kept;
    });
    return found;
  }

  struct room {
    std::int64_t *before, *total;  // tokens of each expert on ranks before this one, and in all
    detail::replica_cursor* cursor;
    detail::replica_piece* piece;
  };
  const room of = memory.carve([&](scratch& s) {
    return room{s.take<std::int64_t>(experts), s.take<std::int64_t>(experts),
                s.take<detail::replica_cursor>(experts), s.take<detail::replica_piece>(experts)};
  });
  std::fill_n(of.total, experts, std::int64_t{0});
  std::int32_t least = 0;
  for (index_t r = 0; r < p.ranks(); ++r) {
    if (r == rank) std::copy_n(of.total, experts, of.before);
    const std::int32_t* const row = options.counts.data() + r * experts;
    for (index_t e = 0; e < experts; ++e) {
      of.total[e] += row[e];
      least = std::min(least, row[e]);
    }
  }
  if (least < 0) fail_value(where, "counts", index_t{least}, ">= 0");
  if (options.rule == replica_rule::ranges)
    for (index_t e = 0; e < experts; ++e) detail::check_ranges(p, options, e, of.total[e]);
  for (index_t e = 0; e < experts; ++e) {
    of.cursor[e] = {.next = of.before[e], .total = of.total[e]};
    of.piece[e] = {};
  }

  const std::int32_t* const own = options.counts.data() + rank * experts;
  detail::replica_piece* const piece = of.piece;
  const auto has = [&](index_t e) {
    return piece[e].left > 0 ||
           detail::take_piece(p, options, rank, e, of.before[e] + own[e], of.cursor[e], piece[e]);
  };
  if (options.owned.empty() && options.mask.empty() && !choices.drops()) {
    const expert_id* const id = choices.ids().data();
    slot_id* const to = slot.data();
    index_t kept = 0;
    for (index_t c = 0; c < choices.choices(); ++c) {
      const index_t e = id[c];
      if (e < 0) continue;
      if (!has(e)) {
        lost(c, e);
        continue;
      }
      --piece[e].left;
      to[c] = piece[e].slot;
      ++kept;
    }
    found.kept = kept;
  } else {
    detail::for_each_part(choices, options.owned, options.mask, [&](index_t c, index_t e) {
      if (!has(e)) return lost(c, e);
      --piece[e].left;
      slot[static_cast<std::size_t>(c)] = piece[e].slot;
      ++found.kept;
    });
  }
  for (index_t e = 0; e < experts; ++e)
    if (of.cursor[e].next - of.piece[e].left != of.before[e] + own[e]) detail::fail_counts(rank, e);
  return found;
}

}  // namespace moeroute
