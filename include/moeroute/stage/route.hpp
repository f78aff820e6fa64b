// Routing: logits to an assignment, block by block.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include <moeroute/data/assignment.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/select/top_k_packed.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute {

namespace detail {

// The matrix itself where it is a view: a copy would be read before it has been written.
template <readable_rows Z>
decltype(auto) view_of(const Z& rows) {
  if constexpr (is_matrix_view<Z>)
    return rows;
  else
    return const_view(rows);
}

// Tokens per piece of parallel work: about 2^15 logits, whole blocks.
inline index_t route_grain(index_t experts) {
  return std::clamp<index_t>(round_up((index_t{1} << 15) / experts, block_rows), block_rows, 4096);
}

// Workers that route T tokens: one where there is one piece.
template <executor Exec>
int route_workers(const Exec& exec, index_t tokens, index_t experts) {
  return tokens <= route_grain(experts) ? 1 : worker_slots::count(exec.concurrency());
}

// The most choices a row can have.
template <class Router>
index_t most_choices(const Router& router, index_t columns) {
  if constexpr (ragged_router<Router>) {
    return router.max_choices(columns);
  } else {
    return router.k();
  }
}

// Scratch of one worker that routes logits kept as T.
template <class Router, class T>
struct route_memory {
  expert_id* id;
  float* value;
  float* wide;  // where logits are kept in 16 bits
  decltype(std::declval<const Router&>().carve(std::declval<scratch&>(), index_t{})) router;

  static route_memory carve(scratch& tape, const Router& router, index_t columns) {
    const index_t lanes = ragged_router<Router> ? 0 : most_choices(router, columns) * block_rows;
    return {tape.take<expert_id>(lanes), tape.take<float>(lanes),
            tape.take<float>(std::is_same_v<T, float> ? 0 : simd::widened_block(columns)),
            router.carve(tape, columns)};
  }

