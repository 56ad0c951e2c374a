// Forward of attention with a prefix on CPUs, see docs/maths.md: an online softmax over blocks of keys, with
// everything between load and store in the compute type.
//
// Many query rows: keys and values are packed in panels once per sequence and kv head, and serve all blocks
// of query rows of the group's heads. Few query rows (decoding): keys are read once, where they lie, for all
// rows of the group; long ranges of keys are attended to in parts, which are joined in order. Which way a
// sequence goes, its blocks and its parts depend on its own sizes alone, and so do its bits.
#include <cmath>

#include "attention_tiles.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

constexpr int64_t kFewBlock = 128;  // keys
constexpr int64_t kFewStride = kFewBlock + 16;

// Softmax states of some query rows: for each the weighted sum of values, the largest score and the sum of
// weights.
template <class C>
struct State {
  C *acc, *top, *sum;

  void take(Arena& arena, int64_t rows, int64_t dim) {
    arena.take(acc, rows * dim);
    arena.take(top, rows);
    arena.take(sum, rows);
  }
  void clear(int64_t rows, int64_t dim) const {
    std::memset(acc, 0, rows * dim * sizeof(C));
    std::memset(sum, 0, rows * sizeof(C));
    for (int64_t r = 0; r < rows; ++r) top[r] = -std::numeric_limits<C>::infinity();
  }
  C lse(int64_t r) const { return sum[r] == 0 ? top[r] : top[r] + std::log(sum[r]); }
};

template <class C>
struct Scratch {
  C *keys, *values, *prefix_keys, *prefix_values;  // panels
  C *rows, *row, *query, *scores, *mask, *out, *block_keys, *block_values;
  State<C> state, prefix;
  int64_t bytes;

  Scratch(const Attention& op, char* memory) {
    Arena arena(memory);
    const int64_t N = kPanel<C>, dim = op.padded_dim;
    const int64_t keys_len = round_up(op.longest_keys, N);
    const int64_t prefix_len = op.longest_query > 0 ? round_up(op.prefix_len, N) : 0;
    const int64_t rows_len = max(kQueryBlock, op.few_rows);
    arena.take(keys, keys_len * dim);
    arena.take(values, keys_len * dim);
    arena.take(prefix_keys, prefix_len * dim);
    arena.take(prefix_values, prefix_len * dim);
    arena.take(rows, N * dim);
    arena.take(row, dim);
    arena.take(query, rows_len * dim);
    arena.take(scores, max(kQueryBlock * kTileStride, op.few_rows * kFewStride));
    arena.take(mask, kTileStride);
    arena.take(out, dim);
    arena.take(block_keys, op.few_rows ? kFewBlock * dim : 0);
    arena.take(block_values, op.few_rows ? kFewBlock * dim : 0);
    state.take(arena, rows_len, dim);
    prefix.take(arena, rows_len, dim);
    bytes = arena.used();
    // Columns from head_dim on stay zero.
    if (memory) std::memset(row, 0, dim * sizeof(C));
    if (memory) std::memset(query, 0, rows_len * dim * sizeof(C));
    if (memory && op.few_rows) std::memset(block_keys, 0, kFewBlock * dim * sizeof(C));
    if (memory && op.few_rows) std::memset(block_values, 0, kFewBlock * dim * sizeof(C));
  }
};

template <class C>
int64_t scratch_bytes(const Attention& op) {
  return Scratch<C>(op, nullptr).bytes;
}

inline const char* mask_row(const Attention& op, int64_t batch, int64_t head, int64_t t, int64_t key) {
  return at(op.mask, batch, head, t) + key * op.mask.stride[3];
}

// ---- the end of a row ----

