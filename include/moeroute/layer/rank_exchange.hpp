// The two sides of an exchange with the memory that each needs: a sender at the tokens' rank, a
// receiver at the experts'. Whoever has a way to move bytes between ranks moves what one shows as
// outgoing to where another shows room: memcpy for ranks in one process, messages for others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include <moeroute/layer/gathered_tokens.hpp>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/stage/combine_backward.hpp>
#include <moeroute/stage/dispatch_backward.hpp>
#include <moeroute/stage/exchange.hpp>
#include <moeroute/stage/expert_backward.hpp>
#include <moeroute/stage/resolve.hpp>

namespace moeroute {

/// What comes back from the experts' ranks.
enum class exchange_result {
  /// A float row for each choice, added up at home in rank order of the choices: the bits of one
  /// rank.
  exact,
  /// One float row for each token and rank, added up there, then over ranks in ascending order:
  /// fewer rows, other bits, at most 2 (k - 1) 2^-24 of the sum of |w y| apart.
  reduced,
};

/// How a layer's tokens reach experts of other ranks.
struct exchange_options {
  replica_rule rule = replica_rule::nearest;
  lost_expert lost = lost_expert::error;
  exchange_result result = exchange_result::exact;
  weight_on weights = weight_on::output;
  /// Experts that no rank holds: identity experts are added at home, zero experts nowhere.
  special_experts special{};
  lost_token lost_token_gets = lost_token::zero;
  /// Most rows that a rank may receive in a call; 0: any number.
  index_t most_rows = 0;
  /// Most rows that an expert is called with at once; 0: all.
  index_t rows_per_call = 0;
};

namespace detail {

template <class T>
std::span<T> piece(T* data, index_t first, index_t last, index_t width = 1) {
  return {data + first * width, static_cast<std::size_t>((last - first) * width)};
}

}  // namespace detail

/// The tokens' side of one rank: rows and entries for every rank, and what came back.
template <storage T = float, class A = simd::default_arch>
class exchange_sender {
 public:
  /// Resolves, plans and packs; afterwards the outgoing parts are complete. In two halves: plan(),
  /// after which all but the rows is there and nothing more is allocated, and pack_rows().
  ///
  /// counts and ranges as in resolve_options, where the rule needs them.
  /// Throws: error where something does not fit. Cost: O(choices + R) and a copy of the rows; no
  /// allocation once warm.
  template <executor Exec = serial>
  void pack(const matrix_view<const T>& x, const assignment& choices, const placement& p,
            index_t rank, const exchange_options& options, const resolve_options& how,
            const Exec& exec = {}) {
    plan(x.rows, x.cols, choices, p, rank, options, how);
    pack_rows(x, exec);
  }
  void plan(index_t tokens, index_t d, const assignment& choices, const placement& p, index_t rank,
            const exchange_options& options, const resolve_options& how) {
    check_size("exchange", "x.rows()", tokens, choices.tokens());
    slot_.resize(choices.choices());
    counts_ = resolve(choices, p, rank, how, memory_, slot_);
    plan_exchange<A>(choices, slot_, p, plan_);
    make_room(d);
    if (options.weights == weight_on::input || options.result == exchange_result::reduced)
      pack_weights(choices.weights());
  }
  template <executor Exec = serial>
  void pack_rows(const matrix_view<const T>& x, const Exec& exec = {}) {
    check_size("exchange", "x.rows()", x.rows, plan_.tokens());
    gather_rows(x, plan_.row_token(), matrix_view<T>(rows_.data(), plan_.rows(), d_), exec);
  }

  /// For a forwarder, whose rows came from others: slots are known.
  template <executor Exec = serial>
  void pack_resolved(const matrix_view<const T>& x, const assignment& choices,
                     std::span<const slot_id> slot, const placement& p, const Exec& exec = {}) {
    check_size("exchange", "x.rows()", x.rows, choices.tokens());
    plan_exchange<A>(choices, slot, p, plan_);
    make_room(x.cols);
    pack_rows(x, exec);
  }

