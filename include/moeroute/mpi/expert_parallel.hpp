// Experts over the ranks of an MPI communicator: the phases of the exchange with messages between
// them, and agreement on every rank about what failed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <moeroute/layer/joined_backward.hpp>
#include <moeroute/layer/rank_exchange.hpp>
#include <moeroute/mpi/agreement.hpp>
#include <moeroute/placement/cost.hpp>

namespace moeroute::mpi {

/// How tokens reach the experts' ranks.
enum class dispatcher {
  /// As all_gather where that costs a rank at most gather_bytes more (gather_excess_bytes), else as
  /// rank_to_rank. Every rank decides by the numbers of all, and so alike.
  automatic,
  rank_to_rank,  ///< rows once to each rank that needs them: some messages for each pair of ranks
  all_gather,    ///< all rows to all ranks in one collective message; takes one chunk
};

struct parallel_options {
  exchange_options exchange{};
  transport_options transport{};
  /// A number of the layer's own, the same on all ranks: messages name it. Objects made in another
  /// order than on other ranks are refused by it; calls in another order end at the deadline.
  std::int32_t layer = 0;
  /// Tokens are cut into so many chunks, rows of one travel while another is computed.
  index_t chunks = 1;
  /// The same on all ranks.
  dispatcher dispatch = dispatcher::automatic;
  index_t gather_bytes = 8192;
};

/// What the last call sent and received on this rank.
struct parallel_counts {
  index_t tokens = 0, rows_sent = 0, entries_sent = 0, rows_received = 0, entries_received = 0;
  index_t lost = 0;       ///< choices of lost experts that were dropped
  bool gathered = false;  ///< all ranks got all tokens; rows_sent counts what was needed
};

/// One rank's end of an exchange: forward() and backward() are collective, every rank of the
/// communicator makes the same calls in the same order, with any number of tokens, also none.
///
/// A rank that throws keeps in step: every rank learns of it before the call ends and throws, the
/// one itself what it threw, the others an error that names it; the next call finds all in order. A
/// rank that does not arrive within the deadline is named where it owed a message, and the exchange
/// is broken() then.
/// Determinism: as virtual_ranks: in exact mode the bits of one rank with all tokens.
template <storage T = float, class A = simd::default_arch>
class expert_parallel {
 public:
  /// Collective. Throws: error, on every rank where one fails, where the placement has another
  /// number of ranks than the communicator, or an option is out of range.
  expert_parallel(MPI_Comm comm, placement experts, const parallel_options& options = {})
      : s_(std::make_unique<state>(comm, std::move(experts), options)) {
    agreement& talk = s_->talk;
    const index_t ranks = talk.net.ranks();
    talk.guard("options", [&] {
      check_size("expert_parallel", "placement.ranks()", s_->experts.ranks(), ranks);
      check_range("expert_parallel", "chunks", options.chunks, 1,
                  options.dispatch == dispatcher::all_gather ? 1 : max_chunks);
      check_range("expert_parallel", "gather_bytes", options.gather_bytes, 0,
                  std::int32_t{0x7fffffff});
    });
    talk.agree("options");
    s_->senders = std::vector<exchange_sender<T, A>>(at(options.chunks));
    s_->receivers = std::vector<exchange_receiver<T, A>>(at(options.chunks));
    s_->parts.resize(at(options.chunks));
    if (options.exchange.special.any()) {
      s_->owned.resize(at(s_->experts.experts()));
      for (index_t e = 0; e < s_->experts.experts(); ++e)
        s_->owned[at(e)] = options.exchange.special.contains(e) ? 0 : 1;
    }
  }
  expert_parallel(expert_parallel&&) = default;
  expert_parallel& operator=(expert_parallel&& other) noexcept {
    if (this == &other) return *this;
    leave();
    s_ = std::move(other.s_);
    return *this;
  }
  ~expert_parallel() { leave(); }

