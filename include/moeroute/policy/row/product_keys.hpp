// Product keys: n^2 experts, each the sum of two logits out of 2n.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute {

/// Expert i * n + j has the logit z[i] + z[n + j]; the k largest are chosen, the lowest id first
/// among equals.
///
/// Exactly the top-k of all n^2 sums, without forming them: only columns that reach the k-th sum
/// are looked at. Shapes: logits [T, 2n]; E = n^2. Cost: O(n) + O(k n) compares per row in the
/// worst case. softmax gives softmax(first)_i * softmax(second)_j. Source: Lample et al. 2019; PEER
/// (He 2024).
template <score_function Score = softmax_selected>
struct product_keys {
  index_t choices = 16;
  [[no_unique_address]] Score score{};
  weight_rule weight{};

  struct buffers {
    std::uint64_t* key;
    float* half_value;
    expert_id* half_id;
    float* sums;  ///< candidates of one row
    std::int32_t* pair;
  };

  index_t k() const { return choices; }
  side_use reads_side(index_t) const { return {.own_k = choices}; }
  static index_t experts(index_t columns) { return columns / 2 * (columns / 2); }

  /// Throws: error where the columns are odd, n^2 exceeds 2^20 or k exceeds n^2.
  void check(index_t columns) const {
    if (columns % 2 != 0 || columns < 2)
      fail_value("product_keys", "columns", columns, "two halves");
    check_range("product_keys", "E", experts(columns), 1, max_experts);
    check_range("product_keys", "k", choices, 1, experts(columns));
    weight.check(experts(columns));
  }

  buffers carve(scratch& tape, index_t columns) const {
    const index_t n = columns / 2, half_k = std::min(choices, n);
    return {tape.take<std::uint64_t>(std::max(simd::top_k_scratch(n, half_k), room())),
            tape.take<float>(2 * half_k * block_rows),
            tape.take<expert_id>(2 * half_k * block_rows), tape.take<float>(room()),
            tape.take<std::int32_t>(room())};
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& m, choice_block& c) const {
    const index_t n = z.experts / 2;
    const int half_k = static_cast<int>(std::min(choices, n));
    float* value[2] = {m.half_value, m.half_value + half_k * block_rows};
    expert_id* id[2] = {m.half_id, m.half_id + half_k * block_rows};
    for (int half = 0; half < 2; ++half)
      simd::top_k_block<A>(z.logits + half * n, z.stride, z.rows, n, half_k, value[half], id[half],
                           m.key);
    for (int i = 0; i < z.rows; ++i) {
      const float limit = kth_sum(value[0] + i, value[1] + i, half_k, m);
      const index_t found = gather<A>(z.row(i), n, value[1][i], limit, m);
      std::sort(m.key, m.key + found, std::less<>{});
      for (int r = 0; r < c.k; ++r) {
        const bool there = r < found;
        const auto at = there ? static_cast<std::int32_t>(m.key[r] & 0xffffffffu) : 0;
        c.id[r * block_rows + i] = there ? m.pair[at] : no_expert;
        c.value[r * block_rows + i] = there ? m.sums[at] : simd::minus_infinity;
      }
    }
    keep_own_k(z, c);
    if constexpr (std::is_same_v<Score, softmax>) {
      this->template softmax_of_sums<A>(z, c);
    } else {
      static_assert(Score::traits.reads_rows == row_use::never,
                    "[moeroute::product_keys] a score over all experts would need all n^2 sums");
      score.template score_choices<A>(z, c, score_scale::exact);
    }
    weight.template apply<A>(c);
  }

 private:
  // The softmax over all n^2 sums is the product of the softmaxes of the halves.
  template <class A>
  static void softmax_of_sums(const logit_block& z, choice_block& c) {
    using F = simd::vfloat<A>;
    const index_t n = z.experts / 2;
    for (int i = 0; i < z.rows; ++i) {
      const float *const one = z.row(i), *const two = one + n;
      const F top_one(simd::row_max<A>(one, n)), top_two(simd::row_max<A>(two, n));
      const F sum(simd::row_sum_exp<A>(one, n, top_one.get(0)) *
                  simd::row_sum_exp<A>(two, n, top_two.get(0)));
      for (int at = i; at < c.k * block_rows; at += block_rows) {
        const index_t e = c.id[at];
        c.value[at] = e == no_expert
                          ? 0.0f
                          : simd::divide<A>(simd::exp_below_max<A>(F(one[e / n]), top_one) *
                                                simd::exp_below_max<A>(F(two[e % n]), top_two),
                                            sum)
                                .get(0);
      }
    }
  }

  index_t room() const { return 4 * choices + 64; }

  // The k-th largest sum as a value: only ranks (i, j) with (i + 1)(j + 1) <= k can reach it.
  float kth_sum(const float* a, const float* b, int half_k, const buffers& m) const {
    index_t count = 0;
    for (int i = 0; i < half_k; ++i) {
      for (int j = 0; j < half_k && (i + 1) * (j + 1) <= choices; ++j) {
        const float s = a[i * block_rows] + b[j * block_rows];
        if (!(s > simd::minus_infinity)) break;
        if (count == room()) {
          std::nth_element(m.sums, m.sums + choices - 1, m.sums + count, std::greater<>{});
          count = choices;
        }
        m.sums[count++] = s;
      }
    }
    if (count < choices) return simd::minus_infinity;
    std::nth_element(m.sums, m.sums + choices - 1, m.sums + count, std::greater<>{});
    return m.sums[choices - 1];
  }

  // All pairs above the limit and the first of those at it, by ascending id: keys order them by
  // sum, then id.
  template <class A>
  index_t gather(const float* z, index_t n, float best_second, float limit,
                 const buffers& m) const {
    index_t count = 0, equal = 0;
    const float* second = z + n;
    float bound = limit;
    for (index_t i = 0; i < n; ++i) {
      const float first = z[i];
      if (!(first + best_second >= bound)) continue;
      const auto take = [&](index_t j) {
        const float s = first + second[j];
        if (!(s >= bound) || !(s > simd::minus_infinity)) return;
        if (s == limit && ++equal > choices) return;
        m.sums[count] = s;
        m.pair[count] = static_cast<std::int32_t>(i * n + j);
        m.key[count] = std::uint64_t{simd::detail::descending_key(s)} << 32 |
                       static_cast<std::uint32_t>(count);
        ++count;
      };
      constexpr int w = simd::width<A>;
      const simd::vfloat<A> f(first), l(bound);
      index_t j = 0;
      for (; j + w <= n; j += w)
        for (auto bits = (f + simd::load<A>(second + j) >= l).mask(); bits != 0; bits &= bits - 1)
          take(j + std::countr_zero(bits));
      for (; j < n; ++j) take(j);
      // Ids ascend: where there are enough at the limit, only what is above it is wanted from here
      // on.
      if (equal >= choices) bound = std::nextafter(limit, simd::plus_infinity);
    }
    return count;
  }
};
static_assert(token_router<product_keys<>>);

}  // namespace moeroute
