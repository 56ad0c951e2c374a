// Activation functions and their derivatives, on the vectors of vec.h; in double by the C library.
#pragma once

#include "bottleneck_kernel.h"
#include "vec.h"

namespace fastadapter {
namespace FASTADAPTER_ISA {
namespace {

template <class C>
struct ValueSlope {
  Vec<C> value, slope;
};

template <class C>
inline Vec<C> absolute(Vec<C> x) {
  return x < 0 ? -x : x;
}

// 1 / (1 + exp(-x)) and one minus it, both without cancellation.
template <class C>
inline ValueSlope<C> sigmoid(Vec<C> x) {
  const Vec<C> e = exp(-absolute<C>(x)), larger = C(1) / (e + C(1)), smaller = e * larger;
  return {x < 0 ? smaller : larger, x < 0 ? larger : smaller};
}

// exp(-z^2 / 2) and the normal distribution's cumulative function of z.
inline ValueSlope<float> normal(Vec<float> z) {
  const Vec<float> e = exp(z * z * -0.5f), a = absolute<float>(z);
  const Vec<float> u = 1.0f / (a * 0x1.0f876cp-2f + 1.0f);
  // Minimax fit of erfcx(a / sqrt(2)) / 2 in u = 1 / (1 + 0.375 a / sqrt(2)), relative error 1.2e-8.
  Vec<float> r = u * 0x1.f96b56p-6f - 0x1.26fd54p-3f;
  r = r * u + 0x1.bc4edap-3f;
  r = r * u - 0x1.d93f0ap-4f;
  r = r * u + 0x1.1970e2p-3f;
  r = r * u + 0x1.efc650p-5f;
  r = r * u + 0x1.a4b8bcp-4f;
  r = r * u + 0x1.af609cp-4f;
  r = r * u + 0x1.b162e6p-4f;
  const Vec<float> tail = e * (r * u);
  return {e, z < 0 ? tail : 1.0f - tail};
}
inline ValueSlope<double> normal(Vec<double> z) {
  ValueSlope<double> result = {};
  for (int i = 0; i < kLanes<double>; ++i) {
    result.value[i] = std::exp(-0.5 * z[i] * z[i]);
    result.slope[i] = 0.5 * std::erfc(-z[i] * 0.70710678118654752440);
  }
  return result;
}

inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> a = absolute<float>(x), e = exp(a * -2.0f), far = (1.0f - e) / (1.0f + e);
  // Minimax fit of (tanh(x) / x - 1) / x^2 up to 0.63, relative error of tanh 5e-9.
  const Vec<float> s = x * x;
  Vec<float> q = s * -0x1.7363d0p-8f + 0x1.519c80p-6f;
  q = q * s - 0x1.b827fcp-5f;
  q = q * s + 0x1.110692p-3f;
  q = q * s - 0x1.555530p-2f;
  const Vec<float> near = q * s * x + x;
  return a < 0.625f ? near : (x < 0 ? -far : far);
}
inline Vec<double> tanh(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}

// act(z) and act'(z).
template <class C, Activation kAct>
inline ValueSlope<C> activate(Vec<C> z) {
  const Vec<C> zero = {}, one = zero + C(1);
  if constexpr (kAct == Activation::kRelu) {
    return {z <= 0 ? zero : z, z > 0 ? one : zero};  // NaN stays NaN
  } else if constexpr (kAct == Activation::kGelu) {
    const ValueSlope<C> n = normal(z);
    return {z * n.slope, z * n.value * C(0.39894228040143267794) + n.slope};
  } else if constexpr (kAct == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 is the sigmoid of 2 u
    constexpr C kTwoFactor = C(1.59576912160573071176);
    const Vec<C> square = z * z;
    const ValueSlope<C> s = sigmoid<C>(z * (square * C(0.044715) + C(1)) * kTwoFactor);
    const Vec<C> inner = (square * C(3 * 0.044715) + C(1)) * kTwoFactor;
    return {z * s.value, z * s.value * s.slope * inner + s.value};
  } else if constexpr (kAct == Activation::kSilu) {
    const ValueSlope<C> s = sigmoid<C>(z);
    return {z * s.value, z * s.slope * s.value + s.value};
  } else if constexpr (kAct == Activation::kTanh) {
    const Vec<C> t = tanh(z);
    return {t, one - t * t};
  } else {
    return {z, one};
  }
}

// f.template operator()<Activation>() cannot be spelled in C++17: f gets the activation as a type.
template <Activation kAct>
struct OfActivation {
  static constexpr Activation value = kAct;
};
template <class F>
inline void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kRelu:
      return f(OfActivation<Activation::kRelu>{});
    case Activation::kGelu:
      return f(OfActivation<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(OfActivation<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(OfActivation<Activation::kSilu>{});
    case Activation::kTanh:
      return f(OfActivation<Activation::kTanh>{});
    case Activation::kIdentity:
      return f(OfActivation<Activation::kIdentity>{});
  }
}

}  // namespace
}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
