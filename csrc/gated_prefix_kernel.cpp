// gated_prefix on CPUs: out = base + f(gate) * softmax(scale * Q Kp^T) Vp, see docs/maths.md.
//
// Rows of Q are handled a vector's width at a time. Products over head_dim keep head_dim in the lanes and sum
// across lanes once per (row, slot), so K and V are used as they lie in memory; the softmax keeps rows in the
// lanes, so it needs neither padding nor sums across lanes. Every row is computed by the same chain of
// operations wherever it stands in a block: its bits do not depend on its neighbours or on the thread count.
#include "gated_prefix_kernel.h"
#include "rows.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

constexpr int64_t kBlock = 32;  // rows whose contributions to dK and dV are summed before they are added

// The rows of one (entry, kv head) in the order of Item.
struct Rows {
  const GatedPrefix& op;
  const int64_t* batch_row;
  int64_t first_head, group, t;

  Rows(const GatedPrefix& op, const Item& item) : op(op), first_head(item.kv_head * op.group) {
    batch_row = op.batch_rows + op.entry_begin[item.entry] + item.begin / (op.group * op.q_len);
    group = item.begin / op.q_len % op.group;
    t = item.begin % op.q_len;
  }
  char* in(const View& x) const {
    return x.data + *batch_row * x.stride[0] + (first_head + group) * x.stride[1] + t * x.stride[2];
  }
  void next() {
    if (++t < op.q_len) return;
    t = 0;
    if (++group < op.group) return;
    group = 0;
    ++batch_row;
  }
};

// Gives rows in the compute type, in place where that is possible.
template <class C>
struct Reader {
  const View& x;
  int64_t head_dim;
  bool direct;

  Reader(const View& x, int64_t head_dim) : x(x), head_dim(head_dim) {
    direct =
        x.dtype == kDType<C> && x.stride[3] == static_cast<int64_t>(sizeof(C)) && head_dim % kLanes<C> == 0;
  }
  const C* operator()(const char* row, C* buffer) const {
    if (direct) return reinterpret_cast<const C*>(row);
    load_row(x, row, head_dim, buffer);
    return buffer;
  }
};

// ---- the two kinds of products ----

// out[p * ldo + r] = <rows[r], panel[p]> for kRows rows, as many slots at once as fill a vector of sums.
template <class C, int kRows>
inline void dots_of(const C* const* rows, const C* const* panel, int64_t slots, int64_t cols, C* out,
                    int64_t ldo) {
  constexpr int W = kLanes<C>, kSlots = W / kRows;
  for (int64_t p = 0; p < slots; p += kSlots) {
    const C* k[kSlots];
    for (int s = 0; s < kSlots; ++s) k[s] = panel[min(p + s, slots - 1)];
    Vec<C> acc[W];
    for (Vec<C>& a : acc) a = Vec<C>{};  // in registers, where an initialiser would go through memory
    int64_t j = 0;
    do {
      Vec<C> kj[kSlots];
      for (int s = 0; s < kSlots; ++s) kj[s] = load(k[s] + j);
      for (int r = 0; r < kRows; ++r) {
        const Vec<C> q = load(rows[r] + j);
        for (int s = 0; s < kSlots; ++s) acc[s * kRows + r] += q * kj[s];
      }
    } while ((j += W) < cols);
    const Vec<C> sums = sum_each<C>(acc);
    for (int s = 0; s < min(kSlots, slots - p); ++s) {
      std::memcpy(out + (p + s) * ldo, reinterpret_cast<const C*>(&sums) + s * kRows, kRows * sizeof(C));
    }
  }
}

// The same for the first n of kLanes rows, all of which can be read.
template <class C>
inline void dots(int64_t n, const C* const* rows, const C* const* panel, int64_t slots, int64_t cols, C* out,
                 int64_t ldo) {
  constexpr int W = kLanes<C>, kRows = W < 4 ? W : 4;
  if (n == 1) {
    dots_of<C, 1>(rows, panel, slots, cols, out, ldo);
    return;
  }
  for (int64_t r = 0; r < min(W, n); r += kRows)
    dots_of<C, kRows>(rows + r, panel, slots, cols, out + r, ldo);
}

