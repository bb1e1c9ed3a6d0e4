// Random calls of every CPU kernel on every instruction set, under ASan and UBSan.
//
//   fuzz [seconds = 30] [first case = 0]      a case is its number: fuzz 0 1234 runs that one alone
//
// A call may read and write the bytes it was given and no others: each buffer stands between
// poisoned guard bytes that are also compared afterwards (ASan does not see streaming stores), and
// the numbers between rows keep their marks. All instruction sets must leave the same bytes (sums
// of adapters agree with float64 instead, and with themselves in pieces). Packed bytes that no
// encoder wrote decode to some numbers, never to a fault.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "codec/layout.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace {

using namespace memos::cpu;

std::vector<const Kernels*> ready() {
  std::vector<const Kernels*> result;
  for (i64 i = 0; i < num_isas(); ++i)
    if (why_not(isa_at(i)) == nullptr) result.push_back(&isa_at(i));
  return result;
}

// Runs over all M * L tasks in up to three pieces, as threads would.
template <class Kernel>
void run_in_pieces(Random& random, Kernel kernel, const KvCall& call, i64 tasks) {
  i64 cuts[] = {0, random.between(0, tasks), random.between(0, tasks), tasks};
  std::sort(cuts, cuts + 4);
  for (int i = 0; i < 3; ++i) kernel(call, cuts[i], cuts[i + 1]);
}

void fuzz_kv(Random& random) {
  const Case c(random);
  const Kv kv(random, c);
  const i64 tasks = c.M * c.L;
  Buffers source = kv.numbers(), packed = kv.packed();
  for (auto& buffer : source) fill(random, *buffer, c.dtype, c.any_bits);
  const auto before = bytes_of(source);

  std::vector<std::vector<char>> first;
  for (const Kernels* kernels : ready()) {
    for (auto& buffer : packed) std::memset(buffer->data(), 0x5a, buffer->size());
    kv.call(source, packed,
            [&](const KvCall& call) { run_in_pieces(random, kernels->pack_kv, call, tasks); });
    require(bytes_of(source) == before, "pack_kv changed its source");
    if (first.empty()) first = bytes_of(packed);
    require(bytes_of(packed) == first, "pack_kv differs between instruction sets");
  }

  const bool garbage = random.one_in(4);
  if (garbage)
    for (auto& buffer : packed) fill(random, *buffer, kF16, true);
  first.clear();
  for (const Kernels* kernels : ready()) {
    Buffers target = kv.numbers();
    for (auto& buffer : target) std::memset(buffer->data(), 0x77, buffer->size());
    kv.call(target, packed,
            [&](const KvCall& call) { run_in_pieces(random, kernels->unpack_kv, call, tasks); });
    auto after = bytes_of(target);
    for (std::size_t i = 0; i < after.size(); ++i) {
      const auto written = kv.written(static_cast<i64>(i));
      bool kept = true, equal = true;
      for (std::size_t j = 0; j < written.size(); ++j) {
        kept &= written[j] || after[i][j] == 0x77;
        equal &= !written[j] || after[i][j] == before[i][j];
      }
      require(kept, "unpack_kv wrote between the rows");
      const bool moved = i % 2 == 0 && c.turn.half;
      if ((i % 2 ? c.v : c.k).kind == kRaw && !garbage && !moved)
        require(equal, "raw is not the source");
    }
    if (first.empty())
      first = std::move(after);
    else if (!garbage)
      require(after == first, "unpack_kv differs between instruction sets");
  }
}

