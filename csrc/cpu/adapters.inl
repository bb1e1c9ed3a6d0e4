// Low-rank adapters: y += scale * (x A) B for tokens that are sorted by adapter. Included by one
// file per instruction set, which says how many floats a vector has (MEMOS_LANES).
//
// A row of y does not depend on the batch it comes in: the products of one token and one row of A
// are added up in one vector from the first to the last input, and those of one output from the
// first row of B to the last, whatever tile of tokens the row falls into.
#pragma once

#include "codec/layout.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace memos::cpu {
namespace {

using namespace memos::codec;

constexpr i64 kMaxRank = 512;
// Tokens that pass one after the other over a part of the weights that stays in the caches, and
// what they have between the two products: 32 KB on the stack.
constexpr i64 kMaxChunk = 64;
constexpr i64 kHiddenFloats = 16 * kMaxRank;

// a * b + c, in one rounding where the instruction set has that instruction.
template <class F>
MEMOS_HD F mul_add(F a, F b, F c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 64) return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__FMA__)
  if constexpr (sizeof(F) == 32) return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  return a * b + c;
}

// 2W numbers as floats: of 16-bit numbers the even ones and the odd ones (a shift and a mask, no
// shuffle), else the first W and the rest. In which order does not matter: y, x, A and B share it.
template <int W>
struct Two {
  typename Vec<W>::F a, b;
};

// Where fp16 is converted by an instruction, the order is that of fp32.
template <int W>
MEMOS_HD Two<W> load_fp16(const char* p) {
  using F = typename Vec<W>::F;
#if defined(__AVX512F__)
  if constexpr (W == 16)
    return {(F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)),
            (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1))};
#endif
#if defined(__F16C__)
  if constexpr (W == 8)
    return {(F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
#endif
  const auto u = load_as<typename Vec<W>::U>(p);
  return {fp16_value_any<F>(u & 0xffffu), fp16_value_any<F>(u >> 16)};
}

// fp16 bits, rounded to the nearest even; beyond the range infinity.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD U fp16_or_special(F x) {
  const F magnitude = abs_of(x);
  const U special = magnitude == magnitude ? U{} + 0x7c00u : U{} + 0x7e00u;
  const U bits = magnitude < F{} + 65520.0f ? fp16_nearest(magnitude) : special;
  return bits | ((bit_cast<U>(x) >> 16) & 0x8000u);
}

template <int W>
MEMOS_HD void store_fp16(char* p, Two<W> x) {
#if defined(__AVX512F__)
  if constexpr (W == 16) {
    const __m256i a = _mm512_cvtps_ph((__m512)x.a, _MM_FROUND_TO_NEAREST_INT);
    const __m256i b = _mm512_cvtps_ph((__m512)x.b, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((__m256i*)p, a);
    return _mm256_storeu_si256((__m256i*)p + 1, b);
  }
#endif
#if defined(__F16C__)
  if constexpr (W == 8) {
    const __m128i a = _mm256_cvtps_ph((__m256)x.a, _MM_FROUND_TO_NEAREST_INT);
    const __m128i b = _mm256_cvtps_ph((__m256)x.b, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i*)p, a);
    return _mm_storeu_si128((__m128i*)p + 1, b);
  }
#endif
  store_as(p, fp16_or_special(x.a) | (fp16_or_special(x.b) << 16));
}

// bf16 bits in the upper half, rounded to the nearest even; the lower half is garbage.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD U bf16_or_nan(F x) {
  return x == x ? bf16_rounded(x) : bit_cast<U>(x) | 0x00400000u;
}

template <int W, i64 kDtype>
MEMOS_HD Two<W> load_two(const char* p) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  if constexpr (kDtype == kBf16) {
    const U u = load_as<U>(p);
    return {bit_cast<F>(u << 16), bit_cast<F>(u & 0xffff0000u)};
  } else if constexpr (kDtype == kF16) {
    return load_fp16<W>(p);
  } else {
    return {load_as<F>(p), load_as<F>(p + 4 * W)};
  }
}

template <int W, i64 kDtype>
MEMOS_HD void store_two(char* p, Two<W> x) {
  using U = typename Vec<W>::U;
  if constexpr (kDtype == kBf16) {
    store_as(p, U((bf16_or_nan(x.a) >> 16) | (bf16_or_nan(x.b) & 0xffff0000u)));
  } else if constexpr (kDtype == kF16) {
    store_fp16<W>(p, x);
  } else {
    store_as(p, x.a);
    store_as(p + 4 * W, x.b);
  }
}

// 2W inputs as the first product takes them, and that product.
template <int W, i64 kDtype>
struct Operand {
  Two<W> x;

  MEMOS_HD static Operand load(const char* p) { return {load_two<W, kDtype>(p)}; }
  MEMOS_HD static typename Vec<W>::F dot(typename Vec<W>::F sum, Operand x, Operand w) {
    return mul_add(x.x.b, w.x.b, mul_add(x.x.a, w.x.a, sum));
  }
};
#if defined(__AVX512BF16__)
// One instruction for 32 products of bf16. It takes subnormal numbers as zero.
template <>
struct Operand<16, kBf16> {
  __m512i x;

