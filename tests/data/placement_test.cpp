#include <moeroute/data/placement.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <limits>
#include <string>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace placement_test {

namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class T>
std::vector<T> all(std::span<const T> s) {
  return {s.begin(), s.end()};
}

// The fields, each with memory of its own.
struct drawn {
  index_t experts = 0, ranks = 0, slots = 0, nodes = 0;
  std::vector<std::int32_t> offset{0}, node, rank_of_slot;
  std::vector<expert_id> expert;
  std::vector<std::uint8_t> alive;
  std::vector<double> share;
  bool says_nodes = false, says_alive = false, says_share = false;

  placement_fields fields() const {
    placement_fields f{.experts = experts, .slot_offset = offset, .expert_of_slot = expert};
    if (says_nodes) f.node_of_rank = node;
    if (says_alive) f.alive = alive;
    if (says_share) f.share = share;
    return f;
  }
  bool live(index_t s, index_t e) const {
    const auto i = static_cast<std::size_t>(s);
    return expert[i] == e && alive[static_cast<std::size_t>(rank_of_slot[i])] != 0;
  }
  std::vector<slot_id> slots_of(index_t e) const {
    std::vector<slot_id> list;
    for (index_t s = 0; s < slots; ++s)
      if (live(s, e)) list.push_back(static_cast<slot_id>(s));
    return list;
  }
};

// Ranks of 0 to 4 slots, empty slots, nodes, dead ranks, shares in sixteenths: any of them at once.
drawn draw(test::random& rng) {
  drawn d;
  d.experts = 1 + rng.below(6);
  d.ranks = 1 + rng.below(5);
  d.nodes = 1 + rng.below(d.ranks);
  d.says_nodes = rng.below(3) > 0;
  d.says_alive = rng.below(2) > 0;
  d.says_share = rng.below(2) > 0;
  if (!d.says_nodes) d.nodes = 1;
  for (index_t r = 0; r < d.ranks; ++r) {
    for (index_t s = rng.below(5); s > 0; --s) {
      d.expert.push_back(static_cast<expert_id>(rng.below(d.experts + 1) - 1));
      d.rank_of_slot.push_back(static_cast<std::int32_t>(r));
    }
    d.offset.push_back(static_cast<std::int32_t>(d.expert.size()));
    d.node.push_back(static_cast<std::int32_t>(r < d.nodes ? r : rng.below(d.nodes)));
    d.alive.push_back(!d.says_alive || rng.below(4) > 0);
  }
  std::reverse(d.node.begin(), d.node.end());  // the last node is not always behind
  d.slots = d.offset.back();
  d.share.assign(static_cast<std::size_t>(d.slots), d.says_share ? nan : 0.0);
  for (index_t e = 0; e < d.experts; ++e) {
    const std::vector<slot_id> list = d.slots_of(e);
    index_t left = 16;
    for (std::size_t i = 0; i < list.size(); ++i) {
      const index_t part = i + 1 == list.size() ? left : rng.below(left + 1);
      left -= part;
      d.share[static_cast<std::size_t>(list[i])] =
          d.says_share ? static_cast<double>(part) / 16.0 : 1.0 / static_cast<double>(list.size());
    }
  }
  return d;
}

}  // namespace

