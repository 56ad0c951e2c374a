// bottleneck on CPUs: out = residual + scale * (act(norm(x) D^T + b_d) U^T + b_u), see docs/maths.md.
//
// Blocks of rows go through both products while they are in cache; the output is written once. Weights are
// packed once per call, or by the block itself where it is the only one of its entry; a few rows, as in
// decoding, take them as they lie.
#include "bottleneck_rows.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

template <class C>
int64_t scratch_bytes(const Bottleneck& op) {
  return Scratch<C>(op).bytes();
}

// Items: (slot, needed form, panel).
template <class C>
void pack(const Bottleneck& op, int64_t begin, int64_t end, char*) {
  int64_t panels = 0;
  for (int form = 0; form < kPackedForms; ++form) panels += op.needs[form] ? panels_of<C>(op, form) : 0;
  for (int64_t i = begin; i < end; ++i) {
    int64_t panel = i % panels, slot = i / panels;
    int form = 0;
    for (;; ++form) {
      if (!op.needs[form]) continue;
      if (panel < panels_of<C>(op, form)) break;
      panel -= panels_of<C>(op, form);
    }
    char* memory = const_cast<char*>(op.packed[form]) + slot * op.packed_bytes[form];
    pack_panel(op, form, op.slot_entry[slot], panel, reinterpret_cast<C*>(memory));
  }
}

template <class M>
inline bool any(M mask) {
  uint64_t words[sizeof(M) / 8], all = 0;
  std::memcpy(words, &mask, sizeof(M));
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// An output channel whose weights and bias are all zero.
template <class C>
bool is_inactive(const Bottleneck& op, int64_t entry, int64_t channel) {
  if (op.scale == 0) return true;
  const int64_t id = op.entry_id[entry];
  const View& up = op.up;
  bool zero = true;
  with_element<C>(up.dtype, [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    auto is_zero = [](const char* at) { return load_some<C, E>(at, 0, 1)[0] == 0; };
    const char* row = up.data + id * up.stride[0] + channel * up.stride[2];
    for (int64_t r = 0; zero && r < op.size; ++r) zero = is_zero(row + r * up.stride[3]);
    const View& bias = op.up_bias;
    if (zero && bias.data) zero = is_zero(bias.data + id * bias.stride[0] + channel * bias.stride[3]);
  });
  return zero;
}

// Puts right what arithmetic cannot: where the term is nothing, the output has the bits of the residual, even
// if that is NaN, or if the term came out as NaN because the hidden layer is not finite.
template <class C, class E>
[[gnu::noinline]] void repair(const Bottleneck& op, int64_t entry, int64_t channel, int64_t rows,
                              int64_t width, const C* terms, int64_t ldt, const E* const* residual,
                              E* const* out) {
  for (int64_t j = 0; j < width; ++j) {
    int inactive = -1;
    for (int64_t i = 0; i < rows; ++i) {
      const C term = terms[i * ldt + j];
      if (term != term && inactive < 0) inactive = is_inactive<C>(op, entry, channel + j);
      if (term != 0 && !(term != term && inactive > 0)) continue;
      E* o = out[i] + channel + j;
      if (residual) {
        std::memcpy(o, residual[i] + channel + j, sizeof(E));
      } else {
        std::memset(o, 0, sizeof(E));
      }
    }
  }
}

template <class C, class E, int kRows>
inline void finish_output(const Bottleneck& op, const Scratch<C>& s, int64_t entry, int64_t rows, int64_t j,
                          const Vec<C> (&sum)[kRows][2], const E* const* residual, E* const* out) {
  constexpr int W = kLanes<C>;
  const int64_t width = min(2 * W, op.hidden - j);
  const C scale = static_cast<C>(op.scale);
  const Vec<C> bias[2] = {load(s.up_bias + j), load(s.up_bias + j + W)}, zero = {};
  auto bad = zero != zero;
  auto rows_of = [&](auto whole) {
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      for (int v = 0; v < 2; ++v) {
        const int64_t at = j + v * W, left = whole ? 2 * W : width - v * W;
        const Vec<C> term = (sum[i][v] + bias[v]) * scale;
        const Vec<C> kept = residual && left > 0 ? load_width<C, E>(residual[i] + at, left) : zero;
        const Vec<C> o = term == 0 ? kept : kept + term;
        bad |= o != o;
        store_width<C, E>(out[i] + at, left, o);
      }
    }
  };
  if (width == 2 * W) {
    rows_of(std::true_type{});
  } else {
    rows_of(std::false_type{});
  }
  if (!any(bad)) return;
  C terms[kRows][2 * W];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) store(terms[i] + v * W, (sum[i][v] + bias[v]) * scale);
  }
  repair<C, E>(op, entry, j, rows, width, terms[0], 2 * W, residual, out);
}

