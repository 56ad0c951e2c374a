// The matrix products of bottleneck: weights packed in panels, rows of activations as they lie.
//
//   project  (rows, hidden) x (hidden, size): the hidden layer, and its gradient. Whole vectors of columns;
//   an
//            odd number of them has a panel of three, so that 24 columns are not computed as 32.
//   expand   (rows, size) x (size, hidden): the output, and the gradient of x; the caller finishes every
//   tile. gather   (rows, size)^T x (rows, 2 vectors of columns): the gradients of the weights.
//
// Every element is the sum of short chains of multiply-adds over the inner dimension, whatever tile or batch
// it is in.
#pragma once

#include "bottleneck_kernel.h"
#include "gemm.h"
#include "rows.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

template <int kVectors>
constexpr int kRowsOf = kVectors == 3 ? kTileRows * 2 / 3 : kTileRows;

// f(size) with the smallest size that holds n <= kMost rows; tiles of a few sizes keep the code small.
template <int kMost, class F>
inline void with_rows(int64_t n, F f) {
  if (n == 1) return f(std::integral_constant<int, 1>{});
  if (n == 2) return f(std::integral_constant<int, 2>{});
  if constexpr (kMost > 4) {
    if (n <= 4) return f(std::integral_constant<int, 4>{});
  }
  if constexpr (kMost > 8) {
    if (n <= 8) return f(std::integral_constant<int, 8>{});
  }
  f(std::integral_constant<int, kMost>{});
}

// ---- packing ----

// v[i][j] becomes v[j][i]: as many perfect shuffles as the number of lanes has bits.
template <class C, bool kHigh, std::size_t... I>
inline Vec<C> zip(Vec<C> a, Vec<C> b, std::index_sequence<I...>) {
  constexpr int n = kLanes<C>, first = kHigh ? n / 2 : 0;
#ifdef FASTADAPTER_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b, (first + static_cast<int>(I) / 2 + (I % 2 ? n : 0))...);
#else
  using Index = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  return __builtin_shuffle(
      a, b, typename VecOf<Index, n>::type{(first + static_cast<int>(I) / 2 + (I % 2 ? n : 0))...});
#endif
}
template <class C>
inline void transpose(Vec<C> (&v)[kLanes<C>]) {
  constexpr int n = kLanes<C>;
  constexpr auto lanes = std::make_index_sequence<n>{};
  for (int bit = 1; bit < n; bit *= 2) {
    Vec<C> shuffled[n];
    for (int i = 0; i < n / 2; ++i) {
      shuffled[2 * i] = zip<C, false>(v[i], v[i + n / 2], lanes);
      shuffled[2 * i + 1] = zip<C, true>(v[i], v[i + n / 2], lanes);
    }
    for (int i = 0; i < n; ++i) v[i] = shuffled[i];
  }
}

template <class C, class E>
inline Vec<C> load_lanes(const char* src, int64_t stride, int64_t count) {
  if (stride == sizeof(E) && count >= kLanes<C>) return load(reinterpret_cast<const E*>(src));
  return load_some<C, E>(src, stride, count);
}

// dst[p * width + j] = row j, element p of `count` rows of k elements; zeros in the columns beyond.
template <class C>
inline void pack_columns(const View& x, const char* rows, int64_t count, int64_t k, int width, C* dst) {
  constexpr int W = kLanes<C>;
  with_element<C>(x.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    for (int first = 0; first < width; first += W) {
      for (int64_t next = 0; next < k; next += W) {
        const int64_t p = k < W ? 0 : min(next, k - W);  // whole vectors: the last one overlaps
        const char* from = rows + first * x.stride[2] + p * x.stride[3];
        Vec<C> v[W];
        if (count - first >= W && x.stride[3] == sizeof(E) && k >= W) {
          // without a choice in the loop the vectors stay in registers
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) v[i] = load(reinterpret_cast<const E*>(from + i * x.stride[2]));
        } else {
          for (int i = 0; i < W; ++i) {
            v[i] =
                first + i < count ? load_lanes<C, E>(from + i * x.stride[2], x.stride[3], k - p) : Vec<C>{};
          }
        }
        transpose<C>(v);
        for (int i = 0; i < min(W, k - p); ++i) store(dst + (p + i) * width + first, v[i]);
      }
    }
  });
}

// dst[p * width + j] = row p, element j of k rows of `count` elements; zeros in the columns beyond.
template <class C>
inline void pack_rows(const View& x, const char* rows, int64_t count, int64_t k, int width, C* dst) {
  constexpr int W = kLanes<C>;
  with_element<C>(x.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    for (int64_t p = 0; p < k; ++p) {
      for (int j = 0; j < width; j += W) {
        const char* from = rows + p * x.stride[2] + j * x.stride[3];
        store(dst + p * width + j, j < count ? load_lanes<C, E>(from, x.stride[3], count - j) : Vec<C>{});
      }
    }
  });
}

// Panels of `size` columns: pairs of vectors, the last with the odd one.
template <class C>
struct SizePanels {
  int64_t vectors;