TEST_CASE("a placement tells of its slots, ranks, nodes and replicas what plain loops do") {
  test::random rng(9);
  std::vector<std::uint64_t> hashes;
  std::vector<placement> drawn_before;
  for (int turn = 0; turn < 300; ++turn) {
    const drawn d = draw(rng);
    INFO("turn " << turn << ": " << d.experts << " experts, " << d.ranks << " ranks, " << d.slots
                 << " slots");
    const placement p(d.fields());
    CHECK((p.experts() == d.experts && p.ranks() == d.ranks && p.nodes() == d.nodes &&
           p.slots() == d.slots));
    CHECK((all(p.slot_offset()) == d.offset && all(p.expert_of_slot()) == d.expert &&
           all(p.rank_of_slot()) == d.rank_of_slot && all(p.alive()) == d.alive));
    CHECK(all(p.node_of_rank()) ==
          (d.says_nodes ? d.node : std::vector<std::int32_t>(d.node.size(), 0)));
    for (index_t r = 0; r < d.ranks; ++r) {
      std::vector<expert_id> held;
      for (index_t s = 0; s < d.slots; ++s)
        if (d.rank_of_slot[static_cast<std::size_t>(s)] == r)
          held.push_back(d.expert[static_cast<std::size_t>(s)]);
      CHECK(p.slots(r) == static_cast<index_t>(held.size()));
      CHECK(p.first_slot(r) == d.offset[static_cast<std::size_t>(r)]);
      CHECK(all(p.experts_of_rank(r)) == held);
    }
    std::vector<expert_id> lost;
    std::vector<slot_id> twice;
    std::vector<double> share(static_cast<std::size_t>(d.slots), 0.0);
    const eplb_arrays arrays = export_eplb_arrays(p);
    CHECK((arrays.phy2log == d.expert &&
           arrays.logcnt.size() == static_cast<std::size_t>(d.experts)));
    index_t most = 0;
    for (index_t e = 0; e < d.experts; ++e)
      most = std::max(most, static_cast<index_t>(d.slots_of(e).size()));
    CHECK((arrays.most == most &&
           arrays.log2phy.size() == static_cast<std::size_t>(d.experts * most)));
    for (index_t e = 0; e < d.experts; ++e) {
      const std::vector<slot_id> list = d.slots_of(e);
      CHECK((all(p.slots_of_expert(e)) == list &&
             p.replicas(e) == static_cast<index_t>(list.size()) &&
             arrays.logcnt[static_cast<std::size_t>(e)] == p.replicas(e)));
      if (list.empty()) lost.push_back(static_cast<expert_id>(e));
      for (const slot_id s : list) {
        share[static_cast<std::size_t>(s)] = d.share[static_cast<std::size_t>(s)];
        for (const slot_id below : list)
          if (below < s && d.rank_of_slot[static_cast<std::size_t>(below)] ==
                               d.rank_of_slot[static_cast<std::size_t>(s)]) {
            twice.push_back(s);
            break;
          }
      }
      std::vector<slot_id> padded = list;
      padded.resize(static_cast<std::size_t>(most), no_slot);
      CHECK(std::equal(padded.begin(), padded.end(), arrays.log2phy.begin() + e * most));
    }
    std::sort(twice.begin(), twice.end());
    CHECK((p.lost() == lost && p.duplicates() == twice && all(p.share()) == share));
    std::string ids;
    for (const expert_id e : lost) ids += (ids.empty() ? "" : ", ") + std::to_string(e);
    CHECK(test::refusal([&] { p.check_hosted("somebody"); }) ==
          (lost.empty() ? "accepted"
                        : "moeroute::somebody: " + std::to_string(lost.size()) +
                              " experts have no live slot: " + ids));
    const placement again(d.fields());
    CHECK((p == again && p.hash() == again.hash()));
    for (std::size_t i = 0; i < hashes.size(); ++i)
      if ((p == drawn_before[i]) != (p.hash() == hashes[i])) FAIL("turn " << i);
    hashes.push_back(p.hash());
    drawn_before.push_back(p);
  }
}

TEST_CASE("a placement of nothing, and pieces of nothing, are empty") {
  const placement none;
  CHECK((none.experts() == 0 && none.ranks() == 0 && none.nodes() == 0 && none.slots() == 0));
  CHECK((none.slot_offset().size() == 1 && none.slot_offset()[0] == 0 && none.hash() == 0));
  CHECK((none.lost().empty() && none.duplicates().empty()));
  CHECK(export_eplb_arrays(none).most == 0);
  CHECK(slot_range{} == slot_range{.slot = -1, .begin = 0, .end = 0});
  CHECK(placement_fields{}.experts == 0);
}