  index_t rank() const { return s_->talk.net.rank(); }
  index_t ranks() const { return s_->talk.net.ranks(); }
  bool broken() const { return s_->talk.net.broken(); }
  const placement& experts() const { return s_->experts; }
  const parallel_counts& counts() const { return s_->counts; }
  /// The plan of the last call's only chunk, and what was received for it.
  const exchange_plan& plan() const { return s_->senders[0].plan(); }
  const dispatch_plan& received() const { return s_->receivers[0].plan(); }

  /// From the next call on. Every rank adopts at the same place in the order of calls, with its new
  /// experts in place: the hash in every header tells where one did not.
  void adopt(placement experts) {
    check_size("expert_parallel", "placement.ranks()", experts.ranks(), ranks());
    check_size("expert_parallel", "placement.experts()", experts.experts(), s_->experts.experts());
    s_->experts = std::move(experts);
    s_->has_forward = false;
  }
  /// For replica_rule::ranges, the same on all ranks.
  void set_ranges(slot_ranges ranges) { s_->ranges = std::move(ranges); }

  /// y[t] = the weighted sum over t's experts, wherever they are: f(local slot, in, out) or, with
  /// scratch, f(local slot, in, out, memory) is the expert of each of this rank's slots.
  ///
  /// Shapes: x and y [T, d], T of this rank's own. Collective. Throws: on every rank where one
  /// fails. Cost: two small agreements, rows once per token and rank (or all to all: dispatcher),
  /// results once per choice.
  template <class F, writable_rows Y, executor Exec = serial>
  void forward(const matrix_view<const T>& x, const assignment& choices, Y&& y_rows, F&& f,
               const Exec& exec = {}, std::span<const std::uint8_t> mask = {},
               const matrix_view<const float>& shared = {},
               std::span<const float> shared_weight = {}) {
    state& s = *s_;
    const auto y = view(y_rows);
    const exchange_options& options = s.options.exchange;
    const index_t chunks = s.options.chunks, tokens = x.rows;
    const index_t me = rank();
    agreement& talk = s.talk;
    talk.begin("forward");
    s.has_forward = false;
    talk.guard("checks", [&] {
      check_size("expert_parallel", "choices.tokens()", choices.tokens(), tokens);
      check_size("expert_parallel", "choices.experts()", choices.experts(), s.experts.experts());
      check_size("expert_parallel", "y.rows()", y.rows, tokens);
      check_size("expert_parallel", "y.cols()", y.cols, x.cols);
      check_stride("expert_parallel", "x", x);
      check_stride("expert_parallel", "y", y);
      check_choices("expert_parallel", choices);
      if (!mask.empty())
        check_size("expert_parallel", "mask.size()", static_cast<index_t>(mask.size()), tokens);
      if (shared.rows > 0) {
        check_size("expert_parallel", "shared.rows()", shared.rows, tokens);
        check_size("expert_parallel", "shared.cols()", shared.cols, x.cols);
        check_stride("expert_parallel", "shared", shared);
      }
      if (!shared_weight.empty())
        check_size("expert_parallel", "shared_weight.size()",
                   static_cast<index_t>(shared_weight.size()), tokens);
    });
    if (options.rule >= replica_rule::even) share_counts(choices, x.cols, mask);

    const bool weights =
        options.weights == weight_on::input || options.result == exchange_result::reduced;
    talk.guard("plan", [&] {
      s.counts = {};
      s.counts.tokens = tokens;
      for (index_t i = 0; i < chunks; ++i) {
        const index_t first = tokens * i / chunks, last = tokens * (i + 1) / chunks;
        // One chunk is all there is: no copy of the choices.
        const assignment* part = &choices;
        if (chunks > 1) {
          copy_tokens(choices, first, last - first, s.parts[at(i)]);
          part = &s.parts[at(i)];
        }
        resolve_options how{.rule = options.rule,
                            .lost = options.lost,
                            .counts = s.all_counts,
                            .range_first = s.ranges.first,
                            .range = s.ranges.range,
                            .owned = s.owned};
        if (!mask.empty()) how.mask = mask.subspan(at(first), at(last - first));
        s.senders[at(i)].plan(last - first, x.cols, *part, s.experts, me, options, how);
        s.senders[at(i)].expect_results(options.result);
        s.counts.lost += s.senders[at(i)].counts().lost;
      }
    });
    if (talk.failed()) nothing(x.cols);
    exchange_headers(forward_header(x.cols, talk.failed() ? nullptr : &choices), true);
    talk.guard("room", [&] {
      for (index_t i = 0; i < chunks; ++i) {
        s.rows_from.clear();
        s.entries_from.clear();
        for (const rank_header& h : talk.headers()) {
          s.rows_from.push_back(h.rows[at(i)]);
          s.entries_from.push_back(h.entries[at(i)]);
        }
        s.receivers[at(i)].expect(s.rows_from, s.entries_from, x.cols, options);
      }
      s.counts.gathered = gathers(x.cols, weights);
      if (s.counts.gathered) {
        s.senders[0].pack_gathered(x, choices, weights);
        make_room_to_gather(x.cols, weights);
      }
    });
    talk.agree("header");

    for (index_t i = 0; i < chunks; ++i) {
      for (index_t r = 0; r < ranks(); ++r) {
        s.counts.rows_sent += s.senders[at(i)].plan().rows_to(r);
        s.counts.entries_sent += s.senders[at(i)].plan().entries_to(r);
      }
      s.counts.rows_received += s.receivers[at(i)].rows();
      s.counts.entries_received += s.receivers[at(i)].entries();
    }
    // Chunk i + 1 is on its way while chunk i is computed, and results of i - 1 go back.
    std::vector<transport::pending> rows(at(chunks));
    transport::pending results;
    const auto post = [&](index_t i) {
      const index_t first = tokens * i / chunks, last = tokens * (i + 1) / chunks;
      talk.guard("pack",
                 [&] { s.senders[at(i)].pack_rows(x.middle_rows(first, last - first), exec); });
      post_rows(rows[at(i)], i, weights);
    };
    if (s.counts.gathered)
      gather(x.cols, weights);
    else
      post(0);
    for (index_t i = 0; i < chunks; ++i) {
      exchange_receiver<T, A>& receiver = s.receivers[at(i)];
      talk.net.wait(rows[at(i)], talk.where("rows"));
      if (i + 1 < chunks) post(i + 1);
      const auto poke = [&, caller = std::this_thread::get_id()] {
        if (std::this_thread::get_id() != caller) return;
        if (i + 1 < chunks) talk.net.poke(rows[at(i + 1)]);
        talk.net.poke(results);
      };
      talk.guard("experts",
                 [&] { receiver.run(s.experts.slots(me), poking(f, poke), options, exec); });
      if (talk.failed()) receiver.no_results(options);
      const int tag = tag_of(4, i);
      exchange(
          results, tag, [&](index_t r) { return s.senders[at(i)].results_from(r); },
          [&](index_t r) { return receiver.results_to(r); });
    }
    talk.net.wait(results, talk.where("results"));
    talk.guard("combine", [&] {
      for (index_t i = 0; i < chunks; ++i) {
        const index_t first = tokens * i / chunks, n = tokens * (i + 1) / chunks - first;
        matrix_view<const float> shared_part = shared;
        if (shared.rows > 0) shared_part = shared.middle_rows(first, n);
        std::span<const float> shared_weights = shared_weight;
        if (!shared_weight.empty()) shared_weights = shared_weight.subspan(at(first), at(n));
        s.senders[at(i)].finish(x.middle_rows(first, n), part(i, choices), options,
                                y.middle_rows(first, n), exec, shared_part, shared_weights);
      }
    });
    talk.agree("end");
    s.has_forward = true;
  }

