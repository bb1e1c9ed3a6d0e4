// The arithmetic of the codecs, once: g++ compiles it for vectors of lanes, nvcc for single
// numbers.
//
// F is float or a vector of floats, U the unsigned integer (vector) of the same lanes. Only +, -,
// *, comparisons and bit operations are used, each rounded on its own (-ffp-contract=off, __f*_rn),
// so every backend writes the same bytes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEMOS_HD __host__ __device__ __forceinline__
#else
#define MEMOS_HD inline __attribute__((always_inline))
#endif

#define MEMOS_INLINE __attribute__((always_inline))  // for lambdas

namespace memos::codec {
namespace {  // internal linkage: one object per instruction set, no weak symbols

constexpr float kFp16Max = 65504.0f;
constexpr float kFp8Max = 448.0f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
constexpr std::uint32_t kMagicBits = 0x4B400000u;

template <class F>
struct Lanes;
template <>
struct Lanes<float> {
  using U = std::uint32_t;
  MEMOS_HD static float to_float(U u) { return static_cast<float>(static_cast<int>(u)); }
  MEMOS_HD static U to_uint(float f) { return static_cast<U>(static_cast<int>(f)); }
};

template <class To, class From>
MEMOS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

#if defined(__CUDA_ARCH__)
MEMOS_HD float add(float a, float b) { return __fadd_rn(a, b); }
MEMOS_HD float sub(float a, float b) { return __fsub_rn(a, b); }
MEMOS_HD float mul(float a, float b) { return __fmul_rn(a, b); }
#else
template <class F>
MEMOS_HD F add(F a, F b) {
  return a + b;
}
template <class F>
MEMOS_HD F sub(F a, F b) {
  return a - b;
}
template <class F>
MEMOS_HD F mul(F a, F b) {
  return a * b;
}
#endif

// u < 2^31; exact below 2^24.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD F to_float(U u) {
  return Lanes<F>::to_float(u);
}

// Truncates. REQUIRES: f in [0, 2^31).
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD U to_uint(F f) {
  return Lanes<F>::to_uint(f);
}

// fp16 bits of x, rounded towards +infinity or -infinity. REQUIRES: |x| <= 65504, finite.
template <bool kUp, class F, class U = typename Lanes<F>::U>
MEMOS_HD U fp16_toward(F x) {
  const U bits = bit_cast<U>(x);
  const U magnitude = bits & 0x7fffffffu;
  const U negative = bits >> 31;
  const F scaled = mul(bit_cast<F>(magnitude), F{} + 16777216.0f);  // units of 2^-24
  const auto is_normal = magnitude >= U{} + (113u << 23);
  // Beyond the subnormals `scaled` may leave the range of the conversion: feed it zero there.
  const U small = to_uint<F>(is_normal ? F{} : scaled);
  const U normal = (magnitude >> 13) - (112u << 10);
  const U lost = is_normal ? magnitude & 0x1fffu : bit_cast<U>(sub(scaled, to_float<F>(small)));
  const U away = (lost != U{} ? U{} + 1u : U{}) & (kUp ? negative ^ 1u : negative);
  return ((is_normal ? normal : small) + away) | (negative << 15);
}

// fp16 bits of x, rounded to the nearest even; beyond the range it saturates at +-65504.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD U fp16_nearest(F x) {
  const U bits = bit_cast<U>(x);
  const U sign = (bits >> 16) & 0x8000u;
  U magnitude = bits & 0x7fffffffu;
  const U top = bit_cast<U>(F{} + kFp16Max);
  magnitude = magnitude > top ? top : magnitude;
  const U normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const U small = bit_cast<U>(add(bit_cast<F>(magnitude), F{} + 0.5f)) - bit_cast<U>(F{} + 0.5f);
  return sign | (magnitude >= U{} + (113u << 23) ? normal : small);
}

