// The kernels for one instruction set; see kernels.inl.
#define MEMOS_LANES 4
#include "cpu/kernels.inl"

namespace memos::cpu {
extern const Kernels kBaseline;
const Kernels kBaseline = {"baseline", pack_kv, unpack_kv, gather_rows, write_rows};
}  // namespace memos::cpu
