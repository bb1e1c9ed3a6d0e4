// Eight neighbouring channels at a time: numbers in memory <-> floats <-> codes. The arithmetic is
// that of codec/arith.h; the instructions that stand in for it convert exactly, or round once to
// the nearest even as it does.
#pragma once

#include "codec/layout.h"
#include "cuda/runtime.h"

namespace memos::cuda {
namespace {

using namespace memos::codec;
using u32 = std::uint32_t;

__device__ __forceinline__ float lesser(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fminf(a, b);
#else
  return a < b ? a : b;
#endif
}
__device__ __forceinline__ float greater(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
__device__ __forceinline__ float clamped(float x, float top) {
  return lesser(greater(x, -top), top);
}
__device__ __forceinline__ float made_fit(float x) { return x == x ? clamped(x, kFp16Max) : 0.0f; }

// a * b + c. REQUIRES: the product is exact, so that one rounding or two give the same bits.
__device__ __forceinline__ float exact_mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return add(mul(a, b), c);
#endif
}

// The float of fp16 bits; infinity and NaN keep their meaning.
__device__ __forceinline__ float from_fp16(u32 bits) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<unsigned short>(bits)));
  return x;
#else
  return fp16_value_any<float>(bits & 0xffffu);
#endif
}

// fp16 bits of two numbers, saturated.
__device__ __forceinline__ u32 to_fp16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;"
      : "=r"(bits)
      : "f"(clamped(high, kFp16Max)), "f"(clamped(low, kFp16Max)));
  return bits;
#else
  return fp16_nearest(low) | (fp16_nearest(high) << 16);
#endif
}

template <i64 kDtype>
constexpr int kItem = kDtype == kF32 ? 4 : 2;

// The float of 16 bits in the low half.
template <i64 kDtype>
__device__ __forceinline__ float number(u32 bits) {
  return kDtype == kBf16 ? bit_cast<float>(bits << 16) : from_fp16(bits & 0xffffu);
}

// 16 bits of x, rounded to the nearest even; beyond the range infinity, and NaN stays.
template <i64 kDtype>
__device__ __forceinline__ u32 rounded(float x) {
  if constexpr (kDtype == kBf16) {
    return (x == x ? bf16_rounded(x) : bit_cast<u32>(x) | 0x00400000u) >> 16;
  } else {
#if defined(__CUDA_ARCH__)
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const float size = bit_cast<float>(bit_cast<u32>(x) & 0x7fffffffu);
    const u32 special = size == size ? 0x7c00u : 0x7e00u;
    return (size < 65520.0f ? fp16_nearest(size) : special) | ((bit_cast<u32>(x) >> 16) & 0x8000u);
#endif
  }
}

// Memory. With kAligned every address is a multiple of its access; else numbers are read and
// written one by one, packed bytes byte by byte.

struct Words {
  u32 w[8];
};

template <int kWords>
__device__ __forceinline__ Words load_words(const char* p) {
  Words r{};
  if constexpr (kWords == 1) {
    r.w[0] = *reinterpret_cast<const u32*>(p);
  } else if constexpr (kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    r.w[0] = v.x, r.w[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(p + 4 * i);
      r.w[i] = v.x, r.w[i + 1] = v.y, r.w[i + 2] = v.z, r.w[i + 3] = v.w;
    }
  }
  return r;
}

