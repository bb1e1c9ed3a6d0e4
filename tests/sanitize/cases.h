// Random calls of pack_kv and unpack_kv, and buffers between guards: for the fuzzers.
#pragma once

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "codec/calls.h"
#include "codec/layout.h"

namespace {

using memos::KeyTurn;
using memos::KvCall;
using memos::LayerView;
using namespace memos::codec;

i64 case_number = 0;

void name_case() {
  std::fprintf(stderr, "that was case %lld\n", static_cast<long long>(case_number));
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  name_case();
  std::abort();
}

struct Random {  // SplitMix64
  std::uint64_t state;

  std::uint64_t bits() {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  i64 between(i64 low, i64 high) {  // both included
    return low + static_cast<i64>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool one_in(i64 n) { return between(1, n) == 1; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<i64>(choices.size()) - 1)];
  }
};

// `size` bytes between poisoned guards.
class Buffer {
 public:
  Buffer(i64 size, i64 offset) : size_(size), begin_(kGuard + offset) {
    all_.assign(begin_ + size + kGuard, kMark);
    poison(true);
  }
  ~Buffer() { poison(false); }
  Buffer(const Buffer&) = delete;

  char* data() { return reinterpret_cast<char*>(all_.data()) + begin_; }
  i64 size() const { return size_; }
  i64 address() { return reinterpret_cast<i64>(data()); }
  std::vector<char> bytes() { return {data(), data() + size_}; }

  void check_guards() {
    poison(false);
    const auto marked = [](unsigned char c) { return c == kMark; };
    require(std::all_of(all_.begin(), all_.begin() + begin_, marked), "written before a buffer");
    require(std::all_of(all_.begin() + begin_ + size_, all_.end(), marked),
            "written behind a buffer");
    poison(true);
  }

 private:
  static constexpr unsigned char kMark = 0xa5;
  static constexpr i64 kGuard = 256;

  void poison(bool on) {
    const auto change = on ? __asan_poison_memory_region : __asan_unpoison_memory_region;
    change(all_.data(), begin_);
    change(all_.data() + begin_ + size_, kGuard);
    if (on) __asan_unpoison_memory_region(data(), size_);
  }

  std::vector<unsigned char> all_;
  i64 size_, begin_;
};

// Numbers as models have them, or any bits at all: NaN, infinities and subnormals too.
void fill(Random& random, Buffer& buffer, i64 dtype, bool any_bits) {
  const i64 item = item_bytes(dtype);
  for (i64 i = 0; i + item <= buffer.size(); i += item) {
    const std::uint64_t bits = random.bits();
    const float x = (static_cast<float>(bits >> 40) / 16777216.0f - 0.5f) * 8.0f;
    const auto as_bf16 = static_cast<std::uint16_t>(bit_cast<std::uint32_t>(x) >> 16);
    const auto as_fp16 = static_cast<std::uint16_t>(0x2c00 + (bits & 0x9fff));  // |x| in [1/16, 16)
    if (any_bits)
      std::memcpy(buffer.data() + i, &bits, item);
    else if (dtype == kF32)
      std::memcpy(buffer.data() + i, &x, 4);
    else
      std::memcpy(buffer.data() + i, dtype == kBf16 ? &as_bf16 : &as_fp16, 2);
  }
}

// The K or the V of one layer in memory, and which of its bytes belong to rows.
struct Tensor {
  i64 block, token, head, count;  // strides and extent in elements

  Tensor(Random& random, i64 N, i64 P, i64 H, i64 D) {
    const i64 gap = random.one_in(2) ? 0 : random.between(0, 40);
    if (random.one_in(3)) {  // [H, N * P, D], as transformers keeps it
      token = D + gap;
      block = P * token;
      head = N * block + random.between(0, 3);
      count = (H - 1) * head + (N * P - 1) * token + D;
    } else {  // [N, P, H, D]
      head = D + gap;
      token = H * head + (random.one_in(2) ? 0 : random.between(0, 70));
      block = P * token + random.between(0, 1) * random.between(0, 100);
      count = (N - 1) * block + (P - 1) * token + (H - 1) * head + D;
    }
  }
};

struct Case {
  i64 L, M, N, P, H, Dk, Dv, dtype;
  Scheme k, v;
  std::vector<i64> ids;
  bool any_bits;
  KeyTurn turn{};  // the table aside

  explicit Case(Random& random) {
    L = random.between(1, 2);
    N = random.between(1, 4);
    P = random.pick<i64>({1, 2, 16, 31, 32, 33, 64, 64, 65, random.between(1, 140)});
    H = random.between(1, 3);
    dtype = random.between(0, 2);
    any_bits = random.one_in(3);
    k = scheme(random);
    v = random.one_in(2) ? k : scheme(random);
    Dk = head_dim(random, k);
    Dv = random.one_in(2) && (v.kind == kRaw || Dk % 8 == 0) ? Dk : head_dim(random, v);
    if (random.one_in(300)) {  // enough for stores past the caches
      L = 1, N = 40, P = 64, H = 8, Dk = Dv = 128;
      k.rotate = v.rotate = random.between(0, 1);
    }
    for (i64 i = 0; i < N; ++i) ids.push_back(i);
    for (i64 i = N - 1; i > 0; --i) std::swap(ids[i], ids[random.between(0, i)]);
    if (N < 40) ids.resize(random.between(0, N));
    M = static_cast<i64>(ids.size());
    choose_turn(random);
  }

