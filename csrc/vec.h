// Vectors of FASTADAPTER_VECTOR_BYTES on GCC/Clang vector extensions: one source for every instruction set.
// Everything is static or a template in the namespace of the instruction set, see gated_prefix_kernel.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef FASTADAPTER_ISA
#error "compile with -DFASTADAPTER_ISA=isa_default, isa_avx2 or isa_avx512"
#endif
#ifndef FASTADAPTER_VECTOR_BYTES
#if defined(__AVX512F__)
#define FASTADAPTER_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTADAPTER_VECTOR_BYTES 32
#else
#define FASTADAPTER_VECTOR_BYTES 16
#endif
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTADAPTER_SHUFFLEVECTOR 1
#endif
#endif

namespace fastadapter {
namespace FASTADAPTER_ISA {

template <class C>
constexpr int kLanes = FASTADAPTER_VECTOR_BYTES / static_cast<int>(sizeof(C));

template <class E, int N>
struct VecOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
  typedef E unaligned __attribute__((vector_size(N * sizeof(E)), aligned(sizeof(E)), may_alias));
};
template <class C>
using Vec = typename VecOf<C, kLanes<C>>::type;

using VecU32 = typename VecOf<uint32_t, kLanes<float>>::type;
using VecU16 = typename VecOf<uint16_t, kLanes<float>>::type;
using VecU16Unaligned = typename VecOf<uint16_t, kLanes<float>>::unaligned;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

static inline Vec<float> load(const float* p) {
  return *reinterpret_cast<const VecOf<float, kLanes<float>>::unaligned*>(p);
}
static inline Vec<double> load(const double* p) {
  return *reinterpret_cast<const VecOf<double, kLanes<double>>::unaligned*>(p);
}
static inline void store(float* p, Vec<float> v) {
  *reinterpret_cast<VecOf<float, kLanes<float>>::unaligned*>(p) = v;
}
static inline void store(double* p, Vec<double> v) {
  *reinterpret_cast<VecOf<double, kLanes<double>>::unaligned*>(p) = v;
}

// ---- half types ----

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

static inline Vec<float> load(const BFloat16* p) {
  const VecU16 bits = *reinterpret_cast<const VecU16Unaligned*>(p);
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, VecU32) << 16);
}
// Round to nearest even; NaN keeps its sign and stays a NaN.
static inline void store(BFloat16* p, Vec<float> v) {
  const VecU32 u = bit_cast<VecU32>(v);
  const VecU32 rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  const VecU32 quiet = (u >> 16) | 0x40u;
  const VecU32 is_nan = bit_cast<VecU32>(v != v);
  const VecU32 bits = (quiet & is_nan) | (rounded & ~is_nan);
  *reinterpret_cast<VecU16Unaligned*>(p) = __builtin_convertvector(bits, VecU16);
}

#if defined(__F16C__) && FASTADAPTER_VECTOR_BYTES >= 32
static inline Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; i += 8) {
    const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    std::memcpy(reinterpret_cast<float*>(&v) + i, &part, sizeof(part));
  }
  return v;
}
static inline void store(Half* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; i += 8) {
    __m256 part;
    std::memcpy(&part, reinterpret_cast<float*>(&v) + i, sizeof(part));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
  }
}
#else
static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude < 0x400u) {  // zero and subnormals: magnitude * 2^-24 is exact
    return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  }
  const uint32_t exponent_shift = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // Inf/NaN : normal
  return bit_cast<float>(sign | ((magnitude << 13) + exponent_shift));
}
static inline uint16_t float_to_half(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                        // below 2^-14: the addition rounds at 2^-24
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(sum) - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}
static inline Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
}
static inline void store(Half* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
}
#endif

// A product as it was rounded: the compiler must not fuse it into a sum that follows.
template <class V>
static inline V rounded(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// ---- sums across lanes ----

// Lane `i` of the low half of the result comes from `a`, of the high half from `b`, within every scope of
// `scope` lanes; even (odd = 0) or odd chunks of `chunk` lanes are kept.
static constexpr int half_of(int i, int scope, int chunk, int odd, int lanes) {
  const int in_scope = i % scope, half = scope / 2;
  const int from_b = in_scope >= half;
  const int kept = (in_scope - from_b * half) / chunk;
  return from_b * lanes + (i - in_scope) + (2 * kept + odd) * chunk + in_scope % chunk;
}

template <class C, int kScope, int kChunk, int kOdd, std::size_t... I>
static inline Vec<C> halves(Vec<C> a, Vec<C> b, std::index_sequence<I...>) {
  constexpr int n = kLanes<C>;
#ifdef FASTADAPTER_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b, half_of(I, kScope, kChunk, kOdd, n)...);
#else
  using Index = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, typename VecOf<Index, n>::type{half_of(I, kScope, kChunk, kOdd, n)...});
#endif
}