template <int kWords>
__device__ __forceinline__ void store_words(char* p, const Words& r) {
  if constexpr (kWords == 1) {
    *reinterpret_cast<u32*>(p) = r.w[0];
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(p) = make_uint2(r.w[0], r.w[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4)
      *reinterpret_cast<uint4*>(p + 4 * i) = make_uint4(r.w[i], r.w[i + 1], r.w[i + 2], r.w[i + 3]);
  }
}

template <int kBytes>
__device__ __forceinline__ Words load_bytes(const char* p) {
  Words r{};
#pragma unroll
  for (int i = 0; i < kBytes; ++i)
    r.w[i / 4] |= static_cast<u32>(static_cast<unsigned char>(p[i])) << (8 * (i % 4));
  return r;
}
template <int kBytes>
__device__ __forceinline__ void store_bytes(char* p, const Words& r) {
#pragma unroll
  for (int i = 0; i < kBytes; ++i) p[i] = static_cast<char>(r.w[i / 4] >> (8 * (i % 4)));
}

// The 16 bits at p. Aligned ones are cut out of a whole word: no load is shorter than that, and
// the sections they stand in are padded to 16 bytes.
template <bool kAligned>
__device__ __forceinline__ u32 load_half(const char* p) {
  if constexpr (kAligned) {
    const auto address = reinterpret_cast<i64>(p);
    const u32 word = *reinterpret_cast<const u32*>(in_global(address & ~i64{3}));
    return (word >> (8 * (address & 2))) & 0xffffu;
  } else {
    return load_bytes<2>(p).w[0];
  }
}
template <bool kAligned>
__device__ __forceinline__ void store_half(char* p, u32 bits) {
  if constexpr (kAligned) {
    *reinterpret_cast<std::uint16_t*>(p) = static_cast<std::uint16_t>(bits);
  } else {
    p[0] = static_cast<char>(bits);
    p[1] = static_cast<char>(bits >> 8);
  }
}

// Numbers.

// Eight numbers as floats, made fit: NaN is 0, the rest within fp16.
template <i64 kDtype, bool kAligned>
__device__ __forceinline__ void load_numbers(const char* p, float (&x)[8]) {
  Words r{};
  if constexpr (kAligned) {
    r = load_words<2 * kItem<kDtype>>(p);
  } else if constexpr (kDtype == kF32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) r.w[i] = reinterpret_cast<const u32*>(p)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      r.w[i / 2] |= static_cast<u32>(reinterpret_cast<const std::uint16_t*>(p)[i])
                    << (16 * (i % 2));
  }
  // What tells that a number does not fit ends in the upper bit of its half.
  u32 misfits = 0;
  if constexpr (kDtype == kBf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      misfits |= (r.w[i] & 0x7fff7fffu) + 0x38803880u;  // |x| >= 2^16
      x[2 * i] = bit_cast<float>(r.w[i] << 16);
      x[2 * i + 1] = bit_cast<float>(r.w[i] & 0xffff0000u);
    }
  } else if constexpr (kDtype == kF16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      misfits |= (r.w[i] & 0x7fff7fffu) + 0x04000400u;  // exponent 31
      x[2 * i] = from_fp16(r.w[i]);
      x[2 * i + 1] = from_fp16(r.w[i] >> 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = bit_cast<float>(r.w[i]);
      misfits |= (r.w[i] & 0x7fffffffu) + (0x80000000u - 0x477fe001u);  // beyond 65504
    }
  }
  if (misfits & (kDtype == kF32 ? 0x80000000u : 0x80008000u)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = made_fit(x[i]);
  }
}

template <i64 kDtype, bool kAligned>
__device__ __forceinline__ void store_numbers(char* p, const float (&x)[8]) {
  Words r{};
  if constexpr (kDtype == kF32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) r.w[i] = bit_cast<u32>(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r.w[i] = kDtype == kF16
                   ? to_fp16_pair(x[2 * i], x[2 * i + 1])
                   : (bf16_rounded(x[2 * i]) >> 16) | (bf16_rounded(x[2 * i + 1]) & 0xffff0000u);
  }
  if constexpr (kAligned) {
    store_words<2 * kItem<kDtype>>(p, r);
  } else if constexpr (kDtype == kF32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) reinterpret_cast<u32*>(p)[i] = r.w[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      reinterpret_cast<std::uint16_t*>(p)[i] =
          static_cast<std::uint16_t>(r.w[i / 2] >> (16 * (i % 2)));
  }
}

// Codes.

