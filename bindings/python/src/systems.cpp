// Caches of experts and placements: what of the library needs none of its kernels.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/data/expert_cache.hpp>
#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/exact_balance.hpp>
#include <moeroute/placement/failover.hpp>
#include <moeroute/placement/replan.hpp>
#include <moeroute/placement/search.hpp>
#include <moeroute/placement/spill.hpp>

#include "python.hpp"

using namespace moeroute_python;
using moeroute::expert_cache;
using moeroute::expert_id;
using moeroute::index_t;
using moeroute::no_expert;
using moeroute::placement;

namespace {

// ---- lists --------------------------------------------------------------------------------------

template <class To, class From>
bool copied(const read_array& array, std::vector<To>& out) {
  if (array.dtype() != nb::dtype<From>()) return false;
  const auto* const values = static_cast<const From*>(array.data());
  const auto n = static_cast<std::int64_t>(array.shape(0));
  for (std::int64_t i = 0; i < n; ++i)
    out.push_back(static_cast<To>(values[n > 1 ? i * array.stride(0) : i]));
  return true;
}

// The values of one axis in any of some kinds: copied, since others may write while a plan is made.
template <class To, class... From>
std::vector<To> values_of(const char* where, const char* name, const char* kinds,
                          nb::handle object) {
  const read_array array = array_of(where, name, object);
  if (array.ndim() != 1)
    refuse(std::string("moeroute::") + where + ": " + name + " has " +
           std::to_string(array.ndim()) + " axes, expected 1");
  std::vector<To> out;
  out.reserve(array.shape(0));
  if (!(copied<To, From>(array, out) || ...))
    refuse(std::string("moeroute::") + where + ": " + name +
           " has elements of another kind, expected " + kinds);
  return out;
}

// Empty where it is None.
template <class To, class... From>
std::vector<To> optional_values(const char* where, const char* name, const char* kinds,
                                nb::handle object) {
  if (object.is_none()) return {};
  return values_of<To, From...>(where, name, kinds, object);
}

std::vector<double> loads_of(const char* where, nb::handle object) {
  return values_of<double, double, float, std::int64_t, std::int32_t>(
      where, "loads", "float64, float32, int64 or int32", object);
}
std::vector<std::int64_t> counts_of(const char* where, nb::handle object) {
  return values_of<std::int64_t, std::int64_t, std::int32_t>(where, "counts", "int64 or int32",
                                                             object);
}
std::vector<std::int32_t> nodes_of(const char* where, nb::handle object) {
  return optional_values<std::int32_t, std::int32_t, std::int64_t>(where, "node_of_rank",
                                                                   "int32 or int64", object);
}
std::vector<std::uint8_t> flags_of(const char* where, nb::handle object) {
  return optional_values<std::uint8_t, bool, std::uint8_t>(where, "alive", "bool or uint8", object);
}

// All of an int32 array, whatever its axes.
std::vector<expert_id> ids_of(const char* where, nb::handle object) {
  const read_array array = array_of(where, "ids", object);
  const std::span<const expert_id> ids = list_of<expert_id>(where, "ids", "int32", array);
  return {ids.begin(), ids.end()};
}

template <class T>
nb::object copy_of(std::span<const T> values) {
  return list_array(values.data(), std::ssize(values));
}

// ---- caches -------------------------------------------------------------------------------------

moeroute::cache_policy policy_of(const char* where, const std::string& name) {
  return static_cast<moeroute::cache_policy>(
      word(where, "policy", name,
           {"lru", "lfu", "fifo", "segmented", "least_stale", "cost_aware", "segment", "belady"}));
}

std::unique_ptr<expert_cache> new_cache(index_t layers, index_t experts, index_t capacity,
                                        const std::string& policy, nb::object pinned,
                                        nb::object bytes, double decay, double protected_share) {
  constexpr const char* where = "ExpertCache";
  const auto pins = optional_values<std::int32_t, std::int32_t>(where, "pinned", "int32", pinned);
  std::vector<std::int64_t> sizes;
  if (!bytes.is_none()) {
    const read_array array = array_of(where, "bytes", bytes);
    const auto all = list_of<std::int64_t>(where, "bytes", "int64", array);
    sizes.assign(all.begin(), all.end());
    if (sizes.empty()) refuse("moeroute::ExpertCache: bytes is empty, expected [layers, E]");
  }
  return std::make_unique<expert_cache>(
      moeroute::expert_cache_options{.experts = experts,
                                     .layers = layers,
                                     .capacity = capacity,
                                     .policy = policy_of(where, policy),
                                     .pinned = pins,
                                     .bytes = sizes,
                                     .decay = decay,
                                     .protected_share = protected_share});
}

nb::tuple step_tuple(const expert_cache::step_result& found) {
  return nb::make_tuple(found.hits, copy_of(found.loads), copy_of(found.evictions));
}

nb::tuple cache_step(expert_cache& cache, nb::object ids, index_t layer, nb::object next) {
  constexpr const char* where = "ExpertCache.step";
  const std::vector<expert_id> used = ids_of(where, ids);
  const auto after = optional_values<std::int64_t, std::int64_t>(where, "next", "int64", next);
  if (!after.empty() && cache.policy() != moeroute::cache_policy::belady)
    refuse("moeroute::ExpertCache.step: next is given, expected under belady alone");
  return step_tuple(cache.step(used, layer, after));
}

nb::object cache_resident(const expert_cache& cache, index_t layer) {
  std::vector<std::uint8_t> there(static_cast<std::size_t>(cache.experts()), 0);
  moeroute::for_each_resident(cache.resident(layer),
                              [&](expert_id e) { there[static_cast<std::size_t>(e)] = 1; });
  return copy_of(std::span<const std::uint8_t>(there)).attr("view")("bool");
}

nb::object cache_uses(const expert_cache& cache) {
  std::vector<std::int64_t> uses(static_cast<std::size_t>(cache.keys()));
  cache.uses(uses);
  return matrix_array(uses.data(), cache.layers(), cache.experts());
}

// For each choice the later token that uses its expert again; ids are checked.
std::vector<std::int64_t> next_uses(std::span<const expert_id> ids, index_t k, index_t experts) {
  std::vector<std::int64_t> after(ids.size(), expert_cache::never),
      next(static_cast<std::size_t>(experts), expert_cache::never);
  for (index_t t = k == 0 ? 0 : std::ssize(ids) / k; t-- > 0;) {
    const auto first = static_cast<std::size_t>(t * k), end = first + static_cast<std::size_t>(k);
    for (std::size_t i = first; i < end; ++i)
      if (ids[i] != no_expert) after[i] = next[static_cast<std::size_t>(ids[i])];
    for (std::size_t i = first; i < end; ++i)
      if (ids[i] != no_expert) next[static_cast<std::size_t>(ids[i])] = t;
  }
  return after;
}

nb::dict simulate_cache(nb::object ids, index_t experts, index_t capacity,
                        const std::string& policy_name, index_t window, const std::string& cold,
                        nb::object pinned, double decay) {
  constexpr const char* where = "simulate_cache";
  const read_array array = array_of(where, "ids", ids);
  if (array.ndim() != 2)
    refuse("moeroute::simulate_cache: ids has " + std::to_string(array.ndim()) +
           " axes, expected 2");
  const auto tokens = static_cast<index_t>(array.shape(0)),
             k = static_cast<index_t>(array.shape(1));
  const std::vector<expert_id> trace = ids_of(where, ids);
  const auto pins = optional_values<std::int32_t, std::int32_t>(where, "pinned", "int32", pinned);
  const moeroute::cache_policy policy = policy_of(where, policy_name);
  const bool free_fill = word(where, "cold", cold, {"counted", "free"}) == 1;
  std::int64_t lookups = 0, hits = 0, evictions = 0;
  {
    nb::gil_scoped_release others;
    const auto of_token = [&](index_t t) {
      return std::span(trace).subspan(static_cast<std::size_t>(t * k), static_cast<std::size_t>(k));
    };
    moeroute::check_range(where, "experts", experts, 1, moeroute::max_experts);
    index_t most = 1;
    for (index_t t = 0; t < tokens; ++t) {
      index_t n = 0;
      for (const expert_id e : of_token(t)) {
        if (e == no_expert) continue;
        moeroute::check_range(where, "expert", e, 0, experts - 1);
        ++n;
      }
      most = std::max(most, n);
      lookups += n;
    }
    moeroute::check_range(where, "capacity", capacity, most, experts);
    moeroute::check_range(where, "window", window, 1, index_t{1} << 40);
    expert_cache cache({.experts = experts,
                        .capacity = capacity,
                        .policy = policy,
                        .pinned = pins,
                        .decay = decay});
    const bool foresees = policy == moeroute::cache_policy::belady;
    const std::vector<std::int64_t> next =
        foresees ? next_uses(trace, k, experts) : std::vector<std::int64_t>{};
    index_t seen = 0;
    for (index_t t = 0; t < tokens; ++t) {
      if (policy == moeroute::cache_policy::segment) {
        const auto expect = [&](index_t token, int more) {
          for (const expert_id e : of_token(token))
            if (e != no_expert) cache.expect(e, 0, more);
        };
        for (; seen < std::min(tokens, t + window); ++seen) expect(seen, 1);
        expect(t, -1);
      }
      const index_t before = cache.held();
      const auto found =
          cache.step(of_token(t), 0,
                     foresees ? std::span(next).subspan(static_cast<std::size_t>(t * k),
                                                        static_cast<std::size_t>(k))
                              : std::span<const std::int64_t>{});
      hits += found.hits + (free_fill ? cache.held() - before : 0);
      evictions += std::ssize(found.evictions);
    }
  }
  nb::dict named;
  named["lookups"] = lookups;
  named["hits"] = hits;
  named["misses"] = lookups - hits;
  named["evictions"] = evictions;
  named["hit_rate"] = lookups == 0 ? 0.0 : static_cast<double>(hits) / static_cast<double>(lookups);
  return named;
}

// ---- placements ---------------------------------------------------------------------------------

std::unique_ptr<placement> new_placement(index_t experts, nb::object expert_of_slot,
                                         std::optional<index_t> ranks, nb::object slot_offset,
                                         nb::object node_of_rank, nb::object alive,
                                         nb::object share) {
  constexpr const char* where = "Placement";
  const auto slots =
      values_of<expert_id, expert_id>(where, "expert_of_slot", "int32", expert_of_slot);
  auto offset =
      optional_values<std::int32_t, std::int32_t>(where, "slot_offset", "int32", slot_offset);
  if (ranks.has_value() == !slot_offset.is_none())
    refuse("moeroute::Placement: expected either ranks or slot_offset");
  const auto nodes = nodes_of(where, node_of_rank);
  const auto flags = flags_of(where, alive);
  const auto shares = optional_values<double, double>(where, "share", "float64", share);
  if (ranks) {
    // Checks the sizes.
    const placement even = placement::from_slots(experts, *ranks, slots);
    offset.assign(even.slot_offset().begin(), even.slot_offset().end());
  }
  if (offset.empty()) refuse("moeroute::Placement: slot_offset is empty, expected [R + 1]");
  return std::make_unique<placement>(moeroute::placement_fields{.experts = experts,
                                                                .slot_offset = offset,
                                                                .expert_of_slot = slots,
                                                                .node_of_rank = nodes,
                                                                .alive = flags,
                                                                .share = shares});
}

template <class T>
auto list_property(std::span<const T> (placement::*list)() const) {
  return [list](const placement& p) { return copy_of((p.*list)()); };
}

double imbalance(const placement& p, nb::object loads) {
  return moeroute::balance_of(moeroute::rank_loads(p, loads_of("rank_loads", loads))).imbalance;
}

placement eplb(nb::object loads, index_t ranks, index_t slots, index_t nodes, index_t groups) {
  const std::vector<double> load = loads_of("eplb", loads);
  nb::gil_scoped_release others;
  return moeroute::eplb_plan(load, slots, ranks, groups, nodes).experts;
}

placement search_placement(nb::object loads, index_t ranks, index_t slots, nb::object node_of_rank,
                           index_t candidates, bool distinct, index_t most_steps, bool swaps,
                           index_t kicks, double good) {
  constexpr const char* where = "search_placement";
  const std::vector<double> load = loads_of(where, loads);
  const std::vector<std::int32_t> nodes = nodes_of(where, node_of_rank);
  nb::gil_scoped_release others;
  return moeroute::search_placement(load, slots, ranks,
                                    {.candidates = candidates,
                                     .distinct = distinct,
                                     .most_steps = most_steps,
                                     .swaps = swaps,
                                     .kicks = kicks,
                                     .good = good},
                                    nodes)
      .experts;
}

std::pair<placement, index_t> replan(const placement& old, nb::object loads, double target,
                                     index_t budget) {
  const std::vector<double> load = loads_of("replan", loads);
  nb::gil_scoped_release others;
  moeroute::replan_result made = moeroute::replan(old, load, {.target = target, .budget = budget});
  return {std::move(made.experts), made.moves};
}

nb::object transfers(const placement& from, const placement& to) {
  std::vector<std::int32_t> rows;
  for (const moeroute::expert_transfer& t : moeroute::transfers(from, to))
    rows.insert(rows.end(), {t.expert, t.from, t.to, t.slot});
  return matrix_array(rows.data(), std::ssize(rows) / 4, 4);
}

nb::tuple eplb_arrays(const placement& p) {
  const moeroute::eplb_arrays a = moeroute::export_eplb_arrays(p);
  return nb::make_tuple(list_array(a.phy2log.data(), std::ssize(a.phy2log)),
                        matrix_array(a.log2phy.data(), p.experts(), a.most),
                        list_array(a.logcnt.data(), std::ssize(a.logcnt)));
}

// ---- one batch ----------------------------------------------------------------------------------

using moeroute::batch_plan;

batch_plan spill(nb::object counts, index_t ranks, std::pair<std::int64_t, std::int64_t> alpha,
                 std::int64_t min_rows, double lambda) {
  const std::vector<std::int64_t> count = counts_of("spill", counts);
  nb::gil_scoped_release others;
  return moeroute::spill(count, ranks,
                         {.alpha_num = alpha.first,
                          .alpha_den = alpha.second,
                          .min_rows = min_rows,
                          .lambda = lambda});
}

batch_plan balance_exactly(nb::object counts, index_t ranks, std::int64_t min_rows, double lambda) {
  const std::vector<std::int64_t> count = counts_of("balance_exactly", counts);
  nb::gil_scoped_release others;
  return moeroute::balance_exactly(count, ranks, {.min_rows = min_rows, .lambda = lambda}).batch;
}

nb::object pieces_of(const batch_plan& plan) {
  std::vector<std::int64_t> rows;
  for (std::size_t e = 0; e < plan.range.size(); ++e)
    for (const moeroute::rank_range& r : plan.range[e])
      rows.insert(rows.end(), {static_cast<std::int64_t>(e), r.rank, r.begin, r.end});
  return matrix_array(rows.data(), std::ssize(rows) / 4, 4);
}

nb::object moves_of(const batch_plan& plan) {
  std::vector<std::int32_t> rows;
  for (const moeroute::expert_move& m : plan.moves)
    rows.insert(rows.end(), {m.expert, m.from, m.to});
  return matrix_array(rows.data(), std::ssize(rows) / 3, 3);
}

}  // namespace

