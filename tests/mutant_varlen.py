"""What the mutants of the attention kernels have to get past with ragged batches."""

import torch
from mutant_cases import INSTANCES, Case, _generator, _lengths

from flashinfer_lite import attention_varlen, reference
from flashinfer_lite.testing import assert_close, check_forward, simt

LENGTHS_Q = (0, 70, 1, 0, 3, 130, 5, 0)
LENGTHS_KV = (7, 201, 40, 5, 0, 131, 64, 0)
TAILS = (2, 140)


class Ragged:
    """One call: `given` is what the kernel is told of the offsets, where they are not the true."""

    def __init__(self, name, heads=(4, 2), tails=TAILS, lengths=None, given=None, **arguments):
        self.name, self.given = name, given
        lengths_q, lengths_kv = lengths or (LENGTHS_Q, LENGTHS_KV)
        before, behind = tails
        cu_q, cu_kv = (
            torch.tensor([before, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_kv)
        )
        generator = _generator(f"ragged {name}")
        self.q, self.k, self.v = (
            torch.randn(int(cu[-1]) + behind, n, 64, generator=generator).bfloat16()
            for cu, n in ((cu_q, heads[0]), (cu_kv, heads[1]), (cu_kv, heads[1]))
        )
        for x, cu in ((self.q, cu_q), (self.k, cu_kv), (self.v, cu_kv)):
            x[:before], x[cu[-1] :] = torch.nan, torch.nan
        self.dout = torch.randn(self.q.shape, generator=generator).bfloat16()
        self.dlse = torch.randn(self.q.shape[1::-1], generator=generator)
        self.wanted = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv, **arguments}

    def _arguments(self):
        return {**self.wanted, **(self.given(self) if self.given else {})}

    def _executor(self, kernel, options):
        return simt.Executor(INSTANCES[kernel], tolerate=True, **options)

    def forward(self):
        def call(options):
            executor = self._executor("attention_fwd", options)
            tensors = executor.attention_varlen(
                self.q, self.k, self.v, **self._arguments(), return_lse=True
            )
            return tensors, executor.reports

        def check(tensors):
            check_forward(lambda *_, **__: tensors, self.q, self.k, self.v, **self.wanted)

        return Case(f"ragged {self.name}", "attention_fwd", call, check)

    def backward(self, deterministic):
        def call(options):
            executor = self._executor("attention_bwd", options)
            inputs = self.q, self.k, self.v
            out, lse = attention_varlen(*inputs, **self.wanted, return_lse=True)
            tensors = executor.attention_varlen_bwd(
                *(self.dout, self.dlse, *inputs, out, lse),
                **self._arguments(),
                deterministic=deterministic,
            )
            return tensors, executor.reports

        def check(tensors):
            oracle, eager = self._gradients(torch.float64), self._gradients(torch.bfloat16)
            for x, wanted, close, name in zip(
                tensors, oracle, eager, ("dq", "dk", "dv"), strict=True
            ):
                assert_close(x, wanted, close, name, gradient=True, dtype=torch.bfloat16)

        label = f"ragged {self.name}{', by rows' if deterministic else ''}"
        return Case(label, "attention_bwd", call, check)

    def _gradients(self, dtype):
        leaves = [torch.nan_to_num(x).to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        results = reference.attention_varlen(*leaves, **self.wanted, return_lse=True)
        gradients = self.dout.to(results[0].dtype), self.dlse.to(results[1].dtype)
        return torch.autograd.grad(results, leaves, gradients)


def _beyond_the_tensors(case):
    """Offsets below the first row and beyond the last count as those."""
    given = {n: case.wanted[n].long() for n in ("cu_seqlens_q", "cu_seqlens_kv")}
    for x in given.values():
        x[0], x[-1] = -5, torch.iinfo(x.dtype).max
    return given


def _every_other(case):
    """Offsets with others between them, of two types."""
    cu_q, cu_kv = case.wanted["cu_seqlens_q"], case.wanted["cu_seqlens_kv"].long()
    both = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    return {n: torch.stack((x, x - 9), 1).flatten()[::2] for n, x in both.items()}


def _descending():
    """Keys that two sequences share, and a sequence between them that has less than none."""
    case = Ragged("descending", (2, 1), (0, 0), ((20, 30, 40), (90, 0, 100)))
    case.k[90:130], case.v[90:130] = case.k[50:90].clone(), case.v[50:90].clone()
    told, keys, values = _lengths(0, 90, 50, 150), case.k.clone(), case.v.clone()
    once = torch.cat((torch.arange(90), torch.arange(130, 190)))
    inner = case.forward()

    def call(options):
        case.k, case.v = keys[once], values[once]
        case.given = lambda _: {"cu_seqlens_kv": told}
        try:
            return inner.call(options)
        finally:
            case.k, case.v = keys, values

    return Case(inner.name, inner.kernel, call, inner.check)


def varlen_cases():
    lengths = {"kv_start": _lengths(2, 13, 5, 0, 0, 64, 60, 0)}
    lengths["seqlens_kv"] = _lengths(7, 170, 33, 5, 0, 131, 62, 0)
    slopes = torch.rand(8, 4, generator=_generator("slopes"))
    cases = [
        Ragged("alibi", alibi_slopes=slopes),
        Ragged("causal", causal=True),
        Ragged("lengths", (2, 2), causal=True, **lengths),
        Ragged("window", (6, 2), window=(90, 20)),
        Ragged("many", (1, 1), (1, 1), ([1] * 100, [1] * 100)),
        Ragged("beyond", tails=(0, 0), given=_beyond_the_tensors, causal="top_left"),
        Ragged("every other", (2, 1), given=_every_other),
    ]
    return [
        *(case.forward() for case in cases),
        _descending(),
        *(case.backward(deterministic) for case in cases for deterministic in (False, True)),
    ]
