// Which instruction set runs: the best one that this processor has, or the one forced by name.
#include <cstring>

#include "cpu/kernels.h"

namespace memos::cpu {

#if defined(MEMOS_X86)
const Kernels kAvx512Bf16 = {"avx512bf16",        kAvx512.pack_kv,    kAvx512.unpack_kv,
                             kAvx512.gather_rows, kAvx512.write_rows, apply_adapters_avx512bf16,
                             kAvx512.fill_slab,   kAvx512.turn_keys};
#endif

namespace {

const Kernels* const kTable[] = {
#if defined(MEMOS_X86)
    &kAvx512Bf16,
    &kAvx512,
    &kAvx2,
#endif
    &kBaseline,
};

const Kernels* current = nullptr;  // written once, when the module is loaded or an ISA is chosen

}  // namespace

const char* why_not(const Kernels& kernels) {
#if defined(MEMOS_X86)
  const bool bf16 = &kernels == &kAvx512Bf16;
  if ((&kernels == &kAvx512 || bf16) && !__builtin_cpu_supports("x86-64-v4"))
    return "this processor lacks x86-64-v4 (AVX-512 F, BW, CD, DQ, VL)";
  if (bf16 && !__builtin_cpu_supports("avx512bf16")) return "this processor lacks AVX-512 BF16";
  if (&kernels == &kAvx2 && !__builtin_cpu_supports("x86-64-v3"))
    return "this processor lacks x86-64-v3 (AVX2, FMA, F16C)";
#endif
  (void)kernels;
  return nullptr;
}

i64 num_isas() { return sizeof(kTable) / sizeof(kTable[0]); }

const Kernels& isa_at(i64 i) { return *kTable[i]; }

const char* choose(const char* name) {
#if defined(MEMOS_X86)
  __builtin_cpu_init();
#endif
  for (const Kernels* kernels : kTable) {
    const bool wanted = *name == 0 || std::strcmp(name, kernels->isa) == 0;
    if (!wanted) continue;
    const char* why = why_not(*kernels);
    if (why == nullptr) {
      current = kernels;
      return nullptr;
    }
    if (*name != 0) return why;
  }
  return "unknown instruction set; baseline, avx2, avx512 or avx512bf16 wanted";
}

const Kernels& chosen() {
  if (current == nullptr) choose("");
  return *current;
}

i64 first_out_of_range(const i64* ids, i64 count, i64 n) {
  for (i64 i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= n) return i;
  return -1;
}

i64 plan_adapters(const i64* slots, i64 T, i64 num_slots, i64* order, i64* starts) {
  std::memset(starts, 0, sizeof(i64) * (num_slots + 1));
  for (i64 t = 0; t < T; ++t) {
    if (slots[t] < -1 || slots[t] >= num_slots) return -1 - t;
    ++starts[slots[t] + 1];
  }
  // starts[s + 1] counts slot s, and starts[0] the tokens without one: from here on it is where
  // the next token of slot s goes, and afterwards where slot s ends.
  i64 next = 0;
  for (i64 s = 0; s < num_slots; ++s) {
    const i64 count = starts[s + 1];
    starts[s + 1] = next;
    next += count;
  }
  for (i64 t = 0; t < T; ++t)
    if (slots[t] >= 0) order[starts[slots[t] + 1]++] = t;
  starts[0] = 0;
  return next;
}

}  // namespace memos::cpu
