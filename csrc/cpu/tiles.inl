// Tiles of numbers <-> codes, scales and zeros; part of kernels.inl.
//
// 2W consecutive channels are handled as a Pair: the even ones and the odd ones. For bf16 that is
// one load, a shift and a mask; two 4-bit codes of a byte, and the first rotation step, fall on the
// two halves of a Pair.
#pragma once

#include <limits>

#include "codec/layout.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace memos::cpu {
namespace {

using namespace memos::codec;

// Two more "dtypes": floats in Pair order in a scratch tile, and bf16 stored past the caches.
constexpr i64 kScratch = 3;
constexpr i64 kBf16Streamed = 4;
constexpr i64 kTokensAtOnce = 16;  // of a V section: bounds the tables on the stack
constexpr i64 kTileTokens = 64;    // of a rotated K section: the largest group
constexpr i64 kMaxGroups = kMaxHeadDim / 32;
// Beyond this many bytes the caches do not hold what is written: storing past them saves reading
// it.
constexpr i64 kStreamFrom = 8 << 20;

// Rows of numbers to encode, token_bytes apart. `next` lie the rows that follow: one of them is
// fetched for each one read, so that memory and arithmetic overlap (short rows with gaps between
// them are not foreseen by the processor).
struct Rows {
  const char* at;
  i64 token_bytes;
  const char* next;

  MEMOS_HD const char* row(i64 t) const { return at + t * token_bytes; }
  MEMOS_HD void fetch(i64 t, i64 offset, i64 bytes) const {
    for (i64 i = 0; i < bytes; i += 64)
      __builtin_prefetch(next + t * token_bytes + offset + i, 0, 3);
  }
};

// Where the codes of a tile, their scales and zeros go.
struct Target {
  char* codes;
  i64 row_bytes;  // of the codes of one token
  char *scales, *zeros;
  bool stream;  // store the codes past the caches

  MEMOS_HD char* row(i64 t) const { return codes + t * row_bytes; }
};

template <i64 kDtype>
constexpr i64 kItem = kDtype == 1 || kDtype == 2 ? 2 : 4;

template <int W>
struct Pair {
  typename Vec<W>::F even, odd;
};

template <int W, i64 kDtype>
MEMOS_HD Pair<W> load_pair(const char* row, i64 channel) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  if constexpr (kDtype == kBf16) {
    const U u = load_as<U>(row + 2 * channel);
    return {bit_cast<F>(u << 16), bit_cast<F>(u & 0xffff0000u)};
  } else if constexpr (kDtype == kF16) {
    const U u = load_as<U>(row + 2 * channel);
    return {fp16_value_any<F>(u & 0xffffu), fp16_value_any<F>(u >> 16)};
  } else {
    const F a = load_as<F>(row + 4 * channel), b = load_as<F>(row + 4 * (channel + W));
    if constexpr (kDtype == kScratch) return {a, b};
    return {every_second<0, W>(a, b), every_second<1, W>(a, b)};
  }
}

template <int W, i64 kDtype>
MEMOS_HD void store_pair(char* row, i64 channel, Pair<W> x) {
  using U = typename Vec<W>::U;
  if constexpr (kDtype == kBf16 || kDtype == kBf16Streamed) {
    store_line<kDtype == kBf16Streamed>(
        row + 2 * channel, U((bf16_rounded(x.even) >> 16) | (bf16_rounded(x.odd) & 0xffff0000u)));
  } else if constexpr (kDtype == kF16) {
    store_as(row + 2 * channel, U(fp16_nearest(x.even) | (fp16_nearest(x.odd) << 16)));
  } else if constexpr (kDtype == kScratch) {
    store_as(row + 4 * channel, x.even);
    store_as(row + 4 * (channel + W), x.odd);
  } else {
    store_as(row + 4 * channel, interleave<0, W>(x.even, x.odd));
    store_as(row + 4 * (channel + W), interleave<1, W>(x.even, x.odd));
  }
}