  /// Nothing for nobody: for a rank that failed before it could plan and must stay in step.
  void pack_nothing(const placement& p, index_t d) {
    assignment none;
    none.reset(0, std::max<index_t>(1, p.experts()), 1);
    plan_exchange<A>(none, {}, p, plan_);
    counts_ = {};
    make_room(d);
  }

  void pack_weights(std::span<const float> weights) {
    weight_.resize(plan_.entries());
    gather_entry_weights(plan_, weights, weight_);
  }

  /// The tokens of the last pack as one message, where all ranks get all of them.
  void pack_gathered(const matrix_view<const T>& x, const assignment& choices, bool weights) {
    moeroute::pack_gathered(x, choices, std::span<const slot_id>(slot_), weights, shape_,
                            gathered_);
  }
  std::span<const std::byte> gathered() const { return gathered_; }
  const gathered_shape& shape_of_gathered() const { return shape_; }

  const exchange_plan& plan() const { return plan_; }
  /// Of the last pack: choices with a slot, and choices of lost experts.
  const resolve_counts& counts() const { return counts_; }

  std::span<const T> rows_to(index_t r) const {
    return detail::piece(rows_.data(), plan_.row_offset()[at(r)], plan_.row_offset()[at(r) + 1],
                         d_);
  }
  std::span<const std::int32_t> entries_of_row_to(index_t r) const {
    return detail::piece(plan_.entries_of_row().data(), plan_.row_offset()[at(r)],
                         plan_.row_offset()[at(r) + 1]);
  }
  std::span<const std::int32_t> local_slot_to(index_t r) const {
    return detail::piece(plan_.local_slot().data(), plan_.entry_offset()[at(r)],
                         plan_.entry_offset()[at(r) + 1]);
  }
  std::span<const float> weight_to(index_t r) const {
    return detail::piece(weight_.data(), plan_.entry_offset()[at(r)],
                         plan_.entry_offset()[at(r) + 1]);
  }

  /// Makes room for what comes back: rows of d floats, as many from rank r as results_from(r) has.
  void expect_results(exchange_result result) {
    result_ = result;
    returned_.resize((result == exchange_result::exact ? plan_.entries() : plan_.rows()) * d_);
  }
  std::span<float> results_from(index_t r) { return returned_piece(returned_, r, result_); }

  /// The returned rows, in the order of the plan's entries (exact) or rows (reduced).
  matrix_view<const float> results() const {
    return {returned_.data(), result_ == exchange_result::exact ? plan_.entries() : plan_.rows(),
            d_};
  }

  /// y[t] = the weighted sum of what came back, in the order of one rank.
  template <writable_rows Y, executor Exec = serial>
  void finish(const matrix_view<const T>& x, const assignment& choices,
              const exchange_options& options, Y&& y, const Exec& exec = {},
              matrix_view<const float> shared = {}, std::span<const float> shared_weight = {}) {
    combine_options<T, float> combining = combining_of(x, options);
    combining.shared = shared;
    combining.shared_weight = shared_weight;
    if (options.result == exchange_result::exact) {
      combine(results(), plan_.outer(), choices, y, exec, combining);
      return;
    }
    if (options.special.any() || options.lost_token_gets != lost_token::zero)
      fail("exchange",
           "reduced results with special experts or a lost token's residual: expected exact");
    // Weights were applied where the rows were added.
    plan_reduced(plan_, reduced_);
    ones_.resize(plan_.rows());
    std::fill_n(ones_.data(), ones_.size(), 1.0f);
    combine(results(), reduced_, std::span<const float>(ones_), y, exec, combining);
  }

  // --- backward ----------------------------------------------------------------------------------

