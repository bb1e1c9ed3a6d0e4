// Vectors of W floats, written with the vector types of GCC and Clang: one body for SSE2, AVX2,
// AVX-512 and NEON. Intrinsics stand only where the compiler's own choice was measured slower.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "codec/arith.h"

namespace memos::codec {
namespace {

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef std::uint32_t U __attribute__((vector_size(4 * W)));
  typedef std::int32_t I __attribute__((vector_size(4 * W)));
  typedef std::uint16_t U16 __attribute__((vector_size(2 * W)));
  typedef std::uint64_t U64 __attribute__((vector_size(4 * W)));
  typedef std::uint8_t U8 __attribute__((vector_size(W)));
  typedef std::uint8_t U8Half __attribute__((vector_size(W / 2)));
};

template <int W>
struct VecLanes {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  MEMOS_HD static F to_float(U u) {
    return __builtin_convertvector((typename Vec<W>::I)u, F);
  }
  MEMOS_HD static U to_uint(F f) { return (U)__builtin_convertvector(f, typename Vec<W>::I); }
};
template <>
struct Lanes<Vec<4>::F> : VecLanes<4> {};
template <>
struct Lanes<Vec<8>::F> : VecLanes<8> {};
template <>
struct Lanes<Vec<16>::F> : VecLanes<16> {};

template <class T>
MEMOS_HD T load_as(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
MEMOS_HD void store_as(void* p, T v) {
  std::memcpy(p, &v, sizeof(v));
}

// The lesser or greater; `b` where `a` is NaN.
template <class F>
MEMOS_HD F min_of(F a, F b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return (F)_mm512_min_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(F) == 32) return (F)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}
template <class F>
MEMOS_HD F max_of(F a, F b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return (F)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(F) == 32) return (F)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <class F>
MEMOS_HD F abs_of(F x) {
  using U = typename Lanes<F>::U;
  return bit_cast<F>(bit_cast<U>(x) & 0x7fffffffu);
}

// Lane i gets lane i ^ kStep.
template <int kStep, class F, std::size_t... kI>
MEMOS_HD F swap_lanes(F x, std::index_sequence<kI...>) {
  return __builtin_shufflevector(x, x, (kI ^ kStep)...);
}
template <int W, int kStep, class F>
MEMOS_HD F swap_lanes(F x) {
  return swap_lanes<kStep>(x, std::make_index_sequence<W>{});
}

// a0 b0 a1 b1 ...: the first (kHalf = 0) or second half of the interleaved sequence.
template <int kHalf, int W, class F, std::size_t... kI>
MEMOS_HD F interleave(F a, F b, std::index_sequence<kI...>) {
  return __builtin_shufflevector(a, b, ((kHalf * W + kI) / 2 + (kI % 2) * W)...);
}
template <int kHalf, int W, class F>
MEMOS_HD F interleave(F a, F b) {
  return interleave<kHalf, W>(a, b, std::make_index_sequence<W>{});
}
// The even (kOdd = 0) or odd elements of a, b.
template <int kOdd, class F, std::size_t... kI>
MEMOS_HD F every_second(F a, F b, std::index_sequence<kI...>) {
  return __builtin_shufflevector(a, b, (2 * kI + kOdd)...);
}
template <int kOdd, int W, class F>
MEMOS_HD F every_second(F a, F b) {
  return every_second<kOdd>(a, b, std::make_index_sequence<W>{});
}

template <class U>
MEMOS_HD bool any_lane(U u) {
  std::uint32_t all = 0;
  for (std::size_t i = 0; i < sizeof(U) / 4; ++i) all |= u[i];
  return all != 0;
}

template <int W>
MEMOS_HD float min_lane(typename Vec<W>::F x) {
  if constexpr (W >= 16) x = min_of(x, swap_lanes<W, 8>(x));
  if constexpr (W >= 8) x = min_of(x, swap_lanes<W, 4>(x));
  x = min_of(x, swap_lanes<W, 2>(x));
  return min_of(x, swap_lanes<W, 1>(x))[0];
}
template <int W>
MEMOS_HD float max_lane(typename Vec<W>::F x) {
  if constexpr (W >= 16) x = max_of(x, swap_lanes<W, 8>(x));
  if constexpr (W >= 8) x = max_of(x, swap_lanes<W, 4>(x));
  x = max_of(x, swap_lanes<W, 2>(x));
  return max_of(x, swap_lanes<W, 1>(x))[0];
}

}  // namespace
}  // namespace memos::codec
