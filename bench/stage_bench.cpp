// plan, dispatch, combine and gate: the stages around the experts.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <moeroute/matrix/eigen.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/soft.hpp>

#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/moving.hpp"

namespace {

using bench::index_t;
using moeroute::slot_id;

// --- plan ------------------------------------------------------------------------------------

// The counting sort in two loops, kinder to itself than a plan may be: ids are not looked at before
// they are used, and a slot gets its choice, not the token.
struct plain_plan {
  std::vector<slot_id> offset, next, choice_of_slot, slot_of_choice;

  void operator()(const std::int32_t* id, index_t tokens, index_t experts, index_t k) {
    const index_t n = tokens * k;
    offset.resize(static_cast<std::size_t>(experts + 1));
    next.resize(static_cast<std::size_t>(experts));
    choice_of_slot.resize(static_cast<std::size_t>(n));
    slot_of_choice.resize(static_cast<std::size_t>(n));
    slot_id* const at = next.data();
    slot_id* const start = offset.data();
    slot_id* const choice = choice_of_slot.data();
    slot_id* const slot = slot_of_choice.data();
    std::memset(at, 0, static_cast<std::size_t>(experts) * sizeof(slot_id));
    for (index_t i = 0; i < n; ++i) ++at[id[i]];
    slot_id sum = 0;
    for (index_t e = 0; e < experts; ++e) {
      const slot_id load = at[e];
      start[e] = at[e] = sum;
      sum += load;
    }
    start[experts] = sum;
    for (index_t i = 0; i < n; ++i) {
      const slot_id s = at[id[i]]++;
      slot[i] = s;
      choice[s] = static_cast<slot_id>(i);
    }
  }
};

void plan(benchmark::State& state, index_t tokens, index_t experts, index_t k,
          const std::string& shape) {
  const index_t calls = std::clamp<index_t>((index_t{1} << 15) / (tokens * k), 2, 1024);
  std::vector<moeroute::assignment> choices;
  const auto all = bench::make_assignment(shape, tokens * calls, experts, k);
  for (index_t c = 0; c < calls; ++c) {
    choices.emplace_back().reset(tokens, experts, k);
    std::copy_n(all.ids().data() + c * tokens * k, tokens * k, choices.back().ids().data());
  }
  const auto ids = [&](index_t first) {
    return choices[static_cast<std::size_t>(first / tokens)].ids().data();
  };
  const bench::rotation turns{tokens * calls, k * 4, tokens};
  moeroute::dispatch_plan ours;
  plain_plan plain;
  std::vector<std::int32_t> count(static_cast<std::size_t>(experts)), start(count.size() + 1);
  const auto each = [tokens](auto call) {
    return [=](index_t first, index_t n) {
      for (index_t t = first; t < first + n; t += tokens) call(t);
      benchmark::ClobberMemory();
    };
  };
  moeroute::plan(choices[0], ours);
  plain(ids(0), tokens, experts, k);
  if (!std::equal(plain.slot_of_choice.begin(), plain.slot_of_choice.end(),
                  ours.slot_of_choice().begin())) {
    state.SkipWithError("differs from the plain counting sort");
    return;
  }

  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(turns, 0.0, each([&](index_t t) {
                                        moeroute::plan(
                                            choices[static_cast<std::size_t>(t / tokens)], ours);
                                      }))});
  // Few tokens: what the counters of E experts cost. Many: counting the ids.
  const bool counters_dominate = tokens * k < experts;
  list.push_back(
      {"floor", bench::over(turns, 1.0 / 3, each([&, counters_dominate](index_t t) {
                              if (counters_dominate)
                                bench::clear_and_scan(experts, count.data(), start.data());
                              else
                                bench::histogram(ids(t), tokens * k, experts, count.data());
                              benchmark::DoNotOptimize(start.data());
                            }))});
  list.push_back(
      {"baseline",
       bench::over(turns, 2.0 / 3, each([&](index_t t) { plain(ids(t), tokens, experts, k); })),
       true});
  bench::compete(state, static_cast<double>(4 * k), std::move(list));
  state.counters["ns_per_assignment"] =
      static_cast<double>(state.counters["ns_per_token"]) / static_cast<double>(k);
}

