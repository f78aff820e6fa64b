#include <moeroute/stage/expert.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

using namespace moeroute;

namespace {

/// Writes its expert's number; its scratch belongs to one call at a time.
struct stamping {
  index_t scratch_floats() const { return 4; }
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out,
                  float* memory) const {
    memory[0] = static_cast<float>(e);
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < out.cols; ++c) out(r, c) = memory[0];
  }
};

}  // namespace

TEST_CASE("every expert with tokens is called once, with its own rows") {
  for (const test::guarded_end end : {test::guarded_end::front, test::guarded_end::back}) {
    const test::forbidden_memory around(end);  // 64 offsets
    const test::planned p(30, 63, 2);          // more experts than choices: some are empty
    const row_matrix<float> in = test::random_rows(p.plan.slots(), 5);
    row_matrix<float> out(p.plan.slots(), 3);
    std::vector<int> calls(63, 0);
    for_each_expert(p.plan, in, out,
                    [&](expert_id e, matrix_view<const float> x, matrix_view<float> y) {
                      ++calls[static_cast<std::size_t>(e)];
                      CHECK(x.rows == p.plan.load(e));
                      CHECK(y.rows == x.rows);
                      CHECK((x.cols == 5 && y.cols == 3));
                      const index_t first = p.plan.offsets()[static_cast<std::size_t>(e)];
                      CHECK(x.data == in.data() + first * 5);
                      CHECK(y.data == out.data() + first * 3);
                    });
    for (index_t e = 0; e < 63; ++e)
      CHECK(calls[static_cast<std::size_t>(e)] == (p.plan.load(e) > 0 ? 1 : 0));
  }
}

TEST_CASE("slots are cut every so many rows where a call may have no more, and padding is none's") {
  const test::planned p(90, 5, 2);
  const auto run = [&](const plan_options& padded, index_t most, const auto& exec) {
    dispatch_plan plan;
    moeroute::plan(p.choices, plan, padded);
    const index_t slots = plan.slots();
    const row_matrix<float> in = test::random_rows(slots, 5);
    row_matrix<float> out(slots, 3);
    std::vector<int> seen(static_cast<std::size_t>(slots), 0), expected = seen;
    std::vector<char> right(seen.size(), 0);
    for_each_expert(plan, in, out,
                    [&](expert_id e, matrix_view<const float> x, matrix_view<float> y) {
                      const index_t first = (x.data - in.data()) / 5, last = first + x.rows;
                      const index_t own = plan.offsets()[static_cast<std::size_t>(e)];
                      right[static_cast<std::size_t>(first)] =
                          x.rows >= 1 && x.rows <= most && y.rows == x.rows &&
                          y.data == out.data() + first * 3 && (first == own || first % most == 0) &&
                          first >= own && last <= own + plan.load(e);
                      for (index_t s = first; s < last; ++s) {
                        if (s > first) right[static_cast<std::size_t>(s)] = 1;
                        ++seen[static_cast<std::size_t>(s)];
                      }
                    },
                    exec, {.rows_per_call = most});
    for (index_t e = 0; e < 5; ++e)
      std::fill_n(expected.begin() + plan.offsets()[static_cast<std::size_t>(e)], plan.load(e), 1);
    INFO("block " << padded.block << ", capacity " << padded.capacity << ", most " << most);
    CHECK(seen == expected);
    CHECK(std::equal(right.begin(), right.end(), expected.begin()));
  };
  for (const plan_options& padded :
       {plan_options{}, plan_options{.block = 4}, plan_options{.block = 3, .capacity = 70}})
    for (const index_t most : {1, 7, 1000}) {
      run(padded, most, serial{});
#if defined(_OPENMP)
      run(padded, most, openmp{3});
#endif
    }
}

TEST_CASE("each running expert has scratch of its own") {
  const test::planned p(300, 40, 3);
  const row_matrix<float> in = test::random_rows(p.plan.slots(), 2);
  const auto run = [&](const auto& exec) {
    row_matrix<float> out = row_matrix<float>::Constant(p.plan.slots(), 6, -1.0f);
    std::vector<float> memory(
        static_cast<std::size_t>(4 * worker_slots::count(exec.concurrency())));
    for_each_expert(p.plan, in, out, stamping{}, memory.data(), exec);
    bool right = true;
    for (index_t e = 0; e < 40; ++e)
      for (index_t s = p.plan.offsets()[static_cast<std::size_t>(e)];
           s < p.plan.offsets()[static_cast<std::size_t>(e) + 1]; ++s)
        right &= (out.row(s).array() == static_cast<float>(e)).all();
    CHECK(right);
  };
  run(serial{});
#if defined(_OPENMP)
  run(openmp{4});
#endif
}

