// Balancing losses on one instruction set.
#include "set.hpp"

#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_token.hpp>
#include <moeroute/data/expert_load.hpp>

namespace moeroute::sets {

// As much as any loss takes: the first sweep's two, by sequences of one token.
void reserve_losses(const moeroute_executor* with, moeroute_assignment& assignment) {
  const index_t tokens = assignment.choices.tokens(), experts = assignment.choices.experts();
  // A piece has no fewer tokens, however many there are in all.
  const index_t pieces = ceil_div(tokens, moeroute::detail::loss_grain(0));
  assignment.counts.resize((1 + tokens) * experts);
  assignment.workspace.carve([&](scratch& tape) {
    return moeroute::detail::loss_memory<float>::carve(
        tape, round_up(experts, block_rows), pieces, tokens, 2,
        worker_slots::count(pool(with).concurrency()));
  });
}

void loss_of(const moeroute_losses& what, const moeroute_const_matrix& logits,
             moeroute_assignment& assignment, const moeroute_matrix& dlogits,
             const moeroute_executor* with, double* values) {
  constexpr const char* where = "balance_loss";
  const moeroute::assignment& choices = assignment.choices;
  const index_t tokens = logits.rows, experts = logits.cols;
  check_size(where, "logits.rows", tokens, choices.tokens());
  check_size(where, "logits.cols", experts, choices.experts());
  moeroute::detail::check_coefficient("router_z_loss", what.z_coefficient);
  if (what.z_coefficient != 0.0 && what.scores != 0)
    fail(where, "z_coefficient is not 0 and scores are divided by their sum, expected the softmax");
  check_range(where, "sequence_length", what.sequence_length, 0, std::int32_t{0x7fffffff});
  const index_t length =
      what.sequence_length > 0 ? what.sequence_length : std::max<index_t>(1, tokens);
  const index_t sequences = ceil_div(tokens, length);

  assignment.counts.resize((1 + sequences) * experts);
  double* const by_expert = assignment.counts.data();
  const matrix_view<double> by_sequence(by_expert + experts, sequences, experts);
  const count_options counted{.mask = span_of(what.mask, tokens)};
  count_choices(choices, counted, span_of(by_expert, experts));
  if (tokens > 0) count_choices_by_sequence(choices, counted, length, by_sequence);

  const bool writes = dlogits.data != nullptr;
  const pool exec(with);
  loss_options how{
      .scores = enum_of(where, "scores", what.scores, probability::normalized_sqrt_softplus),
      .gradient = !writes                ? gradient_to::nowhere
                  : what.accumulate != 0 ? gradient_to::add
                                         : gradient_to::write,
      .mask = counted.mask,
      .sequence_length = length};
  const auto z = rows_of<float>(logits);
  const auto dz = rows_of<float>(dlogits);
  // At most two of the three share a sweep: one more form would be a third as much code again.
  const auto by_counts = loss_values<2>(balance_loss<float>(
      how, z, dz, assignment.workspace, exec,
      switch_loss::megatron(what.switch_coefficient, span_of<const double>(by_expert, experts),
                            choices.k()),
      sequence_loss{what.sequence_coefficient, by_sequence, choices.k()}));
  values[0] = by_counts[0];
  values[1] = 0.0;
  values[2] = by_counts[1];
  if (what.z_coefficient == 0.0) return;
  if (writes) how.gradient = gradient_to::add;
  values[1] = balance_loss<float>(how, z, dz, assignment.workspace, exec,
                                  router_z_loss{what.z_coefficient})[0];
}

}  // namespace moeroute::sets
