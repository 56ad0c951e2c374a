// gated_prefix on CPUs: out = base + f(gate) * softmax(scale * Q Kp^T) Vp, see docs/maths.md.
//
// Rows of Q are handled a vector's width at a time. Products over head_dim keep head_dim in the lanes and sum
// across lanes once per (row, slot), so K and V are used as they lie in memory; the softmax keeps rows in the
// lanes, so it needs neither padding nor sums across lanes. Every row is computed by the same chain of
// operations wherever it stands in a block: its bits do not depend on its neighbours or on the thread count.
#include "vec.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

constexpr int64_t kBlock = 32;  // rows whose contributions to dK and dV are summed before they are added

template <class C>
constexpr DType kDType = sizeof(C) == 8 ? DType::kDouble : DType::kFloat;
template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline char* row_of(const View& x, int64_t b, int64_t h, int64_t t) {
  return x.data + b * x.stride[0] + h * x.stride[1] + t * x.stride[2];
}

inline int64_t item_size(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// ---- rows in memory <-> padded rows in the compute type ----

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

template <class E>
inline void gather(const char* src, int64_t stride, int64_t n, E* dst) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i, src + i * stride, sizeof(E));
}
template <class E>
inline void scatter(const E* src, int64_t n, char* dst, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i * stride, src + i, sizeof(E));
}

// dst[0, padded) = the row, zeros after its n elements.
template <class C>
inline void load_row(const char* src, int64_t stride, DType dtype, int64_t n, C* dst) {
  constexpr int W = kLanes<C>;
  with_element<C>(dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const bool dense = stride == static_cast<int64_t>(sizeof(E));
    for (int64_t j = 0; j < n; j += W) {
      if (dense && j + W <= n) {
        store(dst + j, load(reinterpret_cast<const E*>(src) + j));
      } else {
        E part[W] = {};
        gather(src + j * stride, stride, min(W, n - j), part);
        store(dst + j, load(part));
      }
    }
  });
}

// The row = value(j, what is at src or zero) for lanes [j, j + W).
template <class C, class F>
inline void store_row(char* dst, int64_t stride, DType dtype, int64_t n, F value) {
  constexpr int W = kLanes<C>;
  with_element<C>(dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const bool dense = stride == static_cast<int64_t>(sizeof(E));
    for (int64_t j = 0; j < n; j += W) {
      if (dense && j + W <= n) {
        store(reinterpret_cast<E*>(dst) + j, value(j));
      } else {
        E part[W];
        store(part, value(j));
        scatter(part, min(W, n - j), dst + j * stride, stride);
      }
    }
  });
}

inline void copy_row(const char* src, int64_t src_stride, char* dst, int64_t dst_stride, int64_t item,
                     int64_t n) {
  if (src_stride == item && dst_stride == item) {
    std::memcpy(dst, src, n * item);
  } else {
    for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, item);
  }
}

// Whether rows of x can be read where they are.
template <class C>
inline bool readable(const View& x, int64_t head_dim) {
  return x.dtype == kDType<C> && x.stride[3] == static_cast<int64_t>(sizeof(C)) && head_dim % kLanes<C> == 0;
}

// ---- the three products ----

// out[p * ldo + r] = <rows[r], panel[p]> for kRows rows; lanes from kRows on are zero.
template <class C, int kRows>
inline void dots(const C* const* rows, const C* const* panel, int64_t slots, int64_t cols, C* out,
                 int64_t ldo) {
  constexpr int W = kLanes<C>;
  for (int64_t p = 0; p < slots; ++p) {
    Vec<C> acc[W] = {};
    const C* k = panel[p];
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<C> kj = load(k + j);
      for (int r = 0; r < kRows; ++r) acc[r] += kj * load(rows[r] + j);
    }
    store(out + p * ldo, sum_each<C>(acc));
  }
}

