// Python's access to append_kv on the executor, by way of the host code that the op uses.
#include <algorithm>

#include "cuda/dispatch.h"
#include "simt/arguments.h"
#include "simt/module.h"

namespace flashinfer_lite::simt {

namespace py = pybind11;

void bind_append_kv(py::module_& m) {
  using P = CudaAppendKvParams;
  py::class_<P>(m, "AppendKvParams", py::module_local())
      .def(py::init<>())
      .def("set_sizes",
           [](P& p, int64_t batch, int64_t seqlen, int64_t heads, int64_t dim, int64_t dim_v,
              int64_t capacity) {
             if (std::min({batch, seqlen, heads, dim, dim_v, capacity}) < 0) {
               throw std::invalid_argument("a size is below 0");
             }
             p.batch_size = batch;
             p.seqlen_new = seqlen;
             p.num_heads_kv = heads;
             p.head_dim = dim;
             p.head_dim_v = dim_v;
             p.capacity = capacity;
           })
      .def("set_new",
           [](P& p, const StridedTuple& k, const StridedTuple& v) {
             p.k = strided<const void*>(k);
             p.v = strided<const void*>(v);
           })
      .def("set_caches",
           [](P& p, const StridedTuple& k, const StridedTuple& v) {
             p.k_cache = strided<void*>(k);
             p.v_cache = strided<void*>(v);
           })
      .def("set_seqlens_kv",
           [](P& p, const LengthsTuple& x) { p.device_seqlens_kv = lengths_view(x); })
      .def("set_block_table", &set_block_table<P>)
      .def("set_rotary", [](P& p, uintptr_t cos, uintptr_t sin, int64_t cos_row, int64_t sin_row,
                            int64_t positions, int64_t dim, bool in_accumulator, bool interleaved) {
        p.rotary = {reinterpret_cast<const void*>(cos),
                    reinterpret_cast<const void*>(sin),
                    cos_row,
                    sin_row,
                    positions,
                    dim,
                    in_accumulator,
                    interleaved};
      });
  m.def("append_kv", [](const P& p, const std::string& dtype, const cuda::Device& device) {
    return cuda::run_append_kv(p, element_named(dtype), device, nullptr);
  });
}

}  // namespace flashinfer_lite::simt