  // One for each worker, in one array.
  static route_memory* carve(scratch& tape, const Router& router, index_t columns, int workers) {
    route_memory* const list = tape.take<route_memory>(workers);
    for (int w = 0; w < workers; ++w) {
      const route_memory m = carve(tape, router, columns);
      if (list != nullptr) std::construct_at(list + w, m);
    }
    return list;
  }
};

// Calls f(block, memory) for the tokens [begin, end), at most 16 at a time.
template <class A, class T, class Router, class F>
void for_each_block(matrix_view<const T> logits, const side_inputs& side,
                    const route_memory<Router, T>& m, index_t begin, index_t end, F&& f) {
  const index_t columns = logits.cols;
  for (index_t t = begin; t < end; t += block_rows) {
    const int rows = static_cast<int>(std::min<index_t>(block_rows, end - t));
    if constexpr (std::is_same_v<T, float>) {
      f(logit_block{logits.row(t), logits.stride, rows, columns, t, &side});
    } else {
      const narrow_block<T> block{{logits.row(t), logits.stride, rows, columns, t, &side}, m.wide};
      if constexpr (std::is_same_v<T, bfloat16> && bfloat16_router<Router>) {
        f(block);
      } else {
        f(block.template widened<A>());
      }
    }
  }
}

// Experts whose widened logits fit on the stack.
inline constexpr index_t most_widened = 1024;

// So many rows at most the router takes one by one; 0 where it does not.
template <class A, class T, class Router>
index_t rows_alone(const Router& router, const side_inputs& side, index_t columns) {
  if (!side.k_of_token.empty() || (!std::is_same_v<T, float> && columns > most_widened)) return 0;
  if constexpr (requires { router.template rows_alone<A>(columns); }) {
    return router.template rows_alone<A>(columns);
  } else {
    return router.rows_alone(columns);
  }
}

// One row, for A where the router has a way for each.
template <class A, class Router>
MOEROUTE_INLINE void route_one(const Router& router, const float* row, index_t columns, index_t t,
                               const side_inputs& side, expert_id* id, float* weight) {
  if constexpr (requires { router.template route_row<A>(row, columns, t, side, id, weight); }) {
    router.template route_row<A>(row, columns, t, side, id, weight);
  } else {
    router.route_row(row, columns, t, side, id, weight);
  }
}

MOEROUTE_OUT_OF_LINE inline void leave_out(expert_id* id, float* weight, index_t k) {
  std::fill_n(id, k, no_expert);
  std::fill_n(weight, k, 0.0f);
}

// Routes a few rows one by one; masked ones get nothing.
template <class A, class T, row_router Router>
MOEROUTE_INLINE void route_alone(const Router& router, const T* row, index_t stride,
                                 index_t columns, index_t begin, index_t end,
                                 const side_inputs& side, expert_id* id, float* weight) {
  const index_t k = router.k();
  for (index_t t = begin; t < end; ++t, row += stride, id += k, weight += k) {
    if (side.masked(t)) {
      leave_out(id, weight, k);
    } else if constexpr (std::is_same_v<T, float>) {
      route_one<A>(router, row, columns, t, side, id, weight);
    } else {
      alignas(alignment) float wide[most_widened + block_rows];
      simd::convert_row<A>(row, columns, wide);
      route_one<A>(router, wide, columns, t, side, id, weight);
    }
  }
}

// route() on memory that is already carved; out has been reset.
template <class A, class T, token_router Router, executor Exec>
void route_with(const Router& router, matrix_view<const T> logits, const side_inputs& side,
                const route_memory<Router, T>* memories, int workers, assignment& out,
                const Exec& exec) {
  const int k = static_cast<int>(router.k());
  worker_slots slots(workers);
  exec.parallel_for(logits.rows, route_grain(logits.cols), [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    const route_memory<Router, T>& m = memories[worker];
    index_t blocks = end;
    if constexpr (row_router<Router>) {
      // What is left over after whole blocks.
      const index_t left = (end - begin) % block_rows;
      if (left > 0 && left <= rows_alone<A, T>(router, side, logits.cols)) {
        blocks = end - left;
        route_alone<A>(router, logits.row(blocks), logits.stride, logits.cols, blocks, end, side,
                       out.ids().data() + blocks * k, out.weights().data() + blocks * k);
      }
    }
    for_each_block<A>(logits, side, m, begin, blocks, [&](const auto& block) {
      choice_block choices{k, m.id, m.value};
      clear_lanes(choices, block.rows);
      router.route_block(block, m.router, choices);
      expert_id* id = out.ids().data() + block.first_token * k;
      float* weight = out.weights().data() + block.first_token * k;
      if (side.mask.empty()) {
        simd::store_ranks<A>(reinterpret_cast<const float*>(m.id), k, block.rows,
                             reinterpret_cast<float*>(id));
        simd::store_ranks<A>(m.value, k, block.rows, weight);
        return;
      }
      for (int i = 0; i < block.rows; ++i) {
        const bool taken = !side.masked(block.first_token + i);
        for (int r = 0; r < k; ++r) {
          id[i * k + r] = taken ? m.id[r * block_rows + i] : no_expert;
          weight[i * k + r] = taken ? m.value[r * block_rows + i] : 0.0f;
        }
      }
    });
  });
}

// The ragged form. Every piece writes to the room of its first token; then the pieces are moved
// together.
template <class A, class T, ragged_router Router, executor Exec>
void route_with(const Router& router, matrix_view<const T> logits, const side_inputs& side,
                const route_memory<Router, T>* memories, int workers, assignment& out,
                const Exec& exec) {
  const index_t tokens = logits.rows, grain = route_grain(logits.cols), most = out.k();
  const assignment::parts p = out.to_fill();
  worker_slots slots(workers);
  exec.parallel_for(tokens, grain, [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    const route_memory<Router, T>& m = memories[worker];
    index_t at = begin * most;
    for_each_block<A>(logits, side, m, begin, end, [&](const logit_block& block) {
      std::int32_t count[block_rows];
      router.route_block(block, m.router, p.ids + at, p.weights + at, count);
      index_t from = at;
      for (int i = 0; i < block.rows; ++i) {
        const index_t t = block.first_token + i;
        if (side.masked(t)) {
          p.offsets[t + 1] = 0;
        } else {
          if (from != at) {
            std::memmove(p.ids + at, p.ids + from, static_cast<std::size_t>(count[i]) * 4);
            std::memmove(p.weights + at, p.weights + from, static_cast<std::size_t>(count[i]) * 4);
          }
          at += count[i];
          p.offsets[t + 1] = count[i];
        }
        from += count[i];
      }
    });
  });
  p.offsets[0] = 0;
  for (index_t begin = 0; begin < tokens; begin += grain) {
    const index_t start = p.offsets[begin];
    for (index_t t = begin; t < std::min(tokens, begin + grain); ++t)
      p.offsets[t + 1] += p.offsets[t];
    const index_t end = p.offsets[std::min(tokens, begin + grain)];
    if (start == begin * most) continue;
    std::memmove(p.ids + start, p.ids + begin * most, static_cast<std::size_t>(end - start) * 4);
    std::memmove(p.weights + start, p.weights + begin * most,
                 static_cast<std::size_t>(end - start) * 4);
  }
  out.close();
}

// Everything that is not routed row by row. Apart from route(), which needs no view in memory.
template <class A, class T, class Router, executor Exec>
MOEROUTE_OUT_OF_LINE void route_blocks(const Router& router, matrix_view<const T> logits,
                                       const side_inputs& side, workspace& ws, assignment& out,
                                       const Exec& exec) {
  const int workers = route_workers(exec, logits.rows, logits.cols);
  const auto* memories = ws.carve([&](scratch& tape) {
    return route_memory<Router, T>::carve(tape, router, logits.cols, workers);
  });
  route_with<A>(router, logits, side, memories, workers, out, exec);
}

// Not a vector or a span: those are one row to view(), whatever they were meant to be.
template <class Z>
concept has_shape = is_matrix_view<Z> || strided_rows<const Z>;

[[noreturn]] MOEROUTE_COLD inline void fail_unread(const char* name) {
  fail("route", {name, " is given, which this router does not read: leave it out"});
}

// Every side input fits T, and is one that the router reads: what it does not read it would ignore.
MOEROUTE_OUT_OF_LINE inline void check_side(const side_inputs& side, index_t tokens,
                                            index_t columns, const side_use& use) {
  const auto given = [&](auto list, const char* name, const char* size, bool read) {
    if (list.empty()) return;
    check_size("route", size, static_cast<index_t>(list.size()), tokens);
    if (!read) fail_unread(name);
  };
  given(side.token_ids, "token_ids", "token_ids.size()", use.token_ids);
  given(side.mask, "mask", "mask.size()", true);
  given(side.k_of_token, "k_of_token", "k_of_token.size()", use.own_k > 0);
  given(side.modality, "modality", "modality.size()", use.modality);
  given(side.shared_weight, "shared_weight", "shared_weight.size()", use.shared_weight);
  if (side.noise_logits.data != nullptr) {
    if (!use.noise_logits) fail_unread("noise_logits");
    check_size("route", "noise_logits.rows", side.noise_logits.rows, tokens);
    check_size("route", "noise_logits.cols", side.noise_logits.cols, columns);
    check_stride("route", "noise_logits", side.noise_logits);
  }
  for (const std::int32_t own : side.k_of_token)
    check_range("route", "k_of_token", own, 0, use.own_k);
}

template <class Router, class T, executor Exec>
void route_plain(const Router& router, const T* logits, index_t tokens, index_t columns,
                 index_t stride, workspace& ws, expert_id* ids, float* weights, const Exec& exec);

// Which kind of router it is shows when it runs.
template <class R>
concept run_time_router = requires(const R& r) {
  { r.ragged() } -> std::same_as<bool>;
  { r.as_token_router() } -> token_router;
  { r.as_ragged_router() } -> ragged_router;
};

// What may stand behind the logits, in this order; what is no executor says so itself.
template <class... Rest>
inline constexpr bool in_place = false;
template <class W, class A>
inline constexpr bool in_place<W, A> =
    std::is_convertible_v<W&, workspace&> && std::is_convertible_v<A&, assignment&>;
template <class W, class A, class E>
inline constexpr bool in_place<W, A, E> =
    in_place<W, A> || (std::is_convertible_v<W&, const side_inputs&> && in_place<A, E>);
template <class S, class W, class A, class E>
inline constexpr bool in_place<S, W, A, E> =
    std::is_convertible_v<S&, const side_inputs&> && in_place<W, A>;

// A workspace or an assignment is there: the call is meant for us.
template <class... Rest>
concept ours = (... || (std::is_convertible_v<Rest&, workspace&> ||
                        std::is_convertible_v<Rest&, assignment&>));

// But not where it belongs.
template <class... Rest>
concept misplaced = ours<Rest...> && !in_place<Rest...>;

}  // namespace detail