// Codes of 2W channels, in the low bits of the lanes, to bytes.
template <int W, i64 kKind>
MEMOS_HD void store_codes(char* row, i64 channel, typename Vec<W>::U even, typename Vec<W>::U odd,
                          bool stream) {
  using V = Vec<W>;
  if constexpr (kKind == kInt8 || kKind == kFp8) {
    store_halves<W>(row + channel, even | (odd << 8), stream);
  } else if constexpr (kKind == kInt4) {
    store_bytes<W>(row + channel / 2, even | (odd << 4), stream);
  } else {
    // Two lanes make a byte: 32-bit lanes (a, b) with 4 bits each -> a | b << 4.
    using U64 = typename V::U64;
    const U64 u = (U64)((even | (odd << 2)) & 15u);
    store_as(row + channel / 4, __builtin_convertvector(u | (u >> 28), typename V::U8Half));
  }
}

template <int W, i64 kKind>
MEMOS_HD void load_codes(const char* row, i64 channel, typename Vec<W>::U& even,
                         typename Vec<W>::U& odd) {
  using V = Vec<W>;
  using U = typename V::U;
  if constexpr (kKind == kInt8 || kKind == kFp8) {
    const U u = load_halves<W>(row + channel);
    even = u & 0xffu;
    odd = u >> 8;
  } else if constexpr (kKind == kInt4) {
    const U u = load_bytes<W>(row + channel / 2);
    even = u & 15u;
    odd = u >> 4;
  } else {
    using U64 = typename V::U64;
    const U64 b = __builtin_convertvector(load_as<typename V::U8Half>(row + channel / 4), U64);
    const U u = (U)((b & 15u) | ((b & 0xf0u) << 28));
    even = u & 3u;
    odd = u >> 2;
  }
}

// One code, still with its check: integers as kMagic + code, fp8 as its byte.
template <i64 kKind, class F, class U = typename Lanes<F>::U>
MEMOS_HD U code_of(F x, F zero, F inverse) {
  if constexpr (kKind == kFp8) {
    const F y = mul(x, inverse);
    const F top = F{} + kFp8Max;
    return e4m3_nearest(min_of(max_of(y, -top), top));
  } else {
    return bit_cast<U>(integer_code(x, zero, inverse));
  }
}

template <i64 kKind, class F>
MEMOS_HD Group<F> group_of(F lo, F hi) {
  if constexpr (kKind == kFp8) {
    return fp8_group(hi);
  } else {
    const F top = F{} + kFp16Max;
    return integer_group(min_of(max_of(lo, -top), top), min_of(max_of(hi, -top), top),
                         levels_of<kKind>());
  }
}

// Gathers what tells that some number did not fit (NaN, infinity or beyond fp16): the codes are
// then not to be used, and the caller comes again with numbers made to fit.
template <int W, i64 kSource>
struct Misfits {
  typename Vec<W>::U bits{};

  MEMOS_HD void add_numbers(const char* row, i64 channel, Pair<W> x) {
    using F = typename Vec<W>::F;
    using U = typename Vec<W>::U;
    if constexpr (kSource == kBf16) {
      // Both halves at once: |x| >= 2^16 carries into the sign bit.
      bits |= (load_as<U>(row + 2 * channel) & 0x7fff7fffu) + 0x38803880u;
    } else {
      const F top = F{} + kFp16Max;
      bits |= (abs_of(x.even) <= top ? U{} : ~U{}) | (abs_of(x.odd) <= top ? U{} : ~U{});
    }
  }
  MEMOS_HD bool numbers() const { return any_lane(bits & 0x80008000u); }

  // Integer codes: a valid one has no bit beside those of kMagic and of the code. A number too low
  // whose bits happen to be among those has code 0, as it should.
  MEMOS_HD void add_codes(typename Vec<W>::U even, typename Vec<W>::U odd) { bits |= even | odd; }
  template <i64 kKind>
  MEMOS_HD bool codes() const {
    return any_lane(bits & ~(kMagicBits | static_cast<std::uint32_t>(levels_of<kKind>())));
  }
};

template <int W>
constexpr int kSlab = W == 16 ? 4 : 2;  // Pairs side by side whose extremes stay in registers

