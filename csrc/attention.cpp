#include "attention.h"

#include <cmath>

#include "dispatch.h"

namespace fastadapter {
namespace {

constexpr int64_t kFewRows = 16;       // query rows of a kv head up to which keys are not worth packing
constexpr int64_t kPartKeys = 512;     // keys of a part of forward, where query rows are few
constexpr int64_t kPartQueries = 256;  // least queries of a part of backward, where kv heads are few
constexpr int64_t kMostItems = 16;     // of a sequence in backward: bounds the memory for partial sums

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

const AttentionForward& forward_kernels(bool in_double) {
  return in_double ? FASTADAPTER_FOR_ISA(attention_forward_double)
                   : FASTADAPTER_FOR_ISA(attention_forward_float);
}

const AttentionBackward& backward_kernels(bool in_double) {
  return in_double ? FASTADAPTER_FOR_ISA(attention_backward_double)
                   : FASTADAPTER_FOR_ISA(attention_backward_float);
}

// Offsets of the packed sequences, copied once: what is checked is what is used.
std::vector<int64_t> read_offsets(const char* name, const Tensor& x, int64_t tokens) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) >= 1, name, ": cu_seqlens must have shape (num_seqs + 1,)");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, name, ": cu_seqlens must be int32, got ",
                  torch::headeronly::toString(x.scalar_type()));
  const int32_t* data = static_cast<const int32_t*>(x.data_ptr());
  std::vector<int64_t> offsets(x.size(0));
  for (int64_t i = 0; i < x.size(0); ++i) {
    offsets[i] = data[i * x.stride(0)];
    const int64_t least = i ? offsets[i - 1] : 0;
    STD_TORCH_CHECK(offsets[i] >= least && (i || offsets[i] == 0), name,
                    ": cu_seqlens must start at 0 and never decrease, got ", offsets[i], " at ", i);
  }
  STD_TORCH_CHECK(offsets.back() == tokens, name, ": cu_seqlens must end at q_len ", tokens, ", got ",
                  offsets.back());
  return offsets;
}

}  // namespace

AttentionCall::AttentionCall(const char* name, Mode mode, const Tensor& query, const Tensor* key,
                             const Tensor* value, const Tensor& prefix_key, const Tensor& prefix_value,
                             const AttentionOptions& options)
    : name_(name) {
  op.mode = mode;
  op.query = view(name, "query", query);
  op.prefix_key = view(name, "prefix_key", prefix_key);
  op.prefix_value = view(name, "prefix_value", prefix_value);
  const auto q = query.sizes(), p = prefix_key.sizes();
  batch_ = q[0], op.heads = q[1], q_len_ = q[2], op.head_dim = q[3];
  num_prefixes_ = p[0], op.kv_heads = p[1], op.prefix_len = p[2];
  check_sizes(name, "prefix_key", prefix_key, {p[0], p[1], p[2], q[3]});
  check_sizes(name, "prefix_value", prefix_value, {p[0], p[1], p[2], q[3]});
  STD_TORCH_CHECK(op.kv_heads > 0 && op.heads % op.kv_heads == 0, name,
                  ": heads of query must be a multiple of those of prefix_key, got ", op.heads, " and ",
                  op.kv_heads);
  STD_TORCH_CHECK(op.prefix_len > 0 && op.head_dim > 0, name,
                  ": prefix_len and head_dim must be at least 1, got ", op.prefix_len, " and ", op.head_dim);
  in_double = op.query.dtype == DType::kDouble;
  for (const View* bank : {&op.prefix_key, &op.prefix_value}) {
    STD_TORCH_CHECK(bank->dtype == op.query.dtype || (bank->dtype == DType::kFloat && !in_double), name,
                    ": prefix_key and prefix_value must have the dtype of query or float32");
  }
  op.group = op.heads / op.kv_heads;
  op.scale = options.softmax_scale, op.softcap = options.softcap;
  op.is_causal = options.is_causal, op.window = options.window;
  const int64_t panel = forward_kernels(in_double).panel;
  op.padded_dim = (op.head_dim + panel - 1) / panel * panel;

  int64_t kv_len = 0;
  if (key) {
    op.key = view(name, "key", *key);
    op.value = view(name, "value", *value);
    kv_len = key->size(2);
    check_sizes(name, "key", *key, {q[0], p[1], kv_len, q[3]});
    check_sizes(name, "value", *value, {q[0], p[1], kv_len, q[3]});
    STD_TORCH_CHECK(op.key.dtype == op.query.dtype && op.value.dtype == op.query.dtype, name,
                    ": key and value must have the dtype of query");
  }
  STD_TORCH_CHECK(op.softcap >= 0, name, ": softcap must be at least 0, got ", op.softcap);
  STD_TORCH_CHECK(op.window >= 0 && (op.is_causal || op.window == 0), name,
                  ": window must be at least 0, and needs is_causal, got ", op.window);
  if (options.attn_mask) {
    const Tensor& mask = *options.attn_mask;
    STD_TORCH_CHECK(!op.is_causal && !options.cu_seqlens, name,
                    ": attn_mask cannot be combined with is_causal or cu_seqlens");
    STD_TORCH_CHECK(mask.dim() == 4, name, ": attn_mask must have 4 dims, got ", mask.dim());
    check_sizes(name, "attn_mask", mask, {q[0], q[1], q[2], kv_len});
    op.has_mask = true;
    op.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
    op.mask.data = static_cast<char*>(mask.data_ptr());
    for (int i = 0; i < 4; ++i)
      op.mask.stride[i] = mask.strides()[i] * static_cast<int64_t>(mask.element_size());
    if (!op.mask_is_bool) {
      op.mask.dtype = dtype_of(name, "attn_mask", mask);
      STD_TORCH_CHECK(op.mask.dtype == op.query.dtype || op.mask.dtype == DType::kFloat, name,
                      ": attn_mask must be bool, float32 or have the dtype of query");
    }
  }
  split_sequences(options, q_len_, kv_len);
}

