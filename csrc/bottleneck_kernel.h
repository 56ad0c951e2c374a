// What the bottleneck operators hand to the kernels, which are compiled once per instruction set. Plain data
// only, as in view.h.
#pragma once

#include <cstdint>

#include "view.h"

namespace fastadapter {

enum class Activation { kRelu, kGelu, kGeluTanh, kSilu, kTanh, kIdentity };
enum class Norm { kNone, kLayer, kRms };

// The forms in which weights are packed, see the kernels.
enum Packed { kDownByHidden, kUpBySize, kUpByHidden, kDownBySize, kPackedForms };

constexpr int64_t kBottleneckRows = 48;   // most rows of a block: several of every tile's rows
constexpr int64_t kBottleneckRun = 128;   // rows whose contribution to a parameter's gradient is one sum
constexpr int64_t kBottleneckStrip = 96;  // columns of a parameter's gradient, per work item; whole panels

// Rows [begin, end) of one bank entry, numbered (batch row among those of the entry, t).
struct Block {
  int64_t entry, begin, end;
};

// Columns [begin, end) of the gradients of one entry's parameters.
struct Strip {
  enum Kind { kDown, kUp, kDownBias, kNorm } kind;
  int64_t entry, begin, end;
};

struct Bottleneck {
  int64_t q_len, hidden, size;
  int64_t padded_hidden, padded_size;  // whole panels, whole vectors
  Activation activation;
  Norm norm;
  double norm_eps, scale;

  View x, residual, out,
      grad_out;   // (batch, -, q_len, hidden); `out` is grad_x in backward; data may be null
  View down, up;  // (n, -, size, hidden), (n, -, hidden, size)
  View down_bias, up_bias, norm_weight, norm_bias;  // (n, -, -, columns); data may be null
  // (batch, -, q_len, size), contiguous, in the compute type: z as forward keeps it and as backward is given
  // it; data may be null. Backward does not read the rows without an adapter.
  View kept_z, given_z;

  // The bank entries that this batch uses, as in Entries of host.h.
  int64_t num_entries;
  const int64_t* entry_id;
  const int64_t* batch_rows;
  const int64_t* entry_begin;
  const bool* contributes;  // (num_entries) scale and some weight of the up projection are not zero

  // Packed weights of entries with several blocks; the only block of an entry packs for itself.
  const char* packed[kPackedForms];  // (slots, packed_bytes); null where the pass does not need the form
  int64_t packed_bytes[kPackedForms];
  bool needs[kPackedForms];
  const int64_t* slot;        // (num_entries), -1: none
  const int64_t* slot_entry;  // (slots)

  const Block* blocks;         // ordered by entry
  const int64_t* first_block;  // (num_entries + 1)
  const Strip* strips;

  // Kept between the two passes of backward; rows in the order of the blocks.
  char* hidden_rows;     // (rows, padded_size) act(z)
  char* grad_down_rows;  // (rows, padded_size) gradient of z
  char* statistics;      // (rows, 2) mean and inverse deviation
  char* partial_norm;    // (blocks, 2, padded_hidden)
  View grad_down, grad_up, grad_down_bias, grad_up_bias, grad_norm_weight, grad_norm_bias;
  bool add_grad_out, need_x, need_weights, need_biases, need_norm;
  bool need_hidden;  // backward needs act(z) or its derivative
};

// Each function does work items [begin, end); `scratch` holds scratch_bytes() bytes aligned to 64.
struct BottleneckKernels {
  using Function = void (*)(const Bottleneck&, int64_t begin, int64_t end, char* scratch);
  int64_t lanes;
  int64_t (*scratch_bytes)(const Bottleneck&);
  Function pack;     // (slot, needed form, panel)
  Function forward;  // blocks
  Function keep;     // (row without an adapter, t)
};
struct BottleneckBackwardKernels {
  BottleneckKernels::Function rows;        // blocks
  BottleneckKernels::Function parameters;  // strips
};

#define FASTADAPTER_DECLARE(ISA)                                     \
  namespace ISA {                                                    \
  extern const BottleneckKernels bottleneck_float;                   \
  extern const BottleneckKernels bottleneck_double;                  \
  extern const BottleneckBackwardKernels bottleneck_backward_float;  \
  extern const BottleneckBackwardKernels bottleneck_backward_double; \
  }
FASTADAPTER_DECLARE(isa_default)
FASTADAPTER_DECLARE(isa_avx2)
FASTADAPTER_DECLARE(isa_avx512)
#undef FASTADAPTER_DECLARE

}  // namespace fastadapter
