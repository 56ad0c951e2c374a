// fastadapter::gated_prefix and its backward for CPU tensors, on torch's stable ABI.
// Schemas, meta functions and autograd live in fastadapter/ops/gated_prefix.py; the maths in docs/maths.md.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dispatch.h"
#include "gated_prefix_kernel.h"

namespace fastadapter {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kForwardChunk = 64;     // rows per forward work item
constexpr int64_t kRowsPerPart = 128;     // rows per backward work item, while parts are few
constexpr int64_t kItemsPerEntry = 64;    // bounds the partial gradients of one bank entry
constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds below which a thread is not worth waking

const GatedPrefixKernels& kernels(bool in_double) {
  switch (cpu_isa()) {
#ifdef FASTADAPTER_X86
    case Isa::kAvx512:
      return in_double ? isa_avx512::gated_prefix_double : isa_avx512::gated_prefix_float;
    case Isa::kAvx2:
      return in_double ? isa_avx2::gated_prefix_double : isa_avx2::gated_prefix_float;
#endif
    default:
      return in_double ? isa_default::gated_prefix_double : isa_default::gated_prefix_float;
  }
}

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<char[], Free>;

Buffer allocate(int64_t bytes) {
  return Buffer(static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t(64))));
}

DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, "gated_prefix: ", name, " must be float64, float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

View view(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "gated_prefix: ", name, " must have 4 dims, got ", x.dim());
  View v{static_cast<char*>(x.data_ptr()), {}, dtype_of(name, x)};
  const int64_t item = static_cast<int64_t>(x.element_size());
  const auto strides = x.strides();
  for (int i = 0; i < 4; ++i) v.stride[i] = strides[i] * item;
  return v;
}

void check_sizes(const char* name, const Tensor& x, const int64_t (&expected)[4]) {
  const auto sizes = x.sizes();
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(sizes[i] == expected[i], "gated_prefix: ", name, " must have size ", expected[i],
                    " in dim ", i, ", got ", sizes[i]);
  }
}

// grain: items that together are worth a thread.
template <class F>
void parallel(int64_t items, int64_t work, const F& f) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, kSerialWork * items / std::max<int64_t>(1, work));
  if (items <= grain) {
    f(0, items);
  } else {
    torch::stable::parallel_for(0, items, grain, f);
  }
}

// One call: the arguments as the kernels see them, and everything that must outlive the kernels.
class Call {
 public:
  GatedPrefix op{};
  const GatedPrefixKernels* kernel;
  bool in_double;

  Call(const char* name, const Tensor& first, const Tensor& query, const Tensor& prefix_key,
       const Tensor& prefix_value, const Tensor& gate, const std::optional<Tensor>& row_ids,
       double softmax_scale, const std::string& gate_fn) {
    op.query = view("query", query);
    op.key = view("prefix_key", prefix_key);
    op.value = view("prefix_value", prefix_value);
    const View other = view(name, first);
    const auto q = query.sizes(), k = prefix_key.sizes();
    op.batch = q[0], op.heads = q[1], op.q_len = q[2], op.head_dim = q[3];
    op.kv_heads = k[1], op.prefix_len = k[2];
    num_prefixes_ = k[0];
    check_sizes(name, first, {q[0], q[1], q[2], q[3]});
    check_sizes("prefix_key", prefix_key, {k[0], k[1], k[2], q[3]});
    check_sizes("prefix_value", prefix_value, {k[0], k[1], k[2], q[3]});
    STD_TORCH_CHECK(op.kv_heads > 0 && op.heads % op.kv_heads == 0,
                    "gated_prefix: query heads must be a multiple of prefix_key heads ", op.kv_heads,
                    ", got ", op.heads);
    STD_TORCH_CHECK(op.prefix_len > 0 && op.head_dim > 0,
                    "gated_prefix: prefix_key must have at least one slot and one channel, got ",
                    op.prefix_len, " and ", op.head_dim);
    STD_TORCH_CHECK(other.dtype == op.query.dtype, "gated_prefix: ", name, " and query must share one dtype");
    in_double = op.query.dtype == DType::kDouble;
    for (const View* v : {&op.key, &op.value}) {
      STD_TORCH_CHECK(v->dtype == op.query.dtype || (v->dtype == DType::kFloat && !in_double),
                      "gated_prefix: prefix_key and prefix_value must have the dtype of query or be float32");
    }
    STD_TORCH_CHECK(gate.dim() == 2 && gate.size(0) == num_prefixes_ && gate.size(1) == op.heads,
                    "gated_prefix: gate must be (", num_prefixes_, ", ", op.heads, ")");
    STD_TORCH_CHECK(dtype_of("gate", gate) == (in_double ? DType::kDouble : DType::kFloat),
                    "gated_prefix: gate must be ", in_double ? "float64" : "float32");
    STD_TORCH_CHECK(gate_fn == "tanh" || gate_fn == "identity",
                    "gated_prefix: gate_fn must be 'tanh' or 'identity', got '", gate_fn, "'");
    op.group = op.heads / op.kv_heads;
    op.scale = softmax_scale;
    op.chunk = kForwardChunk;
    kernel = &kernels(in_double);
    op.padded_dim = (op.head_dim + kernel->lanes - 1) / kernel->lanes * kernel->lanes;
    sort_rows(row_ids);
    read_gate(gate, gate_fn == "tanh");
  }

