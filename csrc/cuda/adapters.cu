// Low-rank adapters on a few tokens: y += scale * (x A) B in one launch.
//
// A block of threads has up to 8 tokens of one slot and a slice of the outputs. It computes all of
// x A for its tokens itself: every slice does so again, out of the L2 cache, which costs less than
// a second launch or a barrier between blocks. Sums are in a fixed order: the same call leaves the
// same bits.
#include "codec/layout.h"
#include "cuda/kernels.h"
#include "cuda/numbers.cuh"

namespace memos::cuda {
namespace {

constexpr int kAdapterThreads = 256, kWarps = kAdapterThreads / 32;
constexpr int kTokens = 8;   // columns of a product of the tensor cores
constexpr int kRows = 16;    // of A at once: its rows
constexpr int kSlice = 256;  // outputs
constexpr int kInputs = 32;  // of one step: 8 for each of 4 threads

struct AdapterPart {
  const AdapterFactors* factors;  // of this module in slot 0
  i64 modules;                    // factors from slot to slot
  const i64 *order, *starts;
  i64 y, y_stride, x, x_stride;  // strides in bytes
  int num_slots, I, O, slices;
};

// c += a b: a [16, 16] and b [16, 8] of 16-bit numbers, c [16, 8] in float32. Of a thread with
// g = lane / 4 and t = lane % 4: a has rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8
// (pairs); b rows 2t and 2t + 8 of column g; c rows g, g, g + 8, g + 8 and columns 2t, 2t + 1.
template <i64 kDtype>
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (kDtype == kBf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto value = [](u32 bits) {
    return kDtype == kBf16 ? bit_cast<float>(bits << 16) : fp16_value_any<float>(bits & 0xffffu);
  };
  u32 rows[2][4][2], columns[2][4][2];
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned r = 0; r < 2; ++r)
        rows[r][i][half] = shim::exchange(a[2 * half + r], 4 * g + i);
      for (unsigned n = 0; n < 2; ++n)
        columns[n][i][half] = shim::exchange(b[half], 4 * (2 * t + n) + i);
    }
  for (unsigned r = 0; r < 2; ++r)
    for (unsigned n = 0; n < 2; ++n)
      for (unsigned i = 0; i < 4; ++i)
        for (unsigned half = 0; half < 2; ++half)
          for (unsigned k = 0; k < 2; ++k)
            c[2 * r + n] +=
                value(rows[r][i][half] >> (16 * k)) * value(columns[n][i][half] >> (16 * k));
#endif
}

template <i64 kDtype>
__global__ void __launch_bounds__(kAdapterThreads)
    adapter_kernel(const __grid_constant__ AdapterPart part) {
  MEMOS_SHARED(shared);
  auto* partial = reinterpret_cast<float*>(shared);    // [kWarps][kRows][kTokens]
  float* hidden = partial + kWarps * kRows * kTokens;  // [R][kTokens]: x A
  // Whose tokens: tiles of a slot stand in a row, then those of the next slot.
  int tile = blockIdx.x / part.slices, slot = 0;
  i64 first = 0, last = 0;
  for (; slot < part.num_slots; ++slot) {
    first = part.starts[slot];
    last = part.starts[slot + 1];
    const int tiles = static_cast<int>((last - first + kTokens - 1) / kTokens);
    if (tile < tiles) break;
    tile -= tiles;
  }
  if (slot == part.num_slots) return;
  const AdapterFactors& of = part.factors[slot * part.modules];
  const int R = static_cast<int>(of.R);
  if (R == 0) return;
  first += tile * kTokens;
  const int tokens = last - first < kTokens ? static_cast<int>(last - first) : kTokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const char* x = nullptr;
  if (g < tokens) x = reinterpret_cast<const char*>(part.x) + part.order[first + g] * part.x_stride;
  const i64 row_bytes = 2 * static_cast<i64>(part.I);
  for (int r = 0; r < R; r += kRows) {
    const char* low = in_global(of.down + (r + g) * row_bytes);
    const char* high = r + 8 < R ? low + 8 * row_bytes : nullptr;
    float sums[4] = {};
    // Which 32 inputs stand where in a product does not matter, as long as A and x agree: each
    // thread takes 8 neighbours.
#pragma unroll 4
    for (int i = warp * kInputs; i < part.I; i += kWarps * kInputs) {
      const int at = 2 * (i + 8 * t);
      const bool inside = i + 8 * t < part.I;
      Words p{}, q{}, v{};
      if (inside) p = load_words<4>(low + at);
      if (inside && high != nullptr) q = load_words<4>(high + at);
      if (inside && x != nullptr) v = load_words<4>(x + at);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const u32 a[4] = {p.w[j], q.w[j], p.w[j + 1], q.w[j + 1]}, b[2] = {v.w[j], v.w[j + 1]};
        multiply_add<kDtype>(sums, a, b);
      }
    }
    float* mine = partial + warp * kRows * kTokens;
    mine[g * kTokens + 2 * t] = sums[0];
    mine[g * kTokens + 2 * t + 1] = sums[1];
    mine[(g + 8) * kTokens + 2 * t] = sums[2];
    mine[(g + 8) * kTokens + 2 * t + 1] = sums[3];
    __syncthreads();
    if (threadIdx.x < kRows * kTokens) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += partial[i * kRows * kTokens + threadIdx.x];
      if (r + static_cast<int>(threadIdx.x) / kTokens < R) hidden[r * kTokens + threadIdx.x] = sum;
    }
    __syncthreads();
  }
  // Two outputs and four tokens for each thread.
  const int o = blockIdx.x % part.slices * kSlice + 2 * (threadIdx.x % (kSlice / 2));
  const int from = threadIdx.x / (kSlice / 2) * (kTokens / 2);
  if (o >= part.O) return;
  float even[4] = {}, odd[4] = {};
  const char* up = in_global(of.up + 2 * o);
