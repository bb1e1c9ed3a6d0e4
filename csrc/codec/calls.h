// What crosses the boundary from Python, for all backends: one struct of int64 per call, built
// field by field in memos/kernels.
#pragma once

#include <cstdint>

namespace memos {

using i64 = std::int64_t;

// K and V of one layer: address, then strides in elements; the last axis is contiguous.
struct LayerView {
  i64 k, k_block, k_token, k_head;
  i64 v, v_block, v_token, v_head;
};

// How unpack_kv turns keys on to other positions: pair i of a token by the angle whose cosine and
// sine are table[m][p][0][i] and table[m][p][1][i].
struct KeyTurn {
  i64 table;        // address of float[M][P][2][half], where the numbers are; 0: they stay
  i64 half, first;  // half pairs of the channels [first, first + 2 * half)
  i64 interleaved;  // a pair is (2i, 2i + 1), else (i, i + half)
};

// One call of pack_kv or unpack_kv. memos/kernels/kv.py builds it, field by field as int64. The
// tables `layers` and `rows` are in host memory for every backend; `block_ids` is where the numbers
// are.
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
  KeyTurn turn;   // of unpack_kv
};
constexpr i64 kKvCallFields = sizeof(KvCall) / sizeof(i64);

// Of one slot and one module; all zero: that module stays as it is. A row of AdapterTable.rows in
// memos/kernels/adapters.py.
struct AdapterFactors {
  i64 down;   // address of [R, I], contiguous
  i64 up;     // address of [R, O], contiguous: transposed, so that outputs are neighbours
  i64 R;      // a multiple of 8, at most 512
  i64 scale;  // the bits of a float
};

}  // namespace memos
