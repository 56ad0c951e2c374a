// Small matrix products for one thread: C (+)= A B with B packed in panels, on the vectors of vec.h.
//
// A is read as it lies, with any strides (so A^T costs nothing): each element is broadcast once per panel. B
// is packed once, in panels of kPanel columns, and stays in cache while the rows of A pass by. Every element
// of C is one chain of multiply-adds over k in order, whatever the tile it falls into: its bits depend
// neither on m nor on n.
#pragma once

#include "vec.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

template <class C>
constexpr int kPanel = 2 * kLanes<C>;  // columns of a panel of B

// Registers: kTileRows x 2 sums, 2 of B, 1 of A.
#if FASTADAPTER_VECTOR_BYTES == 64
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

// Into what is already in C: the chain of every element goes on there, or one of its own is added at its end.
// The rounding errors of many short chains grow less than those of a long one.
constexpr int kContinue = 1, kAddChain = 2;

template <class C>
inline int64_t packed_size(int64_t k, int64_t n) {  // elements
  return (n + kPanel<C> - 1) / kPanel<C> * kPanel<C> * k;
}

// packed[(j / kPanel), p, j % kPanel] = b[p * row_stride + j * column_stride], zeros beyond n. Strides in
// elements.
template <class C>
inline void pack(const C* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n, C* packed) {
  constexpr int N = kPanel<C>, W = kLanes<C>;
  for (int64_t first = 0; first < n; first += N, packed += N * k) {
    const int64_t width = n - first < N ? n - first : N;
    const C* from = b + first * column_stride;
    if (width == N && column_stride == 1) {
      for (int64_t p = 0; p < k; ++p) {
        for (int v = 0; v < 2; ++v) store(packed + p * N + v * W, load(from + p * row_stride + v * W));
      }
    } else {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t j = 0; j < width; ++j) packed[p * N + j] = from[p * row_stride + j * column_stride];
        for (int64_t j = width; j < N; ++j) packed[p * N + j] = 0;
      }
    }
  }
}

// sum[i][v] += the products of a(i, p) and vector v of row p of a panel, over p in order.
template <class C, int kRows, int kVectors, class A>
inline void accumulate(int64_t k, A a, const C* panel, Vec<C> (&sum)[kRows][kVectors]) {
  for (int64_t p = 0; p < k; ++p, panel += kVectors * kLanes<C>) {
    Vec<C> b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load(panel + v * kLanes<C>);
    for (int i = 0; i < kRows; ++i) {
      const C value = a(i, p);
      for (int v = 0; v < kVectors; ++v) sum[i][v] += value * b[v];
    }
  }
}

// kRows rows of C against one panel; `width` columns of it are stored.
template <class C, int kRows, int kAdd>
inline void gemm_tile(int64_t k, const C* a, int64_t row_stride, int64_t k_stride, const C* panel, C* c,
                      int64_t ldc, int64_t width) {
  constexpr int W = kLanes<C>;
  Vec<C> sum[kRows][2];
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = Vec<C>{};
  if (kAdd == kContinue) {  // the chain of every element goes on where an earlier call left it
    if (width == kPanel<C>) {
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < 2; ++v) sum[i][v] = load(c + i * ldc + v * W);
      }
    } else {
      for (int i = 0; i < kRows; ++i) {
        C row[kPanel<C>] = {};
        for (int64_t j = 0; j < width; ++j) row[j] = c[i * ldc + j];
        for (int v = 0; v < 2; ++v) sum[i][v] = load(row + v * W);
      }
    }
  }
  accumulate<C>(k, [=](int i, int64_t p) { return a[i * row_stride + p * k_stride]; }, panel, sum);
  if (width == kPanel<C>) {
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < 2; ++v) {
        C* to = c + i * ldc + v * W;
        store(to, kAdd == kAddChain ? load(to) + sum[i][v] : sum[i][v]);
      }
    }
  } else {
    for (int i = 0; i < kRows; ++i) {
      C row[kPanel<C>];
      for (int v = 0; v < 2; ++v) store(row + v * W, sum[i][v]);
      for (int64_t j = 0; j < width; ++j) {
        C* to = c + i * ldc + j;
        *to = kAdd == kAddChain ? *to + row[j] : row[j];
      }
    }
  }
}

template <class C, int kAdd, int kRows>
inline void gemm_rest(int64_t rows, int64_t k, const C* a, int64_t row_stride, int64_t k_stride,
                      const C* panel, C* c, int64_t ldc, int64_t width) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      gemm_tile<C, kRows, kAdd>(k, a, row_stride, k_stride, panel, c, ldc, width);
    } else {
      gemm_rest<C, kAdd, kRows - 1>(rows, k, a, row_stride, k_stride, panel, c, ldc, width);
    }
  }
}

// C (m, n) = A (m, k) B, or += with kContinue or kAddChain. Strides and ldc in elements; `packed` from pack()
// with the same n, and `packed_k` rows (the same k unless given), from its row p on where it is moved by p *
// kPanel.
template <class C, int kAdd = 0>
inline void gemm(int64_t m, int64_t n, int64_t k, const C* a, int64_t row_stride, int64_t k_stride,
                 const C* packed, C* c, int64_t ldc, int64_t packed_k = 0) {
  const int64_t step = kPanel<C> * (packed_k ? packed_k : k);
  for (int64_t j = 0; j < n; j += kPanel<C>, packed += step) {
    const int64_t width = n - j < kPanel<C> ? n - j : kPanel<C>;
    int64_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows) {
      gemm_tile<C, kTileRows, kAdd>(k, a + i * row_stride, row_stride, k_stride, packed, c + i * ldc + j, ldc,
                                    width);
    }
    gemm_rest<C, kAdd, kTileRows - 1>(m - i, k, a + i * row_stride, row_stride, k_stride, packed,
                                      c + i * ldc + j, ldc, width);
  }
}

}  // namespace
}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
