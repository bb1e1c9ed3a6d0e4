// Packed bytes -> KV blocks: one block of threads per tile of one head of one section.
#include "cuda/kv.cuh"

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

template <i64 kDtype, bool kAligned, bool kPerChannel>
__device__ __forceinline__ void decode_tile(const KvPart& part, const Side& side, const Work& w,
                                            char* shared) {
  const auto write = [&](int r, int column, const float (&x)[8]) {
    store_numbers<kDtype, kAligned>(w.numbers + r * w.token_bytes + column * kItem<kDtype>, x);
  };
  if (!side.rotate) {
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
            butterflies(x);
            if (side.D % 16) scale_by(x, norm);
            tile.store(r, channel, x);
          });
    });
    __syncthreads();
    rotate_tile(tile, side, rows);
    if (lane < side.lanes) {
#pragma unroll 4
      for (int r = lane; r < rows; r += side.lanes) {
        float x[8];
        tile.load(r, column, x);
        write(first + r, column, x);
      }
    }
  }
}

constexpr int kBlocks = 6;  // for each multiprocessor: up to 80 registers, and none spilled

template <i64 kDtype, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks)
    unpack_kernel(const __grid_constant__ KvPart part) {
  MEMOS_SHARED(shared);
  const Work w = work_of<kDtype>(part);
  const Side& side = part.side[w.value];
  if (side.kind == kRaw) {
    const int row_bytes = side.D * kItem<kDtype>;
    copy_rows<kAligned>(w.numbers, w.token_bytes,
                        w.packed + (static_cast<i64>(w.head) * part.P + w.first) * row_bytes,
                        row_bytes, w.tokens, row_bytes);
  } else if (w.value == 0) {
    decode_tile<kDtype, kAligned, true>(part, side, w, shared);
  } else {
    decode_tile<kDtype, kAligned, false>(part, side, w, shared);
  }
}

inline std::size_t shared_bytes(const Side& side) {
  return side.kind != kRaw && side.rotate ? 8 * static_cast<std::size_t>(side.plane_floats) : 0;
}

template <i64 kDtype>
void unpack_dtype(const KvCall& call, Stream stream) {
  const bool aligned = is_aligned(call);
  over_parts(call, [&](const KvPart& part, unsigned blocks) {
    const std::size_t keys = shared_bytes(part.side[0]), values = shared_bytes(part.side[1]);
    launch_kv(aligned ? unpack_kernel<kDtype, true> : unpack_kernel<kDtype, false>, part, blocks,
              keys > values ? keys : values, stream, "unpack_kv");
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