// Writes query row `t` of a sequence from its states.
template <class C>
inline void finish(const Attention& op, const Scratch<C>& s, const Sequence& sequence, int64_t head,
                   int64_t t, int64_t r) {
  constexpr int64_t W = kLanes<C>;
  const int64_t dim = op.padded_dim, token = sequence.first + t;
  auto lse = [&](const View& x) { return reinterpret_cast<C*>(at(x, sequence.batch, head, token)); };
  char* out = at(op.out, sequence.batch, head, token);
  if (op.mode == Mode::kMerge && sequence.slot < 0) {
    copy_row(op.base, at(op.base, sequence.batch, head, token), op.out, out, op.head_dim);
    *lse(op.lse) = *lse(op.base_lse);
    return;
  }
  C* acc = s.state.acc + r * dim;
  C top = s.state.top[r], sum = s.state.sum[r];
  if (op.mode == Mode::kMerge) {
    const C base_lse = *lse(op.base_lse);
    if (base_lse != -std::numeric_limits<C>::infinity()) {
      const C both = base_lse > top ? base_lse : top;
      const C own = std::exp(top - both), others = std::exp(base_lse - both);
      load_row(op.base, at(op.base, sequence.batch, head, token), op.head_dim, s.out);
      for (int64_t j = 0; j < op.head_dim; j += W)
        store(acc + j, load(acc + j) * own + load(s.out + j) * others);
      sum = sum * own + others;
      top = both;
    }
  }
  const C scale = sum == 0 ? C(0) : 1 / sum;
  for (int64_t j = 0; j < dim; j += W) store(s.out + j, load(acc + j) * scale);
  if (op.save) *lse(op.lse) = sum == 0 ? -std::numeric_limits<C>::infinity() : top + std::log(sum);
  if (op.wide.data) store_row(op.wide, at(op.wide, sequence.batch, head, token), op.head_dim, s.out);
  if (op.mode == Mode::kGated) {
    if (op.save)
      *lse(op.prefix_lse) = sequence.slot < 0 ? -std::numeric_limits<C>::infinity() : s.prefix.lse(r);
    const C factor =
        sequence.slot < 0 ? C(0) : static_cast<const C*>(op.factor)[sequence.slot * op.heads + head];
    if (factor != 0) {
      const C weight = factor / s.prefix.sum[r];
      const C* term = s.prefix.acc + r * dim;
      for (int64_t j = 0; j < dim; j += W) store(s.out + j, load(s.out + j) + load(term + j) * weight);
    }
  }
  store_row(op.out, out, op.head_dim, s.out);
}

// Does the prefix softmax of these rows have to be computed?
template <class C>
inline bool wants_prefix(const Attention& op, const Sequence& sequence, int64_t head) {
  if (sequence.slot < 0) return false;
  if (op.mode != Mode::kGated || op.save) return true;
  return static_cast<const C*>(op.factor)[sequence.slot * op.heads + head] != 0;
}

// ---- many query rows ----

template <class C>
struct Panels {
  const C *keys, *values;
  int64_t count;
};

// A block of query rows of one head: which keys row r sees, and its masks.
template <class C>
struct Block {
  Matrix<C> query;
  int64_t rows;
  const Attention& op;
  const Sequence* sequence;  // null for the prefix: everything is visible
  int64_t head, t;

  Range keys() const { return visible_keys(op, *sequence, t, t + rows); }
  Range keys(int64_t r) const { return visible_keys(op, *sequence, t + r, t + r + 1); }
};

template <class C>
inline void attend(const Block<C>& block, const Panels<C>& panels, const Scores<C>& score,
                   const Scratch<C>& s, const State<C>& state) {
  constexpr int64_t N = kPanel<C>, W = kLanes<C>;
  const Attention& op = block.op;
  const int64_t dim = op.padded_dim;
  const bool masked = block.sequence && op.has_mask;
  const Range keys = block.sequence ? block.keys() : Range{0, panels.count};
  for (int64_t first = keys.begin / kKeyBlock * kKeyBlock; first < keys.end; first += kKeyBlock) {
    const int64_t begin = max(first, keys.begin / N * N), end = min(first + kKeyBlock, keys.end);
    const int64_t width = round_up(end - begin, N);
    score_product(block.rows, width, op.head_dim, block.query, panels.keys + begin * op.head_dim, s.scores,
                  kTileStride);
    for (int64_t r = 0; r < block.rows; ++r) {
      Range own = block.sequence ? block.keys(r) : keys;
      own = {max(own.begin, begin) - begin, min(own.end, end) - begin};
      if (masked && own.begin < own.end) {
        const char* mask = mask_row(op, block.sequence->batch, block.head, block.t + r, begin);
        read_mask(op, mask, end - begin, s.mask);
      }
      const C shrink = softmax_step(score, s.scores + r * kTileStride, width, own, masked ? s.mask : nullptr,
                                    state.top[r], state.sum[r]);
      if (shrink != 1) {
        C* acc = state.acc + r * dim;
        for (int64_t j = 0; j < dim; j += W) store(acc + j, load(acc + j) * shrink);
      }
    }
    add_product(block.rows, dim, end - begin, s.scores, kTileStride, 1, panels.values + begin * N, state.acc,
                dim, panels.count);
  }
}