  /// The gradients of the last forward() call with the same x and choices: f(local slot, in, dout,
  /// din [, memory]) runs a slot's expert backwards and adds to gradients of its own.
  ///
  /// An expert is called once with the rows of all chunks, after all have arrived. Where f is an
  /// expert_gradient_in_two it makes din chunk by chunk while rows of the next travel, and the
  /// gradients of weights once, after the last.
  /// Shapes: dy, dx [T, d]; dweights [choices]; empty ones are not wanted. Collective. Gradients
  /// are sums, nothing is divided by the number of ranks. Throws: as forward().
  template <class F, executor Exec = serial>
  void backward(const matrix_view<const float>& x, const assignment& choices,
                const matrix_view<const float>& dy, const matrix_view<float>& dx,
                std::span<float> dweights, F&& f, const Exec& exec = {}) {
    static_assert(std::is_same_v<T, float>,
                  "[moeroute::expert_parallel] backward takes rows of float");
    state& s = *s_;
    agreement& talk = s.talk;
    const index_t chunks = s.options.chunks, slots = s.experts.slots(rank());
    talk.begin("backward");
    const bool has_forward = std::exchange(s.has_forward, false);
    const auto edge = [&](index_t i) { return x.rows * i / chunks; };
    const auto rows_of = [&](const auto& v, index_t i) {
      return v.data == nullptr ? v : v.middle_rows(edge(i), edge(i + 1) - edge(i));
    };
    const auto weights_of = [&](index_t i) {
      const index_t first = choices.first(edge(i));
      return dweights.empty() ? dweights
                              : dweights.subspan(at(first), at(choices.first(edge(i + 1)) - first));
    };
    talk.guard("pack", [&] {
      if (!has_forward) fail("expert_parallel", "backward() without a forward() call before it");
      check_size("expert_parallel", "dy.rows()", dy.rows, x.rows);
      check_size("expert_parallel", "dy.cols()", dy.cols, x.cols);
      check_size("expert_parallel", "choices.tokens()", choices.tokens(), x.rows);
      index_t before = 0;
      for (const auto& sender : s.senders) before += sender.plan().outer().choices();
      check_size("expert_parallel", "choices.choices()", choices.choices(), before);
      if (dx.data != nullptr) check_size("expert_parallel", "dx.rows()", dx.rows, x.rows);
      if (!dweights.empty())
        check_size("expert_parallel", "dweights.size()", static_cast<index_t>(dweights.size()),
                   choices.choices());
      for (index_t i = 0; i < chunks; ++i)
        s.senders[at(i)].pack_backward(rows_of(x, i), rows_of(dy, i), part(i, choices),
                                       s.options.exchange, weights_of(i), rows_of(dx, i), exec);
      // A rank that finds no room must say so while the others still listen.
      for (auto& receiver : s.receivers) receiver.expect_backward();
    });
    exchange_headers(header(dy.cols, 2), false);
    talk.agree("header");
    std::vector<transport::pending> rows(at(chunks));
    transport::pending results;
    const auto post = [&](index_t i) {
      exchange_sender<T, A>& sender = s.senders[at(i)];
      exchange_receiver<T, A>& receiver = s.receivers[at(i)];
      exchange(
          rows[at(i)], tag_of(5, i), [&](index_t r) { return receiver.gradient_rows_from(r); },
          [&](index_t r) { return sender.gradient_rows_to(r); });
      exchange(
          rows[at(i)], tag_of(6, i), [&](index_t r) { return receiver.weight_from(r); },
          [&](index_t r) { return sender.weight_to(r); });
    };
    const auto give_back = [&](index_t i) {
      exchange_receiver<T, A>& receiver = s.receivers[at(i)];
      if (talk.failed()) receiver.no_results({});
      exchange(
          results, tag_of(7, i), [&](index_t r) { return s.senders[at(i)].gradients_from(r); },
          [&](index_t r) { return receiver.gradients_to(r); });
    };
    using expert = std::remove_reference_t<F>;
    if constexpr (expert_gradient_in_two<expert>) {
      post(0);
      for (index_t i = 0; i < chunks; ++i) {
        talk.net.wait(rows[at(i)], talk.where("rows"));
        if (i + 1 < chunks) post(i + 1);
        const auto poke = [&, caller = std::this_thread::get_id()] {
          if (std::this_thread::get_id() != caller) return;
          if (i + 1 < chunks) talk.net.poke(rows[at(i + 1)]);
          talk.net.poke(results);
        };
        talk.guard("experts", [&] { s.receivers[at(i)].run_backward(poking(f, poke), exec); });
        give_back(i);
      }
      talk.guard("weights of experts", [&] { s.join.run_weights(s.receivers, slots, f, exec); });
    } else {
      for (index_t i = 0; i < chunks; ++i) post(i);
      for (transport::pending& p : rows) talk.net.wait(p, talk.where("rows"));
      talk.guard("experts", [&] {
        if (chunks == 1) return s.receivers[0].run_backward(f, exec);
        for (auto& receiver : s.receivers) receiver.begin_backward(exec);
        s.join.run(s.receivers, slots, f, exec);
        for (auto& receiver : s.receivers) receiver.end_backward(exec);
      });
      for (index_t i = 0; i < chunks; ++i) give_back(i);
    }
    talk.net.wait(results, talk.where("results"));
    talk.guard("combine", [&] {
      for (index_t i = 0; i < chunks; ++i)
        s.senders[at(i)].finish_backward(rows_of(x, i), part(i, choices), s.options.exchange,
                                         weights_of(i), rows_of(dx, i), exec);
    });
    talk.agree("end");
    s.has_forward = true;
  }

