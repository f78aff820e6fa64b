// Guesses at the experts that a layer will ask for, before it does.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows/gemm.hpp>

namespace moeroute {

/// Ranks the experts of a layer by how likely its next token asks for them, best first.
///
/// rank(layer, out) fills out and returns how many there are; saw(layer, ids) hears of what was
/// asked for, layer by layer in order. Everything is per request: one predictor, one stream.
template <class P>
concept expert_predictor =
    requires(P& p, index_t layer, std::span<expert_id> out, std::span<const expert_id> ids) {
      { p.rank(layer, out) } -> std::convertible_to<index_t>;
      p.saw(layer, ids);
    };

namespace detail {

// The experts with the largest values, the lowest among equals; those of 0 or less are no guess.
template <class T>
index_t rank_by(std::span<const T> value, std::vector<expert_id>& order, std::span<expert_id> out) {
  order.resize(value.size());
  std::iota(order.begin(), order.end(), 0);
  const auto n = static_cast<std::ptrdiff_t>(std::min(out.size(), value.size()));
  std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](expert_id a, expert_id b) {
    const T x = value[static_cast<std::size_t>(a)], y = value[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  });
  index_t found = 0;
  for (;
       found < n && value[static_cast<std::size_t>(order[static_cast<std::size_t>(found)])] > T{0};
       ++found)
    out[static_cast<std::size_t>(found)] = order[static_cast<std::size_t>(found)];
  return found;
}

inline void check_model(const char* where, index_t layers, index_t experts) {
  check_range(where, "layers", layers, 1, index_t{1} << 20);
  check_range(where, "experts", experts, 1, max_experts);
}
inline void check_seen(const char* where, index_t layer, index_t layers,
                       std::span<const expert_id> ids, index_t experts) {
  check_range(where, "layer", layer, 0, layers - 1);
  for (const expert_id e : ids) check_range(where, "expert", e, no_expert, experts - 1);
}

}  // namespace detail

/// What the layer's token before asked for.
class last_predictor {
 public:
  last_predictor(index_t layers, index_t experts) : experts_(experts) {
    detail::check_model("last_predictor", layers, experts);
    last_.resize(static_cast<std::size_t>(layers));
  }
  index_t rank(index_t layer, std::span<expert_id> out) {
    check_range("last_predictor", "layer", layer, 0, static_cast<index_t>(last_.size()) - 1);
    const auto& list = last_[static_cast<std::size_t>(layer)];
    const std::size_t n = std::min(out.size(), list.size());
    std::copy_n(list.begin(), n, out.begin());
    return static_cast<index_t>(n);
  }
  void saw(index_t layer, std::span<const expert_id> ids) {
    detail::check_seen("last_predictor", layer, static_cast<index_t>(last_.size()), ids, experts_);
    auto& list = last_[static_cast<std::size_t>(layer)];
    list.clear();
    for (const expert_id e : ids)
      if (e != no_expert) list.push_back(e);
  }

 private:
  index_t experts_;
  std::vector<std::vector<expert_id>> last_;
};

/// What the layer asked for lately: popularity = decay * popularity + [asked for].
class popularity_predictor {
 public:
  popularity_predictor(index_t layers, index_t experts, double decay = 0.99)
      : layers_(layers), experts_(experts), decay_(decay) {
    detail::check_model("popularity_predictor", layers, experts);
    if (!(decay >= 0.0 && decay <= 1.0))
      fail_value("popularity_predictor", "decay", decay, "0 to 1");
    value_.resize(static_cast<std::size_t>(layers * experts));
  }
  index_t rank(index_t layer, std::span<expert_id> out) {
    check_range("popularity_predictor", "layer", layer, 0, layers_ - 1);
    return detail::rank_by<double>(row(layer), order_, out);
  }
  void saw(index_t layer, std::span<const expert_id> ids) {
    detail::check_seen("popularity_predictor", layer, layers_, ids, experts_);
    for (double& v : row(layer)) v *= decay_;
    for (const expert_id e : ids)
      if (e != no_expert) row(layer)[static_cast<std::size_t>(e)] += 1.0;
  }

 private:
  std::span<double> row(index_t layer) {
    return std::span(value_).subspan(static_cast<std::size_t>(layer * experts_),
                                     static_cast<std::size_t>(experts_));
  }
  index_t layers_, experts_;
  double decay_;
  std::vector<double> value_;
  std::vector<expert_id> order_;
};

