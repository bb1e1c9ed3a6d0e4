// KV blocks -> packed bytes: one block of threads per tile of one head of one section.
#include "cuda/kv.cuh"

namespace memos::cuda {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

// Shared memory of a tile: the rotated rows, then per channel the zero and the inverse scale, then
// the partial extremes [lanes][D] of each.
struct Shared {
  Tile tile;
  float *zero, *inverse, *low, *high;
  int* wide;  // whether a rotated number is beyond fp16
};

__device__ __forceinline__ Shared shared_of(char* shared, const Side& side) {
  Shared s;
  s.tile = {reinterpret_cast<float*>(shared), side.row_floats, side.plane_floats};
  s.zero = s.tile.at + (side.rotate ? 2 * side.plane_floats : 0);
  s.inverse = s.zero + side.D;
  s.low = s.inverse + side.D;
  s.high = s.low + side.lanes * side.D;
  s.wide = reinterpret_cast<int*>(s.high + side.lanes * side.D);
  return s;
}

inline std::size_t shared_bytes(const Side& side) {
  if (side.kind == kRaw) return 0;
  const int floats = side.rotate ? 2 * side.plane_floats : 0;
  return 4 * (floats + 2 * side.D + 2 * side.lanes * side.D + 1);
}

__device__ __forceinline__ void fit(float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = clamped(x[i], kFp16Max);
}

// Rows [first, first + rows) into the tile, rotated.
template <i64 kDtype, bool kAligned>
__device__ __forceinline__ void fill_tile(const Work& w, const Side& side, const Tile& tile,
                                          int first, int rows) {
  const int column = 8 * (threadIdx.x % side.columns), lane = threadIdx.x / side.columns;
  const float norm = side.D % 16 ? hadamard_norm(8) : 1.0f;
  if (lane < side.lanes) {
#pragma unroll 4
    for (int r = lane; r < rows; r += side.lanes) {
      float x[8];
      load_numbers<kDtype, kAligned>(
          w.numbers + (first + r) * w.token_bytes + column * kItem<kDtype>, x);
      butterflies(x);
      if (side.D % 16) scale_by(x, norm);
      tile.store(r, column, x);
    }
  }
  __syncthreads();
  rotate_tile(tile, side, rows);
}

// Eight channels of a tile's rows: of the tile in shared memory, or of the numbers themselves.
template <i64 kDtype, bool kAligned>
struct Rows {
  const char* numbers;
  i64 token_bytes;
  Tile tile;
  bool rotated;

