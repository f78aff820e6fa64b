// The door to MPI: opt-in, include it and link moeroute::mpi. The library gives messages between
// ranks; the door adds deadlines, agreement on what failed, and messages of any size.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute::mpi {

struct transport_options {
  /// Longest wait for other ranks, in seconds; what is late then is named.
  double deadline = 300.0;
  /// Longest single message: longer ones go in pieces. A multiple of nothing: any number of bytes.
  index_t bytes_per_message = index_t{512} << 20;
};

/// What a rank waits for, for messages of what did not arrive.
struct waited_for {
  const char* phase = "";
  const char* call = "";  ///< empty: there is no layer yet
  std::int32_t layer = 0;

  std::string text() const {
    if (*call == '\0') return phase;
    return "layer " + std::to_string(layer) + ", " + call + ", " + phase;
  }
};

/// Point-to-point messages of a communicator of its own, with deadlines.
///
/// Only the thread that calls makes MPI calls: MPI_THREAD_FUNNELED is enough. After a deadline it
/// is broken(): every later call refuses at once, and nothing waits for the missing rank again.
class transport {
 public:
  /// Collective: all ranks of `comm` make one. Throws: error where MPI does not run; on every rank
  /// where an option is out of range on one, or the longest message is not the same on all.
  explicit transport(MPI_Comm comm, const transport_options& options = {}) : options_(options) {
    int there = 0, over = 0;
    MPI_Initialized(&there);
    MPI_Finalized(&over);
    if (there == 0 || over != 0) fail("mpi", "MPI is not running: call MPI_Init first");
    check(MPI_Comm_dup(comm, &comm_), "MPI_Comm_dup");
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
    agree_on_options();
  }
  transport(const transport&) = delete;
  transport& operator=(const transport&) = delete;
  ~transport() {
    int over = 0;
    MPI_Finalized(&over);
    // Of a broken one requests may be left, which a free would wait for.
    if (over == 0 && !broken_ && comm_ != MPI_COMM_NULL) MPI_Comm_free(&comm_);
  }

  index_t rank() const { return rank_; }
  index_t ranks() const { return size_; }
  bool broken() const { return broken_; }
  const transport_options& options() const { return options_; }

  /// Messages on their way.
  class pending {
   public:
    bool done() const { return requests.empty(); }

   private:
    friend transport;
    struct message {
      std::byte* data;
      index_t left;
      int peer, tag;
      bool receives;
    };
    std::vector<message> messages;      // what is left of each
    std::vector<MPI_Request> requests;  // the pieces under way
    std::vector<std::size_t> owner;     // the message of each request
  };

  /// Adds a message to those on their way. Nothing is sent to the own rank: copy it.
  void send(pending& p, std::span<const std::byte> data, index_t to, int tag) {
    add(p, const_cast<std::byte*>(data.data()), static_cast<index_t>(data.size()), to, tag, false);
  }
  void receive(pending& p, std::span<std::byte> data, index_t from, int tag) {
    add(p, data.data(), static_cast<index_t>(data.size()), from, tag, true);
  }

  /// Lets messages go on; returns whether all have ended.
  bool poke(pending& p) {
    if (p.requests.empty()) return true;
    int count = 0;
    ended_.resize(p.requests.size());
    check(MPI_Testsome(static_cast<int>(p.requests.size()), p.requests.data(), &count,
                       ended_.data(), MPI_STATUSES_IGNORE),
          "MPI_Testsome");
    if (count == MPI_UNDEFINED || count == 0) return false;
    for (int i = 0; i < count; ++i)
      post(p, static_cast<std::size_t>(ended_[static_cast<std::size_t>(i)]));
    std::size_t kept = 0;
    for (std::size_t i = 0; i < p.requests.size(); ++i) {
      if (p.requests[i] == MPI_REQUEST_NULL) continue;
      p.requests[kept] = p.requests[i];
      p.owner[kept++] = p.owner[i];
    }
    p.requests.resize(kept);
    p.owner.resize(kept);
    if (kept == 0) p.messages.clear();
    return kept == 0;
  }

  /// Waits until all have ended.
  ///
  /// Throws: error that names the ranks that did not arrive, after the deadline; broken() then.
  void wait(pending& p, const waited_for& what) {
    // Most are there soon: before anybody looks at the clock or gives the processor away.
    for (int i = 0; i < polls; ++i)
      if (poke(p)) return;
    const auto began = std::chrono::steady_clock::now();
    while (!poke(p)) {
      if (late(began)) {
        std::vector<int> missing;
        for (std::size_t i = 0; i < p.requests.size(); ++i)
          if (p.messages[p.owner[i]].receives) missing.push_back(p.messages[p.owner[i]].peer);
        if (missing.empty())
          for (const std::size_t m : p.owner) missing.push_back(p.messages[m].peer);
        give_up(missing, what);
      }
      std::this_thread::yield();
    }
  }

  /// The greatest of all ranks' values.
  std::int64_t max_of_all(std::int64_t value, const waited_for& what) {
    refuse_broken();
    std::int64_t most = value;
    MPI_Request request = MPI_REQUEST_NULL;
    // In memory of its own: after a deadline it may still be written.
    auto* const both = new std::int64_t[2]{value, value};
    check(MPI_Iallreduce(&both[0], &both[1], 1, MPI_INT64_T, MPI_MAX, comm_, &request),
          "MPI_Iallreduce");
    wait_collective(request, what);
    most = both[1];
    delete[] both;
    return most;
  }

