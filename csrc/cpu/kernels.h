// The CPU kernels: one table of functions per instruction set. Addresses and counts in, nothing
// out; single-threaded, no allocation, no locks, safe to call from many threads on ranges of work
// that do not overlap.
#pragma once

#include <cstdint>

#include "codec/calls.h"

namespace memos::cpu {

using memos::AdapterFactors;
using memos::i64;
using memos::KeyTurn;
using memos::kKvCallFields;
using memos::KvCall;
using memos::LayerView;

struct AdapterTable {
  i64 rows;    // address of AdapterFactors[num_slots][num_modules]
  i64 shapes;  // address of int64[num_modules][2]: I, O
  i64 num_slots, num_modules, dtype;
};

struct AdapterPlan {
  i64 order;   // address of int64[n]: the tokens that have an adapter, sorted by slot
  i64 starts;  // address of int64[num_slots + 1]: where the tokens of a slot begin in `order`
  i64 T;       // tokens of the batch
};

// One call of apply_adapters.
struct AdapterCall {
  i64 table, module, plan;       // addresses of AdapterTable and AdapterPlan
  i64 y, y_stride, x, x_stride;  // addresses of [T, O] and [T, I]; strides in elements
};

// One tensor on its way into a slab; memos/kernels/slabs.py builds it, field by field as int64.
struct SlabJob {
  i64 from, dtype, rows, columns;  // [rows, columns] at source + from, perhaps unaligned
  i64 transposed;                  // write [columns, rows]
  i64 to, height, end;             // at slab + to; zeros follow up to slab + end
};

// The keys of one layer: address, then strides in elements; the last axis is contiguous.
struct KeyView {
  i64 keys, row, head, token;
};

// One call of rotate_positions_.
struct TurnCall {
  i64 layers;  // address of KeyView[L]
  i64 B, H, T, dtype;
  i64 half;         // so many pairs of channels turn, the first 2 * half of each head
  i64 interleaved;  // a pair is (2i, 2i + 1), else (i, i + half)
  i64 table;        // address of float[T][2][half]: cosines, sines
};

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
  // y[t] += scale * (x[t] A) B for the tokens t = order[i], i in [first, last).
  // Returns -1, or an i where t is not in [0, T): nothing is written then. REQUIRES: no two t
  // equal.
  i64 (*apply_adapters)(const AdapterCall& call, i64 first, i64 last);
  // Jobs [first, last), rounded to `dtype`. Returns how many numbers are infinite or NaN in it.
  i64 (*fill_slab)(const char* source, char* slab, const SlabJob* jobs, i64 first, i64 last,
                   i64 dtype);
  // Tasks [first, last) of L * B * H; task t is head t % H of row t / H % B of layer t / (B * H).
  void (*turn_keys)(const TurnCall& call, i64 first, i64 last);
};

extern const Kernels kBaseline;
#if defined(MEMOS_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
i64 apply_adapters_avx512bf16(const AdapterCall& call, i64 first, i64 last);
#endif

// dispatch.cpp
const Kernels& chosen();
const char* choose(const char* name);  // "" = the best; returns nullptr, or why not
const char* why_not(const Kernels& kernels);
i64 num_isas();
const Kernels& isa_at(i64 i);
i64 first_out_of_range(const i64* ids, i64 count, i64 n);  // -1: none
// Counting sort of tokens by slot, stable; tokens of slot -1 are left out. Returns how many are in
// `order`, or -1 - i where slots[i] is not in [-1, num_slots). starts: int64[num_slots + 1].
i64 plan_adapters(const i64* slots, i64 T, i64 num_slots, i64* order, i64* starts);

}  // namespace memos::cpu
