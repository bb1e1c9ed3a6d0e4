// The seam to Python: cast, call, translate. Addresses and counts only; every kernel runs without
// the GIL. memos/kernels checks shapes and keeps the tensors alive.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace py = pybind11;
using memos::cpu::i64;
using memos::cpu::KvCall;

namespace {

const i64* ids_at(i64 address) { return reinterpret_cast<const i64*>(address); }
char* bytes_at(i64 address) { return reinterpret_cast<char*>(address); }
const KvCall& call_at(i64 address) { return *reinterpret_cast<const KvCall*>(address); }

void choose_isa(const std::string& name) {
  if (const char* why = memos::cpu::choose(name.c_str())) throw std::invalid_argument(why);
}

py::dict isas() {
  py::dict result;
  for (i64 i = 0; i < memos::cpu::num_isas(); ++i) {
    const auto& kernels = memos::cpu::isa_at(i);
    const char* why = memos::cpu::why_not(kernels);
    result[kernels.isa] = why == nullptr ? "ready" : why;
  }
  return result;
}

void cpu_pack_kv(i64 call, i64 first, i64 last) {
  memos::cpu::chosen().pack_kv(call_at(call), first, last);
}
void cpu_unpack_kv(i64 call, i64 first, i64 last) {
  memos::cpu::chosen().unpack_kv(call_at(call), first, last);
}
void cpu_gather_rows(i64 src, i64 ids, i64 first, i64 last, i64 row_bytes, i64 dst) {
  memos::cpu::chosen().gather_rows(bytes_at(src), ids_at(ids), first, last, row_bytes,
                                   bytes_at(dst));
}
void cpu_write_rows(i64 dst, i64 ids, i64 first, i64 last, i64 row_bytes, i64 src) {
  memos::cpu::chosen().write_rows(bytes_at(dst), ids_at(ids), first, last, row_bytes,
                                  bytes_at(src));
}
i64 cpu_plan_adapters(i64 slots, i64 T, i64 num_slots, i64 order, i64 starts) {
  return memos::cpu::plan_adapters(ids_at(slots), T, num_slots, reinterpret_cast<i64*>(order),
                                   reinterpret_cast<i64*>(starts));
}
i64 cpu_apply_adapters(i64 table, i64 module, i64 plan, i64 y, i64 y_stride, i64 x, i64 x_stride,
                       i64 first, i64 last) {
  return memos::cpu::chosen().apply_adapters({table, module, plan, y, y_stride, x, x_stride}, first,
                                             last);
}
i64 cpu_fill_slab(i64 source, i64 slab, i64 jobs, i64 first, i64 last, i64 dtype) {
  return memos::cpu::chosen().fill_slab(bytes_at(source), bytes_at(slab),
                                        reinterpret_cast<const memos::cpu::SlabJob*>(jobs), first,
                                        last, dtype);
}
void cpu_turn_keys(i64 call, i64 first, i64 last) {
  memos::cpu::chosen().turn_keys(*reinterpret_cast<const memos::cpu::TurnCall*>(call), first, last);
}
i64 first_out_of_range(i64 ids, i64 count, i64 n) {
  return memos::cpu::first_out_of_range(ids_at(ids), count, n);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of memos. Private: call memos.kernels instead.";
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("isa", [] { return memos::cpu::chosen().isa; });
  m.def("isas", &isas);
  m.def("choose_isa", &choose_isa);
  m.attr("KV_CALL_FIELDS") = memos::cpu::kKvCallFields;
  m.def("cpu_pack_kv", &cpu_pack_kv, nogil);
  m.def("cpu_unpack_kv", &cpu_unpack_kv, nogil);
  m.def("cpu_gather_rows", &cpu_gather_rows, nogil);
  m.def("cpu_write_rows", &cpu_write_rows, nogil);
  m.def("cpu_plan_adapters", &cpu_plan_adapters, nogil);
  m.def("cpu_apply_adapters", &cpu_apply_adapters, nogil);
  m.def("cpu_fill_slab", &cpu_fill_slab, nogil);
  m.def("cpu_turn_keys", &cpu_turn_keys, nogil);
  m.def("first_out_of_range", &first_out_of_range, nogil);
}
