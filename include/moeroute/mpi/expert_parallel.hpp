// Experts over the ranks of an MPI communicator: the phases of the exchange with messages between
// them, and agreement on every rank about what failed.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <moeroute/layer/rank_exchange.hpp>
#include <moeroute/mpi/transport.hpp>

namespace moeroute::mpi {

/// Most chunks of a call.
inline constexpr index_t max_chunks = 16;

struct parallel_options {
  exchange_options exchange{};
  transport_options transport{};
  /// A number of the layer's own, the same on all ranks: messages name it. Objects made in another
  /// order than on other ranks are refused by it; calls in another order end at the deadline.
  std::int32_t layer = 0;
  /// Tokens are cut into so many chunks, rows of one travel while another is computed; forward only
  /// (the backward pass takes one).
  index_t chunks = 1;
};

/// What the last call sent and received on this rank.
struct parallel_counts {
  index_t tokens = 0, rows_sent = 0, entries_sent = 0, rows_received = 0, entries_received = 0;
  index_t lost = 0;  ///< choices of lost experts that were dropped
};

/// What every rank tells every other before rows move.
struct rank_header {
  static constexpr std::uint32_t right_magic = 0x45504d31;

  std::uint32_t magic = right_magic;
  std::uint32_t version = 1;
  std::uint64_t machine = 0;    ///< instruction set: other bits on others
  std::uint64_t placement = 0;  ///< its hash
  std::int64_t sequence = 0;
  std::int64_t d = 0;
  std::int32_t layer = 0;
  std::int32_t type = 0;   ///< of rows, their size in bytes and kind
  std::int32_t phase = 0;  ///< counts, forward, backward
  std::int32_t flags = 0;  ///< rule, result, weights
  std::int32_t experts = 0;
  std::int32_t chunks = 0;
  std::array<std::int32_t, max_chunks> rows{}, entries{};
};
static_assert(std::is_trivially_copyable_v<rank_header>);

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
    const index_t ranks = s_->net.ranks();
    s_->call = "construction";
    guard("options", [&] {
      check_size("expert_parallel", "placement.ranks()", s_->experts.ranks(), ranks);
      check_range("expert_parallel", "chunks", options.chunks, 1, max_chunks);
    });
    agree("options");
    s_->has_forward = false;
    s_->senders = std::vector<exchange_sender<T, A>>(at(options.chunks));
    s_->receivers = std::vector<exchange_receiver<T, A>>(at(options.chunks));
    s_->parts.resize(at(options.chunks));
    s_->headers.resize(at(ranks));
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

  index_t rank() const { return s_->net.rank(); }
  index_t ranks() const { return s_->net.ranks(); }
  bool broken() const { return s_->net.broken(); }
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
  /// fails. Cost: two small agreements, then rows once per token and rank, results once per choice.
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
    begin("forward");
    guard("checks", [&] {
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
    guard("pack", [&] {
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
        s.senders[at(i)].pack(x.middle_rows(first, last - first), *part, s.experts, me, options,
                              how, exec);
        if (options.result == exchange_result::reduced)
          s.senders[at(i)].pack_weights(part->weights());
        s.counts.lost += s.senders[at(i)].counts().lost;
      }
    });
    if (s.failed) nothing(x.cols);
    rank_header mine = header(x.cols, 1);
    for (index_t i = 0; i < chunks; ++i) s.senders[at(i)].expect_results(options.result);
    exchange_headers(mine, &s.senders);
    guard("room", [&] {
      for (index_t i = 0; i < chunks; ++i) {
        s.rows_from.clear();
        s.entries_from.clear();
        for (const rank_header& h : s.headers) {
          s.rows_from.push_back(h.rows[at(i)]);
          s.entries_from.push_back(h.entries[at(i)]);
        }
        s.receivers[at(i)].expect(s.rows_from, s.entries_from, x.cols, options);
      }
    });
    agree("header");

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
    post_rows(rows[0], 0, weights);
    for (index_t i = 0; i < chunks; ++i) {
      exchange_receiver<T, A>& receiver = s.receivers[at(i)];
      s.net.wait(rows[at(i)], where("rows"));
      if (i + 1 < chunks) post_rows(rows[at(i + 1)], i + 1, weights);
      const auto poke = [&, caller = std::this_thread::get_id()] {
        if (std::this_thread::get_id() != caller) return;
        if (i + 1 < chunks) s.net.poke(rows[at(i + 1)]);
        s.net.poke(results);
      };
      if (!s.failed)
        guard("experts",
              [&] { receiver.run(s.experts.slots(me), poking(f, poke), options, exec); });
      if (s.failed) receiver.no_results(options);
      const int tag = tag_of(4, i);
      exchange(
          results, tag, [&](index_t r) { return s.senders[at(i)].results_from(r); },
          [&](index_t r) { return receiver.results_to(r); });
    }
    s.net.wait(results, where("results"));
    if (!s.failed)
      guard("combine", [&] {
        for (index_t i = 0; i < chunks; ++i) {
          const index_t first = tokens * i / chunks, n = tokens * (i + 1) / chunks - first;
          matrix_view<const float> shared_part = shared;
          if (shared.rows > 0) shared_part = shared.middle_rows(first, n);
          std::span<const float> shared_weights = shared_weight;
          if (!shared_weight.empty()) shared_weights = shared_weight.subspan(at(first), at(n));
          s.senders[at(i)].finish(x.middle_rows(first, n), chunks > 1 ? s.parts[at(i)] : choices,
                                  options, y.middle_rows(first, n), exec, shared_part,
                                  shared_weights);
        }
      });
    agree("end");
  }

