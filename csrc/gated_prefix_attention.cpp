// fastadapter::gated_prefix_attention and its backward for CPU tensors, on torch's stable ABI. Schemas, meta
// functions and autograd live in fastadapter/ops/gated_prefix_attention.py; the maths in docs/maths.md.
#include <string>
#include <tuple>

#include "attention.h"

namespace fastadapter {
namespace {

constexpr const char* kOp = "gated_prefix_attention";

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_prefix_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
    const Tensor& prefix_value, const Tensor& gate, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& row_ids, double softmax_scale,
    const std::string& gate_fn, bool is_causal, int64_t window, double softcap, bool save) {
  AttentionCall call(kOp, Mode::kGated, query, &key, &value, prefix_key, prefix_value,
                     {attn_mask, cu_seqlens, row_ids, softmax_scale, is_causal, window, softcap});
  call.set_gate(gate, gate_fn);
  auto none = [&] { return nothing(query, call.compute_type()); };
  Tensor out = fast_empty_like(query);
  Tensor base = save ? call.empty_wide(out) : none();
  Tensor lse = save ? call.empty_rows(query) : none();
  Tensor prefix_lse = save ? call.empty_rows(query) : none();
  call.op.out = view(kOp, "out", out);
  call.op.save = save;
  if (save) {
    call.op.wide = view(kOp, "base", base);
    call.op.lse = call.row_view("lse", lse);
    call.op.prefix_lse = call.row_view("prefix_lse", prefix_lse);
  }
  call.forward();
  return {out, base, lse, prefix_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_prefix_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& prefix_key, const Tensor& prefix_value, const Tensor& gate, const Tensor& base,
    const Tensor& lse, const Tensor& prefix_lse, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& row_ids, double softmax_scale,
    const std::string& gate_fn, bool is_causal, int64_t window, double softcap, bool need_query,
    bool need_key_value, bool need_prefix, bool need_gate) {
  AttentionCall call(kOp, Mode::kGated, query, &key, &value, prefix_key, prefix_value,
                     {attn_mask, cu_seqlens, row_ids, softmax_scale, is_causal, window, softcap});
  call.set_gate(gate, gate_fn);
  call.check_like_query("grad_out", grad_out, query, query.scalar_type());
  call.check_like_query("base", base, query, call.compute_type());
  Attention& op = call.op;
  op.grad_out = view(kOp, "grad_out", grad_out);
  op.wide = view(kOp, "base", base);
  op.lse = call.row_view("lse", lse);
  op.prefix_lse = call.row_view("prefix_lse", prefix_lse);
  op.need_query = need_query, op.need_key_value = need_key_value;
  op.need_prefix = need_prefix, op.need_gate = need_gate;
  Gradients grads(call, query, key, value, prefix_key, prefix_value);
  call.backward();
  Tensor grad_gate = need_gate ? call.gate_gradient(gate) : torch::stable::new_empty(gate, {0});
  return {grads.query, grads.key, grads.value, grads.prefix_key, grads.prefix_value, grad_gate};
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("gated_prefix_attention", TORCH_BOX(&gated_prefix_attention));
  m.impl("gated_prefix_attention_backward", TORCH_BOX(&gated_prefix_attention_backward));
}

}  // namespace
}  // namespace fastadapter
