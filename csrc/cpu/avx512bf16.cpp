// AVX-512 with BF16 instructions; see adapters.inl. The other kernels are those of avx512.cpp.
#define MEMOS_LANES 16
#include "cpu/adapters.inl"

namespace memos::cpu {
i64 apply_adapters_avx512bf16(const AdapterCall& call, i64 first, i64 last) {
  return apply_adapters(call, first, last);
}
}  // namespace memos::cpu
