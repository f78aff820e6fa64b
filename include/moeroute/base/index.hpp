// The integer types of the library, the few constants that everything shares, and in which order
// numbers of experts stand where values decide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace moeroute {

/// Sizes and offsets in memory: signed, 64 bits on every platform, so that T * E * d cannot
/// overflow where addresses have 32; what memory cannot hold there, the buffer refuses.
using index_t = std::int64_t;

/// An expert's number in [0, E), or no_expert.
using expert_id = std::int32_t;

/// A token's number in [0, T), or a slot's number in [0, S). T * k stays below 2^31; row * stride
/// is 64-bit.
using slot_id = std::int32_t;

/// A pick that could not be made: the row has fewer than k experts that are not masked.
inline constexpr expert_id no_expert = -1;

/// A choice without a slot: dropped, masked, or no_expert.
inline constexpr slot_id no_slot = -1;

/// Largest number of experts, 2^20.
inline constexpr index_t max_experts = index_t{1} << 20;

/// More bytes than this no address reaches: who asks for them made a mistake, or a product that
/// overflowed.
inline constexpr index_t max_bytes =
    sizeof(void*) < 8 ? index_t{std::numeric_limits<std::ptrdiff_t>::max()} - 4096
                      : index_t{1} << 56;

/// Rows that a token-choice policy sees at once: one token per SIMD lane.
inline constexpr int block_rows = 16;

/// Alignment of everything the library allocates: one cache line, one AVX-512 register.
inline constexpr std::size_t alignment = 64;

/// a * b for sizes that were not checked yet, both >= 0: the largest index_t where the product does
/// not fit, which every range check refuses and no allocation grants.
constexpr index_t size_product(index_t a, index_t b) {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  return b != 0 && a > most / b ? most : a * b;
}

constexpr index_t ceil_div(index_t n, index_t d) { return (n + d - 1) / d; }
constexpr index_t round_up(index_t n, index_t multiple) { return ceil_div(n, multiple) * multiple; }

/// The order of numbers for std::sort by what each stands for: the greatest value(i) first, the
/// lowest i of equals, so that what the order was before decides nothing. No value is NaN.
template <class Value>
struct greatest_first {
  Value value;

  template <class Number>
  bool operator()(const Number& a, const Number& b) const {
    const auto x = value(a), y = value(b);
    return x != y ? x > y : a < b;
  }
};
template <class Value>
greatest_first(Value) -> greatest_first<Value>;

}  // namespace moeroute