  /// Every rank's message on all: bytes[r] of rank r from first[r] of `all` on.
  ///
  /// Of a broken one all four may still be read and written.
  void all_gather(std::span<const std::byte> mine, const std::vector<int>& bytes,
                  const std::vector<int>& first, std::span<std::byte> all, const waited_for& what) {
    refuse_broken();
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Iallgatherv(mine.data(), static_cast<int>(mine.size()), MPI_BYTE, all.data(),
                          bytes.data(), first.data(), MPI_BYTE, comm_, &request),
          "MPI_Iallgatherv");
    wait_collective(request, what);
  }

  /// `root`'s text on every rank, its first 200 characters.
  std::string text_of(index_t root, const std::string& text, const waited_for& what) {
    refuse_broken();
    auto* const buffer = new char[201]();
    if (root == rank_) text.copy(buffer, 200);
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Ibcast(buffer, 201, MPI_CHAR, static_cast<int>(root), comm_, &request), "MPI_Ibcast");
    wait_collective(request, what);
    std::string got(buffer);
    delete[] buffer;
    return got;
  }

 private:
  static constexpr int polls = 64;

  // Pieces of a message match only where all ranks cut alike.
  void agree_on_options() {
    const double deadline = options_.deadline;
    const index_t bytes = options_.bytes_per_message;
    const bool fits = deadline > 0.0 && bytes >= 1 && bytes <= 0x7fffffff;
    if (!(deadline > 0.0)) options_.deadline = transport_options{}.deadline;
    const std::int64_t mine = fits ? bytes : 0, most = max_of_all(mine, {"options"}),
                       least = -max_of_all(-mine, {"options"});
    if (fits && most == least) return;
    MPI_Comm_free(&comm_);
    if (!(deadline > 0.0)) fail_value("mpi", "deadline", deadline, "> 0");
    check_range("mpi", "bytes_per_message", bytes, 1, 0x7fffffff);
    if (least == 0) fail("mpi", "transport options of another rank are out of range");
    fail("mpi", "bytes_per_message is " + std::to_string(bytes) + " here, on other ranks from " +
                    std::to_string(least) + " to " + std::to_string(most) +
                    ": expected the same on all");
  }
  // What is under way after a failed call is unknown.
  void check(int code, const char* call) {
    if (code == MPI_SUCCESS) return;
    broken_ = true;
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    fail("mpi", std::string(call) + " failed: " + text);
  }
  void refuse_broken() const {
    if (broken_)
      fail("mpi",
           "the communicator is broken: an earlier call of MPI failed or a rank did not arrive");
  }
  bool late(std::chrono::steady_clock::time_point began) const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() >
           options_.deadline;
  }

  void add(pending& p, std::byte* data, index_t bytes, index_t peer, int tag, bool receives) {
    refuse_broken();
    if (bytes == 0) return;
    p.messages.push_back({data, bytes, static_cast<int>(peer), tag, receives});
    p.requests.push_back(MPI_REQUEST_NULL);
    p.owner.push_back(p.messages.size() - 1);
    post(p, p.requests.size() - 1);
  }
  // The next piece of a request's message. Pieces of a message have one tag: they do not overtake.
  void post(pending& p, std::size_t request) {
    pending::message& m = p.messages[p.owner[request]];
    p.requests[request] = MPI_REQUEST_NULL;
    if (m.left == 0) return;
    const auto bytes = static_cast<int>(std::min(m.left, options_.bytes_per_message));
    check(m.receives
              ? MPI_Irecv(m.data, bytes, MPI_BYTE, m.peer, m.tag, comm_, &p.requests[request])
              : MPI_Isend(m.data, bytes, MPI_BYTE, m.peer, m.tag, comm_, &p.requests[request]),
          m.receives ? "MPI_Irecv" : "MPI_Isend");
    m.data += bytes;
    m.left -= bytes;
  }

  void wait_collective(MPI_Request& request, const waited_for& what) {
    const auto done = [&] {
      int flag = 0;
      check(MPI_Test(&request, &flag, MPI_STATUS_IGNORE), "MPI_Test");
      return flag != 0;
    };
    for (int i = 0; i < polls; ++i)
      if (done()) return;
    const auto began = std::chrono::steady_clock::now();
    while (!done()) {
      if (late(began)) give_up({}, what);
      std::this_thread::yield();
    }
  }

  [[noreturn]] void give_up(std::vector<int> missing, const waited_for& what) {
    broken_ = true;
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    std::string who;
    for (const int r : missing) who += (who.empty() ? "" : ", ") + std::to_string(r);
    std::string seconds = std::to_string(options_.deadline);
    seconds.erase(seconds.find('.') + 2);
    fail("expert_parallel", (missing.empty() ? std::string("a rank")
                                             : (missing.size() == 1 ? "rank " : "ranks ") + who) +
                                " did not arrive within " + seconds + " s (" + what.text() + ")");
  }

  transport_options options_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
  bool broken_ = false;
  std::vector<int> ended_;
};

}  // namespace moeroute::mpi
