// fastadapter::gated_prefix and its backward for CPU tensors, on torch's stable ABI.
// Schemas, meta functions and autograd live in fastadapter/ops/gated_prefix.py; the maths in docs/maths.md.
#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include "dispatch.h"
#include "gated_prefix_kernel.h"
#include "host.h"
#include "prepared.h"

namespace fastadapter {
namespace {

constexpr const char* kOp = "gated_prefix";
constexpr int64_t kRowsPerItem = 128;   // of one bank entry and kv head, per work item
constexpr int64_t kItemsPerEntry = 64;  // bounds the partial gradients of one bank entry in backward

const GatedPrefixKernels& kernels(bool in_double) {
  return in_double ? FASTADAPTER_FOR_ISA(gated_prefix_double) : FASTADAPTER_FOR_ISA(gated_prefix_float);
}

// One call: the arguments as the kernels see them, and everything that must outlive the kernels.
class Call {
 public:
  GatedPrefix op{};
  const GatedPrefixKernels* kernel;
  bool in_double;

  // `first` is base in forward and grad_out in backward: what must look like query.
  Call(const char* name, const Tensor& first, const Tensor& query, const Tensor& prefix_key,
       const Tensor& prefix_value, const Tensor& gate, const std::optional<Tensor>& row_ids,
       double softmax_scale, const std::string& gate_fn) {
    op.query = view(kOp, "query", query);
    op.key = view(kOp, "prefix_key", prefix_key);
    op.value = view(kOp, "prefix_value", prefix_value);
    const View like_query = view(kOp, name, first);
    const auto q = query.sizes(), k = prefix_key.sizes();
    batch_ = q[0], op.heads = q[1], op.q_len = q[2], op.head_dim = q[3];
    num_prefixes_ = k[0], op.kv_heads = k[1], op.prefix_len = k[2];
    check_sizes(kOp, name, first, {q[0], q[1], q[2], q[3]});
    check_sizes(kOp, "prefix_key", prefix_key, {k[0], k[1], k[2], q[3]});
    check_sizes(kOp, "prefix_value", prefix_value, {k[0], k[1], k[2], q[3]});
    STD_TORCH_CHECK(op.kv_heads > 0 && op.heads % op.kv_heads == 0,
                    "gated_prefix: heads of query must be a multiple of those of prefix_key, got ", op.heads,
                    " and ", op.kv_heads);
    STD_TORCH_CHECK(op.prefix_len > 0 && op.head_dim > 0,
                    "gated_prefix: prefix_len and head_dim must be at least 1, got ", op.prefix_len, " and ",
                    op.head_dim);
    STD_TORCH_CHECK(like_query.dtype == op.query.dtype, "gated_prefix: ", name,
                    " must have the dtype of query");
    in_double = op.query.dtype == DType::kDouble;
    for (const View* bank : {&op.key, &op.value}) {
      STD_TORCH_CHECK(bank->dtype == op.query.dtype || (bank->dtype == DType::kFloat && !in_double),
                      "gated_prefix: prefix_key and prefix_value must have the dtype of query or float32");
    }
    STD_TORCH_CHECK(gate.dim() == 2 && gate.size(0) == num_prefixes_ && gate.size(1) == op.heads,
                    "gated_prefix: gate must have shape (", num_prefixes_, ", ", op.heads, ")");
    STD_TORCH_CHECK(dtype_of(kOp, "gate", gate) == (in_double ? DType::kDouble : DType::kFloat),
                    "gated_prefix: gate must be ", in_double ? "float64" : "float32");
    STD_TORCH_CHECK(gate_fn == "tanh" || gate_fn == "identity",
                    "gated_prefix: gate_fn must be 'tanh' or 'identity', got '", gate_fn, "'");
    op.group = op.heads / op.kv_heads;
    op.scale = softmax_scale;
    kernel = &kernels(in_double);
    op.padded_dim = (op.head_dim + kernel->lanes - 1) / kernel->lanes * kernel->lanes;
    entries_.emplace(kOp, row_ids, batch_, num_prefixes_);
    op.num_entries = entries_->size();
    op.entry_id = entries_->id.data();
    op.batch_rows = entries_->rows.data();
    op.entry_begin = entries_->begin.data();
    if (in_double) {
      read_gate<double>(gate, gate_fn == "tanh");
    } else {
      read_gate<float>(gate, gate_fn == "tanh");
    }
    op.key_packed = prepare_bank(op.key, packed_key_, &op.key_rows, op.key_stride);
    op.value_packed = prepare_bank(op.value, packed_value_, &op.value_rows, op.value_stride);
  }
  Call(const Call&) = delete;