void fuzz_rows(Random& random) {
  const i64 N = random.between(1, 9), M = random.between(0, N);
  const i64 row_bytes = random.one_in(100) ? random.between(2 << 20, 3 << 20)
                                           : random.pick<i64>({0, 1, 63, random.between(1, 5000)});
  std::vector<i64> ids;
  for (i64 i = 0; i < N; ++i) ids.push_back(i);
  for (i64 i = N - 1; i > 0; --i) std::swap(ids[i], ids[random.between(0, i)]);
  Buffer cache(N * row_bytes, random.between(0, 64)), blocks(M * row_bytes, random.between(0, 64));
  fill(random, cache, kF16, true);
  const auto before = cache.bytes();
  for (const Kernels* kernels : ready()) {
    const i64 cut = random.between(0, M);
    kernels->gather_rows(cache.data(), ids.data(), 0, cut, row_bytes, blocks.data());
    kernels->gather_rows(cache.data(), ids.data(), cut, M, row_bytes, blocks.data());
    for (i64 m = 0; m < M; ++m)
      require(
          !std::memcmp(blocks.data() + m * row_bytes, cache.data() + ids[m] * row_bytes, row_bytes),
          "gather_rows copied a wrong row");
    for (i64 m = 0; m < M; ++m) std::memset(cache.data() + ids[m] * row_bytes, 0, row_bytes);
    kernels->write_rows(cache.data(), ids.data(), 0, cut, row_bytes, blocks.data());
    kernels->write_rows(cache.data(), ids.data(), cut, M, row_bytes, blocks.data());
    require(cache.bytes() == before, "write_rows is not the inverse of gather_rows");
    cache.check_guards();
    blocks.check_guards();
  }
  const i64 bad = random.between(0, N - 1);
  require(first_out_of_range(ids.data(), N, N) == -1, "ids in range were refused");
  ids[bad] = random.pick<i64>({-1, N, INT64_MIN, INT64_MAX});
  require(first_out_of_range(ids.data(), N, N) == bad, "an id out of range was taken");
}

// Adapters of a few modules and slots, a plan, and rows of y and x that are apart.
struct AdapterCase {
  i64 T, slots, modules, module, dtype, item, y_stride, x_stride;
  std::vector<i64> shapes, tokens;  // I, O of each module; the slot of each token
  std::vector<AdapterFactors> rows;
  std::vector<i64> order, starts;
  Buffers factors;

  AdapterCase(Random& random, bool any_bits) {
    T = random.pick<i64>({0, 1, 1, 2, 3, 4, 5, 17, 65, random.between(0, 90)});
    slots = random.one_in(10) ? random.between(1, 70) : random.between(1, 5);
    modules = random.between(1, 3);
    module = random.between(0, modules - 1);
    dtype = random.between(0, 2);
    item = item_bytes(dtype);
    for (i64 i = 0; i < 2 * modules; ++i)
      shapes.push_back(random.one_in(2) ? random.between(1, 300)
                                        : random.pick<i64>({1, 8, 16, 32, 33, 64, 128, 256}));
    for (i64 s = 0; s < slots; ++s)
      for (i64 m = 0; m < modules; ++m) {
        const i64 R = random.one_in(4) ? 0 : random.one_in(12) ? 512 : 8 * random.between(1, 9);
        const float scale = static_cast<float>(random.between(-8, 8)) / 8;
        if (R == 0 || m != module) {
          rows.push_back({0, 0, 0, 0});
          continue;
        }
        for (i64 i = 0; i < 2; ++i) {
          factors.push_back(std::make_unique<Buffer>(R * shapes[2 * m + i] * item, 0));
          fill(random, *factors.back(), dtype, any_bits);
        }
        rows.push_back({factors[factors.size() - 2]->address(), factors.back()->address(), R,
                        static_cast<i64>(bit_cast<std::uint32_t>(scale))});
      }
    const bool one = random.one_in(3);
    const i64 all = random.between(-1, slots - 1);
    for (i64 t = 0; t < T; ++t) tokens.push_back(one ? all : random.between(-1, slots - 1));
    Buffer at(T * 8, 0), from((slots + 1) * 8, 0);
    const i64 n = plan_adapters(tokens.data(), T, slots, reinterpret_cast<i64*>(at.data()),
                                reinterpret_cast<i64*>(from.data()));
    at.check_guards();
    from.check_guards();
    order.assign(reinterpret_cast<i64*>(at.data()), reinterpret_cast<i64*>(at.data()) + n);
    starts.assign(reinterpret_cast<i64*>(from.data()),
                  reinterpret_cast<i64*>(from.data()) + slots + 1);
    y_stride = O() + (random.one_in(2) ? 0 : random.between(0, 20));
    x_stride = I() + (random.one_in(2) ? 0 : random.between(0, 20));
  }

