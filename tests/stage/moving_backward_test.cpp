#include <moeroute/stage/dispatch_backward.hpp>
//
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/capacity_backward.hpp>
#include <moeroute/stage/combine_backward.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <utility>
#include <vector>

#include "oracle/losses.hpp"
#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

using namespace moeroute;

namespace {

// Rows whose entries are random, with a stride of their own.
template <class T>
struct spread_rows {
  index_t n, d, stride;
  std::vector<T> value;

  // Without a gap of its own: one by seed, so that no two matrices of a call have the same stride.
  spread_rows(index_t count, index_t cols, std::uint64_t seed)
      : spread_rows(count, cols, seed, static_cast<index_t>(1 + seed % 9)) {}
  spread_rows(index_t count, index_t cols, std::uint64_t seed, index_t gap)
      : n(count), d(cols), stride(cols + gap), value(static_cast<std::size_t>(n * stride)) {
    test::random rng(seed);
    for (T& v : value) v = static_cast<T>(rng.normal());
  }
  matrix_view<T> view() { return {value.data(), n, d, stride}; }
  matrix_view<const T> view() const { return {value.data(), n, d, stride}; }
  double operator()(index_t r, index_t c) const {
    return static_cast<double>(value[static_cast<std::size_t>(r * stride + c)]);
  }
};

template <class A, class B>
double dot(const spread_rows<A>& a, const spread_rows<B>& b) {
  double sum = 0.0;
  for (index_t r = 0; r < a.n; ++r)
    for (index_t c = 0; c < a.d; ++c) sum += a(r, c) * b(r, c);
  return sum;
}

bool close(double a, double b, double bound = 1e-5) {
  return std::abs(a - b) <= bound * (1.0 + std::abs(b));
}

template <class T>
std::vector<T> weights_of(const assignment& a) {
  return {a.weights().begin(), a.weights().end()};
}

struct scene {
  assignment choices;
  dispatch_plan plan;
  explicit scene(assignment a, const plan_options& how = {}) : choices(std::move(a)) {
    moeroute::plan(choices, plan, how);
  }
};

// Fixed, ragged, with drops, padded, without tokens.
template <class F>
void for_each_scene(F&& f) {
  test::random rng(3);
  f("fixed", scene(test::fixed_choices(rng, 40, 8, 3, 5)));
  f("ragged", scene(test::ragged_choices(rng, 33, 6, 4)));
  assignment dropped = test::fixed_choices(rng, 29, 5, 2);
  test::drop_some(rng, dropped, 3);
  f("drops", scene(dropped));
  f("padded", scene(test::fixed_choices(rng, 21, 4, 2), {.block = 8}));
  f("many choices", scene(test::fixed_choices(rng, 3, 100, 70)));
  f("nobody", scene(test::fixed_choices(rng, 0, 4, 2)));
}

// Both derivatives by plain loops.
template <class T>
void agree_with_loops(const scene& s, index_t d, double bound) {
  const index_t tokens = s.plan.tokens(), slots = s.plan.slots();
  const spread_rows<T> out(slots, d, 5), dy(tokens, d, 6);
  spread_rows<T> dslots(slots, d, 7), dx(tokens, d, 8);
  const spread_rows<T> before = dx;
  const std::vector<T> w = weights_of<T>(s.choices);
  std::vector<T> dw(w.size(), T(9)), dscale(w.size(), T(9));
  combine_backward(out.view(), s.plan, w, dy.view(), combine_gradients<T, T>{dslots.view(), dw});
  std::vector<double> slow(w.size());
  spread_rows<double> slow_slots(slots, d, 1), slow_x(tokens, d, 1), slow_added(tokens, d, 1);
  std::fill(slow_slots.value.begin(), slow_slots.value.end(), 0.0);
  std::fill(slow_x.value.begin(), slow_x.value.end(), 0.0);
  std::vector<double> slow_scale(w.size());
  for (index_t t = 0; t < tokens; ++t)
    for (index_t c = s.plan.first(t); c < s.plan.first(t + 1); ++c) {
      const index_t slot = s.plan.slot_of_choice()[static_cast<std::size_t>(c)];
      const auto at = static_cast<std::size_t>(c);
      for (index_t j = 0; slot >= 0 && j < d; ++j) {
        slow[at] += dy(t, j) * out(slot, j);
        slow_slots.view()(slot, j) = static_cast<double>(w[at]) * dy(t, j);
        slow_x.view()(t, j) += static_cast<double>(w[at]) * out(slot, j);
        slow_scale[at] += dy(t, j) * out(slot, j);
      }
    }
  CHECK(test::difference(dw, slow, bound, 30 * bound) == "");
  bool same = true;
  for (index_t r = 0; r < slots; ++r)
    for (index_t j = 0; j < d; ++j) same = same && close(dslots(r, j), slow_slots(r, j), bound);
  CHECK(same);
  dispatch_backward(out.view(), s.plan, gradient_to::write, dx.view(), serial{},
                    {.scale = w, .x = dy.view(), .dscale = dscale});
  CHECK(test::difference(dscale, slow_scale, bound, 30 * bound) == "");
  for (index_t r = 0; r < tokens; ++r)
    for (index_t j = 0; j < d; ++j) same = same && close(dx(r, j), slow_x(r, j), 30 * bound);
  CHECK(same);
  dispatch_backward(out.view(), s.plan, gradient_to::write, dx.view());
  for (index_t t = 0; t < tokens; ++t)
    for (index_t j = 0; j < d; ++j) {
      double sum = 0.0;
      for (index_t c = s.plan.first(t); c < s.plan.first(t + 1); ++c)
        if (const index_t slot = s.plan.slot_of_choice()[static_cast<std::size_t>(c)]; slot >= 0)
          sum += out(slot, j);
      same = same && close(dx(t, j), sum, 30 * bound);
    }
  CHECK(same);
  spread_rows<T> added = before;
  dispatch_backward(out.view(), s.plan, gradient_to::add, added.view(), serial{}, {.scale = w});
  for (index_t r = 0; r < tokens; ++r)
    for (index_t j = 0; j < d; ++j)
      same = same && close(added(r, j) - before(r, j), slow_x(r, j), 30 * bound);
  CHECK(same);
}

}  // namespace

