// Cost: what a layer takes on a cluster, from rows, links and rates: a model, to compare plans by.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

/// A link: alpha seconds per message, beta seconds per byte.
struct link_cost {
  double alpha = 0.0;
  double beta = 0.0;
};

/// Ranks, their links and their speed.
struct cluster {
  index_t ranks = 1;
  index_t nodes = 1;                    ///< runs of equally many ranks
  link_cost inside{2e-6, 1.0 / 300e9};  ///< between ranks of a node
  link_cost outside{8e-6, 1.0 / 50e9};  ///< between nodes, per rank
  double rows_per_second = 1e6;         ///< of an expert, per rank
  double call_seconds = 5e-6;           ///< of each expert that has rows
  index_t block = 1;                    ///< rows are computed in blocks of so many
  double row_bytes = 4096.0;
  double expert_bytes = 50e6;

  index_t places() const { return ranks / nodes; }
  index_t node(index_t rank) const { return rank / places(); }
};

/// Throws: error where a field is out of range.
inline void check_cluster(const char* where, const cluster& c) {
  check_range(where, "ranks", c.ranks, 1, max_ranks);
  check_range(where, "nodes", c.nodes, 1, c.ranks);
  check_range(where, "block", c.block, 1, std::int32_t{0x7fffffff});
  if (c.ranks % c.nodes != 0)
    fail(where, std::to_string(c.ranks) + " ranks on " + std::to_string(c.nodes) +
                    " nodes, expected a multiple of the nodes");
  for (const double v : {c.inside.alpha, c.inside.beta, c.outside.alpha, c.outside.beta,
                         c.call_seconds, c.row_bytes, c.expert_bytes})
    if (!(v >= 0.0 && std::isfinite(v))) fail_value(where, "a cost", v, "a finite number >= 0");
  if (!(c.rows_per_second > 0.0)) fail_value(where, "rows_per_second", c.rows_per_second, "> 0");
}

/// What one rank exchanges with the others, in rows.
struct rank_traffic {
  double sent_inside = 0.0, received_inside = 0.0;    ///< within the node
  double sent_outside = 0.0, received_outside = 0.0;  ///< with other nodes
  double peers_inside = 0.0, peers_outside = 0.0;     ///< messages
};

/// Rank to rank: every message its alpha, and the busier direction of each link.
inline double exchange_seconds(const cluster& c, const rank_traffic& t) {
  return t.peers_inside * c.inside.alpha +
         std::max(t.sent_inside, t.received_inside) * c.row_bytes * c.inside.beta +
         t.peers_outside * c.outside.alpha +
         std::max(t.sent_outside, t.received_outside) * c.row_bytes * c.outside.beta;
}

/// By nodes: (N - 1) messages over the rail with rows once per node, (G - 1) within the node.
inline double two_level_seconds(const cluster& c, double rows_to_nodes, double rows_from_nodes,
                                double rows_within) {
  return static_cast<double>(c.nodes - 1) * c.outside.alpha +
         std::max(rows_to_nodes, rows_from_nodes) * c.row_bytes * c.outside.beta +
         static_cast<double>(c.places() - 1) * c.inside.alpha +
         rows_within * c.row_bytes * c.inside.beta;
}

/// What a rank computes, from the rows of each of its slots.
inline double compute_seconds(const cluster& c, std::span<const double> rows_of_slot) {
  double sum = 0.0;
  for (const double n : rows_of_slot)
    if (n > 0.0)
      sum += c.call_seconds + std::ceil(n / static_cast<double>(c.block)) *
                                  static_cast<double>(c.block) / c.rows_per_second;
  return sum;
}

/// Weights of experts that move, between ranks of different nodes where there are any.
inline double transfer_seconds(const cluster& c, double experts) {
  const link_cost& l = c.nodes > 1 ? c.outside : c.inside;
  return experts * (l.alpha + c.expert_bytes * l.beta);
}

