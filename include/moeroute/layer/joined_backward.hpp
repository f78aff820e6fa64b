// The backward pass of experts whose rows came in several chunks, as if they had come in one.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include <moeroute/layer/rank_exchange.hpp>

namespace moeroute {

/// One that tells its two gradients apart: f(slot, in, dout, din [, memory]) makes din alone and
/// f.weights(slot, in, dout) adds to the gradients of the slot's expert.
template <class F>
concept expert_gradient_in_two =
    requires(F& f, expert_id slot, matrix_view<const float> in, matrix_view<const float> dout) {
      f.weights(slot, in, dout);
    };

/// Joins what several receivers got, chunks of one call's tokens: a slot's rows in the order
/// (source, chunk, token), which is (source, token): an expert called once with all of them adds
/// them up in the order of one chunk.
///
/// Requires of the receivers: run() on rows as received, begin_backward(). Cost: a copy of the
/// rows.
template <storage T = float, class A = simd::default_arch>
class joined_backward {
 public:
  using receiver = exchange_receiver<T, A>;

  /// Runs f on all chunks' rows at once; afterwards each has its input gradients.
  template <class F, executor Exec = serial>
  void run(std::span<receiver> chunks, index_t slots, F&& f, const Exec& exec = {}) {
    join(chunks, slots);
    din_.resize(plan_.slots() * d_);
    const matrix_view<float> din(din_.data(), plan_.slots(), d_);
    if constexpr (expert_gradient_with_scratch<std::remove_reference_t<F>, float, float, float>) {
      scratch_.resize(f.scratch_floats() * worker_slots::count(exec.concurrency()));
      for_each_expert_backward(plan_, rows(in_), rows(dout_), din, f, scratch_.data(), exec);
    } else {
      for_each_expert_backward(plan_, rows(in_), rows(dout_), din, f, exec);
    }
    for (const block& b : blocks_)
      copy(din_.data() + b.to * d_, chunks[b.chunk].input_gradients().row(b.from), b.rows);
  }

  /// Calls f.weights on all chunks' rows at once.
  template <class F, executor Exec = serial>
  void run_weights(std::span<receiver> chunks, index_t slots, F&& f, const Exec& exec = {}) {
    join(chunks, slots);
    exec.parallel_for(slots, 1, [&](index_t begin, index_t end) {
      for (index_t s = begin; s < end; ++s) {
        const index_t first = plan_.offsets()[static_cast<std::size_t>(s)], n = plan_.load(s);
        if (n > 0)
          f.weights(static_cast<expert_id>(s), rows(in_).middle_rows(first, n),
                    rows(dout_).middle_rows(first, n));
      }
    });
  }

 private:
  // Rows of one slot, source and chunk, which follow one another on both sides.
  struct block {
    std::size_t chunk;
    index_t from, to, rows;
  };

  matrix_view<const float> rows(const buffer<float>& of) const {
    return {of.data(), plan_.slots(), d_};
  }
  void copy(const float* from, float* to, index_t rows) const {
    std::memcpy(to, from, static_cast<std::size_t>(rows * d_) * sizeof(float));
  }

  void join(std::span<receiver> chunks, index_t slots) {
    const std::size_t n = chunks.size(),
                      sources = n > 0 ? chunks[0].entries_from().size() : std::size_t{0};
    d_ = n > 0 ? chunks[0].d() : 0;
    // [slot, source, chunk] rows.
    count_.assign(static_cast<std::size_t>(slots) * sources * n, 0);
    index_t entries = 0;
    for (std::size_t c = 0; c < n; ++c) {
      std::size_t i = 0;
      for (std::size_t s = 0; s < sources; ++s)
        for (const std::size_t end = i + static_cast<std::size_t>(chunks[c].entries_from()[s]);
             i < end; ++i)
          ++count_[(static_cast<std::size_t>(chunks[c].local_slot()[i]) * sources + s) * n + c];
      entries += chunks[c].entries();
    }
    plan_.reset(0, slots, 1, 0, entries);
    const dispatch_plan::parts p = plan_.writable();
    blocks_.clear();
    next_.assign(n, 0);
    index_t to = 0;
    p.offsets[0] = 0;
    std::size_t at = 0;
    for (index_t slot = 0; slot < slots; ++slot) {
      for (std::size_t s = 0; s < sources; ++s)
        for (std::size_t c = 0; c < n; ++c) {
          const index_t rows = count_[at++];
          if (rows > 0) blocks_.push_back({c, next_[c], to, rows});
          next_[c] += rows;
          to += rows;
        }
      p.offsets[slot + 1] = static_cast<slot_id>(to);
    }
    in_.resize(size_product(entries, d_));
    dout_.resize(size_product(entries, d_));
    for (const block& b : blocks_) {
      copy(chunks[b.chunk].inputs().row(b.from), in_.data() + b.to * d_, b.rows);
      copy(chunks[b.chunk].output_gradients().row(b.from), dout_.data() + b.to * d_, b.rows);
    }
  }

  dispatch_plan plan_;
  index_t d_ = 0;
  std::vector<std::int32_t> count_;
  std::vector<index_t> next_;
  std::vector<block> blocks_;
  buffer<float> in_, dout_, din_, scratch_;
};

}  // namespace moeroute