TEST_CASE("gradients of combine and dispatch are those of plain loops, in float and double") {
  for_each_scene([](const char* name, const scene& s) {
    INFO(name);
    for (const index_t d : {1, 16, 37, 100}) {
      agree_with_loops<float>(s, d, 1e-6);
      agree_with_loops<double>(s, d, 1e-14);
    }
    if (s.plan.tokens() == 29) agree_with_loops<float>(s, 8200, 1e-5);  // in pieces
  });
}

namespace {

// Rows at a forbidden page, of numbers whose sums of products are exact in 16 bits too; each of a
// call in a memory of its own.
template <class T>
struct guarded_rows {
  matrix_view<T> view;

  guarded_rows(int place, test::random& rng, index_t n, index_t d, index_t gap,
               test::guarded_end end) {
    static test::guarded<T> every[] = {test::guarded<T>(8192), test::guarded<T>(8192),
                                       test::guarded<T>(8192), test::guarded<T>(8192),
                                       test::guarded<T>(8192), test::guarded<T>(8192),
                                       test::guarded<T>(8192)};
    test::guarded<T>& memory = every[place];
    // No gap behind the last row.
    view = {memory.window(n > 0 ? n * (d + gap) - gap : 0, end), n, d, d + gap};
    for (index_t r = 0; r < n; ++r)
      for (index_t c = 0; c < d; ++c) view(r, c) = static_cast<T>(static_cast<float>(rng.below(5)));
  }
  float operator()(index_t r, index_t c) const { return static_cast<float>(view(r, c)); }
  // Between the rows lies what was there before.
  bool gaps_are_whole() const {
    bool whole = true;
    for (index_t r = 0; r + 1 < view.rows; ++r)
      for (index_t c = view.cols; c < view.stride; ++c) {
        const T& gap = view.data[r * view.stride + c];
        whole = whole && gap != gap;
      }
    return whole;
  }
};

// How many numbers are wrong.
template <class T>
index_t wrong_beside_forbidden(const scene& s, index_t d, index_t gap, test::guarded_end end,
                               bool streamed) {
  test::random rng(static_cast<std::uint64_t>(d));
  const index_t tokens = s.plan.tokens(), n = s.plan.slots(), choices = s.plan.choices();
  const guarded_rows<T> x(0, rng, tokens, d, gap, end), in(1, rng, n, d, gap, end);
  guarded_rows<T> moved(2, rng, n, d, gap, end), y(3, rng, tokens, d, gap, end),
      dslots(4, rng, n, d, gap, end), dx(5, rng, tokens, d, gap, end);
  guarded_rows<float> wide(6, rng, tokens, d, gap, end);  // x in float
  for (index_t t = 0; t < tokens; ++t)
    for (index_t j = 0; j < d; ++j) wide.view(t, j) = x(t, j);
  test::guarded<float> weights(choices), dweights(choices), dscales(choices);
  const auto list = [&](test::guarded<float>& in_memory) {
    return std::span(in_memory.window(choices, end), static_cast<std::size_t>(choices));
  };
  const std::span<float> w = list(weights), dw = list(dweights), dscale = list(dscales);
  for (float& v : w) v = static_cast<float>(1 + rng.below(2));
  const store_path stores = streamed ? store_path::streamed : store_path::cached;
  dispatch(x.view, s.plan, moved.view, serial{}, {.scale = w, .stores = stores});
  combine(in.view, s.plan, w, y.view);
  combine_backward(in.view, s.plan, w, x.view, combine_gradients<T, float>{dslots.view, dw});
  dispatch_backward(in.view, s.plan, gradient_to::write, dx.view, serial{},
                    {.scale = w, .x = wide.view, .dscale = dscale});
  index_t wrong = 0;
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<float> sum(static_cast<std::size_t>(d));
    for (index_t c = s.plan.first(t); c < s.plan.first(t + 1); ++c) {
      const auto at = static_cast<std::size_t>(c);
      const index_t slot = s.plan.slot_of_choice()[at];
      float dot = 0.0f;
      for (index_t j = 0; slot >= 0 && j < d; ++j) {
        sum[static_cast<std::size_t>(j)] += w[at] * in(slot, j);
        dot += x(t, j) * in(slot, j);
        wrong += moved(slot, j) != w[at] * x(t, j);
        wrong += dslots(slot, j) != w[at] * x(t, j);
      }
      wrong += dw[at] != dot;
      wrong += dscale[at] != dot;
    }
    for (index_t j = 0; j < d; ++j) {
      wrong += y(t, j) != sum[static_cast<std::size_t>(j)];
      wrong += dx(t, j) != sum[static_cast<std::size_t>(j)];
    }
  }
  // Padding, which nobody reads, is written up to the width of a row.
  for (index_t e = 0; e < s.plan.experts(); ++e)
    for (index_t slot = s.plan.offsets()[static_cast<std::size_t>(e)] + s.plan.load(e);
         slot < s.plan.offsets()[static_cast<std::size_t>(e) + 1]; ++slot)
      for (index_t j = 0; j < d; ++j) wrong += moved(slot, j) != 0.0f || dslots(slot, j) != 0.0f;
  // As they are.
  dispatch(x.view, s.plan, moved.view, serial{}, {.stores = stores});
  for (index_t slot = 0; slot < n; ++slot) {
    const slot_id t = s.plan.token_of_slot()[static_cast<std::size_t>(slot)];
    for (index_t j = 0; j < d; ++j) wrong += moved(slot, j) != (t == no_token ? 0.0f : x(t, j));
  }
  for (const guarded_rows<T>* rows : {&moved, &y, &dslots, &dx}) wrong += !rows->gaps_are_whole();
  return wrong;
}

}  // namespace

