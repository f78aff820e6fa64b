// How often each expert of a model was used, as it is kept from one run to the next.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// Uses of every expert of every layer.
struct expert_profile {
  index_t layers = 0;
  index_t experts = 0;
  std::vector<std::int64_t> uses{};  ///< [layers, E]

  std::span<const std::int64_t> layer(index_t l) const {
    return std::span(uses).subspan(static_cast<std::size_t>(l * experts),
                                   static_cast<std::size_t>(experts));
  }
};

/// The n keys (layer * E + expert) that are used most, the lowest among equals: what to pin.
///
/// Throws: error where n is outside [0, layers * E], or the profile's list has another length.
inline std::vector<std::int32_t> hot_keys(const expert_profile& profile, index_t n) {
  const auto keys = static_cast<index_t>(profile.uses.size());
  check_size("hot_keys", "uses.size()", keys, profile.layers * profile.experts);
  check_range("hot_keys", "n", n, 0, keys);
  std::vector<std::int32_t> order(profile.uses.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), greatest_first([&](std::int32_t i) {
              return profile.uses[static_cast<std::size_t>(i)];
            }));
  order.resize(static_cast<std::size_t>(n));
  return order;
}

/// The profile as text: a line of its sizes, then a line of counts for each layer.
inline std::string to_string(const expert_profile& profile) {
  std::string text = "expert_profile v1 " + std::to_string(profile.layers) + " " +
                     std::to_string(profile.experts) + "\n";
  for (std::size_t i = 0; i < profile.uses.size(); ++i) {
    text += std::to_string(profile.uses[i]);
    text += (static_cast<index_t>(i) + 1) % profile.experts == 0 ? '\n' : ' ';
  }
  return text;
}

/// What to_string() wrote; lines may end as on Windows. Throws: error where the text is no profile,
/// with the line that is not.
inline expert_profile parse_expert_profile(std::string_view text) {
  constexpr const char* where = "parse_expert_profile";
  expert_profile made;
  index_t line = 0;
  const auto wrong = [&](const std::string& expected) {
    fail(where, "line " + std::to_string(line) + ": expected " + expected);
  };
  const auto next_line = [&] {
    ++line;
    const std::size_t end = text.find('\n');
    if (end == std::string_view::npos) wrong("another line that ends");
    std::string_view found = text.substr(0, end);
    text.remove_prefix(end + 1);
    if (found.ends_with('\r')) found.remove_suffix(1);
    return found;
  };
  const auto next_number = [&](std::string_view& from) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(from.data(), from.data() + from.size(), value);
    if (error != std::errc() || value < 0) wrong("counts from 0 on");
    from.remove_prefix(static_cast<std::size_t>(end - from.data()));
    if (!from.empty() && from[0] == ' ') from.remove_prefix(1);
    return value;
  };
  std::string_view head = next_line();
  if (!head.starts_with("expert_profile v1 ")) wrong("'expert_profile v1 LAYERS EXPERTS'");
  head.remove_prefix(18);
  made.layers = next_number(head);
  made.experts = next_number(head);
  // A file may claim any size: what it holds is read, and no more.
  if (made.layers < 1 || made.experts < 1 || made.experts > max_experts || !head.empty())
    wrong("'expert_profile v1 LAYERS EXPERTS'");
  for (index_t l = 0; l < made.layers; ++l) {
    std::string_view row = next_line();
    for (index_t e = 0; e < made.experts; ++e) made.uses.push_back(next_number(row));
    if (!row.empty()) wrong(std::to_string(made.experts) + " counts");
  }
  if (!text.empty()) {
    ++line;
    wrong("the end");
  }
  return made;
}

}  // namespace moeroute
