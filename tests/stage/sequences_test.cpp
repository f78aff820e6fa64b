#include <moeroute/stage/sequences.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/stage/route.hpp>
#include <vector>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using floats = std::vector<float>;

namespace {

const std::vector<std::int32_t> cuts{0, 5, 5, 6, 30, 41};

floats sequence_floats(index_t n, std::uint64_t seed) {
  test::random rng(seed << 32);  // streams of neighbouring seeds overlap
  floats x(static_cast<std::size_t>(n));
  for (float& v : x) v = rng.normal();
  return x;
}

}  // namespace

TEST_CASE("a sequence's pooled row is the mean of its rows, or of its last") {
  constexpr index_t width = 19, stride = 23;
  const floats x = sequence_floats(41 * stride, 1);
  const matrix_view<const float> rows(x.data(), 41, width, stride);
  std::vector<bfloat16> narrow;
  for (const float v : x) narrow.push_back(static_cast<bfloat16>(v));
  for (const index_t last : {0, 1, 3, 100}) {
    floats pooled(5 * width, 7.0f), other(5 * width), of_narrow(5 * width);
    const auto pool = [&](const auto& from, floats& to, const auto& exec) {
      pool_rows(from, cuts, matrix_view<float>(to.data(), 5, width), {.last = last}, exec);
    };
    pool(rows, pooled, serial{});
    pool(rows, other, test::several_threads{3});
    pool(matrix_view<const bfloat16>(narrow.data(), 41, width, stride), of_narrow, serial{});
    CHECK(test::bit_difference(other, pooled) == "");
    const auto expected = [&](const auto& from) {
      std::vector<double> mean;
      for (std::size_t s = 0; s < 5; ++s)
        for (index_t c = 0; c < width; ++c) {
          index_t first = cuts[s];
          const index_t end = cuts[s + 1];
          if (last > 0) first = std::max(first, end - last);
          double sum = 0.0;
          for (index_t t = first; t < end; ++t)
            sum += static_cast<double>(from[static_cast<std::size_t>(t * stride + c)]);
          mean.push_back(end > first ? sum / static_cast<double>(end - first) : 0.0);
        }
      return mean;
    };
    CHECK(test::difference(pooled, expected(x), 1e-5, 1e-6) == "");
    CHECK(test::difference(of_narrow, expected(narrow), 1e-5, 1e-6) == "");
  }
}

TEST_CASE("windows cut every sequence, the last of one the shorter") {
  std::vector<std::int32_t> windows(20, -1);
  CHECK(window_offsets(cuts, 10, windows) == 7);
  windows.resize(8);
  CHECK(windows == std::vector<std::int32_t>{0, 5, 6, 16, 26, 30, 40, 41});
  CHECK(window_offsets(cuts, 10, windows) == 7);
  windows.resize(7);
  CHECK(test::refusal([&] { window_offsets(cuts, 10, windows); }) ==
        "moeroute::window_offsets: windows.size() is 7, expected 8 to 1099511627776");
  CHECK(test::refusal([&] { window_offsets(cuts, 0, windows); }) ==
        "moeroute::window_offsets: window is 0, expected 1 to 1073741824");
}

TEST_CASE("tokens have the choices of their sequence, in a prompt and decoded one by one") {
  constexpr index_t experts = 6;
  const floats z = sequence_floats(5 * experts, 2);
  const matrix_view<const float> logits(z.data(), 5, experts);
  workspace ws;
  const auto check = [&](const auto& router, bool drop) {
    assignment decisions, tokens;
    route(router, logits, ws, decisions);
    if (drop && decisions.choices() > 2) decisions.kept_to_fill()[2] = 0;
    std::vector<std::int32_t> of_token(41);
    sequences_of_tokens(cuts, of_token);
    for (const auto& sequences :
         {of_token, std::vector<std::int32_t>{4, 0, 3}, std::vector<std::int32_t>{}}) {
      spread_to_tokens(decisions, sequences, tokens);
      CHECK(tokens.tokens() == static_cast<index_t>(sequences.size()));
      CHECK(tokens.ragged() == decisions.ragged());
      for (std::size_t t = 0; t < sequences.size(); ++t) {
        const auto token = static_cast<index_t>(t);
        CHECK(test::bit_difference(tokens.ids(token), decisions.ids(sequences[t])) == "");
        CHECK(test::bit_difference(tokens.weights(token), decisions.weights(sequences[t])) == "");
        for (index_t c = 0; c < tokens.count(token); ++c)
          CHECK(tokens.kept(tokens.first(token) + c) ==
                decisions.kept(decisions.first(sequences[t]) + c));
      }
    }
    CHECK(test::refusal([&] {
            spread_to_tokens(decisions, std::vector<std::int32_t>{5}, tokens);
          }) == "moeroute::spread_to_tokens: sequence_of_token is 5, expected 0 to 4");
    CHECK(test::refusal([&] { spread_to_tokens(decisions, of_token, decisions); }) ==
          "moeroute::spread_to_tokens: out is decisions, expected an assignment of its own");
  };
  std::vector<std::int32_t> of_token(41, -7);
  sequences_of_tokens(cuts, of_token);
  for (std::size_t s = 0; s < 5; ++s)
    for (auto at = static_cast<std::size_t>(cuts[s]); at < static_cast<std::size_t>(cuts[s + 1]);
         ++at)
      CHECK(of_token[at] == static_cast<std::int32_t>(s));
  for (const bool drop : {false, true}) {
    check(router<softmax>{.selection = {.k = 2}}, drop);
    check(threshold_router<sigmoid>{.threshold = 0.5f}, drop);
  }
}

