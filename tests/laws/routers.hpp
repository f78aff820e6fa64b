// The routers that obey the laws: the one list. A new router is one entry.
#pragma once

#include <algorithm>
#include <functional>
#include <iterator>
#include <memory>
#include <moeroute/policy/router.hpp>
#include <string>
#include <utility>
#include <vector>

#include "laws/subject.hpp"
#include "oracle/routing.hpp"

namespace test {

/// One entry of the list.
struct listed_router {
  std::string name;
  /// The router with k choices over E experts.
  std::function<std::unique_ptr<subject>(index_t k, index_t experts)> make;
  /// What it should decide: in double, [T, k].
  std::function<oracle::decision(const std::vector<float>& logits, index_t tokens, index_t experts,
                                 index_t k)>
      reference{};
  /// In its place: the first thing that is wrong with what it decided, recomputed in double.
  std::function<std::string(const std::vector<float>& logits, index_t tokens, index_t experts,
                            index_t k, const std::vector<moeroute::expert_id>& ids,
                            const std::vector<float>& weights)>
      verify{};
  bool shift_invariant = false;  ///< adding a constant to a row changes nothing
  bool permutable = true;  ///< experts can be renumbered: no bias, no table, no groups, no scales
  bool compact = true;     ///< a missing choice is behind those that were made: no table
  bool shares = true;      ///< equal scores have equal weights: no scale per expert, no sparsemixer
  bool rows_apart = true;  ///< a row's choices depend on no other row: no rule of the whole batch
  bool every_expert = false;  ///< ragged: rows are compared with room for E choices
  index_t least_k = 1;
  index_t most_k = moeroute::max_experts;

  bool takes(index_t k) const { return k >= least_k && k <= most_k; }
  /// Places of a row: k, or E where the number of choices varies.
  index_t width(index_t k, index_t experts) const { return every_expert ? experts : k; }
  /// A k that it takes, as close to the wanted one as it gets.
  index_t near(index_t k) const { return std::clamp(k, least_k, most_k); }
};

/// The kinds of routers of the catalogue, each at any size. Defined in catalogue_routers_test.cpp.
std::vector<listed_router> catalogue_routers();

/// An entry of a router that the softmax oracle describes.
template <class Score>
listed_router softmax_family(std::string name, moeroute::weight_rule weight,
                             oracle::softmax_routing how) {
  return {
      .name = std::move(name),
      .make =
          [weight](index_t k, index_t) {
            return make_subject(moeroute::router<Score>{.selection = {.k = k}, .weight = weight});
          },
      .reference = [how](const std::vector<float>& z, index_t tokens, index_t experts,
                         index_t k) { return oracle::route(how, z, tokens, experts, k); },
      .shift_invariant = true};
}

inline std::vector<listed_router> listed_routers() {
  using moeroute::eps_mode;
  using moeroute::normalization;
  using moeroute::softmax;
  using moeroute::softmax_selected;
  const auto all = oracle::domain::all, selected = oracle::domain::selected;
  const auto sum = oracle::divisor::sum, lp = oracle::divisor::lp;
  std::vector<listed_router> list = {
      softmax_family<softmax>("softmax", {}, {.scored = all}),
      softmax_family<softmax>("softmax, sum", {.normalize = normalization::sum},
                              {.scored = all, .normalize = sum}),
      softmax_family<softmax>("softmax, L2", {.normalize = normalization::lp, .p = 2.0f},
                              {.scored = all, .normalize = lp, .p = 2}),
      softmax_family<softmax>("softmax, sum + eps, scaled",
                              {.normalize = normalization::sum,
                               .eps_where = eps_mode::add,
                               .eps = 0.25f,
                               .scale = 2.5f},
                              {.scored = all,
                               .normalize = sum,
                               .eps_where = oracle::eps_place::add,
                               .eps = 0.25,
                               .scale = 2.5}),
      softmax_family<softmax>(
          "softmax, max(sum, eps)",
          {.normalize = normalization::sum, .eps_where = eps_mode::clamp, .eps = 0.5f},
          {.scored = all, .normalize = sum, .eps_where = oracle::eps_place::clamp, .eps = 0.5}),
      softmax_family<softmax_selected>("softmax of the selected", {}, {.scored = selected}),
      softmax_family<softmax_selected>("softmax of the selected, scaled", {.scale = -0.5f},
                                       {.scored = selected, .scale = -0.5}),
  };
  std::ranges::move(catalogue_routers(), std::back_inserter(list));
  return list;
}

}  // namespace test
