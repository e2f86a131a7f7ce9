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

from flashinfer_lite import _check
from flashinfer_lite.attention import attention
from flashinfer_lite.testing import simt_varlen
from flashinfer_lite.testing.simt_append import append_kv
from flashinfer_lite.testing.simt_flat import FlatLinear

_ROOT = Path(__file__).parents[2]
_CAUSAL_TOP_LEFT = 2
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
        call = _Call(self, q, k, v, arguments)
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
        call = _Call(self, *simt_varlen.as_one(q, k, v), arguments)
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
        call = _BackwardCall(self, *simt_varlen.as_one(q, k, v), arguments)
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
        call = _BackwardCall(self, q, k, v, arguments)
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
        call = _Call(self, q, k, v, arguments)
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
        memory = _Memory(self.module)
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
        memory = _Memory(self.module)
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
        memory = _Memory(self.module)
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


class _Memory:
    """Tensors in guarded memory, and what the session is told of them."""

    def __init__(self, module):
        self.module = module
        self.buffers = []  # (address, nbytes, name, writable, initialised)
        self.guards = []

    def guarded(self, name, nbytes, dtype, writable, initialised=None):
        guard = self.module.GuardedBuffer(max(nbytes, 1))
        self.guards.append(guard)
        initialised = not writable if initialised is None else initialised
        self.buffers.append((guard.address, nbytes, name, writable, initialised))
        return torch.frombuffer(guard, dtype=torch.uint8, count=nbytes).view(dtype)

    def output(self, name, shape, dtype):
        """Contiguous and NaN all over."""
        size = torch.Size(shape).numel()
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return self.guarded(name, size * dtype.itemsize, dtype, True).view(shape)

    def counters(self, name, count, dtype):
        """Integers at 0 that the kernel finds there."""
        return self.guarded(name, count * dtype.itemsize, dtype, True, True).zero_()

    def tickets(self, count):
        """int32 counters at 0, as `cuda_tickets` of csrc/ops gives them to an op."""
        return self.counters("tickets", count, torch.int32)

    def copy_of(self, name, x, writable=False):
        """The same strides and alignment, in memory that ends where x ends."""
        if x is None or x.numel() == 0:
            return x
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        lead = x.storage_offset() * x.element_size() % 256 // x.element_size()
        memory = self.guarded(name, (lead + span) * x.element_size(), x.dtype, writable, True)
        memory[lead:] = torch.as_strided(x.detach(), (span,), (1,))
        return torch.as_strided(memory, x.shape, x.stride(), lead)

    def in_place(self, name, x):
        """The tensor itself, where a copy of what it spans would not fit in memory."""
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        self.buffers.append((x.data_ptr(), span * x.element_size(), name, False, True))
        return x

    def register(self, session):
        for buffer in self.buffers:
            session.register_buffer(*buffer)


