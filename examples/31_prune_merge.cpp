// The bundled model with fewer experts: pruned by what they contribute, how often they are used or
// at random, or merged into the most used. Chosen on the first half of each text, run on the
// second.
//
//   prune_merge [PAGE.html [MODEL [TOKENS]]]
#include "support/decoder.hpp"
#include "support/generate_app.hpp"
#include "support/placed_words.hpp"
#include "support/scatter.hpp"
#include "support/text_loss.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/metrics/saliency.hpp>
#include <moeroute/residency/merge.hpp>
#include <moeroute/residency/prune.hpp>

namespace {

using namespace moeroute;
using example::index_t;

constexpr index_t segment = 256;

// What the first halves show of every layer.
struct calibration {
  std::vector<saliency_meter> saliency;
  std::vector<std::vector<float>> logits;  // [T, E] per layer
  index_t tokens = 0;
};

calibration calibrate(example::model& model, const std::vector<example::token_ids>& texts) {
  const index_t experts = model.config.experts();
  calibration made;
  made.logits.resize(model.layers.size());
  for (std::size_t l = 0; l < model.layers.size(); ++l) made.saliency.emplace_back(experts);
  example::decoder<serial> decode(model, segment, serial{});
  // Layers run once more beside the decoder, with a tape that keeps what the experts say.
  std::vector<example::moe_block> beside;
  for (const auto& layer : model.layers) beside.push_back(layer.moe);
  layer_tape tape;
  std::vector<float> spare;
  for (const example::token_ids& text : texts)
    for (std::size_t first = 0; first < text.size(); first += segment) {
      decode.reset();
      const std::size_t n = std::min<std::size_t>(segment, text.size() - first);
      made.tokens += static_cast<index_t>(n);
      static_cast<void>(decode.run(
          std::span(text).subspan(first, n), example::wanted_logits::last,
          [&](const example::layer_routing& r) {
            made.logits[r.layer].insert(made.logits[r.layer].end(), r.logits.data,
                                        r.logits.data + r.logits.rows * r.logits.cols);
            spare.resize(static_cast<std::size_t>(r.inputs.rows * r.inputs.cols));
            beside[r.layer].forward(r.inputs,
                                    matrix_view<float>(spare.data(), r.inputs.rows, r.inputs.cols),
                                    side_inputs{}, serial{}, tape);
            made.saliency[r.layer].add(tape.plan, tape.choices, tape.out);
          }));
    }
  return made;
}

double loss_of(example::model& model, const std::vector<example::token_ids>& texts) {
  example::decoder<serial> decode(model, segment, serial{});
  double sum = 0;
  for (const example::token_ids& text : texts)
    sum += example::text_loss(decode, text, segment, [](std::int64_t, std::span<const float>) {});
  return sum / static_cast<double>(texts.size());
}

// A layer's weights as the checkpoint has them.
struct layer_weights {
  struct expert {
    std::vector<float> gate, up, down;
  };
  std::vector<float> gate;  // [E, d]
  std::vector<expert> experts;
  index_t hidden, width;

  matrix_view<const float> rows_of_gate() const {
    return {gate.data(), static_cast<index_t>(experts.size()), hidden};
  }
  template <class Expert>
  swiglu_weights view(const Expert& e) const {
    return {{e.gate.data(), width, hidden},
            {e.up.data(), width, hidden},
            {e.down.data(), hidden, width}};
  }
  swiglu_weights view(expert_id e) const { return view(experts[static_cast<std::size_t>(e)]); }
};

std::vector<layer_weights> read_weights(const std::filesystem::path& folder,
                                        const example::model_config& c) {
  const example::checkpoint tensors(folder);
  const example::detail::tensor_names names(c.family);
  const auto read = [&](const std::string& name, index_t size) {
    std::vector<float> values(static_cast<std::size_t>(size));
    tensors.read(name + ".weight", 0, values);
    return values;
  };
  std::vector<layer_weights> layers;
  for (index_t l = 0; l < c.layers; ++l) {
    const std::string layer = "model.layers." + std::to_string(l) + ".";
    layer_weights w{read(layer + names.gate, c.experts() * c.hidden), {}, c.hidden, c.expert_width};
    for (index_t e = 0; e < c.experts(); ++e) {
      const std::string name = layer + names.expert + std::to_string(e);
      const index_t size = c.hidden * c.expert_width;
      w.experts.push_back({read(name + names.gate_projection, size),
                           read(name + names.up_projection, size),
                           read(name + names.down_projection, size)});
    }
    layers.push_back(std::move(w));
  }
  return layers;
}

// A layer of these experts, routed as before.
example::moe_block block_of(const example::moe_block& before, matrix_view<const float> gate,
                            const std::vector<swiglu_weights>& weights) {
  simd::packed_matrix<> rows(gate.rows, gate.cols);
  rows.set_rows(0, gate);
  swiglu_experts<> experts(gate.rows, gate.cols, weights[0].gate.rows);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto e = static_cast<expert_id>(i);
    experts.set_gate(e, weights[i].gate);
    experts.set_up(e, weights[i].up);
    experts.set_down(e, weights[i].down);
  }
  return {std::move(rows), before.router(), std::move(experts)};
}