/// Decides for every token which experts it goes to, and with which weights.
///
/// Shapes: logits [T, E] in float, bfloat16 or float16 (as if widened first); out becomes [T, k],
/// or ragged where the router's k varies. Ensures: ids are in [0, E) or no_expert with weight 0;
/// weights are finite; a NaN logit counts as -inf and a -inf logit is never chosen; a masked token
/// has no choices (no_expert in the fixed form). Throws: error where the router does not fit E, a
/// side input does not fit T and the columns or is one that the router does not read, or rows run
/// into one another. Cost: no allocation once ws and out are warm. Determinism: the same ids on
/// every ISA, executor and thread count. Token routers: rows are independent.
/// Example:
///
///     const router r{softmax{}, top_k{.k = 2}, sum_normalized};
///     route(r, logits, ws, choices);                    // ids and weights [T, 2]
///     route(r, logits, {.mask = mask}, ws, choices);    // without the tokens whose mask is 0
template <any_kind_of_router Router, readable_rows Z, executor Exec = serial,
          class A = simd::default_arch>
void route(const Router& router, const Z& logit_rows, const side_inputs& side, workspace& ws,
           assignment& out, const Exec& exec = {}) {
  static_assert(
      detail::has_shape<Z> || requires { router.columns(); },
      "[moeroute::route] a vector does not say how many tokens it holds: hand in "
      "matrix_view(data, tokens, experts)");
  using T = element_of<const Z>;
  const auto& logits = detail::view_of(logit_rows);
  index_t tokens = logits.rows, columns = logits.cols;
  MOEROUTE_APART(tokens);
  MOEROUTE_APART(columns);
  check_stride("route", "logits", logits);
  if constexpr (batch_router<Router>) {
    static_assert(std::is_same_v<T, float>,
                  "[moeroute::route] rules that see the whole batch take float logits");
    router.check(tokens, columns);
    detail::check_side(side, tokens, columns, side_use_of(router, columns));
    router.route_batch(const_view(logit_rows), side, ws, out, exec);
  } else {
    router.check(columns);
    const index_t most = detail::most_choices(router, columns);
    if (&side != &no_side_inputs)
      detail::check_side(side, tokens, columns, side_use_of(router, columns));
    if constexpr (ragged_router<Router>) {
      out.reset_ragged(tokens, router.experts(columns), most);
    } else {
      out.reset(tokens, router.experts(columns), most);
    }
    if constexpr (row_router<Router>) {
      if (tokens <= detail::rows_alone<A, T>(router, side, columns)) {
        // One token, as in every step of a decoder, needs no loop.
        if constexpr (std::is_same_v<T, float> && requires { Router::calls_rows; })
          if (tokens == 1 && side.mask.empty()) [[likely]]
            return detail::route_one<A>(router, logits.data, columns, 0, side, out.ids().data(),
                                        out.weights().data());
        return detail::route_alone<A, T>(router, logits.data, logits.stride, columns, 0, tokens,
                                         side, out.ids().data(), out.weights().data());
      }
    }
    detail::route_blocks<A>(router, const_view(logit_rows), side, ws, out, exec);
  }
}

