// What every CPU op does before and after its kernels: checks, views, memory, threads. Errors name op and
// argument. Included by the ops alone, never by code that is compiled per instruction set.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "view.h"

namespace fastadapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds below which a second thread is not worth waking

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<char[], Free>;

inline Buffer allocate(int64_t bytes) {
  return Buffer(static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t(64))));
}

// Memory of this thread for one function of a kernel at a time. Up to kKeptScratch bytes stay for the next
// call: decoding makes many short ones, and fresh memory is cold and costs page faults.
constexpr int64_t kKeptScratch = 1 << 22;

class ThreadScratch {
 public:
  explicit ThreadScratch(int64_t bytes) {
    struct Kept {
      Buffer memory;
      int64_t bytes = 0;
    };
    static thread_local Kept kept;
    if (bytes > kKeptScratch) {
      own_ = allocate(bytes);
      return;
    }
    if (bytes > kept.bytes) {
      kept.memory = allocate(bytes);
      kept.bytes = bytes;
    }
    kept_ = kept.memory.get();
  }
  ThreadScratch(const ThreadScratch&) = delete;
  char* get() const { return own_ ? own_.get() : kept_; }

 private:
  Buffer own_;
  char* kept_ = nullptr;
};

inline DType dtype_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float64, float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

inline View view(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must have 4 dims, got ", x.dim());
  View v{static_cast<char*>(x.data_ptr()), {}, dtype_of(op, name, x)};
  const int64_t item = static_cast<int64_t>(x.element_size());
  const auto strides = x.strides();
  for (int i = 0; i < 4; ++i) v.stride[i] = strides[i] * item;
  return v;
}

inline void check_sizes(const char* op, const char* name, const Tensor& x, const int64_t (&expected)[4]) {
  const auto sizes = x.sizes();
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(sizes[i] == expected[i], op, ": ", name, " must have size ", expected[i], " in dim ", i,
                    ", got ", sizes[i]);
  }
}

// The bank entries that a batch uses, and which of its rows use each: `rows` holds the rows without an
// adapter, then those of entry `id[0]` from `begin[0]` on, and so forth. Copied from row_ids once: what is
// checked here is what is used below, even if another thread writes to row_ids.
struct Entries {
  std::vector<int64_t> rows, id, begin;

  // `ids` of nullopt: every row uses entry 0 of a bank of one.
  Entries(const char* op, const std::optional<Tensor>& ids, int64_t num_rows, int64_t bank_size)
      : rows(num_rows) {
    if (!ids) {
      STD_TORCH_CHECK(bank_size == 1, op, ": row_ids must be given for a bank of ", bank_size, ", got None");
      std::iota(rows.begin(), rows.end(), 0);
      if (num_rows > 0) id = {0}, begin = {0};
      begin.push_back(num_rows);
      return;
    }
    std::vector<int64_t> row_id(num_rows);
    STD_TORCH_CHECK(ids->dim() == 1 && ids->size(0) == num_rows, op, ": row_ids must have shape (", num_rows,
                    ",)");
    STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Int, op, ": row_ids must be int32, got ",
                    torch::headeronly::toString(ids->scalar_type()));
    const int32_t* data = static_cast<const int32_t*>(ids->data_ptr());
    for (int64_t i = 0; i < num_rows; ++i) {
      row_id[i] = data[i * ids->stride(0)];
      STD_TORCH_CHECK(row_id[i] >= -1 && row_id[i] < bank_size, op, ": row_ids must be in [-1, ", bank_size,
                      "), got ", row_id[i]);
    }
    std::iota(rows.begin(), rows.end(), 0);
    std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return row_id[a] < row_id[b]; });
    int64_t last = -1;
    for (int64_t i = 0; i < num_rows; ++i) {
      if (row_id[rows[i]] == last) continue;
      last = row_id[rows[i]];
      id.push_back(last);
      begin.push_back(i);
    }
    begin.push_back(num_rows);
  }

  int64_t size() const { return static_cast<int64_t>(id.size()); }
  int64_t unadapted() const { return begin[0]; }
};

// f(begin, end) over the items; `work` is what all of them cost in multiply-adds.
template <class F>
void parallel(int64_t items, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kSerialWork * items / std::max<int64_t>(1, work));
  if (items <= grain) {
    if (items > 0) f(0, items);
  } else {
    torch::stable::parallel_for(0, items, grain, f);
  }
}

// Uninitialised, on the device of `x`, without the dispatcher's search by name.
inline Tensor fast_empty(const Tensor& x, int64_t dims, const int64_t* sizes, const int64_t* strides,
                         ScalarType dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype),
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

// With the sizes and strides of `x`.
inline Tensor empty_strided_like(const Tensor& x, ScalarType dtype) {
  return fast_empty(x, x.dim(), x.sizes().data(), x.strides().data(), dtype);
}

// What stands for a result that is not wanted, of shape (0,).
inline Tensor nothing(const Tensor& x, ScalarType dtype) {
  const int64_t size = 0, stride = 1;
  return fast_empty(x, 1, &size, &stride, dtype);
}

// torch.empty_like. The common case, dense without overlap, skips the dispatcher's search by name.
inline Tensor fast_empty_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dims = x.dim();
  if (dims > 4) return torch::stable::empty_like(x);
  int64_t size[4] = {1, 1, 1, 1}, stride[4] = {};
  std::copy(sizes.begin(), sizes.end(), size);
  std::copy(strides.begin(), strides.end(), stride);
  int order[4] = {0, 1, 2, 3};
  std::sort(order, order + 4, [&](int a, int b) { return stride[a] < stride[b]; });
  int64_t expected = 1;
  for (int i : order) {
    if (size[i] == 1) continue;
    if (stride[i] != expected) return torch::stable::empty_like(x);
    expected *= size[i];
  }
  return empty_strided_like(x, x.scalar_type());
}

}  // namespace fastadapter
