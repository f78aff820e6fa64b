// The command line of generate.
#pragma once

#include "error.hpp"
#include "memory_budget.hpp"

#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <optional>
#include <string>

// Its own parser instead of std::regex: half the time to compile, and no
// warnings from the depths of that header.
#define CXXOPTS_NO_REGEX
#include <cxxopts.hpp>
#include <moeroute/base/read_number.hpp>

namespace example {

struct arguments {
  std::filesystem::path model;
  std::optional<std::string> prompt;
  std::optional<std::string> prompt_ids;
  std::int64_t tokens = 0;
  double temperature = 0;
  std::uint64_t seed = 0;
  int threads = 1;
  std::int64_t ranks = 0;  // processes that the experts are spread over; 0: this one has them all
  bool verify = false;
  std::optional<std::filesystem::path> report;
  std::optional<memory_request> memory;       // part of the experts are in memory
  std::optional<std::filesystem::path> loss;  // of this text
  std::optional<std::string> help;            // asked for: the text to print, nothing else to do
};

namespace detail {

/// The option's value as a number in [low, high].
template <class T>
[[nodiscard]] T parse_number(const char* option, const std::string& text, T low, T high) {
  T value{};
  if (!moeroute::detail::read_number(text, value) || !(value >= low && value <= high)) {
    refuse("--", option, ": expected a number from ", low, " to ", high, ", found '", text, "'");
  }
  return value;
}

[[nodiscard]] inline cxxopts::Options describe_options(int default_threads) {
  const auto text = [](const char* absent = nullptr) {
    auto value = cxxopts::value<std::string>();
    return absent == nullptr ? value : value->default_value(absent);
  };
  cxxopts::Options options(
      "generate", "Writes text with a mixture-of-experts model, every layer through moeroute.\n");
  options.add_options()("model", "folder with config.json and safetensors", text(), "DIR")(
      "prompt", "text to continue (models whose tokens are bytes)", text(), "TEXT")(
      "prompt-ids", "token ids to continue, as 1,2,3", text(), "IDS")(
      "tokens", "how many tokens to write", text("100"), "N")(
      "temperature", "0 takes the likeliest token, above it draws", text("0"), "X")(
      "seed", "of the draws", text("0"), "N")("threads", "for the matrix products and the experts",
                                              text(std::to_string(default_threads).c_str()), "N")(
      "ranks", "spread the experts over so many processes, under mpirun -n N", text("0"), "N")(
      "verify", "compare with reference.json in the model's folder")(
      "report", "write a page with the load of every expert", text(), "FILE")(
      "loss", "the mean loss of a text, in nats per byte", text(), "FILE")(
      "memory-budget", "keep this share of every layer's experts in memory, count what is read",
      text(),
      "SHARE")("residency",
               "prefer experts in memory: prior:LAMBDA, maxrank:M, mass:P, swap:TAU, drop:F or off",
               text(), "RULE[:PARAM]")(
      "cache", "who leaves: lru, lfu, fifo, segmented, least_stale, cost_aware", text(), "POLICY")(
      "profile", "half of the memory holds what this file says is used most", text(), "FILE")(
      "save-profile", "write how often every expert was used", text(), "FILE")(
      "read-experts", "read what is missing from the checkpoint, and time it")("help", "this");
  return options;
}

}  // namespace detail

[[nodiscard]] inline arguments parse_arguments(int count, const char* const* words,
                                               int default_threads) {
  using detail::parse_number;
  cxxopts::Options options = detail::describe_options(default_threads);
  cxxopts::ParseResult found;
  try {
    found = options.parse(count, words);
  } catch (const std::exception& error) {
    refuse("command line: ", error.what(), " (--help lists the options)");
  }
  arguments made;
  if (found.count("help") > 0) {
    made.help = options.help();
    return made;
  }
  if (!found.unmatched().empty()) {
    refuse("command line: expected options only, found '", found.unmatched().front(),
           "' (--help lists them)");
  }
  for (const char* once : {"model", "prompt", "prompt-ids", "report", "loss", "memory-budget",
                           "residency", "cache", "profile", "save-profile"}) {
    if (found.count(once) > 1) {
      refuse("--", once, ": expected once, found ", found.count(once), " times");
    }
  }
  const auto text = [&](const char* name) -> std::optional<std::string> {
    return found.count(name) > 0 ? std::optional(found[name].as<std::string>()) : std::nullopt;
  };
  const auto number = [&](const char* name, auto low, decltype(low) high) {
    return parse_number(name, found[name].as<std::string>(), low, high);
  };
  if (!text("model") || text("model")->empty()) {
    refuse("--model: expected the folder of a model");
  }
  made.model = *text("model");
  made.prompt = text("prompt");
  made.prompt_ids = text("prompt-ids");
  made.tokens = number("tokens", std::int64_t{0}, std::int64_t{1'000'000});
  made.temperature = number("temperature", 0.0, 1000.0);
  made.seed = number("seed", std::uint64_t{0}, UINT64_MAX);
  made.threads = number("threads", 1, 256);
  made.ranks = number("ranks", std::int64_t{0}, std::int64_t{1024});
  made.verify = found.count("verify") > 0;
  made.report = text("report");
  if (made.prompt && made.prompt_ids) {
    refuse("--prompt-ids: expected either this or --prompt, found both");
  }
  made.loss = text("loss");
  if (!made.prompt && !made.prompt_ids && !made.verify && !made.report && !made.loss) {
    refuse("--prompt: expected a text to continue (or --prompt-ids, --verify, --report, --loss)");
  }
  if (const auto share = text("memory-budget")) {
    made.memory.emplace();
    made.memory->share = parse_number("memory-budget", *share, 0.0, 1.0);
    if (const auto rule = text("residency")) made.memory->rule = parse_residency(*rule);
    if (const auto policy = text("cache")) made.memory->policy = parse_policy(*policy);
    made.memory->profile = text("profile");
    made.memory->save_profile = text("save-profile");
    made.memory->read_experts = found.count("read-experts") > 0;
  } else {
    for (const char* needs : {"residency", "cache", "profile", "save-profile", "read-experts"}) {
      if (found.count(needs) > 0) {
        refuse("--", needs, ": expected together with --memory-budget");
      }
    }
  }
  return made;
}

}  // namespace example
