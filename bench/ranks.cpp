// What an exchange over MPI costs beside its floors: run it by mpirun, with as many ranks as there
// are processors to spare.
//
//   mpirun -n 2 bench_ranks [SECONDS PER ROW]
//
// All ways to do the same take turns in one run; a turn ends when the slowest rank has ended, the
// median turn counts.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/mpi/expert_parallel.hpp>
#include <moeroute/stage/plan.hpp>

#include "support/moving.hpp"

namespace {

using namespace moeroute;
using floats = std::vector<float>;

int me = 0, ranks = 1;
double seconds_per_row = 1.0;

using turn = std::function<void()>;

// Microseconds of each, medians.
std::vector<double> compete(const std::vector<turn>& turns) {
  std::vector<std::vector<double>> seen(turns.size());
  const auto began = std::chrono::steady_clock::now();
  for (int round = -2, go = 1; go != 0; ++round) {
    for (std::size_t i = 0; i < turns.size(); ++i) {
      MPI_Barrier(MPI_COMM_WORLD);
      const auto from = std::chrono::steady_clock::now();
      turns[i]();
      double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - from)
                      .count();
      MPI_Allreduce(MPI_IN_PLACE, &us, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
      if (round >= 0) seen[i].push_back(us);
    }
    const double spent =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    go = round < 8 || (spent < seconds_per_row && round < 20000) ? 1 : 0;
    MPI_Bcast(&go, 1, MPI_INT, 0, MPI_COMM_WORLD);
  }
  std::vector<double> medians;
  for (std::vector<double>& s : seen) {
    std::nth_element(s.begin(), s.begin() + static_cast<std::ptrdiff_t>(s.size() / 2), s.end());
    medians.push_back(s[s.size() / 2]);
  }
  return medians;
}

// Messages of so many bytes between every pair, from buffers that are ready.
struct plain_messages {
  std::vector<char> out, in;
  index_t bytes;
  std::vector<int> counts, offsets;

  explicit plain_messages(index_t n)
      : out(static_cast<std::size_t>(n * ranks)), in(out.size()), bytes(n) {
    for (int r = 0; r < ranks; ++r) {
      counts.push_back(r == me ? 0 : static_cast<int>(n));
      offsets.push_back(static_cast<int>(r * n));
    }
  }
  void pairs() {
    std::vector<MPI_Request> requests;
    for (int i = 1; i < ranks; ++i) {
      const int from = (me + ranks - i) % ranks;
      requests.emplace_back();
      MPI_Irecv(in.data() + from * bytes, static_cast<int>(bytes), MPI_BYTE, from, 1,
                MPI_COMM_WORLD, &requests.back());
    }
    for (int i = 1; i < ranks; ++i) {
      const int to = (me + i) % ranks;
      requests.emplace_back();
      MPI_Isend(out.data() + to * bytes, static_cast<int>(bytes), MPI_BYTE, to, 1, MPI_COMM_WORLD,
                &requests.back());
    }
    MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
  }
  void alltoallv() {
    MPI_Alltoallv(out.data(), counts.data(), offsets.data(), MPI_BYTE, in.data(), counts.data(),
                  offsets.data(), MPI_BYTE, MPI_COMM_WORLD);
  }
};

void copy_rows(expert_id, matrix_view<const float> in, matrix_view<float> out) {
  for (index_t r = 0; r < in.rows; ++r) std::copy_n(in.row(r), in.cols, out.row(r));
}

// Choices that go round the ranks: choice c of token t to rank (t + c) mod R.
assignment round_choices(index_t tokens, index_t experts, index_t k) {
  assignment a;
  a.reset(tokens, experts, k);
  const index_t own = experts / ranks;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t c = 0; c < k; ++c) {
      const auto at = static_cast<std::size_t>(t * k + c);
      a.ids()[at] = static_cast<expert_id>((t + c) % ranks * own + (t / ranks + c / ranks) % own);
      a.weights()[at] = 1.0f / static_cast<float>(k);
    }
  return a;
}

struct tokens_of {
  index_t tokens, d;
  buffer<float> x, y;
  assignment choices;

  tokens_of(index_t t, index_t width, assignment a)
      : tokens(t),
        d(width),
        x(bench::hidden_states<float>(std::max<index_t>(t, 1), d)),
        y(std::max<index_t>(t, 1) * d),
        choices(std::move(a)) {}
  matrix_view<const float> in() const { return {x.data(), tokens, d}; }
  matrix_view<float> out() { return {y.data(), tokens, d}; }
};