/// The same for a router picked at run time. Throws: error also where it is made for another number
/// of columns.
template <detail::run_time_router Router, readable_rows Z, executor Exec = serial,
          class A = simd::default_arch>
void route(const Router& router, const Z& logits, const side_inputs& side, workspace& ws,
           assignment& out, const Exec& exec = {}) {
  if (router.ragged()) {
    const auto kind = router.as_ragged_router();
    route<decltype(kind), Z, Exec, A>(kind, logits, side, ws, out, exec);
  } else {
    const auto kind = router.as_token_router();
    route<decltype(kind), Z, Exec, A>(kind, logits, side, ws, out, exec);
  }
}

/// The same without side inputs.
template <class Router, readable_rows Z, executor Exec = serial, class A = simd::default_arch>
  requires(any_kind_of_router<Router> || detail::run_time_router<Router>)
void route(const Router& router, const Z& logits, workspace& ws, assignment& out,
           const Exec& exec = {}) {
  route<Router, Z, Exec, A>(router, logits, no_side_inputs, ws, out, exec);
}

/// The same from and to plain memory: token t's logits begin at logits + t * stride, its choices at
/// ids + t * k and weights + t * k.
///
/// Shapes: logits [tokens, columns] in float, bfloat16 or float16; ids and weights [tokens, k].
/// Throws: error where a pointer is null, the stride is less than the columns, or the router's k
/// varies (take an assignment). Example:
///
///     const std::vector<float> z(10 * 64);    // ten tokens, 64 experts
///     std::vector<std::int32_t> ids(10 * 2);
///     std::vector<float> weights(10 * 2);
///     route(r, z.data(), 10, 64, 64, ws, ids.data(), weights.data());
template <any_kind_of_router Router, storage T, executor Exec = serial>
void route(const Router& router, const T* logits, index_t tokens, index_t columns, index_t stride,
           workspace& ws, expert_id* ids, float* weights, const Exec& exec = {}) {
  detail::route_plain(router, logits, tokens, columns, stride, ws, ids, weights, exec);
}