  void choose_turn(Random& random) {
    turn = {};
    if (!random.one_in(3) || Dk < 2) return;
    const bool whole = random.one_in(2), even = random.one_in(2);
    turn.half = whole ? Dk / 2 : random.between(1, Dk / 2);
    if (even && turn.half >= 8) turn.half &= ~i64{7};
    turn.first = random.between(0, Dk - 2 * turn.half);
    if (even) turn.first &= ~i64{7};
    turn.interleaved = random.between(0, 1);
    if (k.kind == kRaw) any_bits = false;  // which NaN a sum of two is, is not told
  }

  static Scheme scheme(Random& random) {
    const i64 kind = random.between(0, 4);
    if (kind == kRaw) return {kRaw, 0, 0};
    return {kind, random.pick<i64>({32, 64}), random.between(0, 1)};
  }

  static i64 head_dim(Random& random, const Scheme& s) {
    if (s.kind == kRaw) return random.between(1, 130);
    if (random.one_in(30)) return 8 * random.between(1, kMaxHeadDim / 8);
    return random.one_in(2) ? random.pick<i64>({64, 80, 96, 128, 256}) : 8 * random.between(1, 24);
  }
};

using Buffers = std::vector<std::unique_ptr<Buffer>>;

struct Kv {
  const Case& c;
  i64 item;
  Section ks, vs;
  std::vector<Tensor> tensors;  // K and V of each layer in turn
  std::vector<i64> offsets;
  std::unique_ptr<Buffer> angles;

  Kv(Random& random, const Case& c_) : c(c_), item(item_bytes(c_.dtype)) {
    ks = section_of(c.k, c.P, c.H, c.Dk, c.dtype, true);
    vs = section_of(c.v, c.P, c.H, c.Dv, c.dtype, false);
    const bool aligned = random.one_in(2);
    for (i64 i = 0; i < 2 * c.L; ++i) {
      tensors.emplace_back(random, c.N, c.P, c.H, i % 2 ? c.Dv : c.Dk);
      offsets.push_back(aligned ? 0 : item * random.between(0, 31));
    }
    angles = std::make_unique<Buffer>(c.M * c.P * 2 * c.turn.half * 4, 0);
    fill(random, *angles, kF32, false);
  }

  Buffers numbers() const {
    Buffers result;
    for (std::size_t i = 0; i < tensors.size(); ++i)
      result.push_back(std::make_unique<Buffer>(tensors[i].count * item, offsets[i]));
    return result;
  }
  Buffers packed() const {  // a block's bytes each by themselves, as a store hands them over
    Buffers result;
    for (i64 m = 0; m < c.M; ++m)
      result.push_back(std::make_unique<Buffer>(c.L * (ks.bytes + vs.bytes), m % 2 ? 0 : m));
    return result;
  }

  template <class Run>
  void call(Buffers& numbers, Buffers& packed, Run run) const {
    std::vector<LayerView> layers;
    for (i64 i = 0; i < 2 * c.L; i += 2) {
      const Tensor &k = tensors[i], &v = tensors[i + 1];
      layers.push_back({numbers[i]->address(), k.block, k.token, k.head, numbers[i + 1]->address(),
                        v.block, v.token, v.head});
    }
    std::vector<i64> rows;
    for (auto& buffer : packed) rows.push_back(buffer->address());
    KeyTurn turn = c.turn;
    if (turn.half) turn.table = angles->address();
    run(KvCall{reinterpret_cast<i64>(layers.data()), c.L, reinterpret_cast<i64>(c.ids.data()), c.M,
               reinterpret_cast<i64>(rows.data()), c.N, c.P, c.H, c.Dk, c.Dv, c.dtype, c.k.kind,
               c.k.group, c.k.rotate, c.v.kind, c.v.group, c.v.rotate, ks.bytes + vs.bytes, turn});
    for (auto& buffer : numbers) buffer->check_guards();
    for (auto& buffer : packed) buffer->check_guards();
    angles->check_guards();
  }

  // Marks the elements of rows that unpack writes with 1.
  std::vector<char> written(i64 i) const {
    const Tensor& t = tensors[i];
    std::vector<char> result(t.count * item);
    for (i64 id : c.ids)
      for (i64 p = 0; p < c.P; ++p)
        for (i64 h = 0; h < c.H; ++h)
          std::fill_n(result.begin() + (id * t.block + p * t.token + h * t.head) * item,
                      (i % 2 ? c.Dv : c.Dk) * item, 1);
    return result;
  }
};

std::vector<std::vector<char>> bytes_of(Buffers& buffers) {
  std::vector<std::vector<char>> result;
  for (auto& buffer : buffers) result.push_back(buffer->bytes());
  return result;
}

}  // namespace
