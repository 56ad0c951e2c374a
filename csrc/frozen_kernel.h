// What the operators of frozen parts of a model hand to the kernels, which are compiled once per instruction
// set. Plain data only, as in view.h.
#pragma once

#include <cstdint>

#include "bottleneck_kernel.h"
#include "view.h"

namespace fastadapter {

// Rows of `hidden` elements one behind the other, all of one dtype; computed in float.
struct RmsNorm {
  int64_t hidden;
  float eps;
  DType dtype;
  const char *x, *weight, *grad_out;
  char* out;  // grad_x in backward
};

struct Glu {
  DType dtype;
  Activation activation;
  const char *grad_out, *gate, *up;
  char *grad_gate, *grad_up;
};

// Queries and keys (batch, heads, q_len, 2 half) and their rotated ones, of one dtype and with elements of a
// row side by side, as are those of cosine and sine (batch, 1, q_len, 2 half).
struct Rotary {
  DType dtype;
  bool transposed;  // the gradient's way
  int64_t q_len, half, heads[2];
  View cosine, sine, x[2], out[2];
};

// Each function does work items [begin, end).
struct FrozenKernels {
  int64_t (*scratch_bytes)(const RmsNorm&);
  void (*rms_norm)(const RmsNorm&, int64_t begin, int64_t end, char* scratch);           // rows
  void (*rms_norm_backward)(const RmsNorm&, int64_t begin, int64_t end, char* scratch);  // rows
  void (*glu_backward)(const Glu&, int64_t begin, int64_t end);                          // elements
  void (*rotary)(const Rotary&, int64_t begin, int64_t end);                             // (batch, q_len)
};

#define FASTADAPTER_DECLARE(ISA)             \
  namespace ISA {                            \
  extern const FrozenKernels frozen_kernels; \
  }
FASTADAPTER_DECLARE(isa_default)
FASTADAPTER_DECLARE(isa_avx2)
FASTADAPTER_DECLARE(isa_avx512)
#undef FASTADAPTER_DECLARE

}  // namespace fastadapter