template <i64 kKind>
__device__ __forceinline__ Group<float> group_of(float lo, float hi) {
  if constexpr (kKind == kFp8)
    return fp8_group(add(lesser(greater(-lo, hi), kFp16Max), 0.0f));  // -0 + 0 = +0
  else
    return integer_group(clamped(lo, kFp16Max), clamped(hi, kFp16Max), levels_of<kKind>());
}

// Eight codes as they lie in memory. kStep 1: each channel has its zero and inverse; 0: one has.
template <i64 kKind, int kStep>
__device__ __forceinline__ Words encode(const float (&x)[8], const float* zero,
                                        const float* inverse) {
  Words r{};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    constexpr int kBits = kKind == kInt4 ? 4 : kKind == kInt2 ? 2 : 8, kPerWord = 32 / kBits;
    u32 code;
    if constexpr (kKind == kFp8)
      code = e4m3_nearest(clamped(mul(x[i], inverse[kStep * i]), kFp8Max));
    else
      code = bit_cast<u32>(integer_code(x[i], zero[kStep * i], inverse[kStep * i])) - kMagicBits;
    r.w[i / kPerWord] += code << (kBits * (i % kPerWord));
  }
  return r;
}

template <i64 kKind, bool kAligned>
__device__ __forceinline__ void store_codes(char* row, int channel, const Words& r) {
  if constexpr (kKind == kInt2) {
    store_half<kAligned>(row + channel / 4, r.w[0]);
  } else {
    constexpr int kBytes = kKind == kInt4 ? 4 : 8;
    char* p = row + channel * kBytes / 8;
    if constexpr (kAligned)
      store_words<kBytes / 4>(p, r);
    else
      store_bytes<kBytes>(p, r);
  }
}

template <i64 kKind, bool kAligned>
__device__ __forceinline__ Words load_codes(const char* row, int channel) {
  Words r{};
  if constexpr (kKind == kInt2) {
    r.w[0] = load_half<kAligned>(row + channel / 4);
    return r;
  } else {
    constexpr int kBytes = kKind == kInt4 ? 4 : 8;
    const char* p = row + channel * kBytes / 8;
    if constexpr (kAligned)
      return load_words<kBytes / 4>(p);
    else
      return load_bytes<kBytes>(p);
  }
}

template <i64 kKind, int kStep>
__device__ __forceinline__ void decode(const Words& r, const float* scale, const float* zero,
                                       float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    constexpr int kBits = kKind == kInt4 ? 4 : kKind == kInt2 ? 2 : 8, kPerWord = 32 / kBits;
    const u32 code = (r.w[i / kPerWord] >> (kBits * (i % kPerWord))) & ((1u << kBits) - 1);
    if constexpr (kKind == kFp8)
      x[i] = mul(e4m3_value<float>(code), scale[kStep * i]);
    else  // 8 bits by 11: the product is exact; and so is taking the magic number off again
      x[i] = exact_mul_add(sub(bit_cast<float>(kMagicBits | code), kMagic), scale[kStep * i],
                           zero[kStep * i]);
  }
}

// A scale or a zero as it is stored. One beyond fp16 was written by no encoder.
__device__ __forceinline__ float parameter(u32 bits) {
#if defined(__CUDA_ARCH__)
  return from_fp16(bits);
#else
  return fp16_value<float>(bits);
#endif
}

// work(kind as a type) for the kind of a scheme that quantises.
template <i64 kKind>
struct KindOf {
  static constexpr i64 value = kKind;
};
template <class Work>
__device__ __forceinline__ void with_kind(int kind, Work&& work) {
  switch (kind) {
    case kInt8:
      return work(KindOf<kInt8>{});
    case kInt4:
      return work(KindOf<kInt4>{});
    case kInt2:
      return work(KindOf<kInt2>{});
    default:
      return work(KindOf<kFp8>{});
  }
}

}  // namespace
}  // namespace memos::cuda
