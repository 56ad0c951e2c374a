// Norms and activations of a frozen model, see docs/maths.md. What PyTorch does in six passes over a row is
// done while the row is in cache.
//
// The forward of rms_norm has the bits of PyTorch's own operations: the mean of the squares is formed in the
// order of its sums, eight lanes of four accumulators in levels of sixteen.
#include "frozen_kernel.h"

#include "activations.h"
#include "rows.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

constexpr int kSumLanes = 8;
constexpr int kPart = kLanes<float> < kSumLanes ? kLanes<float> : kSumLanes;
constexpr int kParts = kSumLanes / kPart;
constexpr int kStreams = 4, kLevels = 4, kLevelBits = 4;
using Part = VecOf<float, kPart>::type;

inline Part load_part(const float* p) { return *reinterpret_cast<const VecOf<float, kPart>::unaligned*>(p); }
inline Part square(const float* p) {
  const Part x = load_part(p);
  return rounded(x * x);
}

// sum of x[j]^2, in the order of PyTorch's sum over a contiguous dimension.
inline float sum_of_squares(const float* x, int64_t n) {
  const int64_t vectors = n / kSumLanes, groups = vectors / kStreams;
  Part level[kLevels][kStreams][kParts] = {};
  int64_t i = 0;
  auto add_group = [&] {
    for (int k = 0; k < kStreams; ++k) {
      for (int p = 0; p < kParts; ++p)
        level[0][k][p] += square(x + (i * kStreams + k) * kSumLanes + p * kPart);
    }
    ++i;
  };
  while (i + (1 << kLevelBits) <= groups) {
    for (int j = 0; j < 1 << kLevelBits; ++j) add_group();
    for (int j = 1; j < kLevels; ++j) {
      for (int k = 0; k < kStreams; ++k) {
        for (int p = 0; p < kParts; ++p) {
          level[j][k][p] += level[j - 1][k][p];
          level[j - 1][k][p] = Part{};
        }
      }
      if ((i & (int64_t{(1 << kLevelBits) - 1} << (j * kLevelBits))) != 0) break;
    }
  }
  while (i < groups) add_group();
  for (int j = 1; j < kLevels; ++j) {
    for (int k = 0; k < kStreams; ++k) {
      for (int p = 0; p < kParts; ++p) level[0][k][p] += level[j][k][p];
    }
  }
  auto& sum = level[0];
  for (int64_t v = groups * kStreams; v < vectors; ++v) {
    for (int p = 0; p < kParts; ++p) sum[0][p] += square(x + v * kSumLanes + p * kPart);
  }
  for (int k = 1; k < kStreams; ++k) {
    for (int p = 0; p < kParts; ++p) sum[0][p] += sum[k][p];
  }
  float total = 0;
  for (int64_t j = vectors * kSumLanes; j < n; ++j) {
    VecOf<float, 4>::type one = {x[j]};
    one = rounded(one * one);
    total += one[0];
  }
  for (int p = 0; p < kParts; ++p) {
    for (int l = 0; l < kPart; ++l) total += sum[0][p][l];
  }
  return total;
}

inline float inverse_deviation(const float* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
}

// f(j, lanes) over a row, whole vectors first.
template <class F>
inline void over_row(int64_t n, F f) {
  constexpr int W = kLanes<float>;
  int64_t j = 0;
  for (; j + W <= n; j += W) f(j, W);
  if (j < n) f(j, n - j);
}
template <class E>
inline Vec<float> get(const char* p, int64_t j, int64_t lanes) {
  const E* from = reinterpret_cast<const E*>(p) + j;
  return lanes == kLanes<float> ? load(from)
                                : load_some<float, E>(reinterpret_cast<const char*>(from), sizeof(E), lanes);
}
template <class E>
inline void put(char* p, int64_t j, int64_t lanes, Vec<float> v) {
  E* to = reinterpret_cast<E*>(p) + j;
  if (lanes == kLanes<float>) {
    store(to, v);
  } else {
    store_some<float, E>(reinterpret_cast<char*>(to), sizeof(E), lanes, v);
  }
}
// As it is after a store in E.
template <class E>
inline Vec<float> through(Vec<float> v) {
  if constexpr (sizeof(E) == sizeof(float)) return v;
  E kept[kLanes<float>];
  store(kept, v);
  return load(kept);
}

int64_t scratch_bytes(const RmsNorm& op) { return (op.hidden + 32) * static_cast<int64_t>(sizeof(float)); }

template <class E>
const float* in_float(const char* row, int64_t n, char* scratch) {
  if constexpr (sizeof(E) == sizeof(float)) return reinterpret_cast<const float*>(row);
  float* wide = reinterpret_cast<float*>(scratch);
  over_row(n, [&](int64_t j, int64_t lanes) { store(wide + j, get<E>(row, j, lanes)); });
  return wide;
}

