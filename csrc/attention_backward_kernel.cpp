// Backward of attention with a prefix on CPUs, see docs/maths.md. Probabilities are computed again from the
// saved log-sum-exp, block by block.
//
// An item owns the gradient of its query rows, and sums those of its keys and its prefix over all of them.
// Where a sequence is split into several items, these sums are partial, and added in order by an item of
// their own; so are those of the prefix over the rows that use it. The split depends on a sequence's own
// sizes alone.
#include <cmath>

#include "attention_tiles.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

// Keys and values of a sequence or a prefix, as the products need them, and where their gradients are summed.
template <class C>
struct Operands {
  C *key_columns, *value_columns, *key_rows;  // panels
  C *grad_key, *grad_value;                   // (count, padded_dim), or null

  void take(Arena& arena, int64_t count, int64_t dim) {
    arena.take(key_columns, count * dim);
    arena.take(value_columns, count * dim);
    arena.take(key_rows, count * dim);
  }
};

template <class C>
struct Scratch {
  Operands<C> keys, prefix;
  C *rows, *row, *query, *grad_out, *query_rows, *grad_rows, *scores, *grad_scores, *mask, *grad_query;
  C *lse, *delta;
  double* sum;
  int64_t stride;  // of the tiles of scores
  int64_t bytes;

  Scratch(const Attention& op, char* memory) {
    Arena arena(memory);
    const int64_t N = kPanel<C>, dim = op.padded_dim;
    const int64_t keys_len = round_up(op.longest_keys, N), prefix_len = round_up(op.prefix_len, N);
    stride = max(kTileStride, op.mode == Mode::kGated ? prefix_len + 16 : 0);
    keys.take(arena, keys_len, dim);
    prefix.take(arena, prefix_len, dim);
    arena.take(keys.grad_key, op.need_key_value ? op.longest_keys * dim : 0);
    arena.take(keys.grad_value, op.need_key_value ? op.longest_keys * dim : 0);
    arena.take(rows, N * dim);
    arena.take(row, dim);
    for (C** block : {&query, &grad_out, &query_rows, &grad_rows, &grad_query})
      arena.take(*block, kQueryBlock * dim);
    arena.take(scores, kQueryBlock * stride);
    arena.take(grad_scores, kQueryBlock * stride);
    arena.take(mask, kTileStride);
    arena.take(lse, kQueryBlock);
    arena.take(delta, kQueryBlock);
    arena.take(sum, dim);
    bytes = arena.used();
    if (memory) std::memset(row, 0, dim * sizeof(C));  // columns from head_dim on stay zero
  }
};

template <class C>
int64_t scratch_bytes(const Attention& op) {
  return Scratch<C>(op, nullptr).bytes;
}

// A block of query rows of one head.
template <class C>
struct Block {
  Matrix<C> query, grad_out;
  const Sequence& sequence;
  int64_t head, t, rows;
};

// ---- rows of scores ----

// Scores into probabilities p, gradients of p into gradients of the scores before scale; zeros outside
// `keys`.
template <class C>
inline void softmax_gradient(const Scores<C>& score, C* s, C* grad, int64_t width, Range keys, const C* mask,
                             C lse, C delta) {
  constexpr int64_t W = kLanes<C>;
  if (keys.begin >= keys.end) {
    std::memset(s, 0, width * sizeof(C));
    std::memset(grad, 0, width * sizeof(C));
    return;
  }
  // Where nothing is visible all scores are -inf, and so is lse: no -inf - -inf.
  const C shift = lse == -std::numeric_limits<C>::infinity() ? -lse : lse;
  const int64_t begin = keys.begin / W * W;
  if (score.plain) {
    for (int64_t j = begin; j < keys.end; j += W) {
      // lse holds the largest score as it was rounded, so at that key the difference has to vanish.
      const Vec<C> p = exp(rounded(load(s + j) * score.scale) - shift);
      store(s + j, p);
      store(grad + j, p * (load(grad + j) - delta));
    }
  } else {
    for (int64_t j = begin; j < keys.end; j += W) {
      Vec<C> x = rounded(load(s + j) * score.scale), slope = splat(C(1));
      if (score.softcap != 0) {
        const Vec<C> bounded = tanh(x / score.softcap);
        x = score.softcap * bounded;
        slope -= bounded * bounded;
      }
      if (mask) x += load(mask + j);
      const Vec<C> p = exp(x - shift);
      store(s + j, p);
      // The value of a hidden key may be anything.
      store(grad + j, p == 0 ? Vec<C>{} : p * (load(grad + j) - delta) * slope);
    }
  }
  clear_outside(s, fill_edges(s, keys, C(0)), width);
  clear_outside(grad, fill_edges(grad, keys, C(0)), width);
}