/// What followed in this layer where the layer before had the experts that it just had: counts
/// [L - 1][E][E], first order. The first layer has no guess.
class transition_predictor {
 public:
  transition_predictor(index_t layers, index_t experts) : layers_(layers), experts_(experts) {
    detail::check_model("transition_predictor", layers, experts);
    counts_.resize(static_cast<std::size_t>((layers - 1) * experts * experts));
    sum_.resize(static_cast<std::size_t>(experts));
  }
  index_t rank(index_t layer, std::span<expert_id> out) {
    check_range("transition_predictor", "layer", layer, 0, layers_ - 1);
    if (last_layer_ != layer - 1) return 0;  // of the first layer: nobody came before
    std::fill(sum_.begin(), sum_.end(), 0);
    for (const expert_id from : last_) {
      const auto row = counts(layer - 1, from);
      for (std::size_t e = 0; e < row.size(); ++e) sum_[e] += row[e];
    }
    return detail::rank_by<std::int64_t>(sum_, order_, out);
  }
  void saw(index_t layer, std::span<const expert_id> ids) {
    detail::check_seen("transition_predictor", layer, layers_, ids, experts_);
    if (last_layer_ == layer - 1)
      for (const expert_id from : last_)
        for (const expert_id to : ids)
          if (to != no_expert) ++counts(layer - 1, from)[static_cast<std::size_t>(to)];
    last_.clear();
    for (const expert_id e : ids)
      if (e != no_expert) last_.push_back(e);
    last_layer_ = layer;
  }
  /// How often an expert of a layer was followed by each of the next.
  /// Throws: error where the layer is the last one or none, or the id is no expert's.
  std::span<const std::int32_t> after(index_t layer, expert_id from) const {
    check_range("transition_predictor", "layer", layer, 0, layers_ - 2);
    check_range("transition_predictor", "expert", from, 0, experts_ - 1);
    return const_cast<transition_predictor&>(*this).counts(layer, from);
  }

 private:
  std::span<std::int32_t> counts(index_t layer, expert_id from) {
    return std::span(counts_).subspan(
        static_cast<std::size_t>((layer * experts_ + from) * experts_),
        static_cast<std::size_t>(experts_));
  }
  index_t layers_, experts_, last_layer_ = -1;
  std::vector<std::int32_t> counts_;
  std::vector<std::int64_t> sum_;
  std::vector<expert_id> last_, order_;
};

/// What the layer's own gate says of the hidden state that the layer before began with: the gate's
/// weights are all that it needs, one product of [E, d] with a vector.
///
/// Hand the state in with hidden() before rank(). The gates are the caller's.
class gate_predictor {
 public:
  explicit gate_predictor(std::span<const simd::packed_matrix<>* const> gates)
      : gates_(gates.begin(), gates.end()) {
    check_range("gate_predictor", "gates.size()", static_cast<index_t>(gates.size()), 1,
                index_t{1} << 20);
  }
  /// The state that the next rank() calls are of; it is copied.
  void hidden(std::span<const float> state) { state_.assign(state.begin(), state.end()); }
  /// No guess before the first state. Throws: error where there is no such layer, or the state has
  /// another width than its gate.
  index_t rank(index_t layer, std::span<expert_id> out) {
    check_range("gate_predictor", "layer", layer, 0, static_cast<index_t>(gates_.size()) - 1);
    const simd::packed_matrix<>& gate = *gates_[static_cast<std::size_t>(layer)];
    if (state_.empty()) return 0;
    check_size("gate_predictor", "hidden.size()", static_cast<index_t>(state_.size()), gate.cols());
    logits_.resize(static_cast<std::size_t>(gate.rows()));
    simd::gemm(matrix_view<const float>(state_.data(), 1, gate.cols()), gate,
               matrix_view<float>(logits_.data(), 1, gate.rows()));
    // Order alone counts: what is least becomes just above no guess.
    const float least = *std::min_element(logits_.begin(), logits_.end());
    for (float& z : logits_) z = z - least + 1.0f;
    return detail::rank_by<float>(logits_, order_, out);
  }
  void saw(index_t, std::span<const expert_id>) {}

 private:
  std::vector<const simd::packed_matrix<>*> gates_;
  std::vector<float> state_, logits_;
  std::vector<expert_id> order_;
};

static_assert(expert_predictor<last_predictor> && expert_predictor<popularity_predictor> &&
              expert_predictor<transition_predictor> && expert_predictor<gate_predictor>);

/// Of what was asked for, the share that was among the guesses.
class recall_meter {
 public:
  void add(std::span<const expert_id> guesses, std::span<const expert_id> asked) {
    for (const expert_id e : asked) {
      if (e == no_expert) continue;
      ++asked_;
      found_ += std::find(guesses.begin(), guesses.end(), e) != guesses.end();
    }
  }
  std::int64_t asked() const { return asked_; }
  double recall() const {
    return asked_ == 0 ? 0.0 : static_cast<double>(found_) / static_cast<double>(asked_);
  }

 private:
  std::int64_t asked_ = 0, found_ = 0;
};

}  // namespace moeroute
