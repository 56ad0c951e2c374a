// The names of activation functions in the operators' arguments. Included by the ops alone.
#pragma once

#include <string>

#include "bottleneck_kernel.h"
#include "host.h"

namespace fastadapter {

inline Activation activation_of(const char* op, const std::string& name) {
  const char* names[] = {"relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"};
  for (int i = 0; i < 6; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, op, ": activation must be one of relu, gelu, gelu_tanh, silu, tanh, identity, got '",
                  name, "'");
}

}  // namespace fastadapter