TEST_CASE("rows of any width are moved and pulled back beside memory that nobody may touch") {
  test::random rng(91);
  for (const test::guarded_end end : {test::guarded_end::front, test::guarded_end::back}) {
    // Plans too: of 16 choices, and of 16 offsets.
    const test::forbidden_memory around(end);
    assignment some = test::fixed_choices(rng, 8, 7, 2, 6);
    test::drop_some(rng, some, 6);
    for (const std::size_t c : {0u, 1u, 14u, 15u}) {  // the first and the last lie at the ends
      some.ids()[c] = static_cast<expert_id>(c % 2 + 2);
      some.kept_to_change()[c] = 1;
    }
    const scene few(some), ragged(test::ragged_choices(rng, 15, 15, 4)),
        padded(test::fixed_choices(rng, 8, 7, 2), {.block = 8});
    for (index_t d = 0; d <= 130; ++d) {
      INFO("d = " << d << ", end " << static_cast<int>(end));
      const scene& s = d % 3 == 0 ? few : d % 3 == 1 ? ragged : padded;
      CHECK(wrong_beside_forbidden<float>(s, d, d % 3, end, d % 4 < 2) == 0);
      CHECK(wrong_beside_forbidden<bfloat16>(s, d, (d + 1) % 3, end, d % 4 < 2) == 0);
    }
    CHECK(wrong_beside_forbidden<float>(few, 64, 0, end, true) == 0);
    CHECK(wrong_beside_forbidden<float>(ragged, 64, 64, end, true) == 0);
    // Rows that are in no cache: those of the next token are fetched, and behind the last is none.
    for (const scene* s : {&few, &ragged}) {
      if (end == test::guarded_end::front) continue;
      const index_t d = simd::machine_caches().second / 16, n = s->plan.slots(),
                    tokens = s->plan.tokens();
      REQUIRE(n > 8);
      buffer<float> rows(n * d), y(tokens * d), dx(tokens * d);
      std::fill_n(rows.data(), rows.size(), 1.0f);
      const matrix_view<const float> in(rows.data(), n, d);
      combine(in, s->plan, s->choices, matrix_view<float>(y.data(), tokens, d));
      dispatch_backward(in, s->plan, gradient_to::write, matrix_view<float>(dx.data(), tokens, d),
                        serial{}, {.scale = s->choices.weights()});
      index_t wrong = 0;
      for (index_t t = 0; t < tokens; ++t) {
        float sum = 0.0f;
        for (index_t c = s->plan.first(t); c < s->plan.first(t + 1); ++c)
          if (s->plan.slot_of_choice()[static_cast<std::size_t>(c)] != no_slot)
            sum += s->choices.weights()[static_cast<std::size_t>(c)];
        for (index_t j = 0; j < d; ++j) wrong += y[t * d + j] != sum || dx[t * d + j] != sum;
      }
      CHECK(wrong == 0);
    }
  }
}

namespace {

// The serial executor, which writes down what it was asked to cut.
struct noting {
  using loops = std::vector<std::pair<index_t, index_t>>;
  loops* seen;

  static int concurrency() { return 2; }
  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    seen->emplace_back(n, grain);
    serial{}.parallel_for(n, grain, f);
  }
};

}  // namespace

TEST_CASE("a piece is about 2^16 elements, those of every term of its tokens") {
  CHECK(detail::row_grain(0) == 65536);
  CHECK(detail::row_grain(1) == 65536);
  CHECK(detail::row_grain(65535) == 1);
  CHECK(detail::row_grain(65536) == 1);
  CHECK(detail::row_grain(1 << 20) == 1);
  test::random rng(92);
  const scene s(test::fixed_choices(rng, 7, 100, 3), {.block = 2});
  const index_t d = 1000, n = s.plan.slots(), padded = s.plan.experts();
  const spread_rows<float> x(7, d, 1), in(n, d, 2);
  spread_rows<float> slots(n, d, 3), y(7, d, 4), dslots(n, d, 5), dx(7, d, 6);
  std::vector<float> dw(21);
  noting::loops seen;
  const noting exec{&seen};
  const auto asked = [&](auto&& call) {
    seen.clear();
    call();
    return seen;
  };
  const noting::loops tokens{{7, 21}};  // 2^16 / (3 * 1000)
  CHECK(asked([&] { dispatch(x.view(), s.plan, slots.view(), exec); }) ==
        noting::loops{{7, 21}, {padded, 64}});
  CHECK(asked([&] { combine(in.view(), s.plan, s.choices, y.view(), exec); }) == tokens);
  CHECK(asked([&] {
          combine(in.view(), s.plan, s.choices, y.view(), exec,
                  combine_options<>{.output = combine_output::accumulate});
        }) == tokens);
  CHECK(asked([&] {
          combine_backward(in.view(), s.plan, s.choices, x.view(),
                           combine_gradients<float>{dslots.view(), dw}, exec);
        }) == tokens);
  CHECK(asked([&] { dispatch_backward(in.view(), s.plan, gradient_to::write, dx.view(), exec); }) ==
        tokens);
}

TEST_CASE("each is the adjoint of its forward pass") {
  for_each_scene([](const char* name, const scene& s) {
    INFO(name);
    const index_t d = 24, tokens = s.plan.tokens(), slots = s.plan.slots();
    const spread_rows<float> in(slots, d, 15), dy(tokens, d, 16), x(tokens, d, 18);
    spread_rows<float> y(tokens, d, 1), dslots(slots, d, 2), moved(slots, d, 3), dx(tokens, d, 4);
    std::vector<float> dw(s.choices.weights().size());
    combine(in.view(), s.plan, s.choices, y.view());
    combine_backward(in.view(), s.plan, s.choices, dy.view(),
                     combine_gradients<float>{dslots.view(), dw});
    // Padding is not combined, but has gradient 0.
    CHECK(close(dot(dslots, in), dot(dy, y)));
    double by_weight = 0.0;
    for (std::size_t c = 0; c < dw.size(); ++c)
      by_weight += static_cast<double>(dw[c]) * static_cast<double>(s.choices.weights()[c]);
    CHECK(close(by_weight, dot(dy, y)));
    dispatch(x.view(), s.plan, moved.view(), {.scale = s.choices.weights()});
    dispatch_backward(in.view(), s.plan, gradient_to::write, dx.view(), serial{},
                      {.scale = s.choices.weights()});
    CHECK(close(dot(dx, x), dot(in, moved)));
  });
}

