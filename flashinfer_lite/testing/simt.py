"""The CUDA kernels on the executor: called like the public functions, with CPU tensors.

`make simt` builds the module. Every call runs the host code that the CUDA ops run, on copies of its
tensors that lie in guarded memory, and fails on whatever the executor finds: races, accesses out of
bounds, reads of what nobody wrote, barriers that not everybody reaches.
"""

import importlib.util
import sysconfig
from functools import cache
from pathlib import Path

import torch

from flashinfer_lite.attention import attention
from flashinfer_lite.testing import simt_varlen
from flashinfer_lite.testing.simt_append import append_kv
from flashinfer_lite.testing.simt_call import BackwardCall, Call, Memory
from flashinfer_lite.testing.simt_flat import FlatLinear

_ROOT = Path(__file__).parents[2]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def module_path(hooks=False):
    folder = "simt-hooks" if hooks else "simt"
    return _ROOT / "build" / folder / f"_simt{sysconfig.get_config_var('EXT_SUFFIX')}"


@cache
def load(hooks=False):
    """The executor's Python module. With `hooks` plain loads and stores are checked too."""
    path = module_path(hooks)
    if not path.exists():
        raise RuntimeError(f"the executor is not built ({path}): run make simt")
    # Python tells two modules of one process apart by the name, and calls PyInit__simt of both.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._simt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def h200():
    """What the driver tells of an H200, as the host code wants it."""
    return load().Device(
        arch=90, num_sms=132, smem_optin=232448, smem_per_sm=233472, l2_bytes=50 * 2**20
    )