// --- dispatch and combine --------------------------------------------------------------------

// Tokens and slots of one shape, with the rows in both orders. Combine reads what dispatch writes.
template <class T>
struct moved_rows {
  index_t tokens, d, k;
  moeroute::assignment choices;
  moeroute::dispatch_plan plan;
  moeroute::buffer<T> x, slots, y;

  moved_rows(index_t t, index_t width, index_t experts, index_t best)
      : tokens(t), d(width), k(best), choices(bench::make_assignment("normal", t, experts, best)) {
    moeroute::plan(choices, plan);
    x = bench::hidden_states<T>(tokens, d);
    slots = bench::hidden_states<T>(tokens * k, d);
    y = bench::hidden_states<T>(tokens, d);
  }

  moeroute::matrix_view<const T> x_rows() const { return {x.data(), tokens, d}; }
  moeroute::matrix_view<T> slot_rows() { return {slots.data(), tokens * k, d}; }
  moeroute::matrix_view<T> y_rows() { return {y.data(), tokens, d}; }
  index_t slot_bytes() const { return d * static_cast<index_t>(sizeof(T)); }
  /// Of the gathered side, per token.
  double bytes() const { return static_cast<double>(slot_bytes() * k); }
};

// Turns of f(first token, end) in pieces of about a quarter megabyte of slots.
template <class F>
bench::turn by_tokens(index_t tokens, double bytes_per_token, F f) {
  const auto piece = std::max<index_t>(1, static_cast<index_t>((1 << 18) / bytes_per_token));
  return [=](bench::stopwatch& watch) {
    // Small work is repeated: a turn is long enough that the others' cache lines matter little.
    const index_t times = tokens <= 8 ? 16 : 1;
    for (index_t i = 0; i < times; ++i) bench::timed_pieces{&watch}.parallel_for(tokens, piece, f);
  };
}

// The stage itself; a handful of tokens as one chunk, so that the call's own cost counts.
template <class F>
bench::turn stage_turn(index_t tokens, F f) {
  if (tokens > 8) return bench::in_pieces(tokens, f);
  return [=](bench::stopwatch& watch) {
    for (int i = 0; i < 16; ++i) watch.time(tokens, [&] { f(moeroute::serial{}); });
  };
}

// A turn that runs some times before it is timed: whether a line of the output is in a cache, and
// whether a cache keeps it, depends on how it was written the last times. Output of up to several
// second-level caches takes some more to settle.
inline bench::turn settled(bench::turn run, index_t output_bytes) {
  const int times = output_bytes <= (index_t{16} << 20) ? 4 : 1;
  return [run = std::move(run), times](bench::stopwatch& watch) {
    bench::stopwatch unnoticed;
    for (int i = 0; i < times; ++i) run(unnoticed);
    run(watch);
  };
}