#pragma unroll 8
  for (int r = 0; r < R; ++r) {
    const u32 w = *reinterpret_cast<const u32*>(up + 2 * static_cast<i64>(r) * part.O);
    const float4 h = *reinterpret_cast<const float4*>(hidden + r * kTokens + from);
    const float a = number<kDtype>(w), b = number<kDtype>(w >> 16);
    const float each[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      even[i] += each[i] * a;
      odd[i] += each[i] * b;
    }
  }
  const float scale = bit_cast<float>(static_cast<u32>(of.scale));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (from + i >= tokens) break;
    auto* y = reinterpret_cast<u32*>(
        in_global(part.y + part.order[first + from + i] * part.y_stride + 2 * o));
    const u32 w = *y;
    const float a = number<kDtype>(w) + scale * even[i];
    const float b = number<kDtype>(w >> 16) + scale * odd[i];
    *y = rounded<kDtype>(a) | (rounded<kDtype>(b) << 16);
  }
}

}  // namespace

void apply_adapters(const AdapterCall& call, Stream stream) {
  if (call.n == 0) return;
  const auto* shape = reinterpret_cast<const i64*>(call.shapes) + 2 * call.module;
  AdapterPart part;
  part.factors = reinterpret_cast<const AdapterFactors*>(call.rows) + call.module;
  part.modules = call.num_modules;
  part.order = reinterpret_cast<const i64*>(call.order);
  part.starts = reinterpret_cast<const i64*>(call.starts);
  part.y = call.y;
  part.y_stride = 2 * call.y_stride;
  part.x = call.x;
  part.x_stride = 2 * call.x_stride;
  part.num_slots = static_cast<int>(call.num_slots);
  part.I = static_cast<int>(shape[0]);
  part.O = static_cast<int>(shape[1]);
  part.slices = (part.O + kSlice - 1) / kSlice;
  // The most tiles that n tokens of these slots can make: the grid does not depend on the plan's
  // numbers, which only the device knows.
  const i64 tiles = (call.n < call.num_slots ? call.n : call.num_slots) + call.n / kTokens;
  const std::size_t bytes = 4 * kTokens * (kWarps * kRows + call.max_rank);
  const auto kernel = call.dtype == kBf16 ? adapter_kernel<kBf16> : adapter_kernel<kF16>;
  MEMOS_LAUNCH(kernel, dim3(static_cast<unsigned>(tiles * part.slices)), dim3(kAdapterThreads),
               bytes, stream, part);
  check_launch("apply_adapters_");
}

}  // namespace memos::cuda
