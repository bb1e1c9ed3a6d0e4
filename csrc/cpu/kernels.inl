// The one body of the CPU kernels. Included by one file per instruction set, which says how many
// floats a vector has (MEMOS_LANES). No allocation, no statics, nothing with external linkage.
//
// 2W consecutive channels are handled as a Pair: the even ones and the odd ones. For bf16 that is
// one load, a shift and a mask; two 4-bit codes of a byte, and the first rotation step, fall on the
// two halves of a Pair.
#include <cmath>
#include <limits>

#include "codec/layout.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace memos::cpu {
namespace {

using namespace memos::codec;

constexpr i64 kScratch = 3;       // a "dtype": floats in Pair order, in a scratch tile
constexpr i64 kTokensAtOnce = 64;  // of a V section: bounds the tables on the stack
constexpr i64 kMaxGroups = kMaxHeadDim / 32;

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
  if constexpr (kDtype == kBf16) {
    store_as(row + 2 * channel, U((bf16_rounded(x.even) >> 16) | (bf16_rounded(x.odd) & 0xffff0000u)));
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
MEMOS_HD void store_codes(char* row, i64 channel, typename Vec<W>::U even, typename Vec<W>::U odd) {
  using V = Vec<W>;
  if constexpr (kKind == kInt8 || kKind == kFp8) {
    store_as(row + channel, __builtin_convertvector(even | (odd << 8), typename V::U16));
  } else if constexpr (kKind == kInt4) {
    store_as(row + channel / 2, __builtin_convertvector(even | (odd << 4), typename V::U8));
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
    const U u = __builtin_convertvector(load_as<typename V::U16>(row + channel), U);
    even = u & 0xffu;
    odd = u >> 8;
  } else if constexpr (kKind == kInt4) {
    const U u = __builtin_convertvector(load_as<typename V::U8>(row + channel / 2), U);
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

// Numbers that do not fit: NaN, infinity or beyond fp16.
template <class F, class U = typename Lanes<F>::U>
MEMOS_HD U unfit(F x) {
  return abs_of(x) <= F{} + kFp16Max ? U{} : ~U{};
}

template <i64 kKind, class U>
MEMOS_HD U invalid_bits(U even, U odd) {
  if constexpr (kKind == kFp8) return U{};
  const U mask = U{} + ~static_cast<std::uint32_t>(levels_of<kKind>());
  return ((even ^ kMagicBits) | (odd ^ kMagicBits)) & mask;
}

// K: a scale per channel over T tokens. Returns whether a number did not fit: the codes are then
// not to be used, and the caller comes again with numbers made to fit.
template <int W, i64 kSource, i64 kKind>
bool encode_channels(const char* src, i64 token_bytes, i64 T, i64 D, char* codes, i64 row_bytes,
                     char* scales, char* zeros) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  const F inf = F{} + std::numeric_limits<float>::infinity();
  U bad{};
  for (i64 c = 0; c < D; c += 2 * W) {
    Pair<W> lo{inf, inf}, hi{-inf, -inf};
    if constexpr (kKind == kFp8) hi = {F{}, F{}};
    for (i64 t = 0; t < T; ++t) {
      const Pair<W> x = load_pair<W, kSource>(src + t * token_bytes, c);
      if constexpr (kKind == kFp8) {
        hi = {max_of(abs_of(x.even), hi.even), max_of(abs_of(x.odd), hi.odd)};
        bad |= unfit(x.even) | unfit(x.odd);
      } else {
        lo = {min_of(x.even, lo.even), min_of(x.odd, lo.odd)};
        hi = {max_of(x.even, hi.even), max_of(x.odd, hi.odd)};
      }
    }
    const Group<F> even = group_of<kKind>(lo.even, hi.even);
    const Group<F> odd = group_of<kKind>(lo.odd, hi.odd);
    store_as(scales + 2 * c, U(even.scale | (odd.scale << 16)));
    if constexpr (kKind != kFp8) store_as(zeros + 2 * c, U(even.zero | (odd.zero << 16)));
    for (i64 t = 0; t < T; ++t) {
      const Pair<W> x = load_pair<W, kSource>(src + t * token_bytes, c);
      const U e = code_of<kKind>(x.even, even.zero_value, even.inverse);
      const U o = code_of<kKind>(x.odd, odd.zero_value, odd.inverse);
      bad |= invalid_bits<kKind>(e, o);
      store_codes<W, kKind>(codes + t * row_bytes, c, e, o);
    }
  }
  return any_lane(bad);
}

// V: a scale per token and group of channels, T <= kTokensAtOnce tokens.
template <int W, i64 kSource, i64 kKind>
bool encode_tokens(const char* src, i64 token_bytes, i64 T, i64 D, i64 G, char* codes,
                   i64 row_bytes, char* scales, char* zeros) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  using U16 = typename Vec<W>::U16;
  const F inf = F{} + std::numeric_limits<float>::infinity();
  const i64 groups = num_groups(D, G), count = T * groups;
  float lows[kTokensAtOnce * kMaxGroups + 16], highs[kTokensAtOnce * kMaxGroups + 16];
  U bad{};
  for (i64 t = 0; t < T; ++t) {
    const char* row = src + t * token_bytes;
    for (i64 g = 0; g < groups; ++g) {
      const i64 end = (g + 1) * G < D ? (g + 1) * G : D;
      F lo = inf, hi = kKind == kFp8 ? F{} : -inf;
      for (i64 c = g * G; c < end; c += 2 * W) {
        const Pair<W> x = load_pair<W, kSource>(row, c);
        if constexpr (kKind == kFp8) {
          hi = max_of(abs_of(x.odd), max_of(abs_of(x.even), hi));
          bad |= unfit(x.even) | unfit(x.odd);
        } else {
          lo = min_of(x.odd, min_of(x.even, lo));
          hi = max_of(x.odd, max_of(x.even, hi));
        }
      }
      if constexpr (kKind != kFp8) lows[t * groups + g] = min_lane<W>(lo);
      highs[t * groups + g] = max_lane<W>(hi);
    }
  }
  for (i64 i = count; i < count + W; ++i) lows[i] = highs[i] = 0.0f;
  for (i64 i = 0; i < count; i += W) {
    const Group<F> g = group_of<kKind>(load_as<F>(lows + i), load_as<F>(highs + i));
    const U16 scale = __builtin_convertvector(g.scale, U16);
    const U16 zero = __builtin_convertvector(g.zero, U16);
    const i64 n = 2 * (count - i < W ? count - i : W);
    std::memcpy(scales + 2 * i, &scale, n);
    if constexpr (kKind != kFp8) std::memcpy(zeros + 2 * i, &zero, n);
    store_as(lows + i, g.zero_value);
    store_as(highs + i, g.inverse);
  }
  for (i64 t = 0; t < T; ++t) {
    const char* row = src + t * token_bytes;
    for (i64 g = 0; g < groups; ++g) {
      const i64 end = (g + 1) * G < D ? (g + 1) * G : D;
      const F zero = F{} + lows[t * groups + g], inverse = F{} + highs[t * groups + g];
      for (i64 c = g * G; c < end; c += 2 * W) {
        const Pair<W> x = load_pair<W, kSource>(row, c);
        const U e = code_of<kKind>(x.even, zero, inverse);
        const U o = code_of<kKind>(x.odd, zero, inverse);
        bad |= invalid_bits<kKind>(e, o);
        store_codes<W, kKind>(codes + t * row_bytes, c, e, o);
      }
    }
  }
  return any_lane(bad);
}

template <int W, i64 kKind>
MEMOS_HD Pair<W> decode_pair(const char* row, i64 c, Pair<W> scale, Pair<W> zero) {
  using F = typename Vec<W>::F;
  typename Vec<W>::U e, o;
  load_codes<W, kKind>(row, c, e, o);
  if constexpr (kKind == kFp8)
    return {mul(e4m3_value<F>(e), scale.even), mul(e4m3_value<F>(o), scale.odd)};
  // The product is exact (8 x 11 bits), so a fused multiply-add would give the same bits.
  return {add(zero.even, mul(to_float<F>(e), scale.even)),
          add(zero.odd, mul(to_float<F>(o), scale.odd))};
}

template <int W, i64 kTarget, i64 kKind>
void decode_channels(const char* codes, i64 row_bytes, const char* scales, const char* zeros,
                     i64 T, i64 D, char* dst, i64 token_bytes) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  for (i64 c = 0; c < D; c += 2 * W) {
    const U s = load_as<U>(scales + 2 * c);
    const U z = kKind == kFp8 ? U{} : load_as<U>(zeros + 2 * c);
    const Pair<W> scale{fp16_value<F>(s & 0xffffu), fp16_value<F>(s >> 16)};
    const Pair<W> zero{fp16_value<F>(z & 0xffffu), fp16_value<F>(z >> 16)};
    for (i64 t = 0; t < T; ++t)
      store_pair<W, kTarget>(dst + t * token_bytes, c,
                             decode_pair<W, kKind>(codes + t * row_bytes, c, scale, zero));
  }
}

template <int W, i64 kTarget, i64 kKind>
void decode_tokens(const char* codes, i64 row_bytes, const char* scales, const char* zeros, i64 T,
                   i64 D, i64 G, char* dst, i64 token_bytes) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  using U16 = typename Vec<W>::U16;
  const i64 groups = num_groups(D, G), count = T * groups;
  float scale_of[kTokensAtOnce * kMaxGroups + 16], zero_of[kTokensAtOnce * kMaxGroups + 16];
  for (i64 i = 0; i < count; i += W) {
    U16 s{}, z{};
    const i64 n = 2 * (count - i < W ? count - i : W);
    std::memcpy(&s, scales + 2 * i, n);
    if constexpr (kKind != kFp8) std::memcpy(&z, zeros + 2 * i, n);
    store_as(scale_of + i, fp16_value<F>(__builtin_convertvector(s, U)));
    store_as(zero_of + i, fp16_value<F>(__builtin_convertvector(z, U)));
  }
  for (i64 t = 0; t < T; ++t) {
    for (i64 g = 0; g < groups; ++g) {
      const i64 end = (g + 1) * G < D ? (g + 1) * G : D;
      const F s = F{} + scale_of[t * groups + g], z = F{} + zero_of[t * groups + g];
      for (i64 c = g * G; c < end; c += 2 * W)
        store_pair<W, kTarget>(dst + t * token_bytes, c,
                               decode_pair<W, kKind>(codes + t * row_bytes, c, {s, s}, {z, z}));
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
  for (int i = 0; i < W; ++i) sign[i] = i & kStep ? 0x80000000u : 0u;
  return add(swap_lanes<W, kStep>(x), bit_cast<F>(bit_cast<U>(x) ^ sign));
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
  for (i64 i = 0; i < vectors; ++i)
    store_as(row + i * W, mul(load_as<F>(row + i * W), F{} + norm));
}

template <class F, class U = typename Lanes<F>::U>
MEMOS_HD F made_fit(F x) {
  const F top = F{} + kFp16Max;
  return x == x ? min_of(max_of(x, -top), top) : F{};
}

// One row from `source` to `target` (either may be scratch), rotated between. Returns the lanes
// whose number did not fit; with kFit they are made to fit first.
template <int W, i64 kSource, i64 kTarget, bool kFit, int kVectors>
MEMOS_HD typename Vec<W>::U rotate_row(const char* src, char* dst, i64 n, float norm) {
  using F = typename Vec<W>::F;
  typename Vec<W>::U bad{};
  F x[kVectors];
  for (int i = 0; i < kVectors; i += 2) {
    Pair<W> p = load_pair<W, kSource>(src, i * W);
    if constexpr (kFit) {
      p = {made_fit(p.even), made_fit(p.odd)};
    } else if constexpr (kSource != kScratch) {
      bad |= unfit(p.even) | unfit(p.odd);
    }
    x[i] = p.even;
    x[i + 1] = p.odd;
  }
  rotate_known<W>(x, n, norm);
  for (int i = 0; i < kVectors; i += 2) store_pair<W, kTarget>(dst, i * W, {x[i], x[i + 1]});
  return bad;
}

// T rows of D channels from src to dst, rotated if `rotate`. Returns whether a number did not fit.
template <int W, i64 kSource, i64 kTarget, bool kFit>
bool move_rows(const char* src, i64 src_bytes, char* dst, i64 dst_bytes, i64 T, i64 D,
               bool rotate) {
  using U = typename Vec<W>::U;
  U bad{};
  const i64 n = D & -D;
  const float norm = hadamard_norm(n);
  for (i64 t = 0; t < T; ++t) {
    const char* from = src + t * src_bytes;
    char* to = dst + t * dst_bytes;
    if (rotate && D == 2 * W) {
      bad |= rotate_row<W, kSource, kTarget, kFit, 2>(from, to, n, norm);
    } else if (rotate && D == 4 * W) {
      bad |= rotate_row<W, kSource, kTarget, kFit, 4>(from, to, n, norm);
    } else if (rotate && D == 8 * W) {
      bad |= rotate_row<W, kSource, kTarget, kFit, 8>(from, to, n, norm);
    } else {
      float row[kMaxHeadDim];
      char* at = reinterpret_cast<char*>(row);
      for (i64 c = 0; c < D; c += 2 * W) {
        Pair<W> p = load_pair<W, kSource>(from, c);
        if constexpr (kFit) p = {made_fit(p.even), made_fit(p.odd)};
        else bad |= unfit(p.even) | unfit(p.odd);
        store_pair<W, kScratch>(at, c, p);
      }
      if (rotate) rotate_any<W>(row, D, n, norm);
      for (i64 c = 0; c < D; c += 2 * W)
        store_pair<W, kTarget>(to, c, load_pair<W, kScratch>(at, c));
    }
  }
  return any_lane(bad);
}

// One head of one section, K (kPerChannel) or V.
struct Head {
  char* numbers;  // [P] rows of D numbers, token_bytes apart
  i64 token_bytes;
  char *codes, *scales, *zeros;
  i64 P, D;
};

template <int W, i64 kSource, i64 kKind, bool kPerChannel>
MEMOS_HD bool encode_tile(const char* src, i64 token_bytes, i64 T, i64 D, i64 G, char* codes,
                          i64 row_bytes, char* scales, char* zeros) {
  if constexpr (kPerChannel)
    return encode_channels<W, kSource, kKind>(src, token_bytes, T, D, codes, row_bytes, scales,
                                              zeros);
  else
    return encode_tokens<W, kSource, kKind>(src, token_bytes, T, D, G, codes, row_bytes, scales,
                                            zeros);
}

template <int W, i64 kDtype, i64 kKind, bool kPerChannel>
void encode_head(const Head& head, i64 G, bool rotate, i64 row_bytes) {
  alignas(64) float tile[kTokensAtOnce * kMaxHeadDim];
  char* scratch = reinterpret_cast<char*>(tile);
  const i64 D = head.D, step = kPerChannel ? G : kTokensAtOnce;
  const i64 params = kPerChannel ? 2 * D : 2 * kTokensAtOnce * num_groups(D, G);
  for (i64 t = 0, i = 0; t < head.P; t += step, ++i) {
    const i64 T = head.P - t < step ? head.P - t : step;
    const char* src = head.numbers + t * head.token_bytes;
    char* codes = head.codes + t * row_bytes;
    char *scales = head.scales + i * params, *zeros = head.zeros + i * params;
    if (!rotate) {
      if (!encode_tile<W, kDtype, kKind, kPerChannel>(src, head.token_bytes, T, D, G, codes,
                                                      row_bytes, scales, zeros))
        continue;
      move_rows<W, kDtype, kScratch, true>(src, head.token_bytes, scratch, 4 * D, T, D, false);
    } else if (move_rows<W, kDtype, kScratch, false>(src, head.token_bytes, scratch, 4 * D, T, D,
                                                     true)) {
      move_rows<W, kDtype, kScratch, true>(src, head.token_bytes, scratch, 4 * D, T, D, true);
    }
    if (encode_tile<W, kScratch, kKind, kPerChannel>(scratch, 4 * D, T, D, G, codes, row_bytes,
                                                     scales, zeros)) {
      move_rows<W, kScratch, kScratch, true>(scratch, 4 * D, scratch, 4 * D, T, D, false);
      encode_tile<W, kScratch, kKind, kPerChannel>(scratch, 4 * D, T, D, G, codes, row_bytes,
                                                   scales, zeros);
    }
  }
}

template <int W, i64 kTarget, i64 kKind, bool kPerChannel>
MEMOS_HD void decode_tile(const char* codes, i64 row_bytes, const char* scales, const char* zeros,
                          i64 T, i64 D, i64 G, char* dst, i64 token_bytes) {
  if constexpr (kPerChannel)
    decode_channels<W, kTarget, kKind>(codes, row_bytes, scales, zeros, T, D, dst, token_bytes);
  else
    decode_tokens<W, kTarget, kKind>(codes, row_bytes, scales, zeros, T, D, G, dst, token_bytes);
}

template <int W, i64 kDtype, i64 kKind, bool kPerChannel>
void decode_head(const Head& head, i64 G, bool rotate, i64 row_bytes) {
  alignas(64) float tile[kTokensAtOnce * kMaxHeadDim];
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
      move_rows<W, kScratch, kDtype, false>(scratch, 4 * D, dst, head.token_bytes, T, D, true);
    }
  }
}

