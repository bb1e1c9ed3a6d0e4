// Packed bytes -> KV blocks: one block of threads per tile of one head of one section.
#include "cuda/kv.cuh"
#include "cuda/turn.cuh"

namespace memos::cuda {
namespace {

// Rows of a tile decoded: put(row of the tile, channel, eight floats).
template <i64 kKind, bool kAligned, bool kPerChannel, class Put>
__device__ __forceinline__ void decode_rows(const KvPart& part, const Side& side, const Work& w,
                                            int first, int rows, Put put) {
  const int column = 8 * (threadIdx.x % side.columns), lane = threadIdx.x / side.columns;
  if (lane >= side.lanes) return;
  const int row_bytes = static_cast<int>(side.section.row_bytes);
  const i64 token = static_cast<i64>(w.head) * part.P + w.first + first;
  const char* codes = w.packed + token * row_bytes;
  const char* scales = w.packed + side.section.scales_at;
  const char* zeros = w.packed + side.section.zeros_at;
  if constexpr (kPerChannel) {
    const i64 at = 2 * (static_cast<i64>(w.head) * side.section.groups + w.tile * side.D + column);
    const Words s = kAligned ? load_words<4>(scales + at) : load_bytes<16>(scales + at);
    Words z{};
    if constexpr (kKind != kFp8)
      z = kAligned ? load_words<4>(zeros + at) : load_bytes<16>(zeros + at);
    float scale[8], zero[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scale[i] = parameter((s.w[i / 2] >> (16 * (i % 2))) & 0xffffu);
      zero[i] = parameter((z.w[i / 2] >> (16 * (i % 2))) & 0xffffu);
    }
#pragma unroll 4
    for (int r = lane; r < rows; r += side.lanes) {
      float x[8];
      decode<kKind, 1>(load_codes<kKind, kAligned>(codes + r * row_bytes, column), scale, zero, x);
      put(r, column, x);
    }
  } else {
    const int groups = (side.D + side.group - 1) / side.group;
    const i64 at = 2 * (token * groups + column / side.group);
#pragma unroll 4
    for (int r = lane; r < rows; r += side.lanes) {
      const float scale = parameter(load_half<kAligned>(scales + at + 2 * r * groups));
      float zero = 0.0f, x[8];
      if constexpr (kKind != kFp8)
        zero = parameter(load_half<kAligned>(zeros + at + 2 * r * groups));
      decode<kKind, 0>(load_codes<kKind, kAligned>(codes + r * row_bytes, column), &scale, &zero,
                       x);
      put(r, column, x);
    }
  }
}

// What a channel turns with: its pair's other channel, and the place of its angle.
struct Partner {
  int channel, angle;
  bool second;  // of the pair
};

__device__ __forceinline__ bool turns(const KvPart& part, int channel) {
  const int at = channel - part.first_channel;
  return at >= 0 && at < 2 * part.half;
}

__device__ __forceinline__ Partner partner_of(const KvPart& part, int channel) {
  const int at = channel - part.first_channel, step = part.interleaved ? 1 : part.half;
  const bool second = part.interleaved ? (at & 1) != 0 : at >= part.half;
  const int pair = part.interleaved ? at / 2 : second ? at - part.half : at;
  return {channel + (second ? -step : step), pair, second};
}

// Eight channels of a row turned; load(channel, floats) reads eight others of it, or one. Where
// kAligned, eight neighbours turn together or not at all.
template <bool kAligned, class Load>
__device__ __forceinline__ void turn_eight(const KvPart& part, const float* angles, int column,
                                           float (&x)[8], Load load) {
  if constexpr (kAligned) {
    if (!turns(part, column)) return;
    const Partner to = partner_of(part, column);
    const float *cosines = angles + to.angle, *sines = cosines + part.half;
    if (part.interleaved) {
      const float4 c = *reinterpret_cast<const float4*>(cosines);
      const float4 s = *reinterpret_cast<const float4*>(sines);
      turn(x[0], x[1], c.x, s.x);
      turn(x[2], x[3], c.y, s.y);
      turn(x[4], x[5], c.z, s.z);
      turn(x[6], x[7], c.w, s.w);
      return;
    }
    float y[8];
    load(to.channel, y);
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const float4 c = *reinterpret_cast<const float4*>(cosines + j);
      const float4 s = *reinterpret_cast<const float4*>(sines + j);
      x[j] = turned(x[j], y[j], c.x, s.x, to.second);
      x[j + 1] = turned(x[j + 1], y[j + 1], c.y, s.y, to.second);
      x[j + 2] = turned(x[j + 2], y[j + 2], c.z, s.z, to.second);
      x[j + 3] = turned(x[j + 3], y[j + 3], c.w, s.w, to.second);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!turns(part, column + j)) continue;
      const Partner to = partner_of(part, column + j);
      float y;
      load(to.channel, y);
      x[j] = turned(x[j], y, angles[to.angle], angles[part.half + to.angle], to.second);
    }
  }
}

