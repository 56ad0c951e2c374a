// What both passes of bottleneck share: the rows of a block, scratch memory, norms, the hidden layer.
#pragma once

#include "activations.h"
#include "bottleneck_products.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

// The rows of a block, in order.
struct Rows {
  const Bottleneck& op;
  const int64_t* batch_row;
  int64_t t;

  Rows(const Bottleneck& op, int64_t entry, int64_t first) : op(op) {
    batch_row = op.batch_rows + op.entry_begin[entry] + first / op.q_len;
    t = first % op.q_len;
  }
  char* in(const View& x) const { return x.data + *batch_row * x.stride[0] + t * x.stride[2]; }
  void next() {
    if (++t < op.q_len) return;
    t = 0;
    ++batch_row;
  }
};

// Scratch of one thread; the layout serves every function below.
template <class C>
struct Scratch {
  C* packed[kPackedForms];
  C *x, *y, *grad, *grad_y, *z, *slope, *grad_z, *down_bias, *up_bias, *norm_weight, *norm_bias, *strip,
      *sums;
  double* totals;
  char *raw_in, *raw_out;

  explicit Scratch(const Bottleneck& op, char* memory = nullptr) : memory_(memory) {
    const int64_t wide = kBottleneckRows * op.padded_hidden, narrow = kBottleneckRows * op.padded_size;
    for (int form = 0; form < kPackedForms; ++form) {
      take(packed[form], op.needs[form] ? op.packed_bytes[form] / static_cast<int64_t>(sizeof(C)) : 0);
    }
    take(x, wide);
    take(y, op.norm != Norm::kNone ? wide : 0);
    take(grad, wide);
    take(grad_y, op.norm != Norm::kNone ? wide : 0);
    take(z, narrow);
    take(slope, narrow);
    take(grad_z, narrow);
    take(down_bias, op.padded_size);
    take(up_bias, op.padded_hidden);
    take(norm_weight, op.padded_hidden);
    take(norm_bias, op.padded_hidden);
    take(strip, kBottleneckRun * kBottleneckStrip);
    take(sums, op.padded_size * kBottleneckStrip);
    take(totals, op.padded_size + kBottleneckStrip);
    take(raw_in, wide * static_cast<int64_t>(sizeof(C)));
    take(raw_out, wide * static_cast<int64_t>(sizeof(C)));
  }
  int64_t bytes() const { return offset_; }

 private:
  template <class T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(memory_ + offset_);
    offset_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
  char* memory_;
  int64_t offset_ = 0;
};

// All panels of a form: those that the blocks of the entry share, or packed here.
template <class C>
const C* packed_weights(const Bottleneck& op, const Scratch<C>& s, int form, int64_t entry) {
  const int64_t slot = op.slot[entry];
  if (slot >= 0) return reinterpret_cast<const C*>(op.packed[form] + slot * op.packed_bytes[form]);
  for (int64_t panel = 0; panel < panels_of<C>(op, form); ++panel) {
    pack_panel(op, form, entry, panel, s.packed[form]);
  }
  return s.packed[form];
}

// A row of a parameter, padded with zeros; `otherwise` where there is none.
template <class C>
void load_parameter(const Bottleneck& op, const View& x, int64_t entry, int64_t count, int64_t padded, C* dst,
                    C otherwise = 0) {
  for (int64_t j = 0; j < padded; ++j) dst[j] = j < count ? otherwise : 0;
  if (x.data) load_row(x, x.data + op.entry_id[entry] * x.stride[0], count, dst);
}

// A row in the compute type: in place where that is possible.
template <class C>
const C* read_row(const View& x, const char* row, int64_t n, C* buffer) {
  if (x.dtype == kDType<C> && x.stride[3] == static_cast<int64_t>(sizeof(C)))
    return reinterpret_cast<const C*>(row);
  load_row(x, row, n, buffer);
  return buffer;
}

template <class C>
inline C sum_row(const C* x, int64_t padded) {
  Vec<C> sum[2] = {};
  for (int64_t j = 0; j < padded; j += kPanel<C>) {
    for (int v = 0; v < 2; ++v) sum[v] += load(x + j + v * kLanes<C>);
  }
  const Vec<C> both = sum[0] + sum[1];
  C total = 0;
  for (int i = 0; i < kLanes<C>; ++i) total += both[i];
  return total;
}

