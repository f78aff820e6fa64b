// Shadow: experts so busy that every rank gets a copy of their weights for the batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

/// What a shadow costs and saves.
struct shadow_costs {
  double d = 0.0;      ///< width of a row
  double ratio = 4.0;  ///< width of an expert's hidden layer over d
  double bytes = 4.0;  ///< of a number
  double bandwidth = 1.0;
  double flops = 1.0;

  double row_compute() const { return 4.0 * ratio * d * d / flops; }
  double row_transfer() const { return d * bytes / bandwidth; }
  double model_transfer() const { return 2.0 * ratio * d * d * bytes / bandwidth; }
};

struct shadow_plan {
  std::vector<expert_id> shadowed;
  double latency = 0.0;       ///< of the model
  std::vector<double> trace;  ///< latencies that were compared, the first without a shadow
};

namespace detail {

inline void check_shadow_costs(const char* where, const shadow_costs& c) {
  for (const double v : {c.d, c.ratio, c.bytes, c.bandwidth, c.flops})
    if (!(v > 0.0 && std::isfinite(v))) fail_value(where, "a cost", v, "a finite number > 0");
}

}  // namespace detail

/// The published decision for one expert per worker: from the busiest on, shadow while the latency
/// 3 t_compute B + 4 t_rows B + shadows t_model of the busiest that is left falls.
///
/// Throws: error where a load or a cost is out of range. Cost: O(E log E). Source: FasterMoE 2022.
inline shadow_plan shadow_published(std::span<const double> load, const shadow_costs& costs) {
  check_loads("shadow_published", load);
  detail::check_shadow_costs("shadow_published", costs);
  std::vector<expert_id> order(load.size());
  std::iota(order.begin(), order.end(), expert_id{0});
  std::sort(order.begin(), order.end(),
            greatest_first([&](expert_id i) { return load[detail::at(i)]; }));
  const auto latency = [&](std::size_t shadows) {
    const double b = shadows < order.size() ? load[detail::at(order[shadows])] : 0.0;
    return 3.0 * costs.row_compute() * b + 4.0 * costs.row_transfer() * b +
           static_cast<double>(shadows) * costs.model_transfer();
  };
  shadow_plan plan;
  plan.latency = latency(0);
  plan.trace.push_back(plan.latency);
  for (std::size_t n = 1; n <= order.size(); ++n) {
    plan.trace.push_back(latency(n));
    if (plan.trace.back() >= plan.latency) break;
    plan.latency = plan.trace.back();
    plan.shadowed.push_back(order[n - 1]);
  }
  return plan;
}

/// What a batch costs with some experts shadowed, from each rank's own counts: a rank computes what
/// its unshadowed experts get and its own tokens of shadowed ones.
///
/// Shapes: count [R, E]; shadowed [E] flags. training: rows move four times and weights twice.
/// Throws: error where sizes differ.
inline double shadow_latency(std::span<const std::int64_t> count, index_t ranks,
                             std::span<const std::uint8_t> shadowed, const shadow_costs& costs,
                             bool training) {
  using detail::at;
  const auto experts = static_cast<index_t>(shadowed.size());
  check_range("shadow_latency", "ranks", ranks, 1, max_ranks);
  check_range("shadow_latency", "shadowed.size()", experts, 1, max_experts);
  check_size("shadow_latency", "count.size()", static_cast<index_t>(count.size()), ranks * experts);
  double compute = 0.0, net = 0.0, shadows = 0.0;
  for (const std::uint8_t s : shadowed) shadows += s != 0 ? 1.0 : 0.0;
  for (index_t r = 0; r < ranks; ++r) {
    double rows = 0.0, in = 0.0, out = 0.0;
    for (index_t e = 0; e < experts; ++e) {
      const index_t home = e * ranks / experts;
      for (index_t s = 0; s < ranks; ++s) {
        const auto n = static_cast<double>(count[at(s * experts + e)]);
        if (shadowed[at(e)] != 0) {
          rows += s == r ? n : 0.0;
        } else {
          rows += home == r ? n : 0.0;
          in += home == r && s != r ? n : 0.0;
          out += s == r && home != r ? n : 0.0;
        }
      }
    }
    compute = std::max(compute, rows);
    net = std::max({net, in, out});
  }
  return (training ? 3.0 : 1.0) * costs.row_compute() * compute +
         (training ? 4.0 : 2.0) * costs.row_transfer() * net +
         (training ? 2.0 : 1.0) * shadows * costs.model_transfer();
}

/// Ours: shadows by what every rank really has, the best expert at a time, a pair where no single
/// one helps.
///
/// Shapes: count [R, E]. Ensures: latency never above that without a shadow. Throws: error where a
/// count or a cost is out of range. Cost: O(candidates R E) a step, pairs among the 8 busiest.
inline shadow_plan shadow_exact(std::span<const std::int64_t> count, index_t ranks,
                                const shadow_costs& costs, bool training) {
  using detail::at;
  constexpr const char* where = "shadow_exact";
  check_range(where, "ranks", ranks, 1, max_ranks);
  detail::check_shadow_costs(where, costs);
  const auto size = static_cast<index_t>(count.size());
  if (size == 0 || size % ranks != 0)
    fail(where, std::to_string(size) + " counts for " + std::to_string(ranks) +
                    " ranks, expected a multiple");
  const index_t experts = size / ranks;
  std::vector<std::int64_t> total(at(experts), 0);
  for (index_t i = 0; i < size; ++i) {
    if (count[at(i)] < 0 || count[at(i)] > std::int64_t{1} << 40)
      fail_value(where, "count", static_cast<index_t>(count[at(i)]), "0 to 2^40");
    total[at(i % experts)] += count[at(i)];
  }
  std::vector<index_t> order(at(experts));
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(), greatest_first([&](index_t i) { return total[at(i)]; }));
  if (order.size() > 8) order.resize(8);
  std::vector<std::uint8_t> flags(at(experts), 0);
  const auto cost = [&] { return shadow_latency(count, ranks, flags, costs, training); };
  shadow_plan plan;
  plan.latency = cost();
  plan.trace.push_back(plan.latency);
  for (;;) {
    double best = plan.latency;
    index_t first = -1, second = -1;
    for (const bool pairs : {false, true}) {
      for (std::size_t i = 0; i < order.size(); ++i) {
        if (flags[at(order[i])] != 0) continue;
        flags[at(order[i])] = 1;
        for (std::size_t j = pairs ? i + 1 : i; j < (pairs ? order.size() : i + 1); ++j) {
          if (pairs && flags[at(order[j])] != 0) continue;
          flags[at(order[j])] = 1;
          if (const double made = cost(); made < best) {
            best = made;
            first = order[i];
            second = order[j];
          }
          if (j != i) flags[at(order[j])] = 0;
        }
        flags[at(order[i])] = 0;
      }
      if (first >= 0) break;
    }
    if (first < 0) return plan;
    for (const index_t e : {first, second}) {
      if (flags[at(e)] != 0) continue;
      flags[at(e)] = 1;
      plan.shadowed.push_back(static_cast<expert_id>(e));
    }
    plan.latency = best;
    plan.trace.push_back(best);
  }
}

}  // namespace moeroute