class _Call:
    """One call of attention or decode: parameters, guarded tensors, results."""

    LARGE = 2**28  # elements; beyond, tensors are used where they are

    def __init__(self, executor, q, k, v, arguments):
        self._set_inputs(executor, executor.module.AttentionParams(), q, k, v, arguments)
        p = self.params
        self.out = self.memory.output("out", (*self.rows, v.shape[3]), q.dtype)
        self.lse = self.memory.output("lse", (q.shape[0], q.shape[2], q.shape[1]), torch.float32)
        p.out = (self.out.data_ptr(), *self.out.stride()[:3])
        p.lse = self.lse.data_ptr()

    def _set_inputs(self, executor, params, q, k, v, arguments):
        self.executor = executor
        self.memory = _Memory(executor.module)
        self.params = p = params
        block_table = arguments.pop("block_table", None)
        _check.qkv(q, k, v, paged=block_table is not None)
        p.batch_size, p.seqlen_q, p.num_heads_q, p.head_dim = q.shape
        p.seqlen_kv, p.num_heads_kv, p.head_dim_v = v.shape[1:]
        if block_table is not None:
            self._set_block_table(q, k, block_table)
        self.rows = (q.shape[0], q.shape[1], q.shape[2])
        for name, x in (("q", q), ("k", k), ("v", v)):
            x = self._placed(name, x)
            setattr(p, name, (x.data_ptr(), *x.stride()[:3]))
        self.tickets = None
        self._set_softmax(q, arguments.pop("softmax", "auto"), arguments.pop("phi", None))
        self._set_scores(q, p.seqlen_kv, **arguments)

    def _placed(self, name, x):
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        if x.numel() and span > self.LARGE:
            return self.memory.in_place(name, x)
        return self.memory.copy_of(name, x)

    def _set_softmax(self, q, softmax, phi):
        p = self.params
        phi, phi_heads = _check.unified(softmax, phi, q)
        p.unified = phi is not None or phi_heads is not None
        self.row_counters = self.memory.counters("row counters", 2, torch.int64)
        p.row_counters = self.row_counters.data_ptr()
        if phi is not None:
            p.phi = phi
        if phi_heads is not None:
            p.phi_heads = self.memory.copy_of("phi_heads", phi_heads).data_ptr()

    def _set_block_table(self, q, k, block_table):
        _check.block_table(block_table, q, k, q.shape[0])
        num_pages, page_size = k.shape[:2]
        self.params.seqlen_kv = block_table.shape[1] * page_size
        x = self.memory.copy_of("block_table", block_table)
        view = x.data_ptr(), x.dtype == torch.int64, *x.stride()
        self.params.set_block_table(view, num_pages, page_size)

    def _set_scores(
        self,
        q,
        seqlen_kv,
        causal=False,
        window=(-1, -1),
        softmax_scale=None,
        softcap=None,
        mask=None,
        alibi_slopes=None,
        kv_start=None,
        seqlens_kv=None,
    ):
        p = self.params
        scale, softcap, causal, left, right = _check.scores(
            q, causal, window, softmax_scale, softcap
        )
        p.softmax_scale, p.softcap = scale, softcap
        widest = q.shape[1] + seqlen_kv
        p.window_left = min(left, widest)
        p.window_right = 0 if causal else min(right, widest)
        if causal == _CAUSAL_TOP_LEFT:
            p.set_top_left()
        mask = _check.mask(mask, q, seqlen_kv)
        if mask is not None:
            x = self._placed("mask", mask)
            steps = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
            p.set_mask((x.data_ptr(), str(x.dtype)[6:], *steps))
        self.set_alibi(alibi_slopes, q, q.shape[0])
        for name, setter in (("kv_start", p.set_kv_start), ("seqlens_kv", p.set_seqlens_kv)):
            x = {"kv_start": kv_start, "seqlens_kv": seqlens_kv}[name]
            if x is not None:
                _check.lengths(name, x, q, q.shape[0])
                x = self.memory.copy_of(name, x)
                setter((x.data_ptr(), x.dtype == torch.int64, x.stride(0)))

    def set_alibi(self, slopes, q, batch_size):
        if slopes is None:
            return
        _check.alibi_slopes(slopes, q, batch_size)
        x = self.memory.copy_of("alibi_slopes", slopes)
        strides = x.stride() if x.dim() == 2 else (0, x.stride(0))
        self.params.set_alibi(x.data_ptr(), *strides)

    def add_partials(self, plan):
        p, kv_splits = self.params, plan.kv_splits
        shape = (kv_splits, *self.rows, p.head_dim_v)
        p.out_partial = self.memory.output("out_partial", shape, torch.float32).data_ptr()
        batch_size, seqlen_q, num_heads_q = self.rows
        shape = (kv_splits, batch_size, num_heads_q, seqlen_q)
        p.lse_partial = self.memory.output("lse_partial", shape, torch.float32).data_ptr()
        if not p.unified:
            return
        p.row_max_partial = self.memory.output("row_max_partial", shape, torch.float32).data_ptr()
        self.tickets = self.memory.tickets(self.executor.module.num_tickets(p, plan))
        p.tickets = self.tickets.data_ptr()

    def run(self, launch):
        self.executor._run(self.memory, launch)
        self.executor.rows_checked, self.executor.rows_recomputed = self.row_counters.tolist()

    def results(self, return_lse):
        out, lse = self.out.clone(), self.lse.clone()
        return (out, lse) if return_lse else out


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


class _BackwardCall(_Call):
    """One call of attention_bwd."""

    def __init__(self, executor, q, k, v, arguments):
        params = executor.module.AttentionBwdParams()
        self._set_inputs(executor, params, q, k, v, arguments)
        self.dmask = None

    def add_inputs(self, dout, dlse, out, lse):
        p = self.params
        for name, x in (("dout", dout), ("out", out)):
            x = self._placed(name, x)
            setattr(p, name, (x.data_ptr(), *x.stride()[:3]))
        p.lse = self.memory.copy_of("lse", lse).data_ptr()
        if dlse is not None:
            p.dlse = self.memory.copy_of("dlse", dlse).data_ptr()

    def add_outputs(self, q, k, v, mask):
        """Contiguous ones; dmask with the four dimensions of a mask, or none."""
        p = self.params
        self.dq, self.dk, self.dv = (
            self.memory.output(name, x.shape, x.dtype)
            for name, x in (("dq", q), ("dk", k), ("dv", v))
        )
        p.dq = (self.dq.data_ptr(), *self.dq.stride()[:3])
        p.dk = (self.dk.data_ptr(), *self.dk.stride()[:3])
        p.dv = (self.dv.data_ptr(), *self.dv.stride()[:3])
        if mask is False:
            return
        mask = _check.mask(mask, q, k.shape[1])
        self.dmask = self.memory.counters("dmask", mask.numel(), torch.float32).view(mask.shape)
        steps = (0 if n == 1 else s for n, s in zip(mask.shape, self.dmask.stride(), strict=True))
        p.set_dmask(self.dmask.data_ptr(), *steps)

    def add_memory(self, name, deterministic):
        p = self.params
        row_stats, dq_accum = self.executor.module.backward_memory(p, name)
        p.row_stats = self.memory.output("row_stats", (row_stats,), torch.float32).data_ptr()
        if not deterministic:
            p.dq_accum = self.memory.output("dq_accum", (dq_accum,), torch.float32).data_ptr()

    def gradients(self):
        dmask = None if self.dmask is None else self.dmask.clone()
        return self.dq.clone(), self.dk.clone(), self.dv.clone(), dmask


def instances(kernel=None):
    """Rows of the compiled instance table, as dictionaries."""
    return [row for row in load().instances() if kernel in (None, row["kernel"])]