// From run-time numbers to the instance compiled for them.

template <bool kEncode, int W, i64 kDtype, i64 kKind>
void head_of_kind(const Head& head, bool per_channel, i64 G, bool rotate, i64 row_bytes) {
  if constexpr (kEncode) {
    if (per_channel) encode_head<W, kDtype, kKind, true>(head, G, rotate, row_bytes);
    else encode_head<W, kDtype, kKind, false>(head, G, rotate, row_bytes);
  } else {
    if (per_channel) decode_head<W, kDtype, kKind, true>(head, G, rotate, row_bytes);
    else decode_head<W, kDtype, kKind, false>(head, G, rotate, row_bytes);
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
    if (head.D % (2 * W)) return head_of_width<kEncode, W / 2>(head, s, dtype, per_channel, row_bytes);
  if (dtype == kBf16) return head_of_dtype<kEncode, W, kBf16>(head, s, per_channel, row_bytes);
  if (dtype == kF16) return head_of_dtype<kEncode, W, kF16>(head, s, per_channel, row_bytes);
  return head_of_dtype<kEncode, W, kF32>(head, s, per_channel, row_bytes);
}

template <bool kEncode>
void copy_raw(const Head& head, i64 row_bytes) {
  const bool dense = head.token_bytes == row_bytes;
  const i64 rows = dense ? 1 : head.P, bytes = dense ? head.P * row_bytes : row_bytes;
  for (i64 t = 0; t < rows; ++t) {
    char *numbers = head.numbers + t * head.token_bytes, *codes = head.codes + t * row_bytes;
    std::memcpy(kEncode ? codes : numbers, kEncode ? numbers : codes, bytes);
  }
}

// K (per_channel) or V of one block of one layer.
template <bool kEncode>
void do_section(char* numbers, i64 token_stride, i64 head_stride, const Scheme& s,
                const KvCall& call, i64 D, bool per_channel, char* packed, const Section& section) {
  const i64 item = item_bytes(call.dtype);
  for (i64 h = 0; h < call.H; ++h) {
    const Head head{numbers + h * head_stride * item,
                    token_stride * item,
                    packed + h * call.P * section.row_bytes,
                    packed + section.scales_at + 2 * h * section.groups,
                    packed + section.zeros_at + 2 * h * section.groups,
                    call.P,
                    D};
    if (s.kind == kRaw) copy_raw<kEncode>(head, section.row_bytes);
    else head_of_width<kEncode, MEMOS_LANES>(head, s, call.dtype, per_channel, section.row_bytes);
  }
  if (kEncode) {
    std::memset(packed + section.padding_at[0], 0, section.scales_at - section.padding_at[0]);
    std::memset(packed + section.padding_at[1], 0, section.bytes - section.padding_at[1]);
  }
}

template <bool kEncode>
void do_tasks(const KvCall& call, i64 first, i64 last) {
  const auto* layers = reinterpret_cast<const LayerView*>(call.layers);
  const auto* ids = reinterpret_cast<const i64*>(call.block_ids);
  const auto* rows = reinterpret_cast<const i64*>(call.rows);
  const Scheme k{call.k_kind, call.k_group, call.k_rotate};
  const Scheme v{call.v_kind, call.v_group, call.v_rotate};
  const Section ks = section_of(k, call.P, call.H, call.Dk, call.dtype, true);
  const Section vs = section_of(v, call.P, call.H, call.Dv, call.dtype, false);
  const i64 item = item_bytes(call.dtype);
  for (i64 task = first; task < last; ++task) {
    const i64 layer = task / call.M, m = task % call.M;
    const LayerView& view = layers[layer];
    char* packed = reinterpret_cast<char*>(rows[m]) + layer * call.row_bytes;
    char* keys = reinterpret_cast<char*>(view.k) + ids[m] * view.k_block * item;
    char* values = reinterpret_cast<char*>(view.v) + ids[m] * view.v_block * item;
    do_section<kEncode>(keys, view.k_token, view.k_head, k, call, call.Dk, true, packed, ks);
    do_section<kEncode>(values, view.v_token, view.v_head, v, call, call.Dv, false,
                        packed + ks.bytes, vs);
  }
}

void pack_kv(const KvCall& call, i64 first, i64 last) { do_tasks<true>(call, first, last); }
void unpack_kv(const KvCall& call, i64 first, i64 last) { do_tasks<false>(call, first, last); }

// Beyond this many bytes a copy outgrows the caches: storing past them saves reading the target.
constexpr i64 kStreamFrom = 8 << 20;

void copy_row(char* dst, const char* src, i64 bytes, bool stream) {
#if defined(__SSE2__)
  if (stream) {
    typedef std::uint32_t Line __attribute__((vector_size(4 * MEMOS_LANES)));
    const i64 head = -reinterpret_cast<i64>(dst) & (sizeof(Line) - 1);
    if (head >= bytes) {
      std::memcpy(dst, src, bytes);
      return;
    }
    std::memcpy(dst, src, head);
    i64 i = head;
    for (; i + static_cast<i64>(sizeof(Line)) <= bytes; i += sizeof(Line)) {
      const Line line = load_as<Line>(src + i);
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), (__m512i)line);
#elif defined(__AVX__)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i), (__m256i)line);
#else
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), (__m128i)line);
#endif
    }
    std::memcpy(dst + i, src + i, bytes - i);
    return;
  }
#endif
  (void)stream;
  std::memcpy(dst, src, bytes);
}

void end_stream(bool stream) {
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
  (void)stream;
}

void gather_rows(const char* src, const i64* ids, i64 first, i64 last, i64 row_bytes, char* dst) {
  const bool stream = (last - first) * row_bytes >= kStreamFrom;
  for (i64 i = first; i < last; ++i)
    copy_row(dst + i * row_bytes, src + ids[i] * row_bytes, row_bytes, stream);
  end_stream(stream);
}

void write_rows(char* dst, const i64* ids, i64 first, i64 last, i64 row_bytes, const char* src) {
  const bool stream = (last - first) * row_bytes >= kStreamFrom;
  for (i64 i = first; i < last; ++i)
    copy_row(dst + ids[i] * row_bytes, src + i * row_bytes, row_bytes, stream);
  end_stream(stream);
}

}  // namespace
}  // namespace memos::cpu