TEST_CASE("identity experts, lost tokens and shared rows pull back what combine gave them") {
  test::random rng(12);
  assignment a = test::fixed_choices(rng, 30, 8, 2, 4);
  test::drop_some(rng, a, 4);
  // On both sides of the identity expert are others without a slot.
  std::vector<std::uint8_t> owned = {1, 1, 0, 1, 1, 1, 0, 0};
  const scene s(a, {.owned = owned});
  const index_t d = 20;
  const spread_rows<float> in(s.plan.slots(), d, 1), x(30, d, 2), shared(30, d, 3), dy(30, d, 4);
  std::vector<float> gate(30);
  for (float& g : gate) g = rng.uniform();
  const combine_options<> how{.lost = lost_token::residual,
                              .identity_first = 6,
                              .identity_end = 7,
                              .x = x.view(),
                              .shared = shared.view(),
                              .shared_weight = gate};
  spread_rows<float> y(30, d, 5), dslots(s.plan.slots(), d, 6), dx(30, d, 7), dshared(30, d, 8);
  std::fill(dx.value.begin(), dx.value.end(), 0.0f);
  std::vector<float> dw(60), dgate(30);
  combine(in.view(), s.plan, s.choices, y.view(), how);
  combine_backward(in.view(), s.plan, s.choices, dy.view(),
                   combine_gradients<float>{dslots.view(), dw, dx.view(), dshared.view(), dgate},
                   serial{}, how);
  // y is linear in the rows of all three kinds together.
  CHECK(close(dot(dslots, in) + dot(dx, x) + dot(dshared, shared), dot(dy, y)));
  double by_gate = 0.0;
  for (std::size_t t = 0; t < 30; ++t)
    by_gate += static_cast<double>(dgate[t]) * static_cast<double>(gate[t]);
  CHECK(close(by_gate, dot(dshared, shared)));
  for (std::size_t c = 0; c < 60; ++c) {
    const bool adds =
        s.plan.slot_of_choice()[c] != no_slot || (a.ids()[c] == 6 && a.kept(index_t(c)));
    CHECK((dw[c] != 0.0f) == adds);
    if (a.ids()[c] != 6 || !a.kept(index_t(c))) continue;
    double sum = 0.0;
    for (index_t j = 0; j < d; ++j) sum += dy(index_t(c) / 2, j) * x(index_t(c) / 2, j);
    CHECK(close(static_cast<double>(dw[c]), sum));
  }
}

TEST_CASE("what the weights leave of a token pulls at x, and at every weight") {
  test::random rng(13);
  const scene s(test::fixed_choices(rng, 30, 8, 3, 5));
  const index_t d = 20;
  const spread_rows<float> in(s.plan.slots(), d, 1), x(30, d, 2), dy(30, d, 3);
  spread_rows<float> dslots(s.plan.slots(), d, 4), dx(30, d, 5);
  std::fill(dx.value.begin(), dx.value.end(), 0.0f);
  std::vector<float> dw(90, 9.0f);
  combine_backward(in.view(), s.plan, s.choices, dy.view(),
                   combine_gradients<float>{dslots.view(), dw, dx.view()}, serial{},
                   combine_options<>{.lost = lost_token::mix, .x = x.view()});
  bool same = true;
  for (index_t t = 0; t < 30; ++t) {
    double rest = 1.0;
    for (index_t c = 3 * t; c < 3 * t + 3; ++c) {
      const index_t slot = s.plan.slot_of_choice()[static_cast<std::size_t>(c)];
      const auto w = static_cast<double>(s.choices.weights()[static_cast<std::size_t>(c)]);
      double sum = 0.0;
      for (index_t j = 0; slot >= 0 && j < d; ++j) {
        sum += dy(t, j) * (in(slot, j) - x(t, j));
        same = same && close(dslots(slot, j), w * dy(t, j));
      }
      same = same && close(static_cast<double>(dw[static_cast<std::size_t>(c)]), sum);
      if (slot >= 0) rest -= w;
    }
    for (index_t j = 0; j < d; ++j) same = same && close(dx(t, j), rest * dy(t, j));
  }
  CHECK(same);
}

TEST_CASE("each gradient of a combine that is wanted is that of plain loops, whatever else is") {
  test::random rng(83);
  for (int round = 0; round < 200; ++round) {
    const index_t tokens = rng.below(9), k = 1 + rng.below(5), d = 1 + rng.below(20);
    assignment a = rng.below(2) == 0 ? test::ragged_choices(rng, tokens, 6, k)
                                     : test::fixed_choices(rng, tokens, 6, k, 4);
    if (rng.below(3) == 0) test::drop_some(rng, a, 3);
    combine_options<> how;
    std::vector<std::uint8_t> owned(6, 1);
    if (rng.below(2) == 0) {
      how.identity_first = 1;
      how.identity_end = 3;
      owned[1] = owned[2] = 0;
    }
    const bool ones = rng.below(3) == 0, of_slots = rng.below(2) == 0, of_x = rng.below(2) == 0,
               given = !ones || rng.below(2) == 0;
    const lost_token lost[] = {lost_token::zero, lost_token::residual, lost_token::mix};
    how.lost = lost[rng.below(ones ? 2 : 3)];
    if (ones) how.weight = combine_weight::one;
    const scene s(a, {.owned = owned});
    const spread_rows<float> out(s.plan.slots(), d, 5), dy(tokens, d, 6), x(tokens, d, 3);
    spread_rows<float> dslots(s.plan.slots(), d, 7), dx(tokens, d, 8);
    const spread_rows<float> before = dx;
    how.x = x.view();
    const std::vector<float> w = given ? weights_of<float>(a) : std::vector<float>();
    std::vector<float> dw(rng.below(2) == 0 ? static_cast<std::size_t>(a.choices()) : 0, 9.0f);
    combine_gradients<float> to{.weights = dw};
    if (of_slots) to.slots = dslots.view();
    if (of_x) to.x = dx.view();
    combine_backward(dw.empty() ? matrix_view<const float>{} : out.view(), s.plan, w, dy.view(), to,
                     serial{}, how, &s.choices);
    int wrong = 0;
    for (index_t t = 0; t < tokens; ++t) {
      double rest = 1.0, pulled = 0.0, own = 0.0;
      bool none = true;
      const auto dot = [&](const spread_rows<float>& of, index_t r) {
        double sum = 0.0;
        for (index_t j = 0; j < d; ++j) sum += of(r, j) * dy(t, j);
        return sum;
      };
      if (how.lost == lost_token::mix) own = dot(x, t);
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        const auto at = static_cast<std::size_t>(c);
        const index_t slot = s.plan.slot_of_choice()[at];
        const expert_id e = a.ids()[at];
        double expected = 0.0;
        if (slot >= 0) {
          const double weight = ones ? 1.0 : static_cast<double>(w[at]);
          for (index_t j = 0; of_slots && j < d; ++j)
            wrong += !close(dslots(slot, j), weight * dy(t, j));
          if (!ones) expected = dot(out, slot) - own;
          rest -= weight;
          none = false;
        } else if (e >= how.identity_first && e < how.identity_end && a.kept(c)) {
          const double weight = given ? static_cast<double>(w[at]) : 1.0;
          pulled += weight;
          expected = dot(x, t) - own;
          rest -= weight;
          none = false;
        }
        if (!dw.empty()) wrong += !close(static_cast<double>(dw[at]), expected, 1e-4);
      }
      if (how.lost == lost_token::mix || (none && how.lost == lost_token::residual)) pulled += rest;
      for (index_t j = 0; of_x && j < d; ++j)
        wrong += !close(dx(t, j), before(t, j) + pulled * dy(t, j), 1e-4);
    }
    INFO("round " << round);
    CHECK(wrong == 0);
  }
}