  /// The first half at home: dweights (with weights on outputs), and the rows of dy for every rank.
  ///
  /// Shapes: dweights [choices], or empty. Requires: finish() was the last call, in exact mode.
  template <executor Exec = serial>
  void pack_backward(const matrix_view<const T>& x, const matrix_view<const float>& dy,
                     const assignment& choices, const exchange_options& options,
                     std::span<float> dweights, const matrix_view<float>& dx,
                     const Exec& exec = {}) {
    if (options.result != exchange_result::exact)
      fail("exchange", "reduced results have no backward pass: expected exact");
    check_size("exchange", "dy.rows()", dy.rows, plan_.tokens());
    check_size("exchange", "dy.cols()", dy.cols, d_);
    check_stride("exchange", "dy", dy);
    if (dx.data != nullptr) {
      check_size("exchange", "dx.rows()", dx.rows, plan_.tokens());
      check_size("exchange", "dx.cols()", dx.cols, d_);
      check_stride("exchange", "dx", dx);
      check_apart("exchange", "dy", dy, "dx", dx);
    }
    const bool on_input = options.weights == weight_on::input;
    const combine_options<T, float> combining = combining_of(x, options);
    const bool identity = options.special.identity_first < options.special.identity_end;
    combine_gradients<float> terms;
    if (!dweights.empty() && (!on_input || identity)) terms.weights = dweights;
    dx_first_ = dx.data != nullptr && (identity || options.lost_token_gets == lost_token::residual);
    if (dx_first_) {
      for (index_t t = 0; t < dx.rows; ++t) std::fill_n(dx.data + t * dx.stride, dx.cols, 0.0f);
      terms.x = dx;
    }
    if (!terms.weights.empty() || dx_first_)
      combine_backward(results(), plan_.outer(), choices, dy, terms, exec, combining);
    pack_gradient_rows(dy, choices.weights(), exec);
  }
  /// For a forwarder, whose rows and weights came from others.
  template <executor Exec = serial>
  void pack_gradient_rows(const matrix_view<const float>& dy, std::span<const float> weights,
                          const Exec& exec = {}) {
    back_rows_.resize(plan_.rows() * d_);
    gather_rows(dy, plan_.row_token(), matrix_view<float>(back_rows_.data(), plan_.rows(), d_),
                exec);
    pack_weights(weights);
    back_.resize(plan_.entries() * d_);
  }
  std::span<const float> gradient_rows_to(index_t r) const {
    return detail::piece(back_rows_.data(), plan_.row_offset()[at(r)],
                         plan_.row_offset()[at(r) + 1], d_);
  }
  std::span<float> gradients_from(index_t r) {
    return returned_piece(back_, r, exchange_result::exact);
  }
  /// What came back, in the order of the plan's entries.
  matrix_view<const float> gradients() const { return {back_.data(), plan_.entries(), d_}; }
  /// The second half: dx[t] = the sum over t's choices, in rank order, and dweights with weights on
  /// inputs.
  template <executor Exec = serial>
  void finish_backward(const matrix_view<const float>& x, const assignment& choices,
                       const exchange_options& options, std::span<float> dweights,
                       const matrix_view<float>& dx, const Exec& exec = {}) {
    if (!dweights.empty())
      check_size("exchange", "dweights.size()", static_cast<index_t>(dweights.size()),
                 choices.choices());
    const bool on_input = options.weights == weight_on::input;
    dispatch_scale<float> scale;
    if (on_input) {
      own_dweights_.resize(choices.choices());
      scale = {.scale = choices.weights(), .x = x, .dscale = own_dweights_};
    }
    matrix_view<float> target = dx;
    if (dx.data == nullptr && on_input && !dweights.empty()) {
      // The weights' gradients are by-products of the tokens'.
      unwanted_.resize(size_product(choices.tokens(), d_));
      target = {unwanted_.data(), choices.tokens(), d_};
    }
    if (target.data != nullptr)
      dispatch_backward(gradients(), plan_.outer(),
                        dx_first_ ? gradient_to::add : gradient_to::write, target, exec, scale);
    if (!on_input || dweights.empty()) return;
    const bool identity = options.special.identity_first < options.special.identity_end;
    for (index_t c = 0; c < choices.choices(); ++c)
      dweights[at(c)] = own_dweights_[c] + (identity ? dweights[at(c)] : 0.0f);
  }

  /// Bytes held for rows.
  index_t capacity() const {
    return rows_.capacity() * index_t{sizeof(T)} +
           (returned_.capacity() + back_rows_.capacity() + back_.capacity()) *
               index_t{sizeof(float)};
  }

 private:
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

