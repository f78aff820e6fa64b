// The routers of a description, giving way to what is in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>

#include <moeroute/policy/make_router.hpp>
#include <moeroute/residency/resident_router.hpp>

namespace moeroute {

/// resident_router for a router picked at run time: route() takes it like any router of tokens.
///
/// Rules that look for other experts need a description with selection = top_k; drop_cold and rules
/// that are not active() take any with a fixed k. Programs that do not name this type carry none of
/// its code. Throws: error where rule, set and router do not fit one another, or the router's k
/// varies. Determinism: as resident_router.
class resident_any_router {
 public:
  resident_any_router(const any_router& router, const residency_rule& rule,
                      const resident_view& set, residency_counts* counts = nullptr)
      : columns_(router.columns()), use_(router.reads_side(router.columns())) {
    if (router.ragged()) fail("resident_any_router", "the router's k varies, expected a fixed one");
    router.visit([&]<class Kind>(const Kind& r) {
      if constexpr (std::is_same_v<Kind, ranked>) {
        kind_.template emplace<resident_router<Kind>>(r, rule, set, counts);
      } else if constexpr (token_router<Kind>) {
        if (rule.active() && rule.kind != residency_kind::drop_cold)
          fail("resident_any_router",
               std::string("the rule is ") + to_string(rule.kind) +
                   ", and selection=" + std::string(to_string(router.spec().selection)) +
                   " does not choose by rank: drop is what it takes");
        kind_.template emplace<resident_router<plain_kind>>(plain_kind(router), rule, set, counts);
      }
    });
    visit([&](const auto& r) {
      r.check(columns_);
      k_ = r.k();
      experts_ = r.experts(columns_);
      rows_alone_ = r.rows_alone(columns_);
    });
  }

  index_t k() const { return k_; }
  index_t columns() const { return columns_; }
  index_t experts(index_t) const { return experts_; }
  side_use reads_side(index_t) const { return use_; }
  void check(index_t columns) const { check_size("route", "logits.cols", columns, columns_); }

  struct buffers {
    static constexpr std::size_t size = 256;
    alignas(std::max_align_t) std::byte of_kind[size];
  };
  buffers carve(scratch& tape, index_t columns) const {
    buffers kept;
    visit([&](const auto& r) {
      const auto own = r.carve(tape, columns);
      static_assert(sizeof own <= buffers::size && std::is_trivially_copyable_v<decltype(own)>);
      std::memcpy(kept.of_kind, &own, sizeof own);
    });
    return kept;
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const {
    visit([&]<class Kind>(const Kind& r) {
      using own = decltype(r.carve(std::declval<scratch&>(), index_t{}));
      r.template route_block<A>(z, *std::launder(reinterpret_cast<const own*>(memory.of_kind)), c);
    });
  }

  index_t rows_alone(index_t) const { return rows_alone_; }
  template <class A = simd::default_arch>
  void route_row(const float* z, index_t columns, index_t token, const side_inputs& side,
                 expert_id* id, float* weights) const {
    visit([&](const auto& r) { r.template route_row<A>(z, columns, token, side, id, weights); });
  }

 private:
  // A described router of another kind, by value: what it refers to is the caller's.
  struct plain_kind {
    any_router any;

    explicit plain_kind(const any_router& router) : any(router) {}
    auto view() const { return any.as_token_router(); }
    index_t k() const { return any.k(); }
    index_t columns() const { return any.columns(); }
    index_t experts(index_t columns) const { return view().experts(columns); }
    side_use reads_side(index_t columns) const { return any.reads_side(columns); }
    void check(index_t columns) const { view().check(columns); }
    any_router::buffers carve(scratch& tape, index_t columns) const {
      return view().carve(tape, columns);
    }
    template <class A = simd::default_arch>
    void route_block(const logit_block& z, const any_router::buffers& m, choice_block& c) const {
      view().template route_block<A>(z, m, c);
    }
    index_t rows_alone(index_t columns) const { return view().rows_alone(columns); }
    template <class A = simd::default_arch>
    void route_row(const float* z, index_t columns, index_t token, const side_inputs& side,
                   expert_id* id, float* weights) const {
      view().template route_row<A>(z, columns, token, side, id, weights);
    }
  };

  using ranked = any_router::first_kind;
  static_assert(detail::moved_router<ranked>::by_rank);
  using kinds = std::variant<std::monostate, resident_router<ranked>, resident_router<plain_kind>>;

  template <std::size_t i = 1, class F>
  MOEROUTE_INLINE void visit(F&& f) const {
    if (kind_.index() == i) return f(*std::get_if<i>(&kind_));
    if constexpr (i + 1 < std::variant_size_v<kinds>)
      this->template visit<i + 1>(std::forward<F>(f));
  }

  kinds kind_;
  index_t columns_ = 0, k_ = 0, experts_ = 0, rows_alone_ = 0;
  side_use use_;
};
static_assert(row_router<resident_any_router>);

}  // namespace moeroute
