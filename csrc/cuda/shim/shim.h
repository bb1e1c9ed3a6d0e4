// CUDA's words for g++: every thread of a block is a fiber, blocks run one after the other. For
// tests without nvcc and without a GPU.
//
// The order of threads is drawn anew at every barrier, and that of blocks at every launch. Shared
// memory is a heap block of exactly the size asked for, filled with 0xff before each block, so that
// the sanitizers see what a kernel reads or writes beside it, and what it reads unwritten is NaN.
// A block whose threads wait at different barriers aborts. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "none"; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

namespace memos::shim {

extern dim3 thread_index, block_index, block_size, grid_size;
extern char* shared;

void seed(std::uint64_t value);  // of the orders in which threads and blocks run
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);
void wait_for_block();
void wait_for_warp();
// The value that lane `from` of this warp gave to the same call.
std::uint32_t exchange(std::uint32_t value, unsigned from);
std::uint64_t nanoseconds();  // a clock that moves on at each look

template <class T>
T exchange_as(T value, unsigned from) {
  static_assert(sizeof(T) == 4);
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = exchange(bits, from);
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace memos::shim

#define threadIdx memos::shim::thread_index
#define blockIdx memos::shim::block_index
#define blockDim memos::shim::block_size
#define gridDim memos::shim::grid_size

#define MEMOS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), memos::shim::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); }))
#define MEMOS_SHARED(name) char* const name = memos::shim::shared

inline void __syncthreads() { memos::shim::wait_for_block(); }
inline void __syncwarp() { memos::shim::wait_for_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return memos::shim::exchange_as(value, (threadIdx.x % 32) ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return memos::shim::exchange_as(value, static_cast<unsigned>(from) % 32);
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline void __nanosleep(unsigned) {}