TEST_CASE("gradients of moved rows have the same bits for every executor, and allocate nothing") {
  test::random rng(22);
  const scene s(test::fixed_choices(rng, 700, 16, 4, 6));
  const index_t d = 256;
  const spread_rows<float> out(s.plan.slots(), d, 1, 0), dy(700, d, 2, 0);
  const auto all = [&](const auto& exec) {
    spread_rows<float> dslots(s.plan.slots(), d, 3, 0), dx(700, d, 4, 0);
    std::vector<float> dw(s.choices.weights().size()), dscale(dw.size());
    const long made = test::allocations_during([&] {
      combine_backward(out.view(), s.plan, s.choices, dy.view(),
                       combine_gradients<float>{dslots.view(), dw}, exec);
      dispatch_backward(out.view(), s.plan, gradient_to::write, dx.view(), exec,
                        {.scale = s.choices.weights(), .x = dy.view(), .dscale = dscale});
    });
    if constexpr (std::is_same_v<std::decay_t<decltype(exec)>, serial>) CHECK(made == 0);
    std::vector<float> bits = dslots.value;
    for (const auto* list : {&dx.value, &dw, &dscale})
      bits.insert(bits.end(), list->begin(), list->end());
    return bits;
  };
  const std::vector<float> alone = all(serial{});
  CHECK(test::bit_difference(all(test::backwards{}), alone) == "");
  CHECK(test::bit_difference(all(test::several_threads{}), alone) == "");
}

TEST_CASE("16-bit gradients of experts' rows are rounded once, large ones are streamed") {
  test::random rng(23);
  const scene s(test::fixed_choices(rng, 600, 8, 4)), few(test::fixed_choices(rng, 120, 8, 4));
  const index_t d = 5120, n = few.plan.slots();  // 9.6 MB of float, rows of more than one piece
  buffer<float> wide(n * d);
  buffer<bfloat16> narrow(n * d);
  const spread_rows<float> dy(120, d, 2, 0);
  combine_backward(matrix_view<const float>{}, few.plan, few.choices, dy.view(),
                   combine_gradients<float>{{wide.data(), n, d}});
  combine_backward(matrix_view<const float>{}, few.plan, few.choices, dy.view(),
                   combine_gradients<bfloat16>{{narrow.data(), n, d}});
  bool same = true;
  for (index_t i = 0; i < wide.size(); ++i)
    same =
        same && static_cast<float>(static_cast<bfloat16>(wide[i])) == static_cast<float>(narrow[i]);
  CHECK(same);
  spread_rows<float> wide_dx(120, d, 7, 0);
  spread_rows<bfloat16> narrow_dx(120, d, 8, 0), expected_dx = narrow_dx;
  const matrix_view<const float> pulled(wide.data(), n, d);
  dispatch_backward(pulled, few.plan, gradient_to::write, wide_dx.view());
  dispatch_backward(pulled, few.plan, gradient_to::write, narrow_dx.view());
  for (std::size_t i = 0; i < wide_dx.value.size(); ++i)
    expected_dx.value[i] = static_cast<bfloat16>(wide_dx.value[i]);
  CHECK(test::bit_difference(narrow_dx.value, expected_dx.value) == "");
  // With the gradient of the weights, of rows that are narrow themselves, a NaN among them: the
  // bits of float rows, whatever is rounded together.
  for (const index_t width : {index_t{1024}, index_t{77}, index_t{48}}) {
    const spread_rows<bfloat16> slots(s.plan.slots(), width, 5, 0);
    spread_rows<bfloat16> down(600, width, 6, 0);
    down.value[7] = static_cast<bfloat16>(std::numeric_limits<float>::quiet_NaN());
    down.value[static_cast<std::size_t>(width + 3)] = static_cast<bfloat16>(1e-39f);
    const std::vector<float> wide_slots(slots.value.begin(), slots.value.end()),
        wide_down(down.value.begin(), down.value.end());
    std::vector<float> dw(s.choices.weights().size()), wide_dw(dw.size());
    combine_backward(slots.view(), s.plan, s.choices, down.view(),
                     combine_gradients<bfloat16>{{narrow.data(), s.plan.slots(), width}, dw});
    combine_backward(matrix_view<const float>(wide_slots.data(), s.plan.slots(), width), s.plan,
                     s.choices, matrix_view<const float>(wide_down.data(), 600, width),
                     combine_gradients<float>{{wide.data(), s.plan.slots(), width}, wide_dw});
    CHECK(test::bit_difference(dw, wide_dw) == "");
    index_t wrong = 0;
    for (index_t i = 0; i < s.plan.slots() * width; ++i)
      wrong += std::bit_cast<std::uint16_t>(static_cast<bfloat16>(wide[i])) !=
               std::bit_cast<std::uint16_t>(narrow[i]);
    CHECK(wrong == 0);
  }
}

