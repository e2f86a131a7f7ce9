"""flat_linear on the executor: `simt.Executor.flat_linear` is this."""

import torch


class FlatLinear:
    """One call: parameters, guarded tensors, workspace.

    Args:
        executor, memory: of simt.py.
        x, weight, bias: as flat_linear takes them, x with two dimensions.
        kernel: "gemv" or "flat_gemm", where the executor has no instance.
        splits: of K; 0 leaves it to the host code.
        out_row: stride of out's rows in elements, N or more.
        out_offset: where in its memory out begins, in elements.
    """

    def __init__(self, executor, memory, x, weight, bias, kernel, splits, out_row, out_offset):
        module, self.memory = executor.module, memory
        (rows, k), n = x.shape, weight.shape[0]
        dtype = str(x.dtype).removeprefix("torch.")
        name = executor.instance or module.choose_flat_linear(kernel, dtype, rows, executor.device)
        self.module, self.params = module, module.FlatLinearParams()
        p = self.params
        p.set_sizes(rows, n, k)
        self.inputs = [memory.copy_of("x", x), memory.copy_of("weight", weight)]
        p.set_x(self.inputs[0].data_ptr(), x.stride(0))
        p.set_weight(self.inputs[1].data_ptr(), weight.stride(0))
        if bias is not None:
            self.inputs.append(memory.copy_of("bias", bias))
            p.set_bias(self.inputs[2].data_ptr())
        self._make_out(rows, n, x.dtype, out_row, out_offset)
        self.plan = module.plan_flat_linear(p, name, splits)
        self._make_workspace()

    def _make_out(self, rows, n, dtype, out_row, out_offset):
        out_row = out_row or n
        self.out_memory = self.memory.output("out", (out_offset + rows * out_row,), dtype)
        self.out = torch.as_strided(self.out_memory, (rows, n), (out_row, 1), out_offset)
        self.outside = torch.ones(self.out_memory.shape, dtype=torch.bool)
        torch.as_strided(self.outside, (rows, n), (out_row, 1), out_offset).fill_(False)
        self.params.set_out(self.out.data_ptr(), out_row)

    def _make_workspace(self):
        self.tickets = None
        if self.plan.splits > 1 and self.plan.num_blocks:
            self.partial = self.memory.output("partial", (self.plan.num_partials,), torch.float32)
            self.tickets = self.memory.tickets(self.plan.num_tickets)
            self.params.set_workspace(self.partial.data_ptr(), self.tickets.data_ptr())

    def launch(self):
        """Run once, from outputs that are NaN; -> out, of memory of its own."""
        self.out_memory.fill_(torch.nan)
        self.module.flat_linear(self.params, self.plan)
        return self.out.clone()

    def check(self):
        """What the executor cannot see: nothing beside out is written, tickets are back at 0."""
        if not self.out_memory[self.outside].isnan().all():
            raise AssertionError("out: memory between its rows was written")
        if self.tickets is not None and self.tickets.any():
            raise AssertionError(f"tickets: expected 0 after a launch, got {self.tickets.tolist()}")
