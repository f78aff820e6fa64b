// The options of dispatch and combine, on assignments that routers do not make.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"
#include "support/sparse_rows.hpp"

using namespace moeroute;

namespace {

template <class T>
buffer<T> rows_of(test::random& rng, index_t rows, index_t cols) {
  buffer<T> made(rows * cols);
  for (index_t i = 0; i < rows * cols; ++i) made[i] = static_cast<T>(rng.normal());
  return made;
}

template <class T>
matrix_view<T> as_rows(buffer<T>& b, index_t rows, index_t cols) {
  return {b.data(), rows, cols};
}
template <class T>
matrix_view<const T> as_rows(const buffer<T>& b, index_t rows, index_t cols) {
  return {b.data(), rows, cols};
}

template <class T>
std::span<const T> all(const buffer<T>& b) {
  return {b.data(), static_cast<std::size_t>(b.size())};
}

template <class F>
void for_each_moved(F&& f) {
  test::random rng(41);
  for (const index_t tokens : {0, 1, 5, 40})
    for (const index_t experts : {1, 6, 20})
      for (const index_t k : {1, 4}) {
        if (k > experts) continue;
        assignment fixed = test::fixed_choices(rng, tokens, experts, k, 6);
        assignment ragged = test::ragged_choices(rng, tokens, experts, k);
        f(fixed);
        f(ragged);
        test::drop_some(rng, fixed, 2);
        test::drop_some(rng, ragged, 2);
        f(fixed);
        f(ragged);
      }
}

// Slot by slot, element by element.
template <class From, class To>
std::string wrong_dispatch(const assignment& a, const plan_options& plan_with, index_t d,
                           store_path stores, bool scaled) {
  test::random rng(42);
  dispatch_plan p;
  plan(a, p, plan_with);
  const buffer<From> x = rows_of<From>(rng, a.tokens(), d);
  buffer<To> slots(p.slots() * d), expected(p.slots() * d);
  std::fill_n(slots.data(), slots.size(), static_cast<To>(77.0f));
  std::fill_n(expected.data(), expected.size(), static_cast<To>(0.0f));
  // Every slot with a token as if it were a spare one, then those that choices have.
  for (index_t s = 0; s < p.slots(); ++s) {
    const slot_id t = p.token_of_slot()[static_cast<std::size_t>(s)];
    for (index_t i = 0; t != no_token && i < d; ++i) {
      const float value = static_cast<float>(x[t * d + i]);
      expected[s * d + i] = static_cast<To>(scaled ? 0.0f * value : value);
    }
  }
  const auto token = test::tokens_of(a);
  for (std::size_t c = 0; c < token.size(); ++c) {
    const slot_id s = p.slot_of_choice()[c];
    if (s == no_slot) continue;
    for (index_t i = 0; i < d; ++i) {
      const float value = static_cast<float>(x[token[c] * d + i]);
      expected[s * d + i] = static_cast<To>(scaled ? a.weights()[c] * value : value);
    }
  }
  dispatch_options o{.stores = stores};
  if (scaled) o.scale = a.weights();
  dispatch(as_rows(x, a.tokens(), d), p, as_rows(slots, p.slots(), d), o);
  return test::bit_difference(all(slots), all(expected));
}

}  // namespace

TEST_CASE(
    "every slot gets its token's row, a spare token's too, empty ones zeros, on every path of "
    "stores") {
  for_each_moved([&](const assignment& a) {
    for (const store_path stores :
         {store_path::automatic, store_path::cached, store_path::streamed})
      for (const index_t d : {1, 16, 32, 64, 5000}) {
        if (d * a.tokens() > test::sized(50'000, 10'000))
          continue;  // of the longest rows a few are enough
        for (const plan_options& o :
             {plan_options{}, plan_options{.block = 4},
              plan_options{.block = 4, .padding = slot_padding::spare_tokens}}) {
          CHECK(wrong_dispatch<float, float>(a, o, d, stores, false) == "");
          CHECK(wrong_dispatch<bfloat16, bfloat16>(a, o, d, stores, false) == "");
        }
      }
  });
}

