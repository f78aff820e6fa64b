// Routers that decide how deep a sequence or a token goes, each in a few calls of the library.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <moeroute/layer/mixture_of_depths.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/stage/gates/mlp.hpp>
#include <moeroute/stage/sequences.hpp>
#include <span>
#include <utility>
#include <vector>

namespace example {

using moeroute::expert_id;
using moeroute::index_t;
using moeroute::matrix_view;
using sequence_cuts = std::span<const std::int32_t>;

/// MindSkip (router tuning): a sequence passes an attention block, or all of its tokens skip it, by
/// the mean of its prompt. What was decided for the prompt holds for every token decoded after it.
class mind_skip {
 public:
  explicit mind_skip(moeroute::linear_gate<> gate) : gate_(std::move(gate)) {}

  /// Of a prompt: x [T, d].
  void decide(matrix_view<const float> x, sequence_cuts offsets) {
    const auto sequences = static_cast<index_t>(offsets.size()) - 1;
    memory_.resize(sequences * (x.cols + 1));
    const matrix_view<float> pooled(memory_.data(), sequences, x.cols),
        logits(memory_.data() + sequences * x.cols, sequences, 1);
    moeroute::pool_rows(x, offsets, pooled);
    moeroute::gate(pooled, gate_, logits);
    moeroute::route(router_, logits, ws_, decisions_);
  }

  /// block(sequence, rows in place), for the sequences that do not skip it.
  template <class Block>
  void run(matrix_view<float> x, sequence_cuts offsets, Block&& block) const {
    static constexpr std::int32_t once[] = {1};
    moeroute::repeat_block(decisions_, offsets, once, x, block);
  }

  [[nodiscard]] const moeroute::assignment& decisions() const { return decisions_; }

 private:
  moeroute::linear_gate<> gate_;  // [1, d]
  moeroute::threshold_router<moeroute::sigmoid> router_{.threshold = 0.5f};
  moeroute::buffer<float> memory_;
  moeroute::workspace ws_;
  moeroute::assignment decisions_;
};

/// Dr.LLM: each layer is skipped, executed or repeated for a sequence. A small network sees the
/// mean of each window, the mean of its logits over windows decides.
class skip_execute_repeat {
 public:
  skip_execute_repeat(moeroute::mlp_gate<> gate, index_t window)
      : gate_(std::move(gate)), window_(window) {}

  template <class Block>
  void run(matrix_view<float> x, sequence_cuts offsets, Block&& block) {
    const auto sequences = static_cast<index_t>(offsets.size()) - 1;
    windows_.resize(static_cast<std::size_t>(sequences + x.rows + 1));
    const index_t n = moeroute::window_offsets(offsets, window_, windows_);
    windows_of_.assign(1, 0);  // the windows of every sequence
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
      windows_of_.push_back(windows_of_.back() + static_cast<std::int32_t>(moeroute::ceil_div(
                                                     offsets[s + 1] - offsets[s], window_)));
    memory_.resize(n * x.cols + 3 * n + 3 * sequences);
    const matrix_view<float> pooled(memory_.data(), n, x.cols),
        of_window(pooled.row(0) + n * x.cols, n, 3), logits(of_window.data + 3 * n, sequences, 3);
    moeroute::pool_rows(x, sequence_cuts(windows_).first(static_cast<std::size_t>(n) + 1), pooled);
    moeroute::gate(pooled, gate_, of_window, ws_);
    moeroute::pool_rows(of_window, windows_of_, logits);
    moeroute::route(router_, logits, ws_, decisions_);
    static constexpr std::int32_t times[] = {0, 1, 2};
    moeroute::repeat_block(decisions_, offsets, times, x, block);
  }

  [[nodiscard]] const moeroute::assignment& decisions() const { return decisions_; }

 private:
  moeroute::mlp_gate<> gate_;  // [3, d]
  index_t window_;
  moeroute::router<moeroute::softmax> router_{.selection = {.k = 1}};
  std::vector<std::int32_t> windows_, windows_of_;
  moeroute::buffer<float> memory_;
  moeroute::workspace ws_;
  moeroute::assignment decisions_;
};

/// Union of Experts: the slices of one dense network are experts, and a sequence takes k of them by
/// its mean; their sum is the network's output, the whole of it where k is all.
class union_of_experts {
 public:
  union_of_experts(moeroute::linear_gate<> gate, index_t k)
      : gate_(std::move(gate)), router_{.selection = {.k = k}} {}

