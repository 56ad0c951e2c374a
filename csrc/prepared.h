// Calls that are checked and prepared once and repeated with other activations: decoding does that at every
// layer of every token, when the weights of the model have pushed all that a call touches out of the caches.
#pragma once

#include <memory>

#include "host.h"

namespace fastadapter {

class Prepared {
 public:
  Prepared() = default;
  virtual ~Prepared() = default;
  Prepared(const Prepared&) = delete;

  // `other` is null where the op has one activation. Several threads may run it at a time.
  virtual Tensor run(const Tensor& x, const Tensor* other) const = 0;
};

// Keeps it under a number, which Python holds and gives back to fastadapter::release.
int64_t keep(std::shared_ptr<const Prepared> call);
std::shared_ptr<const Prepared> kept(int64_t number);

// Sizes and strides of what a call was prepared for.
class Layout {
 public:
  explicit Layout(const Tensor& x) : dtype_(x.scalar_type()), dims_(x.dim()) {
    STD_TORCH_CHECK(dims_ <= 4, "a prepared call takes up to 4 dims, got ", dims_);
    const auto sizes = x.sizes(), strides = x.strides();
    std::copy(sizes.begin(), sizes.end(), size_);
    std::copy(strides.begin(), strides.end(), stride_);
  }
  bool operator==(const Tensor& x) const {
    const auto sizes = x.sizes(), strides = x.strides();
    return x.dim() == dims_ && x.scalar_type() == dtype_ && std::equal(sizes.begin(), sizes.end(), size_) &&
           std::equal(strides.begin(), strides.end(), stride_);
  }

 private:
  ScalarType dtype_;
  int64_t dims_, size_[4] = {}, stride_[4] = {};
};

}  // namespace fastadapter
