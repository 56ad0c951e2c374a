// fastadapter::rms_norm, its backward and that of fastadapter::glu for CPU tensors, on torch's stable ABI.
// Schemas, meta functions and autograd live in fastadapter/ops/frozen.py; the maths in docs/maths.md.
#include <tuple>

#include "activation_names.h"
#include "dispatch.h"
#include "frozen_kernel.h"
#include "host.h"

namespace fastadapter {
namespace {

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

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace
}  // namespace fastadapter