// K: a scale per channel over T tokens, for kPairs * 2W channels from c on.
template <int W, i64 kSource, i64 kKind, int kPairs>
MEMOS_HD bool encode_slab(const Rows& rows, i64 T, i64 c, const Target& to) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  const F inf = F{} + std::numeric_limits<float>::infinity();
  Misfits<W, kSource> misfits;
  Pair<W> lo[kPairs], hi[kPairs];
  for (int i = 0; i < kPairs; ++i) {
    lo[i] = {inf, inf};
    hi[i] = {-inf, -inf};
    if constexpr (kKind == kFp8) hi[i] = {F{}, F{}};
  }
  for (i64 t = 0; t < T; ++t) {
    const char* row = rows.row(t);
    for (int i = 0; i < kPairs; ++i) {
      const Pair<W> x = load_pair<W, kSource>(row, c + i * 2 * W);
      if constexpr (kKind == kFp8) {
        hi[i] = {max_of(abs_of(x.even), hi[i].even), max_of(abs_of(x.odd), hi[i].odd)};
        misfits.add_numbers(row, c + i * 2 * W, x);
      } else {
        lo[i] = {min_of(x.even, lo[i].even), min_of(x.odd, lo[i].odd)};
        hi[i] = {max_of(x.even, hi[i].even), max_of(x.odd, hi[i].odd)};
      }
    }
  }
  if constexpr (kKind == kFp8)
    if (misfits.numbers()) return true;
  for (int i = 0; i < kPairs; ++i) {  // from here on: lo = the zeros, hi = the inverse scales
    const i64 at = 2 * (c + i * 2 * W);
    const Group<F> even = group_of<kKind>(lo[i].even, hi[i].even);
    const Group<F> odd = group_of<kKind>(lo[i].odd, hi[i].odd);
    store_as(to.scales + at, U(even.scale | (odd.scale << 16)));
    if constexpr (kKind != kFp8) store_as(to.zeros + at, U(even.zero | (odd.zero << 16)));
    lo[i] = {even.zero_value, odd.zero_value};
    hi[i] = {even.inverse, odd.inverse};
  }
  for (i64 t = 0; t < T; ++t) {
    if constexpr (kSource != kScratch)
      rows.fetch(t, c * kItem<kSource>, kPairs * 2 * W * kItem<kSource>);
    for (int i = 0; i < kPairs; ++i) {
      const i64 at = c + i * 2 * W;
      const Pair<W> x = load_pair<W, kSource>(rows.row(t), at);
      const U e = code_of<kKind>(x.even, lo[i].even, hi[i].even);
      const U o = code_of<kKind>(x.odd, lo[i].odd, hi[i].odd);
      if constexpr (kKind != kFp8) misfits.add_codes(e, o);
      store_codes<W, kKind>(to.row(t), at, e, o, to.stream);
    }
  }
  if constexpr (kKind == kFp8) return false;
  return misfits.template codes<kKind>();
}

// Whole slabs first, then Pairs one by one: do(c, number of Pairs as a type).
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int W, class Do>
MEMOS_HD bool over_slabs(i64 D, Do&& work) {
  bool any = false;
  i64 c = 0;
  for (; c + kSlab<W> * 2 * W <= D; c += kSlab<W> * 2 * W) any |= work(c, Count<kSlab<W>>{});
  if constexpr (kSlab<W> == 4)
    for (; c + 4 * W <= D; c += 4 * W) any |= work(c, Count<2>{});
  for (; c < D; c += 2 * W) any |= work(c, Count<1>{});
  return any;
}

template <int W, i64 kSource, i64 kKind>
bool encode_channels(const Rows& rows, i64 T, i64 D, const Target& to) {
  return over_slabs<W>(D, [&](i64 c, auto pairs) MEMOS_INLINE {
    return encode_slab<W, kSource, kKind, decltype(pairs)::value>(rows, T, c, to);
  });
}

// The groups of a V row: kPairs > 0 where each has that many Pairs, known when compiling, so that
// the loops over a group unroll; 0 where the last one may be short.
template <int W, int kPairs>
struct Groups {
  i64 D, G;