void moeroute_python::bind_systems(nb::module_& m) {
  nb::class_<expert_cache>(
      m, "ExpertCache",
      "A cache of experts in fast memory: told what each step uses, it says what has to be read "
      "and what leaves.\n\n"
      "A key is layer * experts + expert. Policies: lru, lfu, fifo, segmented, least_stale\n"
      "(arXiv 2602.03921), cost_aware, segment (arXiv 2505.16056), belady (1966; needs next).\n\n"
      ">>> cache = moeroute.ExpertCache(layers=32, experts=64, capacity=800)\n"
      ">>> hits, loads, evictions = cache.step(ids[t], layer=3)\n")
      .def(nb::new_(&new_cache), nb::arg("layers"), nb::arg("experts"), nb::arg("capacity"),
           nb::kw_only(), nb::arg("policy") = "lru", nb::arg("pinned") = nb::none(),
           nb::arg("bytes") = nb::none(), nb::arg("decay") = 1.0, nb::arg("protected_share") = 0.5,
           "capacity: experts that are held at a time, over all layers; bytes where these are "
           "given.\n"
           "pinned: int32 keys that are there from the start and never leave. bytes: int64 "
           "[layers, E], the\n"
           "size of each. decay: of lfu and cost_aware, a use of n steps ago counts decay^n.\n"
           "protected_share: of segmented, the part of the capacity for what was used twice.")
      .def("step", &cache_step, nb::arg("ids").none(), nb::arg("layer") = 0, nb::kw_only(),
           nb::arg("next") = nb::none(),
           nb::sig("def step(self, ids: object, layer: int = 0, *, next: object | None = None) -> "
                   "tuple[int, object, object]"),
           "Uses experts, int32 of any shape, -1: none; all are looked up, then what is missing "
           "is loaded.\n"
           "Returns (hits, loads, evictions): the keys to read in the order of use, those that "
           "left for them.\n"
           "next: int64, when each is used again, under belady; 2^63 - 1: not at all.")
      .def(
          "prefetch",
          [](expert_cache& cache, nb::object ids, index_t layer, index_t most) {
            return step_tuple(cache.prefetch(ids_of("ExpertCache.prefetch", ids), layer, most));
          },
          nb::arg("ids").none(), nb::arg("layer"), nb::arg("most"),
          nb::sig("def prefetch(self, ids: object, layer: int, most: int) -> tuple[int, object, "
                  "object]"),
          "Brings in the first `most` of the ids that are missing; what the last step used does "
          "not leave for\n"
          "them. Returns as step.")
      .def("expect", &expert_cache::expect, nb::arg("expert"), nb::arg("layer"), nb::arg("more"),
           "Uses of an expert that the next window of tokens has more (or fewer), for segment.")
      .def("would_hit", &expert_cache::would_hit, nb::arg("expert"), nb::arg("layer") = 0)
      .def("resident", &cache_resident, nb::arg("layer") = 0,
           "bool [E]: which of a layer's experts are held. A copy.")
      .def("uses", &cache_uses, "int64 [layers, E]: how often each was used so far.")
      .def_prop_ro("layers", &expert_cache::layers)
      .def_prop_ro("experts", &expert_cache::experts)
      .def_prop_ro("capacity", &expert_cache::capacity)
      .def_prop_ro("policy",
                   [](const expert_cache& c) { return std::string(to_string(c.policy())); })
      .def_prop_ro("held", &expert_cache::held, "Experts, or bytes, that are held.");

  m.def("simulate_cache", &simulate_cache, nb::arg("ids").none(), nb::arg("experts"),
        nb::arg("capacity"), nb::kw_only(), nb::arg("policy") = "lru", nb::arg("window") = 16,
        nb::arg("cold") = "counted", nb::arg("pinned") = nb::none(), nb::arg("decay") = 1.0,
        nb::sig("def simulate_cache(ids: object, experts: int, capacity: int, *, policy: str = "
                "'lru', window: int = 16, cold: str = 'counted', pinned: object | None = None, "
                "decay: float = 1.0) -> dict[str, int | float]"),
        "What a cache of one layer's experts would have met of a trace: int32 ids [T, k], -1: "
        "none, a token\n"
        "a step. Returns lookups, hits, misses, evictions (experts) and hit_rate. window: tokens, "
        "of segment.\n"
        "cold: 'free' where the first load into a cache that is not full is no miss (arXiv "
        "2505.16056).\n"
        "belady is the bound: no cache does better.");

  nb::class_<placement>(
      m, "Placement",
      "Where a layer's experts live: P slots on R ranks, an expert in each; one in several slots "
      "has replicas.\n\n"
      ">>> moeroute.Placement(4, np.array([0, 1, 2, 3, 0, 2], np.int32), ranks=2)\n"
      ">>> moeroute.Placement.contiguous(64, 8).imbalance(choices.load())\n")
      .def(nb::new_(&new_placement), nb::arg("experts"), nb::arg("expert_of_slot").none(),
           nb::kw_only(), nb::arg("ranks") = nb::none(), nb::arg("slot_offset") = nb::none(),
           nb::arg("node_of_rank") = nb::none(), nb::arg("alive") = nb::none(),
           nb::arg("share") = nb::none(),
           "expert_of_slot: int32 [P], -1: empty. ranks: equally many slots on each; or "
           "slot_offset, int32\n"
           "[R + 1]. node_of_rank: int32 [R]. alive: bool [R], False: the rank serves nobody. "
           "share: float64\n"
           "[P], the part of its expert's tokens that a slot takes; else equal parts.")
      .def_static("contiguous", &placement::contiguous, nb::arg("experts"), nb::arg("ranks"),
                  "Expert e on rank e * R // E.")
      .def_static("round_robin", &placement::round_robin, nb::arg("experts"), nb::arg("ranks"),
                  "Expert e on rank e % R.")
      .def_prop_ro("experts", &placement::experts)
      .def_prop_ro("ranks", &placement::ranks)
      .def_prop_ro("nodes", &placement::nodes)
      .def_prop_ro("slots", [](const placement& p) { return p.slots(); })
      .def_prop_ro("slot_offset", list_property(&placement::slot_offset),
                   "int32 [R + 1]: rank r has the slots from slot_offset[r] to slot_offset[r + 1].")
      .def_prop_ro("expert_of_slot", list_property(&placement::expert_of_slot),
                   "int32 [P], -1: empty.")
      .def_prop_ro("rank_of_slot", list_property(&placement::rank_of_slot), "int32 [P].")
      .def_prop_ro("node_of_rank", list_property(&placement::node_of_rank), "int32 [R].")
      .def_prop_ro(
          "alive", [](const placement& p) { return copy_of(p.alive()).attr("view")("bool"); },
          nb::sig("def alive(self) -> object"), "bool [R].")
      .def_prop_ro("share", list_property(&placement::share),
                   "float64 [P]: the part of its expert's tokens that each slot takes.")
      .def_prop_ro(
          "replicas",
          [](const placement& p) {
            std::vector<std::int32_t> count;
            for (index_t e = 0; e < p.experts(); ++e)
              count.push_back(static_cast<std::int32_t>(p.replicas(e)));
            return copy_of(std::span<const std::int32_t>(count));
          },
          "int32 [E]: slots of each expert on ranks that are alive.")
      .def(
          "slots_of_expert",
          [](const placement& p, index_t expert) {
            moeroute::check_range("Placement.slots_of_expert", "expert", expert, 0,
                                  p.experts() - 1);
            return copy_of(p.slots_of_expert(expert));
          },
          nb::arg("expert"), "int32: those on ranks that are alive, ascending.")
      .def(
          "experts_of_rank",
          [](const placement& p, index_t rank) {
            moeroute::check_range("Placement.experts_of_rank", "rank", rank, 0, p.ranks() - 1);
            return copy_of(p.experts_of_rank(rank));
          },
          nb::arg("rank"), "int32, slot by slot.")
      .def(
          "lost", [](const placement& p) { return copy_of(std::span<const expert_id>(p.lost())); },
          "int32: experts without a slot on a rank that is alive.")
      .def(
          "duplicates",
          [](const placement& p) {
            return copy_of(std::span<const moeroute::slot_id>(p.duplicates()));
          },
          "int32: slots whose rank holds their expert in a lower slot already.")
      .def(
          "rank_loads",
          [](const placement& p, nb::object loads) {
            const auto sums = moeroute::rank_loads(p, loads_of("rank_loads", loads));
            return copy_of(std::span<const double>(sums));
          },
          nb::arg("loads").none(), "float64 [R] of loads [E], in their unit, by the shares.")
      .def("imbalance", &imbalance, nb::arg("loads").none(),
           "The greatest load of a rank over the mean of all; 1 where there is no load.")
      .def(
          "without",
          [](const placement& p, nb::object alive) {
            return moeroute::without(p, values_of<std::uint8_t, bool, std::uint8_t>(
                                            "without", "alive", "bool or uint8", alive));
          },
          nb::arg("alive").none(),
          "The placement without the slots of ranks that died: alive bool [R]. What nobody holds "
          "is in lost().")
      .def("eplb_arrays", &eplb_arrays,
           nb::sig("def eplb_arrays(self) -> tuple[object, object, object]"),
           "(phy2log [P], log2phy [E, most], logcnt [E]), int32: the arrays of EPLB, padded with "
           "-1.")
      .def(
          "__eq__",
          [](const placement& p, nb::handle other) {
            placement* q = nullptr;
            return nb::try_cast(other, q) && q != nullptr && p == *q;
          },
          nb::arg("other").none(), nb::sig("def __eq__(self, other: object) -> bool"))
      .def("__hash__", [](const placement& p) { return static_cast<std::int64_t>(p.hash() >> 2); })
      .def("__repr__", [](const placement& p) {
        return "Placement(experts=" + std::to_string(p.experts()) +
               ", slots=" + std::to_string(p.slots()) + ", ranks=" + std::to_string(p.ranks()) +
               ")";
      });

  m.def("eplb", &eplb, nb::arg("loads").none(), nb::arg("ranks"), nb::arg("slots"),
        nb::arg("nodes") = 1, nb::arg("groups") = 1,
        "EPLB as it was published (DeepSeek, rebalance_experts): replicas for the greatest load "
        "per slot, then\n"
        "packed; groups to nodes first where nodes divide groups. loads: [E] >= 0 in any unit, "
        "float64, float32,\n"
        "int64 or int32. slots: on all ranks together, a multiple of ranks, at least E.");
  m.def("search_placement", &search_placement, nb::arg("loads").none(), nb::arg("ranks"),
        nb::arg("slots"), nb::kw_only(), nb::arg("node_of_rank") = nb::none(),
        nb::arg("candidates") = 10, nb::arg("distinct") = true, nb::arg("most_steps") = 200,
        nb::arg("swaps") = true, nb::arg("kicks") = 8, nb::arg("good") = 1.0015,
        "A placement searched over the numbers of replicas, then by swaps between ranks: never "
        "worse than\n"
        "EPLB's where that has no expert twice on a rank. loads, ranks, slots as eplb. distinct: "
        "a rank holds\n"
        "an expert once. kicks: new starts while above `good` times the lower bound.");
  m.def(
      "placement_bound",
      [](nb::object loads, index_t ranks, index_t slots) {
        const std::vector<double> load = loads_of("placement_bound", loads);
        moeroute::check_loads("placement_bound", load);
        const auto experts = static_cast<index_t>(load.size());
        moeroute::detail::check_slots("placement_bound", experts, slots, ranks);
        return moeroute::placement_bound(
            load, std::min(slots, moeroute::size_product(experts, ranks)), ranks);
      },
      nb::arg("loads").none(), nb::arg("ranks"), nb::arg("slots"),
      "A load of a rank that no placement with so many slots gets below, with even shares.");
  m.def("replan", &replan, nb::arg("placement"), nb::arg("loads").none(), nb::kw_only(),
        nb::arg("target") = 1.02, nb::arg("budget") = 16,
        "(placement, moves): the placement after the load, with at most `budget` experts moved, "
        "nothing once the\n"
        "imbalance is at most `target`; slots that no step touches stay.");
  m.def("relabel", &moeroute::relabel, nb::arg("old"), nb::arg("made"),
        "The placement `made` with ranks and nodes renamed so that most experts are where `old` "
        "has them.");
  m.def("count_moves", &moeroute::count_moves, nb::arg("old"), nb::arg("new"),
        "Experts that ranks come to hold: what a change of placement has to move.");
  m.def("transfers", &transfers, nb::arg("old"), nb::arg("new"),
        nb::sig("def transfers(old: Placement, new: Placement) -> object"),
        "int32 [n, 4], rows of (expert, from rank, to rank, slot): what is to be sent before "
        "`new` is adopted.");

  nb::class_<batch_plan>(
      m, "BatchPlan",
      "One batch over R ranks with E / R experts of their own each: who computes which tokens.")
      .def_ro("enabled", &batch_plan::enabled, "False: every rank its own experts.")
      .def_prop_ro("pieces", &pieces_of,
                   "int64 [n, 4], rows of (expert, rank, begin, end): the expert's tokens, in the "
                   "order of all\n"
                   "ranks' tokens, that a rank computes.")
      .def_prop_ro("moves", &moves_of,
                   "int32 [n, 3], rows of (expert, from rank, to rank): weights that a rank needs.")
      .def_prop_ro(
          "load",
          [](const batch_plan& p) { return copy_of(std::span<const std::int64_t>(p.load)); },
          "int64 [R]: tokens that each rank computes.")
      .def_ro("cap", &batch_plan::cap, "Tokens of a rank; 0 where not enabled.")
      .def_ro("forced", &batch_plan::forced, "Pieces that no rank had room for.")
      .def_prop_ro(
          "imbalance",
          [](const batch_plan& p) {
            return moeroute::balance_of(std::vector<double>(p.load.begin(), p.load.end()))
                .imbalance;
          },
          "The greatest load over the mean.")
      .def(
          "placement", [](const batch_plan& p) { return moeroute::place_batch(p).experts; },
          "Own experts and the moved ones behind them, as a Placement for this batch.");

  m.def("spill", &spill, nb::arg("counts").none(), nb::arg("ranks"), nb::kw_only(),
        nb::arg("alpha") = std::pair<std::int64_t, std::int64_t>(1, 1), nb::arg("min_rows") = 1,
        nb::arg("min_imbalance") = 0.0,
        "Experts keep at home what fits under the cap, the rest goes to the emptiest ranks with "
        "the weights\n"
        "(LLEP, 2026). counts: [E] tokens, int64 or int32; ranks divides E. alpha: (numerator, "
        "denominator), the\n"
        "cap over the mean. min_rows: of a piece. min_imbalance: below it nothing is moved.");
  m.def("balance_exactly", &balance_exactly, nb::arg("counts").none(), nb::arg("ranks"),
        nb::kw_only(), nb::arg("min_rows") = 1, nb::arg("min_imbalance") = 0.0,
        "Every rank computes the same number of tokens or one more, filled by one other rank at "
        "most (MoonEP).\n"
        "Arguments as spill.");
}