// The same for a gated prefix, whose delta comes from its own probabilities: returns it without the factor.
// The whole row is at hand, so it is normalised again: delta feels no rounding of lse.
template <class C>
inline C gated_gradient(const Scores<C>& score, C* s, C* grad, int64_t count, int64_t width, C lse,
                        C factor) {
  constexpr int64_t W = kLanes<C>;
  for (int64_t j = 0; j < count; j += W) {
    const Vec<C> x = rounded(load(s + j) * score.scale);
    store(s + j, exp(x - lse));
  }
  clear_outside(s, fill_edges(s, {0, count}, C(0)), width);
  clear_outside(grad, fill_edges(grad, {0, count}, C(0)), width);
  Vec<C> sums = {}, deltas = {};
  for (int64_t j = 0; j < count; j += W) sums += load(s + j);
  const C total = sum_lanes<C>(sums), sum = total == 0 ? C(1) : total;
  // Divided, not multiplied by 1 / sum: a prefix of one has a probability of exactly 1, and no gradient.
  for (int64_t j = 0; j < count; j += W) {
    const Vec<C> p = load(s + j) / sum;
    store(s + j, p);
    deltas += p * load(grad + j);
  }
  const C delta = sum_lanes<C>(deltas);
  for (int64_t j = 0; j < count; j += W) {
    const Vec<C> p = load(s + j) * factor;
    store(s + j, p);
    store(grad + j, p * (load(grad + j) - delta));
  }
  return delta;
}

// <a_r, b_r> of W rows at once, each with the chains of score_product: where a query sees a
// single key, delta and <dO, v> are the same number, and their difference is 0.
template <class C>
inline void dots(const C* a, const C* b, int64_t stride, int64_t n, C* out) {
  constexpr int64_t W = kLanes<C>;
  for (int64_t r = 0; r < W; ++r) out[r] = 0;
  for (int64_t first = 0; first < n; first += kScoreChain) {
    C sum[W] = {};
    for (int64_t j = first; j < min(first + kScoreChain, n); ++j) {
      for (int64_t r = 0; r < W; ++r) sum[r] += a[r * stride + j] * b[r * stride + j];
    }
    for (int64_t r = 0; r < W; ++r) out[r] += sum[r];
  }
}

// ---- blocks ----

// The products that follow from p and dS of the block against keys [begin, end).
template <class C>
inline void add_products(const Attention& op, const Scratch<C>& s, const Operands<C>& keys, int64_t total,
                         const Block<C>& block, int64_t begin, int64_t end) {
  const int64_t dim = op.padded_dim, count = end - begin;
  if (keys.grad_key) {
    add_product(count, dim, block.rows, s.scores, 1, s.stride, s.grad_rows, keys.grad_value + begin * dim,
                dim, block.rows);
    add_product(count, dim, block.rows, s.grad_scores, 1, s.stride, s.query_rows, keys.grad_key + begin * dim,
                dim, block.rows);
  }
  if (op.need_query) {
    add_product(block.rows, dim, count, s.grad_scores, s.stride, 1, keys.key_rows + begin * kPanel<C>,
                s.grad_query, dim, total);
  }
}

template <class C>
inline void score_products(const Attention& op, const Scratch<C>& s, const Operands<C>& keys,
                           const Block<C>& block, int64_t begin, int64_t width) {
  score_product(block.rows, width, op.head_dim, block.query, keys.key_columns + begin * op.head_dim, s.scores,
                s.stride);
  score_product(block.rows, width, op.head_dim, block.grad_out, keys.value_columns + begin * op.head_dim,
                s.grad_scores, s.stride);
}