TEST_CASE("a block runs on a sequence as often as decided, and skipped ones keep their bits") {
  assignment decisions;
  decisions.reset(5, 3, 1);
  const expert_id chosen[] = {1, 2, 0, 2, no_expert};
  std::copy(std::begin(chosen), std::end(chosen), decisions.ids().begin());
  const std::vector<std::int32_t> times{0, 1, 2};
  floats y = sequence_floats(41 * 3, 3), before = y;
  const matrix_view<float> rows(y.data(), 41, 3);
  const auto block = [](index_t, matrix_view<float> part) {
    for (index_t t = 0; t < part.rows; ++t)
      for (index_t c = 0; c < part.cols; ++c) part(t, c) = 2.0f * part(t, c) + 1.0f;
  };
  repeat_block(decisions, cuts, times, rows, block);
  for (std::size_t s = 0; s < 5; ++s)
    for (index_t t = cuts[s]; t < cuts[s + 1]; ++t)
      for (index_t c = 0; c < 3; ++c) {
        float expected = before[static_cast<std::size_t>(t * 3 + c)];
        const std::int32_t n =
            chosen[s] == no_expert ? 0 : times[static_cast<std::size_t>(chosen[s])];
        for (int i = 0; i < n; ++i) expected = 2.0f * expected + 1.0f;
        CHECK(rows(t, c) == expected);
      }
  // A decision that was dropped is none.
  decisions.kept_to_change()[0] = 0;
  std::copy(before.begin(), before.end(), y.begin());
  repeat_block(decisions, cuts, times, rows, block);
  for (std::size_t i = 0; i < y.size(); ++i) {
    const auto t = static_cast<index_t>(i) / 3;
    const bool runs = t >= cuts[3] && t < cuts[4];
    CHECK((y[i] != before[i]) == runs);
  }
  CHECK(test::refusal([&] {
          repeat_block(decisions, cuts, std::vector<std::int32_t>{1}, rows, block);
        }) == "moeroute::repeat_block: times.size() is 1, expected 3");
  decisions.ids()[1] = 3;
  CHECK(test::refusal([&] { repeat_block(decisions, cuts, times, rows, block); }) ==
        "moeroute::repeat_block: an id is 3, expected -1 to 2");
}

TEST_CASE("offsets that do not cut the tokens into sequences are refused") {
  const floats x(41);
  floats pooled(5);
  const auto refusal = [&](const std::vector<std::int32_t>& offsets) {
    return test::refusal([&] {
      pool_rows(matrix_view<const float>(x.data(), 41, 1), offsets,
                matrix_view<float>(pooled.data(), 5, 1));
    });
  };
  const auto said = [](const char* which) {
    return std::string("moeroute::pool_rows: sequence ") + which +
           ", expected offsets that ascend from 0 to T";
  };
  CHECK(refusal({}) == "moeroute::pool_rows: offsets are empty, expected one more than sequences");
  CHECK(refusal({0, 5, 5, 6, 30, 40}) == said("0 is [0, 40)"));
  CHECK(refusal({1, 5, 5, 6, 30, 41}) == said("0 is [1, 41)"));
  CHECK(refusal({0, 5, 4, 6, 30, 41}) == said("1 is [5, 4)"));
  CHECK(refusal({0, 41}) == "moeroute::pool_rows: pooled.rows() is 5, expected 1");
}

