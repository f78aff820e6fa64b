// The generate program, apart from main: tests run it in their own process.
#pragma once

#include "arguments.hpp"
#include "decoder.hpp"
#include "figures.hpp"
#include "report.hpp"
#include "text_loss.hpp"
#include "tokens.hpp"
#include "verify.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <new>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace example {

/// A text whose expert load the report shows.
struct report_text {
  std::string name;
  token_ids tokens;
};

namespace detail {

inline constexpr index_t report_segment = 256;
inline constexpr std::uint64_t report_text_limit = 1'000'000;

/// The prompt's tokens, checked against the model; empty where none was given.
[[nodiscard]] inline token_ids prompt_tokens(const arguments& asked, const model_config& config) {
  if (!asked.prompt && !asked.prompt_ids) {
    return {};
  }
  const char* const option = asked.prompt ? "--prompt" : "--prompt-ids";
  if (asked.prompt && !config.byte_vocabulary()) {
    refuse("--prompt: expected --prompt-ids: the model's ", config.vocab, " tokens are no bytes");
  }
  token_ids made =
      asked.prompt ? byte_tokens(*asked.prompt) : parse_token_ids(*asked.prompt_ids, config.vocab);
  if (made.empty()) {
    refuse(option, ": expected at least one token, found none");
  }
  if (static_cast<std::int64_t>(made.size()) > config.positions) {
    refuse(option, ": expected at most ", config.positions,
           " tokens (max_position_embeddings), found ", made.size());
  }
  return made;
}

/// The texts in DIR/text where tokens are bytes and there are any.
[[nodiscard]] inline std::vector<report_text> bundled_texts(const std::filesystem::path& directory,
                                                            const model_config& config) {
  std::vector<std::filesystem::path> files;
  std::error_code ignored;
  if (config.byte_vocabulary()) {
    for (const auto& entry : std::filesystem::directory_iterator(directory / "text", ignored)) {
      if (entry.path().extension() == ".txt") {
        files.push_back(entry.path());
      }
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<report_text> made;
  for (const auto& file : files) {
    std::string name = file.stem().string();
    if (!name.empty() && name[0] >= 'a' && name[0] <= 'z') {
      name[0] = static_cast<char>(name[0] - 'a' + 'A');
    }
    made.push_back({name, byte_tokens(input_file(file).text(report_text_limit))});
    if (made.back().tokens.empty()) {
      refuse(file.string(), ": expected a text, found nothing");
    }
  }
  return made;
}

/// The model's folder as a name: its last part that says something.
[[nodiscard]] inline std::string folder_name(const std::filesystem::path& directory) {
  const auto whole = std::filesystem::absolute(directory).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

}  // namespace detail

template <class Exec>
class generate_app {
 public:
  generate_app(arguments asked, const Exec& exec, std::ostream& out, std::ostream& err,
               std::shared_ptr<expert_ranks> ranks = nullptr)
      : asked_(std::move(asked)), exec_(exec), out_(out), err_(err), ranks_(std::move(ranks)) {}

  /// Returns the exit code, 0 or 1; throws what the person has to put right.
  int run() {
    // Everything that needs no weights is checked before they are read.
    config_ = read_model_config(asked_.model);
    prompt_ = detail::prompt_tokens(asked_, config_);
    std::vector<reference_case> cases;
    if (asked_.verify) {
      cases = read_reference(asked_.model, {config_.vocab, config_.layers, config_.experts(),
                                            config_.experts_per_token(), config_.positions});
    }
    if (asked_.report) {
      texts_ = detail::bundled_texts(asked_.model, config_);
      if (texts_.empty() && prompt_.empty()) {
        refuse(asked_.model.string(),
               "/text: expected .txt files for --report (or a prompt to show)");
      }
      check_report_path(*asked_.report);
    }
    if (asked_.loss) {
      if (!config_.byte_vocabulary()) {
        refuse("--loss: the model's ", config_.vocab, " tokens are no bytes");
      }
      loss_text_ = byte_tokens(input_file(*asked_.loss).text(detail::report_text_limit));
      if (loss_text_.size() < 2) {
        refuse(asked_.loss->string(), ": expected two bytes or more");
      }
    }
    load();
    {
      std::optional<memory_budget> budget;
      double plain_loss = 0;
      if (asked_.loss && asked_.memory) plain_loss = loss();
      if (asked_.memory) budget.emplace(model_, asked_.model, *asked_.memory);
      if (!prompt_.empty()) {
        generate();
      }
      if (asked_.loss) {
        out_ << join("loss        ", loss(), " nats per byte of ", asked_.loss->string());
        out_ << (asked_.memory ? join(", ", plain_loss, " with all experts\n") : "\n");
      }
      if (budget) budget->print(out_);
    }
    if (asked_.report) {
      report();
    }
    if (model_.ranks != nullptr) {
      const bool verified = !asked_.verify || verify(cases);
      model_.ranks->print(out_);
      return verified ? 0 : 1;
    }
    return asked_.verify && !verify(cases) ? 1 : 0;
  }

 private:
  double loss() {
    const index_t segment = std::min<index_t>(detail::report_segment, config_.positions);
    decoder<Exec> decode(model_, segment, exec_);
    return text_loss(decode, loss_text_, segment, [](std::int64_t, std::span<const float>) {});
  }

  void load() {
    progress shown(err_, "loading: layer");
    model_ = load_model(
        asked_.model, config_, [&](index_t done) { shown.show(done, config_.layers); }, ranks_);
  }

  void generate() {
    const auto prompt_size = static_cast<std::int64_t>(prompt_.size());
    const std::int64_t room = config_.positions - prompt_size;
    const std::int64_t tokens = std::min(asked_.tokens, room);
    decoder<Exec> decode(model_, prompt_size + tokens, exec_);
    warm_up(decode);

    token_printer printer(out_, config_);
    printer.write(prompt_);
    load_profile load("prompt and continuation", config_.layers, config_.experts());
    const auto count = [&](const layer_routing& r) { load.count(r.layer, r.ids); };
    sampler pick(asked_.temperature, asked_.seed);
    phase prefill{prompt_size, {}};
    phase decoding;
    auto logits = decode.run(prompt_, wanted_logits::last, count);
    prefill.watch = decode.watch().take();
    for (std::int64_t i = 0; i < tokens; ++i) {
      check_finite(logits, prompt_size + i);
      const std::int32_t token = pick({logits.data, static_cast<std::size_t>(logits.cols)});
      decode.watch().lap(part::rest);
      printer.write(token);
      prompt_.push_back(token);
      if (i + 1 < tokens) {
        logits = decode.run({&token, 1}, wanted_logits::last, count);
        ++decoding.tokens;
      }
    }
    decoding.watch = decode.watch();
    printer.finish();
    out_ << "\n\n";
    if (tokens < asked_.tokens) {
      err_ << "generate: stopped after " << tokens << " tokens: the model has " << config_.positions
           << " positions (max_position_embeddings)\n";
    }
    print_speed(out_, prefill, decoding);
    print_shares(out_, prefill, decoding);
    print_bars(out_, load);
  }

  /// Weights may be finite and what they make of a token not: no text is drawn
  /// from such logits.
  static void check_finite(moeroute::matrix_view<const float> logits, std::int64_t position) {
    for (index_t t = 0; t < logits.rows; ++t) {
      for (index_t c = 0; c < logits.cols; ++c) {
        if (!std::isfinite(logits(t, c))) {
          refuse("the logits after position ", position - 1, ": expected finite numbers, found ",
                 std::isnan(logits(t, c)) ? "NaN" : "infinity", " at token ", c);
        }
      }
    }
  }

  /// Memory is touched and buffers have grown before anything is timed.
  void warm_up(decoder<Exec>& decode) {
    const auto count = std::min<std::size_t>(prompt_.size(), decoder<Exec>::most_rows);
    static_cast<void>(decode.run({prompt_.data(), count}));
    decode.reset();
    static_cast<void>(decode.run({prompt_.data(), 1}));
    decode.reset();
    static_cast<void>(decode.watch().take());
  }

  void report() {
    if (texts_.empty()) {
      texts_.push_back({"Prompt and continuation", prompt_});
    }
    const index_t segment = std::min<index_t>(detail::report_segment, config_.positions);
    decoder<Exec> decode(model_, segment, exec_);
    std::vector<load_profile> profiles;
    for (const report_text& text : texts_) {
      progress shown(err_, "report: " + text.name + ", token");
      load_profile& load = profiles.emplace_back(text.name, config_.layers, config_.experts());
      const auto all = static_cast<index_t>(text.tokens.size());
      for (index_t first = 0; first < all; first += segment) {
        decode.reset();
        const index_t count = std::min(segment, all - first);
        const auto logits =
            decode.run({text.tokens.data() + first, static_cast<std::size_t>(count)},
                       wanted_logits::last, [&](const layer_routing& r) {
                         load.count(r.layer, r.ids);
                         load.add_entropy(r.layer, r.logits);
                       });
        check_finite(logits, first + count);
        shown.show(first, all);
      }
    }
    save_report(*asked_.report,
                {detail::folder_name(asked_.model), config_.model_type, config_.experts(),
                 config_.experts_per_token()},
                profiles);
    out_ << "report: " << asked_.report->string() << '\n';
  }

  bool verify(const std::vector<reference_case>& cases) {
    index_t positions = 1;
    for (const reference_case& one : cases) {
      positions = std::max(positions, static_cast<index_t>(one.prompt.size() + one.greedy.size()));
    }
    decoder<Exec> decode(model_, positions, exec_);
    return verify_all(decode, cases, out_);
  }

  arguments asked_;
  Exec exec_;
  std::ostream& out_;
  std::ostream& err_;
  std::shared_ptr<expert_ranks> ranks_;
  model_config config_;
  token_ids prompt_;
  token_ids loss_text_;
  std::vector<report_text> texts_;
  model model_;
};

/// Exit code 0; 1 where a comparison failed; 2, with one line on `err`, where
/// the call, a file or a value is wrong. `make_executor(threads)` decides who
/// runs the loops.
template <class MakeExecutor>
int run_generate(int count, const char* const* words, std::ostream& out, std::ostream& err,
                 int default_threads, MakeExecutor&& make_executor,
                 std::shared_ptr<expert_ranks> ranks = nullptr) {
  const auto say = [&](const std::string& what) {
    out.flush();
    err << one_line("generate: " + what) << '\n';
    return 2;
  };
  try {
    arguments asked = parse_arguments(count, words, default_threads);
    if (asked.help) {
      out << *asked.help << std::flush;
      return out ? 0 : say("the output cannot be written");
    }
    const index_t found = ranks == nullptr ? 1 : ranks->ranks();
    if (asked.ranks == 0 && found > 1) {
      refuse("--ranks: expected under mpirun with ", found, " processes");
    }
    if (asked.ranks > 1 && ranks == nullptr) {
      refuse("--ranks: this program was built without MPI: ./run setup mpi");
    }
    if (asked.ranks > 0 && asked.ranks != found) {
      refuse("--ranks: expected as many processes (mpirun -n ", asked.ranks, "), found ", found);
    }
    if (asked.ranks > 0 && asked.memory) {
      refuse("--ranks: expected either this or --memory-budget, found both");
    }
    if (asked.ranks == 0) {
      ranks = nullptr;
    }
    const auto exec = make_executor(asked.threads);
    const int code = generate_app(std::move(asked), exec, out, err, std::move(ranks)).run();
    out.flush();
    return out ? code : say("the output cannot be written");
  } catch (const std::bad_alloc&) {
    return say("out of memory");
  } catch (const std::exception& error) {
    return say(error.what());
  }
}

}  // namespace example