/// The same for a router picked at run time, which knows its columns.
template <class Router, storage T, executor Exec = serial>
  requires requires(const Router& r) { r.columns(); }
void route(const Router& router, const T* logits, index_t tokens, index_t stride, workspace& ws,
           expert_id* ids, float* weights, const Exec& exec = {}) {
  if (router.ragged())
    fail("route", "the router's k varies, expected a fixed k: give an assignment");
  detail::route_plain(router.as_token_router(), logits, tokens, router.columns(), stride, ws, ids,
                      weights, exec);
}

// Calls that would end in a page about templates.

template <class Router, class T, class... Rest>
  requires(sizeof...(Rest) < 5)
void route(const Router&, const T*, Rest&&...) {
  static_assert(storage<T> && sizeof...(Rest) > 5,
                "[moeroute::route] a pointer has no shape: hand in matrix_view(logits, tokens, "
                "experts, stride), or tokens, experts, stride, workspace, ids and weights");
}

template <class Router, class Z, class... Rest>
  requires(!readable_rows<Z> && !std::is_pointer_v<Z>)
void route(const Router&, const Z&, Rest&&...) {
  static_assert(readable_rows<Z>,
                "[moeroute::route] logits are rows of float, bfloat16 or float16: a matrix_view, "
                "or what view() makes one of");
}

template <class Router, readable_rows Z, class... Rest>
  requires(detail::misplaced<Rest...>)
void route(const Router&, const Z&, const Rest&...) {
  static_assert(!detail::misplaced<Rest...>,
                "[moeroute::route] behind the logits come the side inputs, if any, a workspace, an "
                "assignment and, if any, an executor");
}

template <class Router, readable_rows Z, class... Rest>
  requires(!any_kind_of_router<Router> && !detail::run_time_router<Router> &&
           detail::ours<Rest...> && !detail::misplaced<Rest...>)
void route(const Router&, const Z&, const Rest&...) {
  static_assert(any_kind_of_router<Router>,
                "[moeroute::route] the first argument is no router: router{softmax{}, top_k{.k = "
                "2}}, what make_router() makes, or a struct as docs/adding-a-router.md has it");
}

namespace detail {

template <class Router, class T, executor Exec>
void route_plain(const Router& router, const T* logits, index_t tokens, index_t columns,
                 index_t stride, workspace& ws, expert_id* ids, float* weights, const Exec& exec) {
  static_assert(token_router<Router>,
                "[moeroute::route] the router's k varies: give an assignment");
  check_range("route", "tokens", tokens, 0, std::int32_t{0x7fffffff});
  if (tokens > 0) {
    if (logits == nullptr) fail("route", "logits is null, expected rows");
    if (ids == nullptr) fail("route", "ids is null, expected room for tokens * k");
    if (weights == nullptr) fail("route", "weights is null, expected room for tokens * k");
  }
  const auto room = static_cast<std::size_t>(tokens * router.k());
  assignment out = assignment::over({ids, room}, {weights, room});
  moeroute::route(router, matrix_view<const T>(logits, tokens, columns, stride), ws, out, exec);
}

}  // namespace detail

}  // namespace moeroute