 private:
  struct state {
    state(MPI_Comm comm, placement p, const parallel_options& o)
        : options(o), talk(comm, o.transport, o.layer), experts(std::move(p)) {}

    parallel_options options;
    agreement talk;
    placement experts;
    std::vector<exchange_sender<T, A>> senders;
    std::vector<exchange_receiver<T, A>> receivers;
    joined_backward<T, A> join;
    std::vector<assignment> parts;
    std::vector<std::uint8_t> owned;
    std::vector<std::int32_t> all_counts, rows_from, entries_from;
    std::vector<rank_header> sent;
    std::vector<int> bytes_from, first_byte;
    buffer<std::byte> gathered;
    slot_ranges ranges;
    parallel_counts counts;
    bool has_forward = false;
  };

  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

  // Of a broken exchange messages may still be under way to its buffers: they stay.
  void leave() noexcept {
    if (s_ != nullptr && s_->talk.net.broken()) static_cast<void>(s_.release());
  }

  const assignment& part(index_t chunk, const assignment& choices) const {
    return s_->options.chunks > 1 ? s_->parts[at(chunk)] : choices;
  }
  // Tags differ between phases, chunks, and calls that follow one another.
  int tag_of(int phase, index_t chunk) const {
    return static_cast<int>(((s_->talk.sequence() & 1) * 16 + phase) * max_chunks + chunk);
  }

