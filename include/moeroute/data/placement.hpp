// Where experts live: the slots of every rank, which expert is in each, which ranks share a node.
// Holds and checks, decides nothing.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// Most ranks that a placement may have.
inline constexpr index_t max_ranks = index_t{1} << 20;

/// What a placement is made of; what is empty has the value that its comment names.
struct placement_fields {
  index_t experts = 0;
  /// [R + 1], first slot of every rank: ranks may have different numbers of slots, also none.
  std::span<const std::int32_t> slot_offset{};
  /// [P], the expert in each slot, no_expert where a slot is empty.
  std::span<const expert_id> expert_of_slot{};
  /// [R], numbers from 0 without a gap; empty: one node.
  std::span<const std::int32_t> node_of_rank{};
  /// [R], 0: the rank serves no expert (it may still have tokens); empty: all serve.
  std::span<const std::uint8_t> alive{};
  /// [P], the part of its expert's tokens that each slot is to take; those of an expert's live
  /// slots sum to 1. Empty: equal parts.
  std::span<const double> share{};
};

/// One layer's placement of E experts in the P slots of R ranks; an expert in several slots has
/// replicas.
///
/// A slot is live where its rank is alive. An expert without a live slot is lost: that is a
/// question (lost()), not an error. Two slots of a rank with one expert are duplicates: legal, but
/// weights must then be copied within the rank.
class placement {
 public:
  placement() = default;

  /// Throws: error where a size is outside its range, slot offsets do not ascend from 0, an id is
  /// outside [-1, E), node numbers have a gap, a flag is not 0 or 1, or shares are negative, not
  /// finite or do not sum to 1 over an expert's live slots. Cost: O(P + E + R).
  explicit placement(const placement_fields& f) { assign(f); }

  /// Expert e on rank e R / E, in order: every rank has E / R of them, or one more.
  static placement contiguous(index_t experts, index_t ranks) {
    check_counts(experts, ranks);
    std::vector<std::int32_t> offset(static_cast<std::size_t>(ranks) + 1);
    std::vector<expert_id> id(static_cast<std::size_t>(experts));
    for (index_t e = 0; e < experts; ++e) {
      id[static_cast<std::size_t>(e)] = static_cast<expert_id>(e);
      ++offset[static_cast<std::size_t>(e * ranks / experts) + 1];
    }
    for (std::size_t r = 1; r < offset.size(); ++r) offset[r] += offset[r - 1];
    return placement({.experts = experts, .slot_offset = offset, .expert_of_slot = id});
  }

  /// Expert e on rank e mod R.
  static placement round_robin(index_t experts, index_t ranks) {
    check_counts(experts, ranks);
    std::vector<std::int32_t> offset{0};
    std::vector<expert_id> id;
    for (index_t r = 0; r < ranks; ++r) {
      for (index_t e = r; e < experts; e += ranks) id.push_back(static_cast<expert_id>(e));
      offset.push_back(static_cast<std::int32_t>(id.size()));
    }
    return placement({.experts = experts, .slot_offset = offset, .expert_of_slot = id});
  }

  /// The same number of slots on every rank.
  ///
  /// Throws: error where the slots do not divide by the ranks, or as the constructor.
  static placement from_slots(index_t experts, index_t ranks, std::span<const expert_id> slots,
                              std::span<const std::int32_t> node_of_rank = {},
                              std::span<const std::uint8_t> alive = {}) {
    check_counts(experts, ranks);
    const auto n = static_cast<index_t>(slots.size());
    if (n % ranks != 0)
      fail("placement", std::to_string(n) + " slots on " + std::to_string(ranks) +
                            " ranks, expected a multiple of the ranks");
    std::vector<std::int32_t> offset;
    for (index_t r = 0; r <= ranks; ++r)
      offset.push_back(static_cast<std::int32_t>(r * (n / ranks)));
    return placement({.experts = experts,
                      .slot_offset = offset,
                      .expert_of_slot = slots,
                      .node_of_rank = node_of_rank,
                      .alive = alive});
  }

  index_t experts() const { return experts_; }
  index_t ranks() const { return static_cast<index_t>(node_of_rank_.size()); }
  index_t nodes() const { return nodes_; }
  index_t slots() const { return static_cast<index_t>(expert_of_slot_.size()); }
  /// Slots of one rank.
  index_t slots(index_t rank) const { return slot_offset_[at(rank) + 1] - slot_offset_[at(rank)]; }
  index_t first_slot(index_t rank) const { return slot_offset_[at(rank)]; }

  std::span<const std::int32_t> slot_offset() const { return slot_offset_; }
  std::span<const expert_id> expert_of_slot() const { return expert_of_slot_; }
  std::span<const std::int32_t> rank_of_slot() const { return rank_of_slot_; }
  std::span<const std::int32_t> node_of_rank() const { return node_of_rank_; }
  std::span<const std::uint8_t> alive() const { return alive_; }
  std::span<const double> share() const { return share_; }
  /// One rank's experts, slot by slot.
  std::span<const expert_id> experts_of_rank(index_t rank) const {
    return expert_of_slot().subspan(static_cast<std::size_t>(first_slot(rank)),
                                    static_cast<std::size_t>(slots(rank)));
  }