template <i64 kDtype, bool kAligned, bool kPerChannel, bool kTurn>
__device__ __forceinline__ void decode_tile(const KvPart& part, const Side& side, const Work& w,
                                            char* shared) {
  const auto write = [&](int r, int column, const float (&x)[8]) {
    store_numbers<kDtype, kAligned>(w.numbers + r * w.token_bytes + column * kItem<kDtype>, x);
  };
  if (!kTurn && !side.rotate) {
    with_kind(side.kind, [&](auto kind) {
      decode_rows<decltype(kind)::value, kAligned, kPerChannel>(part, side, w, 0, w.tokens, write);
    });
    return;
  }
  const Tile tile{reinterpret_cast<float*>(shared), side.row_floats, side.plane_floats};
  const int column = 8 * (threadIdx.x % side.columns), lane = threadIdx.x / side.columns;
  const float norm = side.D % 16 ? hadamard_norm(8) : 1.0f;
  for (int first = 0; first < w.tokens; first += side.rows) {
    const int rows = w.tokens - first < side.rows ? w.tokens - first : side.rows;
    if (first) __syncthreads();
    with_kind(side.kind, [&](auto kind) {
      decode_rows<decltype(kind)::value, kAligned, kPerChannel>(
          part, side, w, first, rows, [&](int r, int channel, float (&x)[8]) {
            if (!kTurn || side.rotate) {
              butterflies(x);
              if (side.D % 16) scale_by(x, norm);
            }
            tile.store(r, channel, x);
          });
    });
    __syncthreads();
    if (!kTurn || side.rotate) rotate_tile(tile, side, rows);
    if (lane < side.lanes) {
#pragma unroll 4
      for (int r = lane; r < rows; r += side.lanes) {
        float x[8];
        tile.load(r, column, x);
        if constexpr (kTurn) {
          const float* angles = w.angles + (first + r) * 2 * part.half;
          turn_eight<kAligned>(part, angles, column, x, [&](int channel, auto& y) {
            if constexpr (kAligned)
              tile.load(r, channel, y);
            else
              y = *tile.place(r, channel);
          });
        }
        write(first + r, column, x);
      }
    }
  }
}

