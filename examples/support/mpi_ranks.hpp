// A model's experts over the ranks of MPI_COMM_WORLD.
#pragma once

#include "error.hpp"
#include "expert_ranks.hpp"
#include "report.hpp"

#include <algorithm>
#include <chrono>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/mpi/expert_parallel.hpp>
#include <moeroute/placement/loads.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/route.hpp>

namespace example {

/// MPI from the first to the last line of main.
class mpi_session {
 public:
  mpi_session(int& argc, char**& argv) {
    int given = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &given);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks_);
  }
  mpi_session(const mpi_session&) = delete;
  mpi_session& operator=(const mpi_session&) = delete;
  ~mpi_session() { MPI_Finalize(); }
  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  /// The greatest of all ranks' exit codes.
  static int worst(int code) {
    int all = code;
    MPI_Allreduce(&code, &all, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    return all;
  }

 private:
  int rank_ = 0, ranks_ = 1;
};

class mpi_ranks : public expert_ranks {
 public:
  mpi_ranks(moeroute::index_t rank, moeroute::index_t ranks) : rank_(rank), ranks_(ranks) {}

  moeroute::index_t rank() const override { return rank_; }
  moeroute::index_t ranks() const override { return ranks_; }

  void take(moeroute::simd::packed_matrix<> gate, const plain_router& router,
            moeroute::swiglu_experts<> own) override {
    const auto experts = gate.rows();
    moeroute::mpi::parallel_options options;
    options.layer = static_cast<std::int32_t>(layers_.size());
    layers_.push_back(
        {std::move(gate),
         router,
         std::move(own),
         std::make_unique<moeroute::mpi::expert_parallel<>>(
             MPI_COMM_WORLD, moeroute::placement::contiguous(experts, ranks_), options),
         {},
         std::vector<double>(static_cast<std::size_t>(experts), 0.0)});
  }

  routed forward(std::size_t index, moeroute::matrix_view<const float> x,
                 moeroute::matrix_view<float> y) override {
    using namespace moeroute;
    layer& l = layers_[index];
    const auto began = std::chrono::steady_clock::now();
    const index_t tokens = x.rows, d = x.cols;
    logits_.resize(tokens * l.gate.rows());
    const matrix_view<float> logits(logits_.data(), tokens, l.gate.rows());
    gate(x, l.gate, logits);
    route(l.router, logits, side_inputs{}, memory_, l.choices);
    // A part of the tokens for each rank; with fewer tokens than ranks some have none.
    const auto edge = [&](index_t r) { return tokens * r / ranks_; };
    const index_t first = edge(rank_), n = edge(rank_ + 1) - first;
    copy_tokens(l.choices, first, n, own_);
    for (const expert_id e : own_.ids()) l.load[static_cast<std::size_t>(e)] += 1.0;
    const auto routed_at = std::chrono::steady_clock::now();
    l.exchange->forward(x.middle_rows(first, n), own_, y.middle_rows(first, n), l.experts);
    tokens_ += static_cast<double>(n);
    rows_ +=
        static_cast<double>(l.exchange->counts().rows_sent - l.exchange->plan().rows_to(rank_));
    const auto exchanged_at = std::chrono::steady_clock::now();
    // All tokens on every rank again: attention sees them all.
    std::vector<int> count, offset;
    for (index_t r = 0; r < ranks_; ++r) {
      count.push_back(static_cast<int>((edge(r + 1) - edge(r)) * d));
      offset.push_back(static_cast<int>(edge(r) * d));
    }
    gathered_.assign(y.data + first * y.stride, y.data + (first + n) * y.stride);
    MPI_Allgatherv(gathered_.data(), count[static_cast<std::size_t>(rank_)], MPI_FLOAT, y.data,
                   count.data(), offset.data(), MPI_FLOAT, MPI_COMM_WORLD);
    const auto done = std::chrono::steady_clock::now();
    routing_ += routed_at - began;
    exchange_ += exchanged_at - routed_at;
    gather_ += done - exchanged_at;
    return {l.choices, logits};
  }

  void print(std::ostream& out) const override {
    // Collective: every rank asks.
    double sums[2] = {rows_, tokens_};
    MPI_Allreduce(MPI_IN_PLACE, sums, 2, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    double imbalance = 0.0;
    for (const layer& l : layers_) {
      std::vector<double> load = l.load;
      MPI_Allreduce(MPI_IN_PLACE, load.data(), static_cast<int>(load.size()), MPI_DOUBLE, MPI_SUM,
                    MPI_COMM_WORLD);
      imbalance +=
          moeroute::balance_of(moeroute::rank_loads(l.exchange->experts(), load)).imbalance /
          static_cast<double>(layers_.size());
    }
    const double routing = std::chrono::duration<double>(routing_).count(),
                 exchange = std::chrono::duration<double>(exchange_).count(),
                 gather = std::chrono::duration<double>(gather_).count(),
                 all = std::max(1e-12, routing + exchange + gather);
    using detail::fixed;
    out << "ranks       " << ranks_ << ", " << layers_.size()
        << " layers\nrows sent to other ranks per token and layer "
        << fixed(sums[0] / std::max(1.0, sums[1]), 3) << "\nimbalance   " << fixed(imbalance, 3)
        << " (busiest rank over the mean, mean over layers)\nlayer time  routing "
        << fixed(100 * routing / all, 1) << " %, exchange and experts "
        << fixed(100 * exchange / all, 1) << " %, gathering " << fixed(100 * gather / all, 1)
        << " %\n";
  }

 private:
  struct layer {
    moeroute::simd::packed_matrix<> gate;
    plain_router router;
    moeroute::swiglu_experts<> experts;
    std::unique_ptr<moeroute::mpi::expert_parallel<>> exchange;
    moeroute::assignment choices;
    std::vector<double> load;
  };

  moeroute::index_t rank_, ranks_;
  std::vector<layer> layers_;
  moeroute::assignment own_;
  moeroute::buffer<float> logits_;
  moeroute::workspace memory_;
  std::vector<float> gathered_;
  double rows_ = 0.0, tokens_ = 0.0;
  std::chrono::steady_clock::duration routing_{}, exchange_{}, gather_{};
};

}  // namespace example