TEST_CASE("experts that read tokens where they lie give what they give on copies") {
  test::random rng(7);
  // Its rows depend on the expert and on the row alone.
  const auto add_number = [](expert_id e, matrix_view<const float> in, matrix_view<float> out) {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < in.cols; ++c)
        out(r, c) = in.row(r)[c] + 10.0f * static_cast<float>(e);
  };
  for (const index_t tokens : {0, 1, 2, 3, 8, 40})
    for (const index_t experts : {1, 4, 50})
      for (const bool ragged : {false, true}) {
        const index_t k = std::min<index_t>(experts, 3);
        assignment a = ragged ? test::ragged_choices(rng, tokens, experts, k)
                              : test::fixed_choices(rng, tokens, experts, k, 5);
        if (tokens > 3) test::drop_some(rng, a, 3);
        dispatch_plan plan;
        moeroute::plan(a, plan, {.block = tokens == 8 ? 4 : 1});
        const row_matrix<float> x = test::random_rows(tokens, 9);
        const matrix_view<const float> window(tokens == 0 ? nullptr : x.data() + 2, tokens, 5, 9);
        const index_t slots = plan.slots();
        row_matrix<float> in = row_matrix<float>::Zero(slots, 5);
        row_matrix<float> copied = row_matrix<float>::Constant(slots, 5, -1.0f), same = copied;
        for (index_t s = 0; s < slots; ++s)
          if (const slot_id t = plan.token_of_slot()[static_cast<std::size_t>(s)]; t != no_token)
            in.row(s) = x.row(t).segment(2, 5);
        for_each_expert(plan, in, copied, add_number);
        std::vector<int> calls(static_cast<std::size_t>(experts), 0);
        for_each_expert(plan, a, window, same,
                        [&](expert_id e, matrix_view<const float> rows, matrix_view<float> out) {
                          ++calls[static_cast<std::size_t>(e)];
                          add_number(e, rows, out);
                        });
        CHECK(same == copied);
        for (index_t e = 0; e < experts; ++e) {
          const int called = calls[static_cast<std::size_t>(e)];
          CHECK((called > 0) == (plan.load(e) > 0));
          if (tokens <= 2) CHECK(called <= 1);
        }
#if defined(_OPENMP)
        same.setConstant(-1.0f);
        for_each_expert(plan, a, window, same, add_number, openmp{3});
        CHECK(same == copied);
#endif
      }
}

TEST_CASE("a token that names an expert twice is two rows, and every view has a legal stride") {
  constexpr index_t tokens = 8, experts = 4, k = 4, d = 5;
  test::random rng(9);
  const row_matrix<float> x = test::random_rows(tokens, d);
  for (int draw = 0; draw < 20; ++draw) {
    assignment a;
    a.reset(tokens, experts, k);
    for (expert_id& e : a.ids()) e = static_cast<expert_id>(rng.below(experts));
    dispatch_plan plan;
    moeroute::plan(a, plan);
    row_matrix<float> out = row_matrix<float>::Constant(plan.slots(), d, -1.0f);
    bool apart = true;
    for_each_expert(plan, a, x, out,
                    [&](expert_id, matrix_view<const float> rows, matrix_view<float> to) {
                      apart = apart && (rows.rows <= 1 || rows.stride >= rows.cols);
                      for (index_t r = 0; r < rows.rows; ++r)
                        std::copy_n(rows.row(r), d, to.row(r));
                    });
    CHECK(apart);
    for (index_t s = 0; s < plan.slots(); ++s)
      CHECK(out.row(s) == x.row(plan.token_of_slot()[static_cast<std::size_t>(s)]));
  }
}

