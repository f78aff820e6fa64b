// Where the time goes, how much memory was needed, and a line that says so
// while something takes long.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <string_view>

#include <sys/resource.h>

namespace example {

enum class part { gate, route, plan, dispatch, experts, combine, attention, rest };

inline constexpr std::array<std::string_view, 8> part_names{
    "gate", "route", "plan", "dispatch", "experts", "combine", "attention", "rest"};

/// Adds the time since the last lap to a part of the work.
class stopwatch {
 public:
  using clock = std::chrono::steady_clock;

  void start() { last_ = clock::now(); }
  void lap(part done) {
    const auto now = clock::now();
    spent_[static_cast<std::size_t>(done)] += now - last_;
    last_ = now;
  }
  /// Hands over what was measured and begins anew, the current lap going on.
  [[nodiscard]] stopwatch take() {
    stopwatch taken = *this;
    spent_ = {};
    return taken;
  }

  [[nodiscard]] double seconds(part of) const {
    return std::chrono::duration<double>(spent_[static_cast<std::size_t>(of)]).count();
  }
  [[nodiscard]] double seconds() const {
    double sum = 0;
    for (std::size_t i = 0; i < spent_.size(); ++i) {
      sum += seconds(static_cast<part>(i));
    }
    return sum;
  }

 private:
  clock::time_point last_{};
  std::array<clock::duration, part_names.size()> spent_{};
};

/// The largest resident memory of this process so far, in bytes.
[[nodiscard]] inline std::int64_t peak_memory() {
  ::rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
#if defined(__APPLE__)
  return usage.ru_maxrss;
#else
  return std::int64_t{usage.ru_maxrss} * 1024;
#endif
}

/// One line that says how far a piece of work is, from its second second on.
class progress {
 public:
  progress(std::ostream& out, std::string what) : out_(&out), what_(std::move(what)) {}
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;
  ~progress() { clear(); }

  void show(std::int64_t done, std::int64_t all) {
    const auto now = stopwatch::clock::now();
    if (now < next_) {
      return;
    }
    next_ = now + std::chrono::milliseconds(250);
    const std::string text = what_ + " " + std::to_string(done) + " of " + std::to_string(all);
    *out_ << '\r' << text << std::string(width_ - std::min(width_, text.size()), ' ') << std::flush;
    width_ = std::max(width_, text.size());
  }
  /// Takes the line away, so that other output starts clean.
  void clear() {
    if (width_ > 0) {
      *out_ << '\r' << std::string(width_, ' ') << '\r' << std::flush;
      width_ = 0;
    }
  }

 private:
  std::ostream* out_;
  std::string what_;
  std::size_t width_ = 0;
  stopwatch::clock::time_point next_ = stopwatch::clock::now() + std::chrono::seconds(1);
};

}  // namespace example