// y = norm(x) for one padded row; gives mean and inverse deviation.
template <class C>
inline void normalize(const Bottleneck& op, const Scratch<C>& s, const C* x, C* y, C* statistics) {
  constexpr int W = kLanes<C>;
  const C count = static_cast<C>(op.hidden);
  const C mean = op.norm == Norm::kLayer ? sum_row(x, op.padded_hidden) / count : C(0);
  for (int64_t j = 0; j < op.padded_hidden; j += W) {
    const Vec<C> centered = load(x + j) - mean;
    store(y + j, centered * centered);
  }
  for (int64_t j = op.hidden; j < op.padded_hidden; ++j) y[j] = 0;
  const C inverse = C(1) / std::sqrt(sum_row(y, op.padded_hidden) / count + static_cast<C>(op.norm_eps));
  statistics[0] = mean;
  statistics[1] = inverse;
  if (!op.needs[kDownByHidden]) return;  // nothing is projected
  for (int64_t j = 0; j < op.padded_hidden; j += W) {
    const Vec<C> normed = (load(x + j) - mean) * inverse;
    store(y + j, normed * load(s.norm_weight + j) + load(s.norm_bias + j));
  }
}

// The inputs of a block's down projection; with a norm, x holds the padded rows it was computed from.
template <class C>
void read_inputs(const Bottleneck& op, const Scratch<C>& s, const Block& block, C* statistics, const C** x,
                 const C** y) {
  Rows rows(op, block.entry, block.begin);
  for (int64_t k = 0; k < block.end - block.begin; ++k, rows.next()) {
    C* buffer = s.x + k * op.padded_hidden;
    if (op.norm == Norm::kNone) {
      x[k] = y[k] = read_row(op.x, rows.in(op.x), op.hidden, buffer);
      continue;
    }
    for (int64_t j = op.hidden; j < op.padded_hidden; ++j) buffer[j] = 0;
    load_row(op.x, rows.in(op.x), op.hidden, buffer);
    C own[2], *at = statistics ? statistics + 2 * k : own, *normed = s.y + k * op.padded_hidden;
    normalize(op, s, buffer, normed, at);
    x[k] = buffer;
    y[k] = normed;
  }
}

// Elements of a row next to each other, the bits as they are.
template <class E>
inline const E* gather_row(const View& x, const char* row, int64_t n, E* buffer) {
  if (x.stride[3] == sizeof(E)) return reinterpret_cast<const E*>(row);
  for (int64_t j = 0; j < n; ++j) std::memcpy(buffer + j, row + j * x.stride[3], sizeof(E));
  return buffer;
}
template <class E>
inline void scatter_row(const View& x, char* row, int64_t n, const E* from) {
  if (x.stride[3] == sizeof(E)) return;
  for (int64_t j = 0; j < n; ++j) std::memcpy(row + j * x.stride[3], from + j, sizeof(E));
}

template <class C, class E>
inline Vec<C> load_width(const E* p, int64_t width) {
  return width >= kLanes<C> ? load(p) : load_some<C, E>(reinterpret_cast<const char*>(p), sizeof(E), width);
}
template <class C, class E>
inline void store_width(E* p, int64_t width, Vec<C> v) {
  if (width >= kLanes<C>) {
    store(p, v);
  } else if (width > 0) {
    store_some<C, E>(reinterpret_cast<char*>(p), sizeof(E), width, v);
  }
}

// Rows of products of a block become act(products + bias), and its derivative goes to `slope` if that is
// there. Where z is given it is read instead: the bits that forward had.
template <class C>
void activate_rows(const Bottleneck& op, const Scratch<C>& s, const Block& block, C* hidden, C* slope) {
  constexpr int W = kLanes<C>;
  load_parameter(op, op.down_bias, block.entry, op.size, op.padded_size, s.down_bias);
  Rows rows(op, block.entry, block.begin);
  with_activation(op.activation, [&](auto activation) {
    for (int64_t i = block.begin; i < block.end; ++i, rows.next()) {
      const C* given = op.given_z.data ? reinterpret_cast<const C*>(rows.in(op.given_z)) : nullptr;
      C* kept = op.kept_z.data ? reinterpret_cast<C*>(rows.in(op.kept_z)) : nullptr;
      for (int64_t j = 0; j < op.padded_size; j += W) {
        const Vec<C> z =
            given ? load_width<C, C>(given + j, op.size - j) : load(hidden + j) + load(s.down_bias + j);
        if (kept) store_width<C, C>(kept + j, op.size - j, z);
        const ValueSlope<C> result = activate<C, activation.value>(z);
        store(hidden + j, result.value);
        if (slope) store(slope + j, result.slope);
      }
      hidden += op.padded_size;
      if (slope) slope += op.padded_size;
    }
  });
}

}  // namespace
}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
