// The choices that scores and weight rules work on: of a block of rows, or of one row alone.
#pragma once

#include <algorithm>
#include <span>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/select/top_k_row.hpp>

namespace moeroute {

/// `width` rows of a block from a lane on: one row per lane, rank after rank.
///
/// The same operations as row_choices, so that a formula is written once and has the same bits in
/// both: sums run over the ranks in their order, and what is absent counts as 0.
template <class A>
struct lane_choices {
  using F = simd::vfloat<A>;

  choice_block* c;
  int lane;

  /// Replaces each register of values by f(values, which of them are there).
  template <class Function>
  MOEROUTE_INLINE void for_each(Function&& f) {
    const simd::vint<A> none(no_expert);
    for (int r = 0; r < c->k; ++r) {
      float* value = c->value + r * block_rows + lane;
      const simd::vint<A> id = simd::load<A>(c->id + r * block_rows + lane);
      f(simd::load<A>(value), simd::differs<A>(id, none)).store_unaligned(value);
    }
  }

  /// The largest value of each row; -inf where there is none.
  MOEROUTE_INLINE F largest() {
    F max(simd::minus_infinity);
    for_each([&](F x, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
      max = simd::select<A>(present & (x > max), x, max);
      return x;
    });
    return max;
  }

  /// The sum of f(values) of each row.
  template <class Function>
  MOEROUTE_INLINE F sum(Function&& f) {
    F total(0.0f);
    for_each([&](F x, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
      x = simd::select<A>(present, x, F(0.0f));
      total += f(x);
      return x;
    });
    return total;
  }

  /// Lanes of a register that may hold a choice.
  static constexpr int lanes() { return simd::width<A>; }

  /// Multiplies each value by its expert's factor.
  void scale_by(std::span<const float> factor) {
    // no_expert is out of range, and so may be what stands in lanes without a row.
    for (int r = 0; r < c->k; ++r)
      for (int i = r * block_rows + lane; i < r * block_rows + lane + simd::width<A>; ++i)
        if (const auto e = static_cast<std::size_t>(c->id[i]); e < factor.size())
          c->value[i] *= factor[e];
  }
};

/// One row: its choices side by side in n registers; in memory, where they are more than a block's.
template <class A, int n>
struct row_choices {
  using F = simd::vfloat<A>;
  static constexpr bool in_registers = n <= simd::registers_per_block<A>;

  int k;
  bool has_row_max;  ///< rank 0 has the row's largest logit
  F value[n];
  simd::vint<A> id[n];

  /// Nothing yet: whoever chooses writes the registers.
  MOEROUTE_INLINE explicit row_choices(int choices) : k(choices), has_row_max(true) {}

  /// What a top-k chose.
  MOEROUTE_INLINE row_choices(const simd::row_ranks& ranks, int choices)
      : k(choices), has_row_max(true) {
    for_each_register([&](int r) MOEROUTE_INLINE_LAMBDA {
      value[r] = simd::load<A>(ranks.value + r * simd::width<A>);
      id[r] = simd::load<A>(ranks.column + r * simd::width<A>);
    });
  }

  /// Experts that somebody else named, with their logits, or without any. An expert that is masked
  /// in the logits cannot be had this way either.
  MOEROUTE_INLINE row_choices(const expert_id* named, int choices, const float* logits)
      : k(choices), has_row_max(false) {
    constexpr int w = simd::width<A>;
    const simd::vint<A> none(no_expert);
    const F never(simd::minus_infinity);
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) {
      const simd::vint<A> e =
          simd::load_first<A>(named + r * w, std::clamp(k - r * w, 0, w), no_expert);
      const F x =
          logits == nullptr
              ? F(0.0f)
              : F::gather(logits, simd::select<A>(simd::differs<A>(e, none), e, simd::vint<A>(0)));
      const auto there = simd::differs<A>(e, none) & (x > never);
      value[r] = simd::select<A>(there, x, never);
      id[r] = simd::select<A>(there, e, none);
    }
  }

  template <class Function>
  MOEROUTE_INLINE void for_each(Function&& f) {
    const simd::vint<A> none(no_expert);
    for_each_register([&](int r) MOEROUTE_INLINE_LAMBDA {
      value[r] = f(value[r], simd::differs<A>(id[r], none));
    });
  }

  MOEROUTE_INLINE F largest() {
    F max(simd::minus_infinity);
    for_each([&](F x, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
      max = simd::select<A>(present & (x > max), x, max);
      return x;
    });
    return simd::largest_lane<A>(max);
  }

  /// Lanes of a register that may hold a choice.
  MOEROUTE_INLINE int lanes() const { return k; }

  /// The value of rank 0.
  MOEROUTE_INLINE float first() const { return value[0].get(0); }

  template <class Function>
  MOEROUTE_INLINE F sum(Function&& f) {
    alignas(alignment) float lane[n * simd::width<A>];
    for_each_register([&](int r) MOEROUTE_INLINE_LAMBDA {
      value[r] =
          simd::select<A>(simd::differs<A>(id[r], simd::vint<A>(no_expert)), value[r], F(0.0f));
      f(value[r]).store_aligned(lane + r * simd::width<A>);
    });
    F total(lane[0]);
    for (int r = 1; r < k; ++r) total += F(lane[r]);
    return total;
  }

  void scale_by(std::span<const float> factor) {
    alignas(alignment) float lane[n * simd::width<A>];
    alignas(alignment) expert_id e[n * simd::width<A>];
    for (int r = 0; r < n; ++r) {
      value[r].store_aligned(lane + r * simd::width<A>);
      id[r].store_aligned(e + r * simd::width<A>);
    }
    for (int r = 0; r < k; ++r)
      if (e[r] != no_expert) lane[r] *= factor[static_cast<std::size_t>(e[r])];
    for (int r = 0; r < n; ++r) value[r] = simd::load<A>(lane + r * simd::width<A>);
  }

  /// Replaces each value by its expert's of a row; 0 where there is none.
  MOEROUTE_INLINE void take_from(const float* row) {
    const simd::vint<A> none(no_expert);
    for_each_register([&](int r) MOEROUTE_INLINE_LAMBDA {
      const simd::vmask<A> present = simd::differs<A>(id[r], none);
      const simd::vint<A> at = simd::select<A>(present, id[r], simd::vint<A>(0));
      value[r] = simd::select<A>(present, F::gather(row, at), F(0.0f));
    });
  }

  /// Writes the k ids and values.
  MOEROUTE_INLINE void store(expert_id* ids, float* values) const {
    constexpr int w = simd::width<A>;
    if (k == 1) {
      ids[0] = id[0].get(0);
      values[0] = first();
      return;
    }
    for_each_register([&](int r) MOEROUTE_INLINE_LAMBDA {
      const int here = std::min(w, k - r * w);
      simd::store_pieces<A>(ids + r * w, values + r * w, here, id[r], value[r]);
    });
  }

 private:
  // f(r) for the registers that hold choices.
  template <class Function>
  MOEROUTE_INLINE void for_each_register(Function&& f) const {
    if constexpr (in_registers) {
      MOEROUTE_UNROLL
      for (int r = 0; r < n; ++r)
        if (r == 0 || r * simd::width<A> < k) f(r);
    } else {
      int r = 0;
      do f(r);
      while (++r * simd::width<A> < k);
    }
  }
};

}  // namespace moeroute
