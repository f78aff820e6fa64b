// Which experts are in memory: a bit each.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// Bits of the experts [0, experts) in words of 64, which somebody else holds.
struct resident_view {
  const std::uint64_t* words = nullptr;
  index_t experts = 0;

  bool contains(expert_id e) const {
    MOEROUTE_EXPECTS(e >= 0 && e < experts);
    return (words[e >> 6] >> (e & 63) & 1) != 0;
  }
  /// How many there are. Cost: O(E / 64).
  index_t count() const {
    index_t n = 0;
    for (index_t w = 0; w < words_of(experts); ++w) n += std::popcount(words[w]);
    return n;
  }
  /// Words that hold so many bits.
  static constexpr index_t words_of(index_t experts) { return ceil_div(experts, 64); }
};

/// f(expert) for every expert of a set, ascending.
template <class F>
void for_each_resident(const resident_view& set, F&& f) {
  for (index_t w = 0; w < resident_view::words_of(set.experts); ++w)
    for (std::uint64_t bits = set.words[w]; bits != 0; bits &= bits - 1)
      f(static_cast<expert_id>(w * 64 + std::countr_zero(bits)));
}

/// The experts that are in memory. Cost: E / 8 bytes.
class resident_set {
 public:
  resident_set() = default;
  /// Nothing is in memory. Throws: error where E is outside [1, 2^20].
  explicit resident_set(index_t experts) : experts_(experts) {
    check_range("resident_set", "experts", experts, 1, max_experts);
    words_.resize(static_cast<std::size_t>(resident_view::words_of(experts)));
  }

  index_t experts() const { return experts_; }
  bool contains(expert_id e) const { return view().contains(e); }
  index_t count() const { return view().count(); }

  /// Throws: error where the id is outside [0, E).
  void insert(expert_id e) { word(e) |= bit(e); }
  void erase(expert_id e) { word(e) &= ~bit(e); }
  void clear() { words_.assign(words_.size(), 0); }

  resident_view view() const { return {words_.data(), experts_}; }
  operator resident_view() const { return view(); }

 private:
  static std::uint64_t bit(expert_id e) { return std::uint64_t{1} << (e & 63); }
  std::uint64_t& word(expert_id e) {
    check_range("resident_set", "expert", e, 0, experts_ - 1);
    return words_[static_cast<std::size_t>(e >> 6)];
  }

  std::vector<std::uint64_t> words_;
  index_t experts_ = 0;
};

}  // namespace moeroute