void AttentionCall::split_sequences(const AttentionOptions& options, int64_t tokens, int64_t kv_len) {
  if (options.cu_seqlens) {
    STD_TORCH_CHECK(batch_ == 1 && tokens == kv_len, name_,
                    ": cu_seqlens needs a batch of 1 and kv_len equal to q_len, got batch ", batch_,
                    ", q_len ", tokens, ", kv_len ", kv_len);
    const std::vector<int64_t> offsets = read_offsets(name_, *options.cu_seqlens, tokens);
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      const int64_t length = offsets[i + 1] - offsets[i];
      sequences_.push_back({0, offsets[i], length, length});
    }
  } else {
    for (int64_t b = 0; b < batch_; ++b) sequences_.push_back({b, 0, tokens, kv_len});
  }
  const int64_t count = static_cast<int64_t>(sequences_.size());
  entries_.emplace(name_, options.row_ids, count, num_prefixes_);
  for (Sequence& sequence : sequences_) sequence.entry = sequence.slot = -1;
  for (int64_t e = 0; e < entries_->size(); ++e) {
    for (int64_t i = entries_->begin[e]; i < entries_->begin[e + 1]; ++i) {
      sequences_[entries_->rows[i]].entry = entries_->id[e];
      sequences_[entries_->rows[i]].slot = e;
    }
  }
  op.sequences = sequences_.data();
  op.num_sequences = count;
}

void AttentionCall::set_gate(const Tensor& gate, const std::string& gate_fn) {
  STD_TORCH_CHECK(gate.dim() == 2 && gate.size(0) == num_prefixes_ && gate.size(1) == op.heads, name_,
                  ": gate must have shape (", num_prefixes_, ", ", op.heads, ")");
  STD_TORCH_CHECK(dtype_of(name_, "gate", gate) == (in_double ? DType::kDouble : DType::kFloat), name_,
                  ": gate must be ", in_double ? "float64" : "float32");
  STD_TORCH_CHECK(gate_fn == "tanh" || gate_fn == "identity", name_,
                  ": gate_fn must be 'tanh' or 'identity', got '", gate_fn, "'");
  const int64_t count = entries_->size() * op.heads;
  factor_ = allocate(count * 8);
  gate_slope_.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = entries_->id[i / op.heads] * gate.stride(0) + i % op.heads * gate.stride(1);
    const double g = in_double ? static_cast<const double*>(gate.data_ptr())[at]
                               : static_cast<const float*>(gate.data_ptr())[at];
    const double f = gate_fn == "tanh" ? std::tanh(g) : g;
    gate_slope_[i] = gate_fn == "tanh" ? 1.0 - f * f : 1.0;
    if (in_double) {
      reinterpret_cast<double*>(factor_.get())[i] = f;
    } else {
      reinterpret_cast<float*>(factor_.get())[i] = static_cast<float>(f);
    }
  }
  op.factor = factor_.get();
}

void AttentionCall::check_like_query(const char* argument, const Tensor& x, const Tensor& query,
                                     ScalarType dtype) const {
  const auto q = query.sizes();
  STD_TORCH_CHECK(x.dim() == 4, name_, ": ", argument, " must have 4 dims, got ", x.dim());
  check_sizes(name_, argument, x, {q[0], q[1], q[2], q[3]});
  STD_TORCH_CHECK(x.scalar_type() == dtype, name_, ": ", argument, " must be ",
                  torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(x.scalar_type()));
}