template <class C>
inline void dots(int64_t n, const C* const* rows, const C* const* panel, int64_t slots, int64_t cols, C* out,
                 int64_t ldo) {
  constexpr int W = kLanes<C>;
  if (n == 1) {
    dots<C, 1>(rows, panel, slots, cols, out, ldo);
  } else if (n <= 4 && W > 4) {
    dots<C, (W > 4 ? 4 : W)>(rows, panel, slots, cols, out, ldo);
  } else {
    dots<C, W>(rows, panel, slots, cols, out, ldo);
  }
}

template <class C, int kI, int kJ>
inline void product_tile(int64_t terms, const C* a, int64_t ai, int64_t ak, const C* const* b, int64_t j,
                         C* out, int64_t ldo, bool add) {
  constexpr int W = kLanes<C>;
  Vec<C> acc[kI][kJ] = {};
  for (int64_t k = 0; k < terms; ++k) {
    Vec<C> bk[kJ];
    for (int v = 0; v < kJ; ++v) bk[v] = load(b[k] + j + v * W);
    for (int i = 0; i < kI; ++i) {
      const C x = a[i * ai + k * ak];
      for (int v = 0; v < kJ; ++v) acc[i][v] += x * bk[v];
    }
  }
  for (int i = 0; i < kI; ++i) {
    for (int v = 0; v < kJ; ++v) {
      C* o = out + i * ldo + j + v * W;
      store(o, add ? load(o) + acc[i][v] : acc[i][v]);
    }
  }
}

// out[i] = (add ? out[i] : 0) + sum over k of a[i * ai + k * ak] * b[k].
template <class C>
inline void product(int64_t count, int64_t terms, const C* a, int64_t ai, int64_t ak, const C* const* b,
                    int64_t cols, C* out, int64_t ldo, bool add) {
  constexpr int W = kLanes<C>;
  auto columns = [&](int64_t j, auto two) {
    constexpr int kJ = decltype(two)::value ? 2 : 1;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      product_tile<C, 4, kJ>(terms, a + i * ai, ai, ak, b, j, out + i * ldo, ldo, add);
    for (; i + 2 <= count; i += 2)
      product_tile<C, 2, kJ>(terms, a + i * ai, ai, ak, b, j, out + i * ldo, ldo, add);
    for (; i < count; ++i) product_tile<C, 1, kJ>(terms, a + i * ai, ai, ak, b, j, out + i * ldo, ldo, add);
  };
  int64_t j = 0;
  for (; j + 2 * W <= cols; j += 2 * W) columns(j, std::true_type{});
  if (j < cols) columns(j, std::false_type{});
}

// p[slot * ldp + row] from scores to numerators; returns the sums. Rows are the lanes.
template <class C>
inline Vec<C> softmax_numerators(C* p, int64_t ldp, int64_t slots, C scale) {
  Vec<C> top = load(p) * scale;
  store(p, top);
  for (int64_t i = 1; i < slots; ++i) {
    const Vec<C> s = load(p + i * ldp) * scale;
    store(p + i * ldp, s);
    top = s > top ? s : top;
  }
  Vec<C> sum = {};
  for (int64_t i = 0; i < slots; ++i) {
    const Vec<C> e = exp(load(p + i * ldp) - top);
    store(p + i * ldp, e);
    sum += e;
  }
  return sum;
}

// ---- work items ----

// Scratch of one work item; the layout serves every function below.
template <class C>
struct Scratch {
  C *query, *grad_out, *row, *zeros, *p, *dp;
  const C **key, **value, **query_rows, **grad_rows, **grad_sum;
  double* sum;

  static int64_t bytes(const GatedPrefix& op) {
    const int64_t elements = (2 * kBlock + kLanes<C> + 1) * op.padded_dim + 2 * kBlock * op.prefix_len;
    return elements * sizeof(C) + (2 * op.prefix_len + 3 * kBlock) * sizeof(C*) +
           op.padded_dim * sizeof(double);
  }
  Scratch(const GatedPrefix& op, char* memory) {
    C* c = reinterpret_cast<C*>(memory);
    query = c, c += kBlock * op.padded_dim;
    grad_out = c, c += kBlock * op.padded_dim;
    row = c, c += kLanes<C> * op.padded_dim;
    zeros = c, c += op.padded_dim;
    p = c, c += kBlock * op.prefix_len;
    dp = c, c += kBlock * op.prefix_len;
    // The counts above are multiples of 8 bytes: padded_dim is whole vectors, kBlock is even.
    const C** pointers = reinterpret_cast<const C**>(c);
    key = pointers, pointers += op.prefix_len;
    value = pointers, pointers += op.prefix_len;
    query_rows = pointers, pointers += kBlock;
    grad_rows = pointers, pointers += kBlock;
    grad_sum = pointers, pointers += kBlock;
    sum = reinterpret_cast<double*>(pointers);
    std::memset(zeros, 0, op.padded_dim * sizeof(C));
  }
};

