// The kinds of parts that a description and the parts themselves name, and what their numbers must
// satisfy: no kernel, so that describing a router costs none.
#pragma once

#include <limits>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

enum class score_kind { softmax, sigmoid, sqrt_softplus, relu, identity, uniform };

/// Which experts are scored.
enum class score_domain {
  all,       ///< every expert; the choice is made on scores (+ bias)
  selected,  ///< the choice is made on logits (+ bias), then only the k winners are scored
};

/// What a group of experts is worth.
enum class group_score {
  max,       ///< its best choice score (DeepSeek-V2)
  top2_sum,  ///< the sum of its two best (DeepSeek-V3); of its one where it has only one
  top_sum,   ///< the sum of its k / topk_group best (Megatron-LM)
};

/// What an expert of a lost group weighs that is chosen all the same: with group_fill 0, where the
/// groups that stay have too few scores above 0.
enum class lost_weight {
  as_published,  ///< zero with group_score::max, own otherwise
  zero,          ///< 0: the masked scores are the weights (DeepSeek-V2's class)
  own,           ///< its own score (DeepSeek-V3's and Mistral4's classes)
};

/// What the selected scores are divided by.
enum class normalization {
  none,
  sum,  ///< their sum
  lp,   ///< their Lp norm (DBRX); weights are 0 where a float cannot hold the sum of p-th powers
};

/// How eps enters the divisor.
enum class eps_mode {
  none,
  add,    ///< sum + eps
  clamp,  ///< max(sum, eps)
};

/// Whether the expert whose probability crosses the mass is in.
enum class crossing {
  include,         ///< the first with cumulative sum >= p is the last one in
  include_strict,  ///< the first with cumulative sum > p (Huang et al. 2024)
  exclude,         ///< only those with cumulative sum <= p (DynMoLE, Li et al. 2025)
};

/// What the scores above the threshold are divided by.
enum class threshold_norm {
  none,  ///< ReMoE
  sum,   ///< sum * norm_scale + eps (BlockFFN 'sum')
  rms,   ///< sqrt(mean over all E of score^2 + eps), times gamma per expert (BlockFFN)
};

namespace detail {

MOEROUTE_COLD inline void check_groups(index_t experts, index_t k, index_t groups,
                                       index_t topk_group, float group_fill) {
  check_range("top_k", "groups", groups, 1, experts);
  if (experts % groups != 0) fail_value("top_k", "groups", groups, "a divisor of E = ", experts);
  check_range("top_k", "topk_group", topk_group, 1, groups);
  if (topk_group * (experts / groups) < k)
    fail("top_k", "topk_group is " + std::to_string(topk_group) + " groups of " +
                      std::to_string(experts / groups) +
                      " experts, expected room for k = " + std::to_string(k));
  if (group_fill != -std::numeric_limits<float>::infinity() && group_fill != 0.0f)
    fail_value("top_k", "group_fill", group_fill, "-inf or 0");
}

inline void check_top_k(index_t experts, index_t k, index_t groups, index_t topk_group,
                        float group_fill) {
  check_range("top_k", "k", k, 1, experts);
  if (groups != 1) check_groups(experts, k, groups, topk_group, group_fill);
}

inline void check_top_p(index_t experts, float p, index_t min_k, index_t max_k) {
  if (!(p > 0.0f && p <= 1.0f)) fail_value("top_p", "p", p, "more than 0 and at most 1");
  check_range("top_p", "min_k", min_k, 1, experts);
  if (max_k != 0) check_range("top_p", "max_k", max_k, min_k, max_experts);
}

}  // namespace detail

}  // namespace moeroute
