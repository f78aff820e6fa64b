// Peer: ggml, the graph that engines on it compute for the router of every layer, by its CPU
// backend over a whole batch on one thread.
#pragma once

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <stdexcept>
#include <vector>

#include <moeroute/policy/router_spec.hpp>

#include "support/plain_gate.hpp"

namespace bench {

/// A graph over rows [n, columns], built anew where n is not that of the call before. Its tensors
/// have their fastest dimension first: rows are [columns, n], and the same memory value by value,
/// to gather from, is [1, columns, n]. Copies share the graph.
class ggml_batch {
 public:
  explicit ggml_batch(index_t columns) : columns_(columns) {}

  /// What build(context, rows, cells) returned, computed; stays until the next call.
  template <class Build>
  const ggml_tensor* operator()(const float* rows, index_t n, Build build) {
    if (n != n_) start(rows, n, build);
    rows_->data = cells_->data = const_cast<float*>(rows);
    if (ggml_backend_graph_compute(cpu(), graph_) != GGML_STATUS_SUCCESS)
      throw std::runtime_error("ggml did not compute its graph");
    return result_;
  }

  /// A tensor over memory of the caller's.
  static ggml_tensor* over(ggml_context* context, const float* data, std::int64_t columns,
                           std::int64_t rows = 1, std::int64_t planes = 1) {
    ggml_tensor* tensor = ggml_new_tensor_3d(context, GGML_TYPE_F32, columns, rows, planes);
    tensor->data = const_cast<float*>(data);
    return tensor;
  }

 private:
  static ggml_backend_t cpu() {
    static const std::shared_ptr<ggml_backend> backend = [] {
      ggml_backend_load_all();  // nothing to do where the CPU backend is linked
      const std::shared_ptr<ggml_backend> found(
          ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr), ggml_backend_free);
      if (!found) throw std::runtime_error("ggml found no CPU backend to load");
      const auto registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(found.get()));
      const auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
          ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
      if (!set_threads) throw std::runtime_error("ggml cannot be kept to one thread");
      set_threads(found.get(), 1);
      return found;
    }();
    return backend.get();
  }

  template <class Build>
  void start(const float* rows, index_t n, Build build) {
    constexpr std::size_t tensors = 64;
    context_.reset(ggml_init({.mem_size = tensors * ggml_tensor_overhead() + ggml_graph_overhead(),
                              .mem_buffer = nullptr,
                              .no_alloc = true}),
                   ggml_free);
    rows_ = over(context_.get(), rows, columns_, n);
    cells_ = over(context_.get(), rows, 1, columns_, n);
    result_ = build(context_.get(), rows_, cells_);
    ggml_set_output(result_);
    graph_ = ggml_new_graph(context_.get());
    ggml_build_forward_expand(graph_, result_);
    // Engines let results share memory as soon as nobody needs them any more.
    memory_.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(cpu())), ggml_gallocr_free);
    if (!ggml_gallocr_alloc_graph(memory_.get(), graph_))
      throw std::runtime_error("ggml has no memory for its graph");
    n_ = n;
  }

  index_t columns_, n_ = 0;
  std::shared_ptr<ggml_context> context_;
  std::shared_ptr<ggml_gallocr> memory_;
  ggml_cgraph* graph_ = nullptr;
  ggml_tensor *rows_ = nullptr, *cells_ = nullptr, *result_ = nullptr;
};

/// The values of the k best columns of rows [n, experts], row by row, in no order. ggml gives the
/// ids; a loop reads the values off.
class ggml_selection {
 public:
  ggml_selection(index_t experts, index_t k) : experts_(experts), k_(k), batch_(experts) {}

  const float* operator()(const float* rows, index_t n) {
    const ggml_tensor* best =
        batch_(rows, n, [&](ggml_context* context, ggml_tensor* logits, ggml_tensor*) {
          return ggml_top_k(context, logits, static_cast<int>(k_));
        });
    const auto* id = static_cast<const std::int32_t*>(best->data);
    value_.resize(static_cast<std::size_t>(n * k_));
    float* to = value_.data();
    for (index_t t = 0; t < n; ++t, rows += experts_)
      for (index_t r = 0; r < k_; ++r) *to++ = rows[*id++];
    return value_.data();
  }

