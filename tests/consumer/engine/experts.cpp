#include "engine.hpp"

void run_expert(int e, const float* in, float* out, std::int64_t rows, std::int64_t width) {
  for (std::int64_t i = 0; i < rows * width; ++i) out[i] = in[i] * static_cast<float>(e + 1);
}