  explicit SizePanels(int64_t padded_size) : vectors(padded_size / kLanes<C>) {}
  int64_t count() const { return vectors < 2 ? 1 : vectors / 2; }
  int width(int64_t panel) const {  // in vectors
    return panel + 1 < count() ? 2 : static_cast<int>(vectors - 2 * panel);
  }
};

template <class C>
inline int64_t panels_of(const Bottleneck& op, int form) {
  const bool by_hidden = form == kDownByHidden || form == kUpByHidden;
  return by_hidden ? SizePanels<C>(op.padded_size).count() : op.padded_hidden / kPanel<C>;
}

// One panel of one form of an entry's weights into the memory that holds all of them.
template <class C>
inline void pack_panel(const Bottleneck& op, int form, int64_t entry, int64_t panel, C* packed) {
  constexpr int W = kLanes<C>;
  const bool by_hidden = form == kDownByHidden || form == kUpByHidden;
  const bool is_down = form == kDownByHidden || form == kDownBySize;
  const View& weight = is_down ? op.down : op.up;
  const char* rows = weight.data + op.entry_id[entry] * weight.stride[0];
  const int64_t k = by_hidden ? op.hidden : op.size, columns = by_hidden ? op.size : op.hidden;
  const int64_t first = panel * 2 * W;
  const int width = by_hidden ? SizePanels<C>(op.padded_size).width(panel) * W : 2 * W;
  C* dst = packed + first * k;
  if (by_hidden == is_down) {  // the columns of the product are rows of the weight
    pack_columns(weight, rows + first * weight.stride[2], min(width, columns - first), k, width, dst);
  } else {
    pack_rows(weight, rows + first * weight.stride[3], min(width, columns - first), k, width, dst);
  }
}

// ---- products ----

// Length of a chain: rounding errors of one over thousands of columns would be several times those of a BLAS.
constexpr int64_t kChain = 64;

// sum[i][v] = the products of a(i, p) and vector v of row p of a panel, over p in chains that are added in
// order.
template <class C, int kRows, int kVectors, class A>
inline void accumulate_chains(int64_t k, A a, const C* panel, Vec<C> (&sum)[kRows][kVectors]) {
  for (auto& row : sum) {
    for (Vec<C>& x : row) x = Vec<C>{};
  }
  for (int64_t begin = 0; begin < k; begin += kChain) {
    Vec<C> chain[kRows][kVectors] = {};
    accumulate<C>(
        min(kChain, k - begin), [&](int i, int64_t p) { return a(i, begin + p); },
        panel + begin * kVectors * kLanes<C>, chain);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) sum[i][v] += chain[i][v];
    }
  }
}

// The same, from weights as they lie: `count` rows of k elements are the columns of the product. What a chain
// needs is packed into `memory` (kChain * kVectors vectors) and used at once, while it is in the first cache.
template <class C, int kRows, int kVectors, class A>
inline void accumulate_unpacked(const View& weight, const char* rows, int64_t count, int64_t k, A a,
                                C* memory, Vec<C> (&sum)[kRows][kVectors]) {
  for (auto& row : sum) {
    for (Vec<C>& x : row) x = Vec<C>{};
  }
  for (int64_t begin = 0; begin < k; begin += kChain) {
    const int64_t length = min(kChain, k - begin);
    pack_columns(weight, rows + begin * weight.stride[3], count, length, kVectors * kLanes<C>, memory);
    Vec<C> chain[kRows][kVectors] = {};
    accumulate<C>(length, [&](int i, int64_t p) { return a(i, begin + p); }, memory, chain);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) sum[i][v] += chain[i][v];
    }
  }
}

template <class C, int kVectors, int kRows>
inline void project_tile(int64_t n, int64_t k, const C* const* a, const C* panel, C* out, int64_t ldo) {
  constexpr int W = kLanes<C>;
  const C* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = a[min(i, n - 1)];
  Vec<C> sum[kRows][kVectors];
  accumulate_chains<C>(k, [&](int i, int64_t p) { return rows[i][p]; }, panel, sum);
  for (int i = 0; i < kRows; ++i) {
    if (i >= n) break;
    for (int v = 0; v < kVectors; ++v) store(out + i * ldo + v * W, sum[i][v]);
  }
}

// out (n, padded_size) = rows of a (n, k) times packed columns.
template <class C>
inline void project(int64_t n, int64_t k, const C* const* a, const C* packed, C* out, int64_t padded_size) {
  constexpr int W = kLanes<C>;
  const SizePanels<C> panels(padded_size);
  const int64_t last = panels.count() - 1;
  const int last_width = panels.width(last);
  const int64_t pairs = last_width == 2 ? last + 1 : last;
  for (int64_t i = 0; i < n; i += kRowsOf<2>) {
    for (int64_t j = 0; j < pairs; ++j) {
      with_rows<kRowsOf<2>>(n - i, [&](auto size) {
        project_tile<C, 2, size>(min(size, n - i), k, a + i, packed + j * 2 * W * k,
                                 out + i * padded_size + j * 2 * W, padded_size);
      });
    }
  }
  if (pairs > last) return;
  const C* panel = packed + last * 2 * W * k;
  auto odd = [&](auto width) {
    constexpr int kMost = kRowsOf<width>;
    for (int64_t i = 0; i < n; i += kMost) {
      with_rows<kMost>(n - i, [&](auto size) {
        project_tile<C, width, size>(min(size, n - i), k, a + i, panel, out + i * padded_size + last * 2 * W,
                                     padded_size);
      });
    }
  };
  if (last_width == 3) {
    odd(std::integral_constant<int, 3>{});
  } else {
    odd(std::integral_constant<int, 1>{});
  }
}

