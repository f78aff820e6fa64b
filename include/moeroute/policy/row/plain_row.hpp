// One row, from logits to weights, the way most models go: in registers, and without asking what is
// known when a router is made.
#pragma once

#include <cstdint>

#include <moeroute/policy/parts/any_score.hpp>
#include <moeroute/policy/parts/choices.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/simd/select/top_k_row.hpp>

namespace moeroute::detail {

// How the k <= 16 best logits of a row are weighed: by scores in [0, 1], which need no check for
// what is not finite.
enum class plain_row : std::uint8_t {
  none,     // not one of these
  softmax,  // over all experts
  among,    // over the selected ones, which is also the first divided by its sum
  sigmoid,
};

// How this router routes a row. Requires: it takes rows alone.
MOEROUTE_COLD inline plain_row plain_row_of(const router<any_score>& r) {
  const weight_rule& w = r.weight;
  const bool sum = w.normalize == normalization::sum;
  if (!r.selects_on_logits() || r.k() > block_rows || w.normalize == normalization::lp ||
      w.eps_where != eps_mode::none || w.divide != 1.0f || w.scale != 1.0f ||
      !w.expert_scale.empty())
    return plain_row::none;
  if (r.score.kind() == score_kind::sigmoid) return sum ? plain_row::none : plain_row::sigmoid;
  if (r.score.kind() != score_kind::softmax) return plain_row::none;
  const bool selected = r.score.domain() == score_domain::selected;
  if (sum && selected) return plain_row::none;
  return sum || selected ? plain_row::among : plain_row::softmax;
}

// Routes one row with the bits of the router that it is `plain_row_of`. Requires: 1 <= k <= 16.
template <class A>
MOEROUTE_OUT_OF_LINE void route_plain_row(plain_row how, int k, const float* z, index_t experts,
                                          expert_id* id, float* weights) {
  using F = simd::vfloat<A>;
  row_choices<A, simd::registers_per_block<A>> c(k);
  simd::top_k_row<A>(z, experts, k, c.value, c.id);
  if (how == plain_row::sigmoid) {
    sigmoid::score_one(z, experts, c, score_scale::exact);
  } else {
    const bool all = how == plain_row::softmax;
    softmax::score_one(z, experts, c, all ? score_scale::exact : score_scale::up_to_row_factor);
    if (all) return c.store(id, weights);
    const F sum = c.sum([](F x) MOEROUTE_INLINE_LAMBDA { return x; });
    c.for_each([&](F e, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
      return simd::select<A>(present, simd::divide_first<A>(e, sum, k), F(0.0f));
    });
  }
  c.store(id, weights);
}

}  // namespace moeroute::detail
