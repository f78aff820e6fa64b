// Agreement between ranks: what each says before rows move, and how all of them learn what failed
// on one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <moeroute/mpi/transport.hpp>

namespace moeroute::mpi {

/// Most chunks of a call.
inline constexpr index_t max_chunks = 16;

/// What every rank tells every other before rows move.
struct rank_header {
  static constexpr std::uint32_t right_magic = 0x45504d31;

  std::uint32_t magic = right_magic;
  std::uint32_t version = 2;
  std::uint64_t machine = 0;    ///< instruction set: other bits on others
  std::uint64_t placement = 0;  ///< its hash
  std::int64_t sequence = 0;
  std::int64_t d = 0;
  std::int32_t layer = 0;
  std::int32_t type = 0;   ///< of rows, their size in bytes and kind
  std::int32_t phase = 0;  ///< counts, forward, backward
  std::int32_t flags = 0;  ///< rule, result, weights, dispatcher
  std::int32_t experts = 0;
  std::int32_t chunks = 0;
  std::int64_t gather_bytes = 0;
  std::int32_t tokens = 0, choices = 0;  ///< of this rank
  std::array<std::int32_t, max_chunks> rows{}, entries{};
};
static_assert(std::is_trivially_copyable_v<rank_header>);

/// What must agree, by name; "" where it does.
inline std::string disagreement(const rank_header& a, const rank_header& b) {
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
  if (b.gather_bytes != a.gather_bytes)
    return differs("gather_bytes", b.gather_bytes, a.gather_bytes);
  if (b.flags != a.flags)
    return differs("the rule, result, place of weights or dispatcher", b.flags, a.flags);
  if (b.placement != a.placement) return "its placement is another";
  if (b.machine != a.machine) return "its instruction set is another";
  return "";
}

/// Keeps the ranks of a communicator in step through collective calls: a phase that throws on one
/// is kept until all have agreed on it, then all throw.
class agreement {
 public:
  agreement(MPI_Comm comm, const transport_options& options, std::int32_t layer)
      : net(comm, options), layer_(layer) {}

  transport net;

  bool failed() const { return failed_; }
  std::int64_t sequence() const { return sequence_; }

  /// A collective call begins. Throws: error where an earlier one broke the communicator.
  void begin(const char* call) {
    if (net.broken())
      fail("expert_parallel", "broken: an earlier call of MPI failed or a rank did not arrive");
    ++sequence_;
    failed_ = false;
    thrown_ = nullptr;
    text_.clear();
    call_ = call;
  }
  /// For messages: the layer, the call and the phase.
  waited_for where(const char* phase) const { return {phase, call_, layer_}; }

  /// Runs a phase, unless one has failed; what it throws is kept, and the rank goes on so that
  /// others need not wait.
  template <class F>
  void guard(const char* phase, F&& f) {
    if (failed_) return;
#if MOEROUTE_EXCEPTIONS
    try {
      f();
    } catch (const std::exception& e) {
      keep(phase, e.what());
      thrown_ = std::current_exception();
    } catch (...) {
      keep(phase, "an exception of another kind");
      thrown_ = std::current_exception();
    }
#else
    static_cast<void>(phase);
    f();
#endif
  }

  /// Every rank learns whether one has failed, and which; then all throw, whoever threw what it
  /// threw.
  void agree(const char* phase) {
    const index_t last = net.ranks() - 1;
    // Whoever threw comes before those who only noticed that others differ; then the lowest rank.
    const std::int64_t code = !failed_ ? 0 : thrown_ != nullptr ? 2 : 1;
    const std::int64_t worst =
        net.max_of_all(code << 32 | (code != 0 ? last - net.rank() : 0), where(phase));
    if (worst >> 32 == 0) return;
    failed_ = true;
    const index_t who = last - static_cast<index_t>(worst & 0x7fffffff);
    const std::string text = net.text_of(who, text_, where(phase));
#if MOEROUTE_EXCEPTIONS
    if (thrown_ != nullptr) std::rethrow_exception(thrown_);
#endif
    fail("expert_parallel", "rank " + std::to_string(who) + " " + text);
  }

  /// Headers to and from everybody: sent[r] to rank r, received in headers(); a difference from
  /// this rank's own is a failure of whoever sees it.
  void exchange_headers(std::span<const rank_header> sent) {
    const index_t ranks = net.ranks(), me = net.rank();
    sent_.assign(sent.begin(), sent.end());
    headers_.resize(at(ranks));
    transport::pending p;
    for (index_t i = 1; i < ranks; ++i) {
      const index_t from = (me + ranks - i) % ranks;
      net.receive(p, std::as_writable_bytes(std::span(&headers_[at(from)], 1)), from, header_tag);
    }
    for (index_t i = 1; i < ranks; ++i) {
      const index_t to = (me + i) % ranks;
      net.send(p, std::as_bytes(std::span(&sent_[at(to)], 1)), to, header_tag);
    }
    headers_[at(me)] = sent_[at(me)];
    net.wait(p, where("header"));
    for (index_t r = 0; r < ranks && !failed_; ++r)
      if (const std::string said = disagreement(sent_[at(me)], headers_[at(r)]); !said.empty()) {
        failed_ = true;
        text_ = "disagrees with rank " + std::to_string(r) + " in layer " + std::to_string(layer_) +
                ": " + said;
      }
  }
  std::span<const rank_header> headers() const { return headers_; }

 private:
  static constexpr int header_tag = 1 << 14;

  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }
  void keep(const char* phase, const std::string& text) {
    failed_ = true;
    text_ = std::string("failed in ") + phase + " of layer " + std::to_string(layer_) + ": " + text;
  }

  std::int32_t layer_;
  std::int64_t sequence_ = 0;
  bool failed_ = false;
  std::exception_ptr thrown_;
  std::string text_;
  const char* call_ = "construction";
  std::vector<rank_header> headers_, sent_;
};

}  // namespace moeroute::mpi