// finish(i, rows, j, sum) for tiles of rows i.. and the panel of columns j.. of a (n, k) times packed
// columns.
// fetch(i, j) names what finish will read of row i: asked for before the products, it is there after them.
template <class C, class G, class F>
inline void expand(int64_t n, int64_t k, const C* a, int64_t lda, const C* packed, int64_t columns, G fetch,
                   F finish) {
  for (int64_t i = 0; i < n; i += kTileRows) {
    with_rows<kTileRows>(n - i, [&](auto size) {
      const int64_t rows = min(size, n - i);
      const C* from[size];
      for (int m = 0; m < size; ++m) from[m] = a + (i + min(m, rows - 1)) * lda;
      for (int64_t j = 0; j < columns; j += kPanel<C>) {
        for (int64_t m = i; m < i + rows; ++m) __builtin_prefetch(fetch(m, j));
        Vec<C> sum[size][2];
        accumulate_chains<C>(k, [&](int m, int64_t p) { return from[m][p]; }, packed + j * k, sum);
        finish(i, rows, j, sum);
      }
    });
  }
}

// Rows for which packing all weights first would take longer than the products.
constexpr int64_t kFewRows = kRowsOf<3>;

// `project` for at most kFewRows rows, with the rows of an entry's down projection as they lie.
template <class C>
inline void project_few(const Bottleneck& op, int64_t entry, int64_t n, const C* const* a, C* memory,
                        C* out) {
  constexpr int W = kLanes<C>;
  const char* rows = op.down.data + op.entry_id[entry] * op.down.stride[0];
  const SizePanels<C> panels(op.padded_size);
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const int64_t first = panel * 2 * W;
    auto columns = [&](auto width) {
      constexpr int kVectors = decltype(width)::value;
      with_rows<kFewRows>(n, [&](auto size) {
        const C* from[size];
        for (int i = 0; i < size; ++i) from[i] = a[min(i, n - 1)];
        Vec<C> sum[size][kVectors];
        accumulate_unpacked<C>(
            op.down, rows + first * op.down.stride[2], min(kVectors * W, op.size - first), op.hidden,
            [&](int i, int64_t p) { return from[i][p]; }, memory, sum);
        for (int64_t i = 0; i < n; ++i) {
          for (int v = 0; v < kVectors; ++v) store(out + i * op.padded_size + first + v * W, sum[i][v]);
        }
      });
    };
    switch (panels.width(panel)) {
      case 1:
        columns(std::integral_constant<int, 1>{});
        break;
      case 2:
        columns(std::integral_constant<int, 2>{});
        break;
      default:
        columns(std::integral_constant<int, 3>{});
    }
  }
}

// `expand` for at most kFewRows rows, with the rows of an entry's up projection as they lie.
template <class C, class G, class F>
inline void expand_few(const Bottleneck& op, int64_t entry, int64_t n, const C* a, C* memory, G fetch,
                       F finish) {
  const char* rows = op.up.data + op.entry_id[entry] * op.up.stride[0];
  with_rows<kFewRows>(n, [&](auto size) {
    const C* from[size];
    for (int m = 0; m < size; ++m) from[m] = a + min(m, n - 1) * op.padded_size;
    for (int64_t j = 0; j < op.hidden; j += kPanel<C>) {
      for (int64_t m = 0; m < n; ++m) __builtin_prefetch(fetch(m, j));
      Vec<C> sum[size][2];
      accumulate_unpacked<C>(
          op.up, rows + j * op.up.stride[2], min(kPanel<C>, op.hidden - j), op.size,
          [&](int m, int64_t p) { return from[m][p]; }, memory, sum);
      finish(0, n, j, sum);
    }
  });
}

// out (padded_size, 2 vectors) += transposed rows of s (n, padded_size) times a panel (n, 2 vectors). The sum
// over the n rows is formed first: the error grows with the number of runs, not of rows.
template <class C>
inline void gather(int64_t n, const C* s, int64_t padded_size, int64_t size, const C* panel, C* out) {
  constexpr int W = kLanes<C>;
  for (int64_t i = 0; i < size; i += kTileRows) {
    with_rows<kTileRows>(size - i, [&](auto rows) {
      Vec<C> sum[rows][2];
      for (auto& row : sum) row[0] = row[1] = Vec<C>{};
      const C* from = s + i;
      accumulate<C>(n, [=](int m, int64_t p) { return from[p * padded_size + m]; }, panel, sum);
      for (int m = 0; m < rows; ++m) {
        for (int v = 0; v < 2; ++v) {
          C* o = out + (i + m) * 2 * W + v * W;
          store(o, load(o) + sum[m][v]);
        }
      }
    });
  }
}

}  // namespace
}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