  /// The live slots of an expert, ascending.
  std::span<const slot_id> slots_of_expert(index_t e) const {
    const auto begin = static_cast<std::size_t>(first_[at(e)]);
    return std::span<const slot_id>(slot_of_expert_)
        .subspan(begin, static_cast<std::size_t>(replicas(e)));
  }
  index_t replicas(index_t e) const { return first_[at(e) + 1] - first_[at(e)]; }

  /// Experts without a live slot, ascending.
  std::vector<expert_id> lost() const {
    std::vector<expert_id> list;
    for (index_t e = 0; e < experts_; ++e)
      if (replicas(e) == 0) list.push_back(static_cast<expert_id>(e));
    return list;
  }
  /// Live slots whose rank holds their expert in a lower slot already.
  std::vector<slot_id> duplicates() const {
    std::vector<slot_id> list;
    for (index_t e = 0; e < experts_; ++e) {
      const std::span<const slot_id> s = slots_of_expert(e);
      for (std::size_t i = 1; i < s.size(); ++i)
        if (rank_of_slot_[at(s[i])] == rank_of_slot_[at(s[i - 1])]) list.push_back(s[i]);
    }
    std::sort(list.begin(), list.end());
    return list;
  }

  /// Throws: error that lists the lost experts, if there are any.
  void check_hosted(const char* where) const {
    const std::vector<expert_id> list = lost();
    if (list.empty()) return;
    std::string ids;
    for (std::size_t i = 0; i < list.size() && i < 16; ++i)
      ids += (i == 0 ? "" : ", ") + std::to_string(list[i]);
    fail(where, std::to_string(list.size()) + " experts have no live slot: " + ids +
                    (list.size() > 16 ? ", ..." : ""));
  }

  /// A number that differs where any field does: ranks that hold different placements tell by it.
  std::uint64_t hash() const { return hash_; }

  bool operator==(const placement&) const = default;

 private:
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

  static void check_counts(index_t experts, index_t ranks) {
    check_range("placement", "experts", experts, 1, max_experts);
    check_range("placement", "ranks", ranks, 1, max_ranks);
  }

  void assign(const placement_fields& f) {
    constexpr const char* where = "placement";
    const auto ranks = static_cast<index_t>(f.slot_offset.size()) - 1;
    check_counts(f.experts, ranks);
    const auto slots = static_cast<index_t>(f.expert_of_slot.size());
    check_range(where, "slots", slots, 0, std::int32_t{0x7fffffff});
    check_size(where, "slot_offset[0]", f.slot_offset[0], 0);
    check_size(where, "slot_offset[R]", f.slot_offset[at(ranks)], slots);
    for (index_t r = 0; r < ranks; ++r)
      if (f.slot_offset[at(r)] > f.slot_offset[at(r) + 1])
        fail(where, "slot_offset falls behind rank " + std::to_string(r) + ", expected to ascend");
    for (index_t s = 0; s < slots; ++s)
      if (f.expert_of_slot[at(s)] < no_expert || f.expert_of_slot[at(s)] >= f.experts)
        fail(where, "the expert of slot " + std::to_string(s) + " is " +
                        std::to_string(f.expert_of_slot[at(s)]) + ", expected -1 to " +
                        std::to_string(f.experts - 1));
    if (!f.node_of_rank.empty())
      check_size(where, "node_of_rank.size()", static_cast<index_t>(f.node_of_rank.size()), ranks);
    if (!f.alive.empty())
      check_size(where, "alive.size()", static_cast<index_t>(f.alive.size()), ranks);
    if (!f.share.empty())
      check_size(where, "share.size()", static_cast<index_t>(f.share.size()), slots);

    experts_ = f.experts;
    slot_offset_.assign(f.slot_offset.begin(), f.slot_offset.end());
    expert_of_slot_.assign(f.expert_of_slot.begin(), f.expert_of_slot.end());
    node_of_rank_.assign(at(ranks), 0);
    if (!f.node_of_rank.empty())
      std::copy(f.node_of_rank.begin(), f.node_of_rank.end(), node_of_rank_.begin());
    alive_.assign(at(ranks), 1);
    for (std::size_t r = 0; r < f.alive.size(); ++r) {
      check_range(where, "alive", f.alive[r], 0, 1);
      alive_[r] = f.alive[r];
    }
    std::vector<std::uint8_t> seen(at(ranks), 0);
    nodes_ = 0;
    for (const std::int32_t n : node_of_rank_) {
      check_range(where, "node_of_rank", n, 0, ranks - 1);
      seen[at(n)] = 1;
      nodes_ = std::max<index_t>(nodes_, n + 1);
    }
    for (index_t n = 0; n < nodes_; ++n)
      if (seen[at(n)] == 0)
        fail(where, "node " + std::to_string(n) + " has no rank, expected numbers without a gap");

    rank_of_slot_.resize(at(slots));
    for (index_t r = 0; r < ranks; ++r)
      std::fill(rank_of_slot_.begin() + slot_offset_[at(r)],
                rank_of_slot_.begin() + slot_offset_[at(r) + 1], static_cast<std::int32_t>(r));
    first_.assign(at(experts_) + 1, 0);
    const auto live = [&](index_t s) {
      return expert_of_slot_[at(s)] >= 0 && alive_[at(rank_of_slot_[at(s)])] != 0;
    };
    for (index_t s = 0; s < slots; ++s)
      if (live(s)) ++first_[at(expert_of_slot_[at(s)]) + 1];
    for (std::size_t e = 1; e < first_.size(); ++e) first_[e] += first_[e - 1];
    slot_of_expert_.resize(at(first_.back()));
    std::vector<std::int32_t> next(first_.begin(), first_.end() - 1);
    for (index_t s = 0; s < slots; ++s)
      if (live(s))
        slot_of_expert_[at(next[at(expert_of_slot_[at(s)])]++)] = static_cast<slot_id>(s);

    share_.assign(at(slots), 0.0);
    for (index_t e = 0; e < experts_; ++e) {
      double sum = 0.0;
      for (const slot_id s : slots_of_expert(e)) {
        const double v = f.share.empty() ? 1.0 / static_cast<double>(replicas(e)) : f.share[at(s)];
        if (!(v >= 0.0 && v <= 1.0 + 1e-9)) fail_value(where, "share", v, "0 to 1");
        share_[at(s)] = v;
        sum += v;
      }
      if (replicas(e) > 0 && std::abs(sum - 1.0) > 1e-6)
        fail(where, "the shares of expert " + std::to_string(e) + " sum to " + std::to_string(sum) +
                        ", expected 1");
    }
    hash_ = make_hash();
  }