TEST_CASE("dispatch widens, narrows and scales with one rounding") {
  for_each_moved([&](const assignment& a) {
    for (const store_path stores : {store_path::automatic, store_path::streamed})
      for (const index_t d : {1, 64, 5000}) {
        if (d * a.tokens() > test::sized(50'000, 10'000)) continue;
        CHECK(wrong_dispatch<bfloat16, float>(a, {}, d, stores, false) == "");
        CHECK(wrong_dispatch<float, bfloat16>(a, {}, d, stores, false) == "");
        CHECK(wrong_dispatch<float16, float>(a, {}, d, stores, true) == "");
        CHECK(wrong_dispatch<float, float>(a, {.block = 3}, d, stores, true) == "");
        CHECK(wrong_dispatch<bfloat16, float>(
                  a, {.block = 5, .padding = slot_padding::spare_tokens}, d, stores, false) == "");
        CHECK(wrong_dispatch<float, float>(a, {.block = 5, .padding = slot_padding::spare_tokens},
                                           d, stores, true) == "");
        CHECK(wrong_dispatch<bfloat16, bfloat16>(a, {}, d, stores, true) == "");
      }
  });
}

TEST_CASE("rows of plain bytes of any size arrive as they are") {
  for_each_moved([&](const assignment& a) {
    for (const index_t bytes : {1, 17, 64, 66, 20000}) {
      test::random rng(43);
      dispatch_plan p;
      plan(a, p);
      buffer<std::byte> x(a.tokens() * bytes), slots(p.slots() * bytes),
          expected(p.slots() * bytes);
      for (index_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::byte>(rng.below(256));
      for (index_t s = 0; s < p.slots(); ++s)
        std::memcpy(expected.data() + s * bytes,
                    x.data() + p.token_of_slot()[static_cast<std::size_t>(s)] * bytes,
                    static_cast<std::size_t>(bytes));
      for (const store_path stores : {store_path::automatic, store_path::streamed}) {
        std::fill_n(slots.data(), slots.size(), std::byte{77});
        dispatch_bytes(as_rows(std::as_const(x), a.tokens(), bytes), p,
                       as_rows(slots, p.slots(), bytes), serial{}, stores);
        CHECK(std::equal(slots.data(), slots.data() + slots.size(), expected.data()));
      }
    }
  });
}

TEST_CASE(
    "combine is the adjoint of dispatch: <dispatch(x), s> = <x, combine(s)> with weights one") {
  for_each_moved([&](const assignment& a) {
    constexpr index_t d = 24;
    test::random rng(44);
    dispatch_plan p;
    plan(a, p, {.block = 4});
    buffer<float> x(a.tokens() * d), s(p.slots() * d), dx(p.slots() * d), cs(a.tokens() * d);
    // Small integers: every sum is exact.
    for (index_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(rng.below(9) - 4);
    for (index_t i = 0; i < s.size(); ++i) s[i] = static_cast<float>(rng.below(9) - 4);
    dispatch(as_rows(x, a.tokens(), d), p, as_rows(dx, p.slots(), d));
    combine(as_rows(s, p.slots(), d), p, a, as_rows(cs, a.tokens(), d),
            {.weight = combine_weight::one});
    double left = 0.0, right = 0.0;
    for (index_t i = 0; i < s.size(); ++i) left += static_cast<double>(dx[i] * s[i]);
    for (index_t i = 0; i < x.size(); ++i) right += static_cast<double>(x[i] * cs[i]);
    CHECK(left == right);
  });
}

TEST_CASE("padded rows never reach the output") {
  for_each_moved([&](const assignment& a) {
    constexpr index_t d = 40;
    test::random rng(45);
    dispatch_plan plain, padded;
    plan(a, plain);
    plan(a, padded, {.block = 8, .padding = slot_padding::spare_tokens});
    const buffer<float> x = rows_of<float>(rng, a.tokens(), d);
    buffer<float> in(plain.slots() * d), in_padded(padded.slots() * d), y(x.size()),
        y_padded(x.size());
    dispatch(as_rows(x, a.tokens(), d), plain, as_rows(in, plain.slots(), d));
    dispatch(as_rows(x, a.tokens(), d), padded, as_rows(in_padded, padded.slots(), d));
    for (index_t e = 0; e < padded.experts(); ++e)
      for (index_t s = padded.offsets()[static_cast<std::size_t>(e)] + padded.load(e);
           s < padded.offsets()[static_cast<std::size_t>(e) + 1]; ++s)
        std::fill_n(in_padded.data() + s * d, d, std::nanf(""));
    combine(as_rows(in, plain.slots(), d), plain, a, as_rows(y, a.tokens(), d));
    combine(as_rows(in_padded, padded.slots(), d), padded, a, as_rows(y_padded, a.tokens(), d));
    CHECK(test::bit_difference(all(y_padded), all(y)) == "");
  });
}

namespace {

// What each option means, in the promised order of operations.
template <class T, class U, class X, class S>
buffer<U> combined(const buffer<T>& slots, const dispatch_plan& p, const assignment& a, index_t d,
                   const buffer<U>& before, const combine_options<X, S>& o) {
  buffer<U> y(a.tokens() * d);
  for (index_t t = 0; t < a.tokens(); ++t)
    for (index_t i = 0; i < d; ++i) {
      float sum =
          o.output == combine_output::accumulate ? static_cast<float>(before[t * d + i]) : 0.0f;
      bool lost = true;
      float rest = 1.0f;
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        const auto at = static_cast<std::size_t>(c);
        const slot_id s = p.slot_of_choice()[at];
        const float w = a.weights()[at];
        if (s != no_slot) {
          sum = std::fma(o.weight == combine_weight::one ? 1.0f : w,
                         static_cast<float>(slots[s * d + i]), sum);
          lost = false;
        } else if (a.kept(c) && a.ids()[at] >= o.identity_first && a.ids()[at] < o.identity_end) {
          sum = std::fma(w, static_cast<float>(o.x(t, i)), sum);
          lost = false;
        } else {
          continue;
        }
        rest -= w;
      }
      if (o.lost == lost_token::mix || (lost && o.lost == lost_token::residual))
        sum = std::fma(lost ? 1.0f : rest, static_cast<float>(o.x(t, i)), sum);
      if (o.shared.rows > 0)
        sum =
            std::fma(o.shared_weight.empty() ? 1.0f : o.shared_weight[static_cast<std::size_t>(t)],
                     static_cast<float>(o.shared(t, i)), sum);
      y[t * d + i] = static_cast<U>(sum);
    }
  return y;
}

template <class T, class U, class X, class S>
std::string wrong_combine(const assignment& a, index_t d) {
  test::random rng(46);
  std::string wrong;
  const auto some = [&](auto& o, bool identity, bool shared, bool gated,
                        const std::vector<float>& gates, const buffer<X>& x, const buffer<S>& sh) {
    if (identity) {
      o.identity_first = static_cast<expert_id>(a.experts() / 2);
      o.identity_end = static_cast<expert_id>(a.experts());
    }
    o.x = as_rows(x, a.tokens(), d);
    if (shared) o.shared = as_rows(sh, a.tokens(), d);
    if (gated) o.shared_weight = gates;
  };
  for (int bits = 0; bits < 64 && wrong.empty(); ++bits) {
    const auto bit = [&](int i) { return (bits >> i & 1) != 0; };
    dispatch_plan p;
    std::vector<std::uint8_t> owned(static_cast<std::size_t>(a.experts()), 1);
    if (bit(0)) std::fill(owned.begin() + a.experts() / 2, owned.end(), std::uint8_t{0});
    plan(a, p, {.owned = owned});
    const buffer<T> slots = rows_of<T>(rng, p.slots(), d);
    const buffer<X> x = rows_of<X>(rng, a.tokens(), d);
    const buffer<S> shared = rows_of<S>(rng, a.tokens(), d);
    buffer<U> y = rows_of<U>(rng, a.tokens(), d);
    std::vector<float> gates(static_cast<std::size_t>(a.tokens()));
    for (float& g : gates) g = rng.uniform();
    combine_options<X, S> o;
    o.weight = bit(1) ? combine_weight::one : combine_weight::of_choice;
    o.output = bit(2) ? combine_output::accumulate : combine_output::overwrite;
    o.lost = !bit(3)             ? lost_token::zero
             : bit(5) && !bit(4) ? lost_token::mix
                                 : lost_token::residual;
    some(o, bit(0), bit(4), bit(4) && bit(5), gates, x, shared);
    const buffer<U> expected = combined(slots, p, a, d, y, o);
    combine(as_rows(slots, p.slots(), d), p, a, as_rows(y, a.tokens(), d), o);
    wrong = test::bit_difference(all(y), all(expected));
    if (!wrong.empty()) wrong += " with options " + std::to_string(bits);
  }
  return wrong;
}

}  // namespace

TEST_CASE("every option of combine is its sentence, in rank order with one rounding") {
  for_each_moved([&](const assignment& a) {
    for (const index_t d : {1, 37, 200}) {
      if (d * a.tokens() > test::sized(2'000, 500)) continue;
      CHECK(wrong_combine<float, float, float, float>(a, d) == "");
      CHECK(wrong_combine<float, bfloat16, bfloat16, float>(a, d) == "");
      CHECK(wrong_combine<bfloat16, bfloat16, float, float16>(a, d) == "");
    }
  });
}

TEST_CASE("identity experts fused into combine give the bits of identity experts that were run") {
  for_each_moved([&](const assignment& a) {
    constexpr index_t d = 48;
    test::random rng(47);
    const buffer<float> x = rows_of<float>(rng, a.tokens(), d);
    dispatch_plan every, none;
    const std::vector<std::uint8_t> owned(static_cast<std::size_t>(a.experts()), 0);
    plan(a, every);
    plan(a, none, {.owned = owned});
    buffer<float> in(every.slots() * d), y(x.size()), fused(x.size()), nothing(0);
    dispatch(as_rows(x, a.tokens(), d), every, as_rows(in, every.slots(), d));
    combine(as_rows(in, every.slots(), d), every, a, as_rows(y, a.tokens(), d));
    combine(as_rows(nothing, 0, d), none, a, as_rows(fused, a.tokens(), d),
            {.identity_end = static_cast<expert_id>(a.experts()), .x = as_rows(x, a.tokens(), d)});
    CHECK(test::bit_difference(all(fused), all(y)) == "");
  });
}

TEST_CASE("identity experts with weights that sum to s give s times the token") {
  test::random rng(48);
  assignment a = test::fixed_choices(rng, 30, 8, 4);
  for (index_t t = 0; t < 30; ++t)
    for (std::size_t r = 0; r < 4; ++r)
      a.weights()[static_cast<std::size_t>(t) * 4 + r] = r == 0 ? 0.5f : 0.25f;  // 1.25
  dispatch_plan p;
  plan(a, p);
  buffer<float> x(30 * 16), in(p.slots() * 16), y(30 * 16), expected(30 * 16);
  for (index_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(rng.below(1000) - 500);
    expected[i] = 1.25f * x[i];
  }
  dispatch(as_rows(x, 30, 16), p, as_rows(in, p.slots(), 16));
  combine(as_rows(in, p.slots(), 16), p, a, as_rows(y, 30, 16));
  CHECK(test::bit_difference(all(y), all(expected)) == "");
}

TEST_CASE("the output of combine may be the hidden states or the shared experts' rows themselves") {
  test::random rng(49);
  assignment a = test::fixed_choices(rng, 20, 6, 2, 3);
  dispatch_plan p;
  plan(a, p);
  const buffer<float> slots = rows_of<float>(rng, p.slots(), 33), x = rows_of<float>(rng, 20, 33);
  buffer<float> apart(20 * 33), in_place = x;
  for (const bool shared : {false, true}) {
    in_place = x;
    combine_options<> o;
    (shared ? o.shared : o.x) = as_rows(x, 20, 33);
    if (!shared) o.lost = lost_token::residual;
    combine(as_rows(slots, p.slots(), 33), p, a, as_rows(apart, 20, 33), o);
    (shared ? o.shared : o.x) = as_rows(std::as_const(in_place), 20, 33);
    combine(as_rows(slots, p.slots(), 33), p, a, as_rows(in_place, 20, 33), o);
    CHECK(test::bit_difference(all(in_place), all(apart)) == "");
  }
}

TEST_CASE("rows in the order of their choices combine to the bits of rows in slots") {
  test::random rng(52);
  const auto check = [&]<class T>(T, const assignment& a, index_t d) {
    const index_t n = a.choices(), stride = d + 3, tokens = a.tokens();
    // What is not to be read is no number.
    buffer<T> rows(n * stride);
    std::fill_n(rows.data(), rows.size(), static_cast<T>(std::nanf("")));
    const expert_id identity = static_cast<expert_id>(a.experts() / 2);
    const buffer<T> x = rows_of<T>(rng, tokens, d), shared = rows_of<T>(rng, tokens, d);
    for (const bool plain : {true, false}) {
      std::vector<std::uint8_t> owned(static_cast<std::size_t>(a.experts()), 1);
      if (!plain) owned[static_cast<std::size_t>(identity)] = 0;
      dispatch_plan p;
      plan(a, p, {.owned = owned});
      buffer<T> slots(p.slots() * d), expected = rows_of<T>(rng, tokens, d), got = expected;
      for (index_t c = 0; c < n; ++c)
        if (const slot_id s = p.slot_of_choice()[static_cast<std::size_t>(c)]; s != no_slot)
          for (index_t i = 0; i < d; ++i)
            slots[s * d + i] = rows[c * stride + i] = static_cast<T>(rng.normal());
      combine_options<T, T> o;
      if (!plain)
        o = {.output = combine_output::accumulate,
             .lost = lost_token::residual,
             .identity_first = identity,
             .identity_end = identity + 1,
             .x = as_rows(x, tokens, d),
             .shared = as_rows(shared, tokens, d)};
      combine(as_rows(slots, p.slots(), d), p, a, as_rows(expected, tokens, d), o);
      combine(matrix_view<const T>(rows.data(), n, d, stride), a, as_rows(got, tokens, d), o);
      INFO("T=" << tokens << " k=" << a.k() << " d=" << d << " plain " << plain);
      CHECK(test::bit_difference(all(got), all(expected)) == "");
    }
  };
  for_each_moved([&](const assignment& a) {
    for (const index_t d : {1, 40, 130}) check(float{}, a, d);
    check(bfloat16{}, a, 70);
  });
  check(float{}, test::fixed_choices(rng, 3, 100, 70), 33);  // more than are listed at once
  const assignment a = test::fixed_choices(rng, 4, 8, 2);
  buffer<float> rows(8 * 16), y(4 * 16);
  CHECK(test::refusal([&] { combine(as_rows(rows, 7, 16), a, as_rows(y, 4, 16)); }) ==
        "moeroute::combine: rows.rows() is 7, expected 8");
}

TEST_CASE("memory that overlaps, rows too close and sizes that differ are refused by name") {
  test::random rng(50);
  const assignment a = test::fixed_choices(rng, 10, 4, 2),
                   other = test::fixed_choices(rng, 11, 4, 2);
  dispatch_plan p;
  plan(a, p);
  buffer<float> memory(1000);
  float* m = memory.data();
  const matrix_view<float> x(m, 10, 8), slots(m + 80, 20, 8), y(m + 240, 10, 8);
  const std::vector<float> nine(9);
  const auto refused_dispatch = [&](matrix_view<float> from, matrix_view<float> to,
                                    const dispatch_options& o = {}) {
    return test::refusal([&] { dispatch(from, p, to, o); });
  };
  CHECK(refused_dispatch(x, slots) == "accepted");
  CHECK(refused_dispatch(x, {m + 79, 20, 8}) ==
        "moeroute::dispatch: x and slots overlap, expected memory of their own");
  matrix_view<float> close = slots;
  close.stride = 7;
  CHECK(refused_dispatch(x, close) == "moeroute::dispatch: slots.stride is 7, expected at least 8");
  CHECK(refused_dispatch(x, slots, {.scale = nine}) ==
        "moeroute::dispatch: scale.size() is 9, expected 20");
  CHECK(refused_dispatch({m, 11, 8}, slots) == "moeroute::dispatch: x.rows() is 11, expected 10");

  const auto refused_combine = [&](matrix_view<float> from, matrix_view<float> to,
                                   const combine_options<>& o = {}) {
    return test::refusal([&] { combine(from, p, a, to, o); });
  };
  CHECK(refused_combine(slots, y) == "accepted");
  CHECK(refused_combine(slots, {m + 239, 10, 8}) ==
        "moeroute::combine: slots and y overlap, expected memory of their own");
  matrix_view<float> close_y = y;
  close_y.stride = 7;
  CHECK(refused_combine(close, y) == "moeroute::combine: slots.stride is 7, expected at least 8");
  CHECK(refused_combine(slots, close_y) == "moeroute::combine: y.stride is 7, expected at least 8");
  matrix_view<float> close_x = x;
  close_x.stride = 7;
  CHECK(refused_dispatch(close_x, slots) ==
        "moeroute::dispatch: x.stride is 7, expected at least 8");
  CHECK(refused_combine(slots, y, {.lost = lost_token::residual, .x = close_x}) ==
        "moeroute::combine: x.stride is 7, expected at least 8");
  CHECK(refused_combine(slots, y, {.shared = close_x}) ==
        "moeroute::combine: shared.stride is 7, expected at least 8");
  CHECK(refused_combine(slots, y, {.lost = lost_token::residual}) ==
        "moeroute::combine: x.rows() is 0, expected 10");
  CHECK(refused_combine(slots, y, {.lost = lost_token::residual, .x = {m + 241, 10, 8}}) ==
        "moeroute::combine: x and y overlap, expected memory of their own");
  CHECK(refused_combine(slots, y, {.shared = {m, 9, 8}}) ==
        "moeroute::combine: shared.rows() is 9, expected 10");
  CHECK(refused_combine(slots, y, {.shared = x, .shared_weight = nine}) ==
        "moeroute::combine: shared_weight.size() is 9, expected 10");
  CHECK(test::refusal([&] { combine(slots, p, other, y); }) ==
        "moeroute::combine: choices.tokens() is 11, expected 10");
}

TEST_CASE("warm dispatch and combine never allocate, in any dtype and with any option") {
  test::random rng(51);
  const assignment a = test::fixed_choices(rng, 30, 8, 2, 5);
  dispatch_plan p;
  plan(a, p);
  buffer<float> x(30 * 64), slots(p.slots() * 64), y(30 * 64);
  buffer<bfloat16> xb(30 * 64), sb(p.slots() * 64), yb(30 * 64);
  std::fill_n(x.data(), x.size(), 1.0f);
  const auto view_x = as_rows(std::as_const(x), 30, 64);
  CHECK(test::allocations_during([&] {
          dispatch(view_x, p, as_rows(slots, p.slots(), 64));
          dispatch(view_x, p, as_rows(sb, p.slots(), 64), {.scale = a.weights()});
          combine(as_rows(slots, p.slots(), 64), p, a, as_rows(y, 30, 64));
          combine(as_rows(sb, p.slots(), 64), p, a, as_rows(yb, 30, 64));
          combine(as_rows(slots, p.slots(), 64), p, a, as_rows(yb, 30, 64),
                  {.output = combine_output::accumulate,
                   .lost = lost_token::residual,
                   .x = view_x,
                   .shared = view_x});
        }) == 0);
}

#if defined(__linux__) && defined(__LP64__)
namespace {

template <class T>
void check_far_rows() {
  // The last row begins at element 2^31 + 256.
  constexpr index_t rows = 5, stride = (index_t{1} << 29) + 64, d = 80;
  const test::sparse_rows<T> x_memory(rows, d, stride), slot_memory(rows, d, stride);
  const matrix_view<T> x = x_memory.view(), slots = slot_memory.view();
  assignment a;
  a.reset(rows, 2, 1);
  for (index_t t = 0; t < rows; ++t) {
    a.ids()[static_cast<std::size_t>(t)] = static_cast<expert_id>(1 - t % 2);
    a.weights()[static_cast<std::size_t>(t)] = 2.0f;
    for (index_t i = 0; i < d; ++i) x(t, i) = static_cast<T>(static_cast<float>(16 * t + i % 16));
  }
  dispatch_plan p;
  plan(a, p);
  dispatch(x, p, slots);
  bool right = true;
  for (index_t s = 0; s < rows; ++s)
    for (index_t i = 0; i < d; ++i)
      right &= static_cast<float>(slots(s, i)) ==
               static_cast<float>(16 * p.token_of_slot()[static_cast<std::size_t>(s)] + i % 16);
  CHECK(right);
  // The plain path and the one with options.
  for (const combine_output output : {combine_output::overwrite, combine_output::accumulate}) {
    combine(slots, p, a, x, {.output = output});
    const float times = output == combine_output::overwrite ? 2.0f : 4.0f;
    for (index_t t = 0; t < rows; ++t)
      for (index_t i = 0; i < d; ++i)
        right &= static_cast<float>(x(t, i)) == times * static_cast<float>(16 * t + i % 16);
    CHECK(right);
  }
}

}  // namespace

TEST_CASE("rows beyond 2^31 elements are addressed right") {
  check_far_rows<float>();
  check_far_rows<bfloat16>();
}

TEST_CASE("rows of bytes beyond 2^31 of them are addressed right") {
  constexpr index_t rows = 5, stride = (index_t{1} << 29) + 64, bytes = 80;
  const test::sparse_rows<std::byte> x(rows, bytes, stride), slots(rows, bytes, stride);
  test::random rng(52);
  const assignment a = test::fixed_choices(rng, rows, 3, 1);
  dispatch_plan p;
  plan(a, p);
  for (index_t t = 0; t < rows; ++t)
    for (index_t i = 0; i < bytes; ++i) x.view()(t, i) = static_cast<std::byte>(rng.below(256));
  dispatch_bytes(matrix_view<const std::byte>(x.view()), p, slots.view());
  bool right = true;
  for (index_t s = 0; s < rows; ++s)
    right &= std::equal(slots.view().data + s * stride, slots.view().data + s * stride + bytes,
                        x.view().data + p.token_of_slot()[static_cast<std::size_t>(s)] * stride);
  CHECK(right);
}
#endif
