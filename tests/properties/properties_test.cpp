// Every property on tens of thousands of random byte strings. What a failure prints runs that case
// alone: set MOEROUTE_PROPERTY to it.
#include <catch2/catch_test_macros.hpp>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "properties/properties.hpp"
#include "support/random.hpp"

namespace {

using test::property;
using byte_string = std::vector<std::uint8_t>;

std::string broken(const property& p, const byte_string& data) {
  try {
    return p.broken(test::bytes(data));
  } catch (const std::exception& error) {
    return std::string("threw: ") + error.what();
  }
}

// Shorter, then smaller in every byte, as long as it stays broken.
byte_string shrunk(const property& p, byte_string data) {
  for (std::size_t cut = data.size() / 2; cut > 0; cut /= 2)
    while (data.size() > cut) {
      byte_string shorter(data.begin(), data.end() - static_cast<std::ptrdiff_t>(cut));
      if (broken(p, shorter).empty()) break;
      data = shorter;
    }
  for (std::size_t i = 0; i < data.size(); ++i)
    for (const int value : {0, 1, data[i] / 2}) {
      if (value >= data[i]) continue;
      byte_string smaller = data;
      smaller[i] = static_cast<std::uint8_t>(value);
      if (broken(p, smaller).empty()) continue;
      data = smaller;
      break;
    }
  return data;
}

std::string spelled(const property& p, const byte_string& data) {
  std::string out = std::string(p.name) + ":";
  for (const std::uint8_t b : data) {
    constexpr char digits[] = "0123456789abcdef";
    out += digits[b >> 4];
    out += digits[b & 15];
  }
  return out;
}

void hold(const char* name, int cases) {
  for (const property& p : test::properties) {
    if (std::string_view(p.name) != name) continue;
    if (const char* only = std::getenv("MOEROUTE_PROPERTY")) {
      const std::string_view given = only;
      if (!given.starts_with(std::string(name) + ":")) return;
      byte_string data;
      for (std::size_t i = std::string_view(name).size() + 1; i + 1 < given.size(); i += 2)
        data.push_back(static_cast<std::uint8_t>(
            std::strtol(std::string(given.substr(i, 2)).c_str(), nullptr, 16)));
      CHECK(broken(p, data) == "");
      return;
    }
    test::random rng(2026);
    for (int i = 0; i < cases; ++i) {
      byte_string data(static_cast<std::size_t>(rng.below(i % 4 == 0 ? 2000 : 120)));
      for (std::uint8_t& b : data) b = static_cast<std::uint8_t>(rng.below(256));
      if (broken(p, data).empty()) continue;
      data = shrunk(p, data);
      INFO("MOEROUTE_PROPERTY=" << spelled(p, data));
      FAIL(broken(p, data));
    }
    return;
  }
  FAIL("no property named " << name);
}

}  // namespace

TEST_CASE("the k best are those of the sorted row, for 10,000 random E, k, rows and storages") {
  hold("selection", 10000);
}

TEST_CASE("30,000 random specs are refused in a sentence or route as they say") {
  hold("spec", 30000);
}

TEST_CASE("40,000 random assignments are planned as brute force plans them, or refused") {
  hold("plan", 40000);
}

TEST_CASE("20,000 random capacities drop whom the ranking of all rivals drops, or are refused") {
  hold("capacity", 20000);
}