// Keys that were packed as they are, turned. What does not turn is copied.
template <i64 kDtype, bool kAligned>
__device__ __forceinline__ void turn_copied(const KvPart& part, const Side& side, const Work& w) {
  constexpr int kSize = kItem<kDtype>, kStep = kAligned ? 8 : 1;
  const char* packed = w.packed + (static_cast<i64>(w.head) * part.P + w.first) * side.D * kSize;
  const int columns = side.D / kStep;
  for (int place = threadIdx.x; place < w.tokens * columns; place += kThreads) {
    const int r = place / columns, column = place % columns * kStep;
    const char* from = packed + r * side.D * kSize;
    char* to = w.numbers + r * w.token_bytes + column * kSize;
    const float* angles = w.angles + r * 2 * part.half;
    if constexpr (kAligned) {
      const Words raw = load_words<2 * kSize>(from + column * kSize);
      if (!turns(part, column)) {
        store_words<2 * kSize>(to, raw);
        continue;
      }
      float x[8];
      floats_of<kDtype>(raw, x);
      turn_eight<true>(part, angles, column, x, [&](int channel, float (&y)[8]) {
        read_numbers<kDtype>(from + channel * kSize, y);
      });
      write_numbers<kDtype>(to, x);
    } else {
      const Words raw = load_bytes<kSize>(from + column * kSize);
      if (!turns(part, column)) {
        store_bytes<kSize>(to, raw);
        continue;
      }
      const Partner with = partner_of(part, column);
      const float x = float_of<kDtype>(raw.w[0]);
      const float y = float_of<kDtype>(load_bytes<kSize>(from + with.channel * kSize).w[0]);
      write_number<kDtype>(
          to, turned(x, y, angles[with.angle], angles[part.half + with.angle], with.second));
    }
  }
}

// Blocks for each multiprocessor: up to 80 registers, and none spilled.
template <bool kTurn>
constexpr int kBlocks = kTurn ? 5 : 6;

template <i64 kDtype, bool kAligned, bool kTurn>
__global__ void __launch_bounds__(kThreads, kBlocks<kTurn>)
    unpack_kernel(const __grid_constant__ KvPart part) {
  MEMOS_SHARED(shared);
  const Work w = work_of<kDtype>(part);
  const Side& side = part.side[w.value];
  if (side.kind == kRaw && (!kTurn || w.value)) {
    const int row_bytes = side.D * kItem<kDtype>;
    copy_rows<kAligned>(w.numbers, w.token_bytes,
                        w.packed + (static_cast<i64>(w.head) * part.P + w.first) * row_bytes,
                        row_bytes, w.tokens, row_bytes);
  } else if (kTurn && side.kind == kRaw) {
    turn_copied<kDtype, kAligned>(part, side, w);
  } else if (w.value == 0) {
    decode_tile<kDtype, kAligned, true, kTurn>(part, side, w, shared);
  } else {
    decode_tile<kDtype, kAligned, false, false>(part, side, w, shared);
  }
}

inline std::size_t shared_bytes(const Side& side, bool turns) {
  return side.kind != kRaw && (side.rotate || turns)
             ? 8 * static_cast<std::size_t>(side.plane_floats)
             : 0;
}

// Whether channels turn by eights, and 16 bytes of angles are read at once.
inline bool turns_by_eights(const KvCall& c) {
  return (c.turn.half | c.turn.first | c.Dk) % 8 == 0 && c.turn.table % 16 == 0;
}

template <i64 kDtype>
void unpack_dtype(const KvCall& call, Stream stream) {
  const bool turns = call.turn.table != 0;
  const bool aligned = is_aligned(call) && (!turns || turns_by_eights(call));
  const auto still =
      aligned ? unpack_kernel<kDtype, true, false> : unpack_kernel<kDtype, false, false>;
  const auto turning =
      aligned ? unpack_kernel<kDtype, true, true> : unpack_kernel<kDtype, false, true>;
  over_parts(call, [&](const KvPart& part, unsigned blocks) {
    const std::size_t keys = shared_bytes(part.side[0], turns);
    const std::size_t values = shared_bytes(part.side[1], false);
    launch_kv(turns ? turning : still, part, blocks, keys > values ? keys : values, stream,
              "unpack_kv");
  });
}

}  // namespace

void unpack_kv(const KvCall& call, Stream stream) {
  if (call.dtype == kF32)
    unpack_dtype<kF32>(call, stream);
  else if (call.dtype == kF16)
    unpack_dtype<kF16>(call, stream);
  else
    unpack_dtype<kBf16>(call, stream);
}

}  // namespace memos::cuda
