"""Proof that the patched model says what transformers' eager attention says: token for token in
fp32, logit by logit in bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GreedyResult:
    """fp32: the tokens that eager and ours generate greedily, and how close the call was."""

    tokens: int
    identical: int
    min_gap: float
    max_logit_error: float

    @property
    def passed(self) -> bool:
        return self.identical == self.tokens


@dataclass(frozen=True)
class ForcedResult:
    """bf16: positions where eager's top-2 gap exceeds ``tolerance`` (clear) and the others (close
    calls)."""

    tolerance: float
    clear: int
    clear_equal: int
    close: int
    close_equal: int
    max_logit_error: float
    eager_logit_error: float

    @property
    def passed(self) -> bool:
        return self.clear > 0 and self.clear_equal == self.clear


@torch.inference_mode()
def greedy(model, prompt_ids: torch.Tensor, tokens: int, tick=lambda: None) -> torch.Tensor:
    """Return ``tokens`` greedily generated ids [tokens]; the end-of-text token is suppressed so
    that the count is exact.

    Args:
        model: a causal language model.
        prompt_ids: int64 [1, prompt_len].
        tokens: how many ids to generate.
        tick: called once per generated id.
    """

    class Ticker:
        def put(self, value):
            if value.numel() == 1:  # the first call brings the whole prompt
                tick()

        def end(self):
            pass

    ids = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        streamer=Ticker(),
    )
    return ids[0, prompt_ids.shape[1] :]


@torch.inference_mode()
def forced_logits(
    model, prompt_ids: torch.Tensor, forced: torch.Tensor, cache, tick=lambda: None
) -> torch.Tensor:
    """Return the fp32 logits [len(forced), vocab] that predict each forced token.

    The prompt is one prefill and every forced token one decode step, so both kinds of kernel are on
    trial.
    """
    logits = []
    step = prompt_ids
    for position in range(forced.numel()):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(out.logits[0, -1].float())
        step = forced[position].view(1, 1)
        tick()
    return torch.stack(logits)


def compare_greedy(
    eager_tokens: torch.Tensor,
    our_tokens: torch.Tensor,
    eager_logits: torch.Tensor,
    our_logits: torch.Tensor,
) -> GreedyResult:
    """Compare two greedy runs; the logits [tokens, vocab] are teacher-forced on eager's tokens."""
    top = eager_logits.topk(2, dim=-1).values
    return GreedyResult(
        tokens=eager_tokens.numel(),
        identical=int((eager_tokens == our_tokens).sum()),
        min_gap=float((top[:, 0] - top[:, 1]).min()),
        max_logit_error=float((our_logits - eager_logits).abs().max()),
    )


def compare_forced(
    eager: torch.Tensor, ours: torch.Tensor, reference: torch.Tensor
) -> ForcedResult:
    """Compare bf16 logits of ``ours`` with ``eager``'s, with a tolerance that eager's own rounding
    sets.

    Where eager prefers token a to b by ``gap``, rounding to bf16 has moved that gap by ``|gap -
    gap_fp32|``; call the largest such shift over all positions e. An implementation that rounds no
    worse than eager moves the fp32 gap by at most e too, so it can disagree with eager only where
    eager's gap is below ``2 e``: that is the tolerance.

    Args:
        eager, ours: fp32 copies of bf16 logits [tokens, vocab].
        reference: eager's fp32 logits on the same weights, tokens and positions.
    """
    values, best = eager.topk(2, dim=-1)
    gap = values[:, 0] - values[:, 1]
    exact = reference.gather(-1, best)
    tolerance = 2 * float((gap - (exact[:, 0] - exact[:, 1])).abs().max())
    equal = ours.argmax(-1) == best[:, 0]
    clear = gap > tolerance
    return ForcedResult(
        tolerance=tolerance,
        clear=int(clear.sum()),
        clear_equal=int((clear & equal).sum()),
        close=int((~clear).sum()),
        close_equal=int((~clear & equal).sum()),
        max_logit_error=float((ours - reference).abs().max()),
        eager_logit_error=float((eager - reference).abs().max()),
    )