void say(const std::string& name, const std::vector<std::pair<std::string, double>>& us) {
  if (me != 0) return;
  std::printf("%-44s", name.c_str());
  for (const auto& [what, t] : us)
    std::printf("  %s %.1f us (%.2f)", what.c_str(), t, us[0].second / t);
  std::printf("\n");
  std::fflush(stdout);
}

mpi::parallel_options plain(index_t chunks = 1) {
  return {.chunks = chunks, .dispatch = mpi::dispatcher::rank_to_rank};
}

// Rows to the others and back, with experts that copy.
void exchange(index_t bytes_per_pair) {
  constexpr index_t d = 1024, experts = 64;
  const index_t per_pair = std::max<index_t>(1, bytes_per_pair / (d * 4)), n = per_pair * ranks;
  tokens_of t(n, d, round_choices(n, experts, 1));
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(experts, ranks), plain());
  plain_messages messages(per_pair * d * 4);
  mpi::transport net(MPI_COMM_WORLD);
  const auto send = [&] {
    mpi::transport::pending sent;
    const std::span<char> in(messages.in), out(messages.out);
    const auto size = static_cast<std::size_t>(messages.bytes);
    for (index_t i = 1; i < ranks; ++i) {
      const auto from = static_cast<std::size_t>((me + ranks - i) % ranks),
                 to = static_cast<std::size_t>((me + i) % ranks);
      net.receive(sent, std::as_writable_bytes(in.subspan(from * size, size)),
                  static_cast<index_t>(from), 1);
      net.send(sent, std::as_bytes(out.subspan(to * size, size)), static_cast<index_t>(to), 1);
    }
    net.wait(sent, {"rows"});
  };
  // What a call copies beside sending: rows packed, put into slots, made by the expert, put into
  // the order of their tokens and added up.
  floats memory(static_cast<std::size_t>(2 * n * d));
  const auto copies = [&] {
    for (int i = 0; i < 5; ++i)
      std::copy_n(memory.data() + (i % 2) * n * d, n * d, memory.data() + (1 - i % 2) * n * d);
  };
  const auto us = compete({[&] { p.forward(t.in(), t.choices, t.out(), copy_rows); },
                           [&] {
                             messages.pairs();
                             messages.pairs();
                           },
                           [&] {
                             messages.alltoallv();
                             messages.alltoallv();
                           },
                           [&] {
                             send();
                             send();
                           },
                           copies});
  say("exchange, " + std::to_string(per_pair * d * 4 / 1024) + " kB per pair, both ways",
      {{"transport", us[3]}, {"Isend/Irecv", us[1]}, {"Alltoallv", us[2]}});
  say("  a whole call whose experts copy",
      {{"ours", us[0]}, {"Isend/Irecv and five copies", us[1] + us[4]}});
}

void agreement() {
  tokens_of t(0, 64, round_choices(0, 64, 1));
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(64, ranks), plain());
  const auto us = compete({[&] { p.forward(t.in(), t.choices, t.out(), copy_rows); },
                           [&] {
                             long v = 1, w = 0;
                             for (int i = 0; i < 2; ++i)
                               MPI_Allreduce(&v, &w, 1, MPI_LONG, MPI_MAX, MPI_COMM_WORLD);
                           }});
  say("header and agreement, no tokens", {{"ours", us[0]}, {"two Allreduce of 8 bytes", us[1]}});
}

void few_tokens(index_t tokens, index_t d, index_t k) {
  tokens_of t(tokens, d, round_choices(tokens, 64, k));
  const placement where = placement::contiguous(64, ranks);
  mpi::expert_parallel<> all(MPI_COMM_WORLD, where, {.dispatch = mpi::dispatcher::all_gather}),
      pairs(MPI_COMM_WORLD, where, plain());
  const auto us = compete({[&] { all.forward(t.in(), t.choices, t.out(), copy_rows); },
                           [&] { pairs.forward(t.in(), t.choices, t.out(), copy_rows); }});
  const double excess = gather_excess_bytes(64, ranks, tokens * ranks, tokens * ranks * k,
                                            4.0 * static_cast<double>(d));
  say("T " + std::to_string(tokens) + " per rank, d " + std::to_string(d) + ", k " +
          std::to_string(k) + ", excess " + std::to_string(static_cast<long>(excess)),
      {{"all_gather", us[0]}, {"rank_to_rank", us[1]}});
}

