// Keys turned on to other positions: pairs of channels times a table of cosines and sines.
#include <stdexcept>

#include "codec/layout.h"
#include "cuda/kernels.h"
#include "cuda/turn.cuh"

namespace memos::cuda {
namespace {

constexpr int kTurnThreads = 256;
constexpr int kViewsAtOnce = 64;  // parameters of a launch: 4 KB at most

struct TurnPart {
  KeyView layers[kViewsAtOnce];
  const float* table;  // [T][2][half], on the device
  int B, H, T, half;
  int units;   // pieces of kPairs pairs of a token
  int blocks;  // of threads, of one head
  bool interleaved;
};

// A thread turns one piece of one token of one head: kPairs pairs (16 bytes of each half), or one.
template <i64 kDtype, bool kWide>
__global__ void __launch_bounds__(kTurnThreads) turn_kernel(const __grid_constant__ TurnPart part) {
  constexpr int kItemBytes = kItem<kDtype>, kPairs = kWide ? 16 / kItemBytes : 1;
  const unsigned task = blockIdx.x / part.blocks;
  const int place = (blockIdx.x % part.blocks) * kTurnThreads + threadIdx.x;
  const int t = place / part.units, i = place % part.units * kPairs;
  if (t >= part.T) return;
  const unsigned head = task % part.H, row = task / part.H % part.B;
  const KeyView& view = part.layers[task / part.H / part.B];
  char* token =
      in_global(view.keys + (row * view.row + head * view.head + t * view.token) * kItemBytes);
  const float* angle = part.table + static_cast<i64>(t) * 2 * part.half + i;
  if constexpr (!kWide) {
    char* a_at = token + (part.interleaved ? 2 * i : i) * kItemBytes;
    char* b_at = part.interleaved ? a_at + kItemBytes : a_at + part.half * kItemBytes;
    float a = read_number<kDtype>(a_at), b = read_number<kDtype>(b_at);
    turn(a, b, angle[0], angle[part.half]);
    write_number<kDtype>(a_at, a);
    write_number<kDtype>(b_at, b);
  } else {
    float c[kPairs], s[kPairs], a[kPairs], b[kPairs];
    read_numbers<kF32>(reinterpret_cast<const char*>(angle), c);
    read_numbers<kF32>(reinterpret_cast<const char*>(angle + part.half), s);
    char* a_at = token + (part.interleaved ? 2 * i : i) * kItemBytes;
    char* b_at = a_at + (part.interleaved ? kPairs : part.half) * kItemBytes;
    read_numbers<kDtype>(a_at, a);
    read_numbers<kDtype>(b_at, b);
    if (part.interleaved) {
#pragma unroll
      for (int j = 0; j < kPairs; j += 2) {
        turn(a[j], a[j + 1], c[j / 2], s[j / 2]);
        turn(b[j], b[j + 1], c[(kPairs + j) / 2], s[(kPairs + j) / 2]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) turn(a[j], b[j], c[j], s[j]);
    }
    write_numbers<kDtype>(a_at, a);
    write_numbers<kDtype>(b_at, b);
  }
}

template <i64 kDtype>
void turn_dtype(const TurnCall& call, Stream stream) {
  const auto* layers = reinterpret_cast<const KeyView*>(call.layers);
  const i64 item = item_bytes(kDtype);
  i64 all = call.table | call.half * item | call.half * 4;
  for (i64 l = 0; l < call.L; ++l) {
    const KeyView& v = layers[l];
    all |= v.keys | item * (v.row | v.head | v.token);
  }
  const bool wide = all % 16 == 0;
  TurnPart part;
  part.table = reinterpret_cast<const float*>(call.table);
  part.B = static_cast<int>(call.B);
  part.H = static_cast<int>(call.H);
  part.T = static_cast<int>(call.T);
  part.half = static_cast<int>(call.half);
  part.units = static_cast<int>(wide ? call.half * item / 16 : call.half);
  part.interleaved = call.interleaved != 0;
  const i64 blocks = (call.T * part.units + kTurnThreads - 1) / kTurnThreads;
  if (blocks > INT32_MAX / kTurnThreads || call.B * call.H > INT32_MAX / (blocks * kViewsAtOnce))
    throw std::invalid_argument("keys: too many rows, heads and tokens for one launch");
  part.blocks = static_cast<int>(blocks);
  const auto kernel = wide ? turn_kernel<kDtype, true> : turn_kernel<kDtype, false>;
  for (i64 l = 0; l < call.L; l += kViewsAtOnce) {
    const i64 count = call.L - l < kViewsAtOnce ? call.L - l : kViewsAtOnce;
    for (i64 i = 0; i < count; ++i) part.layers[i] = layers[l + i];
    MEMOS_LAUNCH(kernel, dim3(static_cast<unsigned>(count * call.B * call.H * blocks)),
                 dim3(kTurnThreads), 0, stream, part);
    check_launch("rotate_positions_");
  }
}

}  // namespace

void turn_keys(const TurnCall& call, Stream stream) {
  if (call.L * call.B * call.H * call.T * call.half == 0) return;
  if (call.dtype == kF32)
    turn_dtype<kF32>(call, stream);
  else if (call.dtype == kF16)
    turn_dtype<kF16>(call, stream);
  else
    turn_dtype<kBf16>(call, stream);
}

}  // namespace memos::cuda