// Loss with other layers in the place of the model's own.
template <class Make>
double loss_with(example::model& model, const std::vector<example::token_ids>& texts, Make make) {
  std::vector<example::moe_block> kept;
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    example::moe_block& block = model.layers[l].moe;
    example::moe_block other = make(l, block);
    kept.push_back(std::exchange(block, std::move(other)));
  }
  const double loss = loss_of(model, texts);
  for (std::size_t l = 0; l < model.layers.size(); ++l) model.layers[l].moe = std::move(kept[l]);
  return loss;
}

double pruned_loss(example::model& model, const std::vector<layer_weights>& weights,
                   const std::vector<example::token_ids>& texts,
                   const std::vector<expert_subset>& stay) {
  return loss_with(model, texts, [&](std::size_t l, const example::moe_block& before) {
    // Refuses where fewer stay than a token takes.
    static_cast<void>(pruned(model.config.router, stay[l]));
    const std::vector<float> gate = kept_rows(weights[l].rows_of_gate(), stay[l]);
    std::vector<swiglu_weights> experts;
    for (const expert_id e : stay[l].kept()) experts.push_back(weights[l].view(e));
    return block_of(before, {gate.data(), stay[l].after(), weights[l].hidden}, experts);
  });
}

// The gate keeps its rows: a token that asks for an expert gets the one that it became.
double merged_loss(example::model& model, const std::vector<layer_weights>& weights,
                   const std::vector<example::token_ids>& texts, const calibration& seen,
                   index_t leaders) {
  const index_t n = model.config.experts();
  std::vector<double> usage;
  std::vector<matrix_view<const float>> logits;
  for (std::size_t l = 0; l < weights.size(); ++l) {
    for (index_t e = 0; e < n; ++e)
      usage.push_back(static_cast<double>(seen.saliency[l].tokens(e)));
    logits.emplace_back(seen.logits[l].data(), seen.tokens, n);
  }
  const auto leader =
      group_experts({usage.data(), static_cast<index_t>(weights.size()), n}, logits, leaders);
  return loss_with(model, texts, [&](std::size_t l, const example::moe_block& before) {
    std::vector<merged_expert> merged(static_cast<std::size_t>(n));
    std::vector<swiglu_weights> experts;
    for (expert_id e = 0; e < n; ++e) {
      const expert_id lead = leader[l][static_cast<std::size_t>(e)];
      merged_expert& one = merged[static_cast<std::size_t>(lead)];
      if (one.gate.empty()) {
        std::vector<swiglu_weights> parts;
        std::vector<double> used;
        for (expert_id i = 0; i < n; ++i) {
          // The leader first: the others are aligned to it.
          const expert_id m = (lead + i) % static_cast<expert_id>(n);
          if (leader[l][static_cast<std::size_t>(m)] != lead) continue;
          parts.push_back(weights[l].view(m));
          used.push_back(usage[l * static_cast<std::size_t>(n) + static_cast<std::size_t>(m)]);
        }
        one = merge_experts(parts, used);
      }
      experts.push_back(weights[l].view(one));
    }
    return block_of(before, weights[l].rows_of_gate(), experts);
  });
}

