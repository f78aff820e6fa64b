#include <moeroute/simd/rows/rows.hpp>

#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

template <class T>
std::vector<T> all_patterns() {
  std::vector<T> list;
  for (std::uint32_t bits = 0; bits < 65536; ++bits)
    list.push_back(std::bit_cast<T>(static_cast<std::uint16_t>(bits)));
  return list;
}

// The value of a 16-bit float by its fields.
double value_of(std::uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias)
                       : sign * std::ldexp(1 + fraction, exponent - bias);
}

template <class T>
constexpr int exponent_bits = std::is_same_v<T, bfloat16> ? 8 : 5;

template <class A, class T>
std::string widening() {
  const std::vector<T> in = all_patterns<T>();
  std::vector<float> out(in.size());
  simd::convert_row<A>(in.data(), static_cast<index_t>(in.size()), out.data());
  for (std::size_t i = 0; i < in.size(); ++i) {
    const double expected = value_of(static_cast<std::uint16_t>(i), exponent_bits<T>);
    const bool right = expected != expected ? out[i] != out[i]
                                            : static_cast<double>(out[i]) == expected &&
                                                  std::signbit(out[i]) == std::signbit(expected);
    if (!right) return "pattern " + std::to_string(i) + ": " + test::shown(out[i]);
  }
  return "";
}

// The nearest of all 65536, the even one of two: by looking at the neighbours of the result.
template <class T>
bool nearest(float x, T got) {
  const auto bits = std::bit_cast<std::uint16_t>(got);
  const double y = value_of(bits, exponent_bits<T>), wide = static_cast<double>(x);
  if (x != x) return y != y;
  if (y != y || std::signbit(y) != std::signbit(x)) return false;
  // The finite number after the largest, where the exponent would go on, stands for infinity.
  const auto magnitude = [](std::uint16_t b) {
    const int m = 15 - exponent_bits<T>;
    const int e = (b & 0x7fff) >> m;
    if (e < (1 << exponent_bits<T>)-1) return std::abs(value_of(b, exponent_bits<T>));
    return std::ldexp(1.0, e - ((1 << (exponent_bits<T> - 1)) - 1));
  };
  const double a = std::abs(wide), here = magnitude(bits);
  if (std::isinf(a)) return std::isinf(y);
  if (std::isinf(y) && a > here) return true;
  const double error = std::abs(a - here);
  const bool even = (bits & 1) == 0;
  const auto beats = [&](std::uint16_t other) {
    const double its = std::abs(a - magnitude(other));
    return its < error || (its == error && !even);
  };
  const auto low = static_cast<std::uint16_t>(bits & 0x7fff);
  if (low > 0 && beats(static_cast<std::uint16_t>(bits - 1))) return false;
  return std::isinf(y) || !beats(static_cast<std::uint16_t>(bits + 1));
}

template <class A, class T>
std::string narrowing() {
  test::random rng(3);
  std::vector<float> in;
  for (int i = 0; i < 200000; ++i)
    in.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(rng.bits())));
  for (int i = 0; i < 20000; ++i) in.push_back(rng.normal() * 0x1p-10f);
  // Halfway between neighbours, and one float to either side.
  for (std::uint32_t bits = 0; bits + 1 < 0x7c00; ++bits) {
    const double a = value_of(static_cast<std::uint16_t>(bits), exponent_bits<T>);
    const double b = value_of(static_cast<std::uint16_t>(bits + 1), exponent_bits<T>);
    const auto half = static_cast<float>((a + b) / 2);
    in.insert(in.end(), {half, -half, std::nextafter(half, 1e38f), std::nextafter(half, 0.0f)});
  }
  in.insert(in.end(), {0.0f, -0.0f, test::infinity, -test::infinity, test::not_a_number,
                       std::bit_cast<float>(0x7f800001u), std::bit_cast<float>(0xffffffffu),
                       65504.0f, 65519.99f, 65520.0f, std::numeric_limits<float>::max()});
  std::vector<T> out(in.size());
  simd::convert_row<A>(in.data(), static_cast<index_t>(in.size()), out.data());
  for (std::size_t i = 0; i < in.size(); ++i)
    if (!nearest<T>(in[i], out[i]))
      return test::shown(in[i]) + " became " + test::shown(static_cast<double>(out[i]));
  return "";
}