  i64 I() const { return shapes[2 * module]; }
  i64 O() const { return shapes[2 * module + 1]; }
  i64 count(i64 stride, i64 size) const { return T == 0 ? 0 : (T - 1) * stride + size; }
  const AdapterFactors& of(i64 t) const { return rows[tokens[t] * modules + module]; }
  bool has_adapter(i64 t) const { return tokens[t] >= 0 && of(t).R != 0; }

  void check_plan() const {
    i64 i = 0;
    for (i64 s = 0; s < slots; ++s) {
      require(starts[s] == i, "plan_adapters: a slot begins elsewhere");
      for (i64 t = 0; t < T; ++t)
        if (tokens[t] == s) require(order[i++] == t, "plan_adapters: not a stable sort");
    }
    require(starts[slots] == i && static_cast<i64>(order.size()) == i,
            "plan_adapters: not all tokens");
  }
};

float number_at(const char* p, i64 dtype) {
  if (dtype == kF32) return load_as<float>(p);
  const std::uint32_t u = load_as<std::uint16_t>(p);
  return dtype == kBf16 ? bit_cast<float>(u << 16) : fp16_value_any<float>(u);
}

// Whether these are the same numbers. Which of two NaN a sum keeps is not said.
bool same_numbers(const std::vector<char>& a, const std::vector<char>& b, i64 dtype) {
  const i64 item = item_bytes(dtype), size = static_cast<i64>(a.size());
  for (i64 i = 0; i < size; i += item) {
    if (!std::memcmp(a.data() + i, b.data() + i, item)) continue;
    const float x = number_at(a.data() + i, dtype), y = number_at(b.data() + i, dtype);
    if (x == x || y == y) return false;
  }
  return true;
}

// What y[t, o] becomes, and how far a sum in float32 and one rounding may be from it.
void expect_output(const AdapterCase& c, i64 t, i64 o, const char* y, const char* x, float got) {
  const AdapterFactors& of = c.of(t);
  const auto* down = reinterpret_cast<const char*>(of.down);
  const auto* up = reinterpret_cast<const char*>(of.up);
  const double scale = bit_cast<float>(static_cast<std::uint32_t>(of.scale));
  double sum = 0, size = 0;
  for (i64 r = 0; r < of.R; ++r) {
    double dot = 0, magnitude = 0;
    for (i64 i = 0; i < c.I(); ++i) {
      const double product =
          static_cast<double>(number_at(x + (t * c.x_stride + i) * c.item, c.dtype)) *
          number_at(down + (r * c.I() + i) * c.item, c.dtype);
      dot += product;
      magnitude += std::abs(product);
    }
    const double b = number_at(up + (r * c.O() + o) * c.item, c.dtype);
    sum += dot * b;
    size += magnitude * std::abs(b);
  }
  const double before = number_at(y + (t * c.y_stride + o) * c.item, c.dtype);
  const double want = before + scale * sum;
  const double eps = c.dtype == kF32 ? 0x1p-24 : c.dtype == kF16 ? 0x1p-11 : 0x1p-8;
  const double off = (c.I() + of.R + 2) * 0x1p-24 * (std::abs(scale) * size + std::abs(before));
  if (c.dtype == kF16 && std::abs(want) + off >= 65504) return;  // may be infinite
  require(std::abs(got - want) <= off + eps * (std::abs(want) + off) + 1e-7,
          "apply_adapters is wrong");
}