TEST_CASE("capacity divides weights as apply_capacity did, and its gradient is the derivative") {
  for (const auto when :
       {renormalization::none, renormalization::before_drop, renormalization::after_drop})
    for (const float eps : {0.0f, 1.2f}) {
      INFO(static_cast<int>(when) << ", eps = " << eps);
      test::random rng(31);
      assignment a = test::fixed_choices(rng, 25, 6, 3, 6);
      const std::vector<double> router(a.weights().begin(), a.weights().end());
      const capacity_policy policy{.rule = {.formula = capacity_formula::fixed, .count = 8},
                                   .renormalize = when,
                                   .eps = eps};
      workspace ws;
      REQUIRE(apply_capacity(a, policy, ws).dropped > 0);
      std::vector<double> w = router, up(w.size());
      renormalize(policy, a, std::span(w));
      CHECK(test::difference(w, a.weights(), 1e-6, 1e-9) == "");
      for (double& u : up) u = static_cast<double>(rng.normal());
      const auto value = [&](std::vector<double> x) {
        renormalize(policy, a, std::span(x));
        double sum = 0.0;
        for (std::size_t c = 0; c < x.size(); ++c) sum += up[c] * x[c];
        return sum;
      };
      std::vector<double> dw = up;
      renormalize_backward(policy, a, router, std::span(dw));
      std::vector<double> slope = oracle::derivative(router, value);
      // Where nothing with a weight is left a quotient jumps: there is no gradient.
      for (index_t t = 0; when != renormalization::none && eps == 0.0f && t < a.tokens(); ++t) {
        double sum = 0.0;
        for (index_t c = a.first(t); c < a.first(t + 1); ++c)
          if (when == renormalization::before_drop || a.kept(c))
            sum += router[static_cast<std::size_t>(c)];
        if (sum == 0.0) std::fill_n(slope.begin() + a.first(t), a.count(t), 0.0);
      }
      CHECK(test::difference(dw, slope, 1e-7, 2e-9) == "");
    }
}

TEST_CASE("backward stages refuse what does not fit by name") {
  test::random rng(41);
  const scene s(test::fixed_choices(rng, 6, 4, 2));
  spread_rows<float> out(12, 8, 1), dy(6, 8, 2), dslots(12, 8, 3), dx(6, 8, 4);
  std::vector<float> dw(12), few(11);
  const auto combined = [&](matrix_view<float> o, matrix_view<float> y, matrix_view<float> into,
                            std::span<float> weights, const combine_options<>& how = {}) {
    return test::refusal([&] {
      combine_backward(o, s.plan, s.choices, y, combine_gradients<float>{into, weights}, serial{},
                       how);
    });
  };
  CHECK(combined(out.view(), dy.view().middle_rows(0, 5), dslots.view(), dw) ==
        "moeroute::combine_backward: dy.rows() is 5, expected 6");
  CHECK(combined(out.view(), dy.view(), dslots.view().middle_rows(0, 11), dw) ==
        "moeroute::combine_backward: gradients.slots.rows() is 11, expected 12");
  CHECK(combined(out.view(), dy.view(), dslots.view(), few) ==
        "moeroute::combine_backward: gradients.weights.size() is 11, expected 12");
  CHECK(combined({}, dy.view(), dslots.view(), dw) ==
        "moeroute::combine_backward: slots.rows() is 0, expected 12");
  CHECK(combined(out.view(), dy.view(), out.view(), dw) ==
        "moeroute::combine_backward: slots and gradients.slots overlap, expected memory of their "
        "own");
  CHECK(combined({}, dy.view(), dslots.view(), dw, {.weight = combine_weight::one}) == "accepted");
  CHECK(dw == std::vector<float>(12, 0.0f));
  CHECK(combined({}, dy.view(), dslots.view(), {}) == "accepted");
  CHECK(test::refusal([&] {
          dispatch_backward(dslots.view(), s.plan, gradient_to::write, dx.view().middle_rows(0, 4));
        }) == "moeroute::dispatch_backward: dx.rows() is 4, expected 6");
  CHECK(test::refusal([&] {
          dispatch_backward(dslots.view(), s.plan, gradient_to::write, dx.view(), serial{},
                            {.dscale = dw});
        }) == "moeroute::dispatch_backward: x.rows() is 0, expected 6");
  spread_rows<bfloat16> narrow(6, 8, 5);
  CHECK(test::refusal(
            [&] { dispatch_backward(dslots.view(), s.plan, gradient_to::add, narrow.view()); }) ==
        "moeroute::dispatch_backward: dx is kept in 16 bits and added to, which rounds every time: "
        "expected float");
}