// A layer's experts on one rank with all tokens, over the ranks, and in chunks that overlap.
void layer(index_t tokens, index_t d, index_t ff, index_t experts, index_t k) {
  const index_t own = experts / ranks, mine = tokens / ranks;
  swiglu_experts<> net(own, d, ff);
  for (index_t e = 0; e < own; ++e) {
    const auto w = bench::hidden_states<float>(3 * ff, d);
    net.set_gate(static_cast<expert_id>(e), {w.data(), ff, d});
    net.set_up(static_cast<expert_id>(e), {w.data() + ff * d, ff, d});
    net.set_down(static_cast<expert_id>(e), {w.data() + 2 * ff * d, d, ff});
  }
  tokens_of all(tokens, d, bench::make_assignment("normal", tokens, experts, k));
  assignment part;
  copy_tokens(all.choices, mine * me, mine, part);
  tokens_of t(mine, d, std::move(part));
  const placement where = placement::contiguous(experts, ranks);
  mpi::expert_parallel<> one(MPI_COMM_WORLD, where, plain()), four(MPI_COMM_WORLD, where, plain(4));
  // On one rank an expert stands for those of the others: as many products.
  floats memory(static_cast<std::size_t>(net.scratch_floats()));
  dispatch_plan plan;
  buffer<float> slots(tokens * k * d), results(tokens * k * d);
  const auto on_one = [&] {
    if (me != 0) return;
    moeroute::plan(all.choices, plan);
    const matrix_view<float> in(slots.data(), plan.slots(), d),
        out(results.data(), plan.slots(), d);
    dispatch(all.in(), plan, in);
    for_each_expert(plan, matrix_view<const float>(in), out,
                    [&](expert_id e, matrix_view<const float> a, matrix_view<float> b) {
                      net(static_cast<expert_id>(e % own), a, b, memory.data());
                    });
    combine(matrix_view<const float>(out), plan, all.choices, all.out());
  };
  one.forward(t.in(), t.choices, t.out(), net);
  index_t rows = one.counts().rows_sent - one.plan().rows_to(me),
          back = one.counts().entries_sent - one.plan().entries_to(me);
  // Between every pair as many as between any.
  long most[2] = {rows / std::max(1, ranks - 1), back / std::max(1, ranks - 1)};
  MPI_Allreduce(MPI_IN_PLACE, most, 2, MPI_LONG, MPI_MAX, MPI_COMM_WORLD);
  plain_messages out(most[0] * d * 4), in(most[1] * d * 4);
  const auto us =
      compete({[&] { one.forward(t.in(), t.choices, t.out(), net); },
               [&] { four.forward(t.in(), t.choices, t.out(), net); }, on_one, [&] { out.pairs(); },
               [&] { in.pairs(); }, [&] { one.forward(t.in(), t.choices, t.out(), copy_rows); }});
  const double floor = us[2] / ranks + us[3] + us[4];
  say("layer, T " + std::to_string(tokens) + ", d " + std::to_string(d) + ", ff " +
          std::to_string(ff) + ", " + std::to_string(experts) + "/" + std::to_string(k),
      {{"ours", us[0]}, {"one rank / R and the same bytes", floor}, {"four chunks", us[1]}});
  if (me == 0)
    std::printf(
        "  one rank %.1f us, bytes alone %.1f us, exchange alone %.1f us, of it hidden by "
        "four chunks %.0f %%\n",
        us[2], us[3] + us[4], us[5], 100.0 * (us[0] - us[1]) / us[5]);
}

}  // namespace

int main(int argc, char** argv) {
  int given = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &given);
  MPI_Comm_rank(MPI_COMM_WORLD, &me);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (argc > 1) seconds_per_row = std::atof(argv[1]);
  if (me == 0)
    std::printf("%d ranks; microseconds, and in brackets the first as a multiple of it\n", ranks);
  if (64 % ranks != 0) {
    if (me == 0) std::fprintf(stderr, "bench_ranks: %d ranks, expected a divisor of 64\n", ranks);
    MPI_Finalize();
    return 2;
  }
  for (const index_t bytes : {16 << 10, 256 << 10, 1 << 20}) exchange(bytes);
  agreement();
  for (const index_t k : {2, 8})
    for (const index_t tokens : {1, 2, 4, 8, 16, 32}) few_tokens(tokens, 2048, k);
  layer(2048, 1024, 512, 64, 8);
  MPI_Finalize();
}
