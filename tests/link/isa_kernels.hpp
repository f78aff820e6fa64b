// What crosses from one object to another that was compiled with other flags.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct isa_input {
  std::int64_t tokens, experts;
  std::vector<float> logits, bias;
};

struct isa_output {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;  ///< of the choices, then what combine made
  std::string compiled_for, ran;
};

struct isa_kernels {
  isa_output (*run)(const isa_input&);
};