  void make_room(index_t d) {
    d_ = d;
    rows_.resize(size_product(plan_.rows(), d_));
  }
  std::span<float> returned_piece(buffer<float>& rows, index_t r, exchange_result result) {
    const auto first = result == exchange_result::exact ? plan_.entry_offset() : plan_.row_offset();
    return detail::piece(rows.data(), first[at(r)], first[at(r) + 1], d_);
  }
  combine_options<T, float> combining_of(const matrix_view<const T>& x,
                                         const exchange_options& options) const {
    combine_options<T, float> o;
    if (options.weights == weight_on::input) o.weight = combine_weight::one;
    if (options.lost_token_gets == lost_token::mix)
      fail("rank_exchange", "lost_token::mix needs the weights, which reduced rows have lost");
    o.lost = options.lost_token_gets;
    o.identity_first = options.special.identity_first;
    o.identity_end = options.special.identity_end;
    o.x = x;
    return o;
  }

  exchange_plan plan_;
  resolve_counts counts_;
  workspace memory_;
  buffer<slot_id> slot_;
  index_t d_ = 0;
  bool dx_first_ = false;
  exchange_result result_ = exchange_result::exact;
  buffer<T> rows_;
  gathered_shape shape_;
  buffer<std::byte> gathered_;
  buffer<float> weight_, returned_, ones_, back_rows_, back_, own_dweights_, unwanted_;
  dispatch_plan reduced_;
};

/// The experts' side of one rank: what all ranks sent, and what its slots made of it.
template <storage T = float, class A = simd::default_arch>
class exchange_receiver {
 public:
  /// Makes room for so many rows and entries from every rank, in rank order.
  ///
  /// Throws: error where counts are negative, or rows exceed options.most_rows or 2^31 - 1.
  void expect(std::span<const std::int32_t> rows_from, std::span<const std::int32_t> entries_from,
              index_t d, const exchange_options& options) {
    constexpr const char* where = "exchange";
    check_size(where, "entries_from.size()", static_cast<index_t>(entries_from.size()),
               static_cast<index_t>(rows_from.size()));
    rows_from_.assign(rows_from.begin(), rows_from.end());
    entries_from_.assign(entries_from.begin(), entries_from.end());
    row_offset_.assign(rows_from.size() + 1, 0);
    entry_offset_.assign(rows_from.size() + 1, 0);
    for (std::size_t s = 0; s < rows_from.size(); ++s) {
      check_range(where, "rows_from", rows_from[s], 0, std::int32_t{0x7fffffff});
      check_range(where, "entries_from", entries_from[s], rows_from[s], std::int32_t{0x7fffffff});
      row_offset_[s + 1] = row_offset_[s] + rows_from[s];
      entry_offset_[s + 1] = entry_offset_[s] + entries_from[s];
    }
    const index_t most = options.most_rows > 0 ? options.most_rows : std::int32_t{0x7fffffff};
    check_range(where, "received rows", rows(), 0, most);
    check_range(where, "received entries", entries(), 0, std::int32_t{0x7fffffff});
    d_ = d;
    on_input_ = options.weights == weight_on::input;
    rows_.resize(size_product(rows(), d));
    row_entries_.resize(rows());
    local_slot_.resize(entries());
    weight_.resize(entries());
    // Room for results that are none, which a rank without memory must still send.
    results_.resize(size_product(options.result == exchange_result::exact ? entries() : rows(), d));
  }

  index_t rows() const { return row_offset_.back(); }
  index_t entries() const { return entry_offset_.back(); }

  std::span<T> rows_from(index_t s) {
    return detail::piece(rows_.data(), row_offset_[at(s)], row_offset_[at(s) + 1], d_);
  }
  std::span<std::int32_t> entries_of_row_from(index_t s) {
    return detail::piece(row_entries_.data(), row_offset_[at(s)], row_offset_[at(s) + 1]);
  }
  std::span<std::int32_t> local_slot_from(index_t s) {
    return detail::piece(local_slot_.data(), entry_offset_[at(s)], entry_offset_[at(s) + 1]);
  }
  /// Wanted with weights on inputs, in reduced mode and for the backward pass.
  std::span<float> weight_from(index_t s) {
    return detail::piece(weight_.data(), entry_offset_[at(s)], entry_offset_[at(s) + 1]);
  }

