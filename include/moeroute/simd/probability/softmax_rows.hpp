// Softmax of 16 rows at once, up to a factor per row: rows share their reductions.
#pragma once

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/join.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute::simd {

namespace detail {

// Writes of(x), or -inf where x is that or NaN, and adds it to the sums; returns what follows.
// Meanwhile the cache fetches what stands at `next`.
template <class A, class Of>
MOEROUTE_INLINE float* store_exponentials(const float* row, index_t cols, const float* next,
                                          float* to, partials<A>& sum, Of&& of) {
  partials<A> total(0.0f);
  for_each_register<A>(row, cols, minus_infinity, [&](int r, vfloat<A> x) {
    MOEROUTE_PREFETCH(next);
    next += width<A>;
    const vfloat<A> never(minus_infinity), e = of(x);
    total.part[r] += e;
    select<A>(x > never, e, never).store_unaligned(to);
    to += width<A>;
  });
  sum = total;
  return to;
}

}  // namespace detail

/// exp(z - max z) of 16 rows and, for each, the factor that makes it a softmax: the rounded
/// reciprocal of its sum.
///
/// Shapes: row[i] points at cols floats; out is [16, stride], stride a multiple of 16 and at least
/// cols; factor is [16]. NaN and -inf logits, rows with nothing else and columns past cols become
/// -inf; several +inf share. A null row is one without logits. Cost: one exponential per element.
/// Determinism: the same bits on every ISA.
/// next_step floats after a row begins another one that will be read soon, or 0: a hint.
template <class A = default_arch>
void exp_rows(const float* const* row, index_t cols, float* out, index_t stride, float* factor,
              index_t next_step = 0) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  const F never(minus_infinity);
  alignas(alignment) float partial[block_rows * block_rows], max[block_rows];
  for (int i = 0; i < block_rows; ++i) {
    partials<A> best(minus_infinity);
    if (row[i] != nullptr)
      detail::for_each_register<A>(row[i], cols, minus_infinity, [&](int r, F x) {
        best.part[r] = max_or_second<A>(x, best.part[r]);
      });
    store_partials<A>(best, partial + i * block_rows);
  }
  join_partials<A>(partial, max, larger<A>);
  for (int i = 0; i < block_rows; ++i) {
    float* to = out + i * stride;
    partials<A> sum(0.0f);
    const F top(max[i]);
    if (max[i] == minus_infinity) {
      sum = partials<A>(1.0f);  // any sum but 0
    } else if (max[i] < plus_infinity) {
      to = detail::store_exponentials<A>(row[i], cols, row[i] + next_step, to, sum,
                                         [&](F x) { return exp_nonpositive<A>(x - top); });
    } else {
      to = detail::store_exponentials<A>(row[i], cols, row[i] + next_step, to, sum,
                                         [&](F x) { return exp_below_max<A>(x, top); });
    }
    for (; to < out + (i + 1) * stride; to += w) never.store_unaligned(to);
    store_partials<A>(sum, partial + i * block_rows);
  }
  join_partials<A>(partial, factor, [](F a, F b) { return a + b; });
  for (int i = 0; i < block_rows; i += w)
    divide<A>(F(1.0f), load<A>(factor + i)).store_unaligned(factor + i);
}

}  // namespace moeroute::simd
