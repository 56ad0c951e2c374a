// What the gated_prefix operators hand to the kernels, which are compiled once per instruction set.
// Plain data only: an inline function here could be emitted with AVX instructions and then be the copy that
// the linker keeps for every caller.
#pragma once

#include <cstdint>

#include "view.h"

namespace fastadapter {

// A contiguous range of the rows of one bank entry and one key/value head. Rows are numbered
// (batch row among those of the entry, head within the group, t).
struct Item {
  int64_t entry, kv_head, begin, end;
};

struct GatedPrefix {
  int64_t heads, kv_heads, group, q_len, prefix_len, head_dim;
  int64_t padded_dim;  // head_dim rounded up to whole vectors
  double scale;

  View base, query, out;  // `out` is grad_query in backward
  View grad_out, grad_key, grad_value;
  View key, value;  // the bank, (num_prefixes, kv_heads, prefix_len, head_dim)

  // The bank entries that this batch uses. batch_rows holds the rows without an adapter, then those of each
  // entry.
  int64_t num_entries;
  const int64_t* entry_id;  // (num_entries) index into the bank
  const int64_t* batch_rows;
  const int64_t* entry_begin;  // (num_entries + 1) into batch_rows
  const void* factor;          // (num_entries, heads) f(gate), compute type

  // Bank rows in the compute type with padded_dim columns: the caller's memory, or a packed copy by entry.
  const char* key_rows;
  const char* value_rows;
  int64_t key_stride[3], value_stride[3];  // bytes per (bank index or entry, kv head, slot)
  bool key_packed, value_packed;

  const Item* items;          // ordered by entry, then kv head
  const int64_t* first_item;  // (num_entries * kv_heads + 1)
  void* partial;              // (items, 2, prefix_len, padded_dim) sums for grad_key and grad_value
  double* partial_gate;       // (items, group) sums of delta
  bool need_query, need_prefix;
};

// Each function does work items [begin, end); `scratch` holds scratch_bytes() bytes aligned to 64.
struct GatedPrefixKernels {
  int64_t lanes;
  int64_t (*scratch_bytes)(const GatedPrefix&);
  void (*pack)(const GatedPrefix&, const View& bank, char* dst, int64_t begin, int64_t end);
  void (*forward)(const GatedPrefix&, int64_t begin, int64_t end, char* scratch);
  void (*backward)(const GatedPrefix&, int64_t begin, int64_t end, char* scratch);
  void (*reduce)(const GatedPrefix&, int64_t begin, int64_t end, char* scratch);
  void (*keep)(const GatedPrefix&, int64_t begin, int64_t end, char* scratch);
  void (*clear)(const GatedPrefix&, int64_t begin, int64_t end, char* scratch);
};

#define FASTADAPTER_DECLARE(ISA)                       \
  namespace ISA {                                      \
  extern const GatedPrefixKernels gated_prefix_float;  \
  extern const GatedPrefixKernels gated_prefix_double; \
  }
FASTADAPTER_DECLARE(isa_default)
FASTADAPTER_DECLARE(isa_avx2)
FASTADAPTER_DECLARE(isa_avx512)
#undef FASTADAPTER_DECLARE

}  // namespace fastadapter