TEST_CASE("experts stand on ranks in order, in turn, or in so many slots each") {
  for (index_t experts = 1; experts <= 17; ++experts)
    for (index_t ranks = 1; ranks <= 19; ++ranks) {
      INFO(experts << " experts, " << ranks << " ranks");
      const placement order = placement::contiguous(experts, ranks);
      const placement turn = placement::round_robin(experts, ranks);
      index_t wrong = 0, fewest = experts, most = 0;
      for (const placement* p : {&order, &turn}) {
        wrong += p->experts() != experts || p->ranks() != ranks || p->slots() != experts;
        wrong += p->nodes() != 1 || !p->lost().empty() || !p->duplicates().empty();
        for (const std::uint8_t lives : p->alive()) wrong += lives != 1;
        for (const double part : p->share()) wrong += part != 1.0;
      }
      for (index_t e = 0; e < experts; ++e) {
        const auto rank = [&](const placement& p) {
          return index_t{p.rank_of_slot()[static_cast<std::size_t>(p.slots_of_expert(e)[0])]};
        };
        wrong += order.slots_of_expert(e)[0] != e || rank(order) != e * ranks / experts;
        wrong += rank(turn) != e % ranks;
      }
      for (index_t r = 0; r < ranks; ++r) {
        fewest = std::min(fewest, order.slots(r));
        most = std::max(most, order.slots(r));
        const std::span<const expert_id> held = turn.experts_of_rank(r);
        wrong += !std::is_sorted(held.begin(), held.end());
      }
      CHECK((wrong == 0 && fewest == experts / ranks && most == (experts + ranks - 1) / ranks));
    }
  const expert_id slots[] = {2, 0, 1, 1, -1, 2};
  const std::int32_t nodes[] = {1, 0, 1};
  const std::uint8_t alive[] = {1, 0, 1};
  const placement p = placement::from_slots(4, 3, slots, nodes, alive);
  CHECK((p.experts() == 4 && p.ranks() == 3 && p.nodes() == 2));
  CHECK(all(p.slot_offset()) == std::vector<std::int32_t>{0, 2, 4, 6});
  CHECK((std::ranges::equal(p.expert_of_slot(), slots) && std::ranges::equal(p.alive(), alive) &&
         std::ranges::equal(p.node_of_rank(), nodes)));
  CHECK(p.lost() == std::vector<expert_id>{1, 3});
  const placement plain = placement::from_slots(4, 3, slots);
  CHECK((plain.nodes() == 1 && plain.lost() == std::vector<expert_id>{3}));
  CHECK(plain.duplicates() == std::vector<slot_id>{3});
  CHECK(placement::from_slots(4, 3, {}).slots() == 0);
  CHECK(test::refusal([&] { placement::from_slots(4, 4, slots); }) ==
        "moeroute::placement: 6 slots on 4 ranks, expected a multiple of the ranks");
}

TEST_CASE("placements differ, and so do their hashes, where any field does") {
  const std::int32_t offset[] = {0, 2, 4, 5}, other_offset[] = {0, 1, 4, 5};
  const expert_id expert[] = {0, 1, 1, 0, -1}, other_expert[] = {1, 0, 0, 1, -1};
  const std::int32_t node[] = {0, 1, 0}, other_node[] = {1, 0, 0};
  const std::uint8_t alive[] = {1, 1, 0}, other_alive[] = {1, 1, 1};
  const double share[] = {0.25, 0.5, 0.5, 0.75, 0.0}, other_share[] = {0.75, 0.5, 0.5, 0.25, 0.0};
  const placement_fields f{.experts = 2,
                           .slot_offset = offset,
                           .expert_of_slot = expert,
                           .node_of_rank = node,
                           .alive = alive,
                           .share = share};
  std::vector<placement_fields> list(7, f);
  list[1].experts = 3;
  list[2].slot_offset = other_offset;
  list[3].expert_of_slot = other_expert;
  list[4].node_of_rank = other_node;
  list[5].alive = other_alive;
  list[6].share = other_share;
  for (std::size_t i = 0; i < list.size(); ++i)
    for (std::size_t j = 0; j < list.size(); ++j) {
      const placement a(list[i]), b(list[j]);
      INFO(i << " and " << j);
      CHECK((a == b) == (i == j));
      CHECK((a.hash() == b.hash()) == (i == j));
    }
  // The same on every machine.
  CHECK(placement(f).hash() == 0x5dff133493e2955u);
}

