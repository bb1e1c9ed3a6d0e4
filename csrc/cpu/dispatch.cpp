// Which instruction set runs: the best one that this processor has, or the one forced by name.
#include <cstring>

#include "cpu/kernels.h"

namespace memos::cpu {

namespace {

const Kernels* const kTable[] = {
#if defined(MEMOS_X86)
    &kAvx512,
    &kAvx2,
#endif
    &kBaseline,
};

const Kernels* current = nullptr;  // written once, when the module is loaded or an ISA is chosen

}  // namespace

const char* why_not(const Kernels& kernels) {
#if defined(MEMOS_X86)
  if (&kernels == &kAvx512 && !__builtin_cpu_supports("x86-64-v4"))
    return "this processor lacks x86-64-v4 (AVX-512 F, BW, CD, DQ, VL)";
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
  return "unknown instruction set; baseline, avx2 or avx512 wanted";
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

}  // namespace memos::cpu