// Keys of the sequence, or the prefix as part of the same softmax.
template <class C>
inline void attend(const Attention& op, const Scratch<C>& s, const Operands<C>& keys, int64_t total,
                   bool of_prefix, const Block<C>& block) {
  constexpr int64_t N = kPanel<C>;
  const Scores<C> score(op, of_prefix);
  const bool masked = !of_prefix && op.has_mask;
  const Range all =
      of_prefix ? Range{0, total} : visible_keys(op, block.sequence, block.t, block.t + block.rows);
  for (int64_t first = all.begin / kKeyBlock * kKeyBlock; first < all.end; first += kKeyBlock) {
    const int64_t begin = max(first, all.begin / N * N), end = min(first + kKeyBlock, all.end);
    const int64_t width = round_up(end - begin, N);
    score_products(op, s, keys, block, begin, width);
    for (int64_t r = 0; r < block.rows; ++r) {
      Range own = all;
      if (!of_prefix) own = visible_keys(op, block.sequence, block.t + r, block.t + r + 1);
      own = {max(own.begin, begin) - begin, min(own.end, end) - begin};
      if (masked) {
        const char* mask = at(op.mask, block.sequence.batch, block.head, block.t + r);
        read_mask(op, mask + begin * op.mask.stride[3], end - begin, s.mask);
      }
      softmax_gradient(score, s.scores + r * s.stride, s.grad_scores + r * s.stride, width, own,
                       masked ? s.mask : nullptr, s.lse[r], s.delta[r]);
    }
    add_products(op, s, keys, total, block, begin, end);
  }
}

// The gated prefix, one tile wide: its delta needs all of it.
template <class C>
inline void attend_gated(const Attention& op, const Scratch<C>& s, const Operands<C>& prefix,
                         const Block<C>& block, double* delta_sum) {
  const C factor = static_cast<const C*>(op.factor)[block.sequence.slot * op.heads + block.head];
  if (factor == 0 && !op.need_gate) return;
  const Scores<C> score(op, true);
  const int64_t width = round_up(op.prefix_len, kPanel<C>);
  score_products(op, s, prefix, block, 0, width);
  for (int64_t r = 0; r < block.rows; ++r) {
    const char* lse = at(op.prefix_lse, block.sequence.batch, block.head, block.sequence.first + block.t + r);
    *delta_sum += gated_gradient(score, s.scores + r * s.stride, s.grad_scores + r * s.stride, op.prefix_len,
                                 width, *reinterpret_cast<const C*>(lse), factor);
  }
  // A zero factor must win over Inf and NaN in the prefix.
  if (factor != 0) add_products(op, s, prefix, op.prefix_len, block, 0, op.prefix_len);
}

// ---- work items ----

template <class C>
inline void pack(const Attention& op, const Scratch<C>& s, const View& key, const char* first_key,
                 const View& value, const char* first_value, int64_t count, const Operands<C>& to) {
  const int64_t dim = op.padded_dim;
  pack_columns(key, first_key, count, op.head_dim, dim, s.rows, to.key_columns);
  pack_columns(value, first_value, count, op.head_dim, dim, s.rows, to.value_columns);
  if (op.need_query) pack_rows(key, first_key, count, op.head_dim, dim, s.row, to.key_rows);
}

template <class C>
inline void store_scaled(const View& x, char* first, int64_t count, int64_t head_dim, int64_t dim,
                         const C* rows, C scale, C* row) {
  constexpr int64_t W = kLanes<C>;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < dim; j += W) store(row + j, load(rows + i * dim + j) * scale);
    store_row(x, first + i * x.stride[2], head_dim, row);
  }
}

