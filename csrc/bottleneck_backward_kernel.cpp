// Backward of bottleneck on CPUs, see docs/maths.md.
//
// The first pass computes the hidden layer again (from z where that is given, else from x), its gradient and
// that of x, a block of rows at a time; it keeps act(z) and the gradient of z, (rows, size) each. The second
// sums the gradients of the parameters over all rows of an entry, a strip of columns at a time: there are no
// partial results that would have to be added up, so nothing depends on how the strips are spread over
// threads.
#include "bottleneck_rows.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

constexpr int64_t kAhead =
    8;  // rows that a strip is asked for in advance: its rows lie too far apart to be guessed
constexpr int64_t kSumRun = 16;  // rows of a plain sum that are added before the next level of sums

// Row `first` of those that the first pass keeps.
template <class C>
C* kept_rows(const Bottleneck& op, char* rows, int64_t entry, int64_t first, int64_t columns) {
  const int64_t before = (op.entry_begin[entry] - op.entry_begin[0]) * op.q_len + first;
  return reinterpret_cast<C*>(rows) + before * columns;
}

// grad_x of rows that send nothing through the adapter: the bits of grad_out, or zeros.
void pass_rows(const Bottleneck& op, Rows rows, int64_t n) {
  const int64_t item = op.out.dtype == DType::kDouble ? 8 : op.out.dtype == DType::kFloat ? 4 : 2;
  for (int64_t k = 0; k < n; ++k, rows.next()) {
    char* out = rows.in(op.out);
    if (op.add_grad_out) {
      copy_row(op.grad_out, rows.in(op.grad_out), op.out, out, op.hidden);
    } else {
      for (int64_t j = 0; j < op.hidden; ++j) std::memset(out + j * op.out.stride[3], 0, item);
    }
  }
}

// grad_x from the gradient of z, without a norm.
template <class C>
void grad_inputs(const Bottleneck& op, const Scratch<C>& s, const Block& block, const C* grad_z,
                 const C* const* grad) {
  constexpr int W = kLanes<C>;
  const int64_t n = block.end - block.begin;
  const C* down = packed_weights(op, s, kDownBySize, block.entry);
  with_element<C>(op.out.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    E *out[kBottleneckRows], *raw = reinterpret_cast<E*>(s.raw_out);
    char* targets[kBottleneckRows];
    Rows rows(op, block.entry, block.begin);
    for (int64_t k = 0; k < n; ++k, rows.next()) {
      targets[k] = rows.in(op.out);
      const bool direct = op.out.stride[3] == sizeof(E);
      out[k] = direct ? reinterpret_cast<E*>(targets[k]) : raw + k * op.padded_hidden;
    }
    auto fetch = [&](int64_t k, int64_t j) { return op.add_grad_out ? grad[k] + j : nullptr; };
    expand<C>(n, op.size, grad_z, op.padded_size, down, op.hidden, fetch,
              [&](int64_t first, int64_t count, int64_t j, const auto& sum) {
                const int64_t width = min(2 * W, op.hidden - j);
                auto rows_of = [&](auto whole) {
                  for (int i = 0; i < static_cast<int>(sizeof(sum) / sizeof(sum[0])); ++i) {
                    if (i >= count) break;
                    for (int v = 0; v < 2; ++v) {
                      const int64_t at = j + v * W, left = whole ? 2 * W : width - v * W;
                      Vec<C> value = sum[i][v];
                      if (op.add_grad_out && left > 0) value += load_width<C, C>(grad[first + i] + at, left);
                      store_width<C, E>(out[first + i] + at, left, value);
                    }
                  }
                };
                if (width == 2 * W) {
                  rows_of(std::true_type{});
                } else {
                  rows_of(std::false_type{});
                }
              });
    for (int64_t k = 0; k < n; ++k) scatter_row<E>(op.out, targets[k], op.hidden, out[k]);
  });
}