// read: every slot is read once right behind, as experts do; then there is no floor.
template <class T>
void dispatch(benchmark::State& state, index_t tokens, index_t d, index_t experts, index_t k,
              bool read) {
  moved_rows<T> rows(tokens, d, experts, k);
  const auto source = bench::hidden_states<T>(read ? 1 : tokens * k, d);
  const index_t bytes = rows.slot_bytes(), output = tokens * k * bytes;
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  const auto add = [&](const char* name, bool plain, auto stage) {
    if (!read) {
      list.push_back({name, settled(stage_turn(tokens, stage), output), plain});
      return;
    }
    list.push_back({name,
                    settled(
                        [=, &rows, &kept](bench::stopwatch& watch) {
                          watch.time(tokens, [&] {
                            stage(moeroute::serial{});
                            kept |= bench::read_pass(rows.slots.data(), output);
                            benchmark::DoNotOptimize(kept);
                          });
                        },
                        output),
                    plain});
  };
  add("ours", false, [&](const auto& exec) {
    moeroute::dispatch(rows.x_rows(), rows.plan, rows.slot_rows(), exec);
  });
  if (!read)
    list.push_back({"floor", settled(by_tokens(tokens, rows.bytes(),
                                               [&](index_t first, index_t end) {
                                                 std::memcpy(rows.slots.data() + first * k * d,
                                                             source.data() + first * k * d,
                                                             static_cast<std::size_t>(
                                                                 (end - first) * k * bytes));
                                               }),
                                     output)});
  // Slot by slot, through the caches and past them; and token by token, past them.
  const auto piece = std::max<index_t>(1, static_cast<index_t>((1 << 18) / rows.bytes()));
  const auto by_slots = [&, piece](auto copy) {
    return [&, piece, copy](const auto& exec) {
      const slot_id* token = rows.plan.token_of_slot().data();
      exec.parallel_for(tokens, piece, [&](index_t first, index_t end) {
        for (index_t s = first * k; s < end * k; ++s)
          copy(rows.x.data() + token[s] * d, rows.slots.data() + s * d);
        moeroute::simd::stream_fence();
      });
    };
  };
  const auto stream = [bytes](const T* from, T* to) {
    moeroute::simd::stream_bytes(reinterpret_cast<const std::byte*>(from), bytes,
                                 reinterpret_cast<std::byte*>(to));
  };
  add("baseline", true, by_slots([bytes](const T* from, T* to) {
        std::memcpy(to, from, static_cast<std::size_t>(bytes));
      }));
  add("stream_slots", true, by_slots(stream));
  add("stream_tokens", true, [&, piece, stream](const auto& exec) {
    const slot_id* slot = rows.plan.slot_of_choice().data();
    exec.parallel_for(tokens, piece, [&](index_t first, index_t end) {
      for (index_t t = first; t < end; ++t)
        for (index_t c = t * k; c < (t + 1) * k; ++c)
          stream(rows.x.data() + t * d, rows.slots.data() + slot[c] * d);
      moeroute::simd::stream_fence();
    });
  });
  bench::compete(state, rows.bytes(), std::move(list));
}

template <class T>
void combine(benchmark::State& state, index_t tokens, index_t d, index_t experts, index_t k) {
  moved_rows<T> rows(tokens, d, experts, k);
  // Scatter-add accumulates in float and must clear what it adds to: one array is cleared piece by
  // piece while the other is added to.
  std::array<std::vector<float>, 2> sums;
  for (auto& s : sums) s.assign(static_cast<std::size_t>(tokens * d), 0.0f);
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  list.push_back({"ours", stage_turn(tokens, [&](const auto& exec) {
                    moeroute::combine(rows.slot_rows(), rows.plan, rows.choices, rows.y_rows(),
                                      exec);
                  })});
  list.push_back({"floor", by_tokens(tokens, rows.bytes(), [&](index_t first, index_t end) {
                    kept |= bench::read_pass(rows.slots.data() + first * k * d,
                                             (end - first) * k * rows.slot_bytes());
                    benchmark::DoNotOptimize(kept);
                  })});
  list.push_back(
      {"baseline", by_tokens(tokens, rows.bytes(), [&](index_t first, index_t end) {
         if (first == 0) std::swap(sums[0], sums[1]);
         std::fill_n(sums[1].data() + first * d, (end - first) * d, 0.0f);
         const float weight = 1.0f / static_cast<float>(k);
         using lanes = moeroute::simd::vfloat<>;
         constexpr auto w = static_cast<index_t>(lanes::size);
         for (index_t s = first * k; s < end * k; ++s) {
           const T* from = rows.slots.data() + s * d;
           float* to = sums[0].data() + rows.plan.token_of_slot()[static_cast<std::size_t>(s)] * d;
           for (index_t c = 0; c < d; c += w)  // the compiler leaves 16 bits scalar
             xsimd::fma(lanes(weight),
                        moeroute::simd::detail::load_wide<moeroute::simd::default_arch>(from + c),
                        lanes::load_unaligned(to + c))
                 .store_unaligned(to + c);
         }
       })});
  bench::compete(state, rows.bytes(), std::move(list));
}