  // Points the kernels at the bank rows, converted and padded unless they can be used in place.
  void prepare_bank() {
    op.key_packed = prepare(op.key, packed_key_, &op.key_rows, op.key_stride);
    op.value_packed = prepare(op.value, packed_value_, &op.value_rows, op.value_stride);
  }

  using Function = void (*)(const GatedPrefix&, int64_t, int64_t, char*);
  void run(Function function, int64_t items, int64_t work) const {
    const int64_t bytes = kernel->scratch_bytes(op);
    parallel(items, work, [&](int64_t begin, int64_t end) {
      const Buffer scratch = allocate(bytes);
      function(op, begin, end, scratch.get());
    });
  }

  int64_t work() const { return op.batch * op.heads * op.q_len * op.prefix_len * op.padded_dim * 2; }

  int64_t num_prefixes() const { return num_prefixes_; }
  bool all_rows_adapted() const { return static_cast<int64_t>(members_.size()) == op.batch; }
  const std::vector<int64_t>& entries() const { return entry_id_; }
  int64_t members_of(int64_t entry) const {
    const int64_t end = entry + 1 < op.num_entries ? members_begin_[entry + 1] : members_.size();
    return end - members_begin_[entry];
  }
  double gate_slope(int64_t entry, int64_t head) const { return slope_[entry * op.heads + head]; }

