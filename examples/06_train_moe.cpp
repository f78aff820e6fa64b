// Trains a byte language model with a mixture of experts, end to end: every gradient is the
// library's. Writes a table and a page with the curves. To try a router of your own, give it a name
// in make_block of support/blocks.hpp.
//
//   train_moe [--router softmax|sigmoid|expert_choice|sinkhorn|relu|soft|hash|dense]
//             [--balance none|aux|bias|bip|quantile] [--compare] [--steps N] [--seed N]
//             [--save FILE] [--resume FILE] [--page PAGE.html] [--model DIR]
#include "support/arguments.hpp"
#include "support/blocks.hpp"
#include "support/chart.hpp"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include <moeroute/base/rng.hpp>

namespace {

using namespace example;
using moeroute::index_t;

constexpr index_t batch = 256;
constexpr float rate = 3e-3f;

std::string read_text(const std::filesystem::path& model) {
  std::string text;
  for (const char* name : {"c", "english", "python"}) {
    const auto path = model / "text" / (std::string(name) + ".txt");
    std::ifstream file(path, std::ios::binary);
    if (!file) refuse(path.string(), ": cannot be opened");
    text.append(std::istreambuf_iterator<char>(file), {});
  }
  return text;
}

balance_method parse_balance(const std::string& name) {
  const char* const names[] = {"none", "aux", "bias", "bip", "quantile"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<balance_method>(i);
  refuse("--balance: '", name, "' is none of none, aux, bias, bip, quantile");
}

// One model and its training: everything that a checkpoint holds.
class training {
 public:
  training(const std::string& text, const std::string& router, balance_method balance,
           std::uint64_t seed)
      : training(text, router, balance, seed, std::mt19937_64(seed)) {}

  // One step on a random batch; returns its loss in bits per byte.
  double step() {
    at_.resize(batch);
    const auto places =
        static_cast<std::uint32_t>(text_.size()) - std::uint32_t{byte_model::context};
    for (std::size_t i = 0; i < at_.size(); ++i)
      at_[i] = byte_model::context + static_cast<index_t>(moeroute::random_below(
                                         places, seed_, static_cast<std::uint64_t>(steps_), i));
    const double loss = pass(at_, true);
    ++steps_;
    block_->backward(x_, dh_, dh_sum_ = dh_);  // h = x + block(x): what comes goes to both
    model_.embed_backward(text_, at_, dh_sum_);
    block_->step(steps_, rate);
    model_.step(steps_, rate);
    return loss;
  }

  // The mean loss of all bytes that have a context.
  double whole() {
    double sum = 0.0;
    std::vector<index_t> at;
    const auto all = static_cast<index_t>(text_.size());
    for (index_t first = byte_model::context; first < all; first += batch) {
      at.clear();
      for (index_t i = first; i < std::min(all, first + batch); ++i) at.push_back(i);
      sum += pass(at, false) * static_cast<double>(at.size());
    }
    return sum / static_cast<double>(all - byte_model::context);
  }

  void keep(archive&& file) {
    file.number(steps_);
    file.number(seed_);
    model_.keep(file);
    block_->keep(file);
  }
  [[nodiscard]] const block_figures& figures() const { return block_->figures(); }
  [[nodiscard]] std::int64_t steps() const { return steps_; }

 private:
  training(const std::string& text, const std::string& router, balance_method balance,
           std::uint64_t seed, std::mt19937_64 random)
      : text_(text), seed_(seed), model_(random), block_(make_block(router, balance, random)) {}

  double pass(const std::vector<index_t>& at, bool learning) {
    model_.embed(text_, at, x_);
    ids_.clear();
    for (const index_t t : at)
      ids_.push_back(static_cast<std::int32_t>(byte_model::byte(text_, t - 1)));
    h_.resize(x_.size());
    block_->forward(x_, ids_, learning, h_);
    for (std::size_t i = 0; i < h_.size(); ++i) h_[i] += x_[i];
    return model_.loss(text_, at, h_, dh_, learning);
  }

  const std::string& text_;
  std::uint64_t seed_;
  byte_model model_;
  std::unique_ptr<block> block_;
  std::int64_t steps_ = 0;
  std::vector<index_t> at_;
  std::vector<std::int32_t> ids_;
  std::vector<float> x_, h_, dh_, dh_sum_;
};

struct outcome {
  chart_line loss, violation;
  double bits = 0.0, tokens_per_second = 0.0;
  block_figures last;
};

outcome train(training& t, const std::string& name, index_t steps) {
  using clock = std::chrono::steady_clock;
  outcome out{{name, {}}, {name, {}}, 0.0, 0.0, {}};
  double mean = 0.0, violation = 0.0;
  const auto start = clock::now();
  for (index_t i = 0; i < steps; ++i) {
    const double loss = t.step();
    mean = i == 0 ? loss : 0.95 * mean + 0.05 * loss;
    out.loss.values.push_back(mean);
    const double now = t.figures().max_violation;
    violation = i == 0 ? now : 0.95 * violation + 0.05 * now;
    out.violation.values.push_back(std::max(violation, 0.01));
    if ((i + 1) % 100 == 0 || i + 1 == steps)
      std::cerr << '\r' << name << ": step " << t.steps() << ", " << detail::fixed(mean, 3)
                << " bits, MaxVio " << detail::fixed(t.figures().max_violation, 2) << ", "
                << detail::fixed(t.figures().active, 2) << " experts per token   " << std::flush;
  }
  const double seconds = std::chrono::duration<double>(clock::now() - start).count();
  out.tokens_per_second = static_cast<double>(steps * batch) / seconds;
  out.last = t.figures();
  out.bits = t.whole();
  std::cerr << "\r\033[K";
  return out;
}

void report(const std::vector<outcome>& runs, const std::string& page, index_t steps,
            std::uint64_t seed) {
  chart_table table{.head = {"router", "bits per byte", "MaxVio", "entropy, bits",
                             "experts per token", "tokens per second"},
                    .rows = {}};
  std::vector<chart_line> losses, violations;
  for (const outcome& run : runs) {
    const bool routed = run.loss.name.rfind("dense", 0) != 0 &&
                        run.loss.name.rfind("soft ", 0) != 0 && run.loss.name != "soft";
    table.rows.push_back({run.loss.name, detail::fixed(run.bits, 3),
                          routed ? detail::fixed(run.last.max_violation, 2) : "-",
                          routed ? detail::fixed(run.last.entropy, 2) : "-",
                          detail::fixed(run.last.active, 2),
                          detail::fixed(run.tokens_per_second, 0)});
    losses.push_back(run.loss);
    // One that has none keeps its place: its hue is the same in both pictures.
    violations.push_back(routed ? run.violation : chart_line{run.loss.name, {}});
  }
  write_markdown(std::cout, table);
  std::cout << "written: " << page << '\n';
  const std::string lead =
      "A byte language model: the embeddings of the last " + std::to_string(byte_model::context) +
      " bytes, one block of " + std::to_string(block_experts) + " experts, " +
      std::to_string(block_k) + " per token, and a linear map; " + std::to_string(steps) +
      " steps of " + std::to_string(batch) + " bytes from 6 KB of text, seed " +
      std::to_string(seed) + ". The dense block is as wide as what is active in the mixtures.";
  save_page(page, "Training a mixture of experts", lead, [&](std::ostream& out) {
    write_names(out, losses);
    write_lines(out, losses, "steps", "bits per byte", 0.2, 10.0);
    const bool any = std::any_of(violations.begin(), violations.end(),
                                 [](const chart_line& line) { return !line.values.empty(); });
    if (any) write_lines(out, violations, "steps", "MaxVio, mean of late batches", 0.01, 15.0);
    write_html(out, table);
    out << "<p class=\"note\">Bits per byte are those of the whole text at the end, which the "
           "model "
           "was trained on: they measure how much fits, not how well it generalises. A soft "
           "mixture "
           "and expert choice mix the tokens of a batch, which a language model must not do when "
           "it "
           "writes.</p>\n";
  });
}

int run(int argc, char** argv) {
  cxxopts::Options options("train_moe", "Trains a small byte language model.\n");
  const auto text = [](const char* absent) {
    return cxxopts::value<std::string>()->default_value(absent);
  };
  options.add_options()("router", "what decides", text("softmax"), "NAME")(
      "balance", "what evens the load", text("none"), "NAME")(
      "compare", "all routers, and a dense block")("steps", "of training", text("500"), "N")(
      "seed", "of weights and batches", text("1"), "N")("save", "a checkpoint", text(""), "FILE")(
      "resume", "a checkpoint", text(""), "FILE")("page", "to write", text("build/train_moe.html"),
                                                  "FILE")(
      "model", "folder with text/", text("examples/model"), "DIR")("help", "this text");
  const auto given = options.parse(argc, argv);
  if (given.count("help") != 0) {
    std::cout << options.help();
    return 0;
  }
  if (!given.unmatched().empty())
    refuse("expected options only, found '", given.unmatched().front(), "' (--help lists them)");
  if (given.count("compare") != 0)
    for (const char* one : {"router", "balance", "save", "resume"})
      if (given.count(one) != 0) refuse("--", one, ": is of one training, --compare makes ten");
  const auto word = [&](const char* name) { return given[name].as<std::string>(); };
  const auto steps = detail::parse_number<index_t>("steps", word("steps"), 2, 1000000);
  const auto seed = detail::parse_number<std::uint64_t>("seed", word("seed"), 0, 1u << 30);
  const std::string corpus = read_text(word("model"));
  std::vector<outcome> runs;
  if (given.count("compare") != 0) {
    for (const auto& [router, balance] :
         std::vector<std::pair<std::string, std::string>>{{"softmax", "none"},
                                                          {"softmax", "aux"},
                                                          {"softmax", "bias"},
                                                          {"sigmoid", "quantile"},
                                                          {"expert_choice", "none"},
                                                          {"sinkhorn", "none"},
                                                          {"relu", "none"},
                                                          {"soft", "none"},
                                                          {"hash", "none"},
                                                          {"dense", "none"}}) {
      training t(corpus, router, parse_balance(balance), seed);
      runs.push_back(train(t, balance == "none" ? router : router + ", " + balance, steps));
    }
  } else {
    training t(corpus, word("router"), parse_balance(word("balance")), seed);
    if (!word("resume").empty()) t.keep(archive(word("resume"), false));
    runs.push_back(train(t, word("router"), steps));
    if (!word("save").empty()) t.keep(archive(word("save"), true));
  }
  report(runs, word("page"), steps, seed);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "train_moe: " << e.what() << '\n';
    return 2;
  }
}