  MEMOS_HD i64 count() const { return num_groups(D, G); }
  template <class Do>
  MEMOS_HD void over(i64 g, Do&& work) const {
    if constexpr (kPairs > 0) {
      for (int i = 0; i < kPairs; ++i) work(g * kPairs * 2 * W + i * 2 * W);
    } else {
      const i64 end = (g + 1) * G < D ? (g + 1) * G : D;
      for (i64 c = g * G; c < end; c += 2 * W) work(c);
    }
  }
};
template <int W, class Do>
MEMOS_HD bool with_groups(i64 D, i64 G, Do&& work) {
  if (D % G == 0 && G == 64) return work(Groups<W, 32 / W>{D, G});
  if (D % G == 0 && G == 32) return work(Groups<W, 16 / W>{D, G});
  return work(Groups<W, 0>{D, G});
}

// V: a scale per token and group of channels, T <= kTokensAtOnce tokens.
template <int W, i64 kSource, i64 kKind, class Grouping>
MEMOS_HD bool encode_tokens(const Rows& rows, i64 T, const Grouping& grouping, const Target& to) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  using U16 = typename Vec<W>::U16;
  const F inf = F{} + std::numeric_limits<float>::infinity();
  const i64 groups = grouping.count(), count = T * groups;
  // One row of W partial extremes per group, then one number per group.
  alignas(64) float lows[(kTokensAtOnce * kMaxGroups + W) * W];
  alignas(64) float highs[(kTokensAtOnce * kMaxGroups + W) * W];
  Misfits<W, kSource> misfits;
  float *low_at = lows, *high_at = highs;
  for (i64 t = 0; t < T; ++t) {
    const char* row = rows.row(t);
    for (i64 g = 0; g < groups; ++g, low_at += W, high_at += W) {
      F lo = inf, hi = kKind == kFp8 ? F{} : -inf;
      grouping.over(g, [&](i64 c) MEMOS_INLINE {
        const Pair<W> x = load_pair<W, kSource>(row, c);
        if constexpr (kKind == kFp8) {
          hi = max_of(abs_of(x.odd), max_of(abs_of(x.even), hi));
          misfits.add_numbers(row, c, x);
        } else {
          lo = min_of(x.odd, min_of(x.even, lo));
          hi = max_of(x.odd, max_of(x.even, hi));
        }
      });
      if constexpr (kKind != kFp8) store_as(low_at, lo);
      store_as(high_at, hi);
    }
  }
  if constexpr (kKind == kFp8)
    if (misfits.numbers()) return true;
  for (i64 i = count; i % W; ++i, low_at += W, high_at += W) {
    store_as(low_at, F{});
    store_as(high_at, F{});
  }
  for (i64 i = 0; i < count; i += W) {
    const F lo = kKind == kFp8 ? F{} : reduce_rows<W, true>(lows + i * W);
    const Group<F> g = group_of<kKind>(lo, reduce_rows<W, false>(highs + i * W));
    const U16 scale = __builtin_convertvector(g.scale, U16);
    const U16 zero = __builtin_convertvector(g.zero, U16);
    if (count - i >= W) {
      store_as(to.scales + 2 * i, scale);
      if constexpr (kKind != kFp8) store_as(to.zeros + 2 * i, zero);
    } else {
      std::memcpy(to.scales + 2 * i, &scale, 2 * (count - i));
      if constexpr (kKind != kFp8) std::memcpy(to.zeros + 2 * i, &zero, 2 * (count - i));
    }
    store_as(lows + i, g.zero_value);  // behind the rows still to be read
    store_as(highs + i, g.inverse);
  }
  for (i64 t = 0, i = 0; t < T; ++t) {
    const char* row = rows.row(t);
    char* codes = to.row(t);
    if constexpr (kSource != kScratch) rows.fetch(t, 0, grouping.D * kItem<kSource>);
    for (i64 g = 0; g < groups; ++g, ++i) {
      const F zero = F{} + lows[i], inverse = F{} + highs[i];
      grouping.over(g, [&](i64 c) MEMOS_INLINE {
        const Pair<W> x = load_pair<W, kSource>(row, c);
        const U e = code_of<kKind>(x.even, zero, inverse);
        const U o = code_of<kKind>(x.odd, zero, inverse);
        if constexpr (kKind != kFp8) misfits.add_codes(e, o);
        store_codes<W, kKind>(codes, c, e, o, to.stream);
      });
    }
  }
  if constexpr (kKind == kFp8) return false;
  return misfits.template codes<kKind>();
}