  /// The gradients of the last forward() call with the same x and choices: f(local slot, in, dout,
  /// din [, memory]) runs a slot's expert backwards and adds to gradients of its own.
  ///
  /// Shapes: dy, dx [T, d]; dweights [choices]; empty ones are not wanted. Collective. Gradients
  /// are sums, nothing is divided by the number of ranks. Throws: as forward().
  template <class F, executor Exec = serial>
  void backward(const matrix_view<const float>& x, const assignment& choices,
                const matrix_view<const float>& dy, const matrix_view<float>& dx,
                std::span<float> dweights, F&& f, const Exec& exec = {}) {
    static_assert(std::is_same_v<T, float>,
                  "[moeroute::expert_parallel] backward takes rows of float");
    state& s = *s_;
    begin("backward");
    exchange_sender<T, A>& sender = s.senders[0];
    exchange_receiver<T, A>& receiver = s.receivers[0];
    guard("pack", [&] {
      check_size("expert_parallel", "chunks", s.options.chunks, 1);
      if (!s.has_forward) fail("expert_parallel", "backward() without a forward() call before it");
      check_size("expert_parallel", "dy.rows()", dy.rows, x.rows);
      check_size("expert_parallel", "dy.cols()", dy.cols, x.cols);
      check_size("expert_parallel", "choices.choices()", choices.choices(),
                 sender.plan().outer().choices());
      if (dx.data != nullptr) check_size("expert_parallel", "dx.rows()", dx.rows, x.rows);
      sender.pack_backward(x, dy, choices, s.options.exchange, dweights, dx, exec);
    });
    rank_header mine = header(dy.cols, 2);
    exchange_headers(mine, nullptr);
    agree("header");
    receiver.expect_backward();
    transport::pending rows;
    exchange(
        rows, tag_of(5, 0), [&](index_t r) { return receiver.gradient_rows_from(r); },
        [&](index_t r) { return sender.gradient_rows_to(r); });
    exchange(
        rows, tag_of(6, 0), [&](index_t r) { return receiver.weight_from(r); },
        [&](index_t r) { return sender.weight_to(r); });
    s.net.wait(rows, where("rows"));
    guard("experts", [&] { receiver.run_backward(f, exec); });
    if (s.failed) receiver.no_results({});
    transport::pending results;
    exchange(
        results, tag_of(7, 0), [&](index_t r) { return sender.gradients_from(r); },
        [&](index_t r) { return receiver.gradients_to(r); });
    s.net.wait(results, where("results"));
    if (!s.failed)
      guard("combine",
            [&] { sender.finish_backward(x, choices, s.options.exchange, dweights, dx, exec); });
    agree("end");
    s.has_forward = true;
  }

 private:
  struct state {
    state(MPI_Comm comm, placement p, const parallel_options& o)
        : options(o), net(comm, o.transport), experts(std::move(p)) {}

    parallel_options options;
    transport net;
    placement experts;
    std::vector<exchange_sender<T, A>> senders;
    std::vector<exchange_receiver<T, A>> receivers;
    std::vector<assignment> parts;
    std::vector<rank_header> headers, sent;
    std::vector<std::uint8_t> owned;
    std::vector<std::int32_t> all_counts, rows_from, entries_from;
    slot_ranges ranges;
    parallel_counts counts;
    std::int64_t sequence = 0;
    bool failed = false, has_forward = false;
    std::exception_ptr thrown;
    std::string text;
    const char* call = "";
  };

  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

