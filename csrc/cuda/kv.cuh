// What pack_kv and unpack_kv share: the parts of a call that one launch does, which block of
// threads does what, and the rotation of a tile in shared memory.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/numbers.cuh"

namespace memos::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLayersAtOnce = 32;  // parameters of a launch: 4 KB at most
constexpr int kRowsAtOnce = 160;
constexpr int kTileTokens = 64;
constexpr int kTileBytes = 72 << 10;  // of a rotated tile: 64 tokens of 256 channels

// The K or the V of every task.
struct Side {
  Section section;
  i64 offset;  // of the section in a layer's bytes
  int kind, group, rotate, D;
  int tile, tiles;               // tokens of a tile, tiles of a head
  int columns, lanes;            // threads along a row, 8 channels each, and rows at once
  int rows, log_rows;            // of a tile that are in shared memory at once, a power of two
  int row_floats, plane_floats;  // of a rotated tile
};

struct KvPart {
  LayerView layers[kLayersAtOnce];
  i64 rows[kRowsAtOnce];  // of packed bytes; with a stride, the first one alone
  i64 row_stride;
  const i64* block_ids;
  i64 row_bytes;
  i64 layer_offset;  // of layers[0] in a row
  int L, M, P, H;
  Side side[2];
  const float* angles;  // of the first block: [P][2][half]; of unpack_kv
  int half, first_channel, interleaved;
};

// A block of threads' own part: tokens [first, first + tokens) of one head.
struct Work {
  int value;  // 0: K, 1: V
  int head, tile, first, tokens;
  char* numbers;  // the first token's row
  i64 token_bytes;
  char* packed;         // the section
  const float* angles;  // of token `first`
};

template <i64 kDtype>
__device__ __forceinline__ Work work_of(const KvPart& part) {
  const unsigned keys = part.H * part.side[0].tiles;
  const unsigned each = keys + part.H * part.side[1].tiles;
  const unsigned task = blockIdx.x / each, left = blockIdx.x % each;
  const unsigned m = task % part.M, layer = task / part.M;
  Work w;
  w.value = left >= keys;
  const Side& side = part.side[w.value];
  const unsigned index = w.value ? left - keys : left;
  w.head = index / side.tiles;
  w.tile = index % side.tiles;
  w.first = w.tile * side.tile;
  w.tokens = part.P - w.first < side.tile ? part.P - w.first : side.tile;
  const LayerView& view = part.layers[layer];
  const i64 base = w.value ? view.v : view.k;
  const i64 block = w.value ? view.v_block : view.k_block;
  const i64 token = w.value ? view.v_token : view.k_token;
  const i64 head = w.value ? view.v_head : view.k_head;
  w.token_bytes = token * kItem<kDtype>;
  const i64 offset = part.block_ids[m] * block + w.first * token + w.head * head;
  w.numbers = in_global(base + offset * kItem<kDtype>);
  const i64 row = part.row_stride ? part.rows[0] + m * part.row_stride : part.rows[m];
  w.angles = part.angles + static_cast<i64>(m * part.P + w.first) * 2 * part.half;
  w.packed = in_global(row + (part.layer_offset + layer) * part.row_bytes + side.offset);
  return w;
}

// Raw numbers, from row to row: with kAligned in words of 16 bytes.
template <bool kAligned>
__device__ __forceinline__ void copy_rows(char* to, i64 to_bytes, const char* from, i64 from_bytes,
                                          int rows, int row_bytes) {
  constexpr int kWord = kAligned ? 16 : 1;
  const int words = row_bytes / kWord, lanes = words < kThreads ? words : kThreads;
  const int column = threadIdx.x % lanes, step = kThreads / lanes;
  if (static_cast<int>(threadIdx.x) >= lanes * step) return;
#pragma unroll 4
  for (int r = threadIdx.x / lanes; r < rows; r += step)
    for (int i = column; i < words; i += lanes) {
      char* p = to + r * to_bytes + i * kWord;
      const char* q = from + r * from_bytes + i * kWord;
      if constexpr (kAligned)
        store_words<4>(p, load_words<4>(q));
      else
        *p = *q;
    }
}

