"""The proofs of `make fdpp`: perplexity token by token, what the kernels counted, and greedy text.

Every function returns `Check`s; none raises for a wrong result, so that one failure hides no other.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Perplexities in fp32 are the same to 4 digits: half a unit of the fourth digit of 1.000.
SAME_DIGITS = 5e-5
# In bf16, how many standard errors of sdpa's own distance from eager are chance.
CHANCE = 3.0
# The rate that calibration aims at is met on its own text; other text may have this much more.
MAX_RECOMPUTE_RATE = 0.02
FLAT_KERNELS = ("gemv", "flat_gemm")


@dataclass(frozen=True)
class Check:
    """A statement about the run, and whether it holds."""

    passed: bool
    text: str

    def __str__(self) -> str:
        return f"  {'ok    ' if self.passed else 'FAILED'}  {self.text}"


@dataclass(frozen=True)
class Run:
    """One variant, teacher-forced through decode.

    Attributes:
        nll: [steps] float64, minus the log-probability of each next token.
        rows_checked, rows_recomputed: what `stats()` counted meanwhile.
        kernels: how often each kernel ran in one further step.
    """

    nll: torch.Tensor
    rows_checked: int
    rows_recomputed: int
    kernels: dict[str, int]

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.nll.mean()))

    @property
    def recompute_rate(self) -> float:
        return self.rows_recomputed / max(self.rows_checked, 1)

    def fields(self) -> dict:
        """Return the run as it is written to the JSON lines."""
        return {
            "perplexity": self.perplexity,
            "tokens": self.nll.numel(),
            "rows_checked": self.rows_checked,
            "rows_recomputed": self.rows_recomputed,
            "kernels_in_a_step": self.kernels,
        }


class _OpCounter(TorchDispatchMode):
    """Counts our ops; those that take a kernel's name, by that name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flashinfer_lite":
            named = [arg for arg in args if isinstance(arg, str)]
            self.counts[named[0] if named else func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def run_forced(variant, filled, prefix: int, ids: torch.Tensor) -> Run:
    """Feed ids [prefix + steps + 1] from `prefix` on, one token a step, whatever is predicted.

    Args:
        variant: a `fdpp_variants.Variant`.
        filled: a cache with the keys and values of the first `prefix` tokens at least.
        prefix: how many tokens the cache starts with.
        ids: the text.
    """
    import flashinfer_lite

    cache = variant.cache(filled, prefix)
    flashinfer_lite.stats(reset=True)
    nll = []
    for token, following in zip(ids[prefix:-1], ids[prefix + 1 :], strict=True):
        logits = variant.step(token, cache).double()
        nll.append(logits.logsumexp(-1) - logits[following])
    counted = flashinfer_lite.stats()
    with _OpCounter() as ops:
        variant.step(ids[-1], cache)
    return Run(torch.stack(nll), counted.rows_checked, counted.rows_recomputed, dict(ops.counts))


def check_fp32(runs: dict[str, Run]) -> list[Check]:
    """In fp32 every variant has eager's perplexity to 4 digits."""
    eager = runs["eager"].perplexity
    return [
        Check(
            abs(run.perplexity - eager) <= SAME_DIGITS * eager,
            f"fp32 perplexity {run.perplexity:.5f}, eager's {eager:.5f}: {name}",
        )
        for name, run in runs.items()
        if name != "eager"
    ]


def check_bf16(runs: dict[str, Run]) -> list[Check]:
    """In bf16 ours is no farther from eager than sdpa is, twice over.

    sdpa can be close to eager by luck. So the distance allowed is at least what chance gives the
    mean of differences like sdpa's: `CHANCE` standard errors.
    """
    eager, sdpa = runs["eager"], runs["sdpa"]
    apart = sdpa.nll - eager.nll
    by_chance = CHANCE * float(apart.std()) / math.sqrt(apart.numel())
    floor = eager.perplexity * math.expm1(by_chance)
    spread = abs(sdpa.perplexity - eager.perplexity)
    allowed = max(2 * spread, floor)
    return [
        Check(
            abs(run.perplexity - eager.perplexity) <= allowed,
            f"bf16 perplexity {run.perplexity:.4f}, eager's {eager.perplexity:.4f}, "
            f"apart {abs(run.perplexity - eager.perplexity):.4f} of {allowed:.4f} allowed "
            f"(twice sdpa's {spread:.4f}, at least {floor:.4f}): {name}",
        )
        for name, run in runs.items()
        if name not in ("eager", "sdpa")
    ]


def check_counts(
    kinds, runs: dict[str, Run], dtype: str, layers_on: int, heads: int, steps: int
) -> list[Check]:
    """The guard has looked at every row where the unified max is on, and at no other; few were
    recomputed."""
    checks = []
    for name, run in runs.items():
        kind = kinds[name]
        if kind.attention != "ours":
            continue
        expected = layers_on * heads * steps if kind.unified else 0
        of = f" = {layers_on} layers x {heads} heads x {steps} steps" if kind.unified else ""
        checks.append(
            Check(
                run.rows_checked == expected,
                f"{dtype} rows checked {run.rows_checked}, expected {expected}{of}: {name}",
            )
        )
        if kind.unified:
            checks.append(
                Check(
                    run.recompute_rate <= MAX_RECOMPUTE_RATE,
                    f"{dtype} rows recomputed {run.rows_recomputed}, {run.recompute_rate:.3%} of "
                    f"at most {MAX_RECOMPUTE_RATE:.0%}: {name}",
                )
            )
    return checks


def check_linears(model, runs: dict[str, Run], kinds, dtype: str) -> list[Check]:
    """A step has run flat_linear's kernels in exactly the layers that the dataflow table gives
    them, and in no variant that did not ask for it."""
    from flashinfer_lite import dataflow

    modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    table = Counter(
        dataflow.choose("cpu", model.dtype, module.out_features, module.in_features, 1)
        for module in modules
    )
    del table["vendor"]  # torch's own, which no counter of ours sees
    checks = []
    for name, run in runs.items():
        expected = dict(table) if kinds[name].linear else {}
        ran = {key: n for key, n in run.kernels.items() if key in FLAT_KERNELS}
        text = f"{dtype} flat_linear in a step: {ran}, expected {expected} of {len(modules)} layers"
        if kinds[name].linear or ran:
            checks.append(Check(ran == expected, f"{text}: {name}"))
    return checks


def chat_prompt(tokenizer, text: str) -> torch.Tensor:
    """Return the ids [prompt_len] of a prompt, in the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return torch.tensor(tokenizer.apply_chat_template(messages, **options)["input_ids"])
    return torch.tensor(tokenizer.encode(text))


@torch.inference_mode()
def greedy(variant, prompt: torch.Tensor, tokens: int) -> list[int]:
    """Return `tokens` greedily generated ids; the end of the text is suppressed, so that the count
    is exact."""
    ids = variant.model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )
    return ids[0, prompt.numel() :].tolist()


def check_greedy(texts: dict[str, list[int]]) -> list[Check]:
    """Every variant writes eager's tokens."""
    eager = texts["eager"]
    checks = []
    for name, ids in texts.items():
        if name == "eager":
            continue
        equal = sum(a == b for a, b in zip(ids, eager, strict=True))
        text = f"fp32 greedy tokens {equal} of {len(eager)} equal to eager's: {name}"
        checks.append(Check(equal == len(eager), text))
    return checks
