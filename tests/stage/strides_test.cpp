// Every stage that takes rows, with rows that do not lie side by side.
#include <moeroute/stage/combine.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/rectify.hpp>
#include <moeroute/stage/soft.hpp>
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/strided.hpp"

using namespace moeroute;

namespace {

// Choices with drops, missing experts and padded slots, and hidden states of d columns.
struct moved {
  assignment choices;
  dispatch_plan plan;
  std::vector<float> gates;
  index_t tokens, d;

  moved(index_t t, index_t columns) : tokens(t), d(columns) {
    test::random rng(static_cast<std::uint64_t>(t * columns));
    choices = test::fixed_choices(rng, tokens, 6, 3, 5);
    test::drop_some(rng, choices, 4);
    moeroute::plan(choices, plan, {.block = 4, .padding = slot_padding::spare_tokens});
    gates = test::numbers(rng, tokens);
  }
};

// Rows of one element, of a cache line and one more, and of more than a kernel takes at once.
template <class Call>
void for_each_batch(Call&& call) {
  for (const index_t tokens : {1, 19})
    for (const index_t d : {1, 16, 37, 130}) call(moved(tokens, d));
}

template <class From, class To>
std::string dispatch_differs(const moved& b, store_path stores, bool scaled) {
  return test::differs_by_stride([&](test::layout& l) {
    test::random rng(1);
    const auto x = l.in(test::numbers<From>(rng, b.tokens * b.d), b.tokens, b.d);
    const auto slots = l.template out<To>(b.plan.slots(), b.d);
    dispatch_options o{.stores = stores};
    if (scaled) o.scale = b.choices.weights();
    dispatch(x, b.plan, slots, o);
  });
}

template <class T, class U>
std::string combine_differs(const moved& b, int bits) {
  return test::differs_by_stride([&](test::layout& l) {
    test::random rng(2);
    const auto slots = l.in(test::numbers<T>(rng, b.plan.slots() * b.d), b.plan.slots(), b.d);
    const auto y = l.in_out(test::numbers<U>(rng, b.tokens * b.d), b.tokens, b.d);
    combine_options<float, bfloat16> o;
    if ((bits & 1) != 0) o.output = combine_output::accumulate;
    if ((bits & 2) != 0) {
      o.lost = lost_token::residual;
      o.identity_end = 6;
      o.x = l.in(test::numbers(rng, b.tokens * b.d), b.tokens, b.d);
    }
    if ((bits & 4) != 0) {
      o.shared = l.in(test::numbers<bfloat16>(rng, b.tokens * b.d), b.tokens, b.d);
      o.shared_weight = b.gates;
    }
    combine(slots, b.plan, b.choices, y, o);
  });
}

}  // namespace

TEST_CASE("dispatch gives the same slots wherever rows lie, and writes nothing between them") {
  for_each_batch([](const moved& b) {
    for (const store_path stores : {store_path::cached, store_path::streamed}) {
      CHECK(dispatch_differs<float, float>(b, stores, false) == "");
      CHECK(dispatch_differs<bfloat16, bfloat16>(b, stores, false) == "");
      CHECK(dispatch_differs<float, bfloat16>(b, stores, false) == "");
      CHECK(dispatch_differs<bfloat16, float>(b, stores, true) == "");
    }
  });
}

TEST_CASE("rows of bytes go to the same slots wherever they lie") {
  for_each_batch([](const moved& b) {
    for (const store_path stores : {store_path::cached, store_path::streamed})
      CHECK(test::differs_by_stride([&](test::layout& l) {
              std::vector<std::byte> bytes;
              for (index_t i = 0; i < b.tokens * b.d; ++i)
                bytes.push_back(static_cast<std::byte>(i * 7 % 251));
              const auto x = l.in(bytes, b.tokens, b.d);
              dispatch_bytes(x, b.plan, l.out<std::byte>(b.plan.slots(), b.d), serial{}, stores);
            }) == "");
  });
}

