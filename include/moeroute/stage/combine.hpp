// Combine: the experts' rows back to their tokens, weighted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/stage/dispatch.hpp>

namespace moeroute {

/// What a slot's row is multiplied with.
enum class combine_weight {
  of_choice,
  one,  ///< the weights were applied before: to the experts' input, or inside of them
};

/// What happens to what the output holds.
enum class combine_output {
  overwrite,
  accumulate,  ///< the sum starts from it
};

/// What a token without any term gets: all of its choices dropped, or none made.
enum class lost_token {
  zero,
  residual,  ///< its own hidden state
  /// Its own hidden state; and a token with terms gets of it what their weights leave of 1,
  /// w f(x) + (1 - w) x (BASE, StableMoE).
  mix,
};

/// What combine does beyond the weighted sum; x and shared may be kept in types of their own.
template <storage X = float, storage S = float>
struct combine_options {
  combine_weight weight = combine_weight::of_choice;
  combine_output output = combine_output::overwrite;
  lost_token lost = lost_token::zero;
  /// Experts [identity_first, identity_end) give the token's own hidden state: their choices need
  /// no slot, and add weight * x[t] in their place in the rank order.
  expert_id identity_first = 0;
  expert_id identity_end = 0;
  /// [T, d], the tokens' hidden states: for identity experts, lost_token::residual and mix.
  matrix_view<const X> x{};
  /// [T, d], what the shared experts gave, added last; or no rows.
  matrix_view<const S> shared{};
  /// [T], what a shared row is multiplied with (a shared expert's gate); empty: 1.
  std::span<const float> shared_weight{};

  bool plain() const {
    return weight == combine_weight::of_choice && output == combine_output::overwrite &&
           lost == lost_token::zero && identity_first == identity_end && shared.rows == 0;
  }
  bool needs_x() const { return lost != lost_token::zero || identity_first < identity_end; }
};

namespace detail {

// Most rows of a token that are listed on the stack.
inline constexpr index_t most_listed_rows = 64;

// The rows of a plan's choices: in its slots. ids and flags where identity experts need them.
struct rows_in_slots {
  static constexpr const char *name = "slots", *height = "slots.rows()";

  const dispatch_plan& plan;
  const float* weight;
  const assignment* choices = nullptr;

  index_t rows() const { return plan.slots(); }
  index_t tokens() const { return plan.tokens(); }
  index_t k() const { return plan.k(); }
  index_t first(index_t t) const { return plan.first(t); }
  index_t count(index_t t) const { return plan.count(t); }
  std::int32_t row(index_t c) const { return plan.slot_of_choice()[static_cast<std::size_t>(c)]; }
  static constexpr bool lists(index_t) { return true; }
  const std::int32_t* list(index_t c, index_t, std::int32_t*) const {
    return plan.slot_of_choice().data() + c;
  }
  // The rows of the choices from c on, which will be read after those before.
  const std::int32_t* next(index_t c) const { return plan.slot_of_choice().data() + c; }
};

// The rows of choices in their own order: a row for each, to be read where there is an expert.
struct rows_of_choices {
  static constexpr const char *name = "rows", *height = "rows.rows()";

  const assignment* choices;
  const float* weight;

