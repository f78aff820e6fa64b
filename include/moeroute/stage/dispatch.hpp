// Dispatch: token rows to expert-major slots.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include <moeroute/base/error.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/caches.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute {

/// How dispatch writes.
enum class store_path {
  automatic,  ///< as choose_stores and slots_in_cache say
  cached,     ///< through the caches: the experts run at once, on output that fits
  streamed,   ///< past them, wherever rows are aligned
};

/// How rows of `row_bytes` are written to `slots` slots, once the rows are aligned to lines:
/// streamed if all of them take six second-level caches or more and a row is whole lines.
///
/// Reason: through the caches every line is read before it is written, unless it is still there,
/// and the experts find it there; streamed it comes back from memory. Timed together with a read of
/// every row, after another writer of the same slots: through the caches is ahead by 1.5 times up
/// to two caches' worth and by 1.1 at four, the two are even at seven, and from 14 on streamed is
/// ahead by 1.07 to 1.2. Row by row in slot order is never ahead of token by token, which reads
/// each row of x once, whatever k and the width.
constexpr store_path choose_stores(index_t slots, index_t row_bytes,
                                   const simd::cache_sizes& caches) {
  const bool whole_lines = row_bytes % static_cast<index_t>(alignment) == 0;
  return simd::has_streaming_stores && whole_lines && slots * row_bytes >= 6 * caches.second
             ? store_path::streamed
             : store_path::cached;
}

/// Of slots that are chosen to be streamed, so many are written through the caches nevertheless,
/// those of the last tokens: one second-level cache's worth.
///
/// Reason: whoever went over the slots last left the last tokens' lines in that cache, and a store
/// past the caches pays there for three lines: the old one has to go first. Measured, behind
/// another writer of the same slots streaming all of them costs 1.05 (30 caches' worth) to 1.2
/// times as much (8), behind a combine 1.03 to 1.15; where none of the lines was left, all of them
/// streamed are ahead by 1.03 to 1.1.
constexpr index_t slots_in_cache(index_t row_bytes, const simd::cache_sizes& caches) {
  return row_bytes > 0 ? caches.second / row_bytes : 0;
}

struct dispatch_options {
  /// [choices]: what each choice's row is multiplied with on the way (weights on the expert's
  /// input), or empty.
  std::span<const float> scale{};
  store_path stores = store_path::automatic;
};

namespace detail {

// Rows per piece of parallel work: about 2^16 elements.
inline index_t row_grain(index_t cols) {
  return cols >= (index_t{1} << 16) ? 1 : (index_t{1} << 16) / (cols > 0 ? cols : 1);
}

// A piece of a row that stays in the first-level cache while it is written to k slots.
inline constexpr index_t dispatch_chunk = 16384;

template <class T>
bool streams(const matrix_view<T>& slots, store_path path) {
  if (!simd::has_streaming_stores || path == store_path::cached) return false;
  const index_t size = static_cast<index_t>(sizeof(T));
  const auto line = static_cast<index_t>(alignment);
  const bool aligned = reinterpret_cast<std::uintptr_t>(slots.data) % alignment == 0 &&
                       slots.cols * size % line == 0 &&
                       (slots.rows <= 1 || slots.stride * size % line == 0);
  if (path == store_path::automatic)
    path = choose_stores(slots.rows, slots.cols * size, simd::machine_caches());
  return aligned && path == store_path::streamed;
}

// Token by token: piece(token, choice, column, columns, made, memory) returns the next columns of a
// row for a choice, or for a spare token where choice is -1; `made` is what it returned for the
// choice before, `memory` is room to make them in.
//
// The last tokens come first: a combine of the same slots ended with them and begins with those
// that are written last.
template <class A, class To, executor Exec, class Piece>
void dispatch_rows(const dispatch_plan& plan, const matrix_view<To>& slots, store_path path,
                   const Exec& exec, Piece&& piece) {
  const slot_id* slot = plan.slot_of_choice().data();
  constexpr auto size = static_cast<index_t>(sizeof(To));
  constexpr index_t chunk = dispatch_chunk / size;
  const index_t k = plan.k() > 0 ? plan.k() : 1;
  const index_t tokens = plan.tokens(), all = plan.choices();
  // From so many choices before the last on, rows are streamed.
  index_t cached = all;
  if (streams(slots, path))
    cached = path == store_path::streamed
                 ? 0
                 : slots_in_cache(slots.cols * size, simd::machine_caches());
  const bool distant = all * slots.cols * size > simd::machine_caches().second;
  exec.parallel_for(tokens, row_grain(slots.cols * k), [&](index_t begin, index_t end) {
    alignas(alignment) To memory[chunk];
    const auto bytes_at = [&](index_t choice, index_t c) -> std::byte* {
      if (slot[choice] == no_slot) return nullptr;
      return reinterpret_cast<std::byte*>(slots.data + slot[choice] * slots.stride + c);
    };
    // A piece that another thread may run now is not fetched for it.
    const index_t ours = exec.concurrency() == 1 ? 0 : tokens - end;
    for (index_t t = tokens - begin; t-- > tokens - end;) {
      const index_t first = plan.first(t), last = plan.first(t + 1);
      const bool stream = all - first > cached;
      for (index_t c = 0; c < slots.cols; c += chunk) {
        const index_t n = std::min(chunk, slots.cols - c);
        const To* row = nullptr;
        for (index_t choice = first; choice < last; ++choice) {
          std::byte* const to = bytes_at(choice, c);
          if (to == nullptr) continue;
          row = piece(t, choice, c, n, row, memory);
          const auto* const from = reinterpret_cast<const std::byte*>(row);
          if (stream) {
            simd::stream_bytes<A>(from, n * size, to);
            continue;
          }
          const bool more = choice + 1 < last, done = c + n == slots.cols;
          simd::copy_ahead(from, n * size, to,
                           more       ? bytes_at(choice + 1, c)
                           : !done    ? bytes_at(first, c + n)
                           : t > ours ? bytes_at(plan.first(t - 1), 0)
                                      : nullptr,
                           distant);
        }
      }
    }
    if (cached < all) simd::stream_fence();
  });
  if (plan.padding() == 0 || slots.cols == 0) return;
  const slot_id* token = plan.token_of_slot().data();
  exec.parallel_for(plan.experts(), 64, [&](index_t begin, index_t end) {
    alignas(alignment) To memory[chunk];
    for (index_t e = begin; e < end; ++e)
      for (index_t s = plan.offsets()[static_cast<std::size_t>(e)] + plan.load(e);
           s < plan.offsets()[static_cast<std::size_t>(e) + 1]; ++s)
        for (index_t c = 0; c < slots.cols; c += chunk) {
          const index_t n = std::min(chunk, slots.cols - c);
          void* const to = slots.data + s * slots.stride + c;
          if (token[s] == no_token)
            std::memset(to, 0, static_cast<std::size_t>(n * size));
          else
            std::memcpy(to, piece(token[s], index_t{-1}, c, n, nullptr, memory),
                        static_cast<std::size_t>(n * size));
        }
  });
}

}  // namespace detail

