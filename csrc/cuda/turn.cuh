// Numbers that turn: read, turned by pairs, written back with one rounding.
#pragma once

#include "cuda/numbers.cuh"

namespace memos::cuda {
namespace {

// The float of the bits of a number, 16 of them in the low half.
template <i64 kDtype>
__device__ __forceinline__ float float_of(u32 bits) {
  if constexpr (kDtype == kF32)
    return bit_cast<float>(bits);
  else
    return number<kDtype>(bits);
}

template <i64 kDtype>
__device__ __forceinline__ float read_number(const char* p) {
  if constexpr (kDtype == kF32)
    return *reinterpret_cast<const float*>(p);
  else
    return float_of<kDtype>(*reinterpret_cast<const std::uint16_t*>(p));
}

template <i64 kDtype>
__device__ __forceinline__ void write_number(char* p, float x) {
  if constexpr (kDtype == kF32)
    *reinterpret_cast<float*>(p) = x;
  else
    *reinterpret_cast<std::uint16_t*>(p) = static_cast<std::uint16_t>(rounded<kDtype>(x));
}

template <i64 kDtype, int kCount>
__device__ __forceinline__ void floats_of(const Words& r, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    x[i] = float_of<kDtype>(kDtype == kF32 ? r.w[i] : r.w[i / 2] >> (16 * (i % 2)) & 0xffffu);
}

// kCount numbers in words of 16 bytes.
template <i64 kDtype, int kCount>
__device__ __forceinline__ void read_numbers(const char* p, float (&x)[kCount]) {
  floats_of<kDtype>(load_words<kCount * kItem<kDtype> / 4>(p), x);
}

template <i64 kDtype, int kCount>
__device__ __forceinline__ void write_numbers(char* p, const float (&x)[kCount]) {
  Words r{};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kDtype == kF32)
      r.w[i] = bit_cast<u32>(x[i]);
    else
      r.w[i / 2] |= (rounded<kDtype>(x[i]) & 0xffffu) << (16 * (i % 2));
  }
  store_words<kCount * kItem<kDtype> / 4>(p, r);
}

// What becomes of x, whose pair is with y: the second of it, or the first.
__device__ __forceinline__ float turned(float x, float y, float c, float s, bool second) {
  const float a = mul(x, c), b = mul(y, s);
  return second ? add(a, b) : sub(a, b);
}

__device__ __forceinline__ void turn(float& a, float& b, float c, float s) {
  const float x = sub(mul(a, c), mul(b, s));
  b = add(mul(b, c), mul(a, s));
  a = x;
}

}  // namespace
}  // namespace memos::cuda