  // After a failure: no rows for anybody, so that headers are true.
  void nothing(index_t d) {
    for (auto& sender : s_->senders) {
      sender.pack_nothing(s_->experts, d);
      sender.expect_results(s_->options.exchange.result);
    }
  }

  rank_header header(index_t d, int phase) const {
    rank_header h;
    const state& s = *s_;
    const exchange_options& o = s.options.exchange;
    for (const char c : std::string_view(A::name()))
      h.machine = h.machine * 131 + static_cast<unsigned char>(c);
    h.placement = s.experts.hash();
    h.sequence = s.talk.sequence();
    h.d = d;
    h.layer = s.options.layer;
    h.type = static_cast<std::int32_t>(sizeof(T)) * 4 + (std::is_same_v<T, float>      ? 0
                                                         : std::is_same_v<T, bfloat16> ? 1
                                                                                       : 2);
    h.phase = phase;
    h.flags = static_cast<std::int32_t>(o.rule) | static_cast<std::int32_t>(o.result) << 8 |
              static_cast<std::int32_t>(o.weights) << 16 |
              static_cast<std::int32_t>(s.options.dispatch) << 24;
    h.gather_bytes = s.options.gather_bytes;
    h.experts = static_cast<std::int32_t>(s.experts.experts());
    h.chunks = static_cast<std::int32_t>(s.options.chunks);
    return h;
  }