TEST_CASE("lost experts are named, sixteen at most") {
  const std::int32_t offset[] = {0, 1};
  const auto said = [&](index_t experts, expert_id held) {
    const expert_id expert[] = {held};
    const placement p({.experts = experts, .slot_offset = offset, .expert_of_slot = expert});
    return test::refusal([&] { p.check_hosted("room"); });
  };
  CHECK(said(1, 0) == "accepted");
  CHECK(said(2, 0) == "moeroute::room: 1 experts have no live slot: 1");
  CHECK(said(17, 0) ==
        "moeroute::room: 16 experts have no live slot: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, "
        "14, 15, 16");
  CHECK(said(18, 17) ==
        "moeroute::room: 17 experts have no live slot: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, "
        "13, 14, 15, ...");
}

TEST_CASE("a placement refuses what does not fit, and takes both ends of what does") {
  using offsets = std::vector<std::int32_t>;
  const auto said = [](index_t experts, const offsets& offset, const std::vector<expert_id>& expert,
                       const offsets& node = {}, const std::vector<std::uint8_t>& alive = {},
                       const std::vector<double>& share = {}) {
    const std::string text = test::refusal([&] {
      const placement p({.experts = experts,
                         .slot_offset = offset,
                         .expert_of_slot = expert,
                         .node_of_rank = node,
                         .alive = alive,
                         .share = share});
    });
    const std::string front = "moeroute::placement: ";
    return text.starts_with(front) ? text.substr(front.size()) : text;
  };
  CHECK(said(0, {0, 1}, {0}) == "experts is 0, expected 1 to 1048576");
  CHECK(said(1048577, {0, 1}, {0}) == "experts is 1048577, expected 1 to 1048576");
  CHECK(said(1048576, {0, 1}, {1048575}) == "accepted");
  CHECK(said(1, {}, {}) == "ranks is -1, expected 1 to 1048576");
  CHECK(said(1, {0}, {}) == "ranks is 0, expected 1 to 1048576");
  CHECK(said(1, {0, 0}, {}) == "accepted");
  CHECK(said(1, offsets(1048577, 0), {}) == "accepted");
  CHECK(said(1, offsets(1048578, 0), {}) == "ranks is 1048577, expected 1 to 1048576");
  CHECK(said(2, {1, 2}, {0, 1}) == "slot_offset[0] is 1, expected 0");
  CHECK(said(2, {0, 1}, {0, 1}) == "slot_offset[R] is 1, expected 2");
  CHECK(said(2, {0, 2, 1, 2}, {0, 1}) == "slot_offset falls behind rank 1, expected to ascend");
  CHECK(said(2, {0, 3, 2}, {0, 1}) == "slot_offset falls behind rank 1, expected to ascend");
  CHECK(said(2, {0, -1, 2}, {0, 1}) == "slot_offset falls behind rank 0, expected to ascend");
  CHECK(said(2, {0, 0, 2, 2}, {0, 1}) == "accepted");
  CHECK(said(2, {0, 2}, {-1, 1}) == "accepted");
  CHECK(said(2, {0, 2}, {-2, 1}) == "the expert of slot 0 is -2, expected -1 to 1");
  CHECK(said(2, {0, 2}, {1, 2}) == "the expert of slot 1 is 2, expected -1 to 1");
  CHECK(said(2, {0, 2}, {1, 0}, {0, 0}) == "node_of_rank.size() is 2, expected 1");
  CHECK(said(2, {0, 2}, {1, 0}, {}, {1, 1}) == "alive.size() is 2, expected 1");
  CHECK(said(2, {0, 2}, {1, 0}, {}, {}, {1.0}) == "share.size() is 1, expected 2");
  CHECK(said(1, {0, 1, 1}, {0}, {0}) == "node_of_rank.size() is 1, expected 2");
  CHECK(said(1, {0, 1, 1}, {0}, {0, -1}) == "node_of_rank is -1, expected 0 to 1");
  CHECK(said(1, {0, 1, 1}, {0}, {2, 0}) == "node_of_rank is 2, expected 0 to 1");
  CHECK(said(1, {0, 1, 1}, {0}, {1, 0}) == "accepted");
  CHECK(said(1, {0, 1, 1}, {0}, {1, 1}) == "node 0 has no rank, expected numbers without a gap");
  CHECK(said(1, {0, 1, 1, 1}, {0}, {2, 0, 0}) ==
        "node 1 has no rank, expected numbers without a gap");
  CHECK(said(1, {0, 1, 1}, {0}, {}, {1, 2}) == "alive is 2, expected 0 to 1");
  CHECK(said(1, {0, 1, 1}, {0}, {}, {0, 0}) == "accepted");

  const auto shares = [&](const std::vector<double>& share,
                          const std::vector<std::uint8_t>& a = {}) {
    return said(1, {0, 1, 3}, {0, 0, -1}, {}, a, share);
  };
  CHECK(shares({0.0, 1.0, 0.0}) == "accepted");
  CHECK(shares({1.0 + 0.5e-9, 0.0, nan}) == "accepted");
  CHECK(shares({1.0 + 2e-9, 0.0, 0.0}) == "share is 1.000000, expected 0 to 1");
  CHECK(shares({-0.25, 1.0, 0.0}) == "share is -0.250000, expected 0 to 1");
  CHECK(shares({1.0, -1e-12, 0.0}) == "share is -0.000000, expected 0 to 1");
  CHECK(shares({nan, 1.0, 0.0}) == "share is nan, expected 0 to 1");
  CHECK(shares({0.5, std::numeric_limits<double>::infinity(), 0.0}) ==
        "share is inf, expected 0 to 1");
  CHECK(shares({0.5, 0.4999995, 0.0}) == "accepted");
  CHECK(shares({0.5, 0.5000005, 0.0}) == "accepted");
  CHECK(shares({0.5, 0.499998, 0.0}) == "the shares of expert 0 sum to 0.999998, expected 1");
  CHECK(shares({0.5, 0.500002, 0.0}) == "the shares of expert 0 sum to 1.000002, expected 1");
  CHECK(shares({1.0, 7.0, 0.0}, {1, 0}) == "accepted");  // who is dead takes none
  CHECK(shares({1.0, 0.0, 0.0}, {0, 1}) == "the shares of expert 0 sum to 0.000000, expected 1");

  // Nothing of so many slots is read before their number and the offsets are.
  const std::int32_t one_rank[] = {0, 1};
  const expert_id id = 0;
  const auto many = [&](std::size_t slots) {
    return test::refusal([&] {
      const placement p({.experts = 1, .slot_offset = one_rank, .expert_of_slot = {&id, slots}});
    });
  };
  if constexpr (sizeof(std::size_t) > 4)
    CHECK(many(0x80000000u) ==
          "moeroute::placement: slots is 2147483648, expected 0 to 2147483647");
  CHECK(many(0x7fffffffu) == "moeroute::placement: slot_offset[R] is 1, expected 2147483647");

  for (const bool in_order : {true, false}) {
    const auto make = [&](index_t experts, index_t ranks) {
      return test::refusal([&] {
        in_order ? placement::contiguous(experts, ranks) : placement::round_robin(experts, ranks);
      });
    };
    CHECK(make(0, 1) == "moeroute::placement: experts is 0, expected 1 to 1048576");
    CHECK(make(1048577, 1) == "moeroute::placement: experts is 1048577, expected 1 to 1048576");
    CHECK(make(-1, 1) == "moeroute::placement: experts is -1, expected 1 to 1048576");
    CHECK(make(1, 0) == "moeroute::placement: ranks is 0, expected 1 to 1048576");
    CHECK(make(1, -1) == "moeroute::placement: ranks is -1, expected 1 to 1048576");
    CHECK(make(1, 1048577) == "moeroute::placement: ranks is 1048577, expected 1 to 1048576");
  }
  CHECK(test::refusal([] { placement::from_slots(0, 1, {}); }) ==
        "moeroute::placement: experts is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { placement::from_slots(1, 0, {}); }) ==
        "moeroute::placement: ranks is 0, expected 1 to 1048576");
}

}  // namespace placement_test
