// The seam to Python of the CUDA kernels: cast, call, translate. Nothing touches the driver before
// a function is called, so the module loads on a machine without one.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/kernels.h"

namespace py = pybind11;
using memos::i64;
using memos::cuda::Stream;

namespace {

const memos::KvCall& call_at(i64 address) {
  return *reinterpret_cast<const memos::KvCall*>(address);
}

// "" when kernels can run here, else CUDA's words for why not.
std::string why_not() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be blamed for it
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  }
  return count ? "" : "no CUDA device is there";
}

// The compute capability of a device, 90 for 9.0.
int capability(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  memos::cuda::check_launch("cudaDeviceGetAttribute");
  return 10 * major + minor;
}

void set_device(int device) {
  cudaSetDevice(device);
  memos::cuda::check_launch("cudaSetDevice");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of memos. Private: call memos.kernels instead.";
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.attr("KV_CALL_FIELDS") = memos::kKvCallFields;
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.attr("ARCHITECTURES") = MEMOS_CUDA_ARCHITECTURES;
  m.def("why_not", &why_not, nogil);
  m.def("capability", &capability, nogil);
  m.def("set_device", &set_device, nogil);
  m.def("pack_kv", [](i64 call, Stream s) { memos::cuda::pack_kv(call_at(call), s); }, nogil);
  m.def("unpack_kv", [](i64 call, Stream s) { memos::cuda::unpack_kv(call_at(call), s); }, nogil);
  m.def("gather_rows", &memos::cuda::gather_rows, nogil);
  m.def("write_rows", &memos::cuda::write_rows, nogil);
  m.attr("TRANSFER_CALL_FIELDS") = memos::cuda::kTransferCallFields;
  m.attr("ADAPTER_CALL_FIELDS") = memos::cuda::kAdapterCallFields;
  m.def(
      "move_blocks",
      [](i64 call, Stream s) {
        memos::cuda::move_blocks(*reinterpret_cast<const memos::cuda::TransferCall*>(call), s);
      },
      nogil);
  m.def(
      "apply_adapters",
      [](i64 call, Stream s) {
        memos::cuda::apply_adapters(*reinterpret_cast<const memos::cuda::AdapterCall*>(call), s);
      },
      nogil);
  m.attr("TURN_CALL_FIELDS") = memos::cuda::kTurnCallFields;
  m.def(
      "turn_keys",
      [](i64 call, Stream s) {
        memos::cuda::turn_keys(*reinterpret_cast<const memos::cuda::TurnCall*>(call), s);
      },
      nogil);
}
