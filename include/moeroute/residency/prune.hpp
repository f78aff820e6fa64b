// Models with fewer experts: which stay, and what that makes of gates, biases, tables and
// descriptions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <moeroute/policy/row/table.hpp>

namespace moeroute {

/// The experts that stay, in their old order.
class expert_subset {
 public:
  /// Throws: error where nobody stays, an id is outside [0, E), or the list does not ascend.
  expert_subset(std::vector<expert_id> kept, index_t experts)
      : kept_(std::move(kept)), place_(checked(experts), no_expert) {
    check_range("expert_subset", "kept", static_cast<index_t>(kept_.size()), 1, experts);
    expert_id before = -1;
    for (std::size_t i = 0; i < kept_.size(); ++i) {
      check_range("expert_subset", "expert", kept_[i], before + 1, experts - 1);
      before = kept_[i];
      place_[static_cast<std::size_t>(before)] = static_cast<expert_id>(i);
    }
  }

  index_t before() const { return static_cast<index_t>(place_.size()); }
  index_t after() const { return static_cast<index_t>(kept_.size()); }
  std::span<const expert_id> kept() const { return kept_; }
  /// The new id of an expert; no_expert where it is gone.
  expert_id place(expert_id e) const {
    check_range("expert_subset", "expert", e, 0, before() - 1);
    return place_[static_cast<std::size_t>(e)];
  }

 private:
  static std::size_t checked(index_t experts) {
    check_range("expert_subset", "experts", experts, 1, max_experts);
    return static_cast<std::size_t>(experts);
  }
  std::vector<expert_id> kept_, place_;
};

/// The n experts of most worth (REAP's saliency, frequency, ...), the lowest ids among equals.
/// Throws: error where n is outside [1, E] or a worth is NaN.
inline expert_subset keep_best(std::span<const double> worth, index_t n) {
  const auto experts = static_cast<index_t>(worth.size());
  check_range("keep_best", "n", n, 1, experts);
  for (const double w : worth)
    if (w != w) fail_value("keep_best", "worth", w, "a number");
  std::vector<expert_id> order(worth.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            greatest_first([&](expert_id i) { return worth[static_cast<std::size_t>(i)]; }));
  order.resize(static_cast<std::size_t>(n));
  std::sort(order.begin(), order.end());
  return {std::move(order), experts};
}

/// Rows of a gate [E, d] that stay.
inline std::vector<float> kept_rows(matrix_view<const float> gate, const expert_subset& stay) {
  check_size("kept_rows", "gate.rows", gate.rows, stay.before());
  std::vector<float> out;
  for (const expert_id e : stay.kept()) out.insert(out.end(), gate.row(e), gate.row(e) + gate.cols);
  return out;
}

/// A value per expert (bias, factor) of those that stay.
inline std::vector<float> kept_values(std::span<const float> values, const expert_subset& stay) {
  check_size("kept_values", "values.size()", static_cast<index_t>(values.size()), stay.before());
  std::vector<float> out;
  for (const expert_id e : stay.kept()) out.push_back(values[static_cast<std::size_t>(e)]);
  return out;
}

/// A table of those that stay: tokens lose the choices of those that are gone.
inline expert_table kept_table(const expert_table& table, const expert_subset& stay) {
  check_size("kept_table", "table.experts()", table.experts(), stay.before());
  std::vector<expert_id> ids;
  for (index_t t = 0; t < table.vocabulary(); ++t)
    for (const expert_id e : table.of(t)) ids.push_back(e == no_expert ? no_expert : stay.place(e));
  check_range("kept_table", "k", table.k(), 1, stay.after());
  return {std::move(ids), table.k(), stay.after()};
}

/// The description of the router that is left.
///
/// Throws: error where k (or what a top-p may take) exceeds the experts that stay, groups do not
/// keep equally many, zero experts are among those that go, or the router does not choose among
/// columns of its own (product keys).
inline router_spec pruned(router_spec spec, const expert_subset& stay) {
  constexpr const char* where = "pruned";
  check_size(where, "experts", stay.before(), spec.experts);
  if (spec.selection == selection_kind::product_keys)
    fail(where, "product keys have no column per expert, expected another selection");
  check_range(where, "k", spec.k, 1, stay.after());
  for (index_t e = spec.experts - spec.zero_experts; e < spec.experts; ++e)
    if (stay.place(static_cast<expert_id>(e)) == no_expert)
      fail(where,
           "expert " + std::to_string(e) + " is a zero expert, expected all of them to stay");
  if (spec.groups > 1) {
    const index_t size = spec.experts / spec.groups;
    std::vector<index_t> left(static_cast<std::size_t>(spec.groups));
    for (const expert_id e : stay.kept()) ++left[static_cast<std::size_t>(e / size)];
    for (std::size_t g = 0; g < left.size(); ++g)
      if (left[g] != left[0])
        fail(where, "group " + std::to_string(g) + " keeps " + std::to_string(left[g]) +
                        " experts and group 0 " + std::to_string(left[0]) +
                        ", expected equally many");
  }
  spec.experts = stay.after();
  check(spec);
  return spec;
}

}  // namespace moeroute