  // Splits the rows of every entry into items of kRowsPerItem, at most `most` items per entry. The split of
  // an entry depends on its own rows alone: so do its gradients, bit for bit, and no thread count changes
  // them.
  void split(int64_t most) {
    const int64_t most_parts = std::max<int64_t>(1, most / op.kv_heads);
    for (int64_t e = 0; e < op.num_entries; ++e) {
      const int64_t rows = (op.entry_begin[e + 1] - op.entry_begin[e]) * op.group * op.q_len;
      const int64_t parts = std::min(most_parts, (rows + kRowsPerItem - 1) / kRowsPerItem);
      for (int64_t kv = 0; kv < op.kv_heads; ++kv) {
        first_item_.push_back(items());
        for (int64_t i = 0; i < parts; ++i) {
          items_.push_back({e, kv, rows * i / parts, rows * (i + 1) / parts});
        }
      }
    }
    first_item_.push_back(items());
    op.items = items_.data();
    op.first_item = first_item_.data();
  }

  using Function = void (*)(const GatedPrefix&, int64_t, int64_t, char*);
  void run(Function function, int64_t items, int64_t work) const { run(op, function, items, work); }
  void run(const GatedPrefix& with, Function function, int64_t items, int64_t work) const {
    parallel(items, work, [&](int64_t begin, int64_t end) {
      const ThreadScratch scratch(kernel->scratch_bytes(with));
      function(with, begin, end, scratch.get());
    });
  }
  void run_forward(const GatedPrefix& with) const {
    run(with, kernel->forward, items(), work());
    run(with, kernel->keep, unadapted() * op.heads, unadapted() * row_work());
  }

  int64_t items() const { return static_cast<int64_t>(items_.size()); }
  int64_t unadapted() const { return entries_->unadapted(); }  // rows without an adapter
  int64_t num_prefixes() const { return num_prefixes_; }
  int64_t row_work() const { return op.heads * op.q_len * op.padded_dim; }
  int64_t work() const { return (batch_ - unadapted()) * row_work() * op.prefix_len * 2; }
  double gate_slope(int64_t entry, int64_t head) const { return gate_slope_[entry * op.heads + head]; }

 private:
  template <class C>
  void read_gate(const Tensor& gate, bool tanh) {
    const C* data = static_cast<const C*>(gate.data_ptr());
    const int64_t row = gate.stride(0), column = gate.stride(1);
    factor_ = allocate(op.num_entries * op.heads * sizeof(C));
    C* factor = reinterpret_cast<C*>(factor_.get());
    gate_slope_.resize(op.num_entries * op.heads);
    for (int64_t e = 0; e < op.num_entries; ++e) {
      for (int64_t h = 0; h < op.heads; ++h) {
        const double g = data[op.entry_id[e] * row + h * column], f = tanh ? std::tanh(g) : g;
        factor[e * op.heads + h] = static_cast<C>(f);
        gate_slope_[e * op.heads + h] = tanh ? 1.0 - f * f : 1.0;
      }
    }
    op.factor = factor_.get();
  }