TEST_CASE("combine gives the same sums wherever slots, outputs, hidden and shared rows lie") {
  for_each_batch([](const moved& b) {
    for (int bits = 0; bits < 8; ++bits) {
      CHECK(combine_differs<float, float>(b, bits) == "");
      CHECK(combine_differs<bfloat16, bfloat16>(b, bits) == "");
    }
  });
}

TEST_CASE("experts see their own rows wherever slots lie, split or whole") {
  for_each_batch([](const moved& b) {
    for (const index_t rows_per_call : {0, 3})
      CHECK(test::differs_by_stride([&](test::layout& l) {
              test::random rng(3);
              const index_t slots = b.plan.slots();
              const auto in = l.in(test::numbers(rng, slots * b.d), slots, b.d);
              const auto out = l.out<float>(slots, b.d + 2);
              for_each_expert(b.plan, in, out,
                              [](expert_id e, matrix_view<const float> x, matrix_view<float> y) {
                                for (index_t r = 0; r < x.rows; ++r)
                                  for (index_t c = 0; c < y.cols; ++c)
                                    y(r, c) = x(r, c % x.cols) + static_cast<float>(e);
                              },
                              serial{}, {.rows_per_call = rows_per_call});
            }) == "");
  });
}

TEST_CASE("gates give the same logits wherever hidden states and logits lie") {
  for_each_batch([](const moved& b) {
    CHECK(test::differs_by_stride([&](test::layout& l) {
            test::random rng(4);
            const auto w = l.in(test::numbers(rng, 5 * b.d), 5, b.d);
            const auto unit = l.in_out(test::numbers(rng, 5 * b.d), 5, b.d);
            const auto x = l.in(test::numbers(rng, b.tokens * b.d), b.tokens, b.d);
            const auto narrow = l.in(test::numbers<bfloat16>(rng, b.tokens * b.d), b.tokens, b.d);
            const simd::packed_matrix<> packed(w);
            gate(x, packed, l.out<float>(b.tokens, 5));
            gate(narrow, packed, l.out<float>(b.tokens, 5));
            unit_rows(unit);
            cosine_gate(x, simd::packed_matrix<>(matrix_view<const float>(unit)), 2.0f,
                        l.out<float>(b.tokens, 5));
            const simd::packed_matrix<> one(w.middle_rows(3, 1));
            std::vector<float> weights(static_cast<std::size_t>(b.tokens));
            shared_gate(x, one, 0.5f, weights);
            l.result(std::span(weights));
          }) == "");
  });
}

TEST_CASE("soft mixtures give the same slots and outputs wherever rows lie") {
  // More rows than one piece has.
  for (const moved& b : {moved(1, 16), moved(60, 37)}) {
    CHECK(test::differs_by_stride([&](test::layout& l) {
            test::random rng(5);
            const auto logits = l.in(test::numbers(rng, b.tokens * 56), b.tokens, 56);
            const auto x = l.in(test::numbers(rng, b.tokens * b.d), b.tokens, b.d);
            soft_plan p;
            plan_soft(logits, 2, p);
            dispatch(x, p, l.out<float>(56, b.d));
            const auto slots = l.in(test::numbers(rng, 56 * b.d), 56, b.d);
            combine(slots, p, l.out<float>(b.tokens, b.d));
          }) == "");
  }
}

TEST_CASE("rectification reads scores wherever rows lie") {
  for_each_batch([](const moved& b) {
    CHECK(test::differs_by_stride([&](test::layout& l) {
            test::random rng(6);
            const auto scores = l.in(test::numbers(rng, b.tokens * 6), b.tokens, 6);
            const std::vector<std::int32_t> rank(static_cast<std::size_t>(b.tokens), 1);
            assignment within = b.choices, filled;
            workspace ws;
            l.result(static_cast<double>(rectify_within_rank(within, scores, rank, 3)));
            l.result(static_cast<double>(rectify_by_filling(b.choices, scores, 4, 2, ws, filled)));
            l.result(within.ids());
            l.result(within.weights());
            l.result(filled.ids());
            l.result(filled.weights());
          }) == "");
  });
}
