// Paged <-> contiguous: plain copies of whole rows of bytes.
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace memos::cuda {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kWordsAtOnce = 4;  // per thread, all read before the first is written

struct RowCopy {
  const char* from;
  char* to;
  const i64* ids;
  i64 row_words;
  unsigned pieces;  // of a row
  bool gather;      // ids name rows of `from`; else of `to`
};

template <class Word>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const __grid_constant__ RowCopy copy) {
  const i64 row = blockIdx.x / copy.pieces;
  const i64 first = static_cast<i64>(blockIdx.x % copy.pieces) * (kCopyThreads * kWordsAtOnce);
  const i64 other = copy.ids[row];
  const auto* from =
      reinterpret_cast<const Word*>(copy.from) + (copy.gather ? other : row) * copy.row_words;
  auto* to = reinterpret_cast<Word*>(copy.to) + (copy.gather ? row : other) * copy.row_words;
  Word words[kWordsAtOnce];
#pragma unroll
  for (int i = 0; i < kWordsAtOnce; ++i) {
    const i64 at = first + i * kCopyThreads + threadIdx.x;
    if (at < copy.row_words) words[i] = __ldcs(from + at);
  }
#pragma unroll
  for (int i = 0; i < kWordsAtOnce; ++i) {
    const i64 at = first + i * kCopyThreads + threadIdx.x;
    if (at < copy.row_words) __stcs(to + at, words[i]);
  }
}

template <class Word>
void copy_words(RowCopy copy, i64 count, i64 row_bytes, Stream stream, const char* what) {
  copy.row_words = row_bytes / static_cast<i64>(sizeof(Word));
  const i64 each = kCopyThreads * kWordsAtOnce, pieces = (copy.row_words + each - 1) / each;
  const i64 most = INT32_MAX / pieces;
  if (most < 1) throw std::invalid_argument("row_bytes: a row too long for one launch");
  copy.pieces = static_cast<unsigned>(pieces);
  const auto kernel = copy_kernel<Word>;
  for (i64 first = 0; first < count; first += most) {
    const i64 rows = count - first < most ? count - first : most;
    MEMOS_LAUNCH(kernel, dim3(static_cast<unsigned>(rows * pieces)), dim3(kCopyThreads), 0, stream,
                 copy);
    check_launch(what);
    copy.ids += rows;
    (copy.gather ? copy.to : const_cast<char*&>(copy.from)) += rows * row_bytes;
  }
}

void copy_rows(RowCopy copy, i64 count, i64 row_bytes, Stream stream, const char* what) {
  if (count == 0 || row_bytes == 0) return;
  const i64 all = reinterpret_cast<i64>(copy.from) | reinterpret_cast<i64>(copy.to) | row_bytes;
  if (all % 16 == 0)
    copy_words<uint4>(copy, count, row_bytes, stream, what);
  else if (all % 4 == 0)
    copy_words<std::uint32_t>(copy, count, row_bytes, stream, what);
  else
    copy_words<unsigned char>(copy, count, row_bytes, stream, what);
}

}  // namespace

void gather_rows(i64 src, i64 ids, i64 count, i64 row_bytes, i64 dst, Stream stream) {
  copy_rows({reinterpret_cast<const char*>(src), reinterpret_cast<char*>(dst),
             reinterpret_cast<const i64*>(ids), 0, 0, true},
            count, row_bytes, stream, "gather_blocks");
}

void write_rows(i64 dst, i64 ids, i64 count, i64 row_bytes, i64 src, Stream stream) {
  copy_rows({reinterpret_cast<const char*>(src), reinterpret_cast<char*>(dst),
             reinterpret_cast<const i64*>(ids), 0, 0, false},
            count, row_bytes, stream, "write_blocks");
}

void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

}  // namespace memos::cuda