template <class C>
inline void attend_many(const Attention& op, const Scratch<C>& s, const AttentionItem& item,
                        const Panels<C>& keys, const Panels<C>& prefix) {
  const Sequence& sequence = op.sequences[item.sequence];
  const Scores<C> score(op, false), prefix_score(op, true);
  for (int64_t g = 0; g < op.group; ++g) {
    const int64_t head = item.kv_head * op.group + g;
    const char* query = at(op.query, sequence.batch, head, sequence.first + item.begin);
    const int64_t rows = item.end - item.begin;
    Block<C> block{read_rows(op.query, query, rows, op.head_dim, s.query, op.padded_dim),
                   rows,
                   op,
                   nullptr,
                   head,
                   item.begin};
    s.state.clear(rows, op.padded_dim);
    if (wants_prefix<C>(op, sequence, head)) {
      const State<C>& state = op.mode == Mode::kGated ? s.prefix : s.state;
      if (op.mode == Mode::kGated) state.clear(rows, op.padded_dim);
      attend(block, prefix, prefix_score, s, state);
    }
    block.sequence = &sequence;
    attend(block, keys, score, s, s.state);
    for (int64_t r = 0; r < rows; ++r) finish(op, s, sequence, head, item.begin + r, r);
  }
}

// ---- few query rows ----

// s[r * stride + i] = <q[r], k[i]> for whole vectors of keys; those beyond `count` repeat the last.
template <class C>
inline void scores_of(int64_t rows, const C* q, Matrix<C> k, int64_t count, int64_t dim, C* s,
                      int64_t stride) {
  constexpr int64_t W = kLanes<C>;
  for (int64_t first = 0; first < count; first += W) {
    const C* key[W];
    for (int64_t i = 0; i < W; ++i) key[i] = k.rows + min(first + i, count - 1) * k.stride;
    for (int64_t r = 0; r < rows; ++r) {
      Vec<C> acc[W];
      for (Vec<C>& a : acc) a = Vec<C>{};
      for (int64_t j = 0; j < dim; j += W) {
        const Vec<C> x = load(q + r * dim + j);
        for (int64_t i = 0; i < W; ++i) acc[i] += x * load(key[i] + j);
      }
      store(s + r * stride + first, sum_each<C>(acc));
    }
  }
}

// acc[r] += sum over i of p[r, i] v[i], for kRows rows and kVectors vectors of columns.
template <class C, int kRows, int kVectors>
inline void weigh_tile(const C* p, int64_t stride, Matrix<C> v, int64_t count, C* acc, int64_t dim) {
  constexpr int64_t W = kLanes<C>;
  Vec<C> sum[kRows][kVectors];
  for (auto& row : sum) {
    for (Vec<C>& x : row) x = Vec<C>{};
  }
  for (int64_t i = 0; i < count; ++i) {
    Vec<C> row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(v.rows + i * v.stride + j * W);
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kVectors; ++j) sum[r][j] += p[r * stride + i] * row[j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) {
      C* to = acc + r * dim + j * W;
      store(to, load(to) + sum[r][j]);
    }
  }
}
template <class C, int kRows>
inline void weigh_rows(const C* p, int64_t stride, Matrix<C> v, int64_t count, C* acc, int64_t dim,
                       int64_t ldacc) {
  constexpr int64_t W = kLanes<C>;
  int64_t j = 0;
  auto from = [&](int64_t column) { return Matrix<C>{v.rows + column, v.stride}; };
  for (; j + 4 * W <= dim; j += 4 * W) weigh_tile<C, kRows, 4>(p, stride, from(j), count, acc + j, ldacc);
  for (; j < dim; j += W) weigh_tile<C, kRows, 1>(p, stride, from(j), count, acc + j, ldacc);
}
template <class C>
inline void weigh(int64_t rows, const C* p, int64_t stride, Matrix<C> v, int64_t count, C* acc, int64_t dim,
                  int64_t ldacc) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3)
    weigh_rows<C, 3>(p + r * stride, stride, v, count, acc + r * ldacc, dim, ldacc);
  if (rows - r == 2) weigh_rows<C, 2>(p + r * stride, stride, v, count, acc + r * ldacc, dim, ldacc);
  if (rows - r == 1) weigh_rows<C, 1>(p + r * stride, stride, v, count, acc + r * ldacc, dim, ldacc);
}

// Rows as they lie if they are whole vectors, else a padded copy.
template <class C>
inline Matrix<C> vector_rows(const View& x, const char* first, int64_t count, int64_t head_dim, C* buffer,
                             int64_t stride) {
  if (head_dim % kLanes<C> == 0) return read_rows(x, first, count, head_dim, buffer, stride);
  for (int64_t i = 0; i < count; ++i) load_row(x, first + i * x.stride[2], head_dim, buffer + i * stride);
  return {buffer, stride};
}

