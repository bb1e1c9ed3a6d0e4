// Rotating rows, and making numbers fit; part of kernels.inl.
#pragma once

#include "cpu/tiles.inl"

namespace memos::cpu {
namespace {

// Rotation: x * Hadamard(n) / sqrt(n), in place, on D floats in Pair order; n divides D.

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

}  // namespace
}  // namespace memos::cpu
