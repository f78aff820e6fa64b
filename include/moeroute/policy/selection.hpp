// Selection rules: which experts a token goes to.
#pragma once

#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/top_k.hpp>

namespace moeroute {

/// A selection rule fills ids and values of a block from its choice scores.
template <class S>
concept selection_rule =
    requires(const S& s, const logit_block& choice, choice_block& c, std::uint64_t* key) {
      { s.choices() } -> std::convertible_to<index_t>;
      { s.check(index_t{}) };
      { s.scratch_words(index_t{}) } -> std::convertible_to<index_t>;
      { s.select(choice, c, key) };
    };

/// The k experts with the largest choice scores, the lowest id first among equals.
///
/// NaN and -inf are never selected. Source: Shazeer et al. 2017.
struct top_k {
  index_t k = 2;

  index_t choices() const { return k; }

  /// Throws: error where k is outside [1, E].
  void check(index_t experts) const { check_range("top_k", "k", k, 1, experts); }

  index_t scratch_words(index_t experts) const { return simd::top_k_scratch(experts, k); }

  template <class A = simd::default_arch>
  void select(const logit_block& choice, choice_block& c, std::uint64_t* key) const {
    simd::top_k_block<A>(choice.logits, choice.stride, choice.rows, choice.experts, c.k, c.value,
                         c.id, key);
  }
};
static_assert(selection_rule<top_k>);

}  // namespace moeroute
