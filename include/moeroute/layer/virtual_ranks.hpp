// R ranks in one process, with memcpy in place of messages: what decides about rows and sums is the
// same code that runs over a network.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <moeroute/layer/rank_exchange.hpp>

namespace moeroute {

/// One virtual rank's tokens: x [T_r, d], what routing decided for them, and y [T_r, d].
template <storage T = float>
struct rank_tokens {
  matrix_view<const T> x{};
  const assignment& choices;
  matrix_view<float> y{};
  /// [T_r], 0: the token takes no part; empty: all do.
  std::span<const std::uint8_t> mask{};
};

/// What goes backward on one rank: dy [T_r, d]; dx [T_r, d] and dweights [choices] are written,
/// where they are not empty.
struct rank_gradients {
  matrix_view<const float> dy{};
  matrix_view<float> dx{};
  std::span<float> dweights{};
};

/// How rows travel.
enum class exchange_path {
  flat,  ///< from each rank to each rank
  /// Once to each node, to the rank with the sender's place there, which hands on within the node:
  /// (N - 1) + (G - 1) messages per rank in place of N G - 1, and a row crosses to a node once.
  two_level,
  all_gather,  ///< every rank gets all tokens and picks its own: for few tokens
};

/// Runs the forward and backward pass of R ranks, each with its tokens, over one placement.
///
/// Determinism: in exact mode y, dx, dweights and what an unreplicated expert's gradient adds up
/// have the bits of one rank with all tokens in rank order, for every placement, rule and path,
/// where an expert's rows do not depend on one another. Replicated experts add to the gradients of
/// their slots; sum_replica_gradients says how these become one.
template <storage T = float, class A = simd::default_arch>
class virtual_ranks {
 public:
  /// Throws: error where the path is two-level and nodes are not runs of equally many ranks.
  explicit virtual_ranks(placement p, const exchange_options& options = {},
                         exchange_path path = exchange_path::flat)
      : placement_(std::move(p)),
        options_(options),
        path_(path),
        senders_(at(placement_.ranks())),
        receivers_(at(placement_.ranks())) {
    if (options.special.any()) {
      owned_.resize(at(placement_.experts()));
      for (index_t e = 0; e < placement_.experts(); ++e)
        owned_[at(e)] = options.special.contains(e) ? 0 : 1;
    }
    if (path == exchange_path::two_level) start_two_level();
  }

  index_t ranks() const { return placement_.ranks(); }
  const placement& experts() const { return placement_; }
  const exchange_plan& plan(index_t rank) const { return senders_[at(rank)].plan(); }
  const dispatch_plan& received(index_t rank) const { return receivers_[at(rank)].plan(); }
  /// The pieces by which replica_rule::ranges goes; a planner's.
  void set_ranges(slot_ranges r) { ranges_ = std::move(r); }

  /// f(rank, local slot, in, out) is the expert of a slot.
  template <class F, executor Exec = serial>
  void forward(std::span<const rank_tokens<T>> ranks, F&& f, const Exec& exec = {}) {
    check_size("virtual_ranks", "ranks.size()", static_cast<index_t>(ranks.size()), this->ranks());
    count(ranks);
    if (path_ == exchange_path::two_level) {
      forward_two_level(ranks, f, exec);
      return;
    }
    for (index_t r = 0; r < this->ranks(); ++r)
      senders_[at(r)].pack(ranks[at(r)].x, ranks[at(r)].choices, placement_, r, options_,
                           resolving(ranks[at(r)]), exec);
    if (path_ == exchange_path::all_gather)
      for (index_t r = 0; r < this->ranks(); ++r)
        senders_[at(r)].pack_gathered(ranks[at(r)].x, ranks[at(r)].choices, weights_travel());
    for (index_t r = 0; r < this->ranks(); ++r) receive(r, ranks[at(r)].x.cols);
    for (index_t r = 0; r < this->ranks(); ++r)
      receivers_[at(r)].run(placement_.slots(r), of_rank(f, r), options_, exec);
    for (index_t s = 0; s < this->ranks(); ++s) {
      senders_[at(s)].expect_results(options_.result);
      for (index_t r = 0; r < this->ranks(); ++r)
        copy(receivers_[at(r)].results_to(s), senders_[at(s)].results_from(r));
      senders_[at(s)].finish(ranks[at(s)].x, ranks[at(s)].choices, options_, ranks[at(s)].y, exec);
    }
  }

