// fastadapter::bottleneck and its backward for CPU tensors, on torch's stable ABI.
// Schemas, meta functions and autograd live in fastadapter/ops/bottleneck.py; the maths in docs/maths.md.
#include <string>
#include <tuple>

#include "activation_names.h"
#include "bottleneck_kernel.h"
#include "dispatch.h"
#include "host.h"
#include "prepared.h"

namespace fastadapter {
namespace {

constexpr const char* kOp = "bottleneck";
using OptionalTensor = std::optional<Tensor>;

struct Kernels {
  BottleneckKernels common;
  BottleneckBackwardKernels backward;
};

Kernels kernels(bool in_double) {
  switch (cpu_isa()) {
#ifdef FASTADAPTER_X86
    case Isa::kAvx512:
      if (in_double) return {isa_avx512::bottleneck_double, isa_avx512::bottleneck_backward_double};
      return {isa_avx512::bottleneck_float, isa_avx512::bottleneck_backward_float};
    case Isa::kAvx2:
      if (in_double) return {isa_avx2::bottleneck_double, isa_avx2::bottleneck_backward_double};
      return {isa_avx2::bottleneck_float, isa_avx2::bottleneck_backward_float};
#endif
    default:
      if (in_double) return {isa_default::bottleneck_double, isa_default::bottleneck_backward_double};
      return {isa_default::bottleneck_float, isa_default::bottleneck_backward_float};
  }
}

// (batch, rows, columns) or (batch, columns), in the terms of View.
View view_of(const char* name, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims, kOp, ": ", name, " must have ", dims, " dims, got ", x.dim());
  View v{static_cast<char*>(x.data_ptr()), {}, dtype_of(kOp, name, x)};
  const int64_t item = static_cast<int64_t>(x.element_size());
  v.stride[0] = x.stride(0) * item;
  v.stride[2] = dims == 3 ? x.stride(1) * item : 0;
  v.stride[3] = x.stride(dims - 1) * item;
  return v;
}

// The same with its sizes checked; no tensor is a view without data.
View view_of(const char* name, const OptionalTensor& x, const std::vector<int64_t>& sizes) {
  if (!x) return View{};
  const View v = view_of(name, *x, static_cast<int64_t>(sizes.size()));
  for (size_t i = 0; i < sizes.size(); ++i) {
    STD_TORCH_CHECK(x->size(i) == sizes[i], kOp, ": ", name, " must have size ", sizes[i], " in dim ", i,
                    ", got ", x->size(i));
  }
  return v;
}

Norm norm_of(const std::string& name) {
  if (name == "none") return Norm::kNone;
  if (name == "layer_norm") return Norm::kLayer;
  STD_TORCH_CHECK(name == "rms_norm", kOp, ": norm must be one of none, layer_norm, rms_norm, got '", name,
                  "'");
  return Norm::kRms;
}

struct Operands {
  const Tensor &x, &down_weight, &up_weight;
  const OptionalTensor &down_bias, &up_bias, &norm_weight, &norm_bias, &row_ids;
};

// One call: the arguments as the kernels see them, and everything that must outlive the kernels.
class Call {
 public:
  Bottleneck op{};
  Kernels kernel{};
  bool in_double;

  Call(const Operands& args, const std::string& activation, const std::string& norm, double norm_eps,
       double scale, bool repeated = false)
      : entries_(kOp, args.row_ids, batch_of(args.x), bank_of(args.down_weight)) {
    op.x = view_of("x", args.x, 3);
    op.q_len = args.x.size(1), op.hidden = args.x.size(2), op.size = args.down_weight.size(1);
    const int64_t n = args.down_weight.size(0);
    STD_TORCH_CHECK(op.hidden > 0 && op.size > 0, kOp,
                    ": hidden and bottleneck_size must be at least 1, got ", op.hidden, " and ", op.size);
    in_double = op.x.dtype == DType::kDouble;
    op.down = parameter("down_weight", args.down_weight, {n, op.size, op.hidden});
    op.up = parameter("up_weight", args.up_weight, {n, op.hidden, op.size});
    op.down_bias = parameter("down_bias", args.down_bias, {n, op.size});
    op.up_bias = parameter("up_bias", args.up_bias, {n, op.hidden});
    op.norm_weight = parameter("norm_weight", args.norm_weight, {n, op.hidden});
    op.norm_bias = parameter("norm_bias", args.norm_bias, {n, op.hidden});
    for (const View* like : {&op.up, &op.down_bias, &op.up_bias}) {
      STD_TORCH_CHECK(!like->data || like->dtype == op.down.dtype, kOp,
                      ": up_weight, down_bias and up_bias must have the dtype of down_weight");
    }
    op.activation = activation_of(kOp, activation);
    op.norm = norm_of(norm);
    STD_TORCH_CHECK(op.norm != Norm::kNone || (!args.norm_weight && !args.norm_bias), kOp,
                    ": norm_weight and norm_bias must be None where norm is 'none'");
    op.norm_eps = norm_eps, op.scale = scale;
    kernel = kernels(in_double);
    op.padded_size = round_up(op.size, kernel.common.lanes);
    op.padded_hidden = round_up(op.hidden, 2 * kernel.common.lanes);
    op.num_entries = entries_.size();
    op.entry_id = entries_.id.data(), op.batch_rows = entries_.rows.data(),
    op.entry_begin = entries_.begin.data();
    split(repeated);
  }
  Call(const Call&) = delete;

