// Random calls of the CUDA kernels, built for the CPU through the thread shim, under ASan and
// UBSan: threads in any order, byte for byte what the CPU kernels leave.
//
//   fuzz_cuda [seconds = 20] [first case = 0]      a case is its number, as for fuzz
#include <sanitizer/common_interface_defs.h>

#include <chrono>
#include <cmath>

#include "cases.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace {

namespace cuda = memos::cuda;
using memos::cpu::kBaseline;
using memos::cpu::Kernels;

// A case takes about 10 us per thread and barrier: fewer heads and tokens than the CPU's.
Case small_case(Random& random) {
  Case c(random);
  if (c.N >= 40) c.N = 2, c.ids = {1, 0}, c.M = 2, c.H = 1;
  if (random.one_in(3)) c.k = c.v = {random.pick<i64>({kInt4, kInt8}), 64, 1};  // what is usual
  if (random.one_in(3)) c.Dk = c.Dv = random.pick<i64>({64, 128});
  c.M = std::min<i64>(c.M, 2);
  c.ids.resize(c.M);
  c.H = std::min<i64>(c.H, 2);
  for (i64* D : {&c.Dk, &c.Dv})
    if ((c.k.kind != kRaw || c.v.kind != kRaw) && *D % 8) *D += 8 - *D % 8;
  c.choose_turn(random);
  return c;
}

// Zeros of both signs, constant groups and single giants: where orders of comparison would show.
void make_hard(Random& random, Buffer& buffer, i64 dtype) {
  const i64 item = item_bytes(dtype), n = buffer.size() / item;
  const std::uint32_t giant = dtype == kF16 ? 0x7bff : dtype == kBf16 ? 0x7f00 : 0x7f000000;
  const std::uint32_t minus = dtype == kF32 ? 0x80000000u : 0x8000u;
  const i64 how = random.between(0, 2);
  for (i64 i = 0; i < n; ++i) {
    const std::uint32_t sign = random.one_in(2) ? minus : 0;
    std::uint32_t bits = 0;
    std::memcpy(&bits, buffer.data() + i * item, item);
    if (how == 0) bits = sign;
    if (how == 1) bits = giant | sign;
    if (how == 2 && random.one_in(50)) bits = giant | sign;
    std::memcpy(buffer.data() + i * item, &bits, item);
  }
}

void describe(const Case& c, const std::vector<std::vector<char>>& got,
              const std::vector<std::vector<char>>& wanted) {
  const auto ll = [](i64 n) { return static_cast<long long>(n); };
  std::fprintf(stderr, "L %lld, M %lld, P %lld, H %lld, Dk %lld, Dv %lld, dtype %lld\n", ll(c.L),
               ll(c.M), ll(c.P), ll(c.H), ll(c.Dk), ll(c.Dv), ll(c.dtype));
  for (const Scheme& s : {c.k, c.v})
    std::fprintf(stderr, "kind %lld, group %lld, rotate %lld\n", ll(s.kind), ll(s.group),
                 ll(s.rotate));
  for (std::size_t m = 0; m < got.size(); ++m)
    for (std::size_t i = 0, n = 0; i < got[m].size() && n < 8; ++i)
      if (got[m][i] != wanted[m][i]) {
        std::fprintf(stderr, "block %zu, byte %zu: %02x, not %02x\n", m, i, got[m][i] & 0xff,
                     wanted[m][i] & 0xff);
        ++n;
      }
}