template <class A, class From, class To>
std::string weighted_sum(index_t n, const std::vector<std::int32_t>& row) {
  test::random rng(static_cast<std::uint64_t>(n));
  const index_t rows = 5, stride = n + 3, k = static_cast<index_t>(row.size());
  std::vector<From> from;
  for (index_t i = 0; i < (rows - 1) * stride + n; ++i)
    from.push_back(static_cast<From>(rng.normal()));
  std::vector<float> weight;
  for (const std::int32_t r : row) weight.push_back(r < 0 ? test::not_a_number : rng.normal());
  std::vector<To> expected(static_cast<std::size_t>(n));
  for (index_t c = 0; c < n; ++c) {
    float sum = 0.0f;  // rank order, fused, one rounding at the end: the promised bits
    for (std::size_t r = 0; r < row.size(); ++r)
      if (row[r] >= 0)
        sum =
            std::fma(weight[r],
                     static_cast<float>(from[static_cast<std::size_t>(row[r] * stride + c)]), sum);
    expected[static_cast<std::size_t>(c)] = static_cast<To>(sum);
  }
  // Rows, lists and the sum end where memory does, or begin there.
  static test::edges memory(4 * 5 * 210);
  std::string wrong;
  for (const bool fetched : {false, true})
    test::at_both_ends(memory, [&] {
      const std::int32_t* const list = memory.copy(row);
      To* const out = memory.room<To>(n);
      simd::weighted_sum_of_rows<A>(memory.copy(from), stride, list, memory.copy(weight), k, n, out,
                                    fetched ? list : nullptr);
      wrong += test::bit_difference(std::span<const To>(out, expected.size()), expected);
    });
  return wrong;
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("all 65536 bfloat16 and float16 widen to the value of their fields", "",
                        test::widths) {
  CHECK(widening<TestType, bfloat16>() == "");
  CHECK(widening<TestType, float16>() == "");
}

TEMPLATE_LIST_TEST_CASE("floats narrow to the nearest 16-bit float, ties to even, NaN to NaN", "",
                        test::widths) {
  CHECK(narrowing<TestType, bfloat16>() == "");
  CHECK(narrowing<TestType, float16>() == "");
}

TEMPLATE_LIST_TEST_CASE("rows of every length are converted alike, and nothing behind them", "",
                        test::widths) {
  const std::vector<float> in = test::make_logits(test::shape::normal, 1, 1, 70);
  std::vector<bfloat16> whole(70);
  simd::convert_row<TestType>(in.data(), 70, whole.data());
  test::edges memory(4 * 70);
  for (index_t n = 0; n <= 70; ++n)
    test::at_both_ends(memory, [&] {
      const auto size = static_cast<std::size_t>(n);
      const auto first = std::span<const float>(in).first(size);
      const auto narrow = std::span<const bfloat16>(whole).first(size);
      const float* const from = memory.copy(first);
      bfloat16* const out = memory.room<bfloat16>(n);
      float *const copy = memory.room<float>(n), *const wide = memory.room<float>(n);
      simd::convert_row<TestType>(from, n, out);
      simd::convert_row<TestType>(from, n, copy);
      simd::convert_row<TestType>(out, n, wide);
      CHECK(test::bit_difference(std::span<const bfloat16>(out, size), narrow) == "");
      CHECK(test::bit_difference(std::span<const float>(copy, size), first) == "");
      bool right = true;
      for (std::size_t i = 0; i < size; ++i) right &= wide[i] == static_cast<float>(narrow[i]);
      CHECK(right);
    });
}

TEST_CASE("a conversion between float types keeps a row's bits where the types are the same") {
  const std::vector<float> in = {std::bit_cast<float>(0x7f800001u), -0.0f, 1.0f};
  std::vector<float> out(3);
  simd::convert_row(in.data(), 3, out.data());
  CHECK(test::bit_difference(out, in) == "");
}

TEMPLATE_LIST_TEST_CASE("a weighted sum is a chain of fused multiply-adds in rank order", "",
                        test::widths) {
  for (index_t n = 0; n <= 200; n += n < 130 ? 1 : 35) {
    INFO("n = " << n);
    CHECK(weighted_sum<TestType, float, bfloat16>(n, {3, -1, 0, 4, 3}) == "");
    CHECK(weighted_sum<TestType, bfloat16, float16>(n, {3, -1, 0, 4, 3}) == "");
    for (const bool missing : {false, true}) {
      std::vector<std::int32_t> row;
      for (int r = 0; r < 12; ++r) {
        CHECK(weighted_sum<TestType, float, float>(n, row) == "");
        row.push_back(missing && r % 3 == 1 ? -1 : r % 5);
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE(
    "sums of bfloat16 rows round ties to even and a NaN alone, near or fetched from afar", "",
    test::widths) {
  constexpr index_t n = 330;
  test::random rng(79);
  std::vector<bfloat16> rows;
  // Multiples of 1/128 from 1 to 2: every other sum above 2 lies between two bfloat16.
  for (index_t i = 0; i < 6 * n; ++i)
    rows.push_back(static_cast<bfloat16>(1.0f + static_cast<float>(rng.below(128)) / 128.0f));
  rows[3] = rows[n + 70] = static_cast<bfloat16>(test::not_a_number);
  std::vector<float> weight(20, 1.0f);
  weight[19] = std::bit_cast<float>(0x7fffffffu);  // a NaN that would round to -0
  std::vector<std::int32_t> row;
  for (index_t k = 1; k <= 20; ++k) {
    row.push_back(k % 5 == 3 ? -1 : static_cast<std::int32_t>(k * 5 % 6));
    std::vector<bfloat16> expected;
    std::vector<float> exact;
    for (index_t c = 0; c < n; ++c) {
      float sum = 0.0f;
      for (std::size_t r = 0; r < row.size(); ++r)
        if (row[r] >= 0)
          sum += weight[r] * static_cast<float>(rows[static_cast<std::size_t>(row[r] * n + c)]);
      exact.push_back(sum);
      expected.push_back(simd::detail::narrowed<simd::default_arch, bfloat16>(sum));
    }
    for (const bool fetched : {false, true}) {
      const std::int32_t* const next = fetched ? row.data() : nullptr;
      std::vector<bfloat16> out(n);
      std::vector<float> wide(n);
      simd::weighted_sum_of_rows<TestType>(rows.data(), n, row.data(), weight.data(), k, n,
                                           out.data(), next);
      simd::weighted_sum_of_rows<TestType>(rows.data(), n, row.data(), weight.data(), k, n,
                                           wide.data(), next);
      INFO("k = " << k << (fetched ? ", fetched" : ""));
      std::string wrong;
      for (std::size_t c = 0; c < n; ++c) {
        const bool nan = exact[c] != exact[c];
        if (nan ? wide[c] == wide[c] : wide[c] != exact[c]) wrong = "float " + std::to_string(c);
        const auto y = static_cast<float>(out[c]), z = static_cast<float>(expected[c]);
        if (nan ? y == y : y != z) wrong = "bfloat16 " + std::to_string(c);
      }
      CHECK(wrong == "");
    }
  }
}

TEMPLATE_LIST_TEST_CASE("mixed rows are weighted sums of all rows, each a chain in their order", "",
                        test::widths) {
  test::random rng(77);
  test::edges memory(4 * 35 * 205 + 2 * 200 * 205);
  for (const index_t n : {0, 1, 20, 200})
    for (const index_t outputs : {0, 1, 3, 4, 5, 35})
      for (const index_t d : {1, 3, 16, 17, 64, 69, 200}) {
        // Rows with gaps, the last of which ends where memory does.
        const index_t by = n + d % 3, step = d + n % 3, apart = d + outputs % 4;
        const auto size = [](index_t rows, index_t cols, index_t stride) {
          return rows == 0 ? 0 : (rows - 1) * stride + cols;
        };
        std::vector<float> weight,
            expected(static_cast<std::size_t>(size(outputs, d, apart)), 9.0f);
        std::vector<bfloat16> rows;
        for (index_t i = 0; i < size(outputs, n, by); ++i) weight.push_back(rng.normal());
        for (index_t i = 0; i < size(n, d, step); ++i)
          rows.push_back(static_cast<bfloat16>(rng.normal()));
        memory.begin(test::guarded_end::back);
        float* const out = memory.copy(expected);
        for (index_t r = 0; r < outputs; ++r)
          for (index_t c = 0; c < d; ++c) {
            float sum = 0.0f;
            for (index_t i = 0; i < n; ++i)
              sum = std::fma(weight[static_cast<std::size_t>(r * by + i)],
                             static_cast<float>(rows[static_cast<std::size_t>(i * step + c)]), sum);
            expected[static_cast<std::size_t>(r * apart + c)] = sum;
          }
        simd::mix_rows<TestType>(matrix_view<const float>(memory.copy(weight), outputs, n, by),
                                 matrix_view<const bfloat16>(memory.copy(rows), n, d, step),
                                 matrix_view<float>(out, outputs, d, apart));
        CHECK(test::bit_difference(std::span<const float>(out, expected.size()), expected) == "");
      }
}

TEST_CASE("a copy that fetches ahead writes its bytes and no others") {
  test::edges memory(17000);
  std::vector<std::byte> from(17000), next(2048);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i % 251);
  for (const std::size_t n : {0u, 1u, 63u, 64u, 65u, 960u, 1023u, 1024u, 1025u, 1088u, 1100u, 4096u,
                              4999u, 8192u, 16424u})
    for (const std::size_t start : {0u, 1u, 32u})
      for (const std::byte* const other :
           {static_cast<const std::byte*>(nullptr), static_cast<const std::byte*>(next.data())}) {
        const auto bytes = std::span<const std::byte>(from).subspan(start, n);
        for (const bool distant : {false, true})
          test::at_both_ends(memory, [&] {
            const auto length = static_cast<index_t>(n);
            std::byte* const to = memory.room<std::byte>(length);
            // Once where both lie alike, once where the source lies as it came.
            const auto* const source = distant ? memory.copy(bytes) : bytes.data();
            simd::copy_ahead(source, length, to, other, distant);
            CHECK(std::equal(bytes.begin(), bytes.end(), to));
          });
      }
}

TEST_CASE("a weighted sum of nothing is zero") {
  const std::vector<float> from(8, 1.0f), weight(2, 1.0f);
  const std::vector<std::int32_t> none(2, -1);
  std::vector<float> out(8, 9.0f);
  simd::weighted_sum_of_rows(from.data(), 8, none.data(), weight.data(), 2, 8, out.data());
  CHECK(test::bit_difference(out, std::vector<float>(8, 0.0f)) == "");
  out.assign(8, 9.0f);
  simd::weighted_sum_of_rows(from.data(), 8, none.data(), weight.data(), 0, 8, out.data());
  CHECK(test::bit_difference(out, std::vector<float>(8, 0.0f)) == "");
}