#if defined(_OPENMP)
// Both stages on several threads, as whole calls, beside a memcpy or a read of the same bytes that
// is split over the same threads, and beside one thread.
template <class T>
void moves_by_threads(benchmark::State& state, bool combining, int threads, index_t tokens,
                      index_t d, index_t experts, index_t k) {
  moved_rows<T> rows(tokens, d, experts, k);
  const auto source = bench::hidden_states<T>(combining ? 1 : tokens * k, d);
  const moeroute::openmp team{threads};
  const auto whole = [tokens](auto call) -> bench::turn {
    return [=](bench::stopwatch& watch) { watch.time(tokens, call); };
  };
  const auto stage = [&](const auto& exec) {
    if (combining)
      moeroute::combine(rows.slot_rows(), rows.plan, rows.choices, rows.y_rows(), exec);
    else
      moeroute::dispatch(rows.x_rows(), rows.plan, rows.slot_rows(), exec);
  };
  const auto floor = [&] {
    team.parallel_for(tokens * k, std::max<index_t>(1, (1 << 18) / rows.slot_bytes()),
                      [&](index_t first, index_t end) {
                        const index_t bytes = (end - first) * rows.slot_bytes();
                        T* const slots = rows.slots.data() + first * d;
                        if (combining)
                          benchmark::DoNotOptimize(bench::read_pass(slots, bytes));
                        else
                          std::memcpy(static_cast<void*>(slots), source.data() + first * d,
                                      static_cast<std::size_t>(bytes));
                      });
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole([&] { stage(team); })});
  list.push_back({"floor", whole(floor)});
  list.push_back({"one_thread", whole([&] { stage(moeroute::serial{}); })});
  bench::compete(state, rows.bytes(), std::move(list));
}
#endif

// --- soft ----------------------------------------------------------------------------------------

// Dispatch and combine of a soft mixture, each a product of weights and rows as they lie.
void soft(benchmark::State& state, index_t tokens, index_t d, index_t slots) {
  using matrix = moeroute::row_matrix<float>;
  const matrix logits = matrix::Random(tokens, slots), x = matrix::Random(tokens, d);
  moeroute::soft_plan plan;
  moeroute::plan_soft(logits, 1, plan);
  const matrix to_slots = Eigen::Map<const matrix>(plan.dispatch().data, slots, tokens),
               to_tokens = Eigen::Map<const matrix>(plan.combine().data, tokens, slots);
  matrix in(slots, d), y(tokens, d), expected_in(slots, d), expected(tokens, d);
  const auto whole = [tokens](auto call) -> bench::turn {
    return [=](bench::stopwatch& watch) { watch.time(tokens, call); };
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole([&] {
                    moeroute::dispatch(x, plan, in);
                    moeroute::combine(in, plan, y);
                  })});
  list.push_back({"floor", whole([&] {
                    benchmark::DoNotOptimize(bench::multiply_adds(2 * tokens * slots * d));
                  })});
  list.push_back({"baseline", whole([&] {
                    expected_in.noalias() = to_slots * x;
                    expected.noalias() = to_tokens * expected_in;
                  })});
  bench::compete(state, static_cast<double>(4 * (slots + d)), std::move(list));
  state.counters["gflops"] =
      4.0 * static_cast<double>(slots * d) / static_cast<double>(state.counters["ns_per_token"]);
  if (!(y - expected).isZero(1e-4f)) state.SkipWithError("differs from Eigen's products");
}

// --- gate ------------------------------------------------------------------------------------

// W: how the weights are kept. In 16 bits the baseline is the same gate with float weights.
template <class W>
void gate(benchmark::State& state, index_t tokens, index_t d, index_t experts) {
  using matrix = moeroute::row_matrix<float>;
  const matrix weight = matrix::Random(experts, d), x = matrix::Random(tokens, d);
  const matrix other_weight = weight;  // each competitor warms its own
  const moeroute::simd::packed_matrix<W> packed(moeroute::const_view(weight));
  const moeroute::simd::packed_matrix<> in_float(moeroute::const_view(weight));
  matrix logits(tokens, experts), expected(tokens, experts);
  std::int32_t kept = 0;
  const auto whole = [tokens](auto call) -> bench::turn {
    return [=](bench::stopwatch& watch) {
      for (int i = 0; i < 3; ++i) watch.time(tokens, call);
    };
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole([&] { moeroute::gate(x, packed, logits); })});
  // One token reads all of W for one multiply-add each; many are bound by arithmetic.
  if (tokens == 1)
    list.push_back({"floor", whole([&] {
                      kept |= bench::read_pass(other_weight.data(),
                                               experts * d * static_cast<index_t>(sizeof(W)));
                      benchmark::DoNotOptimize(kept);
                    })});
  else
    list.push_back({"floor", whole([&] {
                      benchmark::DoNotOptimize(bench::multiply_adds(tokens * experts * d));
                    })});
  if constexpr (std::is_same_v<W, float>)
    list.push_back({"baseline", whole([&] { expected.noalias() = x * weight.transpose(); })});
  else
    list.push_back({"baseline", whole([&] { moeroute::gate(x, in_float, expected); })});
  bench::compete(state,
                 static_cast<double>(experts * d * static_cast<index_t>(sizeof(W))) /
                         static_cast<double>(tokens) +
                     static_cast<double>(d * 4),
                 std::move(list));
  state.counters["gflops"] =
      2.0 * static_cast<double>(experts * d) / static_cast<double>(state.counters["ns_per_token"]);
  if (!(logits - expected).isZero(1e-2f * static_cast<float>(d)))
    state.SkipWithError("differs from Eigen's product");
}

