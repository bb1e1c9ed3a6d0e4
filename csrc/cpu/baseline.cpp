// The kernels for one instruction set; see kernels.inl and adapters.inl.
#define MEMOS_LANES 4
#include "cpu/adapters.inl"
#include "cpu/kernels.inl"
#include "cpu/rope.inl"
#include "cpu/slab.inl"

namespace memos::cpu {
extern const Kernels kBaseline;
const Kernels kBaseline = {"baseline", pack_kv,        unpack_kv, gather_rows,
                           write_rows, apply_adapters, fill_slab, turn_keys};
}  // namespace memos::cpu