  // Packs what several blocks share. The forms in `needs` must be set.
  void pack() {
    const int64_t item = in_double ? 8 : 4, lanes = kernel.common.lanes;
    const int64_t vectors = op.padded_size / lanes, by_hidden = vectors < 2 ? 1 : vectors / 2;
    int64_t panels = 0, bytes = 0;
    for (int form = 0; form < kPackedForms; ++form) {
      const bool project = form == kDownByHidden || form == kUpByHidden;
      op.packed_bytes[form] = item * (project ? op.padded_size * op.hidden : op.padded_hidden * op.size);
      if (!op.needs[form]) continue;
      panels += project ? by_hidden : op.padded_hidden / (2 * lanes);
      bytes += op.packed_bytes[form] * slots();
    }
    if (slots() == 0) return;
    packed_ = allocate(bytes);
    bytes = 0;
    for (int form = 0; form < kPackedForms; ++form) {
      if (!op.needs[form]) continue;
      op.packed[form] = packed_.get() + bytes;
      bytes += op.packed_bytes[form] * slots();
    }
    parallel(slots() * panels, bytes / item,
             [&](int64_t begin, int64_t end) { kernel.common.pack(op, begin, end, nullptr); });
  }

  void run(BottleneckKernels::Function function, int64_t items, int64_t work) const {
    run(op, function, items, work);
  }
  void run(const Bottleneck& with, BottleneckKernels::Function function, int64_t items, int64_t work) const {
    if (items == 0) return;
    const int64_t bytes = kernel.common.scratch_bytes(with);
    parallel(items, work, [&](int64_t begin, int64_t end) {
      const ThreadScratch scratch(bytes);
      function(with, begin, end, scratch.get());
    });
  }
  void keep() const { keep(op); }
  void keep(const Bottleneck& with) const {
    const int64_t rows = entries_.unadapted() * op.q_len;
    if (rows > 0) {
      parallel(rows, rows * op.hidden,
               [&](int64_t begin, int64_t end) { kernel.common.keep(with, begin, end, nullptr); });
    }
  }

  // Whether anything goes through the adapter, by entry: some weight of the up projection is not zero.
  void find_contributing() {
    contributes_.reset(new bool[op.num_entries]);
    for (int64_t e = 0; e < op.num_entries; ++e) contributes_[e] = op.scale != 0 && any_nonzero(e);
    op.contributes = contributes_.get();
  }

  // Columns of the parameters' gradients.
  void split_parameters(bool down, bool up, bool down_bias, bool norm) {
    // All strips of a kind together: the rows that they share stay in cache.
    auto add = [&](Strip::Kind kind, int64_t entry, int64_t columns, int64_t width) {
      for (int64_t first = 0; first < columns; first += width)
        strips_.push_back({kind, entry, first, std::min(first + width, columns)});
    };
    for (int64_t e = 0; e < op.num_entries; ++e) {
      if (down) add(Strip::kDown, e, op.hidden, kBottleneckStrip);
      if (up) add(Strip::kUp, e, op.hidden, kBottleneckStrip);
      if (norm) add(Strip::kNorm, e, op.hidden, kBottleneckStrip);
      if (down_bias) add(Strip::kDownBias, e, op.size, op.size);
    }
    op.strips = strips_.data();
  }

  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t strips() const { return static_cast<int64_t>(strips_.size()); }
  int64_t rows() const { return (batch_of_rows() - entries_.unadapted()) * op.q_len; }
  int64_t product_work() const { return rows() * op.hidden * op.padded_size; }
  int64_t item() const { return in_double ? 8 : 4; }
  ScalarType compute_type() const { return in_double ? ScalarType::Double : ScalarType::Float; }