  // Bank rows as the kernels need them: in place where possible, else converted and padded; true if packed.
  bool prepare_bank(const View& bank, Buffer& packed, const char** rows, int64_t* stride) {
    const int64_t item = in_double ? 8 : 4;
    if (bank.dtype == (in_double ? DType::kDouble : DType::kFloat) && bank.stride[3] == item &&
        op.padded_dim == op.head_dim) {
      *rows = bank.data;
      std::copy(bank.stride, bank.stride + 3, stride);
      return false;
    }
    const int64_t pairs = op.num_entries * op.kv_heads;
    stride[2] = op.padded_dim * item;
    stride[1] = op.prefix_len * stride[2];
    stride[0] = op.kv_heads * stride[1];
    packed = allocate(op.num_entries * stride[0]);
    char* dst = packed.get();
    *rows = dst;
    parallel(pairs, op.num_entries * stride[0],
             [&](int64_t begin, int64_t end) { kernel->pack(op, bank, dst, begin, end); });
    return true;
  }

  int64_t batch_, num_prefixes_;
  std::optional<Entries> entries_;
  std::vector<int64_t> first_item_;
  std::vector<Item> items_;
  std::vector<double> gate_slope_;
  Buffer factor_, packed_key_, packed_value_;
};

Tensor gated_prefix(const Tensor& base, const Tensor& query, const Tensor& prefix_key,
                    const Tensor& prefix_value, const Tensor& gate, const std::optional<Tensor>& row_ids,
                    double softmax_scale, const std::string& gate_fn) {
  Call call("base", base, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn);
  Tensor out = fast_empty_like(base);
  call.op.base = view(kOp, "base", base);
  call.op.out = view(kOp, "out", out);
  call.split(std::numeric_limits<int64_t>::max());
  call.run_forward(call.op);
  return out;
}

// Forward over what an attention gives, (batch, q_len, num_heads, head_dim), and query; others than those it
// was prepared for are a call as ever.
class PreparedGatedPrefix final : public Prepared {
 public:
  PreparedGatedPrefix(const Tensor& output, const Tensor& query, const Tensor& prefix_key,
                      const Tensor& prefix_value, const Tensor& gate, const std::optional<Tensor>& row_ids,
                      double softmax_scale, const std::string& gate_fn)
      : key_(prefix_key),
        value_(prefix_value),
        gate_(gate),
        row_ids_(row_ids),
        softmax_scale_(softmax_scale),
        gate_fn_(gate_fn),
        output_(output),
        query_(query),
        call_("base", by_head(output), query, prefix_key, prefix_value, gate, row_ids, softmax_scale,
              gate_fn) {
    call_.op.base = view_by_head(output);
    call_.split(std::numeric_limits<int64_t>::max());
  }
  Tensor run(const Tensor& output, const Tensor* query) const override {
    if (!(output_ == output) || !(query_ == *query)) {
      return by_head(
          gated_prefix(by_head(output), *query, key_, value_, gate_, row_ids_, softmax_scale_, gate_fn_));
    }
    Tensor out = fast_empty_like(output);
    GatedPrefix op = call_.op;
    op.base.data = static_cast<char*>(output.data_ptr());
    op.query.data = static_cast<char*>(query->data_ptr());
    op.out = view_by_head(out);
    call_.run_forward(op);
    return out;
  }

 private:
  static Tensor by_head(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, kOp, ": base must have 4 dims, got ", x.dim());
    return torch::stable::transpose(x, 1, 2);
  }
  static View view_by_head(const Tensor& x) {
    View v = view(kOp, "base", x);
    std::swap(v.stride[1], v.stride[2]);
    return v;
  }