TEST_CASE("backward stages refuse every size and every shared piece of memory by its own name") {
  test::random rng(44);
  const scene s(test::fixed_choices(rng, 6, 4, 2)), other(test::fixed_choices(rng, 6, 4, 3));
  spread_rows<float> out(12, 8, 1), dy(6, 8, 2), dslots(12, 8, 3), x(6, 8, 4), shared(6, 8, 5),
      narrow(6, 7, 6), dshared(6, 8, 7), dx(6, 8, 8);
  std::vector<float> dw(12), few(11), gate(6);
  const auto combined = [&](combine_gradients<float> to, combine_options<> how = {}) {
    return [&, to, how] {
      combine_backward(out.view(), s.plan, s.choices, dy.view(), to, serial{}, how);
    };
  };
  const auto by_weights = [&](std::span<const float> w, combine_options<> how,
                              const assignment* choices = nullptr) {
    return [&, w, how, choices] {
      combine_backward(out.view(), s.plan, w, dy.view(), combine_gradients<float>{.weights = dw},
                       serial{}, how, choices);
    };
  };
  const auto dispatched = [&](matrix_view<float> from, matrix_view<float> to,
                              dispatch_scale<> how = {}) {
    return [&, from, to, how] {
      dispatch_backward(from, s.plan, gradient_to::write, to, serial{}, how);
    };
  };
  const auto cut = [](spread_rows<float>& v, index_t cols) {
    return matrix_view<float>{v.value.data(), v.n, cols, v.stride};
  };
  const combine_options<> identity{.identity_first = 1, .identity_end = 2, .x = x.view()};
  const std::string own = " overlap, expected memory of their own";
  const test::refusals refused{
      {combined({.shared = {dy.value.data() + 1, 6, 8, dy.stride}}),
       "combine_backward: dy and gradients.shared" + own},
      {combined({.slots = cut(dslots, 7)}),
       "combine_backward: gradients.slots.cols() is 7, expected 8"},
      {combined({.slots = {dy.value.data(), 12, 8, 8}}),
       "combine_backward: dy and gradients.slots" + own},
      {[&] {
         combine_backward(cut(out, 7), s.plan, s.choices, dy.view(),
                          combine_gradients<float>{.weights = dw});
       },
       "combine_backward: slots.cols() is 7, expected 8"},
      {by_weights(few, {}), "combine_backward: weights.size() is 11, expected 12"},
      {by_weights(dw, identity),
       "combine_backward: choices are missing: identity experts are told by their ids"},
      {by_weights(dw, identity, &other.choices),
       "combine_backward: choices.choices() is 18, expected 12"},
      {[&] {
         combine_backward(out.view(), s.plan, other.choices, dy.view(),
                          combine_gradients<float>{.weights = dw});
       },
       "combine_backward: choices.choices() is 18, expected 12"},
      {combined({.weights = dw}, {.identity_first = 1, .identity_end = 2}),
       "combine_backward: x.rows() is 0, expected 6"},
      {combined({.weights = dw}, {.identity_first = 1, .identity_end = 2, .x = narrow.view()}),
       "combine_backward: x.cols() is 7, expected 8"},
      {combined({.weights = dw}, {.lost = lost_token::mix}),
       "combine_backward: x.rows() is 0, expected 6"},
      {combined({.weights = dw}, {.lost = lost_token::mix, .x = narrow.view()}),
       "combine_backward: x.cols() is 7, expected 8"},
      {combined({.weights = dw}, {.lost = lost_token::mix, .x = {x.value.data(), 6, 8, 7}}),
       "combine_backward: x.stride is 7, expected at least 8"},
      {combined({.x = dx.view().middle_rows(0, 5)}),
       "combine_backward: gradients.x.rows() is 5, expected 6"},
      {combined({.x = narrow.view()}), "combine_backward: gradients.x.cols() is 7, expected 8"},
      {combined({.x = dy.view()}), "combine_backward: dy and gradients.x" + own},
      {combined({.shared = dshared.view().middle_rows(0, 5)}),
       "combine_backward: gradients.shared.rows() is 5, expected 6"},
      {combined({.shared = narrow.view()}),
       "combine_backward: gradients.shared.cols() is 7, expected 8"},
      {combined({.shared_weight = std::span<float>(gate).first(5)}, {.shared = shared.view()}),
       "combine_backward: gradients.shared_weight.size() is 5, expected 6"},
      {combined({.shared_weight = gate}), "combine_backward: shared.rows() is 0, expected 6"},
      {combined({.shared_weight = gate}, {.shared = narrow.view()}),
       "combine_backward: shared.cols() is 7, expected 8"},
      {combined({}, {.shared_weight = std::span<const float>(gate).first(5)}),
       "combine_backward: shared_weight.size() is 5, expected 6"},
      {dispatched(dslots.view().middle_rows(0, 11), dx.view()),
       "dispatch_backward: dslots.rows() is 11, expected 12"},
      {dispatched(dslots.view(), narrow.view()), "dispatch_backward: dx.cols() is 7, expected 8"},
      {dispatched(dslots.view(), {dslots.value.data(), 6, 8, 8}),
       "dispatch_backward: dslots and dx" + own},
      {dispatched(dslots.view(), dx.view(), {.scale = few}),
       "dispatch_backward: scale.size() is 11, expected 12"},
      {dispatched(dslots.view(), dx.view(), {.x = x.view(), .dscale = few}),
       "dispatch_backward: dscale.size() is 11, expected 12"},
      {dispatched(dslots.view(), dx.view(), {.x = narrow.view(), .dscale = dw}),
       "dispatch_backward: x.cols() is 7, expected 8"},
      {dispatched(dslots.view(), dx.view(), {.x = dx.view(), .dscale = dw}),
       "dispatch_backward: x and dx" + own},
      {[&] {
         std::vector<float> w(12);
         renormalize_backward<float>({}, s.choices, w, std::span(w));
       },
       "renormalize_backward: weights and dweights" + own},
      {[&] { renormalize_backward<float>({}, s.choices, few, std::span(dw)); },
       "renormalize_backward: weights.size() is 11, expected 12"},
      {[&] { renormalize_backward<float>({}, s.choices, dw, std::span(few)); },
       "renormalize_backward: dweights.size() is 11, expected 12"},
      {[&] { renormalize<float>({}, s.choices, std::span(few)); },
       "renormalize: weights.size() is 11, expected 12"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(test::refusal(combined({.shared = dy.view()})) == "accepted");
  // What nobody asks for is not looked at.
  CHECK(test::refusal(combined({.slots = dslots.view()}, {.lost = lost_token::mix})) == "accepted");
  CHECK(test::refusal(combined({}, {.shared = narrow.view()})) == "accepted");
}

TEST_CASE("in double too identity experts and shared rows have the gradients of plain loops") {
  test::random rng(51);
  const scene s(test::fixed_choices(rng, 9, 5, 2, 4),
                {.owned = std::vector<std::uint8_t>{1, 1, 1, 0, 1}});
  const index_t d = 19;
  const spread_rows<double> out(s.plan.slots(), d, 1), dy(9, d, 2);
  const spread_rows<float> x(9, d, 3), shared(9, d, 4);
  const std::vector<double> w = weights_of<double>(s.choices);
  for (const combine_weight weight : {combine_weight::of_choice, combine_weight::one}) {
    INFO(static_cast<int>(weight));
    const combine_options<> how{.weight = weight,
                                .identity_first = 3,
                                .identity_end = 4,
                                .x = x.view(),
                                .shared = shared.view()};
    spread_rows<double> dx(9, d, 5);
    std::fill(dx.value.begin(), dx.value.end(), 0.0);
    std::vector<double> dw(w.size(), 7.0), dgate(9, 7.0), slow(w.size()), slow_gate(9);
    spread_rows<double> slow_x = dx;
    combine_backward<matrix_view<const double>, matrix_view<const double>, double, double>(
        out.view(), s.plan, w, dy.view(),
        combine_gradients<double>{.weights = dw, .x = dx.view(), .shared_weight = dgate}, serial{},
        how, &s.choices);
    int identities = 0;
    for (index_t t = 0; t < 9; ++t) {
      for (index_t j = 0; j < d; ++j)
        slow_gate[static_cast<std::size_t>(t)] += shared(t, j) * dy(t, j);
      for (index_t c = 2 * t; c < 2 * t + 2; ++c) {
        const auto at = static_cast<std::size_t>(c);
        const index_t slot = s.plan.slot_of_choice()[at];
        const bool identity = s.choices.ids()[at] == 3;
        identities += identity;
        for (index_t j = 0; j < d; ++j) {
          if (slot >= 0 && weight == combine_weight::of_choice) slow[at] += out(slot, j) * dy(t, j);
          if (!identity) continue;
          slow[at] += x(t, j) * dy(t, j);
          slow_x.view()(t, j) += w[at] * dy(t, j);
        }
      }
    }
    CHECK(identities > 0);
    CHECK(test::difference(dw, slow, 1e-14, 1e-14) == "");
    CHECK(test::difference(dgate, slow_gate, 1e-14, 1e-14) == "");
    CHECK(test::difference(dx.value, slow_x.value, 1e-14, 1e-14) == "");
  }
}

TEST_CASE("rows that run into one another are refused on the way back by name") {
  test::random rng(42);
  const scene s(test::fixed_choices(rng, 6, 4, 2));
  std::vector<float> memory(12 * 8), dw(12), gate(6);
  std::vector<std::vector<float>> own(8, memory);
  const auto rows = [&](std::size_t i, index_t n, bool good = true) {
    matrix_view<float> v(own[i].data(), n, 8);
    if (!good) v.stride = 7;
    return v;
  };
  // Which of the views is wrong; 7: none.
  const auto combined = [&](std::size_t wrong) {
    const auto at = [&](std::size_t i, index_t n) { return rows(i, n, i != wrong); };
    const combine_options<> how{
        .identity_first = 1, .identity_end = 2, .x = at(2, 6), .shared = at(3, 6)};
    return test::refusal([&] {
      combine_backward(at(0, 12), s.plan, s.choices, at(1, 6),
                       combine_gradients<float>{at(4, 12), dw, at(5, 6), at(6, 6), gate}, serial{},
                       how);
    });
  };
  const char* const names[] = {
      "slots", "dy", "x", "shared", "gradients.slots", "gradients.x", "gradients.shared"};
  for (std::size_t wrong = 0; wrong < 7; ++wrong)
    CHECK(combined(wrong) == "moeroute::combine_backward: " + std::string(names[wrong]) +
                                 ".stride is 7, expected at least 8");
  CHECK(combined(7) == "accepted");
  const auto dispatched = [&](std::size_t wrong) {
    return test::refusal([&] {
      dispatch_backward(rows(0, 12, wrong != 0), s.plan, gradient_to::write, rows(1, 6, wrong != 1),
                        serial{}, {.x = rows(2, 6, wrong != 2), .dscale = dw});
    });
  };
  const char* const of_dispatch[] = {"dslots", "dx", "x"};
  for (std::size_t wrong = 0; wrong < 3; ++wrong)
    CHECK(dispatched(wrong) == "moeroute::dispatch_backward: " + std::string(of_dispatch[wrong]) +
                                   ".stride is 7, expected at least 8");
  CHECK(dispatched(3) == "accepted");
  CHECK(test::refusal([&] {
          combine_backward(rows(0, 12), s.plan, s.choices, rows(1, 6),
                           combine_gradients<float>{rows(4, 12)}, serial{},
                           combine_options<>{.identity_first = -1, .identity_end = 2});
        }) == "moeroute::combine_backward: identity_first is -1, expected 0 to 1048576");
  CHECK(test::refusal([&] {
          combine_backward(
              rows(0, 12), s.plan, s.choices, rows(1, 6), combine_gradients<float>{rows(4, 12)},
              serial{}, combine_options<>{.weight = combine_weight::one, .lost = lost_token::mix});
        }) == "moeroute::combine_backward: lost_token::mix needs the weights of the choices");
  const std::vector<float> few(11);
  CHECK(test::refusal([&] {
          combine_backward(rows(0, 12), s.plan, few, rows(1, 6), combine_gradients<float>{},
                           serial{},
                           combine_options<>{.weight = combine_weight::one,
                                             .identity_first = 1,
                                             .identity_end = 2,
                                             .x = rows(2, 6)},
                           &s.choices);
        }) == "moeroute::combine_backward: weights.size() is 11, expected 12");
}

TEST_CASE("offsets of choices that do not ascend are refused before they index anything") {
  test::random rng(43);
  assignment a = test::ragged_choices(rng, 6, 4, 3);
  const auto total = static_cast<std::size_t>(a.choices());
  a.to_fill().offsets[3] = 1 << 20;
  spread_rows<float> rows(static_cast<index_t>(total), 8, 1), y(6, 8, 2);
  std::vector<float> w(total), dw(total);
  const auto said = [&a](auto&& call, const std::string& where) {
    return test::refusal(call) == "moeroute::" + where + ": token 2 has the choices from " +
                                      std::to_string(a.offsets()[2]) +
                                      " to 1048576, expected 0 to k = 3 of them, from 0 on";
  };
  CHECK(said([&] { combine(rows.view(), a, y.view()); }, "combine"));
  CHECK(said([&] { renormalize({}, a, std::span(w)); }, "renormalize"));
  CHECK(said([&] { renormalize_backward({}, a, w, std::span(dw)); }, "renormalize_backward"));
}
