// From a description to the kernels that carry it out, picked once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/parts/row_transform.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <moeroute/policy/row/plain_row.hpp>
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
  lasting_span<const float> second_bias{};       ///< [E], where class_bias
  steering steer{};                              ///< where steering
  lasting_span<const float> share{};             ///< [E], where shares
};

class any_router;

namespace detail {

// The scratch of whichever router it is.
template <std::size_t size>
struct any_buffers {
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

template <class Kind>
using buffers_of = decltype(std::declval<const Kind&>().carve(std::declval<scratch&>(), index_t{}));

// A router picked at run time as the stages see it: which one it is, is asked once per block. So a
// program has the stages once, not once for every router.
template <class Any>
struct any_token_router {
  const Any& any;
  using any_buffers = typename Any::buffers;
  static constexpr bool calls_rows = true;  // route_row is a few calls: it may be there twice

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

template <class Any>
struct any_ragged_router {
  const Any& any;
  using any_buffers = typename Any::buffers;

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

// One of some kinds of routers.
template <class... Kinds>
class router_of_kinds {
 public:
  using kinds = std::variant<Kinds...>;
  using first_kind = std::variant_alternative_t<0, kinds>;
  using buffers = any_buffers<std::max({sizeof(buffers_of<Kinds>)...})>;

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
  MOEROUTE_COLD router_of_kinds(router_spec spec, kinds kind)
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
      if constexpr (std::is_same_v<Kind, router<any_score>>)
        if (rows_alone_ > 0) plain_ = plain_row_of(r);
    });
  }

  const router_spec& spec() const { return spec_; }
  /// Columns of the logits that it takes.
  index_t columns() const { return columns_; }
  /// Whether a token's number of choices varies.
  bool ragged() const { return ragged_; }
  /// Choices per token, or the most of them.
  index_t k() const { return choices_; }

  any_token_router<router_of_kinds> as_token_router() const { return {*this}; }
  any_ragged_router<router_of_kinds> as_ragged_router() const { return {*this}; }

  /// What it reads of the side inputs.
  side_use reads_side(index_t) const { return use_; }
  bool reads_logits() const { return reads_logits_; }

 private:
  friend any_token_router<router_of_kinds>;
  friend any_ragged_router<router_of_kinds>;

  void check(index_t columns) const { check_size("route", "logits.cols", columns, columns_); }
  buffers carve(scratch& tape) const {
    return visit([&](const auto& r) { return buffers::keep(r.carve(tape, columns_)); });
  }

