// The CUDA kernels: launchers. Addresses and counts in, nothing out. Each puts its kernels on
// `stream` (a cudaStream_t) and returns before they are done; none synchronises or allocates, so
// all can be captured in CUDA graphs. Safe to call from many threads.
#pragma once

#include <cstdint>

#include "codec/calls.h"

namespace memos::cuda {

using Stream = std::uintptr_t;

// As the op of the same name. `call.layers` and `call.rows` are tables in host memory, read before
// this returns; `call.block_ids`, the numbers and the packed rows are read and written by the
// device (pinned host memory will do for the rows).
// REQUIRES: sizes and strides of memos/kernels/kv.py; head dimensions of up to 1024 where a scheme
// quantises; rows of packed bytes that do not overlap.
// Throws std::runtime_error with CUDA's name for the error when a launch fails.
void pack_kv(const KvCall& call, Stream stream);
void unpack_kv(const KvCall& call, Stream stream);

// dst[i, :] = src[ids[i], :] and dst[ids[i], :] = src[i, :] for i in [0, count), rows of row_bytes.
// Throws as above.
void gather_rows(i64 src, i64 ids, i64 count, i64 row_bytes, i64 dst, Stream stream);
void write_rows(i64 dst, i64 ids, i64 count, i64 row_bytes, i64 src, Stream stream);

// host[m, s, :] = planes[s][block_ids[m], :] with to_host, else the other way round.
struct TransferCall {
  i64 planes;  // address of int64[S], in host memory: addresses of [N] blocks on the device
  i64 S;
  i64 block_ids;  // address of int64[M], in host memory
  i64 M;
  i64 host;  // pinned: [M][S][block_bytes]
  i64 block_stride, block_bytes;
  i64 to_host;
  i64 bytes_per_s;  // at most; 0: as fast as it goes
  i64 how;          // kByChoice, or what a benchmark wants to see
};
constexpr i64 kTransferCallFields = sizeof(TransferCall) / sizeof(i64);
enum How : i64 { kByChoice = 0, kByKernel = 1, kByCopies = 2 };

// Small blocks by a kernel that reads or writes the pinned memory itself, large ones by the copy
// engines, in one call. With a rate, by the kernel, which keeps to it. REQUIRES: no two ids equal
// unless to_host. Throws as above.
void move_blocks(const TransferCall& call, Stream stream);

// y[t] += scale * (x[t] A) B for the n tokens of a plan, 16-bit numbers.
struct AdapterCall {
  i64 rows;    // address of AdapterFactors[num_slots][num_modules], on the device
  i64 shapes;  // address of int64[num_modules][2], in host memory: I, O
  i64 num_slots, num_modules, dtype, max_rank;
  i64 module;
  i64 order, starts, n;          // of the plan, on the device; n tokens in `order`
  i64 y, y_stride, x, x_stride;  // [T, O] and [T, I]; strides in elements
};
constexpr i64 kAdapterCallFields = sizeof(AdapterCall) / sizeof(i64);

// One launch, whose size depends on n and num_slots alone. REQUIRES: fp16 or bf16; I a multiple of
// 8, O of 2; x and its rows aligned to 16 bytes, y and its rows to 4; max_rank at least the rank
// of every slot. Throws as above.
void apply_adapters(const AdapterCall& call, Stream stream);

// The keys of one layer: address, then strides in elements; the last axis is contiguous.
struct KeyView {
  i64 keys, row, head, token;
};

// (a, b) -> (a c - b s, b c + a s) for each pair of channels and its cosine and sine.
struct TurnCall {
  i64 layers;  // address of KeyView[L], in host memory
  i64 L, B, H, T, dtype;
  i64 half;         // so many pairs of channels turn, the first 2 * half of each head
  i64 interleaved;  // a pair is (2i, 2i + 1), else (i, i + half)
  i64 table;        // address of float[T][2][half] on the device: cosines, sines
};
constexpr i64 kTurnCallFields = sizeof(TurnCall) / sizeof(i64);

// In place; one launch for up to 64 layers. Throws as above.
void turn_keys(const TurnCall& call, Stream stream);

// Throws std::runtime_error when the last launch failed.
void check_launch(const char* what);

}  // namespace memos::cuda