void fuzz_kv(Random& random) {
  const Case c = small_case(random);
  Kv kv(random, c);
  Buffers source = kv.numbers(), packed = kv.packed();
  const bool hard = random.one_in(4);
  for (auto& buffer : source) {
    fill(random, *buffer, c.dtype, c.any_bits);
    if (hard) make_hard(random, *buffer, c.dtype);
  }
  const auto before = bytes_of(source);
  const i64 tasks = c.M * c.L;
  for (auto& buffer : packed) std::memset(buffer->data(), 0x5a, buffer->size());
  kv.call(source, packed, [&](const KvCall& call) { kBaseline.pack_kv(call, 0, tasks); });
  const auto wanted = bytes_of(packed);
  for (auto& buffer : packed) std::memset(buffer->data(), 0xa5, buffer->size());
  kv.call(source, packed, [&](const KvCall& call) { cuda::pack_kv(call, 0); });
  require(bytes_of(source) == before, "pack_kv changed its source");
  if (bytes_of(packed) != wanted) describe(c, bytes_of(packed), wanted);
  require(bytes_of(packed) == wanted, "pack_kv differs from the CPU's");

  const bool garbage = random.one_in(6);
  if (garbage)
    for (auto& buffer : packed) fill(random, *buffer, kF16, true);
  std::vector<std::vector<char>> decoded;
  for (const bool on_cpu : {true, false}) {
    Buffers target = kv.numbers();
    for (auto& buffer : target) std::memset(buffer->data(), 0x77, buffer->size());
    kv.call(target, packed, [&](const KvCall& call) {
      if (on_cpu)
        kBaseline.unpack_kv(call, 0, tasks);
      else
        cuda::unpack_kv(call, 0);
    });
    auto after = bytes_of(target);
    if (on_cpu)
      decoded = std::move(after);
    else if (!garbage)
      require(after == decoded, "unpack_kv differs from the CPU's");
    else
      for (std::size_t i = 0; i < after.size(); ++i) {
        const auto written = kv.written(static_cast<i64>(i));
        for (std::size_t j = 0; j < written.size(); ++j)
          require(written[j] || after[i][j] == 0x77, "unpack_kv wrote between the rows");
      }
  }
}

void fuzz_rows(Random& random) {
  const i64 N = random.between(1, 9), M = random.between(0, N);
  const i64 row_bytes =
      random.one_in(20)
          ? random.between(16 << 10, 40 << 10)
          : random.pick<i64>({0, 1, 16, 64, random.between(1, 900), 16 * random.between(1, 600)});
  const i64 offset = random.one_in(2) ? 0 : random.between(0, 64);
  std::vector<i64> ids;
  for (i64 i = 0; i < N; ++i) ids.push_back(i);
  for (i64 i = N - 1; i > 0; --i) std::swap(ids[i], ids[random.between(0, i)]);
  Buffer cache(N * row_bytes, offset), blocks(M * row_bytes, offset);
  fill(random, cache, kF16, true);
  const auto before = cache.bytes();
  const i64 at = reinterpret_cast<i64>(ids.data());
  cuda::gather_rows(cache.address(), at, M, row_bytes, blocks.address(), 0);
  for (i64 m = 0; m < M; ++m)
    require(
        !std::memcmp(blocks.data() + m * row_bytes, cache.data() + ids[m] * row_bytes, row_bytes),
        "gather_rows copied a wrong row");
  for (i64 m = 0; m < M; ++m) std::memset(cache.data() + ids[m] * row_bytes, 0, row_bytes);
  cuda::write_rows(cache.address(), at, M, row_bytes, blocks.address(), 0);
  require(cache.bytes() == before, "write_rows is not the inverse of gather_rows");
  cache.check_guards();
  blocks.check_guards();
}

void fuzz_transfers(Random& random) {
  const i64 N = random.between(1, 5),
            S = random.one_in(8) ? random.between(60, 70) : random.between(1, 3);
  const i64 M = random.between(0, N), bytes = random.one_in(6) ? random.between(16 << 10, 40 << 10)
                                                               : 16 * random.between(1, 40);
  const i64 block_bytes = random.one_in(3) ? bytes + random.between(0, 15) : bytes;
  std::vector<i64> ids, addresses;
  for (i64 i = 0; i < N; ++i) ids.push_back(i);
  for (i64 i = N - 1; i > 0; --i) std::swap(ids[i], ids[random.between(0, i)]);
  Buffers planes;
  for (i64 s = 0; s < S; ++s) {
    planes.push_back(std::make_unique<Buffer>(N * block_bytes, 0));
    fill(random, *planes.back(), kF16, true);
    addresses.push_back(planes.back()->address());
  }
  const auto before = bytes_of(planes);
  Buffer host(M * S * block_bytes, random.one_in(4) ? random.between(0, 15) : 0);
  cuda::TransferCall call{reinterpret_cast<i64>(addresses.data()),
                          S,
                          reinterpret_cast<i64>(ids.data()),
                          M,
                          host.address(),
                          block_bytes,
                          block_bytes,
                          1,
                          random.one_in(3) ? 1000000000 : 0,
                          random.between(cuda::kByChoice, cuda::kByCopies)};
  cuda::move_blocks(call, 0);
  for (i64 m = 0; m < M; ++m)
    for (i64 s = 0; s < S; ++s)
      require(!std::memcmp(host.data() + (m * S + s) * block_bytes,
                           planes[s]->data() + ids[m] * block_bytes, block_bytes),
              "move_blocks: not the block");
  for (i64 m = 0; m < M; ++m)
    for (auto& plane : planes) std::memset(plane->data() + ids[m] * block_bytes, 0, block_bytes);
  call.to_host = 0;
  call.how = random.between(cuda::kByChoice, cuda::kByCopies);
  cuda::move_blocks(call, 0);
  require(bytes_of(planes) == before, "move_blocks: the way back is another");
  host.check_guards();
  for (auto& plane : planes) plane->check_guards();
}