  std::uint64_t make_hash() const {
    std::uint64_t h = 0x9e3779b97f4a7c15u;
    const auto mix = [&h](std::uint64_t v) {
      h = (h ^ v) * 0xbf58476d1ce4e5b9u;
      h ^= h >> 29;
    };
    mix(static_cast<std::uint64_t>(experts_));
    mix(static_cast<std::uint64_t>(ranks()));
    for (const auto v : slot_offset_) mix(static_cast<std::uint64_t>(v));
    for (const auto v : expert_of_slot_) mix(static_cast<std::uint64_t>(v));
    for (const auto v : node_of_rank_) mix(static_cast<std::uint64_t>(v));
    for (const auto v : alive_) mix(v);
    for (const auto v : share_) mix(std::bit_cast<std::uint64_t>(v));
    return h;
  }

  index_t experts_ = 0;
  index_t nodes_ = 0;
  std::uint64_t hash_ = 0;
  std::vector<std::int32_t> slot_offset_{0};
  std::vector<expert_id> expert_of_slot_;
  std::vector<std::int32_t> rank_of_slot_;
  std::vector<std::int32_t> node_of_rank_;
  std::vector<std::uint8_t> alive_;
  std::vector<double> share_;
  std::vector<std::int32_t> first_;
  std::vector<slot_id> slot_of_expert_;
};

/// A placement in the three arrays of EPLB: the expert of every slot, every expert's slots padded
/// with -1, and their number.
struct eplb_arrays {
  std::vector<expert_id> phy2log;
  std::vector<slot_id> log2phy;  ///< [E, most]
  std::vector<std::int32_t> logcnt;
  index_t most = 0;  ///< slots of the expert that has most
};

/// Source: EPLB (rebalance_experts).
inline eplb_arrays export_eplb_arrays(const placement& p) {
  eplb_arrays out;
  for (index_t e = 0; e < p.experts(); ++e) {
    out.logcnt.push_back(static_cast<std::int32_t>(p.replicas(e)));
    out.most = std::max(out.most, p.replicas(e));
  }
  out.phy2log.assign(p.expert_of_slot().begin(), p.expert_of_slot().end());
  out.log2phy.assign(static_cast<std::size_t>(p.experts() * out.most), no_slot);
  for (index_t e = 0; e < p.experts(); ++e)
    std::copy(p.slots_of_expert(e).begin(), p.slots_of_expert(e).end(),
              out.log2phy.begin() + e * out.most);
  return out;
}

/// One consecutive piece of an expert's tokens, in the order of all ranks' tokens.
struct slot_range {
  slot_id slot = no_slot;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  bool operator==(const slot_range&) const = default;
};

/// Each expert's tokens cut into pieces: expert e has [first[e], first[e + 1]), which follow one
/// another from 0.
struct slot_ranges {
  std::vector<std::int32_t> first;  ///< [E + 1]
  std::vector<slot_range> range;
};

}  // namespace moeroute