template <class C>
void panel_rows(const GatedPrefix& op, bool key, int64_t entry, int64_t kv_head, const C** rows) {
  const int64_t* stride = key ? op.key_stride : op.value_stride;
  const char* base = key ? op.key_rows : op.value_rows;
  base += ((key ? op.key_packed : op.value_packed) ? entry : op.entry_id[entry]) * stride[0] +
          kv_head * stride[1];
  for (int64_t p = 0; p < op.prefix_len; ++p) rows[p] = reinterpret_cast<const C*>(base + p * stride[2]);
}

template <class C>
int64_t scratch_bytes(const GatedPrefix& op) {
  return Scratch<C>::bytes(op);
}

// Item: (entry, kv head). The bank rows in the compute type, padded with zeros.
template <class C>
void pack(const GatedPrefix& op, const View& bank, char* dst, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t p = 0; p < op.prefix_len; ++p) {
      load_row(row_of(bank, op.entry_id[i / op.kv_heads], i % op.kv_heads, p), bank.stride[3], bank.dtype,
               op.head_dim, reinterpret_cast<C*>(dst) + (i * op.prefix_len + p) * op.padded_dim);
    }
  }
}

// Item: (batch row, kv head, chunk of the group's rows).
template <class C>
void forward(const GatedPrefix& op, int64_t begin, int64_t end, char* memory) {
  constexpr int W = kLanes<C>;
  Scratch<C> s(op, memory);
  const int64_t rows = op.group * op.q_len, chunks = (rows + op.chunk - 1) / op.chunk;
  const bool direct = readable<C>(op.query, op.head_dim);
  const int64_t item = item_size(op.out.dtype);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / (op.kv_heads * chunks), kv_head = i / chunks % op.kv_heads;
    const int64_t first = i % chunks * op.chunk, last = min(first + op.chunk, rows);
    const int64_t entry = op.entry_of[b];
    const C* factor = nullptr;
    if (entry >= 0) {
      factor = static_cast<const C*>(op.factor) + entry * op.heads;
      panel_rows(op, true, entry, kv_head, s.key);
      panel_rows(op, false, entry, kv_head, s.value);
    }
    int64_t h = kv_head * op.group + first / op.q_len, t = first % op.q_len;
    for (int64_t r = first; r < last; r += W) {
      const int64_t n = min(W, last - r);
      const char* base[W];
      char* out[W];
      Vec<C> f = {};
      bool active = false;
      for (int k = 0; k < n; ++k) {
        base[k] = row_of(op.base, b, h, t);
        out[k] = row_of(op.out, b, h, t);
        const char* q = row_of(op.query, b, h, t);
        if (factor && factor[h] != 0) {
          f[k] = factor[h];
          active = true;
          C* buffer = s.query + k * op.padded_dim;
          if (!direct) load_row(q, op.query.stride[3], op.query.dtype, op.head_dim, buffer);
          s.query_rows[k] = direct ? reinterpret_cast<const C*>(q) : buffer;
        } else {
          s.query_rows[k] = s.zeros;
        }
        if (++t == op.q_len) t = 0, ++h;
      }
      for (int64_t k = n; k < W; ++k) s.query_rows[k] = s.zeros;
      if (active) {
        dots(n, s.query_rows, s.key, op.prefix_len, op.padded_dim, s.p, W);
        const Vec<C> weight = f / softmax_numerators(s.p, W, op.prefix_len, static_cast<C>(op.scale));
        for (int64_t p = 0; p < op.prefix_len; ++p) store(s.p + p * W, load(s.p + p * W) * weight);
        product<C>(n, op.prefix_len, s.p, 1, W, s.value, op.padded_dim, s.row, op.padded_dim, false);
      }
      for (int k = 0; k < n; ++k) {
        if (f[k] == 0) {
          copy_row(base[k], op.base.stride[3], out[k], op.out.stride[3], item, op.head_dim);
          continue;
        }
        const C* term = s.row + k * op.padded_dim;
        C* sum = s.query + k * op.padded_dim;
        load_row(base[k], op.base.stride[3], op.base.dtype, op.head_dim, sum);
        store_row<C>(out[k], op.out.stride[3], op.out.dtype, op.head_dim,
                     [&](int64_t j) { return load(sum + j) + load(term + j); });
      }
    }
  }
}