template <class C, int kScope, int kChunk>
static inline Vec<C> add_halves(Vec<C> a, Vec<C> b) {
  constexpr auto lanes = std::make_index_sequence<kLanes<C>>{};
  return halves<C, kScope, kChunk, 0>(a, b, lanes) + halves<C, kScope, kChunk, 1>(a, b, lanes);
}

// Lane i of the result is the sum over the lanes of v[i]. Stages stay within 128 bits while they can.
template <class C>
static inline Vec<C> sum_each(Vec<C>* v) {
  constexpr int n = kLanes<C>, n128 = 16 / static_cast<int>(sizeof(C));
  int count = n;
  if constexpr (n128 == 4) {
    for (int i = 0; i < count / 2; ++i) v[i] = add_halves<C, 4, 1>(v[2 * i], v[2 * i + 1]);
    count /= 2;
  }
  for (int i = 0; i < count / 2; ++i) v[i] = add_halves<C, n128, 1>(v[2 * i], v[2 * i + 1]);
  count /= 2;
  if constexpr (n > n128) {
    for (int i = 0; i < count / 2; ++i) v[i] = add_halves<C, n, n128>(v[2 * i], v[2 * i + 1]);
    count /= 2;
  }
  if constexpr (n > 2 * n128) v[0] = add_halves<C, n, n128>(v[0], v[1]);
  static_assert(n <= 4 * n128, "vectors of at most 64 bytes");
  return v[0];
}

// ---- exp ----

// For x <= 0, at most 1 ulp from exp (measured); below 2^-126 the result is 0. NaN stays NaN.
static inline Vec<float> exp(Vec<float> x) {
  constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
  constexpr float kRound = 0x1.8p+23f;  // adding it rounds to an integer, kept in the low bits
  constexpr float kLowest = -0x1.5d58ap+6f;
  const Vec<float> clamped = x < kLowest ? Vec<float>{} + kLowest : x;
  const Vec<float> shifted = clamped * kLog2e + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (clamped - n * kLn2High) - n * kLn2Low;
  // Remez fit of (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, relative error of exp 3e-9.
  Vec<float> q = r * 0x1.6a23dp-10f + 0x1.123a2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Vec<float> mantissa = (q * (r * r) + r) + 1.0f;
  const VecU32 exponent = (bit_cast<VecU32>(shifted) + 127u) << 23;
  const Vec<float> result = mantissa * bit_cast<Vec<float>>(exponent);
  return x < kLowest ? Vec<float>{} : result;
}

static inline Vec<double> exp(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

// -expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x: no digits cancel near 0. NaN stays NaN.
static inline Vec<float> tanh(Vec<float> x) {
  constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
  constexpr float kRound = 0x1.8p+23f;
  constexpr float kLowest = -20.0f;  // tanh is 1 from 9.02 on
  const VecU32 sign = bit_cast<VecU32>(x) & 0x80000000u;
  const Vec<float> y = -2.0f * bit_cast<Vec<float>>(bit_cast<VecU32>(x) ^ sign);
  const Vec<float> clamped = y < kLowest ? Vec<float>{} + kLowest : y;
  const Vec<float> shifted = clamped * kLog2e + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (clamped - n * kLn2High) - n * kLn2Low;
  Vec<float> q = r * 0x1.6a23dp-10f + 0x1.123a2p-7f;  // as in exp
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Vec<float> power = bit_cast<Vec<float>>((bit_cast<VecU32>(shifted) + 127u) << 23);
  const Vec<float> expm1 = (q * (r * r) + r) * power + (power - 1.0f);
  return bit_cast<Vec<float>>(bit_cast<VecU32>(-expm1 / (expm1 + 2.0f)) | sign);
}

static inline Vec<double> tanh(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}

}  // namespace FASTADAPTER_ISA
}  // namespace fastadapter