  __device__ __forceinline__ void load(int r, int column, float (&x)[8]) const {
    if (rotated)
      tile.load(r, column, x);
    else
      load_numbers<kDtype, kAligned>(numbers + r * token_bytes + column * kItem<kDtype>, x);
  }
};

// Four blocks for each multiprocessor. Where the compiler cannot keep to the 128 registers of that,
// three, with fewer rows on their way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 3, kRowsOnTheirWay = 2;
#else
constexpr int kBlocks = 4, kRowsOnTheirWay = 4;
#endif

// work(row, eight floats) for rows lane, lane + lanes, ...; several are on their way at once.
template <bool kAligned, class From, class Work>
__device__ __forceinline__ void over_rows(const From& from, int column, int lane, int lanes,
                                          int rows, Work work) {
  constexpr int kRows = kAligned ? kRowsOnTheirWay : 1;
  for (int r = lane; r < rows; r += kRows * lanes) {
    float x[kRows][8];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (r + i * lanes < rows) from.load(r + i * lanes, column, x[i]);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (r + i * lanes < rows) work(r + i * lanes, x[i]);
  }
}

// K: a scale per channel and tile.
template <i64 kDtype, bool kAligned>
__device__ __forceinline__ void encode_keys(const KvPart& part, const Side& side, const Work& w,
                                            char* shared) {
  const Shared s = shared_of(shared, side);
  const int column = 8 * (threadIdx.x % side.columns), lane = threadIdx.x / side.columns;
  const int lanes = side.lanes, T = w.tokens, step = side.rotate ? side.rows : T;
  const Rows<kDtype, kAligned> from{w.numbers, w.token_bytes, s.tile, side.rotate != 0};
  const bool works = lane < lanes;
  if (threadIdx.x == 0) *s.wide = 0;
  float low[8], high[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) low[i] = kInfinity, high[i] = -kInfinity;
  for (int first = 0; first < T; first += step) {
    const int rows = T - first < step ? T - first : step;
    if (from.rotated) {
      if (first) __syncthreads();  // the rows before are read
      fill_tile<kDtype, kAligned>(w, side, s.tile, first, rows);
    }
    if (works)
      over_rows<kAligned>(from, column, lane, lanes, rows, [&](int, const float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          low[i] = lesser(x[i], low[i]);
          high[i] = greater(x[i], high[i]);
        }
      });
  }
  if (works) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      s.low[lane * side.D + column + i] = low[i];
      s.high[lane * side.D + column + i] = high[i];
    }
  }
  __syncthreads();
  const i64 param = (static_cast<i64>(w.head) * side.section.groups) + w.tile * side.D;
  char* scales = w.packed + side.section.scales_at + 2 * param;
  char* zeros = w.packed + side.section.zeros_at + 2 * param;
  for (int c = threadIdx.x; c < side.D; c += kThreads) {
    float lo = kInfinity, hi = -kInfinity;
    for (int i = 0; i < lanes; ++i) {
      lo = lesser(s.low[i * side.D + c], lo);
      hi = greater(s.high[i * side.D + c], hi);
    }
    if (greater(-lo, hi) > kFp16Max) *s.wide = 1;
    with_kind(side.kind, [&](auto kind) {
      constexpr i64 kKind = decltype(kind)::value;
      const Group<float> g = group_of<kKind>(lo, hi);
      store_half<kAligned>(scales + 2 * c, g.scale);
      if constexpr (kKind != kFp8) store_half<kAligned>(zeros + 2 * c, g.zero);
      s.zero[c] = g.zero_value;
      s.inverse[c] = g.inverse;
    });
  }
  __syncthreads();
  const bool wide = *s.wide;
  float zero[8], inverse[8];
  if (works) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      zero[i] = s.zero[column + i];
      inverse[i] = s.inverse[column + i];
    }
  }
  const int row_bytes = static_cast<int>(side.section.row_bytes);
  char* codes = w.packed + (static_cast<i64>(w.head) * part.P + w.first) * row_bytes;
  // The rows that are in the tile first, then those that were there before, rotated once more.
  for (int first = (T - 1) / step * step, held = first; first >= 0; first -= step) {
    const int rows = T - first < step ? T - first : step;
    if (first != held) {
      __syncthreads();
      fill_tile<kDtype, kAligned>(w, side, s.tile, first, rows);
    }
    if (works)
      with_kind(side.kind, [&](auto kind) {
        constexpr i64 kKind = decltype(kind)::value;
        over_rows<kAligned>(from, column, lane, lanes, rows, [&](int r, float (&x)[8]) {
          if (wide) fit(x);
          store_codes<kKind, kAligned>(codes + static_cast<i64>(first + r) * row_bytes, column,
                                       encode<kKind, 1>(x, zero, inverse));
        });
      });
  }
}

constexpr int kAtOnce = 4;  // tokens that a thread has on their way

// Lane j of kLanes neighbours gets the best of x[j % kAtOnce] over all of them.
template <int kLanes, class Better>
__device__ __forceinline__ float gather_best(float (&x)[kAtOnce], int lane, Better better) {
#pragma unroll
  for (int step = kLanes / 2; step >= kAtOnce; step /= 2)
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = better(x[i], __shfl_xor_sync(0xffffffffu, x[i], step));
#pragma unroll
  for (int step = kAtOnce / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const bool upper = lane & step;
      const float mine = upper ? x[i + step] : x[i], other = upper ? x[i] : x[i + step];
      x[i] = better(mine, __shfl_xor_sync(0xffffffffu, other, step));
    }
  return x[0];
}