class Executor:
    """Runs kernels, each call in a session of its own, and keeps the reports.

    Args:
        instance: name of a row of the instance table; None leaves the choice to the host code.
        device: what the choices are made for, default `h200()`.
        tolerate: do not raise on findings; `reports` has them.
        hooks: use the build that sees plain accesses too.
        options: checks, eager, seed, threads, disabled: see `Session` of the module.

    Attributes:
        reports: one per kernel launch or pair of launches, the newest last.
        rows_checked, rows_recomputed: with a unified maximum, as counted by the newest call.
        tickets: of the newest call, as it left them.
    """

    def __init__(self, instance=None, device=None, *, tolerate=False, hooks=False, **options):
        self.module = load(hooks)
        self.instance = instance
        self.device = device or h200()
        self.tolerate = tolerate
        self.options = {"seed": 1, **options}
        self.reports = []

    @property
    def report(self):
        return self.reports[-1]

    def attention(self, q, k, v, *, return_lse=False, **arguments):
        """`flashinfer_lite.attention` on the executor."""
        call = Call(self, q, k, v, arguments)
        name = self.instance or self.module.choose_attention(
            "attention_fwd", NAMES[q.dtype], q.shape[3], v.shape[3], self.device
        )
        call.run(lambda: self.module.attention_fwd(call.params, name, self.device))
        return call.results(return_lse)

    def attention_varlen(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        *,
        return_lse=False,
        **arguments,
    ):
        """`flashinfer_lite.attention_varlen` on the executor; the longest sequence is ignored."""
        arguments, by_sequence = simt_varlen.split(arguments)
        call = Call(self, *simt_varlen.as_one(q, k, v), arguments)
        simt_varlen.set_ragged(call, q, cu_seqlens_q, cu_seqlens_kv, **by_sequence)
        name = self.instance or self.module.choose_attention(
            "attention_fwd", NAMES[q.dtype], q.shape[2], v.shape[2], self.device
        )
        call.run(lambda: self.module.attention_fwd(call.params, name, self.device))
        out, lse = (x.squeeze(0) for x in call.results(True))
        return (out, lse) if return_lse else out

    def attention_varlen_bwd(
        self,
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_kv,
        *,
        deterministic=False,
        **arguments,
    ):
        """(dq, dk, dv) of `attention_varlen` on the executor."""
        arguments, by_sequence = simt_varlen.split(arguments)
        call = BackwardCall(self, *simt_varlen.as_one(q, k, v), arguments)
        simt_varlen.set_ragged(call, q, cu_seqlens_q, cu_seqlens_kv, **by_sequence)
        name = self.instance or self.module.choose_attention(
            "attention_bwd", NAMES[q.dtype], q.shape[2], v.shape[2], self.device
        )
        call.add_inputs(*simt_varlen.as_one(dout, dlse, out, lse))
        call.add_outputs(*simt_varlen.as_one(q, k, v), False)
        call.add_memory(name, deterministic)
        call.run(lambda: self.module.attention_bwd(call.params, name, self.device))
        return [x.squeeze(0) for x in call.gradients()[:3]]

    def attention_bwd(
        self, dout, dlse, q, k, v, out, lse, *, wants_dmask=False, deterministic=False, **arguments
    ):
        """(dq, dk, dv, dmask) of `attention` on the executor; dmask is None unless wanted."""
        call = BackwardCall(self, q, k, v, arguments)
        name = self.instance or self.module.choose_attention(
            "attention_bwd", NAMES[q.dtype], q.shape[3], v.shape[3], self.device
        )
        call.add_inputs(dout, dlse, out, lse)
        call.add_outputs(q, k, v, wants_dmask and arguments["mask"])
        call.add_memory(name, deterministic)
        call.run(lambda: self.module.attention_bwd(call.params, name, self.device))
        return call.gradients()

    def training(self, q, k, v, *, deterministic=False, return_lse=False, **arguments):
        """`flashinfer_lite.attention` whose backward runs on the executor, the forward natively."""
        mask = arguments.pop("mask", None)
        out, lse = _Training.apply(self, deterministic, arguments, q, k, v, mask)
        return (out, lse) if return_lse else out

    def training_varlen(
        self, q, k, v, *offsets, deterministic=False, return_lse=False, **arguments
    ):
        """The same with `attention_varlen`."""
        names = "cu_seqlens_q", "cu_seqlens_kv"
        offsets = [arguments.pop(name) for name in names] if not offsets else offsets
        out, lse = simt_varlen.Training.apply(self, deterministic, arguments, q, k, v, *offsets)
        return (out, lse) if return_lse else out

    def decode(
        self,
        q,
        k,
        v,
        *,
        kv_splits=0,
        batch_invariant=False,
        return_lse=False,
        launches=1,
        **arguments,
    ):
        """`flashinfer_lite.decode` on the executor, so many times in the same working memory."""
        call = Call(self, q, k, v, arguments)
        plan = self.module.plan_decode(
            call.params, NAMES[q.dtype], self.device, kv_splits, batch_invariant
        )
        if self.instance:
            plan.instance = self.instance
        if plan.kv_splits > 1:
            call.add_partials(plan)

        def launch():
            for _ in range(launches):
                self.module.decode(call.params, plan)
                if plan.kv_splits > 1 and not call.params.unified:
                    merge = self.module.combine_of(call.params)
                    self.module.combine(merge, NAMES[q.dtype], self.device)

        call.run(launch)
        self.plan, self.tickets = plan, call.tickets
        return call.results(return_lse)

    def merge_states(self, outs, lses):
        """`flashinfer_lite.merge_states` on the executor, of stacked states."""
        memory = Memory(self.module)
        num_states, batch_size, seqlen_q, num_heads_q, head_dim_v = outs.shape
        p = self.module.CombineParams()
        p.num_states, p.batch_size, p.seqlen_q = num_states, batch_size, seqlen_q
        p.num_heads_q, p.head_dim_v = num_heads_q, head_dim_v
        p.partial_in_accumulator = False
        outs, lses = memory.copy_of("outs", outs), memory.copy_of("lses", lses)
        p.out_partial = (outs.data_ptr(), outs.stride(1), outs.stride(2), outs.stride(3))
        p.out_partial_state = outs.stride(0)
        p.set_lse_partial(lses.data_ptr(), *(lses.stride(i) for i in (0, 1, 2, 3)))
        out = memory.output("out", outs.shape[1:], outs.dtype)
        lse = memory.output("lse", lses.shape[1:], torch.float32)
        p.out = (out.data_ptr(), *out.stride()[:3])
        p.lse = lse.data_ptr()
        self._run(memory, lambda: self.module.combine(p, NAMES[outs.dtype], self.device))
        return out.clone(), lse.clone()

    def append_kv(self, *tensors, **arguments):
        """`flashinfer_lite.append_kv` on the executor, but of copies of the caches: -> those."""
        memory = Memory(self.module)
        p, k_cache, v_cache = append_kv(self, memory, *tensors, **arguments)
        dtype = NAMES[k_cache.dtype]
        self._run(memory, lambda: self.module.append_kv(p, dtype, self.device))
        return k_cache.clone(), v_cache.clone()

    def flat_linear(
        self,
        x,
        weight,
        bias=None,
        *,
        kernel="flat_gemm",
        splits=0,
        out_row=0,
        out_offset=0,
        launches=1,
    ):
        """`flashinfer_lite.flat_linear` on the executor, its arguments in simt_flat.py.

        Launched so many times on the same memory; `outs` has the results, the last is returned.
        `outside` is what lies between the rows of out, `tickets` what is left of them, or None.
        """
        memory = Memory(self.module)
        call = FlatLinear(self, memory, x, weight, bias, kernel, splits, out_row, out_offset)
        self.plan, self.outs = call.plan, []

        def launch():
            for _ in range(launches):
                self.outs.append(call.launch())
                if not self.tolerate:
                    call.check()

        self._run(memory, launch)
        self.tickets, self.outside = call.tickets, call.out_memory[call.outside]
        return self.outs[-1]

    def _run(self, memory, launch):
        session = self.module.Session(**self.options)
        memory.register(session)
        with session:
            launch()
        self.reports.append(session.report())
        if self.report.errors and not self.tolerate:
            raise AssertionError(self.report.text())


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(ctx, executor, deterministic, arguments, q, k, v, mask):
        out, lse = attention(q, k, v, mask=mask, **arguments, return_lse=True)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.executor, ctx.deterministic, ctx.arguments = executor, deterministic, arguments
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, mask, out, lse = ctx.saved_tensors
        *gradients, dmask = ctx.executor.attention_bwd(
            dout,
            dlse,
            q,
            k,
            v,
            out,
            lse,
            mask=mask,
            wants_dmask=ctx.needs_input_grad[6],
            deterministic=ctx.deterministic,
            **ctx.arguments,
        )
        dmask = None if dmask is None else dmask.view(mask.shape).to(mask.dtype)
        return None, None, None, *gradients, dmask


def instances(kernel=None):
    """Rows of the compiled instance table, as dictionaries."""
    return [row for row in load().instances() if kernel in (None, row["kernel"])]
