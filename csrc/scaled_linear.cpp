// A linear layer with a scale and a bias of LLaMA-Adapter V2 for a few rows of fp32, in one call:
//   by input    W (x * scale) + b0 + bias
//   by output   scale * (W x + b0 + bias)
// The product is PyTorch's own, and whatever is beside it is rounded where PyTorch rounds: the same bits. See
// fastadapter/nn/channel_scale.py.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "host.h"
#include "prepared.h"

namespace fastadapter {
namespace {

constexpr const char* kOp = "scaled_linear";

// (rows, columns) of fp32 in the memory of a tensor that outlives the view.
Tensor matrix(const Tensor& of, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(of.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(of.get(), &device_index));
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(of.data_ptr(), 2, sizes, strides, 0,
                                                            static_cast<int32_t>(ScalarType::Float),
                                                            device_type, device_index, &handle));
  return Tensor(handle);
}

const float* vector_of(const char* name, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && x.dim() == 1 && x.size(0) == size && x.is_contiguous(), kOp,
      ": ", name, " must be contiguous float32 of size ", size);
  return static_cast<const float*>(x.data_ptr());
}

class PreparedScaledLinear final : public Prepared {
 public:
  PreparedScaledLinear(const Tensor& weight, const std::optional<Tensor>& own_bias, const Tensor& scale,
                       const Tensor& bias, bool by_input)
      : weight_(weight), scale_(scale), bias_(bias), own_bias_(own_bias), by_input_(by_input) {
    check();
    data_ = weight_.data_ptr();
    transposed_.emplace(transposed());
  }

  Tensor run(const Tensor& given_x, const Tensor*) const override {
    check();
    const Tensor x = given_x.is_contiguous() ? given_x : torch::stable::contiguous(given_x);
    const int64_t dims = x.dim(), in = weight_.size(1), out = weight_.size(0);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && dims > 0 && dims <= 4 && x.size(dims - 1) == in,
                    kOp, ": x must be float32 of up to 4 dims, the last of size ", in);
    const int64_t rows = x.numel() / in;
    int64_t sizes[4], strides[4], stride = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      sizes[i] = i == dims - 1 ? out : x.size(i);
      strides[i] = stride;
      stride *= sizes[i];
    }
    Tensor y = fast_empty(x, dims, sizes, strides, ScalarType::Float);
    const Tensor given = by_input_ ? scaled(x, rows, in) : matrix(x, rows, in, in, 1);
    const Tensor product = matrix(y, rows, out, out, 1);
    // the layer's own tensor, whose memory somebody may have replaced
    const Tensor other = weight_.data_ptr() == data_ ? *transposed_ : transposed();
    if (own_bias_) {
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(product.get(), own_bias_->get(), given.get(), other.get(), 1, 1));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), given.get(), other.get()));
    }
    float* const to = static_cast<float*>(y.mutable_data_ptr());
    const float *bias = vector_of("bias", bias_, out), *scale = static_cast<const float*>(scale_.data_ptr());
    // the columns of a head are tens of thousands
    parallel(out, rows * out, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < rows; ++i) {
        float* const row = to + i * out;
        for (int64_t j = begin; j < end; ++j) row[j] += bias[j];
        for (int64_t j = begin; !by_input_ && j < end; ++j) row[j] *= scale[j];
      }
    });
    return y;
  }

 private:
  void check() const {
    STD_TORCH_CHECK(weight_.is_cpu() && weight_.dim() == 2 && weight_.scalar_type() == ScalarType::Float, kOp,
                    ": weight must be float32 with 2 dims, on the CPU");
    const int64_t out = weight_.size(0);
    vector_of("scale", scale_, by_input_ ? weight_.size(1) : out);
    vector_of("bias", bias_, out);
    if (own_bias_) vector_of("own_bias", *own_bias_, out);
  }
  Tensor transposed() const {
    return matrix(weight_, weight_.size(1), weight_.size(0), weight_.stride(1), weight_.stride(0));
  }
  Tensor scaled(const Tensor& x, int64_t rows, int64_t columns) const {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
    Tensor given = fast_empty(x, 2, sizes, strides, ScalarType::Float);
    const float *from = static_cast<const float*>(x.data_ptr()),
                *scale = static_cast<const float*>(scale_.data_ptr());
    float* to = static_cast<float*>(given.mutable_data_ptr());
    for (int64_t i = 0; i < rows; ++i, from += columns, to += columns) {
      for (int64_t j = 0; j < columns; ++j) to[j] = from[j] * scale[j];
    }
    return given;
  }

  const Tensor weight_, scale_, bias_;
  const std::optional<Tensor> own_bias_;
  const bool by_input_;
  void* data_;
  std::optional<Tensor> transposed_;
};

int64_t scaled_linear_prepared(const Tensor& weight, const std::optional<Tensor>& own_bias,
                               const Tensor& scale, const Tensor& bias, bool by_input) {
  return keep(std::make_shared<PreparedScaledLinear>(weight, own_bias, scale, bias, by_input));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastadapter, m) {
  m.def(
      "scaled_linear_prepared(Tensor weight, Tensor? own_bias, Tensor scale, Tensor bias, bool by_input) -> "
      "int");
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("scaled_linear_prepared", TORCH_BOX(&scaled_linear_prepared));
}

}  // namespace
}  // namespace fastadapter