 private:
  void sort_rows(const std::optional<Tensor>& row_ids) {
    std::vector<int64_t> ids(op.batch, 0);
    if (row_ids) {
      STD_TORCH_CHECK(row_ids->dim() == 1 && row_ids->size(0) == op.batch,
                      "gated_prefix: row_ids must have shape (", op.batch, ",)");
      STD_TORCH_CHECK(row_ids->scalar_type() == ScalarType::Int, "gated_prefix: row_ids must be int32, got ",
                      torch::headeronly::toString(row_ids->scalar_type()));
      const int32_t* data = static_cast<const int32_t*>(row_ids->data_ptr());
      const int64_t stride = row_ids->stride(0);
      for (int64_t b = 0; b < op.batch; ++b) {
        ids[b] = data[b * stride];
        STD_TORCH_CHECK(ids[b] >= -1 && ids[b] < num_prefixes_, "gated_prefix: row_ids must be in [-1, ",
                        num_prefixes_, "), got ", ids[b]);
      }
    } else {
      STD_TORCH_CHECK(num_prefixes_ == 1, "gated_prefix: a bank of ", num_prefixes_, " needs row_ids");
    }
    members_.resize(op.batch);
    std::iota(members_.begin(), members_.end(), 0);
    if (row_ids) {
      members_.erase(std::remove_if(members_.begin(), members_.end(), [&](int64_t b) { return ids[b] < 0; }),
                     members_.end());
      std::stable_sort(members_.begin(), members_.end(),
                       [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    }
    entry_of_.assign(op.batch, -1);
    for (size_t i = 0; i < members_.size(); ++i) {
      if (i == 0 || ids[members_[i]] != entry_id_.back()) {
        entry_id_.push_back(ids[members_[i]]);
        members_begin_.push_back(i);
      }
      entry_of_[members_[i]] = static_cast<int64_t>(entry_id_.size()) - 1;
    }
    op.num_entries = entry_id_.size();
    op.entry_id = entry_id_.data();
    op.entry_of = entry_of_.data();
    op.members = members_.data();
    op.members_begin = members_begin_.data();
  }

  template <class C>
  void read_gate(const Tensor& gate, bool tanh) {
    const C* data = static_cast<const C*>(gate.data_ptr());
    const int64_t row = gate.stride(0), column = gate.stride(1);
    factor_ = allocate(op.num_entries * op.heads * sizeof(C));
    C* factor = reinterpret_cast<C*>(factor_.get());
    slope_.resize(op.num_entries * op.heads);
    for (int64_t e = 0; e < op.num_entries; ++e) {
      for (int64_t h = 0; h < op.heads; ++h) {
        const C g = data[entry_id_[e] * row + h * column];
        const double f = tanh ? std::tanh(static_cast<double>(g)) : static_cast<double>(g);
        factor[e * op.heads + h] = static_cast<C>(f);
        slope_[e * op.heads + h] = tanh ? 1.0 - f * f : 1.0;
      }
    }
    op.factor = factor_.get();
  }
  void read_gate(const Tensor& gate, bool tanh) {
    if (in_double) {
      read_gate<double>(gate, tanh);
    } else {
      read_gate<float>(gate, tanh);
    }
  }

  bool prepare(const View& bank, Buffer& packed, const char** rows, int64_t* stride) {
    const int64_t item = in_double ? 8 : 4;
    const DType compute = in_double ? DType::kDouble : DType::kFloat;
    if (bank.dtype == compute && bank.stride[3] == item && op.padded_dim == op.head_dim) {
      *rows = bank.data;
      std::copy(bank.stride, bank.stride + 3, stride);
      return false;
    }
    const int64_t pairs = op.num_entries * op.kv_heads, size = op.prefix_len * op.padded_dim;
    packed = allocate(pairs * size * item);
    char* dst = packed.get();
    parallel(pairs, pairs * size,
             [&](int64_t begin, int64_t end) { kernel->pack(op, bank, dst, begin, end); });
    *rows = dst;
    stride[2] = op.padded_dim * item;
    stride[1] = op.prefix_len * stride[2];
    stride[0] = op.kv_heads * stride[1];
    return true;
  }

  int64_t num_prefixes_;
  std::vector<int64_t> entry_id_, entry_of_, members_, members_begin_;
  std::vector<double> slope_;
  Buffer factor_, packed_key_, packed_value_;
};

Tensor gated_prefix(const Tensor& base, const Tensor& query, const Tensor& prefix_key,
                    const Tensor& prefix_value, const Tensor& gate, const std::optional<Tensor>& row_ids,
                    double softmax_scale, const std::string& gate_fn) {
  Call call("base", base, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn);
  Tensor out = torch::stable::empty_like(base);
  call.op.base = view("base", base);
  call.op.out = view("out", out);
  call.prepare_bank();
  const int64_t rows = call.op.group * call.op.q_len, chunks = (rows + kForwardChunk - 1) / kForwardChunk;
  call.run(call.kernel->forward, call.op.batch * call.op.kv_heads * chunks, call.work());
  return out;
}

// A fixed split of every entry's rows, from that entry's rows alone: its gradients do not depend on the rest
// of the batch, nor on the number of threads.
void split(const Call& call, std::vector<Item>& items, std::vector<int64_t>& first_item) {
  const GatedPrefix& op = call.op;
  const int64_t most = std::max<int64_t>(1, kItemsPerEntry / op.kv_heads);
  for (int64_t e = 0; e < op.num_entries; ++e) {
    const int64_t rows = call.members_of(e) * op.group * op.q_len;
    const int64_t parts = std::min(most, (rows + kRowsPerPart - 1) / kRowsPerPart);
    for (int64_t kv = 0; kv < op.kv_heads; ++kv) {
      first_item.push_back(items.size());
      for (int64_t i = 0; i < parts; ++i) items.push_back({e, kv, rows * i / parts, rows * (i + 1) / parts});
    }
  }
  first_item.push_back(items.size());
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

// Bank entries that no row uses have a zero gradient; the others are written in full.
Tensor empty_gradient(const Call& call, const Tensor& x) {
  Tensor grad = torch::stable::new_empty(x, x.sizes());
  if (call.op.num_entries < call.num_prefixes() || call.op.q_len == 0) {
    std::memset(grad.mutable_data_ptr(), 0, grad.numel() * grad.element_size());
  }
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_prefix_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& prefix_key, const Tensor& prefix_value,
    const Tensor& gate, const std::optional<Tensor>& row_ids, double softmax_scale,
    const std::string& gate_fn, bool need_query, bool need_prefix, bool need_gate) {
  Call call("grad_out", grad_out, query, prefix_key, prefix_value, gate, row_ids, softmax_scale, gate_fn);
  GatedPrefix& op = call.op;
  op.grad_out = view("grad_out", grad_out);
  op.need_query = need_query, op.need_prefix = need_prefix, op.need_gate = need_gate;
  auto none = [](const Tensor& x) { return torch::stable::new_empty(x, {0}); };

  Tensor grad_query = need_query ? torch::stable::empty_like(query) : none(query);
  Tensor grad_key = need_prefix ? empty_gradient(call, prefix_key) : none(prefix_key);
  Tensor grad_value = need_prefix ? empty_gradient(call, prefix_value) : none(prefix_value);
  Tensor grad_gate = need_gate ? empty_gradient(call, gate) : none(gate);
  if (need_query) op.out = view("grad_query", grad_query);
  if (need_prefix) op.grad_key = view("grad_prefix_key", grad_key);
  if (need_prefix) op.grad_value = view("grad_prefix_value", grad_value);

  std::vector<Item> items;
  std::vector<int64_t> first_item;
  split(call, items, first_item);
  const int64_t count = items.size(), panel = op.prefix_len * op.padded_dim;
  op.items = items.data();
  op.first_item = first_item.data();
  const Buffer partial = allocate(need_prefix ? count * 2 * panel * (call.in_double ? 8 : 4) : 0);
  std::vector<double> partial_gate(count * op.group);
  op.partial = partial.get();
  op.partial_gate = partial_gate.data();

  call.prepare_bank();
  const GatedPrefixKernels& kernel = *call.kernel;
  call.run(kernel.backward, count, call.work() * 5 / 2);
  if (need_prefix && count > 0) {
    call.run(kernel.reduce, op.num_entries * op.kv_heads * op.prefix_len, count * 2 * panel);
  }
  if (need_query && !call.all_rows_adapted()) {
    call.run(kernel.clear, op.batch * op.heads, op.batch * op.heads * op.q_len * op.padded_dim);
  }
  if (need_gate && call.in_double)
    store_gate_gradient(call, static_cast<double*>(grad_gate.mutable_data_ptr()));
  if (need_gate && !call.in_double)
    store_gate_gradient(call, static_cast<float*>(grad_gate.mutable_data_ptr()));
  return {grad_query, grad_key, grad_value, grad_gate};
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("gated_prefix", TORCH_BOX(&gated_prefix));
  m.impl("gated_prefix_backward", TORCH_BOX(&gated_prefix_backward));
}

}  // namespace
}  // namespace fastadapter
