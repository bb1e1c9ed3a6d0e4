// Keys turned on to other positions. Included by one file per instruction set, which says how many
// floats a vector has (MEMOS_LANES); behind slab.inl, which reads and writes numbers.
#pragma once

#include "codec/layout.h"
#include "cpu/kernels.h"
#include "cpu/slab.inl"
#include "cpu/vec.h"

namespace memos::cpu {
namespace {

using namespace memos::codec;

// (a, b) turned by the angle whose cosine and sine are c and s.
template <class F>
MEMOS_HD void turn(F& a, F& b, F c, F s) {
  const F x = sub(mul(a, c), mul(b, s));
  b = add(mul(b, c), mul(a, s));
  a = x;
}

template <i64 kDtype>
MEMOS_HD void turn_numbers(char* a, char* b, const float* c, const float* s) {
  float x, y;
  move_number<kDtype, kF32>(reinterpret_cast<char*>(&x), a);
  move_number<kDtype, kF32>(reinterpret_cast<char*>(&y), b);
  turn(x, y, *c, *s);
  move_number<kF32, kDtype>(a, reinterpret_cast<const char*>(&x));
  move_number<kF32, kDtype>(b, reinterpret_cast<const char*>(&y));
}

// Channel i turns with channel i + half.
template <int W, i64 kDtype>
MEMOS_HD void turn_halves(char* row, i64 half, const float* cosines, const float* sines) {
  using F = typename Vec<W>::F;
  const i64 item = item_bytes(kDtype);
  char *first = row, *second = row + half * item;
  typename Vec<W>::U bad{};
  i64 i = 0;
  for (; i + W <= half; i += W) {
    F a = load_numbers<W, kDtype>(first + i * item), b = load_numbers<W, kDtype>(second + i * item);
    turn(a, b, load_as<F>(cosines + i), load_as<F>(sines + i));
    store_numbers<W, kDtype>(first + i * item, a, bad);
    store_numbers<W, kDtype>(second + i * item, b, bad);
  }
  for (; i < half; ++i)
    turn_numbers<kDtype>(first + i * item, second + i * item, cosines + i, sines + i);
}

// Channel 2i turns with channel 2i + 1.
template <int W, i64 kDtype>
MEMOS_HD void turn_neighbours(char* row, i64 half, const float* cosines, const float* sines) {
  using F = typename Vec<W>::F;
  const i64 item = item_bytes(kDtype);
  typename Vec<W>::U bad{};
  i64 i = 0;
  for (; i + W <= half; i += W) {
    char* at = row + 2 * i * item;
    const F x = load_numbers<W, kDtype>(at), y = load_numbers<W, kDtype>(at + W * item);
    F a = every_second<0, W>(x, y), b = every_second<1, W>(x, y);
    turn(a, b, load_as<F>(cosines + i), load_as<F>(sines + i));
    store_numbers<W, kDtype>(at, interleave<0, W>(a, b), bad);
    store_numbers<W, kDtype>(at + W * item, interleave<1, W>(a, b), bad);
  }
  for (; i < half; ++i) {
    char* at = row + 2 * i * item;
    turn_numbers<kDtype>(at, at + item, cosines + i, sines + i);
  }
}

// The pairs of a row from `row` on, whose angles are [2][half].
template <int W, i64 kDtype>
MEMOS_HD void turn_row(char* row, i64 half, bool interleaved, const float* angles) {
  if (interleaved)
    turn_neighbours<W, kDtype>(row, half, angles, angles + half);
  else
    turn_halves<W, kDtype>(row, half, angles, angles + half);
}

template <i64 kDtype>
void turn_rows(const TurnCall& call, i64 first, i64 last) {
  constexpr int W = MEMOS_LANES;
  const auto* layers = reinterpret_cast<const KeyView*>(call.layers);
  const auto* table = reinterpret_cast<const float*>(call.table);
  const i64 per_layer = call.B * call.H;
  for (i64 task = first; task < last; ++task) {
    const KeyView& view = layers[task / per_layer];
    const i64 row = task % per_layer / call.H, head = task % call.H;
    char* at = reinterpret_cast<char*>(view.keys) +
               (row * view.row + head * view.head) * item_bytes(kDtype);
    for (i64 t = 0; t < call.T; ++t)
      turn_row<W, kDtype>(at + t * view.token * item_bytes(kDtype), call.half,
                          call.interleaved != 0, table + t * 2 * call.half);
  }
}

void turn_keys(const TurnCall& call, i64 first, i64 last) {
  if (call.dtype == kBf16) return turn_rows<kBf16>(call, first, last);
  if (call.dtype == kF16) return turn_rows<kF16>(call, first, last);
  turn_rows<kF32>(call, first, last);
}

}  // namespace
}  // namespace memos::cpu
