// Product keys: n * m experts, each the sum of two logits out of n + m.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute {

/// Expert i * m + j has the logit z[i] + z[n + j]; the k largest are chosen, the lowest id first
/// among equals.
///
/// Exactly the top-k of all n m sums, without forming them: only columns that reach the k-th sum
/// are looked at. Shapes: logits [T, n + m]; E = n m, a square where first_keys is 0. Cost: O(n +
/// m)
/// + O(k m) compares per row in the worst case. softmax gives softmax(first)_i * softmax(second)_j:
/// a node and an expert of it (SMILE), a Cartesian router (OmniMoE). Source: Lample et al. 2019;
/// PEER (He 2024); SMILE (He et al. 2022).
template <score_function Score = softmax_selected>
struct product_keys {
  index_t choices = 16;
  index_t first_keys = 0;  ///< n; 0: half the columns
  Score score{};
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
  index_t experts(index_t columns) const { return first(columns) * second(columns); }

  /// Throws: error where the columns are odd or first_keys leaves none, n m exceeds 2^20 or k
  /// exceeds n m.
  void check(index_t columns) const {
    if (first_keys != 0)
      check_range("product_keys", "first_keys", first_keys, 1, columns - 1);
    else if (columns % 2 != 0 || columns < 2)
      fail_value("product_keys", "columns", columns, "two halves");
    check_range("product_keys", "E", experts(columns), 1, max_experts);
    check_range("product_keys", "k", choices, 1, experts(columns));
    weight.check(experts(columns));
  }

  buffers carve(scratch& tape, index_t columns) const {
    const index_t n = first(columns), m = second(columns);
    const index_t k_one = std::min(choices, n), k_two = std::min(choices, m);
    return {tape.take<std::uint64_t>(
                std::max({simd::top_k_scratch(n, k_one), simd::top_k_scratch(m, k_two), room()})),
            tape.take<float>((k_one + k_two) * block_rows),
            tape.take<expert_id>((k_one + k_two) * block_rows), tape.take<float>(room()),
            tape.take<std::int32_t>(room())};
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& m, choice_block& c) const {
    const index_t size[2] = {first(z.experts), second(z.experts)};
    const int half_k[2] = {static_cast<int>(std::min(choices, size[0])),
                           static_cast<int>(std::min(choices, size[1]))};
    float* value[2] = {m.half_value, m.half_value + half_k[0] * block_rows};
    expert_id* id[2] = {m.half_id, m.half_id + half_k[0] * block_rows};
    for (int half = 0; half < 2; ++half)
      simd::top_k_block<A>(z.logits + half * size[0], z.stride, z.rows, size[half], half_k[half],
                           value[half], id[half], m.key);
    for (int i = 0; i < z.rows; ++i) {
      const float limit = kth_sum(value[0] + i, value[1] + i, half_k[0], half_k[1], m);
      const index_t found = gather<A>(z.row(i), size[0], size[1], value[1][i], limit, m);
      std::sort(m.key, m.key + found);
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
                    "[moeroute::product_keys] a score over all experts would need all n m sums");
      score.template score_choices<A>(z, c, score_scale::exact);
    }
    weight.template apply<A>(c);
  }

 private:
  index_t first(index_t columns) const { return first_keys != 0 ? first_keys : columns / 2; }
  index_t second(index_t columns) const { return columns - first(columns); }

  // The softmax over all n m sums is the product of the softmaxes of the halves.
  template <class A>
  MOEROUTE_OUT_OF_LINE void softmax_of_sums(const logit_block& z, choice_block& c) const {
    using F = simd::vfloat<A>;
    const index_t n = first(z.experts), m = second(z.experts);
    for (int i = 0; i < z.rows; ++i) {
      const float *const one = z.row(i), *const two = one + n;
      const F top_one(simd::row_max<A>(one, n)), top_two(simd::row_max<A>(two, m));
      if (!(top_one.get(0) + top_two.get(0) < simd::plus_infinity)) [[unlikely]] {
        share_infinities(one, n, two, m, c, i);
        continue;
      }
      const F sum(simd::row_sum_exp<A>(one, n, top_one.get(0)) *
                  simd::row_sum_exp<A>(two, m, top_two.get(0)));
      for (int at = i; at < c.k * block_rows; at += block_rows) {
        const index_t e = c.id[at];
        c.value[at] = e == no_expert
                          ? 0.0f
                          : simd::divide<A>(simd::exp_below_max<A>(F(one[e / m]), top_one) *
                                                simd::exp_below_max<A>(F(two[e % m]), top_two),
                                            sum)
                                .get(0);
      }
    }
  }

  // Sums of +inf share the row equally, which no product of two shares does.
  MOEROUTE_COLD static void share_infinities(const float* one, index_t n, const float* two,
                                             index_t m, choice_block& c, int row) {
    index_t infinite = 0;
    for (index_t i = 0; i < n; ++i)
      for (index_t j = 0; j < m; ++j) infinite += one[i] + two[j] == simd::plus_infinity;
    for (int at = row; at < c.k * block_rows; at += block_rows) {
      const index_t e = c.id[at];
      const bool wins = e != no_expert && one[e / m] + two[e % m] == simd::plus_infinity;
      c.value[at] = wins ? 1.0f / static_cast<float>(infinite) : 0.0f;
    }
  }

  index_t room() const { return 4 * choices + 64; }

  // The k-th largest sum as a value: only ranks (i, j) with (i + 1)(j + 1) <= k can reach it.
  float kth_sum(const float* a, const float* b, int k_one, int k_two, const buffers& m) const {
    const auto larger = [](float x, float y) { return x > y; };
    index_t count = 0;
    for (int i = 0; i < k_one; ++i) {
      for (int j = 0; j < k_two && (i + 1) * (j + 1) <= choices; ++j) {
        const float s = a[i * block_rows] + b[j * block_rows];
        if (!(s > simd::minus_infinity)) break;
        if (count == room()) {
          std::nth_element(m.sums, m.sums + choices - 1, m.sums + count, larger);
          count = choices;
        }
        m.sums[count++] = s;
      }
    }
    if (count < choices) return simd::minus_infinity;
    std::nth_element(m.sums, m.sums + choices - 1, m.sums + count, larger);
    return m.sums[choices - 1];
  }

  // All pairs above the limit and the first of those at it, by ascending id: keys order them by
  // sum, then id.
  template <class A>
  index_t gather(const float* z, index_t n, index_t columns, float best_second, float limit,
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
        m.pair[count] = static_cast<std::int32_t>(i * columns + j);
        m.key[count] = std::uint64_t{simd::detail::descending_key(s)} << 32 |
                       static_cast<std::uint32_t>(count);
        ++count;
      };
      constexpr int w = simd::width<A>;
      const simd::vfloat<A> f(first), l(bound);
      index_t j = 0;
      for (; j + w <= columns; j += w)
        for (auto bits = (f + simd::load<A>(second + j) >= l).mask(); bits != 0; bits &= bits - 1)
          take(j + std::countr_zero(bits));
      for (; j < columns; ++j) take(j);
      // Ids ascend: where there are enough at the limit, only what is above it is wanted from here
      // on.
      if (equal >= choices) bound = std::nextafter(limit, simd::plus_infinity);
    }
    return count;
  }
};
static_assert(token_router<product_keys<>>);

}  // namespace moeroute
