#include <moeroute/matrix/matrix.hpp>

#include <catch2/catch_test_macros.hpp>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

using namespace moeroute;

namespace {

template <class M>
concept viewable = requires(M& m) { view(m); };

row_matrix<float> numbered(index_t rows, index_t cols) {
  row_matrix<float> m(rows, cols);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = static_cast<float>(i);
  return m;
}

// Every element of the view is the element of the matrix.
template <class View, class M>
bool same(const View& v, const M& m) {
  if (v.rows != m.rows() || v.cols != m.cols()) return false;
  for (index_t r = 0; r < v.rows; ++r)
    for (index_t c = 0; c < v.cols; ++c)
      if (&v(r, c) != &m.coeffRef(r, c)) return false;
  return true;
}

}  // namespace

TEST_CASE("a view shows the elements of row-major matrices, maps, refs and blocks, not copies") {
  row_matrix<float> m = numbered(5, 7);
  CHECK(same(view(m), m));
  Eigen::Map<row_matrix<float>> map(m.data(), 7, 5);
  CHECK(same(view(map), map));
  Eigen::Map<row_matrix<float>, 0, Eigen::OuterStride<>> strided(m.data(), 3, 4,
                                                                 Eigen::OuterStride<>(7));
  CHECK(same(view(strided), strided));
  Eigen::Ref<row_matrix<float>> ref(m);
  CHECK(same(view(ref), ref));
  auto block = m.block(1, 2, 3, 4);
  CHECK(same(view(block), block));
  CHECK(view(block).stride == 7);
  Eigen::Matrix<float, 3, 4, Eigen::RowMajor> fixed;
  CHECK(same(view(fixed), fixed));
}

TEST_CASE("an Eigen vector is a column of rows of one element, a row vector one row") {
  Eigen::VectorXf column(5);
  CHECK(same(view(column), column));
  Eigen::RowVectorXf row(5);
  CHECK(same(view(row), row));
  row_matrix<float> m = numbered(4, 3);
  auto third = m.row(2);
  CHECK(same(view(third), third));
}

TEST_CASE("a span and a vector are one row") {
  std::vector<float> values(6);
  const auto v = view(values);
  CHECK((v.data == values.data() && v.rows == 1 && v.cols == 6));
  const std::span<float> part(values.data() + 1, 3);
  CHECK((view(part).data == values.data() + 1 && view(part).cols == 3));
}

TEST_CASE("a view is read-only where its matrix is") {
  row_matrix<float> m = numbered(2, 2);
  STATIC_REQUIRE(std::is_same_v<decltype(view(m)), matrix_view<float>>);
  STATIC_REQUIRE(std::is_same_v<decltype(view(std::as_const(m))), matrix_view<const float>>);
  STATIC_REQUIRE(std::is_same_v<decltype(const_view(m)), matrix_view<const float>>);
  const std::vector<float> values(3);
  STATIC_REQUIRE(std::is_same_v<decltype(view(values)), matrix_view<const float>>);
  STATIC_REQUIRE(std::is_convertible_v<matrix_view<float>, matrix_view<const float>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<matrix_view<const float>, matrix_view<float>>);
}

TEST_CASE("stages read and write float and 16-bit rows, nothing else") {
  STATIC_REQUIRE(readable_rows<row_matrix<float>>);
  STATIC_REQUIRE(readable_rows<row_matrix<bfloat16>>);
  STATIC_REQUIRE(readable_rows<matrix_view<const float16>>);
  STATIC_REQUIRE_FALSE(readable_rows<row_matrix<double>>);
  STATIC_REQUIRE_FALSE(readable_rows<row_matrix<int>>);
  STATIC_REQUIRE_FALSE(readable_rows<int>);
  STATIC_REQUIRE(writable_rows<row_matrix<float>>);
  STATIC_REQUIRE(writable_rows<matrix_view<bfloat16>>);
  STATIC_REQUIRE_FALSE(writable_rows<const row_matrix<float>>);
  STATIC_REQUIRE_FALSE(writable_rows<matrix_view<const float>>);
  STATIC_REQUIRE_FALSE(viewable<int>);
  STATIC_REQUIRE(std::is_same_v<element_of<const row_matrix<bfloat16>>, bfloat16>);
}

TEST_CASE("rows lie stride apart, and middle_rows keeps stride and columns") {
  row_matrix<float> m = numbered(6, 4);
  const matrix_view<float> v(m.data(), 6, 3, 4);
  CHECK(v(2, 1) == m(2, 1));
  const auto middle = v.middle_rows(2, 3);
  CHECK((middle.rows == 3 && middle.cols == 3 && middle.stride == 4));
  CHECK(&middle(0, 0) == &m(2, 0));
  CHECK(v.middle_rows(6, 0).rows == 0);
}

TEST_CASE("empty matrices have empty views") {
  row_matrix<float> no_rows(0, 5), no_cols(5, 0);
  CHECK((view(no_rows).rows == 0 && view(no_rows).cols == 5));
  CHECK((view(no_cols).rows == 5 && view(no_cols).cols == 0));
  const matrix_view<float> none;
  CHECK((none.data == nullptr && none.rows == 0 && none.cols == 0));
}