template <int W, i64 kKind>
MEMOS_HD Pair<W> decode_pair(const char* row, i64 c, Pair<W> scale, Pair<W> zero) {
  using F = typename Vec<W>::F;
  typename Vec<W>::U e, o;
  load_codes<W, kKind>(row, c, e, o);
  if constexpr (kKind == kFp8)
    return {mul(e4m3_value<F>(e), scale.even), mul(e4m3_value<F>(o), scale.odd)};
  // 8 bits by 11: the products are exact.
  return {exact_mul_add(to_float<F>(e), scale.even, zero.even),
          exact_mul_add(to_float<F>(o), scale.odd, zero.odd)};
}

template <int W, i64 kTarget, i64 kKind>
void decode_channels(const char* codes, i64 row_bytes, const char* scales, const char* zeros, i64 T,
                     i64 D, char* dst, i64 token_bytes) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  over_slabs<W>(D, [&](i64 c, auto pairs) MEMOS_INLINE {
    constexpr int kPairs = decltype(pairs)::value;
    Pair<W> scale[kPairs], zero[kPairs];
    for (int i = 0; i < kPairs; ++i) {
      const U s = load_as<U>(scales + 2 * (c + i * 2 * W));
      const U z = kKind == kFp8 ? U{} : load_as<U>(zeros + 2 * (c + i * 2 * W));
      scale[i] = {fp16_value<F>(s & 0xffffu), fp16_value<F>(s >> 16)};
      zero[i] = {fp16_value<F>(z & 0xffffu), fp16_value<F>(z >> 16)};
    }
    for (i64 t = 0; t < T; ++t)
      for (int i = 0; i < kPairs; ++i)
        store_pair<W, kTarget>(
            dst + t * token_bytes, c + i * 2 * W,
            decode_pair<W, kKind>(codes + t * row_bytes, c + i * 2 * W, scale[i], zero[i]));
    return false;
  });
}

template <int W, i64 kTarget, i64 kKind, class Grouping>
MEMOS_HD void decode_tokens(const char* codes, i64 row_bytes, const char* scales, const char* zeros,
                            i64 T, const Grouping& grouping, char* dst, i64 token_bytes) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  using U16 = typename Vec<W>::U16;
  const i64 groups = grouping.count(), count = T * groups;
  float scale_of[kTokensAtOnce * kMaxGroups + 16], zero_of[kTokensAtOnce * kMaxGroups + 16];
  for (i64 i = 0; i < count; i += W) {
    U16 s{}, z{};
    const i64 n = 2 * (count - i < W ? count - i : W);
    std::memcpy(&s, scales + 2 * i, n);
    if constexpr (kKind != kFp8) std::memcpy(&z, zeros + 2 * i, n);
    store_as(scale_of + i, fp16_value<F>(__builtin_convertvector(s, U)));
    store_as(zero_of + i, fp16_value<F>(__builtin_convertvector(z, U)));
  }
  for (i64 t = 0, i = 0; t < T; ++t) {
    const char* row = codes + t * row_bytes;
    char* to = dst + t * token_bytes;
    for (i64 g = 0; g < groups; ++g, ++i) {
      const F s = F{} + scale_of[i], z = F{} + zero_of[i];
      grouping.over(g, [&](i64 c) MEMOS_INLINE {
        store_pair<W, kTarget>(to, c, decode_pair<W, kKind>(row, c, {s, s}, {z, z}));
      });
    }
  }
}

}  // namespace
}  // namespace memos::cpu