// Query rows of one head from `t` on.
template <class C>
inline void attend_rows(const Attention& op, const Scratch<C>& s, const Sequence& sequence, int64_t head,
                        int64_t t, int64_t rows, const Operands<C>& keys, const Operands<C>& prefix,
                        double* delta_sum) {
  const int64_t dim = op.padded_dim, token = sequence.first + t;
  const char* query = at(op.query, sequence.batch, head, token);
  const char* grad_out = at(op.grad_out, sequence.batch, head, token);
  const Block<C> block{read_rows(op.query, query, rows, op.head_dim, s.query, dim),
                       read_rows(op.grad_out, grad_out, rows, op.head_dim, s.grad_out, dim),
                       sequence,
                       head,
                       t,
                       rows};
  if (keys.grad_key || prefix.grad_key) {
    pack_rows(op.query, query, rows, op.head_dim, dim, s.row, s.query_rows);
    pack_rows(op.grad_out, grad_out, rows, op.head_dim, dim, s.row, s.grad_rows);
  }
  for (int64_t r = 0; r < rows; ++r)
    s.lse[r] = *reinterpret_cast<const C*>(at(op.lse, sequence.batch, head, token + r));
  constexpr int64_t W = kLanes<C>;
  for (int64_t first = 0; first < rows; first += W) {
    for (int64_t r = 0; r < W; ++r) {  // lanes without a row repeat the last
      const int64_t row = min(first + r, rows - 1);
      load_row(op.wide, at(op.wide, sequence.batch, head, token + row), op.head_dim, s.rows + r * dim);
      load_row(op.grad_out, grad_out + row * op.grad_out.stride[2], op.head_dim, s.rows + (W + r) * dim);
    }
    dots(s.rows, s.rows + W * dim, dim, op.head_dim, s.delta + first);
  }
  if (op.need_query) std::memset(s.grad_query, 0, rows * dim * sizeof(C));
  if (sequence.slot >= 0) {
    if (op.mode == Mode::kGated) {
      attend_gated(op, s, prefix, block, delta_sum);
    } else if (op.need_query || op.need_prefix) {
      attend(op, s, prefix, op.prefix_len, true, block);
    }
  }
  if (op.need_query || op.need_key_value) attend(op, s, keys, sequence.kv_len, false, block);
  if (op.need_query) {
    store_scaled(op.grad_query, at(op.grad_query, sequence.batch, head, token), rows, op.head_dim, dim,
                 s.grad_query, static_cast<C>(op.scale), s.rows);
  }
}

// Item: op.items[i].
template <class C>
void backward(const Attention& op, int64_t begin, int64_t end, char* memory) {
  Scratch<C> s(op, memory);
  const int64_t dim = op.padded_dim;
  C* const grad_keys = s.keys.grad_key;
  C* const grad_values = s.keys.grad_value;
  int64_t packed_sequence = -1, packed_head = -1;  // whose panels are in scratch
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = op.items[i];
    const Sequence& sequence = op.sequences[item.sequence];
    const int64_t kv = item.kv_head, kv_len = sequence.kv_len;
    if (packed_sequence != item.sequence || packed_head != kv) {
      packed_sequence = item.sequence, packed_head = kv;
      if (op.need_query || op.need_key_value) {
        pack(op, s, op.key, at(op.key, sequence.batch, kv, sequence.first), op.value,
             at(op.value, sequence.batch, kv, sequence.first), kv_len, s.keys);
      }
      if (sequence.slot >= 0) {
        pack(op, s, op.prefix_key, at(op.prefix_key, sequence.entry, kv, 0), op.prefix_value,
             at(op.prefix_value, sequence.entry, kv, 0), op.prefix_len, s.prefix);
      }
    }
    s.keys.grad_key = s.keys.grad_value = nullptr;
    if (op.need_key_value) {
      s.keys.grad_key = grad_keys, s.keys.grad_value = grad_values;
      if (sequence.parts > 1) {
        const int64_t part = sequence.first_part + kv * sequence.parts + item.part;
        s.keys.grad_key = static_cast<C*>(op.partial_keys) + 2 * part * op.longest_keys * dim;
        s.keys.grad_value = s.keys.grad_key + op.longest_keys * dim;
      }
      std::memset(s.keys.grad_key, 0, kv_len * dim * sizeof(C));
      std::memset(s.keys.grad_value, 0, kv_len * dim * sizeof(C));
    }
    s.prefix.grad_key = s.prefix.grad_value = nullptr;
    if (op.need_prefix && sequence.slot >= 0) {
      s.prefix.grad_key = static_cast<C*>(op.partial_prefix) + 2 * i * op.prefix_len * dim;
      s.prefix.grad_value = s.prefix.grad_key + op.prefix_len * dim;
      std::memset(s.prefix.grad_key, 0, 2 * op.prefix_len * dim * sizeof(C));
    }
    double* delta_sum = op.partial_gate + i * op.group;
    for (int64_t t = item.begin; t < item.end; t += kQueryBlock) {
      for (int64_t g = 0; g < op.group; ++g) {
        attend_rows(op, s, sequence, kv * op.group + g, t, min(kQueryBlock, item.end - t), s.keys, s.prefix,
                    op.mode == Mode::kGated ? delta_sum + g : nullptr);
      }
    }
    if (op.need_key_value && sequence.parts == 1) {
      store_scaled(op.grad_key, at(op.grad_key, sequence.batch, kv, sequence.first), kv_len, op.head_dim, dim,
                   s.keys.grad_key, static_cast<C>(op.scale), s.rows);
      store_scaled(op.grad_value, at(op.grad_value, sequence.batch, kv, sequence.first), kv_len, op.head_dim,
                   dim, s.keys.grad_value, C(1), s.rows);
    }
  }
}

