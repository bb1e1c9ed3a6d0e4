// Blocks of many planes (the K or V of a layer) <-> pinned host memory.
#include <stdexcept>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace memos::cuda {
namespace {

constexpr int kTransferThreads = 256;
constexpr int kWordsAtOnce = 4;
constexpr int kPieceBytes = kTransferThreads * kWordsAtOnce * 16;
constexpr int kPlanesAtOnce = 64;  // parameters of a launch: 4 KB at most
constexpr int kIdsAtOnce = 320;
// Few blocks of threads: what the link needs on its way, and no more of the processors than that,
// or decoding would wait for them.
constexpr unsigned kTransferBlocks = 16;
// From this size on the copy engines are as fast, and take no processor at all. [not measured]
constexpr i64 kCopyEngineFrom = 28 << 10;

struct TransferPart {
  i64 planes[kPlanesAtOnce];
  i64 ids[kIdsAtOnce];
  i64 host, host_row, block_stride, block_bytes;
  i64 ns_per_piece;  // 0: as fast as it goes
  int S, M, pieces;  // pieces of a block
  bool to_host;
};

__device__ __forceinline__ i64 nanoseconds() {
#if defined(__CUDA_ARCH__)
  i64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#elif defined(__CUDACC__)
  return 0;  // not called on the host
#else
  return static_cast<i64>(shim::nanoseconds());
#endif
}

template <class Word>
__global__ void __launch_bounds__(kTransferThreads)
    transfer_kernel(const __grid_constant__ TransferPart part) {
  const i64 began = part.ns_per_piece ? nanoseconds() : 0;
  const int count = part.M * part.S * part.pieces;
  i64 due = 0;
  for (int piece = blockIdx.x; piece < count; piece += gridDim.x) {
    const int unit = piece / part.pieces, m = unit / part.S, s = unit % part.S;
    const i64 first = static_cast<i64>(piece % part.pieces) * kPieceBytes;
    char* on_device =
        reinterpret_cast<char*>(part.planes[s]) + part.ids[m] * part.block_stride + first;
    char* on_host =
        reinterpret_cast<char*>(part.host) + m * part.host_row + s * part.block_bytes + first;
    const auto* from = reinterpret_cast<const Word*>(part.to_host ? on_device : on_host);
    auto* to = reinterpret_cast<Word*>(part.to_host ? on_host : on_device);
    const i64 left = (part.block_bytes - first) / static_cast<i64>(sizeof(Word));
    const int words = kPieceBytes / static_cast<int>(sizeof(Word));
    const int n = left < words ? static_cast<int>(left) : words;
    for (int i = threadIdx.x; i < n; i += kTransferThreads * kWordsAtOnce) {
      Word held[kWordsAtOnce];
#pragma unroll
      for (int j = 0; j < kWordsAtOnce; ++j)
        if (i + j * kTransferThreads < n) held[j] = __ldcs(from + i + j * kTransferThreads);
#pragma unroll
      for (int j = 0; j < kWordsAtOnce; ++j)
        if (i + j * kTransferThreads < n) __stcs(to + i + j * kTransferThreads, held[j]);
    }
    if (part.ns_per_piece) {  // wait until this piece's time is over
      due += part.ns_per_piece;
      if (threadIdx.x == 0)
        while (nanoseconds() - began < due) __nanosleep(500);
      __syncthreads();
    }
  }
}

void move_by_kernel(const TransferCall& call, Stream stream) {
  const auto* planes = reinterpret_cast<const i64*>(call.planes);
  const auto* ids = reinterpret_cast<const i64*>(call.block_ids);
  i64 all = call.host | call.block_stride | call.block_bytes;
  for (i64 s = 0; s < call.S; ++s) all |= planes[s];
  TransferPart part;
  part.host_row = call.S * call.block_bytes;
  part.block_stride = call.block_stride;
  part.block_bytes = call.block_bytes;
  part.to_host = call.to_host != 0;
  const i64 pieces = (call.block_bytes + kPieceBytes - 1) / kPieceBytes;
  const i64 most = INT32_MAX / (pieces * kPlanesAtOnce);
  if (most < 1) throw std::invalid_argument("block_bytes: too many for one transfer");
  part.pieces = static_cast<int>(pieces);
  const i64 step = most < kIdsAtOnce ? most : kIdsAtOnce;
  for (i64 m = 0; m < call.M; m += step) {
    part.M = static_cast<int>(call.M - m < step ? call.M - m : step);
    for (int i = 0; i < part.M; ++i) part.ids[i] = ids[m + i];
    for (i64 s = 0; s < call.S; s += kPlanesAtOnce) {
      part.S = static_cast<int>(call.S - s < kPlanesAtOnce ? call.S - s : kPlanesAtOnce);
      for (int i = 0; i < part.S; ++i) part.planes[i] = planes[s + i];
      part.host = call.host + m * part.host_row + s * call.block_bytes;
      const unsigned count = static_cast<unsigned>(part.M * part.S * part.pieces);
      const unsigned blocks = count < kTransferBlocks ? count : kTransferBlocks;
      const i64 size = call.block_bytes < kPieceBytes ? call.block_bytes : kPieceBytes;
      part.ns_per_piece =
          call.bytes_per_s ? static_cast<i64>(1e9 * size * blocks / call.bytes_per_s) : 0;
      const auto kernel = all % 16 == 0  ? transfer_kernel<uint4>
                          : all % 4 == 0 ? transfer_kernel<std::uint32_t>
                                         : transfer_kernel<unsigned char>;
      MEMOS_LAUNCH(kernel, dim3(blocks), dim3(kTransferThreads), 0, stream, part);
      check_launch("move_blocks");
    }
  }
}

void move_by_copies(const TransferCall& call, Stream stream) {
  const auto* planes = reinterpret_cast<const i64*>(call.planes);
  const auto* ids = reinterpret_cast<const i64*>(call.block_ids);
  const std::size_t count = static_cast<std::size_t>(call.M * call.S);
  std::vector<void*> to;
  std::vector<const void*> from;
  to.reserve(count);
  from.reserve(count);
  for (i64 m = 0; m < call.M; ++m)
    for (i64 s = 0; s < call.S; ++s) {
      void* on_device = reinterpret_cast<void*>(planes[s] + ids[m] * call.block_stride);
      void* on_host = reinterpret_cast<void*>(call.host + (m * call.S + s) * call.block_bytes);
      to.push_back(call.to_host ? on_host : on_device);
      from.push_back(call.to_host ? on_device : on_host);
    }
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  const auto bytes = static_cast<std::size_t>(call.block_bytes);
#if defined(__CUDACC__) && CUDART_VERSION >= 13000
  // One call for all of them; not on the legacy stream, and not into a graph.
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (s != nullptr && count > 1 && cudaStreamIsCapturing(s, &status) == cudaSuccess &&
      status == cudaStreamCaptureStatusNone) {
    std::vector<std::size_t> sizes(count, bytes);
    cudaMemcpyAttributes order{};
    order.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    std::size_t first = 0;
    cudaMemcpyBatchAsync(to.data(), from.data(), sizes.data(), count, &order, &first, 1, s);
    return check_launch("move_blocks");
  }
#endif
  for (std::size_t i = 0; i < count; ++i)
    cudaMemcpyAsync(to[i], from[i], bytes,
                    call.to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, s);
  check_launch("move_blocks");
}

}  // namespace

void move_blocks(const TransferCall& call, Stream stream) {
  if (call.M == 0 || call.S == 0 || call.block_bytes == 0) return;
  const bool engines = call.block_bytes >= kCopyEngineFrom && call.bytes_per_s == 0;
  if (call.how == kByCopies || (call.how == kByChoice && engines))
    move_by_copies(call, stream);
  else
    move_by_kernel(call, stream);
}

}  // namespace memos::cuda