int run(int argc, char** argv) {
  if (example::asked_how(argc, argv, 3, "prune_merge [PAGE.html [MODEL [TOKENS]]]", std::cout))
    return 0;
  const std::string page = argc > 1 ? argv[1] : "build/prune_merge.html";
  const std::filesystem::path folder = argc > 2 ? argv[2] : "examples/model";
  const std::size_t most =
      argc > 3 ? example::number_in_place<std::size_t>("TOKENS", argv[3], 64, 1u << 30) : 2048;
  const example::model_config config = example::read_model_config(folder);
  example::model model = example::load_model(folder, config, [](index_t) {});
  std::vector<example::token_ids> first, second;
  for (const auto& text : example::detail::bundled_texts(folder, config)) {
    const std::size_t n = std::min(text.tokens.size(), most);
    const auto half = text.tokens.begin() + static_cast<std::ptrdiff_t>(n / 2);
    first.emplace_back(text.tokens.begin(), half);
    second.emplace_back(half, text.tokens.begin() + static_cast<std::ptrdiff_t>(n));
  }
  if (first.empty()) example::refuse(folder.string(), "/text: expected .txt files");
  const calibration seen = calibrate(model, first);
  const index_t experts = config.experts();
  const double plain = loss_of(model, second);

  const std::vector<layer_weights> weights = read_weights(folder, config);

  // What an expert is worth, by a draw where it is random; the loss is a mean over so many draws.
  using worth_of = std::function<double(std::size_t layer, index_t expert, std::uint64_t draw)>;
  struct way {
    std::string name;
    std::uint64_t draws;
    worth_of worth;
  };
  const std::vector<way> ways = {
      {"REAP: mean of weight times length", 1,
       [&](std::size_t l, index_t e, std::uint64_t) { return seen.saliency[l].reap(e); }},
      {"sum of weight times length", 1,
       [&](std::size_t l, index_t e, std::uint64_t) {
         return seen.saliency[l].weighted_length(e);
       }},
      {"frequency", 1,
       [&](std::size_t l, index_t e, std::uint64_t) {
         return static_cast<double>(seen.saliency[l].tokens(e));
       }},
      {"random, mean of 4", 4, [&](std::size_t l, index_t e, std::uint64_t draw) {
         return static_cast<double>(random_below(1U << 30, draw, l, static_cast<std::uint64_t>(e)));
       }}};
  const std::vector<index_t> sizes = {experts * 7 / 8, experts * 3 / 4, experts * 5 / 8,
                                      experts / 2};
  example::chart_table table{.head = {"experts that stay"}, .rows = {}};
  for (const index_t n : sizes) table.head.push_back(std::to_string(n));
  std::vector<example::scatter_line> lines{
      {"all experts", {{static_cast<double>(experts), 0, ""}}}};
  std::vector<example::chart_line> names{{"all experts", {}}};
  example::progress shown(std::cerr, "runs:");
  std::int64_t done = 0;
  const auto all = static_cast<std::int64_t>(sizes.size() * (ways.size() + 1));
  const auto add = [&](const std::string& name, const auto& loss) {
    std::vector<std::string> row{name};
    example::scatter_line line{name, {}};
    for (const index_t n : sizes) {
      const double more = 100 * (loss(n) / plain - 1);
      shown.show(++done, all);
      // Not -0.0.
      row.push_back(example::detail::fixed(std::round(10 * more) / 10 + 0.0, 1) + " %");
      line.points.push_back({static_cast<double>(n), more, std::to_string(n)});
    }
    table.rows.push_back(std::move(row));
    names.push_back({name, {}});
    lines.push_back(std::move(line));
  };
  for (const way& one : ways)
    add(one.name, [&](index_t n) {
      double sum = 0;
      for (std::uint64_t draw = 0; draw < one.draws; ++draw) {
        std::vector<expert_subset> stay;
        for (std::size_t l = 0; l < model.layers.size(); ++l) {
          std::vector<double> value;
          for (index_t e = 0; e < experts; ++e) value.push_back(one.worth(l, e, draw));
          stay.push_back(keep_best(value, n));
        }
        sum += pruned_loss(model, weights, second, stay);
      }
      return sum / static_cast<double>(one.draws);
    });
  add("merged into the most used (M-SMoE)",
      [&](index_t n) { return merged_loss(model, weights, second, seen, n * config.layers); });

  std::cout << "loss " << example::detail::fixed(plain, 4)
            << " nats per byte with all experts; above it:\n\n";
  example::write_markdown(std::cout, table);
  std::cout << "\nexperts that have 90 % of the mass on 95 % of the tokens, layer by layer:";
  for (const auto& z : seen.logits)
    std::cout << ' ' << least_experts({z.data(), seen.tokens, experts}, 0.9, 0.95);
  std::cout << "\nwritten: " << page << '\n';
  example::save_page(page, "Fewer experts",
                     "A trained model of " + std::to_string(config.layers) + " layers with " +
                         std::to_string(experts) +
                         " experts: which stay is decided on the first half of each text, the "
                         "loss is that of the second.",
                     [&](std::ostream& out) {
                       double high = 1;
                       for (const auto& line : lines)
                         for (const auto& p : line.points) high = std::max(high, p.y);
                       out << "<style>.dot { fill: var(--page); stroke-width: 2.5; }</style>\n";
                       example::write_names(out, names);
                       example::write_scatter(
                           out, lines, "Loss of the model that is left", "experts per layer",
                           "loss above that of all experts, %", static_cast<double>(experts) * 1.03,
                           -high / 20, high * 1.05);
                       example::write_html(out, table);
                     });
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "prune_merge: " << e.what() << '\n';
    return 2;
  }
}