View AttentionCall::row_view(const char* argument, const Tensor& x) const {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch_ && x.size(1) == op.heads && x.size(2) == q_len_, name_,
                  ": ", argument, " must have shape (", batch_, ", ", op.heads, ", ", q_len_, ")");
  const DType compute = in_double ? DType::kDouble : DType::kFloat;
  STD_TORCH_CHECK(dtype_of(name_, argument, x) == compute, name_, ": ", argument, " must be ",
                  in_double ? "float64" : "float32");
  View v{static_cast<char*>(x.data_ptr()), {}, compute};
  for (int i = 0; i < 3; ++i) v.stride[i] = x.strides()[i] * (in_double ? 8 : 4);
  return v;
}

Tensor AttentionCall::empty_rows(const Tensor& like) const {
  return torch::stable::new_empty(like, {batch_, op.heads, q_len_}, compute_type());
}

Tensor AttentionCall::empty_wide(const Tensor& out) const { return empty_strided_like(out, compute_type()); }

int64_t AttentionCall::work(int64_t products) const {
  int64_t pairs = 0;
  for (const Sequence& sequence : sequences_) pairs += sequence.q_len * (sequence.kv_len + op.prefix_len);
  return pairs * op.heads * op.head_dim * products;
}

// Items of the forward pass, and the parts that have to be joined.
void AttentionCall::split_forward(int64_t query_block) {
  for (int64_t i = 0; i < op.num_sequences; ++i) {
    Sequence& sequence = sequences_[i];
    if (sequence.q_len == 0) continue;
    const int64_t rows = sequence.q_len * op.group;
    // Not where backward follows: it takes the scores in the order of the other path, and where they are
    // large, a probability exp(score - lse) of another rounding of the score is off by as much.
    sequence.few = rows <= kFewRows && !op.save;
    if (sequence.few) {
      op.few_rows = std::max(op.few_rows, rows);
      sequence.parts = std::max<int64_t>(1, ceil_div(sequence.kv_len, kPartKeys));
      if (sequence.parts > 1) {
        in_parts_.push_back(i);
        sequence.first_part = num_parts_;
        num_parts_ += sequence.parts * op.kv_heads;
      }
      for (int64_t kv = 0; kv < op.kv_heads; ++kv) {
        for (int64_t part = 0; part < sequence.parts; ++part) {
          const int64_t begin = part * kPartKeys;
          items_.push_back({i, kv, begin, std::min(begin + kPartKeys, sequence.kv_len), part});
        }
      }
    } else {
      op.longest_query = std::max(op.longest_query, sequence.q_len);
      op.longest_keys = std::max(op.longest_keys, sequence.kv_len);
      const int64_t blocks = ceil_div(sequence.q_len, query_block);
      for (int64_t kv = 0; kv < op.kv_heads; ++kv) {
        for (int64_t j = 0; j < blocks; ++j) {
          // First and last in turn: under a causal mask the halves of the items cost the same.
          const int64_t begin = (j % 2 ? blocks - 1 - j / 2 : j / 2) * query_block;
          items_.push_back({i, kv, begin, std::min(begin + query_block, sequence.q_len), 0});
        }
      }
    }
  }
  op.items = items_.data();
  op.in_parts = in_parts_.data();
}

// Items of the backward pass: one per sequence and kv head, more where these are few and long.
void AttentionCall::split_backward() {
  for (int64_t i = 0; i < op.num_sequences; ++i) {
    Sequence& sequence = sequences_[i];
    op.longest_query = std::max(op.longest_query, sequence.q_len);
    op.longest_keys = std::max(op.longest_keys, sequence.kv_len);
    const int64_t most = std::max<int64_t>(1, kMostItems / op.kv_heads);
    sequence.parts = std::clamp<int64_t>(sequence.q_len / kPartQueries, 1, most);
    if (sequence.parts > 1) {
      in_parts_.push_back(i);
      sequence.first_part = num_parts_;
      num_parts_ += sequence.parts * op.kv_heads;
    }
    sequence.first_item = static_cast<int64_t>(items_.size());
    for (int64_t kv = 0; kv < op.kv_heads; ++kv) {
      for (int64_t part = 0; part < sequence.parts; ++part) {
        items_.push_back({i, kv, sequence.q_len * part / sequence.parts,
                          sequence.q_len * (part + 1) / sequence.parts, part});
      }
    }
  }
  op.items = items_.data();
  op.in_parts = in_parts_.data();
}

