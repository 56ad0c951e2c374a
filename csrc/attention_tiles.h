// What the forward and the backward attention kernels share: operands as the products need them, which keys a
// query sees, and the row functions of the softmax.
#pragma once

#include <limits>

#include "attention_kernel.h"
#include "gemm.h"
#include "rows.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

constexpr int64_t kQueryBlock =
    48;  // rows of a tile of scores: whole tiles of the product on AVX2 and AVX-512
constexpr int64_t kKeyBlock = 256;               // columns, whole panels everywhere
constexpr int64_t kTileStride = kKeyBlock + 16;  // a power of two would map a column to few cache sets

constexpr int64_t kScoreChain = 64;
constexpr int64_t kChain = 128;  // terms of a sum before it is added to the total

inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Carves arrays out of scratch memory; from null it only counts.
class Arena {
 public:
  explicit Arena(char* memory) : start_(memory) {}
  template <class T>
  void take(T*& array, int64_t count) {
    array = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

inline char* at(const View& x, int64_t batch, int64_t head, int64_t row) {
  return x.data + batch * x.stride[0] + head * x.stride[1] + row * x.stride[2];
}

// ---- operands ----

template <class C>
struct Matrix {
  const C* rows;
  int64_t stride;  // elements
};

// `count` rows from `first` on, where they lie if that can be.
template <class C>
inline Matrix<C> read_rows(const View& x, const char* first, int64_t count, int64_t head_dim, C* buffer,
                           int64_t buffer_stride) {
  constexpr int64_t kItem = sizeof(C);
  if (x.dtype == kDType<C> && x.stride[3] == kItem && x.stride[2] % kItem == 0) {
    return {reinterpret_cast<const C*>(first), x.stride[2] / kItem};
  }
  for (int64_t i = 0; i < count; ++i)
    load_row(x, first + i * x.stride[2], head_dim, buffer + i * buffer_stride);
  return {buffer, buffer_stride};
}

// Panels for products over head_dim: packed[i / N, j, i % N] = x[i, j]. `rows`: N x padded_dim.
template <class C>
inline void pack_columns(const View& x, const char* first, int64_t count, int64_t head_dim,
                         int64_t padded_dim, C* rows, C* packed) {
  constexpr int64_t N = kPanel<C>;
  for (int64_t i = 0; i < count; i += N, packed += N * head_dim) {
    const int64_t width = min(N, count - i);
    for (int64_t r = 0; r < width; ++r)
      load_row(x, first + (i + r) * x.stride[2], head_dim, rows + r * padded_dim);
    if (width < N) std::memset(rows + width * padded_dim, 0, (N - width) * padded_dim * sizeof(C));
    for (int64_t j = 0; j < head_dim; ++j) {
      for (int64_t r = 0; r < N; ++r) packed[j * N + r] = rows[r * padded_dim + j];
    }
  }
}

// Panels for products over rows: packed[j / N, i, j % N] = x[i, j]. `row`: padded_dim, zeros from head_dim
// on.
template <class C>
inline void pack_rows(const View& x, const char* first, int64_t count, int64_t head_dim, int64_t padded_dim,
                      C* row, C* packed) {
  constexpr int64_t N = kPanel<C>;
  for (int64_t i = 0; i < count; ++i) {
    load_row(x, first + i * x.stride[2], head_dim, row);
    for (int64_t j = 0; j < padded_dim; j += N)
      std::memcpy(packed + j * count + i * N, row + j, N * sizeof(C));
  }
}

// C += A B with chains of at most kChain; `packed` as in gemm.
template <class C>
inline void add_product(int64_t m, int64_t n, int64_t k, const C* a, int64_t row_stride, int64_t k_stride,
                        const C* packed, C* c, int64_t ldc, int64_t packed_k) {
  for (int64_t p = 0; p < k; p += kChain) {
    gemm<C, kAddChain>(m, n, min(kChain, k - p), a + p * k_stride, row_stride, k_stride,
                       packed + p * kPanel<C>, c, ldc, packed_k);
  }
}

// S = A B over head_dim, with chains of at most kScoreChain.
template <class C>
inline void score_product(int64_t m, int64_t n, int64_t k, Matrix<C> a, const C* packed, C* s, int64_t lds) {
  gemm<C>(m, n, min(kScoreChain, k), a.rows, a.stride, 1, packed, s, lds, k);
  for (int64_t p = kScoreChain; p < k; p += kScoreChain) {
    gemm<C, kAddChain>(m, n, min(kScoreChain, k - p), a.rows + p, a.stride, 1, packed + p * kPanel<C>, s, lds,
                       k);
  }
}

// ---- visible keys ----

struct Range {
  int64_t begin, end;
};

// Keys that any of the query rows [begin, end) of a sequence sees, besides what a mask hides.
inline Range visible_keys(const Attention& op, const Sequence& sequence, int64_t begin, int64_t end) {
  Range keys{0, sequence.kv_len};
  if (op.is_causal) keys.end = min(keys.end, end);
  if (op.window) keys.begin = min(keys.end, max(0, begin - op.window + 1));
  return keys;
}

// The mask of a row as something to add to its scores, for `count` keys.
template <class C>
inline void read_mask(const Attention& op, const char* mask, int64_t count, C* dst) {
  const int64_t stride = op.mask.stride[3];
  if (op.mask_is_bool) {
    for (int64_t j = 0; j < count; ++j)
      dst[j] = mask[j * stride] ? C(0) : -std::numeric_limits<C>::infinity();
  } else if (op.mask.dtype == DType::kDouble || sizeof(C) == 4) {
    View row = op.mask;
    load_row(row, mask, count, dst);
  } else {  // fp32 beside fp64
    for (int64_t j = 0; j < count; ++j) {
      float value;
      std::memcpy(&value, mask + j * stride, sizeof(value));
      dst[j] = value;
    }
  }
}

// ---- rows of scores ----

template <class C>
inline Vec<C> splat(C x) {
  return Vec<C>{} + x;
}

// The scores of one row and block, before the softmax.
template <class C>
struct Scores {
  C scale, softcap;  // softcap 0: none
  bool plain;        // nothing but a positive scale: it can be applied within the exponential

  Scores(const Attention& op, bool of_prefix) : scale(static_cast<C>(op.scale)) {
    // Beside a gated term of its own the soft cap is the base's alone; masks never hide the prefix.
    softcap = of_prefix && op.mode == Mode::kGated ? C(0) : static_cast<C>(op.softcap);
    plain = softcap == 0 && (of_prefix || !op.has_mask) && scale > 0;
  }
};

template <class C>
inline C largest(Vec<C> v) {
  C top = v[0];
  for (int i = 1; i < kLanes<C>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
template <class C>
inline C sum_lanes(Vec<C> v) {
  C part[kLanes<C>];
  store(part, v);
  for (int width = kLanes<C> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// Fills s[0, keys.begin) and s[keys.end, width) of the vectors that `keys` touches; returns these vectors.
template <class C>
inline Range fill_edges(C* s, Range keys, C value) {
  constexpr int64_t W = kLanes<C>;
  const Range whole{keys.begin / W * W, round_up(keys.end, W)};
  for (int64_t j = whole.begin; j < keys.begin; ++j) s[j] = value;
  for (int64_t j = keys.end; j < whole.end; ++j) s[j] = value;
  return whole;
}
// Zeros the columns of [0, width) that lie outside of these vectors.
template <class C>
inline void clear_outside(C* s, Range whole, int64_t width) {
  std::memset(s, 0, min(whole.begin, width) * sizeof(C));
  if (whole.end < width) std::memset(s + whole.end, 0, (width - whole.end) * sizeof(C));
}

// One step of the online softmax: turns the scores of the keys `keys` into numerators exp(score - top) and
// those of all other columns of [0, width) into zeros. `top` and `sum` are the state of the row; returns what
// earlier numerators shrink by. `width`: whole vectors. `mask` may be null.
template <class C>
inline C softmax_step(const Scores<C>& score, C* s, int64_t width, Range keys, const C* mask, C& top,
                      C& sum) {
  constexpr int64_t W = kLanes<C>;
  constexpr C kNever = -std::numeric_limits<C>::infinity();
  if (keys.begin >= keys.end) {
    std::memset(s, 0, width * sizeof(C));
    return 1;
  }
  C scale = score.scale;
  if (!score.plain) {
    for (int64_t j = keys.begin / W * W; j < keys.end; j += W) {
      Vec<C> x = rounded(load(s + j) * scale);
      if (score.softcap != 0) x = score.softcap * tanh(x / score.softcap);
      if (mask) x += load(mask + j);
      store(s + j, x);
    }
    scale = 1;
  }
  const Range whole = fill_edges(s, keys, kNever);
  Vec<C> tops = splat(kNever);
  for (int64_t j = whole.begin; j < whole.end; j += W) {
    const Vec<C> x = load(s + j);
    tops = x > tops ? x : tops;
  }
  const C block_top = largest<C>(tops) * scale;
  const C before = top;
  top = block_top > top ? block_top : top;
  const C shift = top == kNever ? C(0) : top;  // nothing visible yet: no -inf - -inf
  Vec<C> sums = {};
  for (int64_t j = whole.begin; j < whole.end; j += W) {
    const Vec<C> e = exp(rounded(load(s + j) * scale) - shift);
    store(s + j, e);
    sums += e;
  }
  clear_outside(s, whole, width);
  const C shrink = before == top ? C(1) : std::exp(before - shift);
  sum = sum * shrink + sum_lanes<C>(sums);
  return shrink;
}

}  // namespace
}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
