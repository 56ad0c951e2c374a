// fastadapter::rms_norm, its backward, that of glu, and rotary for CPU tensors, on torch's stable ABI.
// Schemas, meta functions and autograd live in fastadapter/ops/frozen.py; the maths in docs/maths.md.
#include <tuple>

#include "activation_names.h"
#include "dispatch.h"
#include "frozen_kernel.h"
#include "host.h"

namespace fastadapter {
namespace {

constexpr const char* kRotary = "rotary";
constexpr int64_t kBlock = 4096;  // elements that one thread does at a time: whole vectors

const FrozenKernels& kernels() { return FASTADAPTER_FOR_ISA(frozen_kernels); }

const char* rows_of(const char* op, const char* name, const Tensor& x, DType dtype) {
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(dtype_of(op, name, x) == dtype && dtype != DType::kDouble, op, ": ", name,
                  " must have the dtype of the others, not float64");
  return static_cast<const char*>(x.data_ptr());
}

struct Call {
  RmsNorm op{};
  int64_t rows;

  Call(const Tensor& x, const Tensor& weight, double eps) {
    const DType dtype = dtype_of("rms_norm", "x", x);
    STD_TORCH_CHECK(
        x.dim() > 0 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1) && weight.size(0) > 0,
        "rms_norm: weight must have the size of the last dimension of x");
    op.hidden = weight.size(0), op.eps = static_cast<float>(eps), op.dtype = dtype;
    op.x = rows_of("rms_norm", "x", x, dtype);
    op.weight = rows_of("rms_norm", "weight", weight, dtype);
    rows = x.numel() / op.hidden;
  }
  void run(void (*function)(const RmsNorm&, int64_t, int64_t, char*)) const {
    const int64_t bytes = kernels().scratch_bytes(op);
    parallel(rows, 8 * rows * op.hidden, [&](int64_t begin, int64_t end) {
      const ThreadScratch scratch(bytes);
      function(op, begin, end, scratch.get());
    });
  }
};

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Call call(x, weight, eps);
  Tensor out = fast_empty_like(x);
  call.op.out = static_cast<char*>(out.data_ptr());
  call.run(kernels().rms_norm);
  return out;
}

Tensor rms_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, double eps) {
  Call call(x, weight, eps);
  STD_TORCH_CHECK(grad_out.numel() == x.numel(), "rms_norm: grad_out must have the shape of x");
  call.op.grad_out = rows_of("rms_norm", "grad_out", grad_out, call.op.dtype);
  Tensor grad_x = fast_empty_like(x);
  call.op.out = static_cast<char*>(grad_x.data_ptr());
  call.run(kernels().rms_norm_backward);
  return grad_x;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad_out, const Tensor& gate, const Tensor& up,
                                        const std::string& activation) {
  Glu op{};
  op.dtype = dtype_of("glu", "gate", gate);
  op.activation = activation_of("glu", activation);
  const int64_t count = gate.numel();
  STD_TORCH_CHECK(grad_out.numel() == count && up.numel() == count,
                  "glu: grad_out and up must have the shape of gate");
  op.grad_out = rows_of("glu", "grad_out", grad_out, op.dtype);
  op.gate = rows_of("glu", "gate", gate, op.dtype);
  op.up = rows_of("glu", "up", up, op.dtype);
  Tensor grad_gate = fast_empty_like(gate), grad_up = fast_empty_like(up);
  op.grad_gate = static_cast<char*>(grad_gate.data_ptr());
  op.grad_up = static_cast<char*>(grad_up.data_ptr());
  parallel((count + kBlock - 1) / kBlock, 16 * count, [&](int64_t begin, int64_t end) {
    kernels().glu_backward(op, begin * kBlock, std::min(end * kBlock, count));
  });
  return {grad_gate, grad_up};
}

// Cosine or sine (batch or 1, q_len, head_dim), as (batch, 1, q_len, head_dim).
View angles(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 3, kRotary, ": ", name, " must have 3 dims, got ", x.dim());
  const int64_t batch = like.size(0), q_len = like.size(2), head_dim = like.size(3);
  STD_TORCH_CHECK((x.size(0) == batch || x.size(0) == 1) && x.size(1) == q_len && x.size(2) == head_dim,
                  kRotary, ": ", name, " must have shape (", batch, " or 1, ", q_len, ", ", head_dim, ")");
  const int64_t item = static_cast<int64_t>(x.element_size());
  View v{static_cast<char*>(x.data_ptr()), {}, dtype_of(kRotary, name, x)};
  v.stride[0] = x.size(0) == 1 ? 0 : x.stride(0) * item;
  v.stride[2] = x.stride(1) * item, v.stride[3] = x.stride(2) * item;
  return v;
}

Tensor with_rows(const Tensor& x) {
  return x.dim() == 0 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor> rotary(const Tensor& given_query, const Tensor& given_key,
                                  const Tensor& given_cosine, const Tensor& given_sine, bool transposed) {
  const Tensor query = with_rows(given_query), key = with_rows(given_key);
  const Tensor cosine = with_rows(given_cosine), sine = with_rows(given_sine);
  Rotary op{};
  op.x[0] = view(kRotary, "query", query), op.x[1] = view(kRotary, "key", key);
  const auto q = query.sizes(), k = key.sizes();
  check_sizes(kRotary, "key", key, {q[0], k[1], q[2], q[3]});
  op.cosine = angles("cosine", cosine, query), op.sine = angles("sine", sine, query);
  op.dtype = op.x[0].dtype, op.transposed = transposed;
  op.q_len = q[2], op.half = q[3] / 2, op.heads[0] = q[1], op.heads[1] = k[1];
  STD_TORCH_CHECK(q[3] % 2 == 0 && op.dtype != DType::kDouble, kRotary,
                  ": query must have an even head_dim and not be float64");
  for (const View* v : {&op.x[0], &op.x[1], &op.cosine, &op.sine}) {
    STD_TORCH_CHECK(v->dtype == op.dtype, kRotary, ": query, key, cosine and sine must have one dtype");
  }
  Tensor out[2] = {fast_empty_like(query), fast_empty_like(key)};
  for (int i = 0; i < 2; ++i) op.out[i] = view(kRotary, "out", out[i]);
  const int64_t rows = q[0] * q[2];
  parallel(rows, 2 * rows * (q[1] + k[1]) * q[3],
           [&](int64_t begin, int64_t end) { kernels().rotary(op, begin, end); });
  return {out[0], out[1]};
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace
}  // namespace fastadapter