  MEMOS_HD static Operand load(const char* p) { return {_mm512_loadu_si512(p)}; }
  MEMOS_HD static Vec<16>::F dot(Vec<16>::F sum, Operand x, Operand w) {
    return (Vec<16>::F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x.x, (__m512bh)w.x);
  }
};
#endif

// The sum of the lanes of x[i] in lane i, for n vectors, n a power of two up to W. Neighbours are
// added first, then pairs: the order of one sum is the same for every n.
template <int W>
MEMOS_HD typename Vec<W>::F sum_lanes(typename Vec<W>::F* x, int n) {
  int width = W;
#pragma GCC unroll 4
  for (; n > 1; n /= 2, width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      x[i] =
          every_second<0, W>(x[2 * i], x[2 * i + 1]) + every_second<1, W>(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (; width > 1; width /= 2)
    x[0] = every_second<0, W>(x[0], x[0]) + every_second<1, W>(x[0], x[0]);
  return x[0];
}

// One adapter's factors of one module, and the tokens that they are for.
struct Job {
  const char* down;  // [R, I]
  const char* up;    // [R, O]
  i64 R, I, O;
  float scale;
  char* const* y;        // address of each token's row
  const char* const* x;  // the same
  float* hidden;         // [tokens, R]: x A
};

// hidden[t, r] for kT tokens and kR rows of A.
template <int W, i64 kDtype, int kT, int kR>
MEMOS_HD void shrink_tile(const Job& job, i64 t0, i64 r0) {
  using F = typename Vec<W>::F;
  using In = Operand<W, kDtype>;
  constexpr i64 kItem = kDtype == kF32 ? 4 : 2, kStep = 2 * W * kItem;
  const i64 row = job.I * kItem, whole = row / kStep * kStep;
  const char* down = job.down + r0 * row;
  F sum[kR * kT] = {};
  const auto add_up = [&](auto load) MEMOS_INLINE {
    In x[kT];
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) x[t] = load(job.x[t0 + t]);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const In w = load(down + r * row);
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) sum[t * kR + r] = In::dot(sum[t * kR + r], x[t], w);
    }
  };
  for (i64 i = 0; i < whole; i += kStep)
    add_up([&](const char* p) MEMOS_INLINE { return In::load(p + i); });
  if (whole < row)
    add_up([&](const char* p) MEMOS_INLINE {
      char padded[kStep] = {};
      std::memcpy(padded, p + whole, row - whole);
      return In::load(padded);
    });
  constexpr int kSums = kR < W ? kR : W;
#pragma GCC unroll 4
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < kR; r += kSums) {
      const F sums = sum_lanes<W>(sum + t * kR + r, kSums);
      std::memcpy(job.hidden + (t0 + t) * job.R + r0 + r, &sums, 4 * kSums);
    }
}

// y[t, o] += scale * hidden[t, :] . B[:, o] for kT tokens and kV times 2W outputs.
template <int W, i64 kDtype, int kT, int kV>
MEMOS_HD void expand_tile(const Job& job, i64 t0, i64 at) {
  using F = typename Vec<W>::F;
  constexpr i64 kItem = kDtype == kF32 ? 4 : 2, kStep = 2 * W * kItem;
  const i64 row = job.O * kItem, left = row - at;
  const bool whole = left >= kV * kStep;  // else kV is 1
  Two<W> sum[kT][kV] = {};
  const auto load = [&](const char* p) MEMOS_INLINE {
    if (kV > 1 || whole) return load_two<W, kDtype>(p);
    char padded[kStep] = {};
    std::memcpy(padded, p, left);
    return load_two<W, kDtype>(padded);
  };
  const char* up = job.up + at;
  const float* hidden = job.hidden + t0 * job.R;
  for (i64 r = 0; r < job.R; ++r, up += row) {
    Two<W> w[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) w[v] = load(up + v * kStep);
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) {
      const F h = F{} + hidden[t * job.R + r];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        sum[t][v].a = mul_add(h, w[v].a, sum[t][v].a);
        sum[t][v].b = mul_add(h, w[v].b, sum[t][v].b);
      }
    }
  }
  const F scale = F{} + job.scale;
#pragma GCC unroll 4
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      char* p = job.y[t0 + t] + at + v * kStep;
      const Two<W> y = load(p);
      const Two<W> sums{mul_add(scale, sum[t][v].a, y.a), mul_add(scale, sum[t][v].b, y.b)};
      if (kV > 1 || whole) {
        store_two<W, kDtype>(p, sums);
      } else {
        char padded[kStep];
        store_two<W, kDtype>(padded, sums);
        std::memcpy(p, padded, left);
      }
    }
}