  /// The same on the way back, after a forward call with the same tokens: f(rank, local slot, in,
  /// dout, din).
  template <class F, executor Exec = serial>
  void backward(std::span<const rank_tokens<T>> ranks, std::span<const rank_gradients> gradients,
                F&& f, const Exec& exec = {}) {
    static_assert(std::is_same_v<T, float>,
                  "[moeroute::virtual_ranks] backward takes rows of float");
    check_size("virtual_ranks", "ranks.size()", static_cast<index_t>(ranks.size()), this->ranks());
    check_size("virtual_ranks", "gradients.size()", static_cast<index_t>(gradients.size()),
               this->ranks());
    for (index_t r = 0; r < this->ranks(); ++r)
      senders_[at(r)].pack_backward(ranks[at(r)].x, gradients[at(r)].dy, ranks[at(r)].choices,
                                    options_, gradients[at(r)].dweights, gradients[at(r)].dx, exec);
    if (path_ == exchange_path::two_level)
      send_gradients_to_nodes(exec);
    else
      for (index_t r = 0; r < this->ranks(); ++r) {
        receivers_[at(r)].expect_backward();
        for (index_t s = 0; s < this->ranks(); ++s) {
          copy(senders_[at(s)].gradient_rows_to(r), receivers_[at(r)].gradient_rows_from(s));
          copy(senders_[at(s)].weight_to(r), receivers_[at(r)].weight_from(s));
        }
      }
    for (index_t r = 0; r < this->ranks(); ++r) {
      const auto slot_gradient = [&f, r](expert_id slot, matrix_view<const float> in,
                                         matrix_view<const float> dout,
                                         matrix_view<float> din) { f(r, slot, in, dout, din); };
      receivers_[at(r)].run_backward(slot_gradient, exec);
    }
    if (path_ == exchange_path::two_level)
      return_gradients_by_nodes(exec);
    else
      for (index_t s = 0; s < this->ranks(); ++s)
        for (index_t r = 0; r < this->ranks(); ++r)
          copy(receivers_[at(r)].gradients_to(s), senders_[at(s)].gradients_from(r));
    for (index_t s = 0; s < this->ranks(); ++s)
      senders_[at(s)].finish_backward(ranks[at(s)].x, ranks[at(s)].choices, options_,
                                      gradients[at(s)].dweights, gradients[at(s)].dx, exec);
  }

 private:
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

  template <class V, class W>
  static void copy(std::span<V> from, std::span<W> to) {
    check_size("virtual_ranks", "a message", static_cast<index_t>(from.size()),
               static_cast<index_t>(to.size()));
    std::copy(from.begin(), from.end(), to.begin());
  }

  template <class F>
  static auto of_rank(F& f, index_t r) {
    return [&f, r](expert_id slot, matrix_view<const float> in, matrix_view<float> out) {
      f(r, slot, in, out);
    };
  }

  // Every rank's counts, as one all-gather would make them.
  void count(std::span<const rank_tokens<T>> ranks) {
    const index_t experts = placement_.experts();
    counts_.resize(at(experts * this->ranks()));
    for (index_t r = 0; r < this->ranks(); ++r)
      count_choices(ranks[at(r)].choices,
                    std::span<std::int32_t>(counts_).subspan(at(r * experts), at(experts)), owned_,
                    ranks[at(r)].mask);
  }
  resolve_options resolving(const rank_tokens<T>& tokens) const {
    return {.rule = options_.rule,
            .lost = options_.lost,
            .counts = counts_,
            .range_first = ranges_.first,
            .range = ranges_.range,
            .owned = owned_,
            .mask = tokens.mask};
  }

