// How a figure is made: competitors take turns on short chunks of the same work, in one run, and
// the median chunk of each is what is reported.
//
// A shared machine takes the processor away for milliseconds at a time and changes its clock within
// a minute. A chunk is much shorter than the first, so that few chunks are hit and the median is
// not; the turns are much shorter than the second, so that ratios between competitors hold.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/index.hpp>

namespace bench {

using moeroute::index_t;

/// Seconds that one entry is measured for; --quick takes a tenth.
inline double& seconds_per_entry() {
  static double seconds = 0.8;
  return seconds;
}

/// The chunks of one competitor.
class stopwatch {
 public:
  /// Times f as one chunk of so many units (tokens, mostly).
  template <class F>
  double time(index_t units, F&& f) {
    const auto begin = std::chrono::steady_clock::now();
    f();
    benchmark::ClobberMemory();
    const auto end = std::chrono::steady_clock::now();
    const double ns = std::chrono::duration<double, std::nano>(end - begin).count();
    add(ns, units);
    return ns;
  }

  /// Notes a chunk that somebody else timed.
  void add(double ns, index_t units) {
    chunks_.push_back(std::max(0.0, ns - overhead()) / static_cast<double>(units));
  }

  void forget() { chunks_.clear(); }
  index_t chunks() const { return static_cast<index_t>(chunks_.size()); }

  /// Nanoseconds per unit that a share of the chunks do not exceed.
  double quantile(double share) {
    if (chunks_.empty()) return 0.0;
    const auto at = static_cast<std::ptrdiff_t>(share * static_cast<double>(chunks_.size() - 1));
    std::nth_element(chunks_.begin(), chunks_.begin() + at, chunks_.end());
    return chunks_[static_cast<std::size_t>(at)];
  }
  double median() { return quantile(0.5); }

 private:
  // What it costs to look at the clock.
  static double overhead() {
    static const double ns = [] {
      std::vector<double> looks(1001);
      for (double& look : looks) {
        const auto begin = std::chrono::steady_clock::now();
        const auto end = std::chrono::steady_clock::now();
        look = std::chrono::duration<double, std::nano>(end - begin).count();
      }
      std::nth_element(looks.begin(), looks.begin() + 500, looks.end());
      return looks[500];
    }();
    return ns;
  }

  std::vector<double> chunks_;
};

/// One turn: a few chunks, timed.
using turn = std::function<void(stopwatch&)>;

struct competitor {
  std::string name;
  turn run;
  /// One of the plain ways to do the same, of which the fastest counts: x_plain.
  bool plain = false;
};

/// Inputs that are used in rotation, so that no competitor sees its branches or its cache lines
/// again soon.
struct rotation {
  index_t units;       ///< rows (tokens) in the rotation
  index_t unit_bytes;  ///< what one of them occupies
  index_t step = 1;    ///< units that one call takes; divides units
  index_t chunk = 0;   ///< units of a chunk, a multiple of the step; 0: an eighth of a megabyte

  rotation(index_t n, index_t bytes, index_t call = 1) : units(n), unit_bytes(bytes), step(call) {
    const index_t calls = (index_t{1} << 17) / (bytes * call);
    chunk = std::clamp<index_t>(calls, 1, std::max<index_t>(1, units / step / 4)) * step;
  }

