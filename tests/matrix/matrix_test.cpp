#include <moeroute/matrix/matrix.hpp>

#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moeroute/matrix/eigen.hpp>
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

// What view() looks at, and nothing of Eigen.
struct of_another_library {
  static constexpr bool IsRowMajor = true;
  static constexpr int ColsAtCompileTime = -1, InnerStrideAtCompileTime = 1;
  float values[8] = {};
  const float* data() const { return values; }
  int rows() const { return 2; }
  int cols() const { return 3; }
  int outerStride() const { return 4; }
  int innerStride() const { return 1; }
};

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
  CHECK((const_view(block).stride == 7 && matrix_view<const float>(view(block)).stride == 7));
  CHECK(view(m.block(1, 2, 1, 4)).stride == 4);  // what one row does not reach
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
  CHECK((v.data == values.data() && v.rows == 1 && v.cols == 6 && v.stride == 6));
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
  STATIC_REQUIRE_FALSE(readable_rows<row_matrix<std::uint16_t>>);
  STATIC_REQUIRE(writable_rows<row_matrix<float>>);
  STATIC_REQUIRE(writable_rows<matrix_view<bfloat16>>);
  STATIC_REQUIRE_FALSE(writable_rows<const row_matrix<float>>);
  STATIC_REQUIRE_FALSE(writable_rows<matrix_view<const float>>);
  STATIC_REQUIRE_FALSE(viewable<int>);
  STATIC_REQUIRE(std::is_same_v<element_of<const row_matrix<bfloat16>>, bfloat16>);
}

TEST_CASE("what has the members of an Eigen matrix is viewed like one") {
  const of_another_library m;
  const auto v = view(m);
  CHECK((v.data == m.values && v.rows == 2 && v.cols == 3 && v.stride == 4));
}

TEST_CASE("rows of another library's 16-bit types are rows of ours, in place") {
  row_matrix<Eigen::bfloat16> b = row_matrix<float>::Random(3, 5).cast<Eigen::bfloat16>();
  row_matrix<Eigen::half> h = row_matrix<float>::Random(3, 5).cast<Eigen::half>();
  STATIC_REQUIRE(std::is_same_v<decltype(view(b)), matrix_view<bfloat16>>);
  STATIC_REQUIRE(std::is_same_v<decltype(const_view(h)), matrix_view<const float16>>);
  STATIC_REQUIRE(readable_rows<std::span<const Eigen::half>>);
  CHECK(static_cast<const void*>(view(b).data) == b.data());
  view(h)(2, 1) = float16(0.25f);
  CHECK(h(2, 1) == Eigen::half(0.25f));
  for (index_t r = 0; r < 3; ++r)
    for (index_t c = 0; c < 5; ++c) {
      CHECK(float{view(b)(r, c)} == static_cast<float>(b(r, c)));
      CHECK(float{view(h)(r, c)} == static_cast<float>(h(r, c)));
    }
}

TEST_CASE("every 16-bit number widens to the float that Eigen's types widen it to") {
  const auto same = [](float x, float y) {
    return (x == y && std::signbit(x) == std::signbit(y)) || (x != x && y != y);
  };
  int wrong = 0;
  for (std::uint32_t i = 0; i < 0x10000; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    wrong += !same(std::bit_cast<bfloat16>(bits),
                   static_cast<float>(std::bit_cast<Eigen::bfloat16>(bits)));
    wrong +=
        !same(std::bit_cast<float16>(bits), static_cast<float>(std::bit_cast<Eigen::half>(bits)));
  }
  CHECK(wrong == 0);
}

TEST_CASE(
    "floats are rounded to 16 bits as Eigen's types round them: ties, denormals, infinities, NaN") {
  std::uint32_t fewer = 0;
  int wrong = 0;
  const auto check = [&](std::uint32_t bits) {
    const auto x = std::bit_cast<float>(bits);
    const bfloat16 b(x);
    const float16 h(x);
    if (x != x) {
      wrong += float{b} == float{b} || float{h} == float{h};
    } else {
      wrong += b.bits != std::bit_cast<std::uint16_t>(Eigen::bfloat16(x));
      wrong += h.bits != std::bit_cast<std::uint16_t>(Eigen::half(x));
    }
    ++fewer;
  };
  // Every upper half, with the lower halves around a tie of either type and around none.
  for (std::uint32_t high = 0; high < 0x10000; ++high)
    for (const std::uint32_t low : {0x0u, 0x1u, 0x0fffu, 0x1000u, 0x1001u, 0x2fffu, 0x3000u,
                                    0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      check(high << 16 | low);
  CHECK(wrong == 0);
  CHECK(fewer == 0x10000u * 11);
}

TEST_CASE("a NaN of 16 bits comes back from float quiet, with its sign and the rest of its bits") {
  for (std::uint32_t i = 0; i < 0x10000; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    if ((bits & 0x7fffu) > 0x7c00u)
      CHECK(float16(float{std::bit_cast<float16>(bits)}).bits == (bits | 0x200u));
    if ((bits & 0x7fffu) > 0x7f80u)
      CHECK(bfloat16(float{std::bit_cast<bfloat16>(bits)}).bits == (bits | 0x40u));
  }
}

TEST_CASE("the limits of 16-bit types are those of their fields") {
  const auto compare = []<class Ours, class Theirs>(Ours, Theirs) {
    using ours = std::numeric_limits<Ours>;
    using theirs = std::numeric_limits<Theirs>;
    CHECK(float{ours::min()} == static_cast<float>(theirs::min()));
    CHECK(float{ours::max()} == static_cast<float>(theirs::max()));
    CHECK(float{ours::lowest()} == static_cast<float>(theirs::lowest()));
    CHECK(float{ours::epsilon()} ==
          std::ldexp(1.0f, 1 - ours::digits));  // of half, Eigen's is an eighth
    CHECK(float{ours::infinity()} == static_cast<float>(theirs::infinity()));
    CHECK(float{ours::denorm_min()} == static_cast<float>(theirs::denorm_min()));
    CHECK(ours::digits == theirs::digits);
    // A quiet NaN has the first bit of the fraction, one that signals has another.
    constexpr auto quiet = static_cast<std::uint16_t>(1u << (ours::digits - 2));
    CHECK((std::isnan(float{ours::quiet_NaN()}) && (ours::quiet_NaN().bits & quiet) != 0));
    CHECK((std::isnan(float{ours::signaling_NaN()}) && (ours::signaling_NaN().bits & quiet) == 0));
    CHECK(float{ours::round_error()} == 0.5f);
    CHECK(float{ours::min()} == std::ldexp(1.0f, ours::min_exponent - 1));
    CHECK(float{ours::max()} ==
          std::ldexp(1.0f - std::ldexp(1.0f, -ours::digits), ours::max_exponent));
    const auto decimals = [](double binary) { return binary * std::log10(2.0); };
    CHECK(ours::digits10 == static_cast<int>(decimals(ours::digits - 1)));
    CHECK(ours::max_digits10 == static_cast<int>(std::ceil(1 + decimals(ours::digits))));
    CHECK(ours::min_exponent10 == static_cast<int>(std::ceil(decimals(ours::min_exponent - 1))));
    CHECK(ours::max_exponent10 ==
          static_cast<int>(std::log10(static_cast<double>(float{ours::max()}))));
  };
  compare(bfloat16{}, Eigen::bfloat16{});
  compare(float16{}, Eigen::half{});
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
  CHECK((none.data == nullptr && none.rows == 0 && none.cols == 0 && none.stride == 0));
}
