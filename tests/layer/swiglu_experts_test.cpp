#include <moeroute/layer/swiglu_experts.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <vector>

#include "oracle/layer.hpp"
#include "support/compare.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"

namespace swiglu_experts_test {

using namespace moeroute;

TEST_CASE("an expert is down(silu(gate x) * up x), for any number of rows") {
  for (const index_t ff : {1, 7, 16, 33}) {
    const index_t d = 19;
    const row_matrix<float> gate = test::random_rows(ff, d, 1), up = test::random_rows(ff, d, 2),
                            down = test::random_rows(d, ff, 3);
    swiglu_experts<> experts(3, d, ff);
    experts.set_gate(1, const_view(gate));
    experts.set_up(1, const_view(up));
    experts.set_down(1, const_view(down));
    const oracle::swiglu slow{{ff, d, gate.data()}, {ff, d, up.data()}, {d, ff, down.data()}};
    std::vector<float> memory(static_cast<std::size_t>(experts.scratch_floats()));
    for (const index_t rows : {1, 2, 95, 96, 97, 200}) {
      const row_matrix<float> x = test::random_rows(rows, d, 4);
      row_matrix<float> y(rows, d);
      experts(1, const_view(x), view(y), memory.data());
      const oracle::matrix expected = oracle::run(slow, oracle::matrix(rows, d, x.data()));
      double largest = 0;
      for (const double v : expected.value) largest = std::max(largest, std::abs(v));
      INFO("ff = " << ff << ", rows = " << rows);
      CHECK(test::difference(test::values(y), expected.value, 1e-5, 1e-5 * largest) == "");
    }
  }
}

TEST_CASE("weights of another shape, and experts that are not there, are refused") {
  swiglu_experts<> experts(3, 5, 7);
  const row_matrix<float> w = row_matrix<float>::Zero(7, 5);
  CHECK(test::refusal([&] { experts.set_gate(3, const_view(w)); }) ==
        "moeroute::swiglu_experts: expert is 3, expected 0 to 2");
  CHECK(test::refusal([&] { experts.set_gate(-1, const_view(w)); }) ==
        "moeroute::swiglu_experts: expert is -1, expected 0 to 2");
  CHECK(test::refusal([&] { experts.set_down(0, const_view(w)); }) ==
        "moeroute::swiglu_experts: w.rows() is 7, expected 5");
  const row_matrix<float> wide = row_matrix<float>::Zero(7, 6);
  CHECK(test::refusal([&] { experts.set_up(0, const_view(wide)); }) ==
        "moeroute::packed_matrix::set_rows: w.cols() is 6, expected 5");
  CHECK(test::refusal([&] { experts.set_up(2, const_view(w)); }) == "accepted");
  const row_matrix<float> x = row_matrix<float>::Zero(2, 5);
  row_matrix<float> y(2, 5), between(2, 14);
  std::vector<float> memory(static_cast<std::size_t>(experts.scratch_floats()));
  CHECK(test::refusal([&] { experts(3, const_view(x), view(y), memory.data()); }) ==
        "moeroute::swiglu_experts: expert is 3, expected 0 to 2");
  CHECK(test::refusal([&] { experts.activation_input(-1, const_view(x), view(between)); }) ==
        "moeroute::swiglu_experts: expert is -1, expected 0 to 2");
  const row_matrix<float> more = row_matrix<float>::Zero(4, 5);
  CHECK(test::refusal([&] { experts(0, const_view(more), view(y), memory.data()); }) ==
        "moeroute::swiglu_experts: out.rows is 2, expected 4");
  const auto keep = [&](const matrix_view<float>& kept) {
    return test::refusal([&] { experts(0, const_view(x), view(y), kept, memory.data()); });
  };
  CHECK(keep({between.data(), 1, 14}) == "moeroute::swiglu_experts: kept.rows is 1, expected 2");
  CHECK(keep({between.data(), 2, 7}) == "moeroute::swiglu_experts: kept.cols is 7, expected 14");
  CHECK(keep(view(between)) == "accepted");
  CHECK(test::refusal([] { swiglu_experts<>(0, 5, 7); }) ==
        "moeroute::swiglu_experts: experts is 0, expected 1 to 1048576");
}

}  // namespace swiglu_experts_test