// A tile of floats for the rotation. Channels 8j to 8j + 3 stand in one plane, 8j + 4 to 8j + 7 in
// the other, so that neighbouring threads with 8 channels each meet different banks; so do threads
// with channels 8 apart, because of the gaps between rows and planes (set_tile).
struct Tile {
  float* at;
  int row, plane;

  __device__ __forceinline__ float* place(int r, int channel) const {
    return at + (channel & 4 ? plane : 0) + r * row + (channel >> 3) * 4 + (channel & 3);
  }
  __device__ __forceinline__ void load(int r, int channel, float (&x)[8]) const {
    const float4 a = *reinterpret_cast<const float4*>(place(r, channel));
    const float4 b = *reinterpret_cast<const float4*>(place(r, channel + 4));
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }
  __device__ __forceinline__ void store(int r, int channel, const float (&x)[8]) const {
    *reinterpret_cast<float4*>(place(r, channel)) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(place(r, channel + 4)) = make_float4(x[4], x[5], x[6], x[7]);
  }
};

// The butterflies between kCount numbers, neighbours first.
template <int kCount>
__device__ __forceinline__ void butterflies(float (&x)[kCount]) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = add(a, b);
      x[i + step] = sub(a, b);
    }
}

template <int kCount>
__device__ __forceinline__ void scale_by(float (&x)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = mul(x[i], factor);
}

// Butterflies between kCount channels that are 2^log_step apart, in place; `factor` afterwards.
template <int kCount>
__device__ __forceinline__ void rotate_apart(const Tile& tile, const Side& side, int rows,
                                             int log_step, float factor) {
  const int step = 1 << log_step, log_rows = side.log_rows;
  const int count = (side.D / kCount) << log_rows;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int low = i & (step - 1), r = (i >> log_step) & ((1 << log_rows) - 1);
    const int first = (i >> (log_step + log_rows)) * step * kCount + low;
    if (r >= rows) continue;
    float x[kCount];
    float* p = tile.place(r, first);  // steps of 8 channels and more stay in a plane
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = p[j * step / 2];
    butterflies(x);
    if (factor != 1.0f) scale_by(x, factor);
#pragma unroll
    for (int j = 0; j < kCount; ++j) p[j * step / 2] = x[j];
  }
}

// The butterflies beyond 8 channels, and the norm. The caller has done those within 8; its stores
// must be seen (a barrier before), and a barrier stands at the end.
__device__ __forceinline__ void rotate_tile(const Tile& tile, const Side& side, int rows) {
  const int n = side.D & -side.D;
  const float norm = hadamard_norm(n);
  for (int log_step = 3; (1 << log_step) < n;) {
    const int left = n >> log_step;
    const float factor = left <= 16 ? norm : 1.0f;
    if (left >= 16) {
      rotate_apart<16>(tile, side, rows, log_step, factor);
      log_step += 4;
    } else if (left == 8) {
      rotate_apart<8>(tile, side, rows, log_step, factor);
      log_step += 3;
    } else if (left == 4) {
      rotate_apart<4>(tile, side, rows, log_step, factor);
      log_step += 2;
    } else {
      rotate_apart<2>(tile, side, rows, log_step, factor);
      log_step += 1;
    }
    __syncthreads();
  }
}

// The host's side.

inline int log_of(int n) {
  int log = 0;
  while ((1 << log) < n) ++log;
  return log;
}

inline Side side_of(const KvCall& c, bool value) {
  const Scheme scheme =
      value ? Scheme{c.v_kind, c.v_group, c.v_rotate} : Scheme{c.k_kind, c.k_group, c.k_rotate};
  Side s{};
  s.D = static_cast<int>(value ? c.Dv : c.Dk);
  s.section = section_of(scheme, c.P, c.H, s.D, c.dtype, !value);
  s.offset = value ? c.row_bytes - s.section.bytes : 0;
  s.kind = static_cast<int>(scheme.kind);
  s.group = static_cast<int>(scheme.group);
  s.rotate = scheme.rotate != 0;
  s.tile = value || scheme.kind == kRaw ? kTileTokens : s.group;
  s.tiles = static_cast<int>((c.P + s.tile - 1) / s.tile);
  if (scheme.kind == kRaw) return s;
  if (s.D > kMaxHeadDim || s.D % 8) throw std::invalid_argument("head dimension out of contract");
  s.columns = s.D / 8;
  s.lanes = kThreads / s.columns;
  // Rows 4 banks apart, planes 16.
  s.row_floats = (s.D / 2 + 27) / 32 * 32 + 4;
  s.rows = s.tile;
  do {
    s.plane_floats = s.rows * s.row_floats + 16;
  } while (8 * s.plane_floats > kTileBytes && (s.rows /= 2));
  s.log_rows = log_of(s.rows);
  return s;
}