  router_spec spec_;
  kinds kind_;
  index_t columns_ = 0, experts_ = 0, choices_ = 0, rows_alone_ = 0;
  side_use use_;
  bool ragged_ = false, reads_logits_ = true;
  plain_row plain_ = plain_row::none;
};

template <class Any>
index_t any_token_router<Any>::k() const {
  return any.choices_;
}
template <class Any>
side_use any_token_router<Any>::reads_side(index_t) const {
  return any.use_;
}
template <class Any>
index_t any_token_router<Any>::columns() const {
  return any.columns_;
}
template <class Any>
index_t any_token_router<Any>::experts(index_t) const {
  return any.experts_;
}
template <class Any>
void any_token_router<Any>::check(index_t columns) const {
  if (any.ragged_) [[unlikely]]
    fail("route", "the router's k varies: route() takes it as it is");
  any.check(columns);
}
template <class Any>
index_t any_token_router<Any>::rows_alone(index_t) const {
  return any.rows_alone_;
}
template <class Any>
typename Any::buffers any_token_router<Any>::carve(scratch& tape, index_t) const {
  return any.carve(tape);
}

template <class Any>
template <class A>
MOEROUTE_INLINE void any_token_router<Any>::route_block(const logit_block& z,
                                                        const any_buffers& memory,
                                                        choice_block& c) const {
  any.visit([&]<class Kind>(const Kind& r) {
    // Field by field: a copy of what has just been written field by field would wait for it.
    if constexpr (token_router<Kind>)
      r.template route_block<A>(
          logit_block{z.logits, z.stride, z.rows, z.experts, z.first_token, z.side},
          memory.template as<buffers_of<Kind>>(), c);
  });
}

template <class Any>
template <class A>
MOEROUTE_INLINE void any_token_router<Any>::route_block(const narrow_block<bfloat16>& z,
                                                        const any_buffers& memory,
                                                        choice_block& c) const {
  any.visit([&]<class Kind>(const Kind& r) {
    if constexpr (bfloat16_router<Kind>)
      r.template route_block<A>(z, memory.template as<buffers_of<Kind>>(), c);
    else if constexpr (token_router<Kind>)
      r.template route_block<A>(z.template widened<A>(), memory.template as<buffers_of<Kind>>(), c);
  });
}

template <class Any>
template <class A>
MOEROUTE_INLINE void any_token_router<Any>::route_row(const float* row, index_t columns,
                                                      index_t token, const side_inputs& side,
                                                      expert_id* id, float* weight) const {
  if (any.plain_ != plain_row::none) [[likely]]
    return route_plain_row<A>(any.plain_, static_cast<int>(any.choices_), row, columns, id, weight);
  // The others, whose code is long, stay out of the loop over rows.
  this->template route_other_row<A>(row, columns, token, side, id, weight);
}

template <class Any>
template <class A>
void any_token_router<Any>::route_other_row(const float* row, index_t columns, index_t token,
                                            const side_inputs& side, expert_id* id,
                                            float* weight) const {
  any.visit([&]<class Kind>(const Kind& r) {
    if constexpr (row_router<Kind>) r.template route_row<A>(row, columns, token, side, id, weight);
  });
}

template <class Any>
index_t any_ragged_router<Any>::max_choices(index_t) const {
  return any.choices_;
}
template <class Any>
side_use any_ragged_router<Any>::reads_side(index_t) const {
  return any.use_;
}
template <class Any>
index_t any_ragged_router<Any>::columns() const {
  return any.columns_;
}
template <class Any>
index_t any_ragged_router<Any>::experts(index_t) const {
  return any.experts_;
}
template <class Any>
void any_ragged_router<Any>::check(index_t columns) const {
  any.check(columns);
}
template <class Any>
typename Any::buffers any_ragged_router<Any>::carve(scratch& tape, index_t) const {
  return any.carve(tape);
}

template <class Any>
template <class A>
index_t any_ragged_router<Any>::route_block(const logit_block& z, const any_buffers& memory,
                                            expert_id* id, float* weight,
                                            std::int32_t* count) const {
  return any.visit([&]<class Kind>(const Kind& r) -> index_t {
    if constexpr (ragged_router<Kind>)
      return r.template route_block<A>(z, memory.template as<buffers_of<Kind>>(), id, weight,
                                       count);
    else
      return 0;
  });
}

}  // namespace detail

/// One of the common routers that a router_spec can describe. route() takes it like any other.
///
/// Cost: the kind is looked up once per block of rows, not per token.
/// Example:
///
///     const any_router r = make_router(parse_spec("E=8 k=2 score=softmax"));
///     route(r, logits, ws, choices);
class any_router : public detail::router_of_kinds<
                       router<any_score>, table_router<any_score>, top_p, threshold_router<relu>,
                       threshold_router<sigmoid>, threshold_router<identity_score>,
                       product_keys<softmax_selected>, sparsemixer, gshard_top2, random_choice> {
 public:
  using router_of_kinds::router_of_kinds;

  /// The same for a router whose score the program knows: its kernels are those of any score.
  template <class Score>
  any_router(router_spec spec, const router<Score>& r)
      : router_of_kinds(
            spec, kinds(router<any_score>{r.score, r.selection, r.weight, r.bias, r.transform})) {}
};
static_assert(bfloat16_router<decltype(std::declval<const any_router&>().as_token_router())>);
static_assert(ragged_router<decltype(std::declval<const any_router&>().as_ragged_router())>);

