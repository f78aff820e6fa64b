#include <moeroute/stage/dispatch.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <vector>

#include "oracle/layer.hpp"
#include "support/compare.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

using namespace moeroute;

TEST_CASE("every slot holds its token's row, widened or narrowed") {
  for (const index_t tokens : {0, 1, 17, 300}) {
    const test::planned p(tokens, 13, 3);
    const index_t d = 37, slots = p.plan.slots();
    const row_matrix<float> x = test::random_rows(tokens, d);
    const oracle::matrix expected = oracle::dispatch(oracle::matrix(tokens, d, x.data()), p.slow);
    row_matrix<float> same(slots, d);
    dispatch(x, p.plan, same);
    CHECK(test::difference(test::values(same), expected.value, 0.0) == "");
    row_matrix<bfloat16> narrow(slots, d);
    dispatch(x, p.plan, narrow);
    CHECK(test::difference(test::values(narrow), expected.value, 0.004) == "");
    row_matrix<float> wide(slots, d);
    const row_matrix<bfloat16> x16 = x.cast<bfloat16>();
    dispatch(x16, p.plan, wide);
    CHECK(test::difference(test::values(wide), test::values(narrow), 0.0) == "");
  }
}

TEST_CASE("dispatch reads and writes rows by their strides") {
  const test::planned p(20, 5, 2);
  const row_matrix<float> x = test::random_rows(20, 12);
  row_matrix<float> slots = row_matrix<float>::Constant(p.plan.slots(), 9, 7.0f);
  const auto window = x.middleCols(3, 8);
  dispatch(window, p.plan, slots.leftCols(8));
  for (index_t s = 0; s < p.plan.slots(); ++s) {
    CHECK(slots.row(s).head(8) ==
          x.row(p.slow.token_of_slot[static_cast<std::size_t>(s)]).segment(3, 8));
    CHECK(slots(s, 8) == 7.0f);
  }
}

TEST_CASE("rows so long that a thread takes one or two at a time arrive as they are") {
  const test::planned p(5, 4, 2);
  for (const index_t d : {16384, 20000, 32767, 32768, 40000}) {
    INFO("d = " << d);
    const row_matrix<float> x = test::random_rows(5, d);
    row_matrix<float> slots(p.plan.slots(), d);
    dispatch(x, p.plan, slots);
    for (index_t s = 0; s < p.plan.slots(); ++s)
      CHECK(slots.row(s) == x.row(p.slow.token_of_slot[static_cast<std::size_t>(s)]));
  }
}

TEST_CASE("rows without columns are dispatched to nowhere") {
  const test::planned p(5, 4, 2);
  row_matrix<float> x(5, 0), slots(p.plan.slots(), 0);
  CHECK(test::refusal([&] { dispatch(x, p.plan, slots); }) == "accepted");
}

#if defined(_OPENMP)
TEST_CASE("dispatch has the same bits for any number of threads") {
  const test::planned p(400, 16, 4);
  const row_matrix<float> x = test::random_rows(400, 500);
  row_matrix<float> one(p.plan.slots(), 500), many(p.plan.slots(), 500);
  dispatch(x, p.plan, one);
  for (const int threads : {1, 2, 4}) {
    many.setZero();
    dispatch(x, p.plan, many, openmp{threads});
    CHECK(test::bit_difference(test::values(many), test::values(one)) == "");
  }
}
#endif

TEST_CASE("dispatch refuses shapes that do not fit the plan") {
  const test::planned p(5, 4, 2);
  const index_t slots = p.plan.slots();
  const auto refusal = [&](index_t x_rows, index_t rows, index_t cols) {
    const row_matrix<float> x = row_matrix<float>::Zero(x_rows, 6);
    row_matrix<float> out(rows, cols);
    return test::refusal([&] { dispatch(x, p.plan, out); });
  };
  CHECK(refusal(4, slots, 6) == "moeroute::dispatch: x.rows() is 4, expected 5");
  CHECK(refusal(5, slots + 1, 6) == "moeroute::dispatch: slots.rows() is " +
                                        std::to_string(slots + 1) + ", expected " +
                                        std::to_string(slots));
  CHECK(refusal(5, slots, 7) == "moeroute::dispatch: slots.cols() is 7, expected 6");
  CHECK(refusal(5, slots, 6) == "accepted");
}

TEST_CASE("a dispatch of more than six second-level caches writes every slot, cached or streamed") {
  constexpr index_t d = 1024, k = 4;
  const simd::cache_sizes& caches = simd::machine_caches();
  const index_t tokens = 7 * caches.second / (d * k * 4);
  const test::planned planned(tokens, 16, k);
  const dispatch_plan& p = planned.plan;
  REQUIRE(choose_stores(p.slots(), d * 4, caches) ==
          (simd::has_streaming_stores ? store_path::streamed : store_path::cached));
  buffer<float> x(tokens * d), slots(p.slots() * d);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t c = 0; c < d; ++c) x[t * d + c] = static_cast<float>(t * 7 + c);
  std::fill_n(slots.data(), slots.size(), -1.0f);
  dispatch(matrix_view<const float>(x.data(), tokens, d), p,
           matrix_view<float>(slots.data(), p.slots(), d));
  index_t wrong = 0;
  for (index_t s = 0; s < p.slots(); ++s) {
    const float* const from = x.data() + p.token_of_slot()[static_cast<std::size_t>(s)] * d;
    wrong += !std::equal(from, from + d, slots.data() + s * d);
  }
  CHECK(wrong == 0);
}