void rms_norm(const RmsNorm& op, int64_t begin, int64_t end, char* scratch) {
  with_element<float>(op.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const int64_t bytes = op.hidden * static_cast<int64_t>(sizeof(E));
    for (int64_t i = begin; i < end; ++i) {
      const char* row = op.x + i * bytes;
      const float* x = in_float<E>(row, op.hidden, scratch);
      const float r = inverse_deviation(x, op.hidden, op.eps);
      over_row(op.hidden, [&](int64_t j, int64_t lanes) {
        const Vec<float> normed = through<E>(get<E>(row, j, lanes) * r);
        put<E>(op.out + i * bytes, j, lanes, get<E>(op.weight, j, lanes) * normed);
      });
    }
  });
}

// grad_x = r (g - x r^2 mean(g x)) with g = grad_out * weight
void rms_norm_backward(const RmsNorm& op, int64_t begin, int64_t end, char* scratch) {
  with_element<float>(op.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const int64_t bytes = op.hidden * static_cast<int64_t>(sizeof(E));
    for (int64_t i = begin; i < end; ++i) {
      const char *row = op.x + i * bytes, *grad = op.grad_out + i * bytes;
      const float* x = in_float<E>(row, op.hidden, scratch);
      const float r = inverse_deviation(x, op.hidden, op.eps);
      Vec<float> sums = {};
      over_row(op.hidden, [&](int64_t j, int64_t lanes) {
        sums += get<E>(grad, j, lanes) * get<E>(op.weight, j, lanes) * get<E>(row, j, lanes);
      });
      float sum = 0;
      for (int l = 0; l < kLanes<float>; ++l) sum += sums[l];
      const float share = r * r * (sum / static_cast<float>(op.hidden));
      over_row(op.hidden, [&](int64_t j, int64_t lanes) {
        const Vec<float> g = get<E>(grad, j, lanes) * get<E>(op.weight, j, lanes);
        put<E>(op.out + i * bytes, j, lanes, (g - get<E>(row, j, lanes) * share) * r);
      });
    }
  });
}

// grad_up = grad_out act(gate), grad_gate = grad_out up act'(gate)
void glu_backward(const Glu& op, int64_t begin, int64_t end) {
  with_activation(op.activation, [&](auto activation) {
    with_element<float>(op.dtype, [&](auto* element) {
      using E = std::remove_pointer_t<decltype(element)>;
      over_row(end - begin, [&](int64_t offset, int64_t lanes) {
        const int64_t j = begin + offset;
        const ValueSlope<float> act = activate<float, activation.value>(get<E>(op.gate, j, lanes));
        const Vec<float> grad = get<E>(op.grad_out, j, lanes);
        put<E>(op.grad_gate, j, lanes, grad * get<E>(op.up, j, lanes) * act.slope);
        put<E>(op.grad_up, j, lanes, grad * act.value);
      });
    });
  });
}

// out = x cos + (-x2, x1) sin for x = (x1, x2), each product rounded, as by PyTorch's operations; transposed,
// the gradient of x for one of out.
template <class E>
void rotate(const Rotary& op, const char* cosine, const char* sine, const char* x, char* out) {
  const int64_t second = op.half * static_cast<int64_t>(sizeof(E));
  over_row(op.half, [&](int64_t j, int64_t lanes) {
    const Vec<float> c1 = get<E>(cosine, j, lanes), c2 = get<E>(cosine + second, j, lanes);
    const Vec<float> s1 = get<E>(sine, j, lanes), s2 = get<E>(sine + second, j, lanes);
    const Vec<float> x1 = get<E>(x, j, lanes), x2 = get<E>(x + second, j, lanes);
    auto product = [](Vec<float> a, Vec<float> b) { return through<E>(rounded(a * b)); };
    const Vec<float> turned1 = op.transposed ? product(x2, s2) : product(-x2, s1);
    const Vec<float> turned2 = op.transposed ? -product(x1, s1) : product(x1, s2);
    put<E>(out, j, lanes, product(x1, c1) + turned1);
    put<E>(out + second, j, lanes, product(x2, c2) + turned2);
  });
}

void rotary(const Rotary& op, int64_t begin, int64_t end) {
  with_element<float>(op.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / op.q_len, t = i % op.q_len;
      const char* cosine = op.cosine.data + b * op.cosine.stride[0] + t * op.cosine.stride[2];
      const char* sine = op.sine.data + b * op.sine.stride[0] + t * op.sine.stride[2];
      for (int which = 0; which < 2; ++which) {
        const View &x = op.x[which], &out = op.out[which];
        for (int64_t h = 0; h < op.heads[which]; ++h) {
          rotate<E>(op, cosine, sine, x.data + b * x.stride[0] + h * x.stride[1] + t * x.stride[2],
                    out.data + b * out.stride[0] + h * out.stride[1] + t * out.stride[2]);
        }
      }
    }
  });
}

}  // namespace

const FrozenKernels frozen_kernels = {scratch_bytes, rms_norm, rms_norm_backward, glu_backward, rotary};

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