namespace detail {

// What every maker checks of the tensors: those that the spec names are there, and no other.
MOEROUTE_COLD inline void check_tensors(const router_spec& s, const router_tensors& tensors) {
  const auto needed = [&](std::span<const float> list, bool wanted, const char* name,
                          const char* size) {
    const auto n = static_cast<index_t>(list.size());
    check_size("make_router", size, n, wanted ? s.experts : 0);
    check_numbers("make_router", name, list.data(), n);
  };
  needed(tensors.bias, s.selection_bias, "bias", "bias.size()");
  needed(tensors.second_bias, s.class_bias, "second_bias", "second_bias.size()");
  needed(tensors.per_expert_scale, s.per_expert_scale, "per_expert_scale",
         "per_expert_scale.size()");
  if (!tensors.gamma.empty())
    check_size("make_router", "gamma.size()", static_cast<index_t>(tensors.gamma.size()),
               s.experts);
  needed(tensors.share, s.shares, "share", "share.size()");
  if (tensors.steer.active() != s.steering)
    fail("make_router", s.steering ? "steer has no expert, expected some: the spec says steering"
                                   : "steer has experts, which the spec does not say: steering");
}

inline weight_rule weight_rule_of(const router_spec& s, const router_tensors& tensors) {
  // What is normalised after dropping is normalised by the capacity stage.
  if (s.capacity != 0 && !s.normalize_before_drop) return raw_weights;
  return {.normalize = s.normalize,
          .p = s.lp_p,
          .eps_where = s.eps_where,
          .eps = s.eps,
          .divide = s.divide_by_k ? static_cast<float>(s.k) : 1.0f,
          .scale = s.scale_where == scale_place::weights ? s.scale : 1.0f,
          .expert_scale = tensors.per_expert_scale};
}

// Throws where the spec is another maker's.
MOEROUTE_COLD inline void check_maker(const char* who, const router_spec& s, bool others) {
  if (!others && s.selection != selection_kind::soft) return;
  fail(who, {"selection is ", to_string(s.selection), ", which ",
             s.selection == selection_kind::soft ? "chooses nothing: layer/soft_moe.hpp"
             : s.sees_batch()                    ? "sees the whole batch: make_batch_router"
             : s.has_rare_words()                ? "has rare words: make_rare_router"
                                                 : "has common words only: make_router"});
}

inline logit_transform transform_of(const router_spec& s) {
  return {.temperature = s.temperature,
          .softcap = s.softcap,
          .noise = {.kind = s.noise, .sigma = s.noise_sigma, .floor = s.noise_floor}};
}

inline top_k best_of(const router_spec& s) {
  return {s.k, s.groups, s.topk_group, s.group_score, s.group_fill, s.lost_weight};
}

}  // namespace detail

/// The router that a spec describes, of the common ones: a token's own choice, without the words
/// that router_spec::has_rare_words() names. make_rare_router.hpp makes those,
/// make_batch_router.hpp the rules that see the whole batch, and its with_router() any;
/// layer/soft_moe.hpp is the soft mixture.
///
/// Throws: error where the spec contradicts itself or is another maker's, or a tensor that it needs
/// is missing or has another length than E. The spec's capacity is applied by the stage of that
/// name, not by the router.
/// Example:
///
///     const any_router r = make_router(find_in_catalog("deepseek_v3")->spec, {.bias = bias});
MOEROUTE_COLD inline any_router make_router(const router_spec& s,
                                            const router_tensors& tensors = {}) {
  detail::check_maker("make_router", s, s.has_rare_words() || s.sees_batch());
  detail::check_common(s);
  detail::check_tensors(s, tensors);
  const weight_rule weight = detail::weight_rule_of(s, tensors);
  const logit_transform transform = detail::transform_of(s);

  switch (s.selection) {
    case selection_kind::top_k: {
      return {s, router{any_score(s.score, s.domain), detail::best_of(s), weight,
                        selection_bias(tensors.bias), transform}};
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
                                         transform, s.table_key}};
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
    case selection_kind::product_keys:
      return {s, product_keys<>{.choices = s.k, .first_keys = s.first_keys, .weight = weight}};
    case selection_kind::sparsemixer: return {s, sparsemixer{s.jitter}};
    case selection_kind::top2: return {s, gshard_top2{.policy = s.second, .weight = weight}};
    default: break;
  }
  return {s, random_choice{s.k}};
}

}  // namespace moeroute