// All query rows of a sequence and kv head against keys [begin, end) at `key` and `value`; row r is query
// r % q_len of head r / q_len. `sequence` is null for the prefix.
template <class C>
inline void attend_few(const Attention& op, const Scratch<C>& s, const Sequence* sequence, int64_t kv_head,
                       const View& key_view, const char* key, const View& value_view, const char* value,
                       Range keys, int64_t q_len, const Scores<C>& score, const State<C>& state) {
  constexpr int64_t W = kLanes<C>;
  const int64_t dim = round_up(op.head_dim, W), ldacc = op.padded_dim, rows = op.group * q_len;
  const bool masked = sequence && op.has_mask;
  for (int64_t begin = keys.begin; begin < keys.end; begin += kFewBlock) {
    const int64_t count = min(kFewBlock, keys.end - begin), end = begin + count;
    const Matrix<C> k = vector_rows(key_view, key + begin * key_view.stride[2], count, op.head_dim,
                                    s.block_keys, op.padded_dim);
    const Matrix<C> v = vector_rows(value_view, value + begin * value_view.stride[2], count, op.head_dim,
                                    s.block_values, op.padded_dim);
    scores_of(rows, s.query, k, count, dim, s.scores, kFewStride);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = r % q_len;
      Range own = sequence ? visible_keys(op, *sequence, t, t + 1) : keys;
      own = {max(own.begin, begin) - begin, min(own.end, end) - begin};
      if (masked && own.begin < own.end) {
        const int64_t head = kv_head * op.group + r / q_len;
        read_mask(op, mask_row(op, sequence->batch, head, t, begin), count, s.mask);
      }
      const C shrink = softmax_step(score, s.scores + r * kFewStride, round_up(count, W), own,
                                    masked ? s.mask : nullptr, state.top[r], state.sum[r]);
      if (shrink != 1) {
        C* acc = state.acc + r * ldacc;
        for (int64_t j = 0; j < dim; j += W) store(acc + j, load(acc + j) * shrink);
      }
    }
    weigh(rows, s.scores, kFewStride, v, count, state.acc, dim, ldacc);
  }
}

// The query rows of a sequence and kv head, padded with zeros to whole vectors.
template <class C>
inline void load_few(const Attention& op, const Scratch<C>& s, const Sequence& sequence, int64_t kv_head) {
  const int64_t dim = round_up(op.head_dim, kLanes<C>), rows = op.group * sequence.q_len;
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = at(op.query, sequence.batch, kv_head * op.group + r / sequence.q_len,
                         sequence.first + r % sequence.q_len);
    load_row(op.query, row, op.head_dim, s.query + r * dim);
  }
}

template <class C>
inline void attend_few_prefix(const Attention& op, const Scratch<C>& s, const Sequence& sequence,
                              int64_t kv_head, const State<C>& state) {
  attend_few<C>(op, s, nullptr, kv_head, op.prefix_key, at(op.prefix_key, sequence.entry, kv_head, 0),
                op.prefix_value, at(op.prefix_value, sequence.entry, kv_head, 0), {0, op.prefix_len},
                sequence.q_len, Scores<C>(op, true), state);
}

// Gated: the prefix states of the rows.
template <class C>
inline void finish_few(const Attention& op, const Scratch<C>& s, const Sequence& sequence, int64_t kv_head) {
  const int64_t rows = op.group * sequence.q_len;
  if (op.mode == Mode::kGated) {
    bool wanted = false;
    for (int64_t g = 0; g < op.group; ++g) wanted |= wants_prefix<C>(op, sequence, kv_head * op.group + g);
    s.prefix.clear(rows, op.padded_dim);
    if (wanted) attend_few_prefix(op, s, sequence, kv_head, s.prefix);
  }
  for (int64_t r = 0; r < rows; ++r)
    finish(op, s, sequence, kv_head * op.group + r / sequence.q_len, r % sequence.q_len, r);
}

// The state of a part in memory: sums of values, then the largest score and the sum of weights.
template <class C>
inline C* part_state(const Attention& op, const Sequence& sequence, int64_t kv_head, int64_t part) {
  const int64_t size = op.few_rows * (op.padded_dim + 2);
  return static_cast<C*>(op.parts) + (sequence.first_part + kv_head * sequence.parts + part) * size;
}

