// How even a load is: violations, spread and concentration of counts, over one batch or many.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/expert_load.hpp>

namespace moeroute {

/// Whether a variance is divided by the number of values or by one less.
enum class spread { population, sample };

/// Measures of one list of loads. Each is 0 (jain_index and balancedness 1) where nothing was
/// counted. Requires: loads are not negative. Cost: O(E), gini O(E log E) and a copy.
template <class N>
double mean_load(std::span<const N> load) {
  double sum = 0.0;
  for (const N n : load) sum += static_cast<double>(n);
  return load.empty() ? 0.0 : sum / static_cast<double>(load.size());
}

/// (max - mean) / mean: 0 where all are equal, E - 1 where one expert has everything.
template <class N>
double max_violation(std::span<const N> load) {
  const double mean = mean_load(load);
  if (!(mean > 0.0)) return 0.0;
  return static_cast<double>(*std::max_element(load.begin(), load.end())) / mean - 1.0;
}

/// (mean - min) / mean: 0 where all are equal, 1 where an expert has nothing.
template <class N>
double min_violation(std::span<const N> load) {
  const double mean = mean_load(load);
  if (!(mean > 0.0)) return 0.0;
  return 1.0 - static_cast<double>(*std::min_element(load.begin(), load.end())) / mean;
}

/// mean / max, in (0, 1].
template <class N>
double balancedness(std::span<const N> load) {
  return 1.0 / (1.0 + max_violation(load));
}

/// Standard deviation over mean; of a sample it is 0 for one expert.
template <class N>
double load_cv(std::span<const N> load, spread kind = spread::population) {
  const double mean = mean_load(load);
  if (!(mean > 0.0)) return 0.0;
  double squares = 0.0;
  for (const N n : load) {
    const double gap = static_cast<double>(n) - mean;
    squares += gap * gap;
  }
  const double free = static_cast<double>(load.size()) - (kind == spread::sample ? 1.0 : 0.0);
  return free > 0.0 ? std::sqrt(squares / free) / mean : 0.0;
}

/// The Gini coefficient, in [0, (E - 1) / E]. `sorted` is scratch of any size.
template <class N>
double gini(std::span<const N> load, std::vector<double>& sorted) {
  const double sum = mean_load(load) * static_cast<double>(load.size());
  if (!(sum > 0.0)) return 0.0;
  sorted.assign(load.begin(), load.end());
  std::sort(sorted.begin(), sorted.end());
  double weighted = 0.0;
  for (std::size_t i = 0; i < sorted.size(); ++i)
    weighted += static_cast<double>(i + 1) * sorted[i];
  const auto experts = static_cast<double>(load.size());
  return 2.0 * weighted / (experts * sum) - (experts + 1.0) / experts;
}
template <class N>
double gini(std::span<const N> load) {
  std::vector<double> sorted;
  return gini(load, sorted);
}

/// (sum x)^2 / (E sum x^2), in [1 / E, 1]: "expert utilisation" of DeepSeekMoE; 1 / (1 + CV^2).
template <class N>
double jain_index(std::span<const N> load) {
  const double cv = load_cv(load);
  return 1.0 / (1.0 + cv * cv);
}

/// Loads gathered batch by batch: global measures are of load(), the sum of all batches; batch
/// measures are means of one value per batch.
///
/// Several meters add up, so counts may also be all-reduced. Cost: add O(T k + E), no allocation.
class load_meter {
 public:
  /// Throws: error where E is outside [1, 2^20].
  explicit load_meter(index_t experts) {
    check_range("load_meter", "experts", experts, 1, max_experts);
    load_.assign(static_cast<std::size_t>(experts), 0);
    batch_.assign(load_.size(), 0);
  }

  /// Throws: error where the assignment has another number of experts or the mask another length.
  template <class A = simd::default_arch>
  void add(const assignment& a, const count_options& what = {}) {
    check_size("load_meter", "experts", a.experts(), static_cast<index_t>(load_.size()));
    count_choices<std::int64_t, A>(a, what, std::span(batch_));
    add_counts(batch_);
  }

  /// One batch's counts [E], counted by somebody else. A batch without choices is none. Throws:
  /// error where the length differs or a count is negative.
  void add_counts(std::span<const std::int64_t> counts) {
    check_size("load_meter", "counts.size()", static_cast<index_t>(counts.size()),
               static_cast<index_t>(load_.size()));
    for (const std::int64_t n : counts)
      if (n < 0) fail_value("load_meter", "a count", n, ">= 0");
    bool any = false;
    for (std::size_t e = 0; e < load_.size(); ++e) {
      load_[e] += counts[e];
      any |= counts[e] != 0;
    }
    if (!any) return;
    ++batches_;
    max_violations_ += max_violation(counts);
    min_violations_ += min_violation(counts);
  }

  void add(const load_meter& other) {
    check_size("load_meter", "experts", static_cast<index_t>(other.load_.size()),
               static_cast<index_t>(load_.size()));
    for (std::size_t e = 0; e < load_.size(); ++e) load_[e] += other.load_[e];
    batches_ += other.batches_;
    max_violations_ += other.max_violations_;
    min_violations_ += other.min_violations_;
  }

  std::span<const std::int64_t> load() const { return load_; }
  std::int64_t batches() const { return batches_; }
  double global_max_violation() const { return max_violation(load()); }
  double global_min_violation() const { return min_violation(load()); }
  double batch_max_violation() const { return per_batch(max_violations_); }
  double batch_min_violation() const { return per_batch(min_violations_); }

 private:
  double per_batch(double sum) const {
    return batches_ == 0 ? 0.0 : sum / static_cast<double>(batches_);
  }

  std::vector<std::int64_t> load_, batch_;
  std::int64_t batches_ = 0;
  double max_violations_ = 0.0, min_violations_ = 0.0;
};

}  // namespace moeroute
