// How a tensor reaches the kernels. Plain data only, since this is included by code of every instruction set:
// an inline function here could be emitted with AVX instructions and then be the copy that the linker keeps.
#pragma once

#include <cstdint>

namespace fastadapter {

enum class DType { kDouble, kFloat, kBFloat16, kHalf };

struct View {  // (batch, heads, rows, head_dim); strides in bytes
  char* data;
  int64_t stride[4];
  DType dtype;
};

}  // namespace fastadapter