  /// The same rows and chunks for a competitor that takes one row at a time.
  rotation row_by_row() const {
    rotation other = *this;
    other.step = 1;
    return other;
  }
};

/// Turns of a function f(first, n) that does the work of units [first, first + n), n a multiple of
/// the step.
///
/// A turn walks over four chunks; a slow competitor does the first 100 microseconds of them only.
/// Every competitor advances equally, so they never meet on rows that are still in cache. `place`
/// in [0, 1) is where in the rotation it starts.
template <class F>
turn over(const rotation& r, double place, F f) {
  const index_t chunks = std::max<index_t>(1, r.units / r.chunk);
  const auto start = static_cast<index_t>(place * static_cast<double>(chunks));
  return [=, at = start, units = index_t{0}](stopwatch& watch) mutable {
    constexpr double longest = 1e5;
    if (units == 0) {
      // The first turn finds out how much of a chunk there is time for.
      for (units = r.step;; units = std::min(r.chunk, 2 * units)) {
        const double ns = watch.time(units, [&] { f(index_t{0}, units); });
        if (units == r.chunk || 2 * ns > longest) break;
      }
    }
    for (int chunk = 0; chunk < 4; ++chunk, at = (at + 1) % chunks)
      if (chunk == 0 || units == r.chunk) watch.time(units, [&] { f(at * r.chunk, units); });
  };
}

/// An executor that runs everything on this thread and times each piece: chunks of a stage that one
/// call runs for milliseconds.
struct timed_pieces {
  stopwatch* watch;
  double units_per_item = 1.0;

  static constexpr int concurrency() { return 1; }

  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    for (index_t begin = 0; begin < n; begin += grain) {
      const index_t end = std::min(n, begin + grain);
      watch->time(end - begin, [&] { f(begin, end); });
    }
  }
};

/// Turns of a call f(executor) of one stage; where the stage does not ask the executor the whole
/// call is one chunk.
template <class F>
turn in_pieces(index_t units, F f) {
  return [=](stopwatch& watch) mutable {
    const index_t before = watch.chunks();
    const auto begin = std::chrono::steady_clock::now();
    f(timed_pieces{&watch});
    const auto end = std::chrono::steady_clock::now();
    if (watch.chunks() == before)
      watch.add(std::chrono::duration<double, std::nano>(end - begin).count(), units);
  };
}

/// What every entry reports, from the medians of one run: ours first, then "floor" and "baseline"
/// where there are any, then plain ways and peers by their names.
///
/// bytes: of input (or of gathered output) per token, for bytes_per_second.
inline void compete(benchmark::State& state, double bytes, std::vector<competitor> list) {
  std::vector<stopwatch> watches(list.size());
  double ours = 0.0;
  for (auto _ : state) {
    const auto round = [&] {
      for (std::size_t i = 0; i < list.size(); ++i) list[i].run(watches[i]);
    };
    round();
    round();
    for (auto& w : watches) w.forget();
    const auto begin = std::chrono::steady_clock::now();
    const auto elapsed = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    // At least nine turns, unless that takes ten times as long as it should.
    for (int rounds = 0;
         elapsed() < seconds_per_entry() || (rounds < 9 && elapsed() < 10 * seconds_per_entry());
         ++rounds)
      round();
    ours = watches[0].median();
    state.SetIterationTime(ours * 1e-9);
  }
  state.counters["ns_per_token"] = ours;
  state.counters["p5_ns_per_token"] = watches[0].quantile(0.05);
  state.counters["bytes_per_second"] = bytes / (ours * 1e-9);
  state.counters["chunks"] = static_cast<double>(watches[0].chunks());
  double best = 0.0;
  for (std::size_t i = 1; i < list.size(); ++i) {
    const double other = watches[i].median();
    state.counters[list[i].name + "_ns_per_token"] = other;
    // The floor as the unit of our time; of everything else: how many times as long it takes.
    state.counters["x_" + list[i].name] = list[i].name == "floor" ? ours / other : other / ours;
    if (list[i].plain && (best == 0.0 || other < best)) best = other;
  }
  if (best > 0.0) {
    state.counters["plain_ns_per_token"] = best;
    state.counters["x_plain"] = best / ours;
  }
}

/// Registers an entry: one kernel on one shape. run(state) ends in compete(). A program for another
/// instruction set than the rest says so in the names.
template <class F>
void entry(std::string name, F run) {
#if defined(MOEROUTE_BENCH_ISA)
  name += "/isa:" MOEROUTE_BENCH_ISA;
#endif
  benchmark::RegisterBenchmark(name.c_str(), std::move(run))->Iterations(1)->UseManualTime();
}

}  // namespace bench