 private:
  index_t experts_, k_;
  ggml_batch batch_;
  std::vector<float> value_;
};

/// The weights of rows [n, experts] for the specs that choose the k best of softmax or of sigmoid,
/// with bias and groups.
class ggml_gate {
 public:
  explicit ggml_gate(const moeroute::router_spec& spec, std::span<const float> bias = {})
      : spec_(spec), bias_(bias), batch_(spec.experts) {}

  static bool can(const moeroute::router_spec& s) {
    using namespace moeroute;
    return plain_gate::can(s) &&
           (s.score == score_kind::softmax || s.score == score_kind::sigmoid) &&
           (s.groups == 1 || s.group_score != group_score::top_sum);
  }

  const float* operator()(const float* rows, index_t n) {
    const ggml_tensor* weights =
        batch_(rows, n, [&](ggml_context* context, ggml_tensor* logits, ggml_tensor* cells) {
          return build(context, logits, cells);
        });
    return static_cast<const float*>(weights->data);
  }

 private:
  ggml_tensor* build(ggml_context* context, ggml_tensor* logits, ggml_tensor* cells) const {
    using namespace moeroute;
    const bool softmax = spec_.score == score_kind::softmax;
    const bool over_choices = softmax && spec_.domain == score_domain::selected;
    const std::int64_t n = logits->ne[1];
    ggml_tensor* choice = logits;
    if (!over_choices) {
      choice = softmax ? ggml_soft_max(context, logits) : ggml_sigmoid(context, logits);
      cells = ggml_reshape_3d(context, choice, 1, spec_.experts, n);
    }
    if (spec_.selection_bias)
      choice = ggml_add(context, choice, ggml_batch::over(context, bias_.data(), spec_.experts));
    if (spec_.groups > 1) choice = without_other_groups(context, choice, n);
    ggml_tensor* weights =
        ggml_reshape_2d(context, gather(context, cells, choice, spec_.k), spec_.k, n);
    if (over_choices) weights = ggml_soft_max(context, weights);
    if (spec_.normalize == normalization::sum) {
      ggml_tensor* sum = ggml_sum_rows(context, weights);
      if (spec_.eps_where == eps_mode::add) sum = ggml_scale_bias(context, sum, 1.0f, spec_.eps);
      if (spec_.eps_where == eps_mode::clamp)
        sum = ggml_clamp(context, sum, spec_.eps, std::numeric_limits<float>::infinity());
      weights = ggml_div(context, weights, sum);
    }
    if (const float factor = weight_factor(spec_); factor != 1.0f)
      weights = ggml_scale(context, weights, factor);
    return weights;
  }

  // Those `values` [width, m, n] whose `scores` [m, n] are the `count` best.
  static ggml_tensor* gather(ggml_context* context, ggml_tensor* values, ggml_tensor* scores,
                             index_t count) {
    // Engines sort for their choice of experts: backends fuse this chain where they know it.
    return ggml_get_rows(context, values,
                         ggml_argsort_top_k(context, scores, static_cast<int>(count)));
  }

  ggml_tensor* without_other_groups(ggml_context* context, ggml_tensor* choice,
                                    std::int64_t n) const {
    const std::int64_t groups = spec_.groups, size = spec_.experts / groups;
    // A group's best or its two best; all groups of all rows one after the other.
    const index_t count = spec_.group_score == moeroute::group_score::top2_sum ? 2 : 1;
    ggml_tensor* score = gather(context, ggml_reshape_3d(context, choice, 1, size, groups * n),
                                ggml_reshape_2d(context, choice, size, groups * n), count);
    if (count == 2)
      score = ggml_sum_rows(context, ggml_reshape_2d(context, score, count, groups * n));
    ggml_tensor* best = ggml_argsort_top_k(context, ggml_reshape_2d(context, score, groups, n),
                                           static_cast<int>(spec_.topk_group));
    ggml_tensor* grouped = ggml_reshape_3d(context, choice, size, groups, n);
    ggml_tensor* kept = ggml_set_rows(context, ggml_fill(context, grouped, spec_.group_fill),
                                      ggml_get_rows(context, grouped, best), best);
    return ggml_reshape_2d(context, kept, spec_.experts, n);
  }

  moeroute::router_spec spec_;
  std::span<const float> bias_;
  ggml_batch batch_;
};

}  // namespace bench
