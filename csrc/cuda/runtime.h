// What a kernel file needs of CUDA: the toolkit under nvcc, the thread shim under g++.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define MEMOS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Dynamic shared memory; every file sees the same array.
#define MEMOS_SHARED(name) extern __shared__ __align__(16) char name[]

#else

#include "cuda/shim/shim.h"

#endif

namespace memos::cuda {
namespace {

// Tells the compiler that an address, read as a number, is one of global memory (pinned memory of
// the host too): its accesses are then not generic ones.
__device__ __forceinline__ char* in_global(std::int64_t address) {
  char* const p = reinterpret_cast<char*>(address);
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

}  // namespace
}  // namespace memos::cuda
