// The model's router, and what steers it when memory is short: a cache of experts per layer and a
// rule by which choices give way to it, or a rule for batches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/data/expert_cache.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/residency/resident_router.hpp>
#include <moeroute/residency/union.hpp>
#include <moeroute/stage/route.hpp>

namespace example {

using plain_router = moeroute::router<moeroute::softmax>;

/// What a layer's choices went through: tokens one after the other, as in decoding.
class layer_steering {
 public:
  layer_steering(const plain_router& plain, const moeroute::residency_rule& rule,
                 const moeroute::expert_cache_options& options)
      : cache_(std::make_unique<moeroute::expert_cache>(options)),
        resident_(std::in_place, plain, rule, cache_->resident(), &counts) {}
  /// `batch` tokens that follow one another agree on their experts.
  layer_steering(const plain_router& plain, const moeroute::union_rule& rule,
                 moeroute::index_t batch)
      : batch_(batch), union_(std::in_place, plain, rule, &batches) {}
  layer_steering(const layer_steering&) = delete;
  layer_steering& operator=(const layer_steering&) = delete;

  moeroute::residency_counts counts;
  moeroute::union_counts batches;
  std::int64_t lookups = 0, hits = 0;
  /// Hears of every expert that has to be read.
  std::function<void(moeroute::expert_id)> on_load = [](moeroute::expert_id) {};

  [[nodiscard]] std::int64_t loads() const { return lookups - hits; }
  /// Experts used, hit or not.
  void uses(std::span<std::int64_t> out) const { cache_->uses(out); }

  void route(const moeroute::logit_block& z, moeroute::choice_block& c) {
    const moeroute::index_t step = union_ ? batch_ : 1;
    for (moeroute::index_t first = 0; first < z.rows; first += step) {
      const moeroute::index_t rows = std::min<moeroute::index_t>(step, z.rows - first);
      const moeroute::matrix_view<const float> part(z.row(static_cast<int>(first)), rows, z.experts,
                                                    z.stride);
      if (union_)
        moeroute::route(*union_, part, memory_, choices_);
      else
        moeroute::route(*resident_, part, memory_, choices_);
      for (moeroute::index_t i = 0; i < rows; ++i)
        for (int r = 0; r < c.k; ++r) {
          const auto from = static_cast<std::size_t>(i * c.k + r);
          c.id[r * moeroute::block_rows + first + i] = choices_.ids()[from];
          c.value[r * moeroute::block_rows + first + i] = choices_.weights()[from];
        }
      if (union_) continue;
      const auto found = cache_->step(choices_.ids(0));
      hits += found.hits;
      lookups += found.hits + static_cast<std::int64_t>(found.loads.size());
      for (const std::int32_t e : found.loads) on_load(e);
    }
  }

 private:
  moeroute::index_t batch_ = 1;
  std::unique_ptr<moeroute::expert_cache> cache_;
  std::optional<moeroute::resident_router<plain_router>> resident_;
  std::optional<moeroute::union_router<moeroute::softmax>> union_;
  moeroute::workspace memory_;
  moeroute::assignment choices_;
};

/// The router of the bundled models. Unless somebody steers it, it is the plain one.
///
/// Steered, tokens are routed in their order, so by one thread (at most 1024 of them at once).
class steered_router {
 public:
  steered_router() = default;
  explicit steered_router(plain_router plain) : plain_(std::move(plain)) {}

  [[nodiscard]] const plain_router& plain() const { return plain_; }
  /// From now on; nullptr: nobody. It must outlive what it steers.
  void steer(layer_steering* by) const { *by_ = by; }

  [[nodiscard]] moeroute::index_t k() const { return plain_.k(); }
  static moeroute::index_t experts(moeroute::index_t columns) { return columns; }
  [[nodiscard]] moeroute::side_use reads_side(moeroute::index_t columns) const {
    return plain_.reads_side(columns);
  }
  void check(moeroute::index_t experts) const { plain_.check(experts); }
  auto carve(moeroute::scratch& tape, moeroute::index_t experts) const {
    return plain_.carve(tape, experts);
  }
  void route_block(const moeroute::logit_block& z, const plain_router::buffers& memory,
                   moeroute::choice_block& c) const {
    if (*by_ == nullptr)
      plain_.route_block(z, memory, c);
    else
      (*by_)->route(z, c);
  }
  [[nodiscard]] moeroute::index_t rows_alone(moeroute::index_t experts) const {
    return *by_ == nullptr ? plain_.rows_alone(experts) : 0;
  }
  void route_row(const float* z, moeroute::index_t experts, moeroute::index_t token,
                 const moeroute::side_inputs& side, moeroute::expert_id* id, float* weights) const {
    plain_.route_row(z, experts, token, side, id, weights);
  }

 private:
  plain_router plain_;
  std::shared_ptr<layer_steering*> by_ = std::make_shared<layer_steering*>(nullptr);
};
static_assert(moeroute::row_router<steered_router>);

}  // namespace example