  const Tensor key_, value_, gate_;
  const std::optional<Tensor> row_ids_;
  const double softmax_scale_;
  const std::string gate_fn_;
  const Layout output_, query_;
  Call call_;
};

int64_t gated_prefix_prepared(const Tensor& output, const Tensor& query, const Tensor& prefix_key,
                              const Tensor& prefix_value, const Tensor& gate,
                              const std::optional<Tensor>& row_ids, double softmax_scale,
                              const std::string& gate_fn) {
  return keep(std::make_shared<PreparedGatedPrefix>(output, query, prefix_key, prefix_value, gate, row_ids,
                                                    softmax_scale, gate_fn));
}

template <class C>
void store_gate_gradient(const Call& call, C* grad) {
  const GatedPrefix& op = call.op;
  for (int64_t e = 0; e < op.num_entries; ++e) {
    for (int64_t h = 0; h < op.heads; ++h) {
      const int64_t pair = e * op.kv_heads + h / op.group;
      double sum = 0;
      for (int64_t i = op.first_item[pair]; i < op.first_item[pair + 1]; ++i) {
        sum += op.partial_gate[i * op.group + h % op.group];
      }
      grad[op.entry_id[e] * op.heads + h] = static_cast<C>(sum * call.gate_slope(e, h));
    }
  }
}

// Bank entries that no row uses have a zero gradient; those of the others are written in full.
Tensor empty_gradient(const Call& call, const Tensor& x) {
  Tensor grad = torch::stable::new_empty(x, x.sizes());
  if (call.op.num_entries < call.num_prefixes() || call.items() == 0) {
    std::memset(grad.mutable_data_ptr(), 0, grad.numel() * grad.element_size());
  }
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_prefix_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& prefix_key, const Tensor& prefix_value,
    const Tensor& gate, const std::optional<Tensor>& row_ids, double softmax_scale,
    const std::string& gate_fn, bool need_query, bool need_prefix, bool need_gate) {
  Call call("grad_out", grad_out, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn);
  call.split(kItemsPerEntry);
  GatedPrefix& op = call.op;
  op.grad_out = view(kOp, "grad_out", grad_out);
  op.need_query = need_query, op.need_prefix = need_prefix;

  auto none = [](const Tensor& x) { return torch::stable::new_empty(x, {0}); };
  Tensor grad_query = need_query ? torch::stable::empty_like(query) : none(query);
  Tensor grad_key = need_prefix ? empty_gradient(call, prefix_key) : none(prefix_key);
  Tensor grad_value = need_prefix ? empty_gradient(call, prefix_value) : none(prefix_value);
  Tensor grad_gate = need_gate ? empty_gradient(call, gate) : none(gate);
  if (need_query) op.out = view(kOp, "grad_query", grad_query);
  if (need_prefix) op.grad_key = view(kOp, "grad_prefix_key", grad_key);
  if (need_prefix) op.grad_value = view(kOp, "grad_prefix_value", grad_value);

  const int64_t partial_size = call.items() * 2 * op.prefix_len * op.padded_dim;
  const Buffer partial = allocate(need_prefix ? partial_size * (call.in_double ? 8 : 4) : 0);
  std::vector<double> partial_gate(call.items() * op.group);
  op.partial = partial.get();
  op.partial_gate = partial_gate.data();

  call.run(call.kernel->backward, call.items(), call.work() * 5 / 2);
  if (need_prefix && call.items() > 0) {
    call.run(call.kernel->reduce, op.num_entries * op.kv_heads * op.prefix_len, partial_size);
  }
  if (need_query)
    call.run(call.kernel->clear, call.unadapted() * op.heads, call.unadapted() * call.row_work());
  if (need_gate && call.in_double)
    store_gate_gradient(call, static_cast<double*>(grad_gate.mutable_data_ptr()));
  if (need_gate && !call.in_double)
    store_gate_gradient(call, static_cast<float*>(grad_gate.mutable_data_ptr()));
  return {grad_query, grad_key, grad_value, grad_gate};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastadapter, m) {
  m.def(
      "gated_prefix_prepared(Tensor output, Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor "
      "gate, "
      "Tensor? row_ids, float softmax_scale, str gate_fn) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("gated_prefix_prepared", TORCH_BOX(&gated_prefix_prepared));
  m.impl("gated_prefix", TORCH_BOX(&gated_prefix));
  m.impl("gated_prefix_backward", TORCH_BOX(&gated_prefix_backward));
}

}  // namespace
}  // namespace fastadapter
