#include <moeroute/stage/expert.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <string>
#include <vector>

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
  const test::planned p(30, 50, 2);  // more experts than choices: some are empty
  const row_matrix<float> in = test::random_rows(p.plan.slots(), 5);
  row_matrix<float> out(p.plan.slots(), 3);
  std::vector<int> calls(50, 0);
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
  for (index_t e = 0; e < 50; ++e)
    CHECK(calls[static_cast<std::size_t>(e)] == (p.plan.load(e) > 0 ? 1 : 0));
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
