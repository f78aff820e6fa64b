// A whole mixture-of-experts layer over ranks: gate and router at home, experts wherever they are.
#pragma once

#include <exception>
#include <span>
#include <utility>

#include <moeroute/mpi/expert_parallel.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/route.hpp>

namespace moeroute::mpi {

/// y = the weighted sum over each token's chosen experts of expert(x), experts spread over the
/// ranks of a communicator.
///
/// Every rank has the whole gate and the same router, and the experts of its own slots: Experts is
/// called with local slot numbers (a swiglu_experts of placement.slots(rank) experts). Collective
/// and deterministic as expert_parallel; routers that see the whole batch are refused: they would
/// decide by each rank's own.
template <class Router, class Experts, storage Gate = float, class A = simd::default_arch>
class expert_parallel_layer {
 public:
  static_assert(!batch_router<Router>,
                "[moeroute::expert_parallel_layer] a router that sees the whole batch would see a "
                "rank's only");

  /// Collective. Throws: error where router, experts or placement do not fit the gate.
  expert_parallel_layer(MPI_Comm comm, simd::packed_matrix<Gate, A> gate, Router router,
                        Experts experts, placement where, const parallel_options& options = {})
      : gate_(std::move(gate)),
        router_(std::move(router)),
        experts_(std::move(experts)),
        exchange_(comm, std::move(where), options) {
    router_.check(gate_.rows());
    if constexpr (requires { router_.experts(index_t{}); })
      check_size("expert_parallel_layer", "placement.experts()", exchange_.experts().experts(),
                 router_.experts(gate_.rows()));
    else
      check_size("expert_parallel_layer", "placement.experts()", exchange_.experts().experts(),
                 gate_.rows());
    const index_t slots = exchange_.experts().slots(exchange_.rank());
    if constexpr (requires { experts_.experts(); })
      check_range("expert_parallel_layer", "experts.experts()", experts_.experts(), slots,
                  max_experts);
  }

  /// Shapes: x and y [T, d], T of this rank's own, also 0. Collective. Throws: on every rank where
  /// one fails in the exchange; what route() throws of this rank's tokens is thrown on every rank
  /// too.
  template <executor Exec = serial>
  void forward(const matrix_view<const float>& x, const matrix_view<float>& y,
               const side_inputs& side = {}, const Exec& exec = {}) {
    const auto choose = [&] {
      logits_.resize(size_product(x.rows, gate_.rows()));
      const matrix_view<float> logits(logits_.data(), x.rows, gate_.rows());
      gate(x, gate_, logits, exec);
      route(router_, logits, side, workspace_, choices_, exec);
    };
#if MOEROUTE_EXCEPTIONS
    try {
      choose();
    } catch (...) {
      // The others wait in the exchange: choices that do not fit make them throw as well.
      choices_.reset(0, exchange_.experts().experts(), 1);
      const std::exception_ptr thrown = std::current_exception();
      try {
        exchange_.forward(matrix_view<const float>(x.data, x.rows + 1, x.cols, x.stride), choices_,
                          y, experts_, exec);
      } catch (...) {
      }
      std::rethrow_exception(thrown);
    }
#else
    choose();
#endif
    exchange_.forward(x, choices_, y, experts_, exec, side.mask);
  }

  /// Of the last call: every token's experts and weights; what was sent and received.
  const assignment& choices() const { return choices_; }
  const parallel_counts& counts() const { return exchange_.counts(); }
  expert_parallel<float, A>& exchange() { return exchange_; }
  Experts& experts() { return experts_; }

 private:
  simd::packed_matrix<Gate, A> gate_;
  Router router_;
  Experts experts_;
  expert_parallel<float, A> exchange_;
  buffer<float> logits_;
  workspace workspace_;
  assignment choices_;
};

}  // namespace moeroute::mpi