// V: a scale per token and group of 8 * kLanes channels. kLanes threads have kAtOnce tokens at
// once, and each of them the scale of one.
template <i64 kDtype, bool kAligned, int kLanes>
__device__ __forceinline__ void encode_tokens(const KvPart& part, const Side& side, const Work& w,
                                              int first, int rows,
                                              const Rows<kDtype, kAligned>& from) {
  const int lane = threadIdx.x % kLanes, groups = (side.D + 8 * kLanes - 1) / (8 * kLanes);
  const int units = (rows + kAtOnce - 1) / kAtOnce * groups;
  const int row_bytes = static_cast<int>(side.section.row_bytes);
  const i64 token = static_cast<i64>(w.head) * part.P + w.first + first;
  char* codes = w.packed + token * row_bytes;
  char* scales = w.packed + side.section.scales_at + 2 * token * groups;
  char* zeros = w.packed + side.section.zeros_at + 2 * token * groups;
  for (int base = 0; base < units; base += kThreads / kLanes) {  // as often for every thread
    const int unit = base + threadIdx.x / kLanes, group = unit % groups;
    const int column = 8 * (group * kLanes + lane), row = unit / groups * kAtOnce;
    const int mine = unit < units && column < side.D ? rows - row : 0;  // rows from `row` on
    float x[kAtOnce][8], low[kAtOnce], high[kAtOnce];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t)
      if (t < mine) from.load(row + t, column, x[t]);
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      low[t] = kInfinity;
      high[t] = -kInfinity;
      if (t < mine) {
        if (from.rotated) fit(x[t]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          low[t] = lesser(x[t][i], low[t]);
          high[t] = greater(x[t][i], high[t]);
        }
      }
    }
    const float lo = gather_best<kLanes>(low, lane, [](float a, float b) { return lesser(a, b); });
    const float hi =
        gather_best<kLanes>(high, lane, [](float a, float b) { return greater(a, b); });
    with_kind(side.kind, [&](auto kind) {
      constexpr i64 kKind = decltype(kind)::value;
      const Group<float> g = group_of<kKind>(lo, hi);
      if (unit < units && lane < kAtOnce && row + lane < rows) {
        const int at = 2 * ((row + lane) * groups + group);
        store_half<kAligned>(scales + at, g.scale);
        if constexpr (kKind != kFp8) store_half<kAligned>(zeros + at, g.zero);
      }
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        const int source = (threadIdx.x & ~(kLanes - 1)) + t;
        const float zero = __shfl_sync(0xffffffffu, g.zero_value, source);
        const float inverse = __shfl_sync(0xffffffffu, g.inverse, source);
        if (t < mine)
          store_codes<kKind, kAligned>(codes + (row + t) * row_bytes, column,
                                       encode<kKind, 0>(x[t], &zero, &inverse));
      }
    });
  }
}

template <i64 kDtype, bool kAligned>
__device__ __forceinline__ void encode_values(const KvPart& part, const Side& side, const Work& w,
                                              char* shared) {
  const Tile tile{reinterpret_cast<float*>(shared), side.row_floats, side.plane_floats};
  const Rows<kDtype, kAligned> from{w.numbers, w.token_bytes, tile, side.rotate != 0};
  const int step = side.rotate ? side.rows : w.tokens;
  for (int first = 0; first < w.tokens; first += step) {
    const int rows = w.tokens - first < step ? w.tokens - first : step;
    if (first) __syncthreads();
    if (from.rotated) fill_tile<kDtype, kAligned>(w, side, tile, first, rows);
    if (side.group == 32)
      encode_tokens<kDtype, kAligned, 4>(part, side, w, first, rows, from);
    else
      encode_tokens<kDtype, kAligned, 8>(part, side, w, first, rows, from);
  }
}

__device__ __forceinline__ void clear_padding(const Work& w, const Section& section) {
  if (w.head || w.first) return;
  for (i64 i = section.padding_at[0] + threadIdx.x; i < section.scales_at; i += kThreads)
    w.packed[i] = 0;
  for (i64 i = section.padding_at[1] + threadIdx.x; i < section.bytes; i += kThreads)
    w.packed[i] = 0;
}

template <i64 kDtype, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pack_kernel(const __grid_constant__ KvPart part) {
  MEMOS_SHARED(shared);
  const Work w = work_of<kDtype>(part);
  const Side& side = part.side[w.value];
  clear_padding(w, side.section);
  if (side.kind == kRaw) {
    const int row_bytes = side.D * kItem<kDtype>;
    copy_rows<kAligned>(w.packed + (static_cast<i64>(w.head) * part.P + w.first) * row_bytes,
                        row_bytes, w.numbers, w.token_bytes, w.tokens, row_bytes);
  } else if (w.value == 0) {
    encode_keys<kDtype, kAligned>(part, side, w, shared);
  } else {
    encode_values<kDtype, kAligned>(part, side, w, shared);
  }
}

template <i64 kDtype>
void pack_dtype(const KvCall& call, Stream stream) {
  const bool aligned = is_aligned(call);
  over_parts(call, [&](const KvPart& part, unsigned blocks) {
    const std::size_t keys = shared_bytes(part.side[0]), values = shared_bytes(part.side[1]);
    launch_kv(aligned ? pack_kernel<kDtype, true> : pack_kernel<kDtype, false>, part, blocks,
              keys > values ? keys : values, stream, "pack_kv");
  });
}

}  // namespace

void pack_kv(const KvCall& call, Stream stream) {
  if (call.dtype == kF32)
    pack_dtype<kF32>(call, stream);
  else if (call.dtype == kF16)
    pack_dtype<kF16>(call, stream);
  else
    pack_dtype<kBf16>(call, stream);
}

}  // namespace memos::cuda