TEST_CASE("every size of sequences is refused by its own name") {
  floats x(41 * 3), wide(5 * 4);
  std::vector<std::int32_t> windows(3), of_token(40), times(3, 1), wild{0, 5}, below{-1};
  assignment decisions, out;
  decisions.reset(5, 3, 1);
  std::fill(decisions.ids().begin(), decisions.ids().end(), 0);
  const matrix_view<float> rows(x.data(), 41, 3);
  const auto pooled = [&](matrix_view<float> from, matrix_view<float> to, index_t last = 0) {
    return [=] { pool_rows(from, cuts, to, {.last = last}); };
  };
  const auto repeated = [&](const std::vector<std::int32_t>& offsets,
                            const std::vector<std::int32_t>& n, matrix_view<float> y) {
    return [&, y] { repeat_block(decisions, offsets, n, y, [](index_t, matrix_view<float>) {}); };
  };
  const std::vector<std::int32_t> four{0, 5, 5, 41}, negative{1, -1, 1};
  const test::refusals refused{
      {pooled(rows, {wide.data(), 5, 4, 4}), "pool_rows: pooled.cols() is 4, expected 3"},
      {pooled(rows, {wide.data(), 5, 3, 4}, -1),
       "pool_rows: last is -1, expected 0 to 1099511627776"},
      {pooled({x.data(), 41, 3, 2}, {wide.data(), 5, 3, 4}),
       "pool_rows: x.stride is 2, expected at least 3"},
      {pooled(rows, {wide.data(), 5, 3, 2}), "pool_rows: pooled.stride is 2, expected at least 3"},
      {pooled(rows, {x.data(), 5, 3, 3}),
       "pool_rows: x and pooled overlap, expected memory of their own"},
      {[&] { window_offsets(cuts, 0, windows); },
       "window_offsets: window is 0, expected 1 to 1073741824"},
      {[&] { window_offsets({}, 1, windows); },
       "window_offsets: offsets are empty, expected one more than sequences"},
      {[&] { spread_to_tokens(decisions, of_token, decisions); },
       "spread_to_tokens: out is decisions, expected an assignment of its own"},
      {[&] { spread_to_tokens(decisions, wild, out); },
       "spread_to_tokens: sequence_of_token is 5, expected 0 to 4"},
      {[&] { spread_to_tokens(decisions, below, out); },
       "spread_to_tokens: sequence_of_token is -1, expected 0 to 4"},
      {[&] { sequences_of_tokens(cuts, of_token); },
       "sequences_of_tokens: sequence 0 is [0, 41), expected offsets that ascend from 0 to T"},
      {repeated(four, times, rows), "repeat_block: decisions.tokens() is 5, expected 3"},
      {repeated(cuts, negative, rows), "repeat_block: times is -1, expected 0 to 1048576"},
      {repeated(cuts, times, {x.data(), 41, 3, 2}),
       "repeat_block: y.stride is 2, expected at least 3"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  // Room for all windows and their end, and for one less.
  index_t needed = 1;
  for (std::size_t s = 0; s + 1 < cuts.size(); ++s) needed += (cuts[s + 1] - cuts[s] + 6) / 7;
  windows.assign(static_cast<std::size_t>(needed), -1);
  CHECK(window_offsets(cuts, 7, windows) == needed - 1);
  CHECK(windows.back() == 41);
  windows.pop_back();
  CHECK(test::refusal([&] { window_offsets(cuts, 7, windows); }) ==
        "moeroute::window_offsets: windows.size() is " + std::to_string(needed - 1) +
            ", expected " + std::to_string(needed) + " to 1099511627776");
}

TEST_CASE("the numbers of sequences have ends, and ragged decisions of nothing run nothing") {
  floats x(41 * 3), pooled(5 * 3);
  std::vector<std::int32_t> windows(9);
  const auto pool = [&](index_t last) {
    return test::refusal([&] {
      pool_rows(matrix_view<const float>(x.data(), 41, 3), cuts,
                matrix_view<float>(pooled.data(), 5, 3), {.last = last});
    });
  };
  constexpr index_t most_last = index_t{1} << 40, most_window = index_t{1} << 30;
  CHECK(pool(most_last) == "accepted");
  CHECK(pool(most_last + 1) ==
        "moeroute::pool_rows: last is 1099511627777, expected 0 to 1099511627776");
  CHECK(pooling{}.last == 0);
  CHECK(window_offsets(cuts, most_window, windows) == 4);
  CHECK(test::refusal([&] { window_offsets(cuts, most_window + 1, windows); }) ==
        "moeroute::window_offsets: window is 1073741825, expected 1 to 1073741824");
  // Sequences 0 and 4 decide for expert 1, the others for nobody.
  assignment decisions;
  decisions.reset_ragged(5, 3, 2);
  const assignment::parts p = decisions.to_fill();
  const std::vector<std::int32_t> first{0, 2, 2, 2, 2, 3};
  const std::vector<expert_id> ids{1, 2, 1};
  std::copy(first.begin(), first.end(), p.offsets);
  std::copy(ids.begin(), ids.end(), p.ids);
  decisions.close();
  const matrix_view<float> rows(x.data(), 41, 3);
  std::vector<index_t> ran;
  std::vector<std::int32_t> times{7, 2, 7};
  const auto run = [&] {
    ran.clear();
    return test::refusal([&] {
      repeat_block(decisions, cuts, times, rows, [&](index_t s, matrix_view<float> part) {
        ran.push_back(s);
        CHECK(part.data == x.data() + 3 * cuts[static_cast<std::size_t>(s)]);
        CHECK(part.rows ==
              cuts[static_cast<std::size_t>(s) + 1] - cuts[static_cast<std::size_t>(s)]);
      });
    });
  };
  CHECK(run() == "accepted");
  CHECK(ran == std::vector<index_t>{0, 0, 4, 4});
  times = {0, 0, (1 << 20) + 1};
  CHECK(run() == "moeroute::repeat_block: times is 1048577, expected 0 to 1048576");
  times = {0, 0, 1 << 20};
  CHECK(run() == "accepted");
  CHECK(ran.empty());
  decisions.ids()[2] = -2;
  CHECK(run() == "moeroute::repeat_block: an id is -2, expected -1 to 2");
}
