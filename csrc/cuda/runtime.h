// What a kernel file needs of CUDA: the toolkit under nvcc, the thread shim under g++.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define MEMOS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Dynamic shared memory; every file sees the same array.
#define MEMOS_SHARED(name) extern __shared__ __align__(16) char name[]

#else

#include "cuda/shim/shim.h"

#endif