inline bool is_aligned(const KvCall& c) {
  const auto* layers = reinterpret_cast<const LayerView*>(c.layers);
  const auto* rows = reinterpret_cast<const i64*>(c.rows);
  const i64 item = item_bytes(c.dtype);
  i64 all = 0;
  for (i64 l = 0; l < c.L; ++l) {
    const LayerView& v = layers[l];
    all |= v.k | v.v | item * (v.k_block | v.k_token | v.k_head | v.v_block | v.v_token | v.v_head);
  }
  for (i64 m = 0; m < c.M; ++m) all |= rows[m];
  if (c.k_kind == kRaw) all |= c.Dk * item;
  if (c.v_kind == kRaw) all |= c.Dv * item;
  return all % 16 == 0;
}

// Cuts a call into launches: launch(part, blocks) for each.
template <class Launch>
void over_parts(const KvCall& c, Launch&& launch) {
  if (c.L == 0 || c.M == 0 || c.P == 0 || c.H == 0) return;
  const auto* layers = reinterpret_cast<const LayerView*>(c.layers);
  const auto* rows = reinterpret_cast<const i64*>(c.rows);
  KvPart part;
  part.side[0] = side_of(c, false);
  part.side[1] = side_of(c, true);
  part.row_bytes = c.row_bytes;
  part.P = static_cast<int>(c.P);
  part.H = static_cast<int>(c.H);
  part.half = static_cast<int>(c.turn.table ? c.turn.half : 0);
  part.first_channel = static_cast<int>(c.turn.first);
  part.interleaved = c.turn.interleaved != 0;
  const i64 stride = c.M > 1 ? rows[1] - rows[0] : c.row_bytes * c.L;
  bool even = stride != 0;
  for (i64 m = 1; m < c.M && even; ++m) even = rows[m] - rows[m - 1] == stride;
  part.row_stride = even ? stride : 0;
  const i64 each = c.H * (part.side[0].tiles + part.side[1].tiles);
  const i64 most = INT32_MAX / (each * kLayersAtOnce);
  if (most < 1) throw std::invalid_argument("blocks of too many tokens and heads for one launch");
  const i64 step = even ? (c.M < most ? c.M : most) : (most < kRowsAtOnce ? most : kRowsAtOnce);
  for (i64 m = 0; m < c.M; m += step) {
    part.M = static_cast<int>(c.M - m < step ? c.M - m : step);
    part.block_ids = reinterpret_cast<const i64*>(c.block_ids) + m;
    part.angles = reinterpret_cast<const float*>(c.turn.table) + m * c.P * 2 * part.half;
    for (i64 i = 0; i < (even ? 1 : part.M); ++i) part.rows[i] = rows[m + i];
    for (i64 l = 0; l < c.L; l += kLayersAtOnce) {
      part.L = static_cast<int>(c.L - l < kLayersAtOnce ? c.L - l : kLayersAtOnce);
      part.layer_offset = l;
      for (int i = 0; i < part.L; ++i) part.layers[i] = layers[l + i];
      launch(part, static_cast<unsigned>(part.L * part.M * each));
    }
  }
}

template <class Kernel>
void launch_kv(Kernel kernel, const KvPart& part, unsigned blocks, std::size_t shared_bytes,
               Stream stream, const char* what) {
  if (shared_bytes > 48 << 10)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  MEMOS_LAUNCH(kernel, dim3(blocks), dim3(kThreads), shared_bytes, stream, part);
  check_launch(what);
}

}  // namespace
}  // namespace memos::cuda