  rank_header forward_header(index_t d, const assignment* choices) const {
    rank_header h = header(d, 1);
    if (choices == nullptr) return h;
    h.tokens = static_cast<std::int32_t>(choices->tokens());
    h.choices = static_cast<std::int32_t>(choices->choices());
    return h;
  }

  // With the numbers of rows for each rank, where rows follow.
  void exchange_headers(const rank_header& mine, bool rows) {
    state& s = *s_;
    s.sent.assign(at(ranks()), mine);
    for (index_t r = 0; rows && r < ranks(); ++r)
      for (std::size_t c = 0; c < s.senders.size(); ++c) {
        const exchange_plan& plan = s.senders[c].plan();
        s.sent[at(r)].rows[c] = static_cast<std::int32_t>(plan.rows_to(r));
        s.sent[at(r)].entries[c] = static_cast<std::int32_t>(plan.entries_to(r));
      }
    s.talk.exchange_headers(s.sent);
  }

  // --- all tokens to all ranks ---

  gathered_shape shape_of(index_t r, index_t d, bool weights) const {
    const rank_header& h = s_->talk.headers()[at(r)];
    return {h.tokens, h.choices, d, weights};
  }
  bool gathers(index_t d, bool weights) const {
    const parallel_options& o = s_->options;
    if (o.dispatch != dispatcher::automatic) return o.dispatch == dispatcher::all_gather;
    index_t tokens = 0, choices = 0, bytes = 0;
    for (index_t r = 0; r < ranks(); ++r) {
      const gathered_shape shape = shape_of(r, d, weights);
      tokens += shape.tokens;
      choices += shape.choices;
      bytes += shape.bytes(sizeof(T));
    }
    return o.chunks == 1 && ranks() > 1 && bytes <= 0x7fffffff &&
           gather_excess_bytes(s_->experts.experts(), ranks(), tokens, choices,
                               static_cast<double>(d * index_t{sizeof(T)})) <=
               static_cast<double>(o.gather_bytes);
  }
  void make_room_to_gather(index_t d, bool weights) {
    state& s = *s_;
    s.bytes_from.assign(at(ranks()), 0);
    s.first_byte.assign(at(ranks()), 0);
    index_t total = 0;
    for (index_t r = 0; r < ranks(); ++r) {
      const index_t bytes = shape_of(r, d, weights).bytes(sizeof(T));
      check_range("expert_parallel", "gathered bytes", total + bytes, 0, std::int32_t{0x7fffffff});
      s.bytes_from[at(r)] = static_cast<int>(bytes);
      s.first_byte[at(r)] = static_cast<int>(total);
      total += bytes;
    }
    s.gathered.resize(total);
  }
  void gather(index_t d, bool weights) {
    state& s = *s_;
    const std::span<std::byte> all(s.gathered.data(), at(s.gathered.size()));
    s.talk.net.all_gather(s.senders[0].gathered(), s.bytes_from, s.first_byte, all,
                          s.talk.where("rows"));
    s.talk.guard("rows", [&] {
      for (index_t r = 0; r < ranks(); ++r)
        s.receivers[0].take_gathered(
            r, all.subspan(at(s.first_byte[at(r)]), at(s.bytes_from[at(r)])),
            shape_of(r, d, weights), s.experts.first_slot(rank()), s.experts.slots(rank()));
    });
  }