// row = scale * the sum of `count` rows, `stride` apart, in double and in order.
template <class C>
inline void sum_rows(const C* rows, int64_t stride, int64_t count, int64_t dim, double* sum) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < dim; ++j) sum[j] += rows[i * stride + j];
  }
}
template <class C>
inline void store_sum(const Scratch<C>& s, const View& x, char* row, int64_t head_dim, int64_t dim,
                      double scale) {
  for (int64_t j = 0; j < dim; ++j) s.rows[j] = static_cast<C>(s.sum[j] * scale);
  store_row(x, row, head_dim, s.rows);
}

// Item: (sequence with parts, kv head).
template <class C>
void sum_keys(const Attention& op, int64_t begin, int64_t end, char* memory) {
  const Scratch<C> s(op, memory);
  const int64_t dim = op.padded_dim, half = op.longest_keys * dim;
  for (int64_t i = begin; i < end; ++i) {
    const Sequence& sequence = op.sequences[op.in_parts[i / op.kv_heads]];
    const int64_t kv = i % op.kv_heads;
    const C* partial =
        static_cast<const C*>(op.partial_keys) + 2 * half * (sequence.first_part + kv * sequence.parts);
    for (int64_t key = 0; key < sequence.kv_len; ++key) {
      for (int which = 0; which < 2; ++which) {
        const View& grad = which ? op.grad_value : op.grad_key;
        std::memset(s.sum, 0, dim * sizeof(double));
        sum_rows(partial + which * half + key * dim, 2 * half, sequence.parts, dim, s.sum);
        store_sum(s, grad, at(grad, sequence.batch, kv, sequence.first + key), op.head_dim, dim,
                  which ? 1.0 : op.scale);
      }
    }
  }
}

// Item: (entry, kv head). Sums over the rows that use the entry.
template <class C>
void sum_prefix(const Attention& op, int64_t begin, int64_t end, char* memory) {
  const Scratch<C> s(op, memory);
  const int64_t dim = op.padded_dim, half = op.prefix_len * dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t entry = i / op.kv_heads, kv = i % op.kv_heads;
    for (int64_t slot = 0; slot < op.prefix_len; ++slot) {
      for (int which = 0; which < 2; ++which) {
        const View& grad = which ? op.grad_prefix_value : op.grad_prefix_key;
        std::memset(s.sum, 0, dim * sizeof(double));
        for (int64_t k = op.entry_begin[entry]; k < op.entry_begin[entry + 1]; ++k) {
          const Sequence& sequence = op.sequences[op.entry_rows[k]];
          const int64_t first = sequence.first_item + kv * sequence.parts;
          const C* partial = static_cast<const C*>(op.partial_prefix) + 2 * half * first + which * half;
          sum_rows(partial + slot * dim, 2 * half, sequence.parts, dim, s.sum);
        }
        store_sum(s, grad, at(grad, op.entry_id[entry], kv, slot), op.head_dim, dim, which ? 1.0 : op.scale);
      }
    }
  }
}

template <class C>
constexpr AttentionBackward table() {
  return {scratch_bytes<C>, backward<C>, sum_keys<C>, sum_prefix<C>};
}

}  // namespace

const AttentionBackward attention_backward_float = table<float>();
const AttentionBackward attention_backward_double = table<double>();

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
