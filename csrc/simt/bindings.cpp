// Python's access to the kernels on the executor, by way of the host code that the ops use.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/divisor.h"
#include "common/heuristics.h"
#include "cuda/dispatch.h"
#include "simt/arguments.h"
#include "simt/module.h"

namespace flashinfer_lite::simt {

namespace {

namespace py = pybind11;
using cuda::Device;
using cuda::ElementType;
using cuda::Instance;

using MaskTuple = std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t, int64_t>;

MaskView mask_view(const MaskTuple& x) {
  const auto& [address, dtype, batch, head, row, col] = x;
  const std::pair<const char*, MaskType> types[] = {{"bool", MaskType::kBool},
                                                    {"float64", MaskType::kFloat64},
                                                    {"float32", MaskType::kFloat32},
                                                    {"bfloat16", MaskType::kBFloat16},
                                                    {"float16", MaskType::kFloat16}};
  for (const auto& [name, type] : types) {
    if (dtype == name) {
      return {reinterpret_cast<const void*>(address), type, batch, head, row, col};
    }
  }
  throw std::invalid_argument("mask: no type is named " + dtype);
}

py::dict instance_dict(const Instance& row) {
  py::dict values;
  values["name"] = row.name;
  values["kernel"] = row.kernel;
  values["arch"] = row.arch;
  values["dtype"] = kElementNames[static_cast<int>(row.element)];
  values["partial"] = kElementNames[static_cast<int>(row.partial)];
  values["head_dim"] = row.head_dim;
  values["block_m"] = row.block_m;
  values["block_n"] = row.block_n;
  values["block_k"] = row.block_k;
  values["num_warps"] = row.num_warps;
  values["num_stages"] = row.num_stages;
  values["smem_bytes"] = row.smem_bytes;
  return values;
}

template <class Params, class Pointer, class Class>
void bind_strided(Class& c, const char* name, Strided<Pointer> Params::* member) {
  c.def_property(
      name, [](const Params&) { return py::none(); },
      [member](Params& p, const StridedTuple& x) { p.*member = strided<Pointer>(x); });
}

template <class Params, class Pointer, class Class>
void bind_address(Class& c, const char* name, Pointer Params::* member) {
  c.def_property(
      name, [](const Params&) { return py::none(); },
      [member](Params& p, uintptr_t address) { p.*member = reinterpret_cast<Pointer>(address); });
}

// What the callers of the ops have checked, and the host code relies on.
void check_sizes(const CudaAttentionParams& p) {
  const int64_t sizes[] = {p.batch_size, p.seqlen_q, p.seqlen_kv, p.head_dim, p.head_dim_v};
  if (*std::min_element(std::begin(sizes), std::end(sizes)) < 0) {
    throw std::invalid_argument("expected no size below 0");
  }
  if (p.num_heads_kv < 1 || p.num_heads_q < 0 || p.num_heads_q % p.num_heads_kv != 0) {
    throw std::invalid_argument("num_heads_q: expected a multiple of num_heads_kv");
  }
}

// Each kernel has parameters of its own.
const Instance& instance_of(const std::string& kernel, const std::string& name) {
  const Instance& row = cuda::instance_named(name);
  if (row.kernel != kernel) throw std::invalid_argument(name + " is no row of " + kernel);
  return row;
}

void bind_attention_params(py::module_& m) {
  using P = CudaAttentionParams;
  py::class_<P> c(m, "AttentionParams", py::module_local());
  c.def(py::init<>())
      .def_readwrite("batch_size", &P::batch_size)
      .def_readwrite("seqlen_q", &P::seqlen_q)
      .def_readwrite("seqlen_kv", &P::seqlen_kv)
      .def_readwrite("num_heads_q", &P::num_heads_q)
      .def_readwrite("num_heads_kv", &P::num_heads_kv)
      .def_readwrite("head_dim", &P::head_dim)
      .def_readwrite("head_dim_v", &P::head_dim_v)
      .def_readwrite("window_left", &P::window_left)
      .def_readwrite("window_right", &P::window_right)
      .def_readwrite("softmax_scale", &P::softmax_scale)
      .def_readwrite("softcap", &P::softcap)
      .def_readwrite("unified", &P::unified)
      .def_readwrite("phi", &P::phi)
      .def_readonly("kv_splits", &P::kv_splits)
      .def("set_top_left", [](P& p) { p.alignment = Alignment::kTopLeft; })
      .def("set_mask", [](P& p, const MaskTuple& x) { p.mask = mask_view(x); })
      .def("set_alibi",
           [](P& p, uintptr_t address, int64_t batch, int64_t head) {
             p.alibi = {reinterpret_cast<const float*>(address), batch, head};
           })
      .def("set_kv_start", [](P& p, const LengthsTuple& x) { p.device_kv_start = lengths_view(x); })
      .def("set_seqlens_kv",
           [](P& p, const LengthsTuple& x) { p.device_seqlens_kv = lengths_view(x); })
      .def("set_ragged",
           [](P& p, const LengthsTuple& q, const LengthsTuple& kv, int64_t sequences) {
             p.ragged = {lengths_view(q), lengths_view(kv), sequences};
           })
      .def("set_block_table", &set_block_table<P>);
  bind_strided<P, const void*>(c, "q", &P::q);
  bind_strided<P, const void*>(c, "k", &P::k);
  bind_strided<P, const void*>(c, "v", &P::v);
  bind_strided<P, void*>(c, "out", &P::out);
  bind_address<P, void*>(c, "lse", &P::lse);
  bind_address<P, void*>(c, "out_partial", &P::out_partial);
  bind_address<P, void*>(c, "lse_partial", &P::lse_partial);
  bind_address<P, void*>(c, "row_max_partial", &P::row_max_partial);
  bind_address<P, const float*>(c, "phi_heads", &P::phi_heads);
  bind_address<P, uint32_t*>(c, "tickets", &P::tickets);
  bind_address<P, RowCounters*>(c, "row_counters", &P::row_counters);
}

// Where `out` and `lse` of the base are inputs.
void bind_backward_params(py::module_& m) {
  using P = CudaAttentionBwdParams;
  py::class_<P, CudaAttentionParams> c(m, "AttentionBwdParams", py::module_local());
  c.def(py::init<>())
      .def_readonly("padded_rows", &P::padded_rows)
      .def("set_dmask",
           [](P& p, uintptr_t address, int64_t batch, int64_t head, int64_t row, int64_t col) {
             p.dmask = {reinterpret_cast<float*>(address), batch, head, row, col};
           });
  bind_strided<P, const void*>(c, "dout", &P::dout);
  bind_strided<P, void*>(c, "dq", &P::dq);
  bind_strided<P, void*>(c, "dk", &P::dk);
  bind_strided<P, void*>(c, "dv", &P::dv);
  bind_address<P, const float*>(c, "dlse", &P::dlse);
  bind_address<P, float*>(c, "row_stats", &P::row_stats);
  bind_address<P, float*>(c, "dq_accum", &P::dq_accum);
}

void bind_combine_params(py::module_& m) {
  using P = CombineParams;
  py::class_<P> c(m, "CombineParams", py::module_local());
  c.def(py::init<>())
      .def_readwrite("num_states", &P::num_states)
      .def_readwrite("batch_size", &P::batch_size)
      .def_readwrite("seqlen_q", &P::seqlen_q)
      .def_readwrite("num_heads_q", &P::num_heads_q)
      .def_readwrite("head_dim_v", &P::head_dim_v)
      .def_readwrite("partial_in_accumulator", &P::partial_in_accumulator)
      .def_readwrite("out_partial_state", &P::out_partial_state)
      .def("set_lse_partial",
           [](P& p, uintptr_t address, int64_t state, int64_t batch, int64_t head, int64_t seqlen) {
             p.lse_partial = reinterpret_cast<const void*>(address);
             p.lse_partial_state = state;
             p.lse_partial_batch = batch;
             p.lse_partial_head = head;
             p.lse_partial_seqlen = seqlen;
           });
  bind_strided<P, const void*>(c, "out_partial", &P::out_partial);
  bind_strided<P, void*>(c, "out", &P::out);
  bind_address<P, void*>(c, "lse", &P::lse);
}

void bind_choices(py::module_& m) {
  py::class_<Device>(m, "Device", py::module_local())
      .def(py::init<int, int, int64_t, int64_t, int64_t>(), py::arg("arch"), py::arg("num_sms"),
           py::arg("smem_optin"), py::arg("smem_per_sm"), py::arg("l2_bytes"));
  py::class_<cuda::DecodePlan>(m, "DecodePlan", py::module_local())
      .def_readonly("kv_splits", &cuda::DecodePlan::kv_splits)
      .def_readonly("keys_per_split", &cuda::DecodePlan::keys_per_split)
      .def_property(
          "instance", [](const cuda::DecodePlan& plan) { return plan.instance->name; },
          [](cuda::DecodePlan& plan, const std::string& name) {
            plan.instance = &instance_of("decode", name);
          });
  m.def("choose_attention", [](const std::string& kernel, const std::string& dtype,
                               int64_t head_dim, int64_t head_dim_v, const Device& device) {
    const auto element = element_named(dtype);
    return cuda::choose_attention(kernel, element, head_dim, head_dim_v, device).name;
  });
  m.def("plan_decode", [](const CudaAttentionParams& p, const std::string& dtype,
                          const Device& device, int64_t kv_splits, bool batch_invariant) {
    check_sizes(p);
    return cuda::plan_decode(p, element_named(dtype), device, kv_splits, batch_invariant);
  });
  m.def("cuda_kv_splits", &cuda_kv_splits, py::arg("work"), py::arg("slots"), py::arg("longest"));
  m.def("heads_per_section", &heads_per_section, py::arg("heads"), py::arg("bytes_per_head"),
        py::arg("l2_bytes"));
  m.def("divide", [](int32_t n, int32_t divisor) { return Divisor(divisor).divide(n); });
}

}  // namespace

void bind_kernels(py::module_& m) {
  bind_attention_params(m);
  bind_backward_params(m);
  bind_combine_params(m);
  bind_choices(m);
  m.def("instances", [] {
    py::list rows;
    for (int i = 0; i < cuda::kNumInstances; ++i) rows.append(instance_dict(*cuda::kInstances[i]));
    return rows;
  });
  m.def("attention_fwd", [](CudaAttentionParams& p, const std::string& name, const Device& device) {
    check_sizes(p);
    return cuda::run_attention_fwd(p, instance_of("attention_fwd", name), device, nullptr);
  });
  m.def("backward_memory", [](const CudaAttentionBwdParams& p, const std::string& name) {
    const auto memory = cuda::backward_memory(p, instance_of("attention_bwd", name));
    return std::make_tuple(memory.row_stats, memory.dq_accum);
  });
  m.def("attention_bwd",
        [](CudaAttentionBwdParams& p, const std::string& name, const Device& device) {
          check_sizes(p);
          return cuda::run_attention_bwd(p, instance_of("attention_bwd", name), device, nullptr);
        });
  m.def("num_tickets", &cuda::num_tickets);
  m.def("decode", [](CudaAttentionParams& p, const cuda::DecodePlan& plan) {
    check_sizes(p);
    return cuda::run_decode(p, plan, nullptr);
  });
  m.def("combine", [](const CombineParams& p, const std::string& dtype, const Device& device) {
    return cuda::run_combine(p, element_named(dtype), device, nullptr);
  });
  m.def("combine_of", &cuda::combine_of);
}

}  // namespace flashinfer_lite::simt
