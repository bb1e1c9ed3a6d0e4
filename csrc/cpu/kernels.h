// The CPU kernels: one table of functions per instruction set. Addresses and counts in, nothing
// out; single-threaded, no allocation, no locks, safe to call from many threads on ranges of work
// that do not overlap.
#pragma once

#include <cstdint>

namespace memos::cpu {

using i64 = std::int64_t;

// K and V of one layer: address, then strides in elements; the last axis is contiguous.
struct LayerView {
  i64 k, k_block, k_token, k_head;
  i64 v, v_block, v_token, v_head;
};

// One call of pack_kv or unpack_kv. memos/kernels/kv.py builds it, field by field as int64.
struct KvCall {
  i64 layers;  // address of LayerView[L]
  i64 L;
  i64 block_ids;  // address of int64[M], each in [0, N)
  i64 M;
  i64 rows;  // address of int64[M]: where the packed bytes of block m begin, [L][row_bytes]
  i64 N, P, H, Dk, Dv, dtype;
  i64 k_kind, k_group, k_rotate;
  i64 v_kind, v_group, v_rotate;
  i64 row_bytes;  // of one layer of one block
};
constexpr i64 kKvCallFields = sizeof(KvCall) / sizeof(i64);

struct Kernels {
  const char* isa;
  // Tasks [first, last) of M * L; task t is block t % M of layer t / M.
  void (*pack_kv)(const KvCall& call, i64 first, i64 last);
  void (*unpack_kv)(const KvCall& call, i64 first, i64 last);
  // dst[i, :] = src[ids[i], :] and dst[ids[i], :] = src[i, :] for i in [first, last).
  void (*gather_rows)(const char* src, const i64* ids, i64 first, i64 last, i64 row_bytes,
                      char* dst);
  void (*write_rows)(char* dst, const i64* ids, i64 first, i64 last, i64 row_bytes,
                     const char* src);
};

extern const Kernels kBaseline;
#if defined(MEMOS_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// dispatch.cpp
const Kernels& chosen();
const char* choose(const char* name);  // "" = the best; returns nullptr, or why not
const char* why_not(const Kernels& kernels);
i64 num_isas();
const Kernels& isa_at(i64 i);
i64 first_out_of_range(const i64* ids, i64 count, i64 n);  // -1: none

}  // namespace memos::cpu