template <class C>
inline void attend_part(const Attention& op, const Scratch<C>& s, const AttentionItem& item) {
  const Sequence& sequence = op.sequences[item.sequence];
  const int64_t rows = op.group * sequence.q_len, dim = op.padded_dim;
  load_few(op, s, sequence, item.kv_head);
  s.state.clear(rows, dim);
  if (item.begin == 0 && op.mode != Mode::kGated && sequence.slot >= 0)
    attend_few_prefix(op, s, sequence, item.kv_head, s.state);
  Range keys = visible_keys(op, sequence, 0, sequence.q_len);
  keys = {max(keys.begin, item.begin), min(keys.end, item.end)};
  attend_few<C>(op, s, &sequence, item.kv_head, op.key,
                at(op.key, sequence.batch, item.kv_head, sequence.first), op.value,
                at(op.value, sequence.batch, item.kv_head, sequence.first), keys, sequence.q_len,
                Scores<C>(op, false), s.state);
  if (sequence.parts == 1) {
    finish_few(op, s, sequence, item.kv_head);
    return;
  }
  C* state = part_state<C>(op, sequence, item.kv_head, item.part);
  std::memcpy(state, s.state.acc, rows * dim * sizeof(C));
  std::memcpy(state + rows * dim, s.state.top, rows * sizeof(C));
  std::memcpy(state + rows * (dim + 1), s.state.sum, rows * sizeof(C));
}

// Item: (sequence with parts, kv head). Joins the parts in order.
template <class C>
void join(const Attention& op, int64_t begin, int64_t end, char* memory) {
  constexpr int64_t W = kLanes<C>;
  constexpr C kNever = -std::numeric_limits<C>::infinity();
  const Scratch<C> s(op, memory);
  const int64_t dim = op.padded_dim;
  for (int64_t i = begin; i < end; ++i) {
    const Sequence& sequence = op.sequences[op.in_parts[i / op.kv_heads]];
    const int64_t kv_head = i % op.kv_heads, rows = op.group * sequence.q_len;
    load_few(op, s, sequence, kv_head);
    s.state.clear(rows, dim);
    for (int64_t part = 0; part < sequence.parts; ++part) {
      const C* state = part_state<C>(op, sequence, kv_head, part);
      for (int64_t r = 0; r < rows; ++r) {
        const C top = state[rows * dim + r], sum = state[rows * (dim + 1) + r];
        if (sum == 0) continue;  // saw nothing
        const C both = top > s.state.top[r] ? top : s.state.top[r];
        const C shift = both == kNever ? C(0) : both;  // scores that are all NaN
        const C own = std::exp(s.state.top[r] - shift), other = std::exp(top - shift);
        C* acc = s.state.acc + r * dim;
        for (int64_t j = 0; j < dim; j += W)
          store(acc + j, load(acc + j) * own + load(state + r * dim + j) * other);
        s.state.sum[r] = s.state.sum[r] * own + sum * other;
        s.state.top[r] = both;
      }
    }
    finish_few(op, s, sequence, kv_head);
  }
}

// ---- work items ----

// Item: op.items[i].
template <class C>
void forward(const Attention& op, int64_t begin, int64_t end, char* memory) {
  const Scratch<C> s(op, memory);
  const int64_t dim = op.padded_dim;
  int64_t packed_sequence = -1, packed_head = -1;  // whose panels are in scratch
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = op.items[i];
    const Sequence& sequence = op.sequences[item.sequence];
    if (sequence.few) {
      attend_part(op, s, item);
      continue;
    }
    if (packed_sequence != item.sequence || packed_head != item.kv_head) {
      packed_sequence = item.sequence, packed_head = item.kv_head;
      const char* key = at(op.key, sequence.batch, item.kv_head, sequence.first);
      const char* value = at(op.value, sequence.batch, item.kv_head, sequence.first);
      pack_columns(op.key, key, sequence.kv_len, op.head_dim, dim, s.rows, s.keys);
      pack_rows(op.value, value, sequence.kv_len, op.head_dim, dim, s.row, s.values);
      if (sequence.slot >= 0) {
        key = at(op.prefix_key, sequence.entry, item.kv_head, 0);
        value = at(op.prefix_value, sequence.entry, item.kv_head, 0);
        pack_columns(op.prefix_key, key, op.prefix_len, op.head_dim, dim, s.rows, s.prefix_keys);
        pack_rows(op.prefix_value, value, op.prefix_len, op.head_dim, dim, s.row, s.prefix_values);
      }
    }
    attend_many(op, s, item, {s.keys, s.values, sequence.kv_len},
                {s.prefix_keys, s.prefix_values, op.prefix_len});
  }
}

template <class C>
constexpr AttentionForward table() {
  return {kPanel<C>, kQueryBlock, scratch_bytes<C>, forward<C>, join<C>};
}

}  // namespace

const AttentionForward attention_forward_float = table<float>();
const AttentionForward attention_forward_double = table<double>();

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
