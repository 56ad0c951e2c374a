// Rows of tensors, any dtype and stride of the last dimension, to and from padded rows in the compute type.
#pragma once

#include "vec.h"
#include "view.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

template <class C>
constexpr DType kDType = sizeof(C) == 8 ? DType::kDouble : DType::kFloat;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls f with a null pointer of the element type; double is computed in double, the rest in float.
template <class C, class F>
inline void with_element(DType dtype, F f) {
  if constexpr (sizeof(C) == 8) {
    f(static_cast<double*>(nullptr));
  } else if (dtype == DType::kFloat) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else {
    f(static_cast<Half*>(nullptr));
  }
}

// The slow way, for strides and for ends of rows: lanes beyond `count` are zero, and not stored.
template <class C, class E>
inline Vec<C> load_some(const char* src, int64_t stride, int64_t count) {
  E part[kLanes<C>] = {};
  for (int64_t i = 0; i < min(kLanes<C>, count); ++i) std::memcpy(part + i, src + i * stride, sizeof(E));
  return load(part);
}
template <class C, class E>
inline void store_some(char* dst, int64_t stride, int64_t count, Vec<C> v) {
  E part[kLanes<C>];
  store(part, v);
  for (int64_t i = 0; i < min(kLanes<C>, count); ++i) std::memcpy(dst + i * stride, part + i, sizeof(E));
}

// dst = the n elements of a row, padded with zeros.
template <class C>
inline void load_row(const View& x, const char* row, int64_t n, C* dst) {
  constexpr int W = kLanes<C>;
  const int64_t stride = x.stride[3];
  with_element<C>(x.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    int64_t j = 0;
    if (stride == sizeof(E)) {
      for (; j + W <= n; j += W) store(dst + j, load(reinterpret_cast<const E*>(row) + j));
    }
    for (; j < n; j += W) store(dst + j, load_some<C, E>(row + j * stride, stride, n - j));
  });
}
template <class C>
inline void store_row(const View& x, char* row, int64_t n, const C* src) {
  constexpr int W = kLanes<C>;
  const int64_t stride = x.stride[3];
  with_element<C>(x.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    int64_t j = 0;
    if (stride == sizeof(E)) {
      for (; j + W <= n; j += W) store(reinterpret_cast<E*>(row) + j, load(src + j));
    }
    for (; j < n; j += W) store_some<C, E>(row + j * stride, stride, n - j, load(src + j));
  });
}
// out = base + term, rounded once.
template <class C>
inline void add_row(const View& base, const char* base_row, const View& out, char* out_row, int64_t n,
                    const C* term) {
  constexpr int W = kLanes<C>;
  const int64_t from = base.stride[3], to = out.stride[3];
  with_element<C>(out.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    int64_t j = 0;
    if (from == sizeof(E) && to == sizeof(E)) {
      for (; j + W <= n; j += W) {
        store(reinterpret_cast<E*>(out_row) + j,
              load(reinterpret_cast<const E*>(base_row) + j) + load(term + j));
      }
    }
    for (; j < n; j += W) {
      const Vec<C> b = load_some<C, E>(base_row + j * from, from, n - j);
      store_some<C, E>(out_row + j * to, to, n - j, b + load(term + j));
    }
  });
}
// out = base, bit for bit.
inline void copy_row(const View& base, const char* base_row, const View& out, char* out_row, int64_t n) {
  const int64_t item = out.dtype == DType::kDouble ? 8 : out.dtype == DType::kFloat ? 4 : 2;
  if (base.stride[3] == item && out.stride[3] == item) {
    std::memcpy(out_row, base_row, n * item);
  } else {
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(out_row + i * out.stride[3], base_row + i * base.stride[3], item);
  }
}

}  // namespace
}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