template <class F>
void AttentionCall::run(F function, int64_t scratch_bytes, int64_t items, int64_t work) const {
  parallel(items, work, [&](int64_t begin, int64_t end) {
    const ThreadScratch scratch(scratch_bytes);
    function(op, begin, end, scratch.get());
  });
}

void AttentionCall::forward() {
  const AttentionForward& kernels = forward_kernels(in_double);
  split_forward(kernels.query_block);
  const int64_t part_size = op.few_rows * (op.padded_dim + 2);
  parts_ = allocate(num_parts_ * part_size * (in_double ? 8 : 4));
  op.parts = parts_.get();
  const int64_t bytes = kernels.scratch_bytes(op);
  run(kernels.forward, bytes, static_cast<int64_t>(items_.size()), work(2));
  run(kernels.join, bytes, static_cast<int64_t>(in_parts_.size()) * op.kv_heads, num_parts_ * part_size);
}

void AttentionCall::backward() {
  const AttentionBackward& kernels = backward_kernels(in_double);
  split_backward();
  const int64_t items = static_cast<int64_t>(items_.size()), item = in_double ? 8 : 4;
  const int64_t prefix_size = 2 * items * op.prefix_len * op.padded_dim;
  const int64_t keys_size = 2 * num_parts_ * op.longest_keys * op.padded_dim;
  partial_prefix_ = allocate(op.need_prefix ? prefix_size * item : 0);
  parts_ = allocate(op.need_key_value ? keys_size * item : 0);
  partial_gate_.assign(items * op.group, 0.0);
  op.partial_prefix = partial_prefix_.get();
  op.partial_keys = parts_.get();
  op.partial_gate = partial_gate_.data();
  op.num_entries = entries_->size();
  op.entry_id = entries_->id.data();
  op.entry_rows = entries_->rows.data();
  op.entry_begin = entries_->begin.data();
  const int64_t bytes = kernels.scratch_bytes(op);
  const int64_t products = 1 + 2 * op.need_query + 3 * op.need_key_value;
  run(kernels.backward, bytes, items, work(products));
  if (op.need_key_value)
    run(kernels.sum_keys, bytes, static_cast<int64_t>(in_parts_.size()) * op.kv_heads, keys_size);
  if (op.need_prefix) run(kernels.sum_prefix, bytes, op.num_entries * op.kv_heads, prefix_size);
}

Tensor AttentionCall::empty_bank_gradient(const Tensor& x) const {
  Tensor grad = torch::stable::new_empty(x, x.sizes());
  if (entries_->size() < num_prefixes_) {
    std::memset(grad.mutable_data_ptr(), 0, grad.numel() * grad.element_size());
  }
  return grad;
}

Tensor AttentionCall::gate_gradient(const Tensor& gate) const {
  Tensor grad = empty_bank_gradient(gate);
  for (int64_t e = 0; e < op.num_entries; ++e) {
    for (int64_t h = 0; h < op.heads; ++h) {
      double sum = 0;
      for (int64_t k = op.entry_begin[e]; k < op.entry_begin[e + 1]; ++k) {
        const Sequence& sequence = sequences_[op.entry_rows[k]];
        const int64_t first = sequence.first_item + h / op.group * sequence.parts;
        for (int64_t part = 0; part < sequence.parts; ++part)
          sum += partial_gate_[(first + part) * op.group + h % op.group];
      }
      sum *= gate_slope_[e * op.heads + h];
      const int64_t at = op.entry_id[e] * op.heads + h;
      if (in_double) {
        static_cast<double*>(grad.mutable_data_ptr())[at] = sum;
      } else {
        static_cast<float*>(grad.mutable_data_ptr())[at] = static_cast<float>(sum);
      }
    }
  }
  return grad;
}

namespace {

Tensor none(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

}  // namespace

Gradients::Gradients(AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pk,
                     const Tensor& pv)
    : query(call.op.need_query ? fast_empty_like(q) : none(q)),
      key(call.op.need_key_value ? fast_empty_like(k) : none(k)),
      value(call.op.need_key_value ? fast_empty_like(v) : none(v)),
      prefix_key(call.op.need_prefix ? call.empty_bank_gradient(pk) : none(pk)),
      prefix_value(call.op.need_prefix ? call.empty_bank_gradient(pv) : none(pv)) {
  const char* name = "gradients";
  if (call.op.need_query) call.op.grad_query = view(name, "query", query);
  if (call.op.need_key_value) call.op.grad_key = view(name, "key", key);
  if (call.op.need_key_value) call.op.grad_value = view(name, "value", value);
  if (call.op.need_prefix) call.op.grad_prefix_key = view(name, "prefix_key", prefix_key);
  if (call.op.need_prefix) call.op.grad_prefix_value = view(name, "prefix_value", prefix_value);
}

}  // namespace fastadapter