  index_t rows() const { return choices->choices(); }
  index_t tokens() const { return choices->tokens(); }
  index_t k() const { return choices->k(); }
  index_t first(index_t t) const { return choices->first(t); }
  index_t count(index_t t) const { return choices->count(t); }
  std::int32_t row(index_t c) const {
    const bool there = choices->ids()[static_cast<std::size_t>(c)] >= 0 && choices->kept(c);
    return there ? static_cast<std::int32_t>(c) : no_slot;
  }
  static constexpr bool lists(index_t k) { return k <= most_listed_rows; }
  const std::int32_t* list(index_t c, index_t n, std::int32_t* memory) const {
    for (index_t r = 0; r < n; ++r) memory[r] = row(c + r);
    return memory;
  }
  // They follow in memory.
  static constexpr const std::int32_t* next(index_t) { return nullptr; }
};

template <class A, class Source, class T, class U, class X, class S>
void combine_token(index_t t, const matrix_view<const T>& rows, const Source& source,
                   const matrix_view<U>& y, const combine_options<X, S>& o) {
  const float* weight = source.weight;
  const index_t first = source.first(t), last = source.first(t + 1);
  const auto identity = [&](index_t c) {
    if (source.choices == nullptr) return false;
    const expert_id e = source.choices->ids()[static_cast<std::size_t>(c)];
    return e >= o.identity_first && e < o.identity_end && source.choices->kept(c);
  };
  // A plan gives identity experts slots only where it was not told to leave them out.
  const auto row_of = [&](index_t c) {
    return std::is_same_v<Source, rows_of_choices> && identity(c) ? no_slot : source.row(c);
  };
  bool lost = true;
  float rest = 1.0f;
  for (index_t c = first; c < last; ++c) {
    if (row_of(c) == no_slot && !identity(c)) continue;
    lost = false;
    rest -= weight[c];
  }
  const bool own = o.lost == lost_token::mix || (lost && o.lost == lost_token::residual);
  const auto start =
      o.output == combine_output::overwrite ? simd::sum_start::zero : simd::sum_start::output;
  simd::sum_of_rows<A>(y.cols, y.data + t * y.stride, start, [&](auto& sum) {
    for (index_t c = first; c < last; ++c) {
      const float w = o.weight == combine_weight::of_choice ? weight[c] : 1.0f;
      if (const std::int32_t row = row_of(c); row != no_slot) {
        sum(rows.data + row * rows.stride, w);
      } else if (identity(c)) {
        sum(o.x.data + t * o.x.stride, weight[c]);
      }
    }
    if (own) sum(o.x.data + t * o.x.stride, rest);
    if (o.shared.rows > 0)
      sum(o.shared.data + t * o.shared.stride,
          o.shared_weight.empty() ? 1.0f : o.shared_weight[static_cast<std::size_t>(t)]);
  });
}

template <class A, class X, class Source, class Y, class Exec, class H, class S>
void combine_rows(const X& expert_rows, const Source& source, Y&& y_rows, const Exec& exec,
                  const combine_options<H, S>& options) {
  using T = element_of<const X>;
  using U = element_of<Y>;
  const matrix_view<const T> rows = const_view(expert_rows);
  const matrix_view<U> y = view(y_rows);
  check_size("combine", Source::height, rows.rows, source.rows());
  check_size("combine", "y.rows()", y.rows, source.tokens());
  check_size("combine", "y.cols()", y.cols, rows.cols);
  check_stride("combine", Source::name, rows);
  check_stride("combine", "y", y);
  check_apart("combine", Source::name, rows, "y", y);

  const index_t terms = std::max<index_t>(1, source.k());
  if (options.plain() && Source::lists(terms)) {
    // Rows in the second cache come by themselves.
    const bool streamed =
        rows.rows * rows.cols * index_t{sizeof(T)} > 2 * simd::machine_caches().second;
    exec.parallel_for(y.rows, row_grain(y.cols * terms), [&](index_t begin, index_t end) {
      std::int32_t memory[most_listed_rows];
      for (index_t t = begin; t < end; ++t) {
        const index_t first = source.first(t), count = source.count(t);
        // The next token's rows are fetched along the way, if it has as many.
        const bool fetch = streamed && t + 1 < y.rows && source.count(t + 1) >= count;
        simd::weighted_sum_of_rows<A>(rows.data, rows.stride, source.list(first, count, memory),
                                      source.weight + first, count, y.cols, y.data + t * y.stride,
                                      fetch ? source.next(first + count) : nullptr);
      }
    });
    return;
  }

  // Choices without an expert are no identity experts.
  check_range("combine", "identity_first", options.identity_first, 0, max_experts);
  if (options.needs_x()) {
    check_size("combine", "x.rows()", options.x.rows, y.rows);
    check_size("combine", "x.cols()", options.x.cols, y.cols);
    check_stride("combine", "x", options.x);
    check_apart_or_same("combine", "x", options.x, "y", y);
  }
  if (options.shared.rows > 0) {
    check_size("combine", "shared.rows()", options.shared.rows, y.rows);
    check_size("combine", "shared.cols()", options.shared.cols, y.cols);
    check_stride("combine", "shared", options.shared);
    check_apart_or_same("combine", "shared", options.shared, "y", y);
  }
  if (!options.shared_weight.empty())
    check_size("combine", "shared_weight.size()",
               static_cast<index_t>(options.shared_weight.size()), y.rows);
  exec.parallel_for(y.rows, row_grain(y.cols * terms), [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) combine_token<A>(t, rows, source, y, options);
  });
}

}  // namespace detail