void fuzz_turns(Random& random) {
  const i64 dtype = random.between(kF32, kBf16), item = item_bytes(dtype);
  const i64 L = random.one_in(10) ? random.between(60, 70) : random.between(1, 3);
  const i64 B = random.between(1, 2), H = random.between(1, 2);
  const i64 T = L > 3 ? random.between(0, 2) : random.between(0, 40);
  const i64 half = random.one_in(2) ? random.pick<i64>({8, 16, 32, 64}) : random.between(1, 40);
  const i64 D = random.one_in(2) ? 2 * half : 2 * half + random.between(1, 16);
  const i64 token = random.one_in(2) ? H * D : D + random.between(0, 9);
  const i64 head = token == H * D ? D : T * token, row = H * T * token;
  Buffer table(T * 2 * half * 4, 0);
  fill(random, table, kF32, false);
  Buffers keys;
  for (i64 l = 0; l < L; ++l) {
    const i64 size = B * H * T ? (B - 1) * row + (H - 1) * head + (T - 1) * token + D : 0;
    keys.push_back(std::make_unique<Buffer>(size * item, random.one_in(3) ? item : 0));
    fill(random, *keys.back(), dtype, false);
  }
  std::vector<memos::cuda::KeyView> views;
  for (const auto& key : keys) views.push_back({key->address(), row, head, token});
  const i64 layers = reinterpret_cast<i64>(views.data()), interleaved = random.between(0, 1);
  const auto before = bytes_of(keys);
  const memos::cpu::TurnCall on_cpu{layers, B, H, T, dtype, half, interleaved, table.address()};
  kBaseline.turn_keys(on_cpu, 0, L * B * H);
  const auto wanted = bytes_of(keys);
  for (i64 l = 0; l < L; ++l) std::copy(before[l].begin(), before[l].end(), keys[l]->data());
  cuda::turn_keys({layers, L, B, H, T, dtype, half, interleaved, table.address()}, 0);
  require(bytes_of(keys) == wanted, "turn_keys differs from the CPU's");
  table.check_guards();
  for (auto& key : keys) key->check_guards();
}

float number_at(const char* p, i64 dtype) {
  std::uint16_t u;
  std::memcpy(&u, p, 2);
  return dtype == kBf16 ? bit_cast<float>(std::uint32_t{u} << 16)
                        : fp16_value_any<float>(std::uint32_t{u});
}