// The same through the norm; `partial` collects the gradients of its weight and bias.
template <class C>
void grad_normed_inputs(const Bottleneck& op, const Scratch<C>& s, const Block& block, const C* grad_z,
                        const C* const* x, const C* statistics, const C* const* grad, C* partial) {
  constexpr int W = kLanes<C>;
  const int64_t n = block.end - block.begin, padded = op.padded_hidden;
  const C* down = packed_weights(op, s, kDownBySize, block.entry);
  auto nothing = [](int64_t, int64_t) { return static_cast<const C*>(nullptr); };
  expand<C>(n, op.size, grad_z, op.padded_size, down, op.hidden, nothing,
            [&](int64_t first, int64_t count, int64_t j, const auto& sum) {
              for (int64_t i = 0; i < count; ++i) {
                for (int v = 0; v < 2; ++v) store(s.grad_y + (first + i) * padded + j + v * W, sum[i][v]);
              }
            });
  const C columns = static_cast<C>(op.hidden);
  C* wide = s.y;  // what was projected is no longer needed
  Rows rows(op, block.entry, block.begin);
  for (int64_t k = 0; k < n; ++k, rows.next()) {
    C* grad_y = s.grad_y + k * padded;
    const C mean = statistics[2 * k], inverse = statistics[2 * k + 1];
    for (int64_t j = 0; j < padded; j += W) {
      const Vec<C> g = load(grad_y + j), normed = (load(x[k] + j) - mean) * inverse;
      if (partial) {
        store(partial + j, load(partial + j) + g * normed);
        store(partial + padded + j, load(partial + padded + j) + g);
      }
      const Vec<C> weighted = g * load(s.norm_weight + j);
      store(grad_y + j, weighted);
      store(wide + j, weighted * normed);
    }
    if (!op.need_x) continue;
    for (int64_t j = op.hidden; j < padded; ++j) grad_y[j] = wide[j] = 0;
    const C shift = op.norm == Norm::kLayer ? sum_row(grad_y, padded) / columns : C(0);
    const C slope = sum_row(wide, padded) / columns;
    for (int64_t j = 0; j < padded; j += W) {
      const Vec<C> normed = (load(x[k] + j) - mean) * inverse;
      Vec<C> value = (load(grad_y + j) - shift - normed * slope) * inverse;
      if (op.add_grad_out && j < op.hidden) value += load_width<C, C>(grad[k] + j, op.hidden - j);
      store(grad_y + j, value);
    }
    store_row(op.out, rows.in(op.out), op.hidden, grad_y);
  }
}

// Items: blocks.
template <class C>
void backward(const Bottleneck& op, int64_t begin, int64_t end, char* memory) {
  constexpr int W = kLanes<C>;
  const Scratch<C> s(op, memory);
  const C scale = static_cast<C>(op.scale);
  for (int64_t i = begin; i < end; ++i) {
    const Block& block = op.blocks[i];
    const int64_t n = block.end - block.begin, entry = block.entry;
    const bool through = op.contributes[entry];
    C* partial = nullptr;
    if (op.partial_norm) {
      partial = reinterpret_cast<C*>(op.partial_norm) + i * 2 * op.padded_hidden;
      std::memset(partial, 0, 2 * op.padded_hidden * sizeof(C));
    }
    if (!through && op.need_x) pass_rows(op, Rows(op, entry, block.begin), n);
    if (!through && !op.need_weights) continue;

    if (op.norm != Norm::kNone) {
      load_parameter(op, op.norm_weight, entry, op.hidden, op.padded_hidden, s.norm_weight, C(1));
      load_parameter(op, op.norm_bias, entry, op.hidden, op.padded_hidden, s.norm_bias);
    }
    const C *x[kBottleneckRows], *y[kBottleneckRows], *grad[kBottleneckRows];
    C own[2 * kBottleneckRows];
    C* statistics = op.statistics ? kept_rows<C>(op, op.statistics, entry, block.begin, 2) : own;
    if (op.norm != Norm::kNone || op.needs[kDownByHidden]) read_inputs<C>(op, s, block, statistics, x, y);
    C* hidden = op.hidden_rows ? kept_rows<C>(op, op.hidden_rows, entry, block.begin, op.padded_size) : s.z;
    if (op.needs[kDownByHidden])
      project(n, op.hidden, y, packed_weights(op, s, kDownByHidden, entry), hidden, op.padded_size);
    if (op.need_hidden) activate_rows<C>(op, s, block, hidden, s.slope);
    if (!through) continue;

    Rows rows(op, entry, block.begin);
    for (int64_t k = 0; k < n; ++k, rows.next())
      grad[k] = read_row(op.grad_out, rows.in(op.grad_out), op.hidden, s.grad + k * op.padded_hidden);
    C* grad_z = op.grad_down_rows ? kept_rows<C>(op, op.grad_down_rows, entry, block.begin, op.padded_size)
                                  : s.grad_z;
    project(n, op.hidden, grad, packed_weights(op, s, kUpByHidden, entry), grad_z, op.padded_size);
    for (int64_t j = 0; j < n * op.padded_size; j += W) {
      Vec<C> value = load(grad_z + j) * scale;
      if (op.activation != Activation::kIdentity) value *= load(s.slope + j);
      store(grad_z + j, value);
    }
    if (op.norm != Norm::kNone && (op.need_x || partial)) {
      grad_normed_inputs<C>(op, s, block, grad_z, x, statistics, grad, partial);
    } else if (op.need_x) {
      grad_inputs<C>(op, s, block, grad_z, grad);
    }
  }
}

