// Causal attention over cached keys and values, several query heads at a time.
//
// Up to four queries that share a key-value head walk the cache together, so
// each key and value is loaded once for all of them. Every number is summed in
// an order that depends on the position alone: the same bits for prefill and
// decode, and for any number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>

namespace example {

using moeroute::index_t;
using moeroute::matrix_view;

/// Keys and values of one layer.
///
/// Keys lie in blocks of 64 positions, [kv head][block][dimension][64], so that
/// one load fetches the same dimension of neighbouring keys; values lie row by
/// row, [kv head][position][dimension], padded to 16.
class kv_cache {
 public:
  static constexpr index_t block = 64;

  kv_cache(index_t kv_heads, index_t head_dim, index_t positions)
      : kv_heads_(kv_heads),
        head_dim_(head_dim),
        padded_dim_(moeroute::round_up(head_dim, moeroute::block_rows)),
        positions_(moeroute::round_up(positions, block)),
        keys_(kv_heads * positions_ * head_dim),
        values_(kv_heads * positions_ * padded_dim_) {
    // What lies past the last position is multiplied by zero: keep it finite.
    std::fill_n(keys_.data(), keys_.size(), 0.0F);
    std::fill_n(values_.data(), values_.size(), 0.0F);
  }

  [[nodiscard]] index_t kv_heads() const { return kv_heads_; }
  [[nodiscard]] index_t head_dim() const { return head_dim_; }
  [[nodiscard]] index_t padded_dim() const { return padded_dim_; }
  /// A multiple of `block`.
  [[nodiscard]] index_t positions() const { return positions_; }
  [[nodiscard]] const float* keys(index_t head) const {
    return keys_.data() + head * positions_ * head_dim_;
  }
  [[nodiscard]] const float* values(index_t head) const {
    return values_.data() + head * positions_ * padded_dim_;
  }

  void store(index_t head, index_t position, const float* key, const float* value) {
    float* k = keys_.data() + head * positions_ * head_dim_ + position / block * block * head_dim_ +
               position % block;
    for (index_t i = 0; i < head_dim_; ++i) {
      k[i * block] = key[i];
    }
    std::copy_n(value, head_dim_, values_.data() + (head * positions_ + position) * padded_dim_);
  }

 private:
  index_t kv_heads_;
  index_t head_dim_;
  index_t padded_dim_;
  index_t positions_;
  moeroute::buffer<float> keys_;
  moeroute::buffer<float> values_;
};

namespace detail {

namespace simd = moeroute::simd;

/// One query of a tile: its vector, how many positions it sees, and its place
/// in the output.
struct attention_query {
  const float* vector = nullptr;
  index_t length = 0;
  float* out = nullptr;
};

// Sixteen lanes are one group; so many groups per query keep eight registers of sums busy.
template <int Queries, class A>
inline constexpr int groups_at_once =
    std::clamp(8 / (Queries * simd::registers_per_block<A>), 1, 4);

/// sums[q][register] += factor(q) * row[register], over Groups groups of lanes.
template <int Queries, int Groups, class A>
struct lane_sums {
  static constexpr int registers = Groups * simd::registers_per_block<A>;
  simd::vfloat<A> sum[Queries][registers];