// A tile of kI rows and kJ vectors of `product`, from column j on.
template <class C, int kI, int kJ>
inline void product_tile(int64_t terms, const C* a, int64_t ai, int64_t ak, const C* const* b, int64_t j,
                         C* out, int64_t ldo, bool add) {
  constexpr int W = kLanes<C>;
  Vec<C> acc[kI][kJ];
  for (auto& row : acc) {
    for (Vec<C>& x : row) x = Vec<C>{};
  }
  int64_t k = 0;
  do {
    Vec<C> bk[kJ];
    for (int v = 0; v < kJ; ++v) bk[v] = load(b[k] + j + v * W);
    for (int i = 0; i < kI; ++i) {
      const C x = a[i * ai + k * ak];
      for (int v = 0; v < kJ; ++v) acc[i][v] += x * bk[v];
    }
  } while (++k < terms);
  for (int i = 0; i < kI; ++i) {
    for (int v = 0; v < kJ; ++v) {
      C* o = out + i * ldo + j + v * W;
      store(o, add ? load(o) + acc[i][v] : acc[i][v]);
    }
  }
}
template <class C, int kI>
void product_rows(int64_t terms, const C* a, int64_t ai, int64_t ak, const C* const* b, int64_t cols, C* out,
                  int64_t ldo, bool add) {
  constexpr int W = kLanes<C>;
  int64_t j = 0;
  for (; j + 2 * W <= cols; j += 2 * W) product_tile<C, kI, 2>(terms, a, ai, ak, b, j, out, ldo, add);
  if (j < cols) product_tile<C, kI, 1>(terms, a, ai, ak, b, j, out, ldo, add);
}

// out[i] = (add ? out[i] : 0) + sum over k of a[i * ai + k * ak] * b[k], for `cols` columns.
template <class C>
inline void product(int64_t count, int64_t terms, const C* a, int64_t ai, int64_t ak, const C* const* b,
                    int64_t cols, C* out, int64_t ldo, bool add) {
  using Function = void (*)(int64_t, const C*, int64_t, int64_t, const C* const*, int64_t, C*, int64_t, bool);
  static constexpr Function kOfSize[] = {product_rows<C, 1>, product_rows<C, 2>, product_rows<C, 3>,
                                         product_rows<C, 4>, product_rows<C, 5>, product_rows<C, 6>};
  constexpr int64_t kMost = 6;
  for (int64_t i = 0, size; i < count; i += size) {
    const int64_t left = count - i, tiles = (left + kMost - 1) / kMost;
    size = (left + tiles - 1) / tiles;  // tiles of like size: a small last one would wait for its own sums
    kOfSize[size - 1](terms, a + i * ai, ai, ak, b, cols, out + i * ldo, ldo, add);
  }
}

// The sum of value(slot). Short runs first: the error of a long prefix grows with their number, not its
// length.
template <class C, class F>
inline Vec<C> sum_slots(int64_t slots, F value) {
  constexpr int64_t kRun = 16;
  Vec<C> sum = {};
  for (int64_t first = 0; first < slots; first += kRun) {
    Vec<C> run = value(first);
    for (int64_t i = first + 1; i < min(first + kRun, slots); ++i) run += value(i);
    sum += run;
  }
  return sum;
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
  return sum_slots<C>(slots, [&](int64_t i) {
    const Vec<C> e = exp(load(p + i * ldp) - top);
    store(p + i * ldp, e);
    return e;
  });
}

// ---- work items ----

// Scratch of one thread; the layout serves every function below.
template <class C>
struct Scratch {
  C *query, *grad_out, *row, *zeros, *p, *dp;
  const C **key, **value, **query_rows, **grad_rows;
  double* sum;

  static int64_t bytes(const GatedPrefix& op) {
    const int64_t elements = (2 * kBlock + kLanes<C> + 1) * op.padded_dim + 2 * kBlock * op.prefix_len;
    return elements * sizeof(C) + 2 * (op.prefix_len + kBlock) * sizeof(C*) + op.padded_dim * sizeof(double);
  }
  // Every array is a multiple of 8 bytes: padded_dim is whole vectors and kBlock is even.
  Scratch(const GatedPrefix& op, char* memory) {
    take(memory, query, kBlock * op.padded_dim);
    take(memory, grad_out, kBlock * op.padded_dim);
    take(memory, row, kLanes<C> * op.padded_dim);
    take(memory, zeros, op.padded_dim);
    take(memory, p, kBlock * op.prefix_len);
    take(memory, dp, kBlock * op.prefix_len);
    take(memory, key, op.prefix_len);
    take(memory, value, op.prefix_len);
    take(memory, query_rows, kBlock);
    take(memory, grad_rows, kBlock);
    take(memory, sum, op.padded_dim);
    // Lanes without a row are computed too, on zeros, and never stored.
    std::memset(zeros, 0, (op.padded_dim + 2 * kBlock * op.prefix_len) * sizeof(C));
  }

 private:
  template <class T>
  static void take(char*& memory, T*& array, int64_t count) {
    array = reinterpret_cast<T*>(memory);
    memory += count * sizeof(T);
  }
};

template <class C>
int64_t scratch_bytes(const GatedPrefix& op) {
  return Scratch<C>::bytes(op);
}