  // Every rank's counts of every expert, for rules that cut over all ranks' tokens.
  void share_counts(const assignment& choices, index_t d, std::span<const std::uint8_t> mask) {
    state& s = *s_;
    const index_t experts = s.experts.experts();
    s.all_counts.assign(at(ranks() * experts), 0);
    const auto row = [&](index_t r) {
      return std::span<std::int32_t>(s.all_counts).subspan(at(r * experts), at(experts));
    };
    s.talk.guard("counts", [&] {
      check_size("expert_parallel", "chunks with a rule of counts", s.options.chunks, 1);
      count_choices(choices, row(rank()), s.owned, mask);
    });
    exchange_headers(header(d, 0), false);
    s.talk.agree("counts");
    transport::pending p;
    for (index_t r = 0; r < ranks(); ++r) {
      if (r == rank()) continue;
      s.talk.net.receive(p, std::as_writable_bytes(row(r)), r, tag_of(8, 0));
      s.talk.net.send(p, std::as_bytes(row(rank())), r, tag_of(8, 0));
    }
    s.talk.net.wait(p, s.talk.where("counts"));
  }

  // A message of each pair; the own rank's is copied.
  template <class To, class From>
  void exchange(transport::pending& p, int tag, To&& to, From&& from) {
    for (index_t i = 1; i < ranks(); ++i) {
      const index_t r = (rank() + ranks() - i) % ranks();
      s_->talk.net.receive(p, std::as_writable_bytes(to(r)), r, tag);
    }
    for (index_t i = 1; i < ranks(); ++i) {
      const index_t r = (rank() + i) % ranks();
      s_->talk.net.send(p, std::as_bytes(from(r)), r, tag);
    }
    const auto own_from = from(rank());
    const auto own_to = to(rank());
    std::copy(own_from.begin(), own_from.end(), own_to.begin());
  }
  void post_rows(transport::pending& p, index_t chunk, bool weights) {
    exchange_sender<T, A>& sender = s_->senders[at(chunk)];
    exchange_receiver<T, A>& receiver = s_->receivers[at(chunk)];
    exchange(
        p, tag_of(0, chunk), [&](index_t r) { return receiver.entries_of_row_from(r); },
        [&](index_t r) { return sender.entries_of_row_to(r); });
    exchange(
        p, tag_of(1, chunk), [&](index_t r) { return receiver.local_slot_from(r); },
        [&](index_t r) { return sender.local_slot_to(r); });
    if (weights)
      exchange(
          p, tag_of(2, chunk), [&](index_t r) { return receiver.weight_from(r); },
          [&](index_t r) { return sender.weight_to(r); });
    exchange(
        p, tag_of(3, chunk), [&](index_t r) { return receiver.rows_from(r); },
        [&](index_t r) { return sender.rows_to(r); });
  }

  // The experts, with a poke at the messages after each call.
  template <class F, class Poke>
  struct poking_experts {
    F& f;
    const Poke& poke;

    index_t scratch_floats() const
      requires requires(F& g) { g.scratch_floats(); }
    {
      return f.scratch_floats();
    }
    void operator()(expert_id slot, matrix_view<const float> in, matrix_view<float> out) const
      requires expert_function<F, float, float>
    {
      f(slot, in, out);
      poke();
    }
    void operator()(expert_id slot, matrix_view<const float> in, matrix_view<float> out,
                    float* memory) const
      requires expert_function_with_scratch<F, float, float>
    {
      f(slot, in, out, memory);
      poke();
    }
    void operator()(expert_id slot, matrix_view<const float> in, matrix_view<const float> dout,
                    matrix_view<float> din) const
      requires expert_gradient<F, float, float, float>
    {
      f(slot, in, dout, din);
      poke();
    }
    void operator()(expert_id slot, matrix_view<const float> in, matrix_view<const float> dout,
                    matrix_view<float> din, float* memory) const
      requires expert_gradient_with_scratch<F, float, float, float>
    {
      f(slot, in, dout, din, memory);
      poke();
    }
  };
  template <class F, class Poke>
  static poking_experts<std::remove_reference_t<F>, Poke> poking(F& f, const Poke& poke) {
    return {f, poke};
  }

  std::unique_ptr<state> s_;
};

}  // namespace moeroute::mpi
