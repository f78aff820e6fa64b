// A score that is picked at run time: what comes after it is compiled once for all of them.
#pragma once

#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/score.hpp>

namespace moeroute {

/// One of the scores that a description names; which of them is asked once per row, or block of
/// rows.
///
/// Determinism: the bits of the score itself. Example: router{any_score(score_kind::sigmoid),
/// top_k{.k = 8}}.
class any_score {
 public:
  /// f(the score), whatever its type.
  template <class F>
  MOEROUTE_INLINE constexpr decltype(auto) visit(F&& f) const {
    switch (kind_) {
      case score_kind::sigmoid: return f(sigmoid{});
      case score_kind::sqrt_softplus: return f(sqrt_softplus{});
      case score_kind::softplus: return f(softplus{});
      case score_kind::relu: return f(relu{});
      case score_kind::identity: return f(identity_score{});
      case score_kind::uniform: return f(uniform_score{});
      default: return selected_ ? f(softmax_selected{}) : f(softmax{});
    }
  }

  constexpr any_score(score_kind kind = score_kind::softmax,
                      score_domain domain = score_domain::all)
      : kind_(kind), selected_(kind == score_kind::softmax && domain == score_domain::selected) {
    traits = visit([](auto score) { return decltype(score)::traits; });
  }
  constexpr any_score(softmax) {}
  constexpr any_score(softmax_selected) : any_score(score_kind::softmax, score_domain::selected) {}
  constexpr any_score(sigmoid) : any_score(score_kind::sigmoid) {}
  constexpr any_score(sqrt_softplus) : any_score(score_kind::sqrt_softplus) {}
  constexpr any_score(softplus) : any_score(score_kind::softplus) {}
  constexpr any_score(relu) : any_score(score_kind::relu) {}
  constexpr any_score(identity_score) : any_score(score_kind::identity) {}
  constexpr any_score(uniform_score) : any_score(score_kind::uniform) {}

  score_traits traits = softmax::traits;

  constexpr score_kind kind() const { return kind_; }
  constexpr score_domain domain() const {
    return selected_ ? score_domain::selected : score_domain::all;
  }

  /// Whether it is the same for every logit.
  constexpr bool uniform() const { return kind_ == score_kind::uniform; }

  template <class A = simd::default_arch>
  MOEROUTE_OUT_OF_LINE void score_choices(const logit_block& z, choice_block& c,
                                          score_scale scale) const {
    visit([&](auto score) { score.template score_choices<A>(z, c, scale); });
  }

  template <class A, int n>
  MOEROUTE_INLINE void score_one(const float* z, index_t experts, row_choices<A, n>& c,
                                 score_scale scale) const {
    visit([&](auto score) MOEROUTE_INLINE_LAMBDA { score.score_one(z, experts, c, scale); });
  }

  template <class A = simd::default_arch>
  void score_row(const float* z, index_t experts, float* scores) const {
    visit([&](auto score) { score.template score_row<A>(z, experts, scores); });
  }

 private:
  score_kind kind_ = score_kind::softmax;
  bool selected_ = false;
};
static_assert(row_score<any_score>);

}  // namespace moeroute
