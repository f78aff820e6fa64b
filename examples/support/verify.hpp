// Compares a model's answers with the reference's.
#pragma once

#include "decoder.hpp"
#include "reference.hpp"
#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace example {

struct tolerances {
  float logits = 2e-4F;   // absolute
  double margin = 1e-4;   // a closer race between two experts may end either way
  float weights = 1e-4F;  // relative
};

/// What the comparison of one case found; no complaints where all agrees.
struct verdict {
  std::vector<std::string> complaints;
  float logit_error = 0;
  std::int64_t compared = 0;  // token rows of all layers
  std::int64_t too_close = 0;
  std::int64_t greedy = 0;  // tokens that agreed
};

namespace detail {

using weighted_ids = std::vector<std::pair<std::int32_t, float>>;

[[nodiscard]] inline std::string to_string(const weighted_ids& choices) {
  std::string text;
  for (const auto& [id, weight] : choices) {
    text += join(text.empty() ? "" : ", ", id, " (", weight, ")");
  }
  return text;
}

/// Compares what a layer did with some of the prompt's tokens.
inline void compare_routing(const reference_case& expected, const layer_routing& found,
                            const tolerances& allowed, verdict& into) {
  const reference_layer& layer = expected.layers[found.layer];
  for (index_t row = 0; row < found.ids.rows; ++row) {
    const auto token = static_cast<std::size_t>(found.first_position + row);
    if (!(layer.margin[token] > allowed.margin)) {
      ++into.too_close;
      continue;
    }
    ++into.compared;
    weighted_ids ours;
    weighted_ids theirs;
    for (index_t rank = 0; rank < found.ids.cols; ++rank) {
      const auto at = static_cast<std::size_t>(rank);
      ours.emplace_back(found.ids(row, rank), found.weights(row, rank));
      theirs.emplace_back(layer.ids[token][at], layer.weights[token][at]);
    }
    std::sort(ours.begin(), ours.end());
    std::sort(theirs.begin(), theirs.end());
    const bool same =
        std::equal(ours.begin(), ours.end(), theirs.begin(), [&](const auto& a, const auto& b) {
          return a.first == b.first &&
                 std::abs(a.second - b.second) <= allowed.weights * std::abs(b.second);
        });
    if (!same) {
      into.complaints.push_back(join("layer ", found.layer, ", token ", token,
                                     ": experts and weights ", to_string(ours), ", expected ",
                                     to_string(theirs)));
    }
  }
}

inline void compare_logits(const reference_case& expected, matrix_view<const float> found,
                           const tolerances& allowed, verdict& into) {
  for (index_t t = 0; t < found.rows; ++t) {
    for (index_t i = 0; i < found.cols; ++i) {
      const float theirs = expected.logits.values[static_cast<std::size_t>(t * found.cols + i)];
      const float error = std::abs(found(t, i) - theirs);
      // Negated, so that a logit that is not a number is a mismatch.
      if (!(error <= allowed.logits)) {
        into.complaints.push_back(
            join("token ", t, ": logit ", i, " is ", found(t, i), ", expected ", theirs));
      }
      into.logit_error = std::max(into.logit_error, error);
    }
  }
}

}  // namespace detail

/// Runs the prompt, then continues it greedily as far as the reference did.
template <class Exec>
[[nodiscard]] verdict verify_case(decoder<Exec>& decode, const reference_case& expected,
                                  const tolerances& allowed = {}) {
  verdict made;
  decode.reset();
  const auto logits =
      decode.run(expected.prompt, wanted_logits::all, [&](const layer_routing& routing) {
        detail::compare_routing(expected, routing, allowed, made);
      });
  detail::compare_logits(expected, logits, allowed, made);
  const auto last = logits.row(logits.rows - 1);
  std::int32_t next = greedy_token({last, static_cast<std::size_t>(logits.cols)});
  for (std::size_t i = 0; i < expected.greedy.size(); ++i) {
    if (next != expected.greedy[i]) {
      made.complaints.push_back(
          join("greedy token ", i, " is ", next, ", expected ", expected.greedy[i]));
      break;
    }
    ++made.greedy;
    if (i + 1 < expected.greedy.size()) {
      const auto row = decode.run({&next, 1});
      next = greedy_token({row.data, static_cast<std::size_t>(row.cols)});
    }
  }
  return made;
}

/// One line per case, then `verify: ok` or what differs. Returns whether all agreed.
template <class Exec>
[[nodiscard]] bool verify_all(decoder<Exec>& decode, const std::vector<reference_case>& cases,
                              std::ostream& out) {
  constexpr std::size_t shown = 3;
  std::size_t failed = 0;
  for (const reference_case& expected : cases) {
    const verdict found = verify_case(decode, expected);
    std::ostringstream line;
    line.imbue(std::locale::classic());
    line << std::left << std::setw(10) << expected.name << std::right << std::setw(5)
         << expected.prompt.size() << " tokens   logits within " << std::scientific
         << std::setprecision(1) << found.logit_error << "   routing " << found.compared << " rows";
    if (found.too_close > 0) {
      line << " (" << found.too_close << " too close to call)";
    }
    if (!expected.greedy.empty()) {
      line << "   greedy " << found.greedy << " of " << expected.greedy.size();
    }
    out << line.str() << (found.complaints.empty() ? "   ok\n" : "   DIFFERS\n");
    for (std::size_t i = 0; i < std::min(shown, found.complaints.size()); ++i) {
      out << "  " << found.complaints[i] << '\n';
    }
    if (found.complaints.size() > shown) {
      out << "  and " << found.complaints.size() - shown << " more\n";
    }
    out.flush();
    failed += found.complaints.empty() ? 0 : 1;
  }
  if (failed == 0) {
    out << "verify: ok\n";
  } else {
    out << "verify: " << failed << " of " << cases.size() << " cases differ\n";
  }
  return failed == 0;
}

}  // namespace example
