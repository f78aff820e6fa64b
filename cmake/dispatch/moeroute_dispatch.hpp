// Routing on the best instruction set of the machine that runs, from a program built for any of its
// kind.
//
// moeroute_add_dispatch(<target>) in CMake compiles the kernels once per instruction set and links
// them to the target; this header is what the target includes. The headers of moeroute itself may
// be included beside it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute::dispatch {

/// Tensors of a described router, as plain memory that the caller keeps alive.
struct tensors {
  lasting_span<const float> bias{};
  lasting_span<const float> per_expert_scale{};
};

/// What one instruction set offers. All of it is behind plain functions, so that nothing but this
/// table is shared between objects that were compiled with different flags.
struct kernels {
  const char* name;
  void* (*open)(const void* spec, std::size_t spec_size, const float* bias, std::int64_t bias_size,
                const float* scale, std::int64_t scale_size);
  void (*route)(void* session, const float* logits, std::int64_t tokens, std::int64_t columns,
                std::int64_t stride, std::int32_t* ids, float* weights);
  void (*close)(void* session);
};

/// The kernels that this machine can run, the fastest first. The environment variable MOEROUTE_ISA
/// may name one to be used instead.
const std::vector<const kernels*>& available();

/// A router for repeated calls by one caller at a time; holds its own workspace.
class session {
 public:
  /// Throws: std::invalid_argument where the spec or a tensor does not fit, or its k varies.
  session(const router_spec& spec, const tensors& t, const kernels& with = *available().front())
      : kernels_(&with),
        state_(with.open(&spec, sizeof spec, t.bias.data(), std::ssize(t.bias),
                         t.per_expert_scale.data(), std::ssize(t.per_expert_scale)),
               with.close),
        columns_(spec.columns()) {}

  const char* isa() const { return kernels_->name; }

  /// Shapes: logits [tokens, columns] with rows `stride` apart; ids and weights [tokens, k].
  void route(const float* logits, std::int64_t tokens, std::int64_t stride, std::int32_t* ids,
             float* weights) {
    kernels_->route(state_.get(), logits, tokens, columns_, stride, ids, weights);
  }

 private:
  const kernels* kernels_;
  std::unique_ptr<void, void (*)(void*)> state_;
  std::int64_t columns_;
};

}  // namespace moeroute::dispatch