  // Of a broken exchange messages may still be under way to its buffers: they stay.
  void leave() noexcept {
    if (s_ != nullptr && s_->net.broken()) static_cast<void>(s_.release());
  }

  void begin(const char* call) {
    state& s = *s_;
    if (s.net.broken())
      fail("expert_parallel", "broken: an earlier call of MPI failed or a rank did not arrive");
    ++s.sequence;
    s.failed = false;
    s.thrown = nullptr;
    s.text.clear();
    s.call = call;
  }
  std::string where(const char* phase) const {
    return "layer " + std::to_string(s_->options.layer) + ", " + s_->call + ", " + phase;
  }
  // Tags differ between phases, chunks, and calls that follow one another.
  int tag_of(int phase, index_t chunk) const {
    return static_cast<int>(((s_->sequence & 1) * 16 + phase) * max_chunks + chunk);
  }

  // Runs a phase; what it throws is kept, and the rank goes on so that others need not wait.
  template <class F>
  void guard(const char* phase, F&& f) {
    state& s = *s_;
    if (s.failed) return;
#if MOEROUTE_EXCEPTIONS
    try {
      f();
    } catch (const std::exception& e) {
      keep(phase, e.what());
      s.thrown = std::current_exception();
    } catch (...) {
      keep(phase, "an exception of another kind");
      s.thrown = std::current_exception();
    }
#else
    static_cast<void>(phase);
    f();
#endif
  }
  void keep(const char* phase, const std::string& text) {
    s_->failed = true;
    s_->text = std::string("failed in ") + phase + " of layer " +
               std::to_string(s_->options.layer) + ": " + text;
  }

  // Every rank learns whether one has failed, and which; then all throw.
  void agree(const char* phase) {
    state& s = *s_;
    const std::int64_t lowest_first = ranks() - 1 - rank();
    // Whoever threw comes before those who only noticed that others differ.
    const std::int64_t code = !s.failed ? 0 : s.thrown != nullptr ? 2 : 1;
    const std::int64_t worst =
        s.net.max_of_all(code << 32 | (code != 0 ? lowest_first : 0), where(phase));
    if (worst >> 32 == 0) {
      s.has_forward = true;
      return;
    }
    s.has_forward = false;
    const index_t who = ranks() - 1 - static_cast<index_t>(worst & 0x7fffffff);
    const std::string text = s.net.text_of(who, s.text, where(phase));
#if MOEROUTE_EXCEPTIONS
    if (s.thrown != nullptr) std::rethrow_exception(s.thrown);
#endif
    fail("expert_parallel", "rank " + std::to_string(who) + " " + text);
  }

  // After a failure: no rows for anybody, so that headers are true.
  void nothing(index_t d) {
    for (auto& sender : s_->senders) sender.pack_nothing(s_->experts, d);
  }

  rank_header header(index_t d, int phase) const {
    rank_header h;
    const state& s = *s_;
    const exchange_options& o = s.options.exchange;
    for (const char c : std::string_view(A::name()))
      h.machine = h.machine * 131 + static_cast<unsigned char>(c);
    h.placement = s.experts.hash();
    h.sequence = s.sequence;
    h.d = d;
    h.layer = s.options.layer;
    h.type = static_cast<std::int32_t>(sizeof(T)) * 4 + (std::is_same_v<T, float>      ? 0
                                                         : std::is_same_v<T, bfloat16> ? 1
                                                                                       : 2);
    h.phase = phase;
    h.flags = static_cast<std::int32_t>(o.rule) | static_cast<std::int32_t>(o.result) << 8 |
              static_cast<std::int32_t>(o.weights) << 16;
    h.experts = static_cast<std::int32_t>(s.experts.experts());
    h.chunks = static_cast<std::int32_t>(s.options.chunks);
    return h;
  }

