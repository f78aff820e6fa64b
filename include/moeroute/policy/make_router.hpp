// From a description to the kernels that carry it out, picked once.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <moeroute/policy/row/product_keys.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/sparsemixer.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/policy/row/top_p.hpp>

namespace moeroute {

/// What a described router needs beside its fields. The caller keeps it alive.
struct router_tensors {
  lasting_span<const float> bias{};              ///< [E], where selection_bias
  lasting_span<const float> per_expert_scale{};  ///< [E], where per_expert_scale
  lasting_span<const float> gamma{};             ///< [E], row_norm rms; may be left out
  const expert_table* table = nullptr;           ///< where selection is expert_table
};

class any_router;

namespace detail {

// The scratch of whichever router it is.
struct any_buffers {
  static constexpr std::size_t size = 64;
  alignas(std::max_align_t) std::byte of_kind[size];

  template <class B>
  static any_buffers keep(const B& buffers) {
    static_assert(sizeof(B) <= size && std::is_trivially_copyable_v<B>);
    any_buffers kept;
    std::memcpy(kept.of_kind, &buffers, sizeof buffers);
    return kept;
  }
  template <class B>
  const B& as() const {
    return *std::launder(reinterpret_cast<const B*>(of_kind));
  }
};

// An any_router as the stages see it: which router it is, is asked once per block. So a program has
// the stages once, not once for every router.
struct any_token_router {
  const any_router& any;

  index_t k() const;
  index_t columns() const;
  index_t experts(index_t) const;
  side_use reads_side(index_t) const;
  void check(index_t columns) const;
  any_buffers carve(scratch& tape, index_t columns) const;
  index_t rows_alone(index_t) const;
  template <class A = simd::default_arch>
  MOEROUTE_INLINE void route_block(const logit_block& z, const any_buffers& memory,
                                   choice_block& c) const;
  template <class A = simd::default_arch>
  MOEROUTE_INLINE void route_block(const narrow_block<bfloat16>& z, const any_buffers& memory,
                                   choice_block& c) const;
  template <class A = simd::default_arch>
  MOEROUTE_INLINE void route_row(const float* row, index_t columns, index_t token,
                                 const side_inputs& side, expert_id* id, float* weight) const;
  template <class A>
  MOEROUTE_OUT_OF_LINE void route_other_row(const float* row, index_t columns, index_t token,
                                            const side_inputs& side, expert_id* id,
                                            float* weight) const;
};

struct any_ragged_router {
  const any_router& any;

  index_t max_choices(index_t) const;
  index_t columns() const;
  index_t experts(index_t) const;
  side_use reads_side(index_t) const;
  void check(index_t columns) const;
  any_buffers carve(scratch& tape, index_t columns) const;
  template <class A = simd::default_arch>
  index_t route_block(const logit_block& z, const any_buffers& memory, expert_id* id, float* weight,
                      std::int32_t* count) const;
};

}  // namespace detail

/// One of the routers that a router_spec can describe. route() takes it like any other.
///
/// Cost: the kind is looked up once per block of rows, not per token.
class any_router {
 public:
  using kinds =
      std::variant<router<any_score>, table_router<any_score>, top_p, threshold_router<relu>,
                   threshold_router<sigmoid>, threshold_router<identity_score>,
                   product_keys<softmax_selected>, sparsemixer, gshard_top2, random_choice>;

  /// f(the router), whatever its type. Comparisons and no table of functions: f is inlined, and
  /// what it captures stays in registers.
  template <std::size_t i = 0, class F>
  MOEROUTE_INLINE decltype(auto) visit(F&& f) const {
    if constexpr (i + 1 == std::variant_size_v<kinds>) {
      return f(*std::get_if<i>(&kind_));
    } else {
      if (kind_.index() == i) return f(*std::get_if<i>(&kind_));
      return this->template visit<i + 1>(std::forward<F>(f));
    }
  }

  /// Throws: error where the router does not fit the spec's columns.
  MOEROUTE_COLD any_router(router_spec spec, kinds kind)
      : spec_(spec), kind_(std::move(kind)), columns_(spec.columns()) {
    visit([&]<class Kind>(const Kind& r) {
      r.check(columns_);
      experts_ = r.experts(columns_);
      use_ = side_use_of(r, columns_);
      reads_logits_ = moeroute::reads_logits(r);
      ragged_ = ragged_router<Kind>;
      if constexpr (ragged_router<Kind>)
        choices_ = r.max_choices(columns_);
      else
        choices_ = r.k();
      if constexpr (requires { r.rows_alone(columns_); }) rows_alone_ = r.rows_alone(columns_);
    });
  }