 private:
  static int64_t round_up(int64_t x, int64_t of) { return (x + of - 1) / of * of; }
  static int64_t batch_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3, kOp, ": x must have 3 dims, got ", x.dim());
    return x.size(0);
  }
  static int64_t bank_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3, kOp, ": down_weight must have 3 dims, got ", x.dim());
    return x.size(0);
  }
  int64_t batch_of_rows() const { return static_cast<int64_t>(entries_.rows.size()); }
  int64_t slots() const { return static_cast<int64_t>(slot_entry_.size()); }

  View parameter(const char* name, const OptionalTensor& x, const std::vector<int64_t>& sizes) const {
    const View v = view_of(name, x, sizes);
    STD_TORCH_CHECK(!v.data || v.dtype == op.x.dtype || (v.dtype == DType::kFloat && !in_double), kOp, ": ",
                    name, " must have the dtype of x or float32");
    return v;
  }

  // The rows of every entry in blocks of equal size, as far as that goes. A call that will be `repeated`
  // packs what one block alone would read as it lies: the products have the same bits.
  void split(bool repeated) {
    for (int64_t e = 0; e < op.num_entries; ++e) {
      const int64_t rows = (op.entry_begin[e + 1] - op.entry_begin[e]) * op.q_len;
      const int64_t parts = (rows + kBottleneckRows - 1) / kBottleneckRows;
      first_block_.push_back(blocks());
      for (int64_t begin = 0; begin < rows; begin += kBottleneckRows)
        blocks_.push_back({e, begin, std::min(begin + kBottleneckRows, rows)});
      const bool packed = parts > 1 || repeated;
      slot_.push_back(packed ? slots() : -1);
      if (packed) slot_entry_.push_back(e);
    }
    first_block_.push_back(blocks());
    op.blocks = blocks_.data(), op.first_block = first_block_.data();
    op.slot = slot_.data(), op.slot_entry = slot_entry_.data();
  }

  bool any_nonzero(int64_t entry) const {
    const View& up = op.up;
    const char* data = up.data + op.entry_id[entry] * up.stride[0];
    for (int64_t c = 0; c < op.hidden; ++c) {
      for (int64_t r = 0; r < op.size; ++r) {
        const char* at = data + c * up.stride[2] + r * up.stride[3];
        uint16_t half;
        if (up.dtype == DType::kDouble) {
          if (*reinterpret_cast<const double*>(at) != 0) return true;
        } else if (up.dtype == DType::kFloat) {
          if (*reinterpret_cast<const float*>(at) != 0) return true;
        } else {
          std::memcpy(&half, at, sizeof(half));
          if ((half & 0x7fff) != 0) return true;
        }
      }
    }
    return false;
  }

  Entries entries_;
  std::vector<int64_t> slot_, slot_entry_, first_block_;
  std::vector<Block> blocks_;
  std::vector<Strip> strips_;
  std::unique_ptr<bool[]> contributes_;
  Buffer packed_;
};

// z goes to `kept_z` if that is there.
Tensor run_forward(const Operands& args, const OptionalTensor& residual, const std::string& activation,
                   const std::string& norm, double norm_eps, double scale, Tensor* kept_z) {
  Call call(args, activation, norm, norm_eps, scale);
  Bottleneck& op = call.op;
  const Tensor& x = args.x;
  op.residual = view_of("residual", residual, {x.size(0), x.size(1), x.size(2)});
  STD_TORCH_CHECK(!residual || op.residual.dtype == op.x.dtype, kOp, ": residual must have the dtype of x");
  Tensor out = fast_empty_like(x);
  op.out = view_of("out", out, 3);
  if (kept_z) {
    *kept_z = torch::stable::new_empty(x, {x.size(0), x.size(1), op.size}, call.compute_type());
    op.kept_z = view_of("z", *kept_z, 3);
  }
  op.needs[kDownByHidden] = op.needs[kUpBySize] = true;
  call.pack();
  call.run(call.kernel.common.forward, call.blocks(), 2 * call.product_work());
  call.keep();
  return out;
}