  bool weights_travel() const {
    return options_.weights == weight_on::input || options_.result == exchange_result::reduced;
  }

  // What rank r gets from everybody.
  void receive(index_t r, index_t d) {
    rows_.clear();
    entries_.clear();
    for (const auto& s : senders_) {
      rows_.push_back(static_cast<std::int32_t>(s.plan().rows_to(r)));
      entries_.push_back(static_cast<std::int32_t>(s.plan().entries_to(r)));
    }
    exchange_receiver<T, A>& to = receivers_[at(r)];
    to.expect(rows_, entries_, d, options_);
    const bool weights = weights_travel();
    for (index_t s = 0; s < ranks(); ++s) {
      if (path_ == exchange_path::all_gather) {
        to.take_gathered(s, senders_[at(s)].gathered(), senders_[at(s)].shape_of_gathered(),
                         placement_.first_slot(r), placement_.slots(r));
        continue;
      }
      copy(senders_[at(s)].rows_to(r), to.rows_from(s));
      copy(senders_[at(s)].entries_of_row_to(r), to.entries_of_row_from(s));
      copy(senders_[at(s)].local_slot_to(r), to.local_slot_from(s));
      if (weights) copy(senders_[at(s)].weight_to(r), to.weight_from(s));
    }
  }

  // --- two levels: ranks are (node, place), G places to a node -----------------------------------

  struct forwarder {
    exchange_receiver<T, A> in;
    exchange_sender<T, A> out;
    assignment entries;
    std::vector<slot_id> slot;
    std::vector<float> back;
  };

  void start_two_level() {
    const index_t nodes = placement_.nodes();
    places_ = ranks() / nodes;
    for (index_t r = 0; r < ranks(); ++r)
      if (ranks() % nodes != 0 || placement_.node_of_rank()[at(r)] != r / places_)
        fail("virtual_ranks",
             "rank " + std::to_string(r) + " is on node " +
                 std::to_string(placement_.node_of_rank()[at(r)]) +
                 ", expected nodes that are runs of equally many ranks for two levels");
    if (options_.result != exchange_result::exact || options_.weights != weight_on::output)
      fail("virtual_ranks", "two levels take exact results and weights on outputs only");
    // Nodes as ranks: the slots are the same, in the same order.
    std::vector<std::int32_t> offset;
    for (index_t n = 0; n <= nodes; ++n)
      offset.push_back(placement_.slot_offset()[at(n * places_)]);
    nodes_ = placement({.experts = placement_.experts(),
                        .slot_offset = offset,
                        .expert_of_slot = placement_.expert_of_slot()});
    forwarders_ = std::vector<forwarder>(at(ranks()));
  }