  /// In place of what else comes from rank s: of the message that all ranks got what has a slot in
  /// [first_slot, first_slot + slots).
  ///
  /// Throws: error where that is not as much as was expected.
  void take_gathered(index_t s, std::span<const std::byte> message, const gathered_shape& shape,
                     index_t first_slot, index_t slots) {
    constexpr const char* where = "exchange";
    check_size(where, "d of a message", shape.d, d_);
    const gathered_reader<T> from(message, shape);
    const std::span<std::int32_t> entries_of = entries_of_row_from(s), local = local_slot_from(s);
    const std::span<float> weight = weight_from(s);
    const std::span<T> to = rows_from(s);
    const auto rows = static_cast<index_t>(entries_of.size()),
               entries = static_cast<index_t>(local.size());
    index_t row = 0, entry = 0, first = from.first(0);
    check_size(where, "a message's first choice", first, 0);
    for (index_t t = 0; t < shape.tokens; ++t) {
      const index_t last = from.first(t + 1), before = entry;
      check_range(where, "a message's choices", last, first, shape.choices);
      for (index_t c = first; c < last; ++c) {
        const index_t slot = from.slot(c) - first_slot;
        if (slot < 0 || slot >= slots) continue;
        check_range(where, "a message's entries", entry, 0, entries - 1);
        local[at(entry)] = static_cast<std::int32_t>(slot);
        if (shape.weights) weight[at(entry)] = from.weight(c);
        ++entry;
      }
      first = last;
      if (entry == before) continue;
      check_range(where, "a message's rows", row, 0, rows - 1);
      entries_of[at(row)] = static_cast<std::int32_t>(entry - before);
      from.copy_row(t, to.data() + row * d_);
      ++row;
    }
    check_size(where, "a message's rows", row, rows);
    check_size(where, "a message's entries", entry, entries);
  }

  /// Runs the experts of this rank's slots on what was received: f(local slot, in, out) or, with
  /// scratch, f(local slot, in, out, memory).
  ///
  /// order as received_entries::order. Throws: error where what was received does not fit; what f
  /// throws.
  template <class F, executor Exec = serial>
  void run(index_t slots, F&& f, const exchange_options& options, const Exec& exec = {},
           std::span<const std::int32_t> order = {}) {
    const received_entries got{rows_from_, entries_from_, row_entries_, local_slot_, order};
    plan_received(got, slots, plan_);
    in_.resize(size_product(entries(), d_));
    out_.resize(size_product(entries(), d_));
    const matrix_view<float> in(in_.data(), entries(), d_), out(out_.data(), entries(), d_);
    dispatch_options moving;
    if (on_input_) moving.scale = weight_;
    dispatch(received(), plan_, in, exec, moving);
    const expert_options calls{.rows_per_call = options.rows_per_call};
    using rows_view = matrix_view<const float>;
    if constexpr (expert_function_with_scratch<std::remove_reference_t<F>, float, float>) {
      scratch_.resize(f.scratch_floats() * worker_slots::count(exec.concurrency()));
      for_each_expert(plan_, rows_view(in), out, f, scratch_.data(), exec, calls);
    } else {
      for_each_expert(plan_, rows_view(in), out, f, exec, calls);
    }
    if (options.result == exchange_result::exact) {
      result_offset_ = entry_offset_;
      results_.resize(size_product(entries(), d_));
      gather_rows(rows_view(out), plan_.slot_of_choice(),
                  matrix_view<float>(results_.data(), entries(), d_), exec);
    } else {
      result_offset_ = row_offset_;
      results_.resize(size_product(rows(), d_));
      combine_options<float, float> adding;
      if (on_input_) adding.weight = combine_weight::one;
      combine(rows_view(out), plan_, std::span<const float>(weight_),
              matrix_view<float>(results_.data(), rows(), d_), exec, adding);
    }
  }