// Item: op.items[i], see Item. Writes grad_query, and one partial of the bank's and the gate's gradients.
template <class C>
void backward(const GatedPrefix& op, int64_t begin, int64_t end, char* memory) {
  constexpr int W = kLanes<C>;
  Scratch<C> s(op, memory);
  const int64_t rows = op.group * op.q_len, dim = op.padded_dim, slots = op.prefix_len;
  const bool direct_q = readable<C>(op.query, op.head_dim), direct_g = readable<C>(op.grad_out, op.head_dim);
  for (int64_t i = begin; i < end; ++i) {
    const Item item = op.items[i];
    const C* factor = static_cast<const C*>(op.factor) + item.entry * op.heads + item.kv_head * op.group;
    panel_rows(op, true, item.entry, item.kv_head, s.key);
    panel_rows(op, false, item.entry, item.kv_head, s.value);
    double* delta_sum = op.partial_gate + i * op.group;
    C* dk = static_cast<C*>(op.partial) + i * 2 * slots * dim;
    C* dv = dk + slots * dim;
    std::memset(delta_sum, 0, op.group * sizeof(double));
    if (op.need_prefix) std::memset(dk, 0, 2 * slots * dim * sizeof(C));
    int64_t n = 0;
    for (int64_t r = item.begin; r < item.end; r += n) {
      const int64_t b = op.members[op.members_begin[item.entry] + r / rows], first = r % rows;
      n = min(kBlock, min(item.end - r, rows - first));
      alignas(64) C f[kBlock] = {};
      int64_t group[kBlock];
      char* dq[kBlock];
      bool active = false;
      int64_t g = first / op.q_len, t = first % op.q_len;
      for (int64_t k = 0; k < n; ++k) {
        const int64_t h = item.kv_head * op.group + g;
        const char* q = row_of(op.query, b, h, t);
        const char* go = row_of(op.grad_out, b, h, t);
        C *qb = s.query + k * dim, *gb = s.grad_out + k * dim;
        if (!direct_q) load_row(q, op.query.stride[3], op.query.dtype, op.head_dim, qb);
        if (!direct_g) load_row(go, op.grad_out.stride[3], op.grad_out.dtype, op.head_dim, gb);
        s.query_rows[k] = direct_q ? reinterpret_cast<const C*>(q) : qb;
        s.grad_rows[k] = direct_g ? reinterpret_cast<const C*>(go) : gb;
        dq[k] = op.need_query ? row_of(op.out, b, h, t) : nullptr;
        group[k] = g;
        f[k] = factor[g];
        active |= f[k] != 0;
        if (++t == op.q_len) t = 0, ++g;
      }
      for (int64_t k = n; k < (n + W - 1) / W * W; ++k) s.query_rows[k] = s.grad_rows[k] = s.zeros;

      // p and dp = dO V^T, then w = f * p (over p) and ds = scale * w * (dp - delta) (over dp), for W rows at
      // once.
      for (int64_t k = 0; k < n; k += W) {
        C *p = s.p + k, *dp = s.dp + k;
        dots(n - k, s.query_rows + k, s.key, slots, dim, p, kBlock);
        dots(n - k, s.grad_rows + k, s.value, slots, dim, dp, kBlock);
        const Vec<C> inverse = C(1) / softmax_numerators(p, kBlock, slots, static_cast<C>(op.scale));
        Vec<C> delta = {};
        for (int64_t j = 0; j < slots; ++j) delta += load(p + j * kBlock) * load(dp + j * kBlock);
        delta *= inverse;
        for (int64_t m = 0; m < min(W, n - k); ++m) delta_sum[group[k + m]] += delta[m];
        const Vec<C> fk = load(f + k), weight = fk * inverse;
        for (int64_t j = 0; j < slots; ++j) {
          const Vec<C> w = load(p + j * kBlock) * weight;
          const Vec<C> ds = static_cast<C>(op.scale) * w * (load(dp + j * kBlock) - delta);
          // A zero factor must win over Inf and NaN: such rows contribute exact zeros.
          store(p + j * kBlock, fk == 0 ? Vec<C>{} : w);
          store(dp + j * kBlock, fk == 0 ? Vec<C>{} : ds);
        }
        if (!op.need_query) continue;
        const int64_t count = min(W, n - k);
        if (active) product<C>(count, slots, dp, 1, kBlock, s.key, dim, s.row, dim, false);
        for (int64_t m = 0; m < count; ++m) {
          const C* row = f[k + m] != 0 ? s.row + m * dim : s.zeros;
          store_row<C>(dq[k + m], op.out.stride[3], op.out.dtype, op.head_dim,
                       [&](int64_t j) { return load(row + j); });
        }
      }
      if (!op.need_prefix || !active) continue;
      for (int64_t k = 0; k < n; ++k) {
        if (f[k] == 0) s.query_rows[k] = s.grad_rows[k] = s.zeros;
      }
      product<C>(slots, n, s.dp, kBlock, 1, s.query_rows, dim, dk, dim, true);
      product<C>(slots, n, s.p, kBlock, 1, s.grad_rows, dim, dv, dim, true);
    }
  }
}

