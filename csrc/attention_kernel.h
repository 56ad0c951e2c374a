// What prefix_attention, gated_prefix_attention and prefix_merge hand to the kernels, which are compiled once
// per instruction set. Plain data only, see view.h.
#pragma once

#include <cstdint>

#include "view.h"

namespace fastadapter {

enum class Mode {
  kShared,  // one softmax over prefix and keys
  kGated,   // a softmax of its own for the prefix, added to the base with a factor per head
  kMerge,   // the prefix enters a softmax whose output and log-sum-exp are given
};

// A row of the batch, or one of the sequences packed into the only row.
struct Sequence {
  int64_t batch, first;  // position of its first token
  int64_t q_len, kv_len;
  int64_t entry;  // in the bank, -1 for none
  int64_t slot;   // position of the entry's factors, -1 for none
  bool few;       // so few query rows that its keys are read where they lie
  // Forward with few query rows splits the keys into parts, backward the queries; the parts of a kv head
  // follow each other.
  int64_t parts, first_part, first_item;
};

// Query rows [begin, end) of a sequence; in forward, keys where it has few query rows.
struct AttentionItem {
  int64_t sequence, kv_head, begin, end;
  int64_t part;
};

struct Attention {
  Mode mode;
  int64_t heads, kv_heads, group, head_dim, prefix_len;
  int64_t padded_dim;                   // head_dim rounded up to whole panels
  int64_t longest_query, longest_keys;  // of the sequences with many query rows
  int64_t few_rows;                     // group * q_len, the largest of those with few
  double scale, softcap;
  bool is_causal;
  int64_t window;

  View query, key, value, prefix_key, prefix_value;  // prefix: (num_prefixes, kv_heads, prefix_len, head_dim)
  View mask;                                         // (batch, heads, q_len, kv_len)
  bool has_mask, mask_is_bool;
  View out, base;        // `base` is what the prefix of kMerge is merged into
  View wide;             // attention's output unrounded, of kGated without the prefix; null: not wanted
  View lse, prefix_lse;  // (batch, heads, q_len), stride[3] unused; compute type
  View base_lse;         // kMerge
  bool save;             // lse, prefix_lse are wanted

  const Sequence* sequences;
  int64_t num_sequences;
  const AttentionItem* items;
  const void* factor;       // (slots, heads) f(gate), compute type
  const int64_t* in_parts;  // sequences whose parts have to be joined
  void* parts;              // (their parts of all kv heads, few_rows, padded_dim + 2)

  // Backward. wide, lse, prefix_lse are inputs.
  View grad_out, grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value;
  bool need_query, need_key_value, need_prefix, need_gate;
  int64_t num_entries;
  const int64_t* entry_id;     // (num_entries) index into the bank
  const int64_t* entry_rows;   // sequences without an entry, then those of each entry
  const int64_t* entry_begin;  // (num_entries + 1) into entry_rows
  void* partial_prefix;  // (items, 2, prefix_len, padded_dim) sums for grad_prefix_key, grad_prefix_value
  void* partial_keys;    // (parts, 2, longest_keys, padded_dim) where a sequence has more than one part
  double* partial_gate;  // (items, group) sums of the prefix's delta
};

// Each function does work items [begin, end); `scratch` holds its bytes() aligned to 64.
struct AttentionForward {
  int64_t panel;        // columns of a packed panel
  int64_t query_block;  // most rows of an item with many query rows
  int64_t (*scratch_bytes)(const Attention&);
  void (*forward)(const Attention&, int64_t begin, int64_t end, char* scratch);
  void (*join)(const Attention&, int64_t begin, int64_t end, char* scratch);
};

struct AttentionBackward {
  int64_t (*scratch_bytes)(const Attention&);
  void (*backward)(const Attention&, int64_t begin, int64_t end, char* scratch);
  void (*sum_keys)(const Attention&, int64_t begin, int64_t end, char* scratch);
  void (*sum_prefix)(const Attention&, int64_t begin, int64_t end, char* scratch);
};

#define FASTADAPTER_DECLARE(ISA)                                                      \
  namespace ISA {                                                                     \
  extern const AttentionForward attention_forward_float, attention_forward_double;    \
  extern const AttentionBackward attention_backward_float, attention_backward_double; \
  }
FASTADAPTER_DECLARE(isa_default)
FASTADAPTER_DECLARE(isa_avx2)
FASTADAPTER_DECLARE(isa_avx512)
#undef FASTADAPTER_DECLARE

}  // namespace fastadapter