  /// Zeros in place of results, as many as were to come: for a rank that failed and must stay in
  /// step.
  void no_results(const exchange_options& options) {
    result_offset_ = options.result == exchange_result::exact ? entry_offset_ : row_offset_;
    results_.resize(size_product(result_offset_.back(), d_));
    std::fill_n(results_.data(), results_.size(), 0.0f);
  }
  /// What goes back to rank s.
  std::span<const float> results_to(index_t s) const {
    return detail::piece(results_.data(), result_offset_[at(s)], result_offset_[at(s) + 1], d_);
  }
  const dispatch_plan& plan() const { return plan_; }
  /// As plain rows: for a forwarder, whose received rows are tokens of a sender of its own.
  matrix_view<const T> received() const { return {rows_.data(), rows(), d_}; }
  std::span<const std::int32_t> entries_of_row() const { return row_entries_; }
  std::span<const std::int32_t> local_slot() const { return local_slot_; }
  std::span<const std::int32_t> rows_from() const { return rows_from_; }
  std::span<const std::int32_t> entries_from() const { return entries_from_; }
  std::span<const float> entry_weights() const { return weight_; }
  matrix_view<const float> received_gradients() const { return {back_rows_.data(), rows(), d_}; }
  index_t d() const { return d_; }

  // --- backward ----------------------------------------------------------------------------------

  /// Room for the rows of dy, as many from rank s as rows came from there in the forward pass.
  void expect_backward() { back_rows_.resize(size_product(rows(), d_)); }
  std::span<float> gradient_rows_from(index_t s) {
    return detail::piece(back_rows_.data(), row_offset_[at(s)], row_offset_[at(s) + 1], d_);
  }
  /// Runs the experts backwards, f(local slot, in, dout, din [, memory]); afterwards
  /// gradients_to(s) goes back. Requires: run() was the last forward call.
  template <class F, executor Exec = serial>
  void run_backward(F&& f, const Exec& exec = {}) {
    begin_backward(exec);
    const matrix_view<float> din = input_gradients();
    if constexpr (expert_gradient_with_scratch<std::remove_reference_t<F>, float, float, float>) {
      scratch_.resize(f.scratch_floats() * worker_slots::count(exec.concurrency()));
      for_each_expert_backward(plan_, inputs(), output_gradients(), din, f, scratch_.data(), exec);
    } else {
      for_each_expert_backward(plan_, inputs(), output_gradients(), din, f, exec);
    }
    end_backward(exec);
  }
  /// The same in parts: before and after somebody makes input_gradients() of inputs() and
  /// output_gradients(), all in the order of plan()'s slots.
  template <executor Exec = serial>
  void begin_backward(const Exec& exec = {}) {
    dout_.resize(size_product(entries(), d_));
    din_.resize(size_product(entries(), d_));
    dispatch_options moving;
    if (!on_input_) moving.scale = weight_;
    dispatch(matrix_view<const float>(back_rows_.data(), rows(), d_), plan_,
             matrix_view<float>(dout_.data(), entries(), d_), exec, moving);
  }
  matrix_view<const float> inputs() const { return {in_.data(), entries(), d_}; }
  matrix_view<const float> output_gradients() const { return {dout_.data(), entries(), d_}; }
  matrix_view<float> input_gradients() { return {din_.data(), entries(), d_}; }
  template <executor Exec = serial>
  void end_backward(const Exec& exec = {}) {
    result_offset_ = entry_offset_;
    results_.resize(size_product(entries(), d_));
    gather_rows(matrix_view<const float>(input_gradients()), plan_.slot_of_choice(),
                matrix_view<float>(results_.data(), entries(), d_), exec);
  }
  std::span<const float> gradients_to(index_t s) const { return results_to(s); }

  /// Bytes held for rows.
  index_t capacity() const {
    return rows_.capacity() * index_t{sizeof(T)} +
           (in_.capacity() + out_.capacity() + results_.capacity() + back_rows_.capacity() +
            dout_.capacity() + din_.capacity()) *
               index_t{sizeof(float)};
  }

 private:
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

  index_t d_ = 0;
  bool on_input_ = false;
  std::vector<std::int32_t> rows_from_, entries_from_;
  std::vector<index_t> row_offset_{0}, entry_offset_{0}, result_offset_{0};
  buffer<T> rows_;
  buffer<std::int32_t> row_entries_, local_slot_;
  buffer<float> weight_, in_, out_, results_, scratch_, back_rows_, dout_, din_;
  dispatch_plan plan_;
};

}  // namespace moeroute
