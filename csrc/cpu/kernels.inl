// The one body of the CPU kernels. Included by one file per instruction set, which says how many
// floats a vector has (MEMOS_LANES). No allocation, no statics, nothing with external linkage.
// tiles.inl has the arithmetic loops, rotate.inl the rotation of the head dimension, rope.inl that
// of positions; here heads, sections and tasks.
#include "cpu/rope.inl"
#include "cpu/rotate.inl"
#include "cpu/tiles.inl"

namespace memos::cpu {
namespace {

// One head of one section, K (kPerChannel) or V.
struct Head {
  char* numbers;  // [P] rows of D numbers, token_bytes apart
  i64 token_bytes;
  char *codes, *scales, *zeros;
  i64 P, D;
  const char* next;  // where the numbers of the head that follows begin
  bool stream;       // store the codes past the caches
  KeyTurn turn;      // of its numbers, the table that of its first token
};

template <int W, i64 kSource, i64 kKind, bool kPerChannel>
MEMOS_HD bool encode_tile(const Rows& rows, i64 T, i64 D, i64 G, const Target& to) {
  if constexpr (kPerChannel)
    return encode_channels<W, kSource, kKind>(rows, T, D, to);
  else
    return with_groups<W>(D, G, [&](auto grouping) {
      return encode_tokens<W, kSource, kKind>(rows, T, grouping, to);
    });
}

template <int W, i64 kDtype, i64 kKind, bool kPerChannel>
void encode_head(const Head& head, i64 G, bool rotate, i64 row_bytes) {
  alignas(64) float tile[kTileTokens * kMaxHeadDim];
  char* scratch = reinterpret_cast<char*>(tile);
  const i64 D = head.D, step = kPerChannel ? G : kTokensAtOnce;
  const i64 params = kPerChannel ? 2 * D : 2 * kTokensAtOnce * num_groups(D, G);
  const Rows rotated{scratch, 4 * D, scratch};
  for (i64 t = 0, i = 0; t < head.P; t += step, ++i) {
    const i64 T = head.P - t < step ? head.P - t : step;
    const char* at = head.numbers + t * head.token_bytes;
    const Rows rows{at, head.token_bytes,
                    t + step < head.P ? at + step * head.token_bytes : head.next};
    const Target to{head.codes + t * row_bytes, row_bytes, head.scales + i * params,
                    head.zeros + i * params, head.stream};
    if (!rotate) {
      if (!encode_tile<W, kDtype, kKind, kPerChannel>(rows, T, D, G, to)) continue;
      move_rows<W, kDtype, kScratch, true>(rows, scratch, 4 * D, T, D, false);
    } else if (move_rows<W, kDtype, kScratch, false>(rows, scratch, 4 * D, T, D, true)) {
      move_rows<W, kDtype, kScratch, true>(rows, scratch, 4 * D, T, D, true);
    }
    if (encode_tile<W, kScratch, kKind, kPerChannel>(rotated, T, D, G, to)) {
      move_rows<W, kScratch, kScratch, true>(rotated, scratch, 4 * D, T, D, false);
      encode_tile<W, kScratch, kKind, kPerChannel>(rotated, T, D, G, to);
    }
  }
}

template <int W, i64 kTarget, i64 kKind, bool kPerChannel>
MEMOS_HD void decode_tile(const char* codes, i64 row_bytes, const char* scales, const char* zeros,
                          i64 T, i64 D, i64 G, char* dst, i64 token_bytes) {
  if constexpr (kPerChannel)
    decode_channels<W, kTarget, kKind>(codes, row_bytes, scales, zeros, T, D, dst, token_bytes);
  else
    with_groups<W>(D, G, [&](auto grouping) {
      decode_tokens<W, kTarget, kKind>(codes, row_bytes, scales, zeros, T, grouping, dst,
                                       token_bytes);
      return false;
    });
}

// The angles of token t of a head.
MEMOS_HD const float* angles_of(const KeyTurn& turn, i64 t) {
  return reinterpret_cast<const float*>(turn.table) + t * 2 * turn.half;
}

template <int W>
MEMOS_HD void turn_pairs(Pair<W>& a, Pair<W>& b, const float* cosines, const float* sines) {
  const Pair<W> c = load_pair<W, kF32>(reinterpret_cast<const char*>(cosines), 0);
  const Pair<W> s = load_pair<W, kF32>(reinterpret_cast<const char*>(sines), 0);
  turn(a.even, b.even, c.even, s.even);
  turn(a.odd, b.odd, c.odd, s.odd);
}

// A row of floats in Pair order, turned, to numbers.
template <int W, i64 kDtype>
MEMOS_HD void store_turned(const char* row, i64 D, const KeyTurn& by, const float* angles,
                           char* dst) {
  const i64 half = by.half, first = by.first, end = first + 2 * half;
  const bool in_pairs = (first | (by.interleaved ? 2 * half : half)) % (2 * W) == 0;
  if (!in_pairs) {  // a turn begins or ends within a Pair
    alignas(64) float plain[kMaxHeadDim];
    char* at = reinterpret_cast<char*>(plain);
    for (i64 c = 0; c < D; c += 2 * W) store_pair<W, kF32>(at, c, load_pair<W, kScratch>(row, c));
    turn_row<W, kF32>(at + 4 * first, half, by.interleaved != 0, angles);
    for (i64 c = 0; c < D; c += 2 * W) store_pair<W, kDtype>(dst, c, load_pair<W, kF32>(at, c));
    return;
  }
  for (i64 c = 0; c < D; c += 2 * W)
    if (c < first || c >= end) store_pair<W, kDtype>(dst, c, load_pair<W, kScratch>(row, c));
  if (by.interleaved) {
    for (i64 i = 0; i < half; i += W) {
      Pair<W> x = load_pair<W, kScratch>(row, first + 2 * i);
      turn(x.even, x.odd, load_as<typename Vec<W>::F>(angles + i),
           load_as<typename Vec<W>::F>(angles + half + i));
      store_pair<W, kDtype>(dst, first + 2 * i, x);
    }
  } else {
    for (i64 i = 0; i < half; i += 2 * W) {
      Pair<W> a = load_pair<W, kScratch>(row, first + i);
      Pair<W> b = load_pair<W, kScratch>(row, first + half + i);
      turn_pairs<W>(a, b, angles + i, angles + half + i);
      store_pair<W, kDtype>(dst, first + i, a);
      store_pair<W, kDtype>(dst, first + half + i, b);
    }
  }
}

template <int W, i64 kDtype, i64 kKind, bool kPerChannel>
void decode_head(const Head& head, i64 G, bool rotate, i64 row_bytes) {
  alignas(64) float tile[kTileTokens * kMaxHeadDim];
  char* scratch = reinterpret_cast<char*>(tile);
  const i64 D = head.D, step = kPerChannel ? G : kTokensAtOnce;
  const i64 params = kPerChannel ? 2 * D : 2 * kTokensAtOnce * num_groups(D, G);
  for (i64 t = 0, i = 0; t < head.P; t += step, ++i) {
    const i64 T = head.P - t < step ? head.P - t : step;
    char* dst = head.numbers + t * head.token_bytes;
    const char* codes = head.codes + t * row_bytes;
    const char *scales = head.scales + i * params, *zeros = head.zeros + i * params;
    if constexpr (kPerChannel) {
      if (head.turn.table) {
        decode_tile<W, kScratch, kKind, true>(codes, row_bytes, scales, zeros, T, D, G, scratch,
                                              4 * D);
        if (rotate)
          move_rows<W, kScratch, kScratch, false>({scratch, 4 * D, scratch}, scratch, 4 * D, T, D,
                                                  true);
        for (i64 r = 0; r < T; ++r)
          store_turned<W, kDtype>(scratch + r * 4 * D, D, head.turn, angles_of(head.turn, t + r),
                                  dst + r * head.token_bytes);
        continue;
      }
    }
    if (!rotate) {
      decode_tile<W, kDtype, kKind, kPerChannel>(codes, row_bytes, scales, zeros, T, D, G, dst,
                                                 head.token_bytes);
    } else {
      decode_tile<W, kScratch, kKind, kPerChannel>(codes, row_bytes, scales, zeros, T, D, G,
                                                   scratch, 4 * D);
      move_rows<W, kScratch, kDtype, false>({scratch, 4 * D, scratch}, dst, head.token_bytes, T, D,
                                            true);
    }
  }
}

// From run-time numbers to the instance compiled for them.

template <bool kEncode, int W, i64 kDtype, i64 kKind>
void head_of_kind(const Head& head, bool per_channel, i64 G, bool rotate, i64 row_bytes) {
  if constexpr (kEncode) {
    if (per_channel)
      encode_head<W, kDtype, kKind, true>(head, G, rotate, row_bytes);
    else
      encode_head<W, kDtype, kKind, false>(head, G, rotate, row_bytes);
  } else {
    if (per_channel)
      decode_head<W, kDtype, kKind, true>(head, G, rotate, row_bytes);
    else
      decode_head<W, kDtype, kKind, false>(head, G, rotate, row_bytes);
  }
}

template <bool kEncode, int W, i64 kDtype>
void head_of_dtype(const Head& head, const Scheme& s, bool per_channel, i64 row_bytes) {
  const bool rotate = s.rotate != 0;
  switch (s.kind) {
    case kInt8:
      return head_of_kind<kEncode, W, kDtype, kInt8>(head, per_channel, s.group, rotate, row_bytes);
    case kInt4:
      return head_of_kind<kEncode, W, kDtype, kInt4>(head, per_channel, s.group, rotate, row_bytes);
    case kInt2:
      return head_of_kind<kEncode, W, kDtype, kInt2>(head, per_channel, s.group, rotate, row_bytes);
    default:
      return head_of_kind<kEncode, W, kDtype, kFp8>(head, per_channel, s.group, rotate, row_bytes);
  }
}

template <bool kEncode, int W>
void head_of_width(const Head& head, const Scheme& s, i64 dtype, bool per_channel, i64 row_bytes) {
  // Fewer lanes where the head dimension is no multiple of two full vectors; it is one of 8.
  if constexpr (W > 4)
    if (head.D % (2 * W))
      return head_of_width<kEncode, W / 2>(head, s, dtype, per_channel, row_bytes);
  if constexpr (!kEncode)
    if (dtype == kBf16Streamed)
      return head_of_dtype<kEncode, W, kBf16Streamed>(head, s, per_channel, row_bytes);
  if (dtype == kBf16) return head_of_dtype<kEncode, W, kBf16>(head, s, per_channel, row_bytes);
  if (dtype == kF16) return head_of_dtype<kEncode, W, kF16>(head, s, per_channel, row_bytes);
  return head_of_dtype<kEncode, W, kF32>(head, s, per_channel, row_bytes);
}

void copy_row(char* dst, const char* src, i64 bytes, bool stream) {
  if (stream) {
    typedef std::uint32_t Line __attribute__((vector_size(4 * MEMOS_LANES)));
    const i64 size = sizeof(Line), head = -reinterpret_cast<i64>(dst) & (size - 1);
    if (head + size <= bytes) {
      std::memcpy(dst, src, head);
      i64 i = head;
      for (; i + size <= bytes; i += size) store_line<true>(dst + i, load_as<Line>(src + i));
      std::memcpy(dst + i, src + i, bytes - i);
      return;
    }
  }
  std::memcpy(dst, src, bytes);
}

template <bool kEncode>
void copy_raw(const Head& head, i64 row_bytes, bool stream) {
  const bool dense = head.token_bytes == row_bytes;
  const i64 rows = dense ? 1 : head.P, bytes = dense ? head.P * row_bytes : row_bytes;
  for (i64 t = 0; t < rows; ++t) {
    char *numbers = head.numbers + t * head.token_bytes, *codes = head.codes + t * row_bytes;
    copy_row(kEncode ? codes : numbers, kEncode ? numbers : codes, bytes, stream);
  }
}

// Rows that were copied as they are, turned in place.
template <i64 kDtype>
void turn_copied(const Head& head) {
  for (i64 t = 0; t < head.P; ++t)
    turn_row<MEMOS_LANES, kDtype>(
        head.numbers + t * head.token_bytes + head.turn.first * item_bytes(kDtype), head.turn.half,
        head.turn.interleaved != 0, angles_of(head.turn, t));
}

// The numbers of K or V of one block of one layer.
struct Numbers {
  char* at;
  i64 token_bytes, head_bytes, row_bytes;
};

// K (per_channel) or V of one block of one layer; `next` is the one that follows.
template <bool kEncode>
void do_section(const Numbers& numbers, const Numbers& next, const Scheme& s, const KvCall& call,
                i64 D, bool per_channel, char* packed, const Section& section, const KeyTurn& turn,
                bool stream) {
  const i64 where = reinterpret_cast<i64>(numbers.at) | numbers.token_bytes | numbers.head_bytes;
  const bool aligned = where % (4 * MEMOS_LANES) == 0;
  const bool past = stream && aligned && call.dtype == kBf16 && !kEncode;
  for (i64 h = 0; h < call.H; ++h) {
    const Head head{
        numbers.at + h * numbers.head_bytes,
        numbers.token_bytes,
        packed + h * call.P * section.row_bytes,
        packed + section.scales_at + 2 * h * section.groups,
        packed + section.zeros_at + 2 * h * section.groups,
        call.P,
        D,
        h + 1 < call.H ? numbers.at + (h + 1) * numbers.head_bytes : next.at,
        stream && (reinterpret_cast<i64>(packed) | call.P * section.row_bytes) % 32 == 0,
        turn};
    if (s.kind == kRaw) {
      copy_raw<kEncode>(head, section.row_bytes, stream && !turn.table);
      if (turn.table && call.dtype == kBf16) turn_copied<kBf16>(head);
      if (turn.table && call.dtype == kF16) turn_copied<kF16>(head);
      if (turn.table && call.dtype == kF32) turn_copied<kF32>(head);
    } else {
      head_of_width<kEncode, MEMOS_LANES>(head, s, past ? kBf16Streamed : call.dtype, per_channel,
                                          section.row_bytes);
    }
  }
  if (kEncode) {
    std::memset(packed + section.padding_at[0], 0, section.scales_at - section.padding_at[0]);
    std::memset(packed + section.padding_at[1], 0, section.bytes - section.padding_at[1]);
  }
}

template <bool kEncode>
void do_tasks(const KvCall& call, i64 first, i64 last) {
  if (first >= last) return;  // M may be 0 then
  const auto* layers = reinterpret_cast<const LayerView*>(call.layers);
  const auto* ids = reinterpret_cast<const i64*>(call.block_ids);
  const auto* rows = reinterpret_cast<const i64*>(call.rows);
  const Scheme k{call.k_kind, call.k_group, call.k_rotate};
  const Scheme v{call.v_kind, call.v_group, call.v_rotate};
  const Section ks = section_of(k, call.P, call.H, call.Dk, call.dtype, true);
  const Section vs = section_of(v, call.P, call.H, call.Dv, call.dtype, false);
  const i64 item = item_bytes(call.dtype);
  const bool stream = (last - first) * call.P * call.H * (call.Dk + call.Dv) * item >= kStreamFrom;
  const auto keys_of = [&](i64 task) {
    const LayerView& view = layers[task / call.M];
    return Numbers{reinterpret_cast<char*>(view.k) + ids[task % call.M] * view.k_block * item,
                   view.k_token * item, view.k_head * item, call.Dk * item};
  };
  const auto values_of = [&](i64 task) {
    const LayerView& view = layers[task / call.M];
    return Numbers{reinterpret_cast<char*>(view.v) + ids[task % call.M] * view.v_block * item,
                   view.v_token * item, view.v_head * item, call.Dv * item};
  };
  Numbers keys = keys_of(first);
  for (i64 task = first; task < last; ++task) {
    char* packed = reinterpret_cast<char*>(rows[task % call.M]) + task / call.M * call.row_bytes;
    const Numbers values = values_of(task);
    const Numbers next = keys_of(task + 1 < last ? task + 1 : task);
    KeyTurn turn = kEncode ? KeyTurn{} : call.turn;
    if (turn.table) turn.table += task % call.M * call.P * 2 * turn.half * i64{sizeof(float)};
    do_section<kEncode>(keys, values, k, call, call.Dk, true, packed, ks, turn, stream);
    do_section<kEncode>(values, next, v, call, call.Dv, false, packed + ks.bytes, vs, {}, stream);
    keys = next;
  }
  if (stream) end_stream();
}

void pack_kv(const KvCall& call, i64 first, i64 last) { do_tasks<true>(call, first, last); }
void unpack_kv(const KvCall& call, i64 first, i64 last) { do_tasks<false>(call, first, last); }

void gather_rows(const char* src, const i64* ids, i64 first, i64 last, i64 row_bytes, char* dst) {
  const bool stream = (last - first) * row_bytes >= kStreamFrom;
  for (i64 i = first; i < last; ++i)
    copy_row(dst + i * row_bytes, src + ids[i] * row_bytes, row_bytes, stream);
  if (stream) end_stream();
}

void write_rows(char* dst, const i64* ids, i64 first, i64 last, i64 row_bytes, const char* src) {
  const bool stream = (last - first) * row_bytes >= kStreamFrom;
  for (i64 i = first; i < last; ++i)
    copy_row(dst + ids[i] * row_bytes, src + i * row_bytes, row_bytes, stream);
  if (stream) end_stream();
}

}  // namespace
}  // namespace memos::cpu