  template <class F, executor Exec>
  void forward_two_level(std::span<const rank_tokens<T>> tokens, F& f, const Exec& exec) {
    const index_t nodes = nodes_.ranks(), places = places_;
    std::vector<slot_id> slot;
    workspace memory;
    for (index_t r = 0; r < ranks(); ++r) {
      slot.resize(at(tokens[at(r)].choices.choices()));
      resolve(tokens[at(r)].choices, placement_, r, resolving(tokens[at(r)]), memory, slot);
      senders_[at(r)].pack_resolved(tokens[at(r)].x, tokens[at(r)].choices, slot, nodes_, exec);
    }
    // Over the rails: to the rank with the same place on the other node.
    for (index_t r = 0; r < ranks(); ++r) {
      forwarder& w = forwarders_[at(r)];
      const index_t node = r / places, place = r % places;
      rows_.clear();
      entries_.clear();
      for (index_t n = 0; n < nodes; ++n) {
        const exchange_plan& from = senders_[at(n * places + place)].plan();
        rows_.push_back(static_cast<std::int32_t>(from.rows_to(node)));
        entries_.push_back(static_cast<std::int32_t>(from.entries_to(node)));
      }
      w.in.expect(rows_, entries_, tokens[at(r)].x.cols, options_);
      for (index_t n = 0; n < nodes; ++n) {
        const auto& from = senders_[at(n * places + place)];
        copy(from.rows_to(node), w.in.rows_from(n));
        copy(from.entries_of_row_to(node), w.in.entries_of_row_from(n));
        copy(from.local_slot_to(node), w.in.local_slot_from(n));
      }
      // Within the node its received rows are tokens with an entry for each choice.
      const index_t rows = w.in.rows(), entries = w.in.entries();
      index_t most = 1;
      for (const std::int32_t m : w.in.entries_of_row()) most = std::max<index_t>(most, m);
      w.entries.reset_ragged(rows, most, most, entries);
      const assignment::parts to = w.entries.to_fill();
      to.offsets[0] = 0;
      for (index_t i = 0; i < rows; ++i)
        to.offsets[i + 1] = to.offsets[i] + w.in.entries_of_row()[at(i)];
      w.slot.clear();
      for (const std::int32_t s : w.in.local_slot())
        w.slot.push_back(static_cast<slot_id>(nodes_.first_slot(node) + s));
      w.entries.close();
      w.out.pack_resolved(w.in.received(), w.entries, w.slot, placement_, exec);
    }
    for (index_t r = 0; r < ranks(); ++r) run_in_node(r, tokens[at(r)].x.cols, f, exec);
    // And back, the way it came.
    for (index_t r = 0; r < ranks(); ++r) {
      forwarder& w = forwarders_[at(r)];
      w.out.expect_results(exchange_result::exact);
      for (index_t g = 0; g < places; ++g) {
        const index_t host = r / places * places + g;
        copy(receivers_[at(host)].results_to(r % places), w.out.results_from(host));
      }
      order_by_entries(w, w.out.results(), exec);
    }
    for (index_t r = 0; r < ranks(); ++r) {
      senders_[at(r)].expect_results(exchange_result::exact);
      for (index_t n = 0; n < nodes; ++n)
        copy(handed_back(r, n, tokens[at(r)].x.cols), senders_[at(r)].results_from(n));
      senders_[at(r)].finish(tokens[at(r)].x, tokens[at(r)].choices, options_, tokens[at(r)].y,
                             exec);
    }
  }

  // What came back to a forwarder, in the order in which its entries came.
  template <executor Exec>
  void order_by_entries(forwarder& w, const matrix_view<const float>& rows, const Exec& exec) {
    w.back.resize(at(w.in.entries() * rows.cols));
    gather_rows(rows, w.out.plan().outer().slot_of_choice(),
                matrix_view<float>(w.back.data(), w.in.entries(), rows.cols), exec);
  }
  // What the forwarder on node n has for rank r: behind what it has for nodes before r's.
  std::span<const float> handed_back(index_t r, index_t n, index_t d) const {
    const index_t place = r % places_;
    index_t first = 0;
    for (index_t m = 0; m < r / places_; ++m)
      first += senders_[at(m * places_ + place)].plan().entries_to(n);
    const forwarder& w = forwarders_[at(n * places_ + place)];
    return std::span<const float>(w.back).subspan(at(first * d),
                                                  at(senders_[at(r)].plan().entries_to(n) * d));
  }

