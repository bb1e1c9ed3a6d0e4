// The byte layout of packed KV, once for all backends. docs/format/kv-frame.md says it in words,
// memos/kernels/codec.py holds the same sizes for Python; a test compares the two.
#pragma once

#include <cstdint>

#include "codec/arith.h"

namespace memos::codec {
namespace {

using i64 = std::int64_t;

enum Kind : i64 { kRaw = 0, kInt8 = 1, kInt4 = 2, kInt2 = 3, kFp8 = 4 };
enum Dtype : i64 { kF32 = 0, kF16 = 1, kBf16 = 2 };

constexpr i64 kMaxHeadDim = 1024;

struct Scheme {
  i64 kind, group, rotate;
};

MEMOS_HD i64 align16(i64 n) { return (n + 15) & ~i64{15}; }
MEMOS_HD i64 bits_of(i64 kind) {
  return kind == kInt4 ? 4 : kind == kInt2 ? 2 : kind == kRaw ? 0 : 8;
}
// The highest code of a kind of integers.
template <i64 kKind>
MEMOS_HD constexpr float levels_of() {
  return kKind == kInt8 ? 255.0f : kKind == kInt4 ? 15.0f : 3.0f;
}

MEMOS_HD i64 item_bytes(i64 dtype) { return dtype == kF32 ? 4 : 2; }
MEMOS_HD i64 num_groups(i64 n, i64 group) { return (n + group - 1) / group; }

// One section: the K or the V of one layer of one block.
//   codes   [H][P][D] of `bits` each, little-endian inside a byte, padded to 16 bytes
//   scales  fp16, K: [H][ceil(P / group)][D]   V: [H][P][ceil(D / group)]
//   zeros   fp16, the same shape (not for fp8); padded to 16 bytes
// raw: the numbers themselves, [H][P][D].
struct Section {
  i64 row_bytes;      // codes of one token of one head
  i64 groups;         // scales of one head
  i64 scales_at;      // offset of the scales
  i64 zeros_at;       // offset of the zeros
  i64 bytes;          // of the whole section
  i64 padding_at[2];  // padding bytes: [padding_at[0], scales_at) and [padding_at[1], bytes)
};

MEMOS_HD Section section_of(const Scheme& s, i64 P, i64 H, i64 D, i64 dtype, bool per_channel) {
  Section r;
  if (s.kind == kRaw) {
    r.row_bytes = D * item_bytes(dtype);
    r.groups = 0;
    r.padding_at[0] = P * H * r.row_bytes;
    r.scales_at = r.zeros_at = r.padding_at[1] = r.bytes = align16(r.padding_at[0]);
    return r;
  }
  r.row_bytes = D * bits_of(s.kind) / 8;
  r.groups = per_channel ? num_groups(P, s.group) * D : P * num_groups(D, s.group);
  r.padding_at[0] = P * H * r.row_bytes;
  r.scales_at = align16(r.padding_at[0]);
  r.zeros_at = r.scales_at + 2 * H * r.groups;
  r.padding_at[1] = r.scales_at + (s.kind == kFp8 ? 2 : 4) * H * r.groups;
  r.bytes = r.scales_at + align16(r.padding_at[1] - r.scales_at);
  return r;
}

}  // namespace
}  // namespace memos::codec