Tensor bottleneck(const Tensor& x, const Tensor& down_weight, const Tensor& up_weight,
                  const OptionalTensor& down_bias, const OptionalTensor& up_bias,
                  const OptionalTensor& residual, const OptionalTensor& norm_weight,
                  const OptionalTensor& norm_bias, const OptionalTensor& row_ids,
                  const std::string& activation, const std::string& norm, double norm_eps, double scale) {
  return run_forward({x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, row_ids},
                     residual, activation, norm, norm_eps, scale, nullptr);
}

std::tuple<Tensor, Tensor> bottleneck_saving(const Tensor& x, const Tensor& down_weight,
                                             const Tensor& up_weight, const OptionalTensor& down_bias,
                                             const OptionalTensor& up_bias, const OptionalTensor& residual,
                                             const OptionalTensor& norm_weight,
                                             const OptionalTensor& norm_bias, const OptionalTensor& row_ids,
                                             const std::string& activation, const std::string& norm,
                                             double norm_eps, double scale) {
  Tensor z;
  Tensor out = run_forward({x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, row_ids},
                           residual, activation, norm, norm_eps, scale, &z);
  return {out, z};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients bottleneck_backward(const Tensor& grad_out, const Tensor& x, const Tensor& down_weight,
                              const Tensor& up_weight, const OptionalTensor& down_bias,
                              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                              const OptionalTensor& row_ids, const OptionalTensor& z,
                              const std::string& activation, const std::string& norm, double norm_eps,
                              double scale, bool add_grad_out, bool need_x, bool need_weights,
                              bool need_biases, bool need_norm) {
  const OptionalTensor none;
  Call call({x, down_weight, up_weight, down_bias, none, norm_weight, norm_bias, row_ids}, activation, norm,
            norm_eps, scale);
  Bottleneck& op = call.op;
  op.grad_out = view_of("grad_out", OptionalTensor(grad_out), {x.size(0), x.size(1), x.size(2)});
  STD_TORCH_CHECK(op.grad_out.dtype == op.x.dtype, kOp, ": grad_out must have the dtype of x");
  op.given_z = view_of("z", z, {x.size(0), x.size(1), op.size});
  STD_TORCH_CHECK(!z || (z->scalar_type() == call.compute_type() && z->is_contiguous()), kOp,
                  ": z must be what bottleneck_saving returned for x: contiguous, in float32 (float64 with "
                  "float64)");
  call.find_contributing();

  // Entries that no row uses have zero gradients; those of the others are written in full.
  const bool partly = op.num_entries < down_weight.size(0) || call.rows() == 0;
  auto gradient = [&](const OptionalTensor& parameter, bool need, std::vector<int64_t> sizes) {
    Tensor grad = torch::stable::new_empty(parameter ? *parameter : x,
                                           need && parameter ? sizes : std::vector<int64_t>{0});
    if (partly && grad.numel() > 0)
      std::memset(grad.mutable_data_ptr(), 0, grad.numel() * grad.element_size());
    return grad;
  };
  const int64_t n = down_weight.size(0);
  Tensor grad_x = need_x ? fast_empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_down = gradient(down_weight, need_weights, {n, op.size, op.hidden});
  Tensor grad_up = gradient(up_weight, need_weights, {n, op.hidden, op.size});
  Tensor grad_down_bias = gradient(down_bias, need_biases, {n, op.size});
  Tensor grad_up_bias = gradient(up_weight, need_biases, {n, op.hidden});
  Tensor grad_norm_weight = gradient(norm_weight, need_norm, {n, op.hidden});
  Tensor grad_norm_bias = gradient(norm_bias, need_norm, {n, op.hidden});
  op.add_grad_out = add_grad_out, op.need_x = need_x, op.need_weights = need_weights;
  op.need_biases = need_biases, op.need_norm = need_norm && (norm_weight || norm_bias);
  if (need_x) op.out = view_of("grad_x", grad_x, 3);
  if (need_weights) {
    op.grad_down = view_of("grad_down_weight", grad_down, 3);
    op.grad_up = view_of("grad_up_weight", grad_up, 3);
  }
  const bool need_down_bias = need_biases && down_bias;
  if (need_down_bias) op.grad_down_bias = view_of("grad_down_bias", grad_down_bias, 2);
  if (need_biases) op.grad_up_bias = view_of("grad_up_bias", grad_up_bias, 2);
  if (need_norm && norm_weight) op.grad_norm_weight = view_of("grad_norm_weight", grad_norm_weight, 2);
  if (need_norm && norm_bias) op.grad_norm_bias = view_of("grad_norm_bias", grad_norm_bias, 2);

  const bool below = need_x || need_weights || need_down_bias || op.need_norm;
  const Buffer hidden = allocate(need_weights ? call.rows() * op.padded_size * call.item() : 0);
  const Buffer grad_hidden =
      allocate(need_weights || need_down_bias ? call.rows() * op.padded_size * call.item() : 0);
  const Buffer statistics = allocate(op.norm != Norm::kNone ? call.rows() * 2 * call.item() : 0);
  const Buffer partial = allocate(op.need_norm ? call.blocks() * 2 * op.padded_hidden * call.item() : 0);
  if (need_weights) op.hidden_rows = hidden.get();
  if (need_weights || need_down_bias) op.grad_down_rows = grad_hidden.get();
  if (op.norm != Norm::kNone) op.statistics = statistics.get();
  if (op.need_norm) op.partial_norm = partial.get();
  if (below) {
    op.need_hidden = need_weights || op.activation != Activation::kIdentity;
    op.needs[kDownByHidden] = op.need_hidden && !z;
    op.needs[kUpByHidden] = true;
    op.needs[kDownBySize] = need_x || op.need_norm;
    call.pack();
    call.run(call.kernel.backward.rows, call.blocks(), 3 * call.product_work());
  }
  if (need_x) {
    if (add_grad_out) op.residual = op.grad_out;  // rows without an adapter
    call.keep();
  }
  if (call.rows() > 0) {
    call.split_parameters(need_weights, need_weights || need_biases, need_down_bias, op.need_norm);
    call.run(call.kernel.backward.parameters, call.strips(), 2 * call.product_work());
  }
  return {grad_x, grad_down, grad_up, grad_down_bias, grad_up_bias, grad_norm_weight, grad_norm_bias};
}

// Forward with x as the residual. Rows of other sizes than those it was prepared for are a call as ever.
class PreparedBottleneck final : public Prepared {
 public:
  PreparedBottleneck(const Operands& args, const std::string& activation, double scale)
      : down_weight_(args.down_weight),
        up_weight_(args.up_weight),
        down_bias_(args.down_bias),
        up_bias_(args.up_bias),
        row_ids_(args.row_ids),
        activation_(activation),
        scale_(scale),
        layout_(args.x),
        call_(args, activation, "none", 0.0, scale, true) {
    Bottleneck& op = call_.op;
    op.needs[kDownByHidden] = op.needs[kUpBySize] = true;
    call_.pack();
  }
  Tensor run(const Tensor& x, const Tensor*) const override {
    if (!(layout_ == x)) {
      const Operands args{x, down_weight_, up_weight_, down_bias_, up_bias_, none_, none_, row_ids_};
      return run_forward(args, x, activation_, "none", 0.0, scale_, nullptr);
    }
    Tensor out = fast_empty_like(x);
    Bottleneck op = call_.op;
    op.x.data = static_cast<char*>(x.data_ptr());
    op.residual = op.x;
    op.out = view_of("out", out, 3);
    call_.run(op, call_.kernel.common.forward, call_.blocks(), 2 * call_.product_work());
    call_.keep(op);
    return out;
  }

 private:
  const Tensor down_weight_, up_weight_;
  const OptionalTensor down_bias_, up_bias_, row_ids_, none_;
  const std::string activation_;
  const double scale_;
  const Layout layout_;
  Call call_;
};

int64_t bottleneck_prepared(const Tensor& x, const Tensor& down_weight, const Tensor& up_weight,
                            const OptionalTensor& down_bias, const OptionalTensor& up_bias,
                            const OptionalTensor& row_ids, const std::string& activation, double scale) {
  const OptionalTensor none;
  const Operands args{x, down_weight, up_weight, down_bias, up_bias, none, none, row_ids};
  return keep(std::make_shared<PreparedBottleneck>(args, activation, scale));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastadapter, m) {
  m.def(
      "bottleneck_prepared(Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, "
      "Tensor? up_bias, Tensor? row_ids, str activation, float scale) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("bottleneck_prepared", TORCH_BOX(&bottleneck_prepared));
  m.impl("bottleneck", TORCH_BOX(&bottleneck));
  m.impl("bottleneck_saving", TORCH_BOX(&bottleneck_saving));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
}

}  // namespace
}  // namespace fastadapter
