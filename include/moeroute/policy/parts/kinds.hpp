// The kinds of parts that a description and the parts themselves name, and what their numbers must
// satisfy: no kernel, so that describing a router costs none.
#pragma once

#include <limits>
#include <string>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// What scores are of a logit.
enum class score_kind { softmax, sigmoid, sqrt_softplus, relu, identity, uniform, softplus };

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
  sum,       ///< the sum of all its experts (SAM's gate in Hetu)
};

/// Which of experts with equal choice scores comes first.
enum class tie_order {
  lower_id,   ///< the library's own order
  higher_id,  ///< of engines whose sort turns equals around; equal groups likewise
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

/// What becomes of GShard's second expert.
enum class second_expert {
  best,      ///< the second largest logit
  sampling,  ///< the largest logit + Gumbel noise among the others
  random,    ///< the second largest, kept with probability min(1, 2 g2)
};

/// How a token's experts follow from ids.
enum class table_key {
  token,   ///< the row of the token's id
  bigram,  ///< a hash of the previous token's id and its own, modulo the table's rows (Roller et
           ///< al. 2021)
};

/// The distribution of logit noise.
enum class noise_kind {
  none,
  gaussian,  ///< standard normal
  gumbel,    ///< -log(-log(u)): sampling from the softmax by its largest noisy logit
};

/// What decides how many experts a token is worth.
enum class count_rule {
  percentile,  ///< those whose score reaches a percentile of the scores (DynaMoE 2026)
  ratio,       ///< those whose score is at least a share of the best one's
  entropy,     ///< one of three counts, by the entropy of the softmax (AdaptiveK)
  tsallis,     ///< a mass as top_p's, or every expert where the Tsallis entropy is high (DynMoLE)
};

/// Among whom a percentile is taken, or who shares a random draw.
enum class row_scope {
  token,  ///< each token by itself
  batch,  ///< all tokens of a call together
};

/// Logits in two halves of E columns each.
enum class logit_pairs {
  none,
  sigmoid_sum,  ///< the score of an expert is sigmoid(first) + sigmoid(second)
  weigh,        ///< the first half chooses, the second weighs (ONNX Runtime's QMoE)
};

/// How the logits of several passes become one.
enum class pass_rule {
  bound,  ///< mean - lambda * standard deviation
  ratio,  ///< mean / max(standard deviation, 1e-6)
};

namespace detail {

MOEROUTE_COLD inline void check_groups(index_t experts, index_t k, index_t groups,
                                       index_t topk_group, float group_fill) {
  check_range("top_k", "groups", groups, 1, experts);
  if (experts % groups != 0) fail_value("top_k", "groups", groups, "a divisor of E = ", experts);
  check_range("top_k", "topk_group", topk_group, 1, groups);
  if (topk_group * (experts / groups) < k)
    fail("top_k", {"topk_group is ", topk_group, " groups of ", experts / groups,
                   " experts, expected room for k = ", k});
  if (group_fill != -std::numeric_limits<float>::infinity() && group_fill != 0.0f)
    fail_value("top_k", "group_fill", group_fill, "-inf or 0");
}

inline void check_top_k(index_t experts, index_t k, index_t groups, index_t topk_group,
                        float group_fill) {
  check_range("top_k", "k", k, 1, experts);
  if (groups != 1) check_groups(experts, k, groups, topk_group, group_fill);
}

inline void check_top_of_each_group(index_t experts, index_t k, index_t groups) {
  check_range("top_of_each_group", "groups", groups, 1, experts);
  if (experts % groups != 0)
    fail_value("top_of_each_group", "groups", groups, "a divisor of E = ", experts);
  check_range("top_of_each_group", "k", k, groups, experts);
  if (k % groups != 0) fail_value("top_of_each_group", "k", k, "a multiple of groups = ", groups);
}

inline void check_top_p(index_t experts, float p, index_t min_k, index_t max_k) {
  if (!(p > 0.0f && p <= 1.0f)) fail_value("top_p", "p", p, "more than 0 and at most 1");
  check_range("top_p", "min_k", min_k, 1, experts);
  if (max_k != 0) check_range("top_p", "max_k", max_k, min_k, max_experts);
}

inline void check_counts(const char* who, index_t experts, index_t min_k, index_t max_k) {
  check_range(who, "min_k", min_k, 1, experts);
  if (max_k != 0) check_range(who, "max_k", max_k, min_k, max_experts);
}

MOEROUTE_COLD inline void check_entropy_counts(float low, float high, index_t min_k, index_t mid_k,
                                               index_t max_k) {
  if (!(low >= 0.0f)) fail_value("counted", "entropy_low", static_cast<double>(low), ">= 0");
  if (!(high >= low))
    fail("counted", "entropy_high is " + std::to_string(high) +
                        ", expected at least entropy_low = " + std::to_string(low));
  check_range("counted", "max_k", max_k, min_k, max_experts);
  check_range("counted", "mid_k", mid_k, min_k, max_k);
}

inline void check_dense_if(float q, float threshold) {
  if (!(q > 0.0f && q <= 8.0f))
    fail_value("dense_if", "q", static_cast<double>(q), "more than 0 and at most 8");
  if (!(threshold >= 0.0f && threshold <= 1.0f))
    fail_value("dense_if", "threshold", static_cast<double>(threshold), "0 to 1");
}

}  // namespace detail

}  // namespace moeroute
