// The tensors of an adapter's file -> a slab: converted, transposed, padded. Included by one file
// per instruction set, which says how many floats a vector has (MEMOS_LANES).
#pragma once

#include "codec/layout.h"
#include "cpu/adapters.inl"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace memos::cpu {
namespace {

using namespace memos::codec;

constexpr i64 kSlabColumns = 64;  // of the source transposed at a time: whole lines are written

// W numbers as floats.
template <int W, i64 kFrom>
MEMOS_HD typename Vec<W>::F load_numbers(const char* p) {
  using F = typename Vec<W>::F;
  if constexpr (kFrom == kF32) {
    return load_as<F>(p);
  } else if constexpr (kFrom == kBf16) {
    return bit_cast<F>(load_halves<W>(p) << 16);
  } else {
#if defined(__AVX512F__)
    if constexpr (W == 16) return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__F16C__)
    if constexpr (W == 8) return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
    return fp16_value_any<F>(load_halves<W>(p));
  }
}

// Stores W floats, rounded once; adds to `bad` in each lane whose result is infinite or NaN.
template <int W, i64 kTo>
MEMOS_HD void store_numbers(char* p, typename Vec<W>::F x, typename Vec<W>::U& bad) {
  using U = typename Vec<W>::U;
  if constexpr (kTo == kF32) {
    bad -= (U)((bit_cast<U>(x) & 0x7f800000u) == U{} + 0x7f800000u);
    store_as(p, x);
  } else if constexpr (kTo == kBf16) {
    const U bits = bf16_or_nan(x);
    bad -= (U)((bits & 0x7f800000u) == U{} + 0x7f800000u);
    store_halves<W>(p, bits >> 16, false);
  } else {
    // 65520 and more become infinity; a NaN compares false.
    bad -= (U) ~(abs_of(x) < typename Vec<W>::F{} + 65520.0f);
#if defined(__AVX512F__)
    if constexpr (W == 16)
      return _mm256_storeu_si256((__m256i*)p,
                                 _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
    if constexpr (W == 8)
      return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
    store_halves<W>(p, fp16_or_special(x), false);
  }
}

// The same for one number.
template <i64 kFrom, i64 kTo>
MEMOS_HD i64 move_number(char* to, const char* from) {
  float x;
  if constexpr (kFrom == kF32)
    x = load_as<float>(from);
  else if constexpr (kFrom == kBf16)
    x = bit_cast<float>(std::uint32_t{load_as<std::uint16_t>(from)} << 16);
  else
    x = fp16_value_any<float>(std::uint32_t{load_as<std::uint16_t>(from)});
  if constexpr (kTo == kF32) {
    store_as(to, x);
    return (bit_cast<std::uint32_t>(x) & 0x7f800000u) == 0x7f800000u;
  } else if constexpr (kTo == kBf16) {
    const std::uint32_t bits = bf16_or_nan(x);
    store_as(to, static_cast<std::uint16_t>(bits >> 16));
    return (bits & 0x7f800000u) == 0x7f800000u;
  } else {
    const auto bits = static_cast<std::uint16_t>(fp16_or_special(x));
    store_as(to, bits);
    return (bits & 0x7c00u) == 0x7c00u;
  }
}

template <int W>
MEMOS_HD i64 sum_of(typename Vec<W>::U counts) {
  i64 sum = 0;
  for (int i = 0; i < W; ++i) sum += counts[i];
  return sum;
}

template <i64 kFrom, i64 kTo>
i64 move_numbers(char* to, const char* from, i64 n) {
  constexpr int W = MEMOS_LANES;
  typename Vec<W>::U bad{};
  i64 i = 0;
  for (; i + W <= n; i += W)
    store_numbers<W, kTo>(to + i * item_bytes(kTo),
                          load_numbers<W, kFrom>(from + i * item_bytes(kFrom)), bad);
  i64 count = sum_of<W>(bad);
  for (; i < n; ++i)
    count += move_number<kFrom, kTo>(to + i * item_bytes(kTo), from + i * item_bytes(kFrom));
  return count;
}

// W rows of W numbers, from_row bytes apart, to W rows of their columns.
template <int W, i64 kFrom, i64 kTo>
MEMOS_HD void transpose_tile(char* to, i64 to_row, const char* from, i64 from_row,
                             typename Vec<W>::U& bad) {
  typename Vec<W>::F x[W], y[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load_numbers<W, kFrom>(from + i * from_row);
#pragma GCC unroll 4
  for (int n = 1; n < W; n *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave<0, W>(x[i], x[i + W / 2]);
      y[2 * i + 1] = interleave<1, W>(x[i], x[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store_numbers<W, kTo>(to + i * to_row, x[i], bad);
}

// to[r, o] = from[o, r] for r in [r, R) and o in [first, last).
template <int W, i64 kFrom, i64 kTo>
i64 transpose_rows(char* to, i64 to_row, const char* from, i64 R, i64 r, i64 first, i64 last) {
  const i64 in = item_bytes(kFrom), out = item_bytes(kTo);
  typename Vec<W>::U bad{};
  i64 count = 0;
  const auto move = [&](i64 r, i64 o) MEMOS_INLINE {
    count += move_number<kFrom, kTo>(to + r * to_row + o * out, from + (o * R + r) * in);
  };
  for (; r + W <= R; r += W) {
    i64 o = first;
    for (; o + W <= last; o += W)
      transpose_tile<W, kFrom, kTo>(to + r * to_row + o * out, to_row, from + (o * R + r) * in,
                                    R * in, bad);
    for (; o < last; ++o)
      for (i64 i = r; i < r + W; ++i) move(i, o);
  }
  count += sum_of<W>(bad);
  if constexpr (W > 4) {
    count += transpose_rows<W / 2, kFrom, kTo>(to, to_row, from, R, r, first, last);
  } else {
    for (; r < R; ++r)
      for (i64 o = first; o < last; ++o) move(r, o);
  }
  return count;
}

template <i64 kFrom, i64 kTo>
i64 do_slab_job(const char* source, char* slab, const SlabJob& job) {
  const char* from = source + job.from;
  char* to = slab + job.to;
  const i64 width = job.transposed ? job.rows : job.columns;
  const i64 rows = job.transposed ? job.columns : job.rows;
  const i64 to_row = width * item_bytes(kTo);
  i64 bad = 0;
  if (job.transposed) {
    for (i64 o = 0; o < job.rows; o += kSlabColumns)
      bad += transpose_rows<MEMOS_LANES, kFrom, kTo>(
          to, to_row, from, job.columns, 0, o,
          o + kSlabColumns < job.rows ? o + kSlabColumns : job.rows);
  } else {
    bad = move_numbers<kFrom, kTo>(to, from, rows * width);
  }
  std::memset(to + rows * to_row, 0, job.end - job.to - rows * to_row);
  return bad;
}

template <i64 kTo>
i64 do_slab_jobs(const char* source, char* slab, const SlabJob* jobs, i64 first, i64 last) {
  i64 bad = 0;
  for (i64 i = first; i < last; ++i) {
    if (jobs[i].dtype == kF32)
      bad += do_slab_job<kF32, kTo>(source, slab, jobs[i]);
    else if (jobs[i].dtype == kF16)
      bad += do_slab_job<kF16, kTo>(source, slab, jobs[i]);
    else
      bad += do_slab_job<kBf16, kTo>(source, slab, jobs[i]);
  }
  return bad;
}

i64 fill_slab(const char* source, char* slab, const SlabJob* jobs, i64 first, i64 last, i64 dtype) {
  if (dtype == kF32) return do_slab_jobs<kF32>(source, slab, jobs, first, last);
  if (dtype == kF16) return do_slab_jobs<kF16>(source, slab, jobs, first, last);
  return do_slab_jobs<kBf16>(source, slab, jobs, first, last);
}

}  // namespace
}  // namespace memos::cpu