TEST_CASE(
    "without copies each running expert has scratch of its own too, and other choices are "
    "refused") {
  test::random rng(8);
  assignment a = test::fixed_choices(rng, 20, 12, 3);
  dispatch_plan plan;
  moeroute::plan(a, plan);
  const row_matrix<float> x = test::random_rows(20, 2);
  const auto run = [&](const auto& exec) {
    row_matrix<float> out = row_matrix<float>::Constant(plan.slots(), 6, -1.0f);
    std::vector<float> memory(
        static_cast<std::size_t>(4 * worker_slots::count(exec.concurrency())));
    for_each_expert(plan, a, x, out, stamping{}, memory.data(), exec);
    bool right = true;
    for (std::size_t c = 0; c < a.ids().size(); ++c)
      right &= (out.row(plan.slot_of_choice()[c]).array() == static_cast<float>(a.ids()[c])).all();
    CHECK(right);
  };
  run(serial{});
#if defined(_OPENMP)
  run(openmp{4});
#endif
  row_matrix<float> out(plan.slots(), 6);
  float memory[8];
  const auto refusal = [&](const assignment& choices, const row_matrix<float>& from) {
    return test::refusal([&] { for_each_expert(plan, choices, from, out, stamping{}, memory); });
  };
  CHECK(refusal(a, test::random_rows(19, 2)) ==
        "moeroute::for_each_expert: x.rows() is 19, expected 20");
  CHECK(test::refusal([&] {
          for_each_expert(plan, a, matrix_view<const float>(out.data(), 20, 6), out, stamping{},
                          memory);
        }) == "moeroute::for_each_expert: x and out overlap, expected memory of their own");
  CHECK(refusal(test::fixed_choices(rng, 20, 13, 3), x) ==
        "moeroute::for_each_expert: choices.experts() is 13, expected 12");
  CHECK(refusal(test::fixed_choices(rng, 20, 12, 2), x) ==
        "moeroute::for_each_expert: choices.choices() is 40, expected 60");
  for (const expert_id bad : {-1, 12}) {
    a.ids()[59] = bad;
    CHECK(refusal(a, x) ==
          "moeroute::for_each_expert: the choices are others than those that were planned");
  }
}

TEST_CASE("matrices of another height than the plan are refused") {
  const test::planned p(5, 4, 2);
  const index_t slots = p.plan.slots();
  const auto refusal = [&](index_t in_rows, index_t out_rows) {
    const row_matrix<float> in = row_matrix<float>::Zero(in_rows, 3);
    row_matrix<float> out(out_rows, 3);
    return test::refusal([&] {
      for_each_expert(p.plan, in, out,
                      [](expert_id, matrix_view<const float>, matrix_view<float>) {});
    });
  };
  const std::string expected = ", expected " + std::to_string(slots);
  CHECK(refusal(slots + 1, slots) ==
        "moeroute::for_each_expert: in.rows() is " + std::to_string(slots + 1) + expected);
  CHECK(refusal(slots, slots + 2) ==
        "moeroute::for_each_expert: out.rows() is " + std::to_string(slots + 2) + expected);
  CHECK(refusal(slots, slots) == "accepted");
}

TEST_CASE("rows of experts that run into one another, and calls of no size, are refused by name") {
  const test::planned p(5, 4, 2);
  const index_t slots = p.plan.slots();
  std::vector<float> in(200), out(200);
  const auto view_of = [](std::vector<float>& v, index_t n, bool good = true, index_t from = 0) {
    matrix_view<float> m(v.data() + from, n, 6);
    if (!good) m.stride = 5;
    return m;
  };
  const auto copy = [](expert_id, matrix_view<const float>, matrix_view<float>) {};
  const auto said = [&](bool good_in, matrix_view<float> to, index_t most = 0) {
    return test::refusal([&] {
      for_each_expert(p.plan, view_of(in, slots, good_in), to, copy, serial{},
                      {.rows_per_call = most});
    });
  };
  const std::string where = "moeroute::for_each_expert: ",
                    close = ".stride is 5, expected at least 6";
  CHECK(said(false, view_of(out, slots)) == where + "in" + close);
  CHECK(said(true, view_of(out, slots, false)) == where + "out" + close);
  CHECK(said(true, view_of(in, slots, true, 1)) ==
        where + "in and out overlap, expected memory of their own");
  CHECK(said(true, view_of(out, slots), -1) ==
        where + "rows_per_call is -1, expected 0 to 2147483647");
  CHECK(said(true, view_of(out, slots), index_t{1} << 31) ==
        where + "rows_per_call is 2147483648, expected 0 to 2147483647");
  CHECK(said(true, view_of(out, slots), 0x7fffffff) == "accepted");
  CHECK(expert_options{}.rows_per_call == 0);
  const auto in_place = [&](bool good_in, bool good_out) {
    return test::refusal([&] {
      for_each_expert(p.plan, p.choices, view_of(in, 5, good_in), view_of(out, slots, good_out),
                      copy);
    });
  };
  CHECK(in_place(false, true) == where + "x" + close);
  CHECK(in_place(true, false) == where + "out" + close);
}
