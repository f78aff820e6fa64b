// Peer: libtorch, the chain of tensor operations that models write for their routers, over a whole
// batch on one thread.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <span>
#include <utility>
#include <vector>

#include <moeroute/policy/router_spec.hpp>

#include "support/plain_gate.hpp"

namespace bench {

/// The values of the k best columns of rows [n, experts], row by row, best first.
class torch_selection {
 public:
  torch_selection(index_t experts, index_t k) : experts_(experts), k_(k) { at::set_num_threads(1); }

  const float* operator()(const float* rows, index_t n) {
    const c10::InferenceMode inference;
    const at::Tensor logits = at::from_blob(const_cast<float*>(rows), {n, experts_});
    best_ = at::topk(logits, k_);
    return std::get<0>(best_).data_ptr<float>();
  }

 private:
  index_t experts_, k_;
  std::tuple<at::Tensor, at::Tensor> best_;
};

/// The weights of rows [n, experts] for the specs that choose the k best of softmax or of sigmoid,
/// with bias and groups.
class torch_gate {
 public:
  explicit torch_gate(const moeroute::router_spec& spec, std::span<const float> bias = {})
      : spec_(spec) {
    at::set_num_threads(1);
    if (spec.selection_bias)
      bias_ = at::tensor(std::vector<float>(bias.begin(), bias.end()), at::kFloat);
  }

  static bool can(const moeroute::router_spec& s) {
    using namespace moeroute;
    return plain_gate::can(s) && s.eps_where != eps_mode::clamp &&
           (s.score == score_kind::softmax || s.score == score_kind::sigmoid) &&
           (s.groups == 1 || s.group_score == group_score::top2_sum);
  }

  const float* operator()(const float* rows, index_t n) {
    using namespace moeroute;
    const c10::InferenceMode inference;
    const at::Tensor logits = at::from_blob(const_cast<float*>(rows), {n, spec_.experts});
    const bool softmax = spec_.score == score_kind::softmax;
    const bool over_choices = softmax && spec_.domain == score_domain::selected;
    const at::Tensor scores = over_choices ? logits
                              : softmax    ? at::softmax(logits, -1)
                                           : at::sigmoid(logits);
    if (spec_.selection_bias || spec_.groups > 1) {
      at::Tensor choice = spec_.selection_bias ? scores + bias_ : scores;
      if (spec_.groups > 1) choice = without_other_groups(choice, n);
      ids_ = std::get<1>(at::topk(choice, spec_.k, -1, true, false));
      weights_ = scores.gather(1, ids_);
    } else {
      std::tie(weights_, ids_) = at::topk(scores, spec_.k);
      if (over_choices) weights_ = at::softmax(weights_, -1);
    }
    if (spec_.normalize == normalization::sum) {
      at::Tensor sum = weights_.sum(-1, true);
      if (spec_.eps_where == eps_mode::add) sum += spec_.eps;
      weights_ /= sum;
    }
    if (const float factor = weight_factor(spec_); factor != 1.0f) weights_ = weights_ * factor;
    return weights_.data_ptr<float>();
  }

 private:
  at::Tensor without_other_groups(const at::Tensor& choice, index_t n) const {
    const index_t groups = spec_.groups, size = spec_.experts / groups;
    const at::Tensor grouped = choice.view({n, groups, size});
    const at::Tensor score = std::get<0>(at::topk(grouped, 2)).sum(-1);
    const at::Tensor best = std::get<1>(at::topk(score, spec_.topk_group, -1, true, false));
    const at::Tensor mask = at::zeros_like(score).scatter_(1, best, 1);
    const at::Tensor kept =
        mask.unsqueeze(-1).expand({n, groups, size}).reshape({n, groups * size});
    return choice.masked_fill(kept.logical_not(), spec_.group_fill);
  }

  moeroute::router_spec spec_;
  at::Tensor bias_, ids_, weights_;
};

}  // namespace bench