/// y[t] = sum over the choices of t, in rank order, of weight * slots[slot of the choice].
///
/// A choice without a slot adds nothing; a token without any gets zeros, or what options say.
/// Accumulates in float with one rounding at the end. Padding rows of slots are not read.
/// Shapes: slots [plan.slots(), d], y [T, d]; they must not overlap. options.x and options.shared
/// [T, d] may be y itself.
/// Throws: error where the shapes do not fit, the plan is of other choices by its sizes, rows run
/// into one another, or memory overlaps.
/// Cost: reads each slot once, no allocation.
/// Determinism: the same bits for every executor, thread count and ISA.
/// Example:
///
///     combine(out, slots, choices, y);
///     combine(out, slots, choices, y, {.output = combine_output::accumulate});    // y += the sum
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch,
          storage H = float, storage S = float>
void combine(const X& slots, const dispatch_plan& plan, const assignment& choices, Y&& y,
             const Exec& exec = {}, const combine_options<H, S>& options = {}) {
  check_size("combine", "choices.tokens()", choices.tokens(), plan.tokens());
  check_size("combine", "choices.k()", choices.k(), plan.k());
  check_size("combine", "choices.choices()", choices.choices(), plan.choices());
  detail::combine_rows<A>(slots, detail::rows_in_slots{plan, choices.weights().data(), &choices},
                          std::forward<Y>(y), exec, options);
}

/// The same with the weights alone, in the order of the plan's choices: for a plan that was made of
/// expert lists. Identity experts need an assignment.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch,
          storage H = float, storage S = float>
void combine(const X& slots, const dispatch_plan& plan, std::span<const float> weights, Y&& y,
             const Exec& exec = {}, const combine_options<H, S>& options = {}) {
  check_size("combine", "weights.size()", static_cast<index_t>(weights.size()), plan.choices());
  check_range("combine", "identity_end", options.identity_end, 0, options.identity_first);
  detail::combine_rows<A>(slots, detail::rows_in_slots{plan, weights.data()}, std::forward<Y>(y),
                          exec, options);
}

/// y[t] = sum over the choices of t, in rank order, of weight * rows[choice]: from one row for
/// every choice, as grouped products leave them, without a plan.
///
/// Rows of choices without an expert or that capacity dropped are not read, nor are those of
/// identity experts, which options describe; the rest is as above.
/// Shapes: rows [choices.choices(), d] (that is [T * k, d] where k is fixed), y [T, d]; they must
/// not overlap.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch,
          storage H = float, storage S = float>
void combine(const X& rows, const assignment& choices, Y&& y, const Exec& exec = {},
             const combine_options<H, S>& options = {}) {
  check_offsets("combine", choices);
  detail::combine_rows<A>(rows, detail::rows_of_choices{&choices, choices.weights().data()},
                          std::forward<Y>(y), exec, options);
}

/// The same with options and the serial executor.
template <readable_rows X, writable_rows Y, storage H = float, storage S = float>
void combine(const X& slots, const dispatch_plan& plan, const assignment& choices, Y&& y,
             const combine_options<H, S>& options) {
  combine(slots, plan, choices, y, serial{}, options);
}

/// From rows in the order of their choices, with options and the serial executor.
template <readable_rows X, writable_rows Y, storage H = float, storage S = float>
void combine(const X& rows, const assignment& choices, Y&& y,
             const combine_options<H, S>& options) {
  combine(rows, choices, y, serial{}, options);
}

// Calls that would end in a page about templates.

template <class X, class Y, class... Rest>
  requires(!readable_rows<X> || !writable_rows<Y>)
void combine(const X&, const dispatch_plan&, const assignment&, Y&&, Rest&&...) {
  static_assert(readable_rows<X> && writable_rows<Y>,
                "[moeroute::combine] slots and y are rows, y not const: a pointer is handed in as "
                "matrix_view(pointer, rows, columns, stride)");
}

template <class X, class Y, class... Rest>
  requires(!readable_rows<X> || !writable_rows<Y>)
void combine(const X&, const assignment&, Y&&, Rest&&...) {
  static_assert(readable_rows<X> && writable_rows<Y>,
                "[moeroute::combine] behind the rows come the plan, if any, the choices and y; "
                "rows and y are rows, y not const: a pointer is handed in as matrix_view(pointer, "
                "rows, columns, stride)");
}

}  // namespace moeroute