  lane_sums() {
    for (auto& query : sum) {
      for (auto& value : query) {
        value = simd::vfloat<A>(0.0F);
      }
    }
  }
  template <class Factor>
  MOEROUTE_INLINE void add(const float* row, const Factor& factor) {
    simd::vfloat<A> loaded[registers];
    MOEROUTE_UNROLL
    for (int r = 0; r < registers; ++r) {
      loaded[r] = simd::load<A>(row + r * simd::width<A>);
    }
    MOEROUTE_UNROLL
    for (int q = 0; q < Queries; ++q) {
      const simd::vfloat<A> f(factor(q));
      MOEROUTE_UNROLL
      for (int r = 0; r < registers; ++r) {
        sum[q][r] = simd::fma<A>(f, loaded[r], sum[q][r]);
      }
    }
  }
  MOEROUTE_INLINE void store(int q, float* to) const {
    MOEROUTE_UNROLL
    for (int r = 0; r < registers; ++r) {
      sum[q][r].store_unaligned(to + r * simd::width<A>);
    }
  }
};

/// Calls f.template operator()<G>(lane) for runs of G groups, wide ones first, until `lanes` are
/// covered.
template <int Groups, class F>
MOEROUTE_INLINE void for_lanes(index_t lanes, F&& f, index_t lane = 0) {
  for (; lane + Groups * moeroute::block_rows <= lanes; lane += Groups * moeroute::block_rows) {
    f.template operator()<Groups>(lane);
  }
  if constexpr (Groups > 1) {
    for_lanes<Groups / 2>(lanes, f, lane);
  }
}

/// scores[q][j] = query q . key j, for all positions of the blocks that the longest query touches.
template <int Queries, class A>
void score_keys(const kv_cache& cache, index_t head, const attention_query* query, index_t length,
                float* scores, index_t stride) {
  const index_t dim = cache.head_dim();
  for (index_t first = 0; first < length; first += kv_cache::block) {
    const float* keys = cache.keys(head) + first * dim;
    const index_t lanes =
        std::min(kv_cache::block, moeroute::round_up(length - first, moeroute::block_rows));
    for_lanes<groups_at_once<Queries, A>>(lanes, [&]<int Groups>(index_t lane) {
      lane_sums<Queries, Groups, A> sums;
      for (index_t i = 0; i < dim; ++i) {
        sums.add(keys + i * kv_cache::block + lane, [&](int q) { return query[q].vector[i]; });
      }
      for (int q = 0; q < Queries; ++q) {
        sums.store(q, scores + q * stride + first + lane);
      }
    });
  }
}

/// Turns scores into exp(score - max), zero past the query's length, and returns their sum.
template <class A>
float soften(float* scores, index_t length, index_t longest) {
  const simd::vfloat<A> top(simd::row_max<A>(scores, length));
  simd::map_row<A>(scores, length, scores,
                   [&](simd::vfloat<A> x) { return simd::exp_nonpositive<A>(x - top); });
  std::fill(scores + length, scores + longest, 0.0F);
  return simd::row_sum<A>(scores, length);
}

/// out = (sum over j of weight j * value j) / sum, for each query of the tile.
template <int Queries, class A>
void sum_values(const kv_cache& cache, index_t head, const attention_query* query, index_t length,
                const float* weights, index_t stride, const float* sums) {
  const index_t dim = cache.head_dim();
  const index_t padded = cache.padded_dim();
  for_lanes<groups_at_once<Queries, A>>(padded, [&]<int Groups>(index_t lane) {
    lane_sums<Queries, Groups, A> total;
    const float* values = cache.values(head) + lane;
    for (index_t j = 0; j < length; ++j) {
      total.add(values + j * padded, [&](int q) { return weights[q * stride + j]; });
    }
    alignas(moeroute::alignment) float lanes[Groups * moeroute::block_rows];
    for (int q = 0; q < Queries; ++q) {
      total.store(q, lanes);
      const index_t count = std::min<index_t>(dim - lane, Groups * moeroute::block_rows);
      for (index_t i = 0; i < count; ++i) {
        query[q].out[lane + i] = lanes[i] / sums[q];
      }
    }
  });
}

template <int Queries, class A>
void attend_tile(const kv_cache& cache, index_t head, const attention_query* query) {
  index_t longest = 0;
  for (int q = 0; q < Queries; ++q) {
    longest = std::max(longest, query[q].length);
  }
  const index_t stride = cache.positions();
  thread_local std::vector<float> scores;
  if (scores.size() < static_cast<std::size_t>(Queries * stride)) {
    scores.resize(static_cast<std::size_t>(Queries * stride));
  }
  score_keys<Queries, A>(cache, head, query, longest, scores.data(), stride);
  float sums[Queries];
  for (int q = 0; q < Queries; ++q) {
    sums[q] = soften<A>(scores.data() + q * stride, query[q].length, longest);
  }
  sum_values<Queries, A>(cache, head, query, longest, scores.data(), stride, sums);
}

}  // namespace detail

/// Attention of the queries of consecutive positions over a cache that holds
/// those positions and all before.
///
/// Shapes: queries and out [T, heads * head_dim], queries already scaled; row t
/// stands at position `first + t` and sees positions 0 to `first + t`.
template <class Exec, class A = moeroute::simd::default_arch>
void attend(const kv_cache& cache, index_t first, matrix_view<const float> queries,
            matrix_view<float> out, const Exec& exec) {
  const index_t dim = cache.head_dim();
  const index_t group = queries.cols / dim / cache.kv_heads();  // query heads per kv head
  const index_t per_head = queries.rows * group;
  constexpr index_t tile = 4;
  const index_t tiles = moeroute::ceil_div(per_head, tile);

  const auto run = [&](index_t head, index_t begin, index_t end) {
    detail::attention_query query[tile];
    for (index_t i = begin; i < end; ++i) {
      const index_t row = i / group;
      const index_t at = (head * group + i % group) * dim;
      query[i - begin] = {queries.row(row) + at, first + row + 1, out.row(row) + at};
    }
    index_t done = 0;
    for (; end - begin - done >= 4; done += 4) {
      detail::attend_tile<4, A>(cache, head, query + done);
    }
    for (; end - begin - done >= 2; done += 2) {
      detail::attend_tile<2, A>(cache, head, query + done);
    }
    if (done < end - begin) {
      detail::attend_tile<1, A>(cache, head, query + done);
    }
  };
  // Small work stays on the calling thread: starting a team costs more.
  const index_t all = cache.kv_heads() * tiles;
  const bool small = per_head * (first + queries.rows) * dim < (index_t{1} << 18);
  exec.parallel_for(all, small ? all : 4, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const index_t from = i % tiles * tile;
      run(i / tiles, from, std::min(from + tile, per_head));
    }
  });
}

}  // namespace example
