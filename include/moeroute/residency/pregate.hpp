// Experts of all layers known before the layers run: the future is exact, so loads can be too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/data/expert_cache.hpp>
#include <moeroute/residency/union.hpp>

namespace moeroute {

/// What a run needs, step by step: batch after batch, each through all layers.
struct pregated_loads {
  index_t accesses = 0;  ///< distinct experts over all steps
  index_t hits = 0;
  std::vector<std::int32_t> keys{};    ///< to load, layer * E + expert
  std::vector<std::int32_t> first{0};  ///< of each step, [steps + 1]
  std::span<const std::int32_t> of_step(index_t step) const {
    const auto at = static_cast<std::size_t>(step);
    return std::span(keys).subspan(static_cast<std::size_t>(first[at]),
                                   static_cast<std::size_t>(first[at + 1] - first[at]));
  }
};

/// What a router loads that decides for all layers ahead (Read-ME): each step's distinct experts,
/// through a Belady cache that the layers share. No order of leaving loads fewer where experts are
/// of one size and those of a step fit beside the pins.
///
/// layers: an assignment per layer, of the same tokens. batch: tokens of a step. options: capacity,
/// pins and sizes; experts, layers and policy are set here. Throws: error where the assignments
/// differ in tokens or experts. Source: Read-ME (arXiv 2410.19123).
inline pregated_loads pregate(std::span<const assignment> layers, index_t batch,
                              expert_cache_options options) {
  constexpr const char* where = "pregate";
  check_range(where, "layers.size()", static_cast<index_t>(layers.size()), 1, index_t{1} << 20);
  check_range(where, "batch", batch, 1, std::int32_t{0x7fffffff});
  const index_t tokens = layers[0].tokens(), experts = layers[0].experts();
  for (const assignment& a : layers) {
    check_choices(where, a);
    check_size(where, "tokens", a.tokens(), tokens);
    check_size(where, "experts", a.experts(), experts);
  }
  // The union of every step.
  std::vector<expert_id> ids;
  std::vector<std::size_t> first{0};
  resident_set seen(experts);
  for (index_t t = 0; t < tokens; t += batch)
    for (const assignment& a : layers) {
      seen.clear();
      for (index_t i = t; i < std::min(tokens, t + batch); ++i)
        for (const expert_id e : a.ids(i))
          if (e != no_expert) seen.insert(e);
      for_each_resident(seen, [&](expert_id e) { ids.push_back(e); });
      first.push_back(ids.size());
    }
  // When each is used again.
  const auto steps = static_cast<std::int64_t>(first.size()) - 1;
  const auto count = static_cast<std::int64_t>(layers.size());
  std::vector<std::int64_t> next(ids.size());
  std::vector<std::int64_t> later(static_cast<std::size_t>(count * experts), expert_cache::never);
  for (std::int64_t s = steps - 1; s >= 0; --s)
    for (std::size_t i = first[static_cast<std::size_t>(s)];
         i < first[static_cast<std::size_t>(s) + 1]; ++i) {
      std::int64_t& use = later[static_cast<std::size_t>(s % count * experts + ids[i])];
      next[i] = use;
      use = s;
    }
  options.experts = experts;
  options.layers = count;
  options.policy = cache_policy::belady;
  expert_cache cache(options);
  pregated_loads out{.accesses = static_cast<index_t>(ids.size())};
  for (std::int64_t s = 0; s < steps; ++s) {
    const std::size_t from = first[static_cast<std::size_t>(s)];
    const std::size_t n = first[static_cast<std::size_t>(s) + 1] - from;
    const auto step =
        cache.step(std::span(ids).subspan(from, n), s % count, std::span(next).subspan(from, n));
    out.hits += step.hits;
    out.keys.insert(out.keys.end(), step.loads.begin(), step.loads.end());
    out.first.push_back(static_cast<std::int32_t>(out.keys.size()));
  }
  return out;
}

}  // namespace moeroute