  // What must agree, by name; "" where it does.
  static std::string disagreement(const rank_header& a, const rank_header& b) {
    const auto differs = [](const char* what, auto x, auto y) {
      return std::string(what) + " is " + std::to_string(x) + " there and " + std::to_string(y) +
             " here";
    };
    if (b.magic != a.magic || b.version != a.version) return "its messages are of another version";
    if (b.layer != a.layer) return differs("the layer", b.layer, a.layer);
    if (b.sequence != a.sequence) return differs("the number of the call", b.sequence, a.sequence);
    if (b.phase != a.phase)
      return differs("the phase (0 counts, 1 forward, 2 backward)", b.phase, a.phase);
    if (b.d != a.d) return differs("d", b.d, a.d);
    if (b.type != a.type) return differs("the type of rows", b.type, a.type);
    if (b.experts != a.experts) return differs("the number of experts", b.experts, a.experts);
    if (b.chunks != a.chunks) return differs("the number of chunks", b.chunks, a.chunks);
    if (b.flags != a.flags)
      return differs("the rule, result or place of weights", b.flags, a.flags);
    if (b.placement != a.placement) return "its placement is another";
    if (b.machine != a.machine) return "its instruction set is another";
    return "";
  }

  // Headers to and from everybody; a difference is a failure of whoever sees it.
  void exchange_headers(const rank_header& mine,
                        const std::vector<exchange_sender<T, A>>* senders) {
    state& s = *s_;
    s.sent.assign(at(ranks()), mine);
    transport::pending p;
    for (index_t i = 1; i < ranks(); ++i) {
      const index_t from = (rank() + ranks() - i) % ranks();
      s.net.receive(p, std::as_writable_bytes(std::span(&s.headers[at(from)], 1)), from,
                    header_tag);
    }
    for (index_t i = 0; i < ranks(); ++i) {
      const index_t to = (rank() + i) % ranks();
      rank_header& h = s.sent[at(to)];
      for (std::size_t c = 0; senders != nullptr && c < senders->size(); ++c) {
        h.rows[c] = static_cast<std::int32_t>((*senders)[c].plan().rows_to(to));
        h.entries[c] = static_cast<std::int32_t>((*senders)[c].plan().entries_to(to));
      }
      if (to == rank())
        s.headers[at(to)] = h;
      else
        s.net.send(p, std::as_bytes(std::span(&h, 1)), to, header_tag);
    }
    s.net.wait(p, where("header"));
    for (index_t r = 0; r < ranks() && !s.failed; ++r)
      if (const std::string said = disagreement(mine, s.headers[at(r)]); !said.empty()) {
        s.failed = true;
        s.text = "disagrees with rank " + std::to_string(r) + " in layer " +
                 std::to_string(s.options.layer) + ": " + said;
      }
  }

  // Every rank's counts of every expert, for rules that cut over all ranks' tokens.
  void share_counts(const assignment& choices, index_t d, std::span<const std::uint8_t> mask) {
    state& s = *s_;
    const index_t experts = s.experts.experts();
    s.all_counts.assign(at(ranks() * experts), 0);
    const auto row = [&](index_t r) {
      return std::span<std::int32_t>(s.all_counts).subspan(at(r * experts), at(experts));
    };
    guard("counts", [&] {
      check_size("expert_parallel", "chunks with a rule of counts", s.options.chunks, 1);
      count_choices(choices, row(rank()), s.owned, mask);
    });
    exchange_headers(header(d, 0), nullptr);
    agree("counts");
    s.has_forward = false;
    transport::pending p;
    for (index_t r = 0; r < ranks(); ++r) {
      if (r == rank()) continue;
      s.net.receive(p, std::as_writable_bytes(row(r)), r, tag_of(8, 0));
      s.net.send(p, std::as_bytes(row(rank())), r, tag_of(8, 0));
    }
    s.net.wait(p, where("counts"));
  }

  // A message of each pair; the own rank's is copied.
  template <class To, class From>
  void exchange(transport::pending& p, int tag, To&& to, From&& from) {
    for (index_t i = 1; i < ranks(); ++i) {
      const index_t r = (rank() + ranks() - i) % ranks();
      s_->net.receive(p, std::as_writable_bytes(to(r)), r, tag);
    }
    for (index_t i = 1; i < ranks(); ++i) {
      const index_t r = (rank() + i) % ranks();
      s_->net.send(p, std::as_bytes(from(r)), r, tag);
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
  };
  template <class F, class Poke>
  static poking_experts<std::remove_reference_t<F>, Poke> poking(F& f, const Poke& poke) {
    return {f, poke};
  }

  static constexpr int header_tag = 1 << 14;

  std::unique_ptr<state> s_;
};

}  // namespace moeroute::mpi
