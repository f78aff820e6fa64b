// A model's experts over ranks, as the decoder sees them; who moves rows is behind it.
#pragma once

#include "steering.hpp"

#include <memory>
#include <ostream>

#include <moeroute/data/assignment.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows/gemm.hpp>

namespace example {

/// Every rank runs the same tokens; each serves a part of them and holds a part of every layer's
/// experts.
class expert_ranks {
 public:
  virtual ~expert_ranks() = default;
  virtual moeroute::index_t rank() const = 0;
  virtual moeroute::index_t ranks() const = 0;
  /// The experts [first, last) that this rank loads.
  moeroute::index_t first(moeroute::index_t experts) const {
    return (experts * rank() + ranks() - 1) / ranks();
  }
  moeroute::index_t last(moeroute::index_t experts) const {
    return (experts * (rank() + 1) + ranks() - 1) / ranks();
  }
  /// One more layer: its gate, router, and this rank's experts.
  virtual void take(moeroute::simd::packed_matrix<> gate, const plain_router& router,
                    moeroute::swiglu_experts<> own) = 0;
  /// What routing decided, and y of all tokens, on every rank.
  struct routed {
    const moeroute::assignment& choices;
    moeroute::matrix_view<const float> logits;
  };
  virtual routed forward(std::size_t layer, moeroute::matrix_view<const float> x,
                         moeroute::matrix_view<float> y) = 0;
  /// Rows per token, imbalance, shares of time.
  virtual void print(std::ostream& out) const = 0;
};

}  // namespace example