  // Rows of dy and weights of entries, the way that x went.
  template <executor Exec>
  void send_gradients_to_nodes(const Exec& exec) {
    for (index_t r = 0; r < ranks(); ++r) {
      forwarder& w = forwarders_[at(r)];
      const index_t node = r / places_, place = r % places_;
      w.in.expect_backward();
      for (index_t n = 0; n < nodes_.ranks(); ++n) {
        const auto& from = senders_[at(n * places_ + place)];
        copy(from.gradient_rows_to(node), w.in.gradient_rows_from(n));
        copy(from.weight_to(node), w.in.weight_from(n));
      }
      w.out.pack_gradient_rows(w.in.received_gradients(), w.in.entry_weights(), exec);
    }
    for (index_t r = 0; r < ranks(); ++r) {
      receivers_[at(r)].expect_backward();
      for (index_t g = 0; g < places_; ++g) {
        const auto& from = forwarders_[at(r / places_ * places_ + g)].out;
        copy(from.gradient_rows_to(r), receivers_[at(r)].gradient_rows_from(g));
        copy(from.weight_to(r), receivers_[at(r)].weight_from(g));
      }
    }
  }
  template <executor Exec>
  void return_gradients_by_nodes(const Exec& exec) {
    for (index_t r = 0; r < ranks(); ++r) {
      forwarder& w = forwarders_[at(r)];
      for (index_t g = 0; g < places_; ++g) {
        const index_t host = r / places_ * places_ + g;
        copy(receivers_[at(host)].gradients_to(r % places_), w.out.gradients_from(host));
      }
      order_by_entries(w, w.out.gradients(), exec);
    }
    for (index_t r = 0; r < ranks(); ++r)
      for (index_t n = 0; n < nodes_.ranks(); ++n)
        copy(handed_back(r, n, senders_[at(r)].gradients().cols),
             senders_[at(r)].gradients_from(n));
  }

  // Rows lie as (forwarder, source node, token); the order of one rank is (source node, forwarder,
  // token).
  template <class F, executor Exec>
  void run_in_node(index_t r, index_t d, F& f, const Exec& exec) {
    const index_t nodes = nodes_.ranks(), places = places_, first = r / places * places;
    rows_.clear();
    entries_.clear();
    for (index_t g = 0; g < places; ++g) {
      const exchange_plan& from = forwarders_[at(first + g)].out.plan();
      rows_.push_back(static_cast<std::int32_t>(from.rows_to(r)));
      entries_.push_back(static_cast<std::int32_t>(from.entries_to(r)));
    }
    exchange_receiver<T, A>& to = receivers_[at(r)];
    to.expect(rows_, entries_, d, options_);
    std::vector<std::vector<std::int32_t>> from_node(at(nodes));
    std::int32_t row = 0;
    for (index_t g = 0; g < places; ++g) {
      const forwarder& w = forwarders_[at(first + g)];
      copy(w.out.rows_to(r), to.rows_from(g));
      copy(w.out.entries_of_row_to(r), to.entries_of_row_from(g));
      copy(w.out.local_slot_to(r), to.local_slot_from(g));
      // The forwarder's tokens are its received rows, node after node.
      const std::span<const std::int32_t> offset = w.out.plan().row_offset();
      for (index_t i = offset[at(r)]; i < offset[at(r) + 1]; ++i) {
        index_t n = 0;
        for (index_t end = w.in.rows_from()[0]; w.out.plan().row_token()[at(i)] >= end;)
          end += w.in.rows_from()[at(++n)];
        from_node[at(n)].push_back(row++);
      }
    }
    std::vector<std::int32_t> order;
    for (const auto& list : from_node) order.insert(order.end(), list.begin(), list.end());
    to.run(placement_.slots(r), of_rank(f, r), options_, exec, order);
  }

  placement placement_;
  exchange_options options_;
  exchange_path path_;
  std::vector<exchange_sender<T, A>> senders_;
  std::vector<exchange_receiver<T, A>> receivers_;
  std::vector<std::uint8_t> owned_;
  slot_ranges ranges_;
  std::vector<std::int32_t> counts_, rows_, entries_;
  placement nodes_;
  index_t places_ = 1;
  std::vector<forwarder> forwarders_;
};

}  // namespace moeroute