/// slots[s] = x[token of s] for every slot of the plan, widened or narrowed where the types differ,
/// times the choice's scale if there is one, which is 0 for spare tokens; empty slots become zeros.
///
/// A scaled row is multiplied in float and rounded once.
/// Shapes: x [T, d], slots [plan.slots(), d]; they must not overlap.
/// Throws: error where the shapes do not fit the plan, rows run into one another, or the two
/// overlap. Cost: reads each row of x once and writes each slot once, no allocation. Determinism:
/// exact.
/// Example:
///
///     plan(choices, slots);
///     in.resize(slots.slots(), x.cols());
///     dispatch(x, slots, in);
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void dispatch(const X& x_rows, const dispatch_plan& plan, Y&& slot_rows, const Exec& exec = {},
              const dispatch_options& options = {}) {
  using From = element_of<const X>;
  using To = element_of<Y>;
  const matrix_view<const From> x = const_view(x_rows);
  const matrix_view<To> slots = view(slot_rows);
  check_size("dispatch", "x.rows()", x.rows, plan.tokens());
  check_size("dispatch", "slots.rows()", slots.rows, plan.slots());
  check_size("dispatch", "slots.cols()", slots.cols, x.cols);
  check_stride("dispatch", "x", x);
  check_stride("dispatch", "slots", slots);
  check_apart("dispatch", "x", x, "slots", slots);
  if (options.scale.empty()) {
    detail::dispatch_rows<A>(
        plan, slots, options.stores, exec,
        [&](index_t t, index_t, index_t c, index_t n, const To* made, To* memory) -> const To* {
          if constexpr (std::is_same_v<From, To>) {
            return x.data + t * x.stride + c;
          } else {
            if (made == nullptr) simd::convert_row<A>(x.data + t * x.stride + c, n, memory);
            return memory;
          }
        });
  } else {
    check_size("dispatch", "scale.size()", static_cast<index_t>(options.scale.size()),
               plan.choices());
    const float* scale = options.scale.data();
    detail::dispatch_rows<A>(
        plan, slots, options.stores, exec,
        [&](index_t t, index_t choice, index_t c, index_t n, const To*, To* memory) -> const To* {
          simd::scale_row<A>(x.data + t * x.stride + c, choice < 0 ? 0.0f : scale[choice], n,
                             memory);
          return memory;
        });
  }
}

/// The same with options and the serial executor.
template <readable_rows X, writable_rows Y>
void dispatch(const X& x, const dispatch_plan& plan, Y&& slots, const dispatch_options& options) {
  dispatch(x, plan, slots, serial{}, options);
}

// Calls that would end in a page about templates.
template <class X, class Y, class... Rest>
  requires(!readable_rows<X> || !writable_rows<Y>)
void dispatch(const X&, const dispatch_plan&, Y&&, Rest&&...) {
  static_assert(readable_rows<X> && writable_rows<Y>,
                "[moeroute::dispatch] x and slots are rows, the slots not const: a pointer is "
                "handed in as matrix_view(pointer, rows, columns, stride)");
}

/// The same for rows of plain bytes: quantised rows with their scales, or anything else.
///
/// Shapes: x [T, row bytes], slots [plan.slots(), row bytes].
template <executor Exec = serial, class A = simd::default_arch>
void dispatch_bytes(const matrix_view<const std::byte>& x, const dispatch_plan& plan,
                    const matrix_view<std::byte>& slots, const Exec& exec = {},
                    store_path stores = store_path::automatic) {
  check_size("dispatch_bytes", "x.rows()", x.rows, plan.tokens());
  check_size("dispatch_bytes", "slots.rows()", slots.rows, plan.slots());
  check_size("dispatch_bytes", "slots.cols()", slots.cols, x.cols);
  check_stride("dispatch_bytes", "x", x);
  check_stride("dispatch_bytes", "slots", slots);
  check_apart("dispatch_bytes", "x", x, "slots", slots);
  detail::dispatch_rows<A>(plan, slots, stores, exec,
                           [&](index_t t, index_t, index_t c, index_t, const std::byte*,
                               std::byte*) { return x.data + t * x.stride + c; });
}

}  // namespace moeroute
