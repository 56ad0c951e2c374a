// fastadapter::prefix_attention, its backward and fastadapter::prefix_merge for CPU tensors, on torch's
// stable ABI. Schemas, meta functions and autograd live in fastadapter/ops/prefix_attention.py; the maths in
// docs/maths.md.
#include <tuple>

#include "attention.h"

namespace fastadapter {
namespace {

constexpr const char* kOp = "prefix_attention";

std::tuple<Tensor, Tensor, Tensor> prefix_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
    const Tensor& prefix_value, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& row_ids, double softmax_scale,
    bool is_causal, int64_t window, double softcap, bool save) {
  AttentionCall call(kOp, Mode::kShared, query, &key, &value, prefix_key, prefix_value,
                     {attn_mask, cu_seqlens, row_ids, softmax_scale, is_causal, window, softcap});
  Tensor out = fast_empty_like(query);
  auto none = [&] { return nothing(query, call.compute_type()); };
  const bool rounded = query.scalar_type() != call.compute_type();
  Tensor lse = save ? call.empty_rows(query) : none();
  Tensor wide_out = save && rounded ? call.empty_wide(out) : none();
  call.op.out = view(kOp, "out", out);
  call.op.save = save;
  if (save) call.op.lse = call.row_view("lse", lse);
  if (save && rounded) call.op.wide = view(kOp, "wide_out", wide_out);
  call.forward();
  return {out, lse, wide_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& prefix_key, const Tensor& prefix_value, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& row_ids, double softmax_scale, bool is_causal, int64_t window,
    double softcap, bool need_query, bool need_key_value, bool need_prefix) {
  AttentionCall call(kOp, Mode::kShared, query, &key, &value, prefix_key, prefix_value,
                     {attn_mask, cu_seqlens, row_ids, softmax_scale, is_causal, window, softcap});
  call.check_like_query("grad_out", grad_out, query, query.scalar_type());
  call.check_like_query("out", out, query, call.compute_type());
  Attention& op = call.op;
  op.grad_out = view(kOp, "grad_out", grad_out);
  op.wide = view(kOp, "out", out);
  op.lse = call.row_view("lse", lse);
  op.need_query = need_query, op.need_key_value = need_key_value, op.need_prefix = need_prefix;
  Gradients grads(call, query, key, value, prefix_key, prefix_value);
  call.backward();
  return {grads.query, grads.key, grads.value, grads.prefix_key, grads.prefix_value};
}

std::tuple<Tensor, Tensor> prefix_merge(const Tensor& base, const Tensor& lse, const Tensor& query,
                                        const Tensor& prefix_key, const Tensor& prefix_value,
                                        const std::optional<Tensor>& row_ids, double softmax_scale,
                                        double softcap) {
  constexpr const char* name = "prefix_merge";
  AttentionCall call(name, Mode::kMerge, query, nullptr, nullptr, prefix_key, prefix_value,
                     {std::nullopt, std::nullopt, row_ids, softmax_scale, false, 0, softcap});
  call.check_like_query("base", base, query, query.scalar_type());
  Tensor out = fast_empty_like(base);
  Tensor merged_lse = call.empty_rows(query);
  call.op.base = view(name, "base", base);
  call.op.base_lse = call.row_view("lse", lse);
  call.op.out = view(name, "out", out);
  call.op.lse = call.row_view("merged_lse", merged_lse);
  call.op.save = true;
  call.forward();
  return {out, merged_lse};
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
  m.impl("prefix_merge", TORCH_BOX(&prefix_merge));
}

}  // namespace
}  // namespace fastadapter