// Bad ids are named, and a plan that leads outside of the batch changes nothing.
void refuse_adapters(Random& random, AdapterCase& c, AdapterCall call, AdapterPlan plan,
                     Buffer& y) {
  std::vector<i64> at(c.T), from(c.slots + 1);
  const i64 t = random.between(0, c.T - 1);
  const i64 slot = c.tokens[t];
  c.tokens[t] = random.pick<i64>({-2, c.slots, INT64_MIN, INT64_MAX});
  require(plan_adapters(c.tokens.data(), c.T, c.slots, at.data(), from.data()) == -1 - t,
          "plan_adapters took a bad slot");
  c.tokens[t] = slot;
  if (c.order.empty()) return;
  const i64 n = static_cast<i64>(c.order.size()), i = random.between(0, n - 1);
  const i64 token = c.order[i];
  const auto before = y.bytes();
  c.order[i] = random.pick<i64>({-1, c.T, INT64_MIN, INT64_MAX});
  call.plan = reinterpret_cast<i64>(&plan);
  for (const Kernels* kernels : ready())
    require(kernels->apply_adapters(call, 0, n) == i && y.bytes() == before,
            "apply_adapters took a token outside of the batch");
  c.order[i] = token;
}

void fuzz_adapters(Random& random) {
  const bool any_bits = random.one_in(4);
  AdapterCase c(random, any_bits);
  c.check_plan();
  const i64 n = static_cast<i64>(c.order.size());
  Buffer x(c.count(c.x_stride, c.I()) * c.item, c.item * random.between(0, 31));
  Buffer y(c.count(c.y_stride, c.O()) * c.item, c.item * random.between(0, 31));
  fill(random, x, c.dtype, any_bits);
  fill(random, y, c.dtype, any_bits);
  const auto x_before = x.bytes(), y_before = y.bytes();
  const AdapterTable table{reinterpret_cast<i64>(c.rows.data()),
                           reinterpret_cast<i64>(c.shapes.data()), c.slots, c.modules, c.dtype};
  const AdapterPlan plan{reinterpret_cast<i64>(c.order.data()),
                         reinterpret_cast<i64>(c.starts.data()), c.T};
  const AdapterCall call{reinterpret_cast<i64>(&table),
                         c.module,
                         reinterpret_cast<i64>(&plan),
                         y.address(),
                         c.y_stride,
                         x.address(),
                         c.x_stride};
  if (c.T > 0) refuse_adapters(random, c, call, plan, y);
  for (const Kernels* kernels : ready()) {
    const auto run = [&](i64 first, i64 last) {
      require(kernels->apply_adapters(call, first, last) == -1, "apply_adapters refused its plan");
    };
    run(0, n);
    const auto whole = y.bytes();
    std::copy(y_before.begin(), y_before.end(), y.data());
    i64 cuts[] = {0, random.between(0, n), random.between(0, n), n};
    std::sort(cuts, cuts + 4);
    for (int i = 0; i < 3; ++i) run(cuts[i], cuts[i + 1]);
    require(same_numbers(y.bytes(), whole, c.dtype), "apply_adapters differs in pieces");
    require(x.bytes() == x_before, "apply_adapters changed x");
    x.check_guards();
    y.check_guards();
    for (auto& buffer : c.factors) buffer->check_guards();

    std::vector<char> written(y.size());
    for (i64 t = 0; t < c.T; ++t)
      if (c.has_adapter(t))
        std::fill_n(written.begin() + t * c.y_stride * c.item, c.O() * c.item, 1);
    for (i64 j = 0; j < y.size(); ++j)
      require(written[j] || whole[j] == y_before[j], "apply_adapters wrote beside its rows");
    for (int i = 0; i < 4 && c.T > 0 && !any_bits; ++i) {
      const i64 t = random.between(0, c.T - 1), o = random.between(0, c.O() - 1);
      if (c.has_adapter(t))
        expect_output(c, t, o, y_before.data(), x.data(),
                      number_at(y.data() + (t * c.y_stride + o) * c.item, c.dtype));
    }
    std::copy(y_before.begin(), y_before.end(), y.data());
  }
}

