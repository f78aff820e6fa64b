// Experts over ranks: every rank has tokens, a gate and a part of the experts; y has the bits that
// one rank with everything would give.
//
//   mpirun -n 4 expert_parallel
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/mpi/expert_parallel_layer.hpp>
#include <moeroute/policy/router.hpp>

using namespace moeroute;

// Anybody's weights: a wave, the same on every rank.
static std::vector<float> wave(index_t n, double speed) {
  std::vector<float> v;
  for (index_t i = 0; i < n; ++i) v.push_back(static_cast<float>(std::sin(speed * double(i) + 1)));
  return v;
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  constexpr index_t experts = 16, d = 64, ff = 32;

  // Which rank holds which experts: here in order; a planner of placement/ may know better.
  const placement where = placement::contiguous(experts, ranks);
  const auto own = where.experts_of_rank(rank);
  swiglu_experts<> mine(std::max<index_t>(1, static_cast<index_t>(own.size())), d, ff);
  for (std::size_t slot = 0; slot < own.size(); ++slot) {
    const std::vector<float> w = wave(3 * d * ff, 0.1 + 0.01 * own[slot]);
    mine.set_gate(static_cast<expert_id>(slot), {w.data(), ff, d});
    mine.set_up(static_cast<expert_id>(slot), {w.data() + d * ff, ff, d});
    mine.set_down(static_cast<expert_id>(slot), {w.data() + 2 * d * ff, d, ff});
  }
  const std::vector<float> gate = wave(experts * d, 0.7);

  {
    mpi::expert_parallel_layer<router<softmax>, swiglu_experts<>> layer(
        MPI_COMM_WORLD,
        simd::packed_matrix<float>(matrix_view<const float>(gate.data(), experts, d)),
        {.selection = {.k = 2}, .weight = sum_normalized}, std::move(mine), where);

    // As many tokens as a rank happens to have: the first none.
    const index_t tokens = 100 * rank;
    const std::vector<float> x = wave(tokens * d, 0.3);
    std::vector<float> y(x.size());
    layer.forward({x.data(), tokens, d}, {y.data(), tokens, d});

    const mpi::parallel_counts& c = layer.counts();
    std::printf("rank %d: %td tokens, %td rows sent for %td choices, %td rows received\n", rank,
                c.tokens, c.rows_sent, c.entries_sent, c.rows_received);
  }
  MPI_Finalize();
}
