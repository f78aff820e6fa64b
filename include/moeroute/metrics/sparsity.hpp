// How few experts a token uses, and how few a chunk of tokens uses between them.
#pragma once

#include <cstdint>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/expert_load.hpp>

namespace moeroute {

/// Token-level and chunk-level sparsity, fed batch by batch as if the batches were one text.
///
/// A chunk is `length` consecutive tokens, none of them in two; one that is not complete does not
/// count, masked tokens are not there. Cost: add O(T k + chunks E), no allocation.
/// Source: BlockFFN (Song et al. 2025).
class sparsity_meter {
 public:
  /// Throws: error where E is outside [1, 2^20] or length < 1.
  sparsity_meter(index_t experts, index_t length) : length_(length) {
    check_range("sparsity_meter", "experts", experts, 1, max_experts);
    check_range("sparsity_meter", "length", length, 1, index_t{1} << 40);
    last_.assign(static_cast<std::size_t>(experts), -1);
  }

  /// Throws: error where the assignment has another number of experts or the mask another length.
  template <class A = simd::default_arch>
  void add(const assignment& a, const count_options& what = {}) {
    check_size("sparsity_meter", "experts", a.experts(), static_cast<index_t>(last_.size()));
    detail::check_counted<A>("sparsity_meter", a, what);
    for (index_t t = 0; t < a.tokens(); ++t) {
      if (!what.mask.empty() && what.mask[static_cast<std::size_t>(t)] == 0) continue;
      detail::for_each_counted(a, what, t, [&](index_t e) {
        ++choices_;
        auto& last = last_[static_cast<std::size_t>(e)];
        open_ += last != chunks_;
        last = chunks_;
      });
      ++tokens_;
      if (tokens_ % length_ != 0) continue;
      active_ += open_;
      open_ = 0;
      ++chunks_;
    }
  }

  std::int64_t tokens() const { return tokens_; }
  std::int64_t chunks() const { return chunks_; }
  /// 1 - mean share of experts that a token uses; 0 where there are no tokens.
  double token_level() const { return unused(choices_, tokens_); }
  /// 1 - mean share of experts that any token of a chunk uses; the same for chunks of one token.
  double chunk_level() const { return unused(active_, chunks_); }

 private:
  double unused(std::int64_t used, std::int64_t places) const {
    return places == 0 ? 0.0
                       : 1.0 - static_cast<double>(used) / (static_cast<double>(places) *
                                                            static_cast<double>(last_.size()));
  }

  index_t length_;
  std::vector<std::int64_t> last_;  // the last chunk that used each expert
  std::int64_t tokens_ = 0, choices_ = 0, chunks_ = 0, active_ = 0, open_ = 0;
};

}  // namespace moeroute
