"""What a call on the executor stands on: guarded memory, and attention's parameters in it."""

import torch

from flashinfer_lite import _check

_CAUSAL_TOP_LEFT = 2


class Memory:
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


class Call:
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
        self.memory = Memory(executor.module)
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


class BackwardCall(Call):
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
