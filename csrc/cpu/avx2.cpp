// The kernels for one instruction set; see kernels.inl and adapters.inl.
#define MEMOS_LANES 8
#include "cpu/adapters.inl"
#include "cpu/kernels.inl"
#include "cpu/rope.inl"
#include "cpu/slab.inl"

namespace memos::cpu {
extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2",     pack_kv,        unpack_kv, gather_rows,
                       write_rows, apply_adapters, fill_slab, turn_keys};
}  // namespace memos::cpu
