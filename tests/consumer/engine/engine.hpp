// The engine's own interface: raw pointers in and out.
#pragma once

#include <cstdint>

// rows x width floats through the feed-forward of expert e.
void run_expert(int e, const float* in, float* out, std::int64_t rows, std::int64_t width);

// One mixture-of-experts layer: hidden [tokens, width] to out [tokens, width].
class moe {
 public:
  moe(const char* model, const float* gate, std::int64_t width, const float* bias);
  ~moe();
  void operator()(const float* hidden, float* out, std::int64_t tokens);
  std::int64_t experts() const;

 private:
  struct state;
  state* state_;
};