// Jobs one after another with gaps between them; none but their ranges may change.
void fuzz_slabs(Random& random) {
  const bool any_bits = random.one_in(4);
  const i64 dtype = random.between(0, 2), item = item_bytes(dtype);
  std::vector<SlabJob> jobs;
  std::vector<char> written;
  i64 from = 0;
  for (i64 n = random.between(1, 5); n > 0; --n) {
    SlabJob job;
    job.dtype = random.between(0, 2);
    job.rows = random.one_in(3) ? 16 * random.between(1, 8) : random.between(1, 150);
    job.columns = random.one_in(3) ? 8 * random.between(1, 9) : random.between(1, 90);
    job.transposed = random.between(0, 1);
    job.height = (job.transposed ? job.columns : job.rows) + random.between(0, 8);
    job.from = from + random.between(0, 3);
    from = job.from + job.rows * job.columns * item_bytes(job.dtype);
    job.to = static_cast<i64>(written.size()) + random.between(0, 3);
    job.end = job.to + job.height * (job.transposed ? job.rows : job.columns) * item +
              random.between(0, 40);
    written.resize(job.to);
    written.resize(job.end, 1);
    jobs.push_back(job);
  }
  written.resize(written.size() + random.between(0, 3));
  Buffer source(from, random.between(0, 31));
  fill(random, source, kF32, any_bits);
  for (const SlabJob& job : jobs) {  // numbers of its own dtype
    Buffer numbers(job.rows * job.columns * item_bytes(job.dtype), 0);
    fill(random, numbers, job.dtype, any_bits);
    std::memcpy(source.data() + job.from, numbers.data(), numbers.size());
  }
  const auto source_before = source.bytes();
  std::vector<char> wanted;
  i64 wanted_bad = -1;
  for (const Kernels* kernels : ready()) {
    Buffer slab(static_cast<i64>(written.size()), random.between(0, 63));
    std::memset(slab.data(), 0x5a, slab.size());
    const i64 n = static_cast<i64>(jobs.size()), cut = random.between(0, n);
    const i64 bad = kernels->fill_slab(source.data(), slab.data(), jobs.data(), 0, cut, dtype) +
                    kernels->fill_slab(source.data(), slab.data(), jobs.data(), cut, n, dtype);
    slab.check_guards();
    for (i64 j = 0; j < slab.size(); ++j)
      require(written[j] || slab.data()[j] == 0x5a, "fill_slab wrote beside its ranges");
    require(wanted_bad < 0 || bad == wanted_bad, "fill_slab counts differ");
    require(wanted.empty() || bad || slab.bytes() == wanted, "fill_slab differs");
    require(any_bits || bad == 0, "fill_slab counted finite numbers");
    wanted_bad = bad;
    wanted = slab.bytes();
  }
  require(source.bytes() == source_before, "fill_slab changed its source");
  source.check_guards();
}

