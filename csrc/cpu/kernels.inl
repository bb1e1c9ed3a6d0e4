// The one body of the CPU kernels. Included by one file per instruction set, which says how many
// floats a vector has (MEMOS_LANES). No allocation, no statics, nothing with external linkage.
//
// 2W consecutive channels are handled as a Pair: the even ones and the odd ones. For bf16 that is
// one load, a shift and a mask; two 4-bit codes of a byte, and the first rotation step, fall on the
// two halves of a Pair.
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

template <i64 kKind>
constexpr float levels_of() {
  return kKind == kInt8 ? 255.0f : kKind == kInt4 ? 15.0f : 3.0f;
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

// Rotation: x * Hadamard(n) / sqrt(n), in place, on D floats in Pair order; n divides D.

MEMOS_HD float hadamard_norm(i64 n) {
  float norm = 1.0f;
  for (; n >= 4; n /= 4) norm *= 0.5f;
  return n == 2 ? norm * 0.70710678118654752440f : norm;
}

template <int W, int kStep, class F>
MEMOS_HD F rotate_lanes(F x) {
  using U = typename Lanes<F>::U;
  U sign{};
  for (int i = 0; i < W; ++i) sign[i] = i & kStep ? 0xbf800000u : 0x3f800000u;  // -1 or 1
  return exact_mul_add(x, bit_cast<F>(sign), swap_lanes<W, kStep>(x));
}

template <int W, class F>
MEMOS_HD F rotate_vector(F x, i64 n) {
  if (n >= 4) x = rotate_lanes<W, 1>(x);
  if (n >= 8) x = rotate_lanes<W, 2>(x);
  if constexpr (W >= 8)
    if (n >= 16) x = rotate_lanes<W, 4>(x);
  if constexpr (W >= 16)
    if (n >= 32) x = rotate_lanes<W, 8>(x);
  return x;
}

// kVectors > 0: the row has that many vectors, known when compiling, and stays in registers.
template <int W, int kVectors>
MEMOS_HD void rotate_known(typename Vec<W>::F (&x)[kVectors], i64 n, float norm) {
  using F = typename Vec<W>::F;
  for (int i = 0; i < kVectors; i += 2) {
    const F a = x[i], b = x[i + 1];
    x[i] = rotate_vector<W>(n >= 2 ? add(a, b) : a, n);
    x[i + 1] = rotate_vector<W>(n >= 2 ? sub(a, b) : b, n);
  }
  for (int step = 2; step < kVectors; step *= 2) {
    if (n <= step * W) break;
    for (int i = 0; i < kVectors; ++i) {
      if (i & step) continue;
      const F a = x[i], b = x[i + step];
      x[i] = add(a, b);
      x[i + step] = sub(a, b);
    }
  }
  for (int i = 0; i < kVectors; ++i) x[i] = mul(x[i], F{} + norm);
}

template <int W>
void rotate_any(float* row, i64 D, i64 n, float norm) {
  using F = typename Vec<W>::F;
  const i64 vectors = D / W;
  for (i64 i = 0; i < vectors; i += 2) {
    F a = load_as<F>(row + i * W), b = load_as<F>(row + (i + 1) * W);
    store_as(row + i * W, rotate_vector<W>(n >= 2 ? add(a, b) : a, n));
    store_as(row + (i + 1) * W, rotate_vector<W>(n >= 2 ? sub(a, b) : b, n));
  }
  for (i64 step = 2; step * W < n; step *= 2) {
    for (i64 i = 0; i < vectors; ++i) {
      if (i & step) continue;
      F a = load_as<F>(row + i * W), b = load_as<F>(row + (i + step) * W);
      store_as(row + i * W, add(a, b));
      store_as(row + (i + step) * W, sub(a, b));
    }
  }
  for (i64 i = 0; i < vectors; ++i) store_as(row + i * W, mul(load_as<F>(row + i * W), F{} + norm));
}

template <class F, class U = typename Lanes<F>::U>
MEMOS_HD F made_fit(F x) {
  const F top = F{} + kFp16Max;
  return x == x ? min_of(max_of(x, -top), top) : F{};
}

// One row from `source` to `target` (either may be scratch), rotated between. With kFit the numbers
// are made to fit first.
template <int W, i64 kSource, i64 kTarget, bool kFit, int kVectors>
MEMOS_HD void rotate_row(const char* src, char* dst, i64 n, float norm,
                         Misfits<W, kSource>& misfits) {
  using F = typename Vec<W>::F;
  F x[kVectors];
  for (int i = 0; i < kVectors; i += 2) {
    Pair<W> p = load_pair<W, kSource>(src, i * W);
    if constexpr (kFit) {
      p = {made_fit(p.even), made_fit(p.odd)};
    } else if constexpr (kSource != kScratch) {
      misfits.add_numbers(src, i * W, p);
    }
    x[i] = p.even;
    x[i + 1] = p.odd;
  }
  rotate_known<W>(x, n, norm);
  for (int i = 0; i < kVectors; i += 2) store_pair<W, kTarget>(dst, i * W, {x[i], x[i + 1]});
}

// T rows of D channels to dst, rotated if `rotate`. Returns whether a number did not fit.
template <int W, i64 kSource, i64 kTarget, bool kFit>
bool move_rows(const Rows& rows, char* dst, i64 dst_bytes, i64 T, i64 D, bool rotate) {
  Misfits<W, kSource> misfits;
  const i64 n = D & -D;
  const float norm = hadamard_norm(n);
  for (i64 t = 0; t < T; ++t) {
    const char* from = rows.row(t);
    char* to = dst + t * dst_bytes;
    if constexpr (kSource != kScratch) rows.fetch(t, 0, D * kItem<kSource>);
    if (rotate && D == 2 * W) {
      rotate_row<W, kSource, kTarget, kFit, 2>(from, to, n, norm, misfits);
    } else if (rotate && D == 4 * W) {
      rotate_row<W, kSource, kTarget, kFit, 4>(from, to, n, norm, misfits);
    } else if (rotate && D == 8 * W) {
      rotate_row<W, kSource, kTarget, kFit, 8>(from, to, n, norm, misfits);
    } else {
      float row[kMaxHeadDim];
      char* at = reinterpret_cast<char*>(row);
      for (i64 c = 0; c < D; c += 2 * W) {
        Pair<W> p = load_pair<W, kSource>(from, c);
        if constexpr (kFit)
          p = {made_fit(p.even), made_fit(p.odd)};
        else
          misfits.add_numbers(from, c, p);
        store_pair<W, kScratch>(at, c, p);
      }
      if (rotate) rotate_any<W>(row, D, n, norm);
      for (i64 c = 0; c < D; c += 2 * W)
        store_pair<W, kTarget>(to, c, load_pair<W, kScratch>(at, c));
    }
  }
  return misfits.numbers();
}

// One head of one section, K (kPerChannel) or V.
struct Head {
  char* numbers;  // [P] rows of D numbers, token_bytes apart
  i64 token_bytes;
  char *codes, *scales, *zeros;
  i64 P, D;
  const char* next;  // where the numbers of the head that follows begin
  bool stream;       // store the codes past the caches
};

template <int W, i64 kSource, i64 kKind, bool kPerChannel>
MEMOS_HD bool encode_tile(const Rows& rows, i64 T, i64 D, i64 G, const Target& to) {
  if constexpr (kPerChannel)
    return encode_channels<W, kSource, kKind>(rows, T, D, to);
  else
    return with_groups<W>(D, G, [&](auto grouping) {
      return encode_tokens<W, kSource, kKind>(rows, T, grouping, to);
    });
}

template <int W, i64 kDtype, i64 kKind, bool kPerChannel>
void encode_head(const Head& head, i64 G, bool rotate, i64 row_bytes) {
  alignas(64) float tile[kTileTokens * kMaxHeadDim];
  char* scratch = reinterpret_cast<char*>(tile);
  const i64 D = head.D, step = kPerChannel ? G : kTokensAtOnce;
  const i64 params = kPerChannel ? 2 * D : 2 * kTokensAtOnce * num_groups(D, G);
  const Rows rotated{scratch, 4 * D, scratch};
  for (i64 t = 0, i = 0; t < head.P; t += step, ++i) {
    const i64 T = head.P - t < step ? head.P - t : step;
    const char* at = head.numbers + t * head.token_bytes;
    const Rows rows{at, head.token_bytes,
                    t + step < head.P ? at + step * head.token_bytes : head.next};
    const Target to{head.codes + t * row_bytes, row_bytes, head.scales + i * params,
                    head.zeros + i * params, head.stream};
    if (!rotate) {
      if (!encode_tile<W, kDtype, kKind, kPerChannel>(rows, T, D, G, to)) continue;
      move_rows<W, kDtype, kScratch, true>(rows, scratch, 4 * D, T, D, false);
    } else if (move_rows<W, kDtype, kScratch, false>(rows, scratch, 4 * D, T, D, true)) {
      move_rows<W, kDtype, kScratch, true>(rows, scratch, 4 * D, T, D, true);
    }
    if (encode_tile<W, kScratch, kKind, kPerChannel>(rotated, T, D, G, to)) {
      move_rows<W, kScratch, kScratch, true>(rotated, scratch, 4 * D, T, D, false);
      encode_tile<W, kScratch, kKind, kPerChannel>(rotated, T, D, G, to);
    }
  }
}

template <int W, i64 kTarget, i64 kKind, bool kPerChannel>
MEMOS_HD void decode_tile(const char* codes, i64 row_bytes, const char* scales, const char* zeros,
                          i64 T, i64 D, i64 G, char* dst, i64 token_bytes) {
  if constexpr (kPerChannel)
    decode_channels<W, kTarget, kKind>(codes, row_bytes, scales, zeros, T, D, dst, token_bytes);
  else
    with_groups<W>(D, G, [&](auto grouping) {
      decode_tokens<W, kTarget, kKind>(codes, row_bytes, scales, zeros, T, grouping, dst,
                                       token_bytes);
      return false;
    });
}

template <int W, i64 kDtype, i64 kKind, bool kPerChannel>
void decode_head(const Head& head, i64 G, bool rotate, i64 row_bytes) {
  alignas(64) float tile[kTileTokens * kMaxHeadDim];
  char* scratch = reinterpret_cast<char*>(tile);
  const i64 D = head.D, step = kPerChannel ? G : kTokensAtOnce;
  const i64 params = kPerChannel ? 2 * D : 2 * kTokensAtOnce * num_groups(D, G);
  for (i64 t = 0, i = 0; t < head.P; t += step, ++i) {
    const i64 T = head.P - t < step ? head.P - t : step;
    char* dst = head.numbers + t * head.token_bytes;
    const char* codes = head.codes + t * row_bytes;
    const char *scales = head.scales + i * params, *zeros = head.zeros + i * params;
    if (!rotate) {
      decode_tile<W, kDtype, kKind, kPerChannel>(codes, row_bytes, scales, zeros, T, D, G, dst,
                                                 head.token_bytes);
    } else {
      decode_tile<W, kScratch, kKind, kPerChannel>(codes, row_bytes, scales, zeros, T, D, G,
                                                   scratch, 4 * D);
      move_rows<W, kScratch, kDtype, false>({scratch, 4 * D, scratch}, dst, head.token_bytes, T, D,
                                            true);
    }
  }
}

// From run-time numbers to the instance compiled for them.

template <bool kEncode, int W, i64 kDtype, i64 kKind>
void head_of_kind(const Head& head, bool per_channel, i64 G, bool rotate, i64 row_bytes) {
  if constexpr (kEncode) {
    if (per_channel)
      encode_head<W, kDtype, kKind, true>(head, G, rotate, row_bytes);
    else
      encode_head<W, kDtype, kKind, false>(head, G, rotate, row_bytes);
  } else {
    if (per_channel)
      decode_head<W, kDtype, kKind, true>(head, G, rotate, row_bytes);
    else
      decode_head<W, kDtype, kKind, false>(head, G, rotate, row_bytes);
  }
}

template <bool kEncode, int W, i64 kDtype>
void head_of_dtype(const Head& head, const Scheme& s, bool per_channel, i64 row_bytes) {
  const bool rotate = s.rotate != 0;
  switch (s.kind) {
    case kInt8:
      return head_of_kind<kEncode, W, kDtype, kInt8>(head, per_channel, s.group, rotate, row_bytes);
    case kInt4:
      return head_of_kind<kEncode, W, kDtype, kInt4>(head, per_channel, s.group, rotate, row_bytes);
    case kInt2:
      return head_of_kind<kEncode, W, kDtype, kInt2>(head, per_channel, s.group, rotate, row_bytes);
    default:
      return head_of_kind<kEncode, W, kDtype, kFp8>(head, per_channel, s.group, rotate, row_bytes);
  }
}

template <bool kEncode, int W>
void head_of_width(const Head& head, const Scheme& s, i64 dtype, bool per_channel, i64 row_bytes) {
  // Fewer lanes where the head dimension is no multiple of two full vectors; it is one of 8.
  if constexpr (W > 4)
    if (head.D % (2 * W))
      return head_of_width<kEncode, W / 2>(head, s, dtype, per_channel, row_bytes);
  if constexpr (!kEncode)
    if (dtype == kBf16Streamed)
      return head_of_dtype<kEncode, W, kBf16Streamed>(head, s, per_channel, row_bytes);
  if (dtype == kBf16) return head_of_dtype<kEncode, W, kBf16>(head, s, per_channel, row_bytes);
  if (dtype == kF16) return head_of_dtype<kEncode, W, kF16>(head, s, per_channel, row_bytes);
  return head_of_dtype<kEncode, W, kF32>(head, s, per_channel, row_bytes);
}

void copy_row(char* dst, const char* src, i64 bytes, bool stream) {
  if (stream) {
    typedef std::uint32_t Line __attribute__((vector_size(4 * MEMOS_LANES)));
    const i64 size = sizeof(Line), head = -reinterpret_cast<i64>(dst) & (size - 1);
    if (head + size <= bytes) {
      std::memcpy(dst, src, head);
      i64 i = head;
      for (; i + size <= bytes; i += size) store_line<true>(dst + i, load_as<Line>(src + i));
      std::memcpy(dst + i, src + i, bytes - i);
      return;
    }
  }
  std::memcpy(dst, src, bytes);
}

template <bool kEncode>
void copy_raw(const Head& head, i64 row_bytes, bool stream) {
  const bool dense = head.token_bytes == row_bytes;
  const i64 rows = dense ? 1 : head.P, bytes = dense ? head.P * row_bytes : row_bytes;
  for (i64 t = 0; t < rows; ++t) {
    char *numbers = head.numbers + t * head.token_bytes, *codes = head.codes + t * row_bytes;
    copy_row(kEncode ? codes : numbers, kEncode ? numbers : codes, bytes, stream);
  }
}

// The numbers of K or V of one block of one layer.
struct Numbers {
  char* at;
  i64 token_bytes, head_bytes, row_bytes;
};

// K (per_channel) or V of one block of one layer; `next` is the one that follows.
template <bool kEncode>
void do_section(const Numbers& numbers, const Numbers& next, const Scheme& s, const KvCall& call,
                i64 D, bool per_channel, char* packed, const Section& section, bool stream) {
  const i64 where = reinterpret_cast<i64>(numbers.at) | numbers.token_bytes | numbers.head_bytes;
  const bool aligned = where % (4 * MEMOS_LANES) == 0;
  const bool past = stream && aligned && call.dtype == kBf16 && !kEncode;
  for (i64 h = 0; h < call.H; ++h) {
    const Head head{
        numbers.at + h * numbers.head_bytes,
        numbers.token_bytes,
        packed + h * call.P * section.row_bytes,
        packed + section.scales_at + 2 * h * section.groups,
        packed + section.zeros_at + 2 * h * section.groups,
        call.P,
        D,
        h + 1 < call.H ? numbers.at + (h + 1) * numbers.head_bytes : next.at,
        stream && (reinterpret_cast<i64>(packed) | call.P * section.row_bytes) % 32 == 0};
    if (s.kind == kRaw)
      copy_raw<kEncode>(head, section.row_bytes, stream);
    else
      head_of_width<kEncode, MEMOS_LANES>(head, s, past ? kBf16Streamed : call.dtype, per_channel,
                                          section.row_bytes);
  }
  if (kEncode) {
    std::memset(packed + section.padding_at[0], 0, section.scales_at - section.padding_at[0]);
    std::memset(packed + section.padding_at[1], 0, section.bytes - section.padding_at[1]);
  }
}

template <bool kEncode>
void do_tasks(const KvCall& call, i64 first, i64 last) {
  if (first >= last) return;  // M may be 0 then
  const auto* layers = reinterpret_cast<const LayerView*>(call.layers);
  const auto* ids = reinterpret_cast<const i64*>(call.block_ids);
  const auto* rows = reinterpret_cast<const i64*>(call.rows);
  const Scheme k{call.k_kind, call.k_group, call.k_rotate};
  const Scheme v{call.v_kind, call.v_group, call.v_rotate};
  const Section ks = section_of(k, call.P, call.H, call.Dk, call.dtype, true);
  const Section vs = section_of(v, call.P, call.H, call.Dv, call.dtype, false);
  const i64 item = item_bytes(call.dtype);
  const bool stream = (last - first) * call.P * call.H * (call.Dk + call.Dv) * item >= kStreamFrom;
  const auto keys_of = [&](i64 task) {
    const LayerView& view = layers[task / call.M];
    return Numbers{reinterpret_cast<char*>(view.k) + ids[task % call.M] * view.k_block * item,
                   view.k_token * item, view.k_head * item, call.Dk * item};
  };
  const auto values_of = [&](i64 task) {
    const LayerView& view = layers[task / call.M];
    return Numbers{reinterpret_cast<char*>(view.v) + ids[task % call.M] * view.v_block * item,
                   view.v_token * item, view.v_head * item, call.Dv * item};
  };
  Numbers keys = keys_of(first);
  for (i64 task = first; task < last; ++task) {
    char* packed = reinterpret_cast<char*>(rows[task % call.M]) + task / call.M * call.row_bytes;
    const Numbers values = values_of(task);
    const Numbers next = keys_of(task + 1 < last ? task + 1 : task);
    do_section<kEncode>(keys, values, k, call, call.Dk, true, packed, ks, stream);
    do_section<kEncode>(values, next, v, call, call.Dv, false, packed + ks.bytes, vs, stream);
    keys = next;
  }
  if (stream) end_stream();
}

void pack_kv(const KvCall& call, i64 first, i64 last) { do_tasks<true>(call, first, last); }
void unpack_kv(const KvCall& call, i64 first, i64 last) { do_tasks<false>(call, first, last); }

void gather_rows(const char* src, const i64* ids, i64 first, i64 last, i64 row_bytes, char* dst) {
  const bool stream = (last - first) * row_bytes >= kStreamFrom;
  for (i64 i = first; i < last; ++i)
    copy_row(dst + i * row_bytes, src + ids[i] * row_bytes, row_bytes, stream);
  if (stream) end_stream();
}

void write_rows(char* dst, const i64* ids, i64 first, i64 last, i64 row_bytes, const char* src) {
  const bool stream = (last - first) * row_bytes >= kStreamFrom;
  for (i64 i = first; i < last; ++i)
    copy_row(dst + ids[i] * row_bytes, src + i * row_bytes, row_bytes, stream);
  if (stream) end_stream();
}

}  // namespace
}  // namespace memos::cpu