// ---- gradients of the parameters ----

// totals[j] += the sum over n rows of x[row * stride + j], for `columns` columns, which are whole vectors.
template <class C>
void add_columns(int64_t n, const C* x, int64_t stride, int64_t columns, double* totals) {
  constexpr int W = kLanes<C>;
  for (int64_t j = 0; j < columns; j += W) {
    for (int64_t begin = 0; begin < n; begin += kBottleneckRun) {
      Vec<C> sum = {};
      for (int64_t first = begin; first < min(begin + kBottleneckRun, n); first += kSumRun) {
        Vec<C> run = {};
        for (int64_t k = first; k < min(first + kSumRun, n); ++k) run += load(x + k * stride + j);
        sum += run;
      }
      for (int lane = 0; lane < W; ++lane) totals[j + lane] += sum[lane];
    }
  }
}

// n rows of columns [first, first + width) as panels of two vectors, zeros beyond the last column.
template <class C>
void pack_strip(const Bottleneck& op, const Scratch<C>& s, const View& x, Rows rows, int64_t n, int64_t first,
                int64_t width, const C* statistics, C* panels) {
  constexpr int W = kLanes<C>;
  with_element<C>(x.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    const int64_t step = x.stride[3], whole = step == sizeof(E) ? width / W * W : 0;
    Rows ahead = rows;
    for (int64_t k = 0; k < min(kAhead, n); ++k) ahead.next();
    for (int64_t k = 0; k < n; ++k, rows.next()) {
      const char* row = rows.in(x) + first * step;
      if (k + kAhead < n) {
        const char* soon = ahead.in(x) + first * step;
        for (int64_t j = 0; j < width * static_cast<int64_t>(sizeof(E)); j += 64)
          __builtin_prefetch(soon + j);
        ahead.next();
      }
      C* to = panels + k * kPanel<C>;  // of the row in its first panel
      auto put = [&](int64_t j, Vec<C> v) {
        if (statistics) {
          const Vec<C> normed = (v - statistics[2 * k]) * statistics[2 * k + 1];
          v = normed * load(s.norm_weight + first + j) + load(s.norm_bias + first + j);
        }
        store(to + j / kPanel<C> * n * kPanel<C> + j % kPanel<C>, v);
      };
      int64_t j = 0;
      for (; j < whole; j += W) put(j, load(reinterpret_cast<const E*>(row) + j));
      for (; j < width; j += W) put(j, load_some<C, E>(row + j * step, step, width - j));
      if (j % kPanel<C> != 0) store(to + j / kPanel<C> * n * kPanel<C> + W, Vec<C>{});
    }
  });
}

// The part of `totals` in the dtype of a gradient; totals is overwritten with the values in the compute type.
template <class C>
void store_totals(const View& x, int64_t entry_id, int64_t first, int64_t count, double factor,
                  double* totals) {
  C* values = reinterpret_cast<C*>(totals);
  for (int64_t j = 0; j < count; ++j) {
    const C value = static_cast<C>(totals[j] * factor);
    std::memcpy(values + j, &value, sizeof(C));
  }
  store_row(x, x.data + entry_id * x.stride[0] + first * x.stride[3], count, values);
}