// Matrices at any byte of a source -> one behind the other in a slab, with padding.
void fuzz_slab(Random& random) {
  const i64 dtype = random.between(0, 2), item = item_bytes(dtype);
  const bool any_bits = random.one_in(3);
  std::vector<SlabJob> jobs;
  i64 from = 0, to = 0;
  for (i64 i = random.between(0, 4); i > 0; --i) {
    const i64 rows = random.pick<i64>({1, 8, 16, 17, random.between(1, 200)});
    const i64 columns = random.pick<i64>({1, 8, 16, 33, random.between(1, 200)});
    const i64 kind = random.between(0, 2), transposed = random.between(0, 1);
    from += random.between(0, 5);
    const i64 height = (transposed ? columns : rows) + random.between(0, 9);
    const i64 end = to + height * (transposed ? rows : columns) * item + random.between(0, 300);
    jobs.push_back({from, kind, rows, columns, transposed, to, height, end});
    from += rows * columns * item_bytes(kind);
    to = end + random.between(0, 40);
  }
  const i64 n = static_cast<i64>(jobs.size());
  Buffer source(from, random.between(0, 64)), slab(to, random.between(0, 7) * 4);
  for (const SlabJob& job : jobs) {
    Buffer numbers(job.rows * job.columns * item_bytes(job.dtype), 0);
    fill(random, numbers, job.dtype, any_bits);
    std::memcpy(source.data() + job.from, numbers.data(), numbers.size());
  }
  const auto before = source.bytes();
  std::vector<char> first;
  i64 first_bad = 0;
  for (const Kernels* kernels : ready()) {
    std::memset(slab.data(), 0x77, slab.size());
    const i64 cut = random.between(0, n);
    const i64 bad = kernels->fill_slab(source.data(), slab.data(), jobs.data(), 0, cut, dtype) +
                    kernels->fill_slab(source.data(), slab.data(), jobs.data(), cut, n, dtype);
    source.check_guards();
    slab.check_guards();
    require(source.bytes() == before, "fill_slab changed its source");
    if (first.empty()) first = slab.bytes(), first_bad = bad;
    require(bad == first_bad, "fill_slab counts other numbers");
    i64 at = 0, not_finite = 0;
    const auto gap = [&](i64 end, char mark) {
      for (; at < end; ++at) require(slab.data()[at] == mark, "fill_slab: a gap is not as it was");
    };
    for (const SlabJob& job : jobs) {
      gap(job.to, 0x77);
      for (i64 i = 0; i < job.rows * job.columns; ++i, at += item) {
        const i64 r = job.transposed ? i % job.rows : i / job.columns;
        const i64 c = job.transposed ? i / job.rows : i % job.columns;
        const float want = number_at(
            source.data() + job.from + (r * job.columns + c) * item_bytes(job.dtype), job.dtype);
        const float got = number_at(slab.data() + at, dtype), here = number_at(&first[at], dtype);
        not_finite += !std::isfinite(got);
        require(got == here || (got != got && here != here), "fill_slab differs");
        if (want != want || got != got || std::isinf(got)) {
          require(want != want ? got != got : std::abs(want) > 65503 || std::isinf(want),
                  "fill_slab: not the number");
          continue;
        }
        const double eps = dtype == kF32 ? 0 : dtype == kF16 ? 0x1p-11 : 0x1p-8;
        require(std::abs(static_cast<double>(got) - want) <= eps * std::abs(want) + 0x1p-25,
                "fill_slab: not the nearest number");
      }
      gap(job.end, 0);
    }
    require(not_finite == bad, "fill_slab counts wrong");
  }
}

}  // namespace

extern "C" void __ubsan_on_report() { name_case(); }

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 30;
  const i64 start = argc > 2 ? std::atoll(argv[2]) : 0;
  __sanitizer_set_death_callback(name_case);
  require(choose("abacus") != nullptr, "an unknown instruction set was taken");
  require(choose("") == nullptr, "no instruction set runs here");
  const auto began = std::chrono::steady_clock::now();
  for (case_number = start;; ++case_number) {
    Random random{static_cast<std::uint64_t>(case_number) * 0x2545f4914f6cdd1du};
    if (random.one_in(4))
      fuzz_rows(random);
    else if (random.one_in(4))
      fuzz_slab(random);
    else if (random.one_in(3))
      fuzz_adapters(random);
    else if (random.one_in(4))
      fuzz_slabs(random);
    else
      fuzz_kv(random);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - began;
    if (spent.count() >= seconds) break;
  }
  std::string names;
  for (const Kernels* kernels : ready()) names += std::string(" ") + kernels->isa;
  std::printf("fuzz: cases %lld to %lld without a fault on%s\n", static_cast<long long>(start),
              static_cast<long long>(case_number), names.c_str());
}
