// Other libraries at the same work: those that were found where the programs are built with
// MOEROUTE_BENCH_PEERS.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/policy/router_spec.hpp>

#include "support/contest.hpp"
#if defined(MOEROUTE_PEER_GGML)
#include "support/peers/ggml.hpp"
#endif
#if defined(MOEROUTE_PEER_HIGHWAY)
#include "support/peers/highway.hpp"
#endif
#if defined(MOEROUTE_PEER_TORCH)
#include "support/peers/torch.hpp"
#endif

namespace bench {

/// A competitor that takes n rows and gives its values or weights [n, k], which stay until the next
/// call.
struct peer {
  std::string name;
  bool row_by_row;  ///< false: it wants a batch
  std::function<const float*(const float* rows, index_t n)> run;
};

/// A peer out of what takes one row: (row, id, weight).
template <class F>
peer peer_by_row(std::string name, index_t columns, index_t k, F one) {
  const auto run = [=, id = std::vector<std::int32_t>(), weight = std::vector<float>()](
                       const float* rows, index_t n) mutable -> const float* {
    id.resize(static_cast<std::size_t>(n * k));
    weight.resize(id.size());
    for (index_t r = 0; r < n; ++r)
      one(rows + r * columns, id.data() + r * k, weight.data() + r * k);
    return weight.data();
  };
  return {std::move(name), true, run};
}

/// The peers that give the k largest of a row.
inline std::vector<peer> selection_peers([[maybe_unused]] index_t experts,
                                         [[maybe_unused]] index_t k) {
  std::vector<peer> found;
#if defined(MOEROUTE_PEER_HIGHWAY)
  found.push_back(
      peer_by_row("highway", experts, k,
                  [=, select = highway_selection()](const float* row, auto... to) mutable {
                    select(row, experts, k, to...);
                  }));
#endif
#if defined(MOEROUTE_PEER_TORCH)
  found.push_back({"torch", false, torch_selection(experts, k)});
#endif
#if defined(MOEROUTE_PEER_GGML)
  found.push_back({"ggml", false, ggml_selection(experts, k)});
#endif
  return found;
}

/// The peers that can carry out a spec.
inline std::vector<peer> gate_peers([[maybe_unused]] const moeroute::router_spec& spec,
                                    [[maybe_unused]] std::span<const float> bias) {
  std::vector<peer> found;
#if defined(MOEROUTE_PEER_HIGHWAY)
  if (highway_gate::can(spec))
    found.push_back(peer_by_row("highway", spec.experts, spec.k, highway_gate(spec, bias)));
#endif
#if defined(MOEROUTE_PEER_TORCH)
  if (torch_gate::can(spec)) found.push_back({"torch", false, torch_gate(spec, bias)});
#endif
#if defined(MOEROUTE_PEER_GGML)
  if (ggml_gate::can(spec)) found.push_back({"ggml", false, ggml_gate(spec, bias)});
#endif
  return found;
}

/// Lets the peers into a contest over rows [batches.units, columns], those that want a batch with
/// batches.step rows a call. Returns the name of one whose results for the first rows are not those
/// expected [n, k] (ties and the order of a row's choices are its own, and rounding may swap 2 %).
inline std::string add_peers(std::vector<competitor>& list, const std::vector<peer>& peers,
                             const float* rows, index_t columns, const rotation& batches,
                             std::span<const float> expected, index_t k) {
  std::vector<float> ours(expected.begin(), expected.end()), theirs;
  for (const peer& p : peers) {
    const float* result = p.run(rows, std::ssize(ours) / k);
    theirs.assign(result, result + ours.size());
    std::size_t different = 0;
    for (auto a = ours.begin(), b = theirs.begin(); a != ours.end(); a += k, b += k) {
      std::sort(a, a + k);
      std::sort(b, b + k);
      for (index_t r = 0; r < k; ++r)
        different += !(std::fabs(a[r] - b[r]) <= 1e-4f * std::fabs(a[r]));
    }
    if (different * 50 > ours.size()) return p.name;
    const rotation turns = p.row_by_row ? batches.row_by_row() : batches;
    list.push_back({p.name, over(turns, 2.0 / 3,
                                 [=, run = p.run, step = p.row_by_row ? turns.chunk : turns.step](
                                     index_t first, index_t n) {
                                   for (index_t r = first; r < first + n; r += step)
                                     benchmark::DoNotOptimize(
                                         run(rows + r * columns, std::min(step, first + n - r)));
                                 })});
  }
  return {};
}

}  // namespace bench