// Columns of grad_down_weight and grad_down_bias, or rows of grad_up_weight and elements of grad_up_bias.
template <class C>
void grad_weights(const Bottleneck& op, const Scratch<C>& s, const Strip& strip) {
  const bool is_down = strip.kind == Strip::kDown;
  const int64_t id = op.entry_id[strip.entry], width = strip.end - strip.begin;
  const int64_t padded_width = (width + kPanel<C> - 1) / kPanel<C> * kPanel<C>;
  const int64_t total = (op.entry_begin[strip.entry + 1] - op.entry_begin[strip.entry]) * op.q_len;
  const bool weights = op.need_weights && (is_down ? op.contributes[strip.entry] : op.scale != 0);
  const bool biases = op.need_biases && !is_down;
  std::memset(s.sums, 0, op.padded_size * padded_width * sizeof(C));
  std::memset(s.totals, 0, padded_width * sizeof(double));
  const bool normed = is_down && op.norm != Norm::kNone;
  if (normed) {
    load_parameter(op, op.norm_weight, strip.entry, op.hidden, op.padded_hidden, s.norm_weight, C(1));
    load_parameter(op, op.norm_bias, strip.entry, op.hidden, op.padded_hidden, s.norm_bias);
  }
  for (int64_t first = 0; (weights || biases) && first < total; first += kBottleneckRun) {
    const int64_t n = min(kBottleneckRun, total - first);
    const C* statistics = normed ? kept_rows<C>(op, op.statistics, strip.entry, first, 2) : nullptr;
    pack_strip<C>(op, s, is_down ? op.x : op.grad_out, Rows(op, strip.entry, first), n, strip.begin, width,
                  statistics, s.strip);
    char* factor_rows = is_down ? op.grad_down_rows : op.hidden_rows;
    for (int64_t j = 0; j < padded_width; j += kPanel<C>) {
      const C* panel = s.strip + j * n;
      if (biases) add_columns<C>(n, panel, kPanel<C>, kPanel<C>, s.totals + j);
      if (!weights) continue;
      const C* factor = kept_rows<C>(op, factor_rows, strip.entry, first, op.padded_size);
      gather<C>(n, factor, op.padded_size, op.size, panel, s.sums + j * op.padded_size);
    }
  }
  if (op.need_weights && is_down) {
    for (int64_t r = 0; r < op.size; ++r) {
      for (int64_t j = 0; j < width; j += kPanel<C>) {
        char* to = op.grad_down.data + id * op.grad_down.stride[0] + r * op.grad_down.stride[2] +
                   (strip.begin + j) * op.grad_down.stride[3];
        store_row(op.grad_down, to, min(kPanel<C>, width - j), s.sums + j * op.padded_size + r * kPanel<C>);
      }
    }
  } else if (op.need_weights) {
    const C scale = static_cast<C>(op.scale);
    C* row = s.z;
    for (int64_t j = 0; j < width; ++j) {
      const C* sums = s.sums + j / kPanel<C> * kPanel<C> * op.padded_size + j % kPanel<C>;
      for (int64_t r = 0; r < op.size; ++r) row[r] = weights ? scale * sums[r * kPanel<C>] : C(0);
      char* to = op.grad_up.data + id * op.grad_up.stride[0] + (strip.begin + j) * op.grad_up.stride[2];
      store_row(op.grad_up, to, op.size, row);
    }
  }
  if (biases) store_totals<C>(op.grad_up_bias, id, strip.begin, width, op.scale, s.totals);
}

// Items: strips.
template <class C>
void parameters(const Bottleneck& op, int64_t begin, int64_t end, char* memory) {
  const Scratch<C> s(op, memory);
  for (int64_t i = begin; i < end; ++i) {
    const Strip& strip = op.strips[i];
    const int64_t entry = strip.entry, id = op.entry_id[entry], width = strip.end - strip.begin;
    if (strip.kind == Strip::kDown || strip.kind == Strip::kUp) {
      grad_weights<C>(op, s, strip);
    } else if (strip.kind == Strip::kDownBias) {
      const int64_t total = (op.entry_begin[entry + 1] - op.entry_begin[entry]) * op.q_len;
      std::memset(s.totals, 0, op.padded_size * sizeof(double));
      if (op.contributes[entry]) {
        const C* rows = kept_rows<C>(op, op.grad_down_rows, entry, 0, op.padded_size);
        add_columns<C>(total, rows, op.padded_size, op.padded_size, s.totals);
      }
      store_totals<C>(op.grad_down_bias, id, 0, op.size, 1.0, s.totals);
    } else {
      for (int which = 0; which < 2; ++which) {
        const View& grad = which == 0 ? op.grad_norm_weight : op.grad_norm_bias;
        if (!grad.data) continue;
        std::memset(s.totals, 0, kBottleneckStrip * sizeof(double));
        for (int64_t block = op.first_block[entry]; block < op.first_block[entry + 1]; ++block) {
          const C* partial =
              reinterpret_cast<const C*>(op.partial_norm) + (2 * block + which) * op.padded_hidden;
          for (int64_t j = 0; j < width; ++j) s.totals[j] += partial[strip.begin + j];
        }
        store_totals<C>(grad, id, strip.begin, width, 1.0, s.totals);
      }
    }
  }
}

}  // namespace

const BottleneckBackwardKernels bottleneck_backward_float = {backward<float>, parameters<float>};
const BottleneckBackwardKernels bottleneck_backward_double = {backward<double>, parameters<double>};

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