/// The steps of a layer; each ends when its slowest rank has ended.
struct layer_seconds {
  double header = 0.0, dispatch = 0.0, compute = 0.0, results = 0.0, transfer = 0.0;
  double total() const { return header + dispatch + compute + results + transfer; }
};

/// The same cut into n chunks of tokens that overlap: first + (n - 1) longest + last. The `alphas`
/// of a step's messages are paid in each chunk.
inline double chunked_seconds(const layer_seconds& one, double alphas, index_t n) {
  check_range("chunked_seconds", "n", n, 1, 1 << 20);
  const auto part = [&](double whole) {
    return (whole - alphas) / static_cast<double>(n) + alphas;
  };
  const double out = part(one.dispatch), back = part(one.results);
  const double work = one.compute / static_cast<double>(n);
  return one.header + one.transfer + out + work + back +
         static_cast<double>(n - 1) * std::max({out, work, back});
}

/// The link that fits measured times best, by least squares; alpha and beta are >= 0.
///
/// Throws: error where fewer than two sizes differ.
inline link_cost fit_link(std::span<const double> bytes, std::span<const double> seconds) {
  check_size("fit_link", "seconds.size()", static_cast<index_t>(seconds.size()),
             static_cast<index_t>(bytes.size()));
  const auto n = static_cast<double>(bytes.size());
  double x = 0.0, y = 0.0, xx = 0.0, xy = 0.0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    x += bytes[i];
    y += seconds[i];
    xx += bytes[i] * bytes[i];
    xy += bytes[i] * seconds[i];
  }
  const double spread = n * xx - x * x;
  if (!(spread > 0.0)) fail("fit_link", "all messages have one size, expected several");
  link_cost l;
  l.beta = std::max(0.0, (n * xy - x * y) / spread);
  l.alpha = std::max(0.0, (y - l.beta * x) / n);
  return l;
}

/// Distinct groups (ranks, nodes) that k distinct experts of E, uniform, are on, where groups have
/// E / groups each: groups (1 - C(E - m, k) / C(E, k)).
inline double expected_distinct(index_t experts, index_t k, index_t groups) {
  check_range("expected_distinct", "experts", experts, 1, max_experts);
  check_range("expected_distinct", "k", k, 1, experts);
  check_range("expected_distinct", "groups", groups, 1, experts);
  const double e = static_cast<double>(experts), m = e / static_cast<double>(groups);
  double missed = 1.0;
  for (index_t i = 0; i < k; ++i)
    missed *= std::max(0.0, e - m - static_cast<double>(i)) / (e - static_cast<double>(i));
  return static_cast<double>(groups) * (1.0 - missed);
}

/// Bytes that a rank receives more where all ranks get all tokens than where each gets what it
/// needs: uniform traffic, `tokens` and `choices` of all ranks together.
inline double gather_excess_bytes(index_t experts, index_t ranks, index_t tokens, index_t choices,
                                  double row_bytes) {
  if (tokens <= 0) return 0.0;
  const index_t k = std::clamp<index_t>((choices + tokens - 1) / tokens, 1, experts);
  const double r = static_cast<double>(ranks), away = 1.0 - 1.0 / r;
  const double needed = expected_distinct(experts, k, std::min(ranks, experts)) / r;
  return static_cast<double>(tokens) * away * (1.0 - needed) * row_bytes;
}

/// What a token sends away, uniform traffic, on R ranks of N nodes.
struct expected_rows {
  double distinct_ranks, distinct_nodes;
  double off_rank_choices, off_rank_rows;
  double off_node_choices, off_node_rows_by_rank, off_node_rows_by_node;
};
inline expected_rows expect_rows(index_t experts, index_t k, index_t ranks, index_t nodes) {
  const double r = expected_distinct(experts, k, ranks), n = expected_distinct(experts, k, nodes);
  const double away = 1.0 - 1.0 / static_cast<double>(ranks),
               across = 1.0 - 1.0 / static_cast<double>(nodes);
  const auto choices = static_cast<double>(k);
  return {r, n, choices * away, r * away, choices * across, r * across, n * across};
}

}  // namespace moeroute