  /// The same for a router whose score the program knows: its kernels are those of any score.
  template <class Score>
  any_router(router_spec spec, const router<Score>& r)
      : any_router(spec,
                   kinds(router<any_score>{r.score, r.selection, r.weight, r.bias, r.transform})) {}

  const router_spec& spec() const { return spec_; }
  /// Columns of the logits that it takes.
  index_t columns() const { return columns_; }
  /// Whether a token's number of choices varies.
  bool ragged() const { return ragged_; }
  /// Choices per token, or the most of them.
  index_t k() const { return choices_; }

  detail::any_token_router as_token_router() const { return {*this}; }
  detail::any_ragged_router as_ragged_router() const { return {*this}; }

  /// What it reads of the side inputs.
  side_use reads_side(index_t) const { return use_; }
  bool reads_logits() const { return reads_logits_; }

 private:
  friend detail::any_token_router;
  friend detail::any_ragged_router;

  void check(index_t columns) const { check_size("route", "logits.cols", columns, columns_); }
  detail::any_buffers carve(scratch& tape) const {
    return visit([&](const auto& r) { return detail::any_buffers::keep(r.carve(tape, columns_)); });
  }

  router_spec spec_;
  kinds kind_;
  index_t columns_ = 0, experts_ = 0, choices_ = 0, rows_alone_ = 0;
  side_use use_;
  bool ragged_ = false, reads_logits_ = true;
};

namespace detail {

template <class Kind>
using buffers_of = decltype(std::declval<const Kind&>().carve(std::declval<scratch&>(), index_t{}));

inline index_t any_token_router::k() const { return any.choices_; }
inline side_use any_token_router::reads_side(index_t) const { return any.use_; }
inline index_t any_token_router::columns() const { return any.columns_; }
inline index_t any_token_router::experts(index_t) const { return any.experts_; }
inline void any_token_router::check(index_t columns) const {
  if (any.ragged_) [[unlikely]]
    fail("route", "the router's k varies: route() takes it as it is");
  any.check(columns);
}
inline index_t any_token_router::rows_alone(index_t) const { return any.rows_alone_; }
inline any_buffers any_token_router::carve(scratch& tape, index_t) const { return any.carve(tape); }

template <class A>
MOEROUTE_INLINE void any_token_router::route_block(const logit_block& z, const any_buffers& memory,
                                                   choice_block& c) const {
  any.visit([&]<class Kind>(const Kind& r) {
    // Field by field: a copy of what has just been written field by field would wait for it.
    if constexpr (token_router<Kind>)
      r.template route_block<A>(
          logit_block{z.logits, z.stride, z.rows, z.experts, z.first_token, z.side},
          memory.as<buffers_of<Kind>>(), c);
  });
}

template <class A>
MOEROUTE_INLINE void any_token_router::route_block(const narrow_block<bfloat16>& z,
                                                   const any_buffers& memory,
                                                   choice_block& c) const {
  any.visit([&]<class Kind>(const Kind& r) {
    if constexpr (bfloat16_router<Kind>)
      r.template route_block<A>(z, memory.as<buffers_of<Kind>>(), c);
    else if constexpr (token_router<Kind>)
      r.template route_block<A>(z.template widened<A>(), memory.as<buffers_of<Kind>>(), c);
  });
}

template <class A>
MOEROUTE_INLINE void any_token_router::route_row(const float* row, index_t columns, index_t token,
                                                 const side_inputs& side, expert_id* id,
                                                 float* weight) const {
  // Most are of the first kind: the others, whose code is long, stay out of the loop over rows.
  if (const auto* const ranked = std::get_if<0>(&any.kind_)) [[likely]]
    ranked->template route_row<A>(row, columns, token, side, id, weight);
  else
    this->template route_other_row<A>(row, columns, token, side, id, weight);
}

template <class A>
void any_token_router::route_other_row(const float* row, index_t columns, index_t token,
                                       const side_inputs& side, expert_id* id,
                                       float* weight) const {
  any.visit([&]<class Kind>(const Kind& r) {
    if constexpr (row_router<Kind> && !std::is_same_v<Kind, router<any_score>>)
      r.template route_row<A>(row, columns, token, side, id, weight);
  });
}

inline index_t any_ragged_router::max_choices(index_t) const { return any.choices_; }
inline side_use any_ragged_router::reads_side(index_t) const { return any.use_; }
inline index_t any_ragged_router::columns() const { return any.columns_; }
inline index_t any_ragged_router::experts(index_t) const { return any.experts_; }
inline void any_ragged_router::check(index_t columns) const { any.check(columns); }
inline any_buffers any_ragged_router::carve(scratch& tape, index_t) const {
  return any.carve(tape);
}

template <class A>
index_t any_ragged_router::route_block(const logit_block& z, const any_buffers& memory,
                                       expert_id* id, float* weight, std::int32_t* count) const {
  return any.visit([&]<class Kind>(const Kind& r) -> index_t {
    if constexpr (ragged_router<Kind>)
      return r.template route_block<A>(z, memory.as<buffers_of<Kind>>(), id, weight, count);
    else
      return 0;
  });
}

}  // namespace detail
static_assert(bfloat16_router<detail::any_token_router>);
static_assert(ragged_router<detail::any_ragged_router>);

/// The router that a spec describes.
///
/// Throws: error where the spec contradicts itself, or a tensor that it needs is missing or has
/// another length than E. The spec's capacity is applied by the stage of that name, not by the
/// router.
MOEROUTE_COLD inline any_router make_router(const router_spec& s,
                                            const router_tensors& tensors = {}) {
  check(s);
  const auto needed = [&](std::span<const float> list, bool wanted, const char* name,
                          const char* size) {
    const auto n = static_cast<index_t>(list.size());
    check_size("make_router", size, n, wanted ? s.experts : 0);
    check_numbers("make_router", name, list.data(), n);
  };
  needed(tensors.bias, s.selection_bias, "bias", "bias.size()");
  needed(tensors.per_expert_scale, s.per_expert_scale, "per_expert_scale",
         "per_expert_scale.size()");
  if (!tensors.gamma.empty())
    check_size("make_router", "gamma.size()", static_cast<index_t>(tensors.gamma.size()),
               s.experts);

  weight_rule weight{.normalize = s.normalize,
                     .p = s.lp_p,
                     .eps_where = s.eps_where,
                     .eps = s.eps,
                     .divide = s.divide_by_k ? static_cast<float>(s.k) : 1.0f,
                     .scale = s.scale_where == scale_place::weights ? s.scale : 1.0f,
                     .expert_scale = tensors.per_expert_scale};
  // What is normalised after dropping is normalised by the capacity stage.
  if (s.capacity != 0 && !s.normalize_before_drop) weight = raw_weights;
  const logit_transform transform{.temperature = s.temperature, .softcap = s.softcap};

  switch (s.selection) {
    case selection_kind::top_k: {
      const top_k rule{s.k, s.groups, s.topk_group, s.group_score, s.group_fill, s.lost_weight};
      return {s, router{any_score(s.score, s.domain), rule, weight, selection_bias(tensors.bias),
                        transform}};
    }
    case selection_kind::expert_table: {
      if (tensors.table == nullptr)
        fail("make_router", "table is missing, expected one of k ids per token");
      check_size("make_router", "table k", tensors.table->k(), s.k);
      check_size("make_router", "table experts", tensors.table->experts(), s.experts);
      if (s.score == score_kind::relu || s.score == score_kind::identity)
        detail::clash("selection=hash_table", {"score=", to_string(s.score)},
                      "tables are weighted by softmax, sigmoid, sqrtsoftplus or uniform");
      return {s, table_router<any_score>{tensors.table, any_score(s.score, s.domain), weight,
                                         transform}};
    }
    case selection_kind::top_p:
      return {s, top_p{s.top_p, s.crossing, s.min_k, s.max_k, weight, transform}};
    case selection_kind::threshold: {
      const auto with = [&]<class Score>(Score score) {
        return any_router(s, threshold_router<Score>{.threshold = s.threshold,
                                                     .score = score,
                                                     .norm = s.row_norm,
                                                     .eps = s.eps,
                                                     .scale = weight.scale,
                                                     .gamma = tensors.gamma,
                                                     .transform = transform});
      };
      if (s.score == score_kind::relu) return with(relu{});
      if (s.score == score_kind::sigmoid) return with(sigmoid{});
      return with(identity_score{});
    }
    case selection_kind::product_keys: return {s, product_keys<>{.choices = s.k, .weight = weight}};
    case selection_kind::sparsemixer: return {s, sparsemixer{s.jitter}};
    case selection_kind::top2:
      return {s, gshard_top2{.policy = second_expert::best, .weight = weight}};
    case selection_kind::random: break;
  }
  return {s, random_choice{s.k}};
}

}  // namespace moeroute