// --- the list --------------------------------------------------------------------------------

std::string part(const char* letter, index_t n) {
  return std::string("/") + letter + ":" + std::to_string(n);
}

void add_plan(index_t tokens, index_t experts, index_t k, const std::string& shape = "") {
  bench::entry("plan" + part("T", tokens) + part("E", experts) + part("k", k) +
                   (shape.empty() ? "" : "/shape:" + shape),
               [=](benchmark::State& state) { plan(state, tokens, experts, k, shape); });
}

template <class T>
void add_moves(index_t tokens, index_t d) {
  constexpr index_t experts = 64, k = 8;
  const std::string shape =
      part("T", tokens) + part("d", d) + part("k", k) + "/dtype:" + bench::name_of<T>();
  bench::entry("dispatch" + shape,
               [=](benchmark::State& state) { dispatch<T>(state, tokens, d, experts, k, false); });
  bench::entry("dispatch_and_read" + shape,
               [=](benchmark::State& state) { dispatch<T>(state, tokens, d, experts, k, true); });
  bench::entry("combine" + shape,
               [=](benchmark::State& state) { combine<T>(state, tokens, d, experts, k); });
#if defined(_OPENMP)
  if (tokens == 16) return;
  for (const bool combining : {false, true})
    bench::entry((combining ? "combine" : "dispatch") + shape + "/threads:2",
                 [=](benchmark::State& state) {
                   moves_by_threads<T>(state, combining, 2, tokens, d, experts, k);
                 });
#endif
}

const bool registered = [] {
  for (const index_t tokens : {1, 16, 64, 256, 1024, 4096}) {
    add_plan(tokens, 8, 2);
    for (const index_t experts : {64, 128, 256, 512}) add_plan(tokens, experts, 8);
    add_plan(tokens, 512, 10);
  }
  add_plan(16384, 8, 2);
  add_plan(16384, 256, 8);
  add_plan(4096, 256, 8, "zipf");

  for (const index_t d : {2048, 7168}) {
    for (const index_t tokens : {1, 16, 64, 256, 1024}) {
      add_moves<float>(tokens, d);
      add_moves<moeroute::bfloat16>(tokens, d);
    }
  }
  for (const index_t d : {2048, 7168}) {
    add_moves<moeroute::bfloat16>(4096, d);
    add_moves<float>(4096, d);
  }

  for (const index_t tokens : {64, 196, 576})
    for (const index_t d : {384, 1024})
      bench::entry("soft" + part("T", tokens) + part("d", d) + part("S", 128),
                   [=](benchmark::State& state) { soft(state, tokens, d, 128); });

  for (const index_t d : {2048, 7168})
    for (const index_t experts : {64, 128, 256})
      for (const index_t tokens : {1, 64})
        bench::entry("gate" + part("T", tokens) + part("d", d) + part("E", experts),
                     [=](benchmark::State& state) { gate<float>(state, tokens, d, experts); });
  for (const index_t tokens : {1, 4, 64})
    bench::entry(
        "gate" + part("T", tokens) + part("d", 7168) + part("E", 256) + "/weights:bf16",
        [=](benchmark::State& state) { gate<moeroute::bfloat16>(state, tokens, 7168, 256); });
  return true;
}();

}  // namespace