// Item: (entry, kv head, slot). Sums the partials in order, in double.
template <class C>
void reduce(const GatedPrefix& op, int64_t begin, int64_t end, char* memory) {
  Scratch<C> s(op, memory);
  const int64_t size = op.prefix_len * op.padded_dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = i / op.prefix_len, p = i % op.prefix_len;
    const int64_t entry = pair / op.kv_heads, kv_head = pair % op.kv_heads;
    for (int which = 0; which < 2; ++which) {
      std::memset(s.sum, 0, op.padded_dim * sizeof(double));
      for (int64_t part = op.first_item[pair]; part < op.first_item[pair + 1]; ++part) {
        const C* x = static_cast<const C*>(op.partial) + (2 * part + which) * size + p * op.padded_dim;
        for (int64_t j = 0; j < op.padded_dim; ++j) s.sum[j] += x[j];
      }
      for (int64_t j = 0; j < op.padded_dim; ++j) s.row[j] = static_cast<C>(s.sum[j]);
      const View& grad = which ? op.grad_value : op.grad_key;
      store_row<C>(row_of(grad, op.entry_id[entry], kv_head, p), grad.stride[3], grad.dtype, op.head_dim,
                   [&](int64_t j) { return load(s.row + j); });
    }
  }
}

// Item: (batch row, head). Zero grad_query where the row has no adapter.
template <class C>
void clear(const GatedPrefix& op, int64_t begin, int64_t end, char*) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / op.heads, h = i % op.heads;
    if (op.entry_of[b] >= 0) continue;
    for (int64_t t = 0; t < op.q_len; ++t) {
      store_row<C>(row_of(op.out, b, h, t), op.out.stride[3], op.out.dtype, op.head_dim,
                   [](int64_t) { return Vec<C>{}; });
    }
  }
}

template <class C>
constexpr GatedPrefixKernels table() {
  return {kLanes<C>, scratch_bytes<C>, pack<C>, forward<C>, backward<C>, reduce<C>, clear<C>};
}

}  // namespace

const GatedPrefixKernels gated_prefix_float = table<float>();
const GatedPrefixKernels gated_prefix_double = table<double>();

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
