#include "ops/backward_cpu.h"

#include "common/heuristics.h"

namespace flashinfer_lite {
namespace {

// Five products per tile: 2.5 times the forward.
double backward_work(const AttentionBwdParams& p) { return 2.5 * forward_work(p); }

}  // namespace

void run_backward(const Tensor& like, const cpu::Kernels& kernels,
                  std::vector<AttentionBwdParams> problems, bool serial) {
  double work = 0;
  if (!serial) {
    for (const AttentionBwdParams& p : problems) work += backward_work(p);
  }
  const double threads = double(torch::stable::get_num_threads());
  int64_t shared = 0;  // elements of dQ that tasks share
  for (AttentionBwdParams& p : problems) {
    p.keys_per_part = cpu_backward_keys_per_part(p.num_heads_kv, p.seqlen_kv,
                                                 p.dq_accum_elements() / p.batch_size);
    // Fused unless one such task would be more than a thread's share of everything.
    const double tasks = double(p.key_parts() * p.batch_size * p.num_heads_kv);
    const bool fused = work < kSerialWork || backward_work(p) * threads <= work * tasks;
    p.pass = fused ? BwdPass::kFused : BwdPass::kKeys;
    if (fused && p.key_parts() > 1) shared += p.key_parts() * p.dq_accum_elements();
  }
  Tensor dq_accum = new_tensor(like, {shared}, accumulator_type(like.scalar_type()));
  char* next = static_cast<char*>(dq_accum.data_ptr());
  for (AttentionBwdParams& p : problems) {
    if (p.pass != BwdPass::kFused || p.key_parts() == 1) continue;
    p.dq_accum = next;
    next += p.key_parts() * p.dq_accum_elements() * dq_accum.element_size();
  }
  run_tasks(kernels.attention_bwd, problems, work);

  std::vector<AttentionBwdParams> rest;
  for (AttentionBwdParams& p : problems) {
    if (p.pass == BwdPass::kFused && p.key_parts() == 1) continue;
    p.pass = p.pass == BwdPass::kFused ? BwdPass::kSum : BwdPass::kQueries;
    rest.push_back(p);
  }
  run_tasks(kernels.attention_bwd, rest, work);
}

}  // namespace flashinfer_lite
