// The host side that prefix_attention, gated_prefix_attention and prefix_merge share: arguments into the
// kernels' terms, work items, memory.
#pragma once

#include <string>

#include "attention_kernel.h"
#include "host.h"

namespace fastadapter {

// The tail of every schema, in its order.
struct AttentionOptions {
  const std::optional<Tensor>& attn_mask;
  const std::optional<Tensor>& cu_seqlens;
  const std::optional<Tensor>& row_ids;
  double softmax_scale;
  bool is_causal;
  int64_t window;
  double softcap;
};

// One call: the arguments as the kernels see them, and everything that must outlive the kernels. Does no work
// before forward() or backward().
class AttentionCall {
 public:
  Attention op{};
  bool in_double;

  // Of kMerge the keys and values are null.
  AttentionCall(const char* name, Mode mode, const Tensor& query, const Tensor* key, const Tensor* value,
                const Tensor& prefix_key, const Tensor& prefix_value, const AttentionOptions& options);
  AttentionCall(const AttentionCall&) = delete;

  void set_gate(const Tensor& gate, const std::string& gate_fn);
  void check_like_query(const char* name, const Tensor& x, const Tensor& query, ScalarType dtype) const;
  // (batch, heads, q_len) in the compute type.
  View row_view(const char* name, const Tensor& x) const;
  Tensor empty_rows(const Tensor& like) const;
  // Laid out like `out`, in the compute type.
  Tensor empty_wide(const Tensor& out) const;
  void forward();
  // Fills what the view of each needed gradient in `op` points to, but for the gate's.
  void backward();
  // Zeros for entries that no row uses; the others are written in full.
  Tensor empty_bank_gradient(const Tensor& x) const;
  Tensor gate_gradient(const Tensor& gate) const;

  ScalarType compute_type() const { return in_double ? ScalarType::Double : ScalarType::Float; }

 private:
  void split_sequences(const AttentionOptions& options, int64_t tokens, int64_t kv_len);
  int64_t work(int64_t products) const;
  void split_forward(int64_t query_block);
  void split_backward();
  template <class F>
  void run(F function, int64_t scratch_bytes, int64_t items, int64_t work) const;

  const char* name_;
  int64_t batch_, q_len_, num_prefixes_;
  std::optional<Entries> entries_;
  std::vector<Sequence> sequences_;
  std::vector<AttentionItem> items_;
  std::vector<int64_t> in_parts_;
  int64_t num_parts_ = 0;
  std::vector<double> gate_slope_, partial_gate_;
  Buffer factor_, parts_, partial_prefix_;
};

// The results of a backward, known to `call.op`; unneeded ones have shape (0,).
struct Gradients {
  Tensor query, key, value, prefix_key, prefix_value;

  Gradients(AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pk,
            const Tensor& pv);
};

}  // namespace fastadapter
