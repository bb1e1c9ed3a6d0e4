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
  MEMOS_HD static F to_float(U u) { return __builtin_convertvector((typename Vec<W>::I)u, F); }
  MEMOS_HD static U to_uint(F f) { return (U) __builtin_convertvector(f, typename Vec<W>::I); }
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

// a * b + c. REQUIRES: the product is exact, so that one rounding or two give the same bits.
template <class F>
MEMOS_HD F exact_mul_add(F a, F b, F c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__FMA__)
  if constexpr (sizeof(F) == 32) return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  return add(mul(a, b), c);
}

template <class F>
MEMOS_HD F abs_of(F x) {
  using U = typename Lanes<F>::U;
  return bit_cast<F>(bit_cast<U>(x) & 0x7fffffffu);
}

// Bytes and 16-bit numbers in memory <-> lanes. GCC 12 takes the portable forms apart into scalars:
// unpacking int4 with them runs at half the speed (5.0 instead of 12 GB/s).
template <int W>
MEMOS_HD typename Vec<W>::U load_bytes(const char* p) {
  using U = typename Vec<W>::U;
#if defined(__AVX512F__)
  if constexpr (W == 16) return (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
#if defined(__AVX2__)
  if constexpr (W == 8) return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
  return __builtin_convertvector(load_as<typename Vec<W>::U8>(p), U);
}
template <int W>
MEMOS_HD typename Vec<W>::U load_halves(const char* p) {
  using U = typename Vec<W>::U;
#if defined(__AVX512F__)
  if constexpr (W == 16) return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__AVX2__)
  if constexpr (W == 8) return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
  return __builtin_convertvector(load_as<typename Vec<W>::U16>(p), U);
}
// The low byte, or the low half, of each lane. `stream`: past the caches; p aligned to what is
// stored.
template <int W>
MEMOS_HD void store_bytes(char* p, typename Vec<W>::U u, bool stream) {
#if defined(__AVX512F__)
  if constexpr (W == 16) {
    const __m128i v = _mm512_cvtepi32_epi8((__m512i)u);
    return stream ? _mm_stream_si128((__m128i*)p, v) : _mm_storeu_si128((__m128i*)p, v);
  }
#endif
  (void)stream;
  store_as(p, __builtin_convertvector(u, typename Vec<W>::U8));
}
template <int W>
MEMOS_HD void store_halves(char* p, typename Vec<W>::U u, bool stream) {
#if defined(__AVX512F__)
  if constexpr (W == 16) {
    const __m256i v = _mm512_cvtepi32_epi16((__m512i)u);
    return stream ? _mm256_stream_si256((__m256i*)p, v) : _mm256_storeu_si256((__m256i*)p, v);
  }
#endif
  (void)stream;
  store_as(p, __builtin_convertvector(u, typename Vec<W>::U16));
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

// Lane i is the least (greatest) lane of row i, for W rows of W floats.
template <int W, bool kMin>
MEMOS_HD typename Vec<W>::F reduce_rows(const float* rows) {
  typename Vec<W>::F x[W];
  for (int i = 0; i < W; ++i) x[i] = load_as<typename Vec<W>::F>(rows + i * W);
#pragma GCC unroll 4
  for (int n = W; n > 1; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      const auto even = every_second<0, W>(x[2 * i], x[2 * i + 1]);
      const auto odd = every_second<1, W>(x[2 * i], x[2 * i + 1]);
      x[i] = kMin ? min_of(even, odd) : max_of(even, odd);
    }
  }
  return x[0];
}

// Stores past the caches where that was asked for. REQUIRES then: p aligned to the vector.
template <bool kStream, class U>
MEMOS_HD void store_line(void* p, U v) {
#if defined(__AVX512F__)
  if constexpr (kStream && sizeof(U) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (kStream && sizeof(U) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (kStream && sizeof(U) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
  store_as(p, v);
}

MEMOS_HD void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace memos::codec