TEST_CASE("whole lines are streamed from six second-level caches on, everything else is cached") {
  const simd::cache_sizes caches{.second = 1000 * 64};
  const auto streamed = [&](index_t slots, index_t row_bytes) {
    return choose_stores(slots, row_bytes, caches) == store_path::streamed;
  };
  CHECK(streamed(6000, 64) == simd::has_streaming_stores);
  CHECK(streamed(750, 512) == simd::has_streaming_stores);
  CHECK_FALSE(streamed(5999, 64));
  CHECK_FALSE(streamed(749, 512));
  CHECK_FALSE(streamed(1'000'000, 63));
  CHECK_FALSE(streamed(1'000'000, 96));
  CHECK_FALSE(streamed(0, 64));
  CHECK_FALSE(streamed(1'000'000, 0));
  CHECK(simd::machine_caches().second >= 1 << 14);
  CHECK(&simd::machine_caches() == &simd::machine_caches());
}

TEST_CASE("rows are streamed where all of them lie at lines, and where that was asked for") {
  const bool can = simd::has_streaming_stores;
  buffer<float> memory(1024);
  const auto streamed = [&](index_t from, index_t rows, index_t cols, index_t stride,
                            store_path path = store_path::streamed) {
    return detail::streams(matrix_view<float>(memory.data() + from, rows, cols, stride), path);
  };
  CHECK(streamed(0, 4, 16, 16) == can);
  CHECK(streamed(0, 4, 32, 48) == can);
  CHECK(streamed(16, 3, 16, 32) == can);
  CHECK_FALSE(streamed(1, 4, 16, 16));  // begins between two lines
  CHECK_FALSE(streamed(8, 4, 16, 16));
  CHECK_FALSE(streamed(0, 4, 17, 32));  // ends between two lines
  CHECK_FALSE(streamed(0, 16, 8, 16));
  CHECK_FALSE(streamed(0, 4, 16, 17));  // so does the second row
  CHECK_FALSE(streamed(0, 2, 16, 24));
  CHECK(streamed(0, 1, 16, 17) == can);  // there is none
  CHECK(streamed(0, 0, 16, 17) == can);
  CHECK_FALSE(streamed(0, 4, 16, 16, store_path::cached));
  CHECK_FALSE(streamed(0, 4, 16, 16, store_path::automatic));
  // Of what is written alone, not of the rows' distance: it is in memory that nobody touches.
  const index_t second = simd::machine_caches().second, cols = 16;
  const auto chosen = [&](index_t rows, index_t stride) {
    return detail::streams(matrix_view<float>(memory.data(), rows, cols, stride),
                           store_path::automatic);
  };
  const index_t enough = ceil_div(6 * second, cols * 4);
  CHECK(chosen(enough, cols) == can);
  CHECK_FALSE(chosen(enough - 1, cols));
  CHECK_FALSE(chosen(enough - 1, 4 * cols));
  CHECK_FALSE(chosen(enough, cols + 1));
}

TEST_CASE("of streamed slots as many whole rows as fill one second-level cache go through it") {
  const auto cached = [](index_t second, index_t row_bytes) {
    return slots_in_cache(row_bytes, {.second = second});
  };
  CHECK(cached(1 << 20, 4096) == 256);
  CHECK(cached(1 << 20, 4097) == 255);
  CHECK(cached(1 << 20, 1 << 20) == 1);
  CHECK(cached(1 << 20, (1 << 20) + 1) == 0);
  CHECK(cached(64'000, 448) == 142);
  CHECK(cached(64'000, 1) == 64'000);
  CHECK(cached(64'000, 0) == 0);
  CHECK(cached(0, 64) == 0);
}

TEST_CASE("bytes that do not fit the plan, or lie in one another, are refused by name") {
  const test::planned p(5, 4, 2);
  const index_t slots = p.plan.slots();
  std::vector<std::byte> from(200), to(200);
  const auto said = [&](index_t x_rows, index_t rows, index_t cols, index_t x_stride,
                        index_t stride, std::byte* into) {
    matrix_view<const std::byte> x(from.data(), x_rows, 6);
    matrix_view<std::byte> out(into, rows, cols);
    x.stride = x_stride;
    out.stride = stride;
    return test::refusal([&] { dispatch_bytes(x, p.plan, out); });
  };
  const std::string where = "moeroute::dispatch_bytes: ";
  CHECK(said(4, slots, 6, 6, 6, to.data()) == where + "x.rows() is 4, expected 5");
  CHECK(said(5, slots - 1, 6, 6, 6, to.data()) == where + "slots.rows() is " +
                                                      std::to_string(slots - 1) + ", expected " +
                                                      std::to_string(slots));
  CHECK(said(5, slots, 7, 6, 7, to.data()) == where + "slots.cols() is 7, expected 6");
  CHECK(said(5, slots, 6, 5, 6, to.data()) == where + "x.stride is 5, expected at least 6");
  CHECK(said(5, slots, 6, 6, 5, to.data()) == where + "slots.stride is 5, expected at least 6");
  CHECK(said(5, slots, 6, 6, 6, from.data() + 29) ==
        where + "x and slots overlap, expected memory of their own");
  CHECK(said(5, slots, 6, 6, 6, from.data() + 30) == "accepted");
  CHECK((dispatch_options{}.stores == store_path::automatic && dispatch_options{}.scale.empty()));
}