template <class C>
inline void bank_rows(const GatedPrefix& op, const Item& item, const C** key, const C** value) {
  const int64_t id = op.entry_id[item.entry];
  const char* k = op.key_rows + (op.key_packed ? item.entry : id) * op.key_stride[0];
  const char* v = op.value_rows + (op.value_packed ? item.entry : id) * op.value_stride[0];
  for (int64_t p = 0; p < op.prefix_len; ++p) {
    key[p] = reinterpret_cast<const C*>(k + item.kv_head * op.key_stride[1] + p * op.key_stride[2]);
    value[p] = reinterpret_cast<const C*>(v + item.kv_head * op.value_stride[1] + p * op.value_stride[2]);
  }
}

// Item: (entry, kv head). The bank rows in the compute type, padded with zeros.
template <class C>
void pack(const GatedPrefix& op, const View& bank, char* dst, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const char* src =
        bank.data + op.entry_id[i / op.kv_heads] * bank.stride[0] + i % op.kv_heads * bank.stride[1];
    C* rows = reinterpret_cast<C*>(dst) + i * op.prefix_len * op.padded_dim;
    for (int64_t p = 0; p < op.prefix_len; ++p) {
      load_row(bank, src + p * bank.stride[2], op.head_dim, rows + p * op.padded_dim);
    }
  }
}

// Item: op.items[i].
template <class C>
void forward(const GatedPrefix& op, int64_t begin, int64_t end, char* memory) {
  constexpr int W = kLanes<C>;
  const Scratch<C> s(op, memory);
  const int64_t slots = op.prefix_len, dim = op.padded_dim;
  const Reader<C> read_query(op.query, op.head_dim);
  for (int64_t i = begin; i < end; ++i) {
    const Item& item = op.items[i];
    const C* factor = static_cast<const C*>(op.factor) + item.entry * op.heads + item.kv_head * op.group;
    bank_rows(op, item, s.key, s.value);
    Rows rows(op, item);
    for (int64_t r = item.begin; r < item.end; r += W) {
      const int64_t n = min(W, item.end - r);
      const char* base[W];
      char* out[W];
      alignas(Vec<C>) C f[W];
      bool active = false;
      for (int64_t k = 0; k < n; ++k, rows.next()) {
        base[k] = rows.in(op.base);
        out[k] = rows.in(op.out);
        f[k] = factor[rows.group];
        active |= f[k] != 0;
        s.query_rows[k] = f[k] != 0 ? read_query(rows.in(op.query), s.query + k * dim) : s.zeros;
      }
      for (int64_t k = n; k < W; ++k) {
        f[k] = 0;
        s.query_rows[k] = s.zeros;
      }
      if (active) {
        dots(n, s.query_rows, s.key, slots, dim, s.p, W);
        const Vec<C> weight = load(f) / softmax_numerators(s.p, W, slots, static_cast<C>(op.scale));
        for (int64_t p = 0; p < slots; ++p) store(s.p + p * W, load(s.p + p * W) * weight);
        product<C>(n, slots, s.p, 1, W, s.value, dim, s.row, dim, false);
      }
      for (int64_t k = 0; k < n; ++k) {
        if (f[k] != 0) {
          add_row(op.base, base[k], op.out, out[k], op.head_dim, s.row + k * dim);
        } else {
          copy_row(op.base, base[k], op.out, out[k], op.head_dim);
        }
      }
    }
  }
}