// Against float64, and against itself with the threads in another order.
void fuzz_adapters(Random& random) {
  const i64 dtype = random.between(kF16, kBf16), slots = random.between(1, 3);
  const i64 I = 8 * random.between(1, 20), O = 2 * random.between(1, 160);
  const i64 T = random.between(1, 20), modules = 2, module = random.between(0, 1);
  std::vector<memos::AdapterFactors> rows(slots * modules);
  Buffers factors;
  i64 max_rank = 0;
  for (i64 s = 0; s < slots; ++s) {
    const i64 R = 8 * random.between(0, 4);
    max_rank = std::max(max_rank, R);
    for (const i64 size : {I, O}) {
      factors.push_back(std::make_unique<Buffer>(R * size * 2, 0));
      fill(random, *factors.back(), dtype, false);
    }
    if (R)
      rows[s * modules + module] = {factors[2 * s]->address(), factors[2 * s + 1]->address(), R,
                                    static_cast<i64>(bit_cast<std::uint32_t>(0.0625f))};
  }
  std::vector<i64> order, starts{0}, shapes(2 * modules), slot_of(T, -1);
  shapes[2 * module] = I, shapes[2 * module + 1] = O;
  for (i64 t = 0; t < T; ++t) slot_of[t] = random.between(-1, slots - 1);
  for (i64 s = 0; s < slots; ++s) {
    for (i64 t = 0; t < T; ++t)
      if (slot_of[t] == s) order.push_back(t);
    starts.push_back(static_cast<i64>(order.size()));
  }
  i64 n = static_cast<i64>(order.size());
  if (random.one_in(2))  // a plan made on a device ends with the tokens of no adapter
    for (i64 t = 0; t < T; ++t)
      if (slot_of[t] < 0) order.push_back(t), ++n;
  const i64 x_stride = I + 8 * random.between(0, 2), y_stride = O + 2 * random.between(0, 3);
  Buffer x(((T - 1) * x_stride + I) * 2, 0), y(((T - 1) * y_stride + O) * 2, 0);
  fill(random, x, dtype, false);
  fill(random, y, dtype, false);
  const auto before = y.bytes();
  std::vector<char> first;
  for (int again = 0; again < 2; ++again) {
    std::copy(before.begin(), before.end(), y.data());
    const cuda::AdapterCall call{reinterpret_cast<i64>(rows.data()),
                                 reinterpret_cast<i64>(shapes.data()),
                                 slots,
                                 modules,
                                 dtype,
                                 max_rank,
                                 module,
                                 reinterpret_cast<i64>(order.data()),
                                 reinterpret_cast<i64>(starts.data()),
                                 n,
                                 y.address(),
                                 y_stride,
                                 x.address(),
                                 x_stride};
    cuda::apply_adapters(call, 0);
    require(first.empty() || y.bytes() == first, "apply_adapters depends on the order of threads");
    first = y.bytes();
  }
  x.check_guards();
  y.check_guards();
  std::vector<char> wanted = before;
  const double eps = dtype == kF16 ? 0x1p-11 : 0x1p-8;
  for (i64 t = 0; t < T; ++t) {
    if (slot_of[t] < 0) continue;
    const auto& of = rows[slot_of[t] * modules + module];
    if (of.R == 0) continue;
    std::vector<double> hidden(of.R), sizes(of.R);
    for (i64 r = 0; r < of.R; ++r)
      for (i64 i = 0; i < I; ++i) {
        const double product =
            static_cast<double>(number_at(x.data() + (t * x_stride + i) * 2, dtype)) *
            number_at(reinterpret_cast<const char*>(of.down) + (r * I + i) * 2, dtype);
        hidden[r] += product;
        sizes[r] += std::abs(product);
      }
    for (i64 o = 0; o < O; ++o) {
      double sum = 0, size = 0;
      for (i64 r = 0; r < of.R; ++r) {
        const double b = number_at(reinterpret_cast<const char*>(of.up) + (r * O + o) * 2, dtype);
        sum += hidden[r] * b;
        size += sizes[r] * std::abs(b);
      }
      const i64 at = (t * y_stride + o) * 2;
      const double old = number_at(before.data() + at, dtype), want = old + 0.0625 * sum;
      const double off = (I + of.R + 2) * 0x1p-24 * (0.0625 * size + std::abs(old));
      std::memcpy(wanted.data() + at, first.data() + at, 2);
      if (dtype == kF16 && std::abs(want) + off >= 65504) continue;  // may be infinite
      require(std::abs(number_at(first.data() + at, dtype) - want) <=
                  off + eps * (std::abs(want) + off) + 1e-7,
              "apply_adapters is wrong");
    }
  }
  require(wanted == first, "apply_adapters changed other numbers");
}

}  // namespace

extern "C" void __ubsan_on_report() { name_case(); }

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 20;
  const i64 start = argc > 2 ? std::atoll(argv[2]) : 0;
  __sanitizer_set_death_callback(name_case);
  const auto began = std::chrono::steady_clock::now();
  for (case_number = start;; ++case_number) {
    Random random{static_cast<std::uint64_t>(case_number) * 0x2545f4914f6cdd1du};
    memos::shim::seed(random.bits());
    if (random.one_in(6))
      fuzz_rows(random);
    else if (random.one_in(6))
      fuzz_transfers(random);
    else if (random.one_in(6))
      fuzz_turns(random);
    else if (random.one_in(6))
      fuzz_adapters(random);
    else
      fuzz_kv(random);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - began;
    if (spent.count() >= seconds) break;
  }
  std::printf("fuzz_cuda: cases %lld to %lld without a fault\n", static_cast<long long>(start),
              static_cast<long long>(case_number));
}