// Tiles: as many sums at once as hide the time of one product, as few as the registers hold.
template <int W, i64 kDtype, int kT>
void shrink(const Job& job, i64 t0, i64 r0) {
  constexpr int kR = W == 16 ? (kT == 4 ? 4 : 8) : (kT == 4 ? 2 : kT == 2 ? 4 : 8);
  for (int r = 0; r < 8; r += kR) shrink_tile<W, kDtype, kT, kR>(job, t0, r0 + r);
}

// `vectors` times 2W outputs: 4, or 1 where fewer are left.
template <int W, i64 kDtype, int kT>
void expand(const Job& job, i64 t0, i64 at, i64 vectors) {
  constexpr int kV = W == 16 ? (kT == 4 ? 2 : 4) : (kT == 4 ? 1 : kT == 2 ? 2 : 4);
  constexpr i64 kStep = 2 * W * (kDtype == kF32 ? 4 : 2);
  if (vectors == 1) return expand_tile<W, kDtype, kT, 1>(job, t0, at);
  for (int v = 0; v < 4; v += kV) expand_tile<W, kDtype, kT, kV>(job, t0, at + v * kStep);
}

template <int W, i64 kDtype>
void apply(const Job& job, i64 tokens) {
  const auto tiles = [&](auto four, auto two, auto one) MEMOS_INLINE {
    i64 t = 0;
    for (; t + 4 <= tokens; t += 4) four(t);
    if (t + 2 <= tokens) two(t), t += 2;
    if (t < tokens) one(t);
  };
  for (i64 r = 0; r < job.R; r += 8)
    tiles([&](i64 t) { shrink<W, kDtype, 4>(job, t, r); },
          [&](i64 t) { shrink<W, kDtype, 2>(job, t, r); },
          [&](i64 t) { shrink<W, kDtype, 1>(job, t, r); });
  constexpr i64 kItem = kDtype == kF32 ? 4 : 2, kStep = 2 * W * kItem;
  for (i64 at = 0; at < job.O * kItem;) {
    const i64 vectors = job.O * kItem - at >= 4 * kStep ? 4 : 1;
    tiles([&](i64 t) { expand<W, kDtype, 4>(job, t, at, vectors); },
          [&](i64 t) { expand<W, kDtype, 2>(job, t, at, vectors); },
          [&](i64 t) { expand<W, kDtype, 1>(job, t, at, vectors); });
    at += vectors * kStep;
  }
}

i64 apply_adapters(const AdapterCall& call, i64 first, i64 last) {
  const AdapterTable& table = *reinterpret_cast<const AdapterTable*>(call.table);
  const AdapterPlan& plan = *reinterpret_cast<const AdapterPlan*>(call.plan);
  const auto* order = reinterpret_cast<const i64*>(plan.order);
  const auto* starts = reinterpret_cast<const i64*>(plan.starts);
  const auto* shape = reinterpret_cast<const i64*>(table.shapes) + 2 * call.module;
  const auto* factors = reinterpret_cast<const AdapterFactors*>(table.rows) + call.module;
  for (i64 i = first; i < last; ++i)
    if (order[i] < 0 || order[i] >= plan.T) return i;
  const i64 item = item_bytes(table.dtype);
  alignas(64) float hidden[kHiddenFloats];
  char* y[kMaxChunk];
  const char* x[kMaxChunk];
  i64 slot = 0, above = table.num_slots;  // the first slot that ends behind `first`
  while (slot < above) {
    const i64 middle = (slot + above) / 2;
    if (starts[middle + 1] > first)
      above = middle;
    else
      slot = middle + 1;
  }
  for (; slot < table.num_slots && starts[slot] < last; ++slot) {
    const AdapterFactors& of = factors[slot * table.num_modules];
    const i64 begin = starts[slot] > first ? starts[slot] : first;
    const i64 end = starts[slot + 1] < last ? starts[slot + 1] : last;
    if (begin >= end || of.R == 0) continue;
    Job job{reinterpret_cast<const char*>(of.down),
            reinterpret_cast<const char*>(of.up),
            of.R,
            shape[0],
            shape[1],
            bit_cast<float>(static_cast<std::uint32_t>(of.scale)),
            y,
            x,
            hidden};
    const i64 fits = kHiddenFloats / of.R, chunk = fits < kMaxChunk ? fits : kMaxChunk;
    for (i64 at = begin; at < end; at += chunk) {
      const i64 tokens = end - at < chunk ? end - at : chunk;
      for (i64 t = 0; t < tokens; ++t) {
        y[t] = reinterpret_cast<char*>(call.y + order[at + t] * call.y_stride * item);
        x[t] = reinterpret_cast<const char*>(call.x + order[at + t] * call.x_stride * item);
      }
      if (table.dtype == kBf16)
        apply<MEMOS_LANES, kBf16>(job, tokens);
      else if (table.dtype == kF16)
        apply<MEMOS_LANES, kF16>(job, tokens);
      else
        apply<MEMOS_LANES, kF32>(job, tokens);
    }
  }
  return -1;
}

}  // namespace
}  // namespace memos::cpu
