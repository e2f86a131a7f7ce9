"""What the mutants of attention_bwd have to get past: see mutant_cases.py."""

import functools

import torch
from mutant_cases import (
    INF,
    NAN,
    ONE_STAGE,
    Attention,
    Case,
    _generator,
    _hostile_lengths,
    _lengths,
    _padded_heads,
    _padded_tokens,
    _shifted,
    _unaligned,
)

from flashinfer_lite import attention, reference
from flashinfer_lite.testing import assert_close


class Backward(Attention):
    """The gradients of one call of attention in q, k, v and, if it has one, an additive mask."""

    def __init__(self, name, q, kv, *sizes, deterministic=False, **arguments):
        super().__init__("attention_bwd", name, q, kv, *sizes, **arguments)
        random = functools.partial(torch.randn, generator=_generator(name))
        self.deterministic = deterministic
        self.dout = random(*self.q.shape[:3], self.v.shape[3]).bfloat16()
        self.dlse = random(self.q.shape[0], self.q.shape[2], self.q.shape[1])

    @property
    def wants_dmask(self):
        mask = self.arguments.get("mask")
        return mask is not None and mask.dtype != torch.bool

    def _call(self, options):
        executor = self._executor(options)
        out, lse = attention(self.q, self.k, self.v, return_lse=True, **self.wanted)
        out = _shifted(out) if self.dout.data_ptr() % 16 else out
        tensors = executor.attention_bwd(
            self.dout,
            self.dlse,
            self.q,
            self.k,
            self.v,
            out,
            lse,
            wants_dmask=self.wants_dmask,
            deterministic=self.deterministic,
            **self.arguments,
        )
        return [x for x in tensors if x is not None], executor.reports

    def _check(self, tensors):
        oracle, eager = self._gradients(torch.float64), self._gradients(None)
        names = ("dq", "dk", "dv", "dmask")
        for x, wanted, close, name in zip(tensors, oracle, eager, names, strict=False):
            assert_close(x, wanted, close, name, gradient=True, dtype=torch.bfloat16)

    def _gradients(self, dtype):
        """Of the reference, as if dead rows and slots held numbers."""
        leaves = [torch.nan_to_num(t, 0, 0, 0) for t in (self.q, self.k, self.v)]
        leaves = [(t.to(dtype) if dtype else t).requires_grad_() for t in leaves]
        arguments = dict(self.wanted)
        if self.wants_dmask:
            mask = arguments["mask"].detach()
            arguments["mask"] = (mask.to(dtype) if dtype else mask).requires_grad_()
            leaves.append(arguments["mask"])
        out, lse = reference.attention(*leaves[:3], **arguments, return_lse=True)
        dout = torch.nan_to_num(self.dout, 0, 0, 0).to(out.dtype)
        return torch.autograd.grad((out, lse), leaves, (dout, self.dlse.to(lse.dtype)))


def _unaligned_dout(case):
    _unaligned(case)
    case.dout = _shifted(case.dout)


def _shared_mask(case):
    """One mask for all heads."""
    for arguments in (case.arguments, case.wanted):
        arguments["mask"] = case.arguments["mask"][:, :1]


def _rows_without_keys(case):
    """The first rows see no key, and hold nothing; a block has rows of both kinds."""
    first = case.q.shape[1] - case.k.shape[1]
    case.q[:, :first], case.dout[:, :first] = NAN, INF


def _slots_beside(case):
    """Slots outside of the sequence hold NaN."""
    start, end = case.arguments["kv_start"][0], case.arguments["seqlens_kv"][0]
    case.k[:, :start], case.v[:, end:], case.v[:, :start] = NAN, NAN, INF


def _one_stage(case):
    case.instance = ONE_STAGE


def _huge_lse(case):
    """Rounded as a large number is, lse lies below some scores."""
    case.q *= 40


def _sections(case):
    """The L2 holds the rows of two and a half of the six heads, or their keys."""
    case.device = {"l2_bytes": 250_000}


def backward_cases():
    started = {"seqlens_kv": _lengths(170), "kv_start": _lengths(13)}
    several = {"seqlens_kv": _lengths(170, 101, 0), "kv_start": _lengths(13, 64, 0)}
    plain = [
        ("causal", (70, 4), (300, 2), (), {"causal": True}, ()),
        ("window", (150, 1), (500, 1), (), {"window": (170, 60)}, ()),
        ("one row", (1, 1), (5, 1), (), {}, ()),
        ("top left", (150, 1), (300, 1), (), {"causal": "top_left"}, ()),
        ("lengths", (40, 2), (201, 1), (64, 64, 3), {"causal": True, **several}, ()),
        ("beside", (40, 2), (201, 1), (), {"causal": True, **started}, (_slots_beside,)),
        ("mask", (35, 4), (150, 2), (56, 40), {"mask": torch.bool, "softcap": 5.0}, ()),
        ("softcap", (30, 2), (120, 1), (), {"softcap": 3.0, "causal": True}, ()),
        ("bias", (35, 4), (150, 2), (), {"mask": torch.float32, "softmax_scale": -0.2}, ()),
        ("capped bias", (35, 2), (70, 2), (), {"mask": torch.float32, "softcap": 2.0}, ()),
        ("shared bias", (35, 4), (150, 2), (), {"mask": torch.float32}, (_shared_mask,)),
        ("alibi", (35, 4), (150, 2), (64, 64, 2), {"alibi_slopes": True, "softcap": 3.0}, ()),
        ("unaligned", (50, 6), (90, 2), (56, 40), {}, (_unaligned_dout,)),
        ("padded tokens", (20, 2), (90, 1), (), {}, (_padded_tokens,)),
        ("padded heads", (20, 2), (90, 2), (), {}, (_padded_heads,)),
        ("no keys", (150, 2), (40, 1), (), {"causal": True}, (_rows_without_keys,)),
        ("large", (30, 2), (90, 1), (), {}, (_huge_lse,)),
        ("hostile", (20, 2), (150, 1), (64, 64, 3), {"causal": True}, (_hostile_lengths,)),
        ("sections", (70, 6), (150, 3), (64, 64, 2), {}, (_sections,)),
        ("one stage", (70, 2), (70, 1), (136, 200), {"causal": True}, (_one_stage,)),
    ]
    cases = []
    for name, q, kv, sizes, arguments, changes in plain:
        for deterministic in (False, True):
            label = f"{name}, by rows" if deterministic else name
            case = Backward(label, q, kv, *sizes, deterministic=deterministic, **arguments)
            for change in changes:
                case.edit(change)
            cases.append(Case(label, "attention_bwd", case._call, case._check))
    return cases