// The number of fp16 bits in the low half of each lane.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD F fp16_value(U h) {
  const U magnitude = h & 0x7fffu;
  const F normal = bit_cast<F>((magnitude << 13) + (112u << 23));
  const F small = mul(to_float<F>(magnitude), F{} + 5.9604644775390625e-8f);  // 2^-24
  const F value = magnitude >= U{} + 0x400u ? normal : small;
  return bit_cast<F>(bit_cast<U>(value) | ((h & 0x8000u) << 16));
}

// The same for the numbers of a source, where infinity and NaN (exponent 31) keep their meaning.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD F fp16_value_any(U h) {
  const F value = fp16_value<F>(h);
  const U special = ((h & 0x7fffu) << 13) | 0x7f800000u | ((h & 0x8000u) << 16);
  return (h & 0x7c00u) == U{} + 0x7c00u ? bit_cast<F>(special) : value;
}

// bf16 bits of a finite x, rounded to the nearest even.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD U bf16_rounded(F x) {  // in the upper half; the lower half is garbage
  const U bits = bit_cast<U>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// e4m3 bits of x, rounded to the nearest even. REQUIRES: |x| <= 448.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD U e4m3_nearest(F x) {
  const U bits = bit_cast<U>(x);
  const U magnitude = bits & 0x7fffffffu;
  const U normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  const U small =
      bit_cast<U>(add(bit_cast<F>(magnitude), F{} + 16384.0f)) - bit_cast<U>(F{} + 16384.0f);
  return ((bits >> 24) & 0x80u) | (magnitude >= U{} + (121u << 23) ? normal : small);
}

template <class F, class U = typename Lanes<F>::U>
MEMOS_HD F e4m3_value(U c) {
  const U magnitude = c & 0x7fu;
  const F normal = bit_cast<F>((magnitude << 20) + (120u << 23));
  const F small = mul(to_float<F>(magnitude), F{} + 0.001953125f);  // 2^-9
  const F value = magnitude >= U{} + 8u ? normal : small;
  return bit_cast<F>(bit_cast<U>(value) | ((c & 0x80u) << 24));
}

// What a group's numbers are coded with. `scale` and `zero` are the fp16 bits that are stored.
template <class F>
struct Group {
  typename Lanes<F>::U scale, zero;
  F zero_value, inverse;
};

template <class F>
MEMOS_HD F inverse_of(F scale) {
  return scale > F{} ? (F{} + 1.0f) / scale : F{};
}

// Integer codes in [0, levels] for numbers in [lo, hi]. The zero is rounded down and the scale up,
// so that no code can leave the range and nothing needs clamping.
template <class F>
MEMOS_HD Group<F> integer_group(F lo, F hi, float levels) {
  Group<F> g;
  g.zero = fp16_toward<false>(add(lo, F{}));  // -0 + 0 = +0
  g.zero_value = fp16_value<F>(g.zero);
  // Of zeros of both signs any may be the highest: the scale is +0 then, whichever it was.
  g.scale = fp16_toward<true>(mul(add(sub(hi, g.zero_value), F{}), F{} + 1.0f / levels));
  g.inverse = inverse_of(fp16_value<F>(g.scale));
  return g;
}

template <class F>
MEMOS_HD Group<F> fp8_group(F magnitude) {
  Group<F> g;
  g.zero = typename Lanes<F>::U{};
  g.zero_value = F{};
  g.scale = fp16_toward<true>(mul(magnitude, F{} + 1.0f / kFp8Max));
  g.inverse = inverse_of(fp16_value<F>(g.scale));
  return g;
}

// kMagic + code: the low bits are the code, the others tell a number that was out of range.
template <class F>
MEMOS_HD F integer_code(F x, F zero, F inverse) {
  return add(mul(sub(x, zero), inverse), F{} + kMagic);
}

// 1 / sqrt(n) of the rotation by Hadamard(n), n a power of two.
MEMOS_HD float hadamard_norm(std::int64_t n) {
  float norm = 1.0f;
  for (; n >= 4; n /= 4) norm *= 0.5f;
  return n == 2 ? norm * 0.70710678118654752440f : norm;
}

}  // namespace
}  // namespace memos::codec