  /// slice(expert, in, out) is the slice's part of the output.
  template <class Slice>
  void forward(matrix_view<const float> x, sequence_cuts offsets, matrix_view<float> y,
               Slice&& slice) {
    const auto sequences = static_cast<index_t>(offsets.size()) - 1;
    pooled_.resize(sequences * (x.cols + gate_.columns()));
    const matrix_view<float> pooled(pooled_.data(), sequences, x.cols),
        logits(pooled_.data() + sequences * x.cols, sequences, gate_.columns());
    moeroute::pool_rows(x, offsets, pooled);
    moeroute::gate(pooled, gate_, logits);
    moeroute::route(router_, logits, ws_, decisions_);
    sequence_of_.resize(static_cast<std::size_t>(x.rows));
    moeroute::sequences_of_tokens(offsets, sequence_of_);
    moeroute::spread_to_tokens(decisions_, sequence_of_, choices_);
    moeroute::plan(choices_, plan_);
    slots_.resize(2 * plan_.slots() * x.cols);
    const matrix_view<float> in(slots_.data(), plan_.slots(), x.cols),
        out(slots_.data() + plan_.slots() * x.cols, plan_.slots(), x.cols);
    moeroute::dispatch(x, plan_, in);
    moeroute::for_each_expert(plan_, in, out, slice);
    moeroute::combine(out, plan_, choices_, y,
                      moeroute::combine_options<>{.weight = moeroute::combine_weight::one});
  }

  [[nodiscard]] const moeroute::assignment& decisions() const { return decisions_; }

 private:
  moeroute::linear_gate<> gate_;  // [E, d]
  moeroute::router<moeroute::softmax> router_;
  moeroute::buffer<float> pooled_, slots_;
  std::vector<std::int32_t> sequence_of_;
  moeroute::workspace ws_;
  moeroute::assignment decisions_, choices_;
  moeroute::dispatch_plan plan_;
};

/// FTP: tokens are pruned layer by layer by four figures of theirs (position, attention score, its
/// rank, the share that is kept), not by their states: a mixture of depths whose gate reads rows of
/// its own. forward(x, figures, x).
template <class Block>
auto pruned_tokens(moeroute::linear_gate<> of_figures, Block block, double share, index_t length,
                   index_t d) {
  return moeroute::mixture_of_depths<moeroute::sigmoid>(
      std::move(of_figures), std::move(block), {.share = share, .sequence_length = length}, d);
}

/// Duo-LLM's oracle: the option (skip, small, big) that every layer should take for a token, found
/// by trying all paths that fit into a budget. What a trained router reaches is held against it.
///
/// loss(path) is the token's with one option per layer; of equal losses the cheaper path is kept,
/// of these the first. No path, and a loss of infinity, where none fits or there is no option.
/// Cost: options ^ layers losses.
template <class Loss>
std::pair<std::vector<std::int32_t>, double> oracle_path(index_t layers,
                                                         std::span<const double> cost,
                                                         double budget, Loss&& loss) {
  std::vector<std::int32_t> path(static_cast<std::size_t>(layers)), best;
  double least = std::numeric_limits<double>::infinity(), least_cost = least;
  for (bool more = layers == 0 || !cost.empty(); more;) {
    double spent = 0.0;
    for (const std::int32_t option : path) spent += cost[static_cast<std::size_t>(option)];
    if (spent <= budget) {
      const double here = loss(std::span<const std::int32_t>(path));
      if (here < least || (here == least && spent < least_cost)) {
        best = path;
        least = here;
        least_cost = spent;
      }
    }
    // The next path: the last layer counts fastest.
    more = false;
    for (std::size_t l = path.size(); l > 0 && !more;) {
      --l;
      more = ++path[l] < static_cast<std::int32_t>(cost.size());
      if (!more) path[l] = 0;
    }
  }
  return {best, least};
}

}  // namespace example