template <class C>
void forward(const Bottleneck& op, int64_t begin, int64_t end, char* memory) {
  const Scratch<C> s(op, memory);
  for (int64_t i = begin; i < end; ++i) {
    const Block& block = op.blocks[i];
    const int64_t n = block.end - block.begin, entry = block.entry;
    if (op.norm != Norm::kNone) {
      load_parameter(op, op.norm_weight, entry, op.hidden, op.padded_hidden, s.norm_weight, C(1));
      load_parameter(op, op.norm_bias, entry, op.hidden, op.padded_hidden, s.norm_bias);
    }
    load_parameter(op, op.up_bias, entry, op.hidden, op.padded_hidden, s.up_bias);
    const C *x[kBottleneckRows], *y[kBottleneckRows];
    read_inputs<C>(op, s, block, nullptr, x, y);
    const bool few = op.slot[entry] < 0 && n <= kFewRows;
    if (few) {
      project_few(op, entry, n, y, s.strip, s.z);
    } else {
      project(n, op.hidden, y, packed_weights(op, s, kDownByHidden, entry), s.z, op.padded_size);
    }
    activate_rows<C>(op, s, block, s.z, nullptr);
    const C* up = few ? nullptr : packed_weights(op, s, kUpBySize, entry);
    with_element<C>(op.out.dtype, [&](auto* element) {
      using E = std::remove_pointer_t<decltype(element)>;
      const E* residual[kBottleneckRows];
      E *out[kBottleneckRows], *raw_in = reinterpret_cast<E*>(s.raw_in),
                               *raw_out = reinterpret_cast<E*>(s.raw_out);
      const bool direct = op.out.stride[3] == sizeof(E);
      Rows rows(op, entry, block.begin);
      char* targets[kBottleneckRows];
      for (int64_t k = 0; k < n; ++k, rows.next()) {
        if (op.residual.data)
          residual[k] =
              gather_row<E>(op.residual, rows.in(op.residual), op.hidden, raw_in + k * op.padded_hidden);
        targets[k] = rows.in(op.out);
        out[k] = direct ? reinterpret_cast<E*>(targets[k]) : raw_out + k * op.padded_hidden;
      }
      auto fetch = [&](int64_t k, int64_t j) { return op.residual.data ? residual[k] + j : nullptr; };
      auto finish = [&](int64_t first, int64_t count, int64_t j, const auto& sum) {
        finish_output<C, E>(op, s, entry, count, j, sum, op.residual.data ? residual + first : nullptr,
                            out + first);
      };
      if (few) {
        expand_few<C>(op, entry, n, s.z, s.strip, fetch, finish);
      } else {
        expand<C>(n, op.size, s.z, op.padded_size, up, op.hidden, fetch, finish);
      }
      for (int64_t k = 0; k < n; ++k) scatter_row<E>(op.out, targets[k], op.hidden, out[k]);
    });
  }
}

// Items: (row without an adapter, t). The residual's bits, or zeros; zeros for z.
void keep(const Bottleneck& op, int64_t begin, int64_t end, char*) {
  const int64_t item = op.out.dtype == DType::kDouble ? 8 : op.out.dtype == DType::kFloat ? 4 : 2;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = op.batch_rows[i / op.q_len], t = i % op.q_len;
    if (op.kept_z.data)
      std::memset(op.kept_z.data + b * op.kept_z.stride[0] + t * op.kept_z.stride[2], 0, op.kept_z.stride[2]);
    char* out = op.out.data + b * op.out.stride[0] + t * op.out.stride[2];
    if (op.residual.data) {
      const char* from = op.residual.data + b * op.residual.stride[0] + t * op.residual.stride[2];
      copy_row(op.residual, from, op.out, out, op.hidden);
    } else {
      for (int64_t j = 0; j < op.hidden; ++j) std::memset(out + j * op.out.stride[3], 0, item);
    }
  }
}

}  // namespace

const BottleneckKernels bottleneck_float = {
    kLanes<float>, scratch_bytes<float>, pack<float>, forward<float>, keep,
};
const BottleneckKernels bottleneck_double = {
    kLanes<double>, scratch_bytes<double>, pack<double>, forward<double>, keep,
};

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