// Item: op.items[i]. Writes grad_query, and one partial of the bank's and the gate's gradients.
template <class C>
void backward(const GatedPrefix& op, int64_t begin, int64_t end, char* memory) {
  constexpr int W = kLanes<C>;
  const Scratch<C> s(op, memory);
  const int64_t slots = op.prefix_len, dim = op.padded_dim;
  const C scale = static_cast<C>(op.scale);
  const Reader<C> read_query(op.query, op.head_dim), read_grad(op.grad_out, op.head_dim);
  for (int64_t i = begin; i < end; ++i) {
    const Item& item = op.items[i];
    const C* factor = static_cast<const C*>(op.factor) + item.entry * op.heads + item.kv_head * op.group;
    bank_rows(op, item, s.key, s.value);
    double* delta_sum = op.partial_gate + i * op.group;
    C* dk = static_cast<C*>(op.partial) + i * 2 * slots * dim;
    C* dv = dk + slots * dim;
    std::memset(delta_sum, 0, op.group * sizeof(double));
    if (op.need_prefix) std::memset(dk, 0, 2 * slots * dim * sizeof(C));
    Rows rows(op, item);
    for (int64_t r = item.begin; r < item.end; r += kBlock) {
      const int64_t n = min(kBlock, item.end - r);
      alignas(Vec<C>) C f[kBlock];
      int64_t group[kBlock];
      char* dq[kBlock];
      bool active = false;
      for (int64_t k = 0; k < n; ++k, rows.next()) {
        s.query_rows[k] = read_query(rows.in(op.query), s.query + k * dim);
        s.grad_rows[k] = read_grad(rows.in(op.grad_out), s.grad_out + k * dim);
        dq[k] = rows.in(op.out);
        group[k] = rows.group;
        f[k] = factor[rows.group];
        active |= f[k] != 0;
      }
      for (int64_t k = n; k % W != 0; ++k) {
        f[k] = 0;
        s.query_rows[k] = s.grad_rows[k] = s.zeros;
      }

      for (int64_t k = 0; k < n; k += W) {
        // From here p holds w = f * p and dp holds ds = scale * w * (dp - delta), for W rows at once.
        C *p = s.p + k, *dp = s.dp + k;
        const int64_t count = min(W, n - k);
        dots(count, s.query_rows + k, s.key, slots, dim, p, kBlock);
        dots(count, s.grad_rows + k, s.value, slots, dim, dp, kBlock);
        const Vec<C> inverse = C(1) / softmax_numerators(p, kBlock, slots, scale);
        const Vec<C> delta = inverse * sum_slots<C>(slots, [&](int64_t j) {
                               return load(p + j * kBlock) * load(dp + j * kBlock);
                             });
        for (int64_t m = 0; m < count; ++m) delta_sum[group[k + m]] += delta[m];
        const Vec<C> fk = load(f + k), weight = fk * inverse;
        for (int64_t j = 0; j < slots; ++j) {
          const Vec<C> w = load(p + j * kBlock) * weight;
          const Vec<C> ds = scale * w * (load(dp + j * kBlock) - delta);
          // A zero factor must win over Inf and NaN: such rows contribute exact zeros.
          store(p + j * kBlock, fk == 0 ? Vec<C>{} : w);
          store(dp + j * kBlock, fk == 0 ? Vec<C>{} : ds);
        }
        if (!op.need_query) continue;
        if (active) product<C>(count, slots, dp, 1, kBlock, s.key, dim, s.row, dim, false);
        for (int64_t m = 0; m < count; ++m) {
          store_row(op.out, dq[k + m], op.head_dim, f[k + m] != 0 ? s.row + m * dim : s.zeros);
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
  const Scratch<C> s(op, memory);
  const int64_t dim = op.padded_dim, size = op.prefix_len * dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = i / op.prefix_len, p = i % op.prefix_len;
    for (int which = 0; which < 2; ++which) {
      std::memset(s.sum, 0, dim * sizeof(double));
      for (int64_t part = op.first_item[pair]; part < op.first_item[pair + 1]; ++part) {
        const C* x = static_cast<const C*>(op.partial) + (2 * part + which) * size + p * dim;
        for (int64_t j = 0; j < dim; ++j) s.sum[j] += x[j];
      }
      for (int64_t j = 0; j < dim; ++j) s.row[j] = static_cast<C>(s.sum[j]);
      const View& grad = which ? op.grad_value : op.grad_key;
      char* row = grad.data + op.entry_id[pair / op.kv_heads] * grad.stride[0] +
                  pair % op.kv_heads * grad.stride[1] + p * grad.stride[2];
      store_row(grad, row, op.head_dim, s.row);
    }
  }
}

// Item: (row without an adapter, head). out = base.
template <class C>
void keep(const GatedPrefix& op, int64_t begin, int64_t end, char*) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = op.batch_rows[i / op.heads], h = i % op.heads;
    for (int64_t t = 0; t < op.q_len; ++t) {
      const char* base = op.base.data + b * op.base.stride[0] + h * op.base.stride[1] + t * op.base.stride[2];
      char* out = op.out.data + b * op.out.stride[0] + h * op.out.stride[1] + t * op.out.stride[2];
      copy_row(op.base, base, op.out, out, op.head_dim);
    }
  }
}

// Item: (row without an adapter, head). grad_query = 0.
template <class C>
void clear(const GatedPrefix& op, int64_t begin, int64_t end, char* memory) {
  const Scratch<C> s(op, memory);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = op.batch_rows[i / op.heads], h = i % op.heads;
    char* row = op.out.data + b * op.out.stride[0] + h * op.out.stride[1];
    for (int64_t t = 0; t < op.q_len; ++t)
      store_row(op.out, row + t * op.out.stride[2], op.head_dim, s.zeros);
  }
}

template <class C>
constexpr GatedPrefixKernels table() {
  return {kLanes<C>, scratch_bytes<C>, pack<C>, forward<C>, backward<C>, reduce<C>, keep<C>, clear<C>};
}

}  // namespace

const GatedPrefixKernels gated_prefix_float = table<float>();
const GatedPrefixKernels gated_prefix_double = table<double>();

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
