"""Texts to batches of token ids."""

from collections.abc import Mapping

import torch

# No tokenizer known makes tokens this long on average; a longer text is cut before it is tokenized.
CHARACTERS_PER_TOKEN = 32


def make_batches(texts, tokenizer, seqlen: int, max_tokens: int, name: str = "texts") -> list[dict]:
    """Inputs of a model, in the order in which they are run.

    Each text is cut into pieces of `seqlen` tokens, the last one shorter; where the tokenizer puts
    a BOS token in front, every piece has one. The first pieces of all texts come before the second
    ones, so that `max_tokens` cuts off the ends of texts and not the last texts.

    Raises:
        TypeError: a text that is no str, no sequence of ids and no dict; a str without a tokenizer.
        ValueError: no token in any text.
    """
    texts = [texts] if isinstance(texts, (str, Mapping)) else list(texts)
    pieces = [_pieces(text, tokenizer, seqlen, max_tokens, name) for text in texts]
    batches, tokens = [], 0
    for depth in range(max(map(len, pieces), default=0)):
        for of_text in pieces:
            if depth < len(of_text) and tokens < max_tokens:
                batch = of_text[depth]
                if not isinstance(batch, dict):
                    batch = {"input_ids": torch.tensor([batch[: max_tokens - tokens]])}
                batches.append(batch)
                tokens += num_tokens(batch)
    if not tokens:
        raise ValueError(f"{name}: expected text, got none: {len(texts)} texts without a token")
    return batches


def num_tokens(batch: dict) -> int:
    """Tokens of a batch, padding aside."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int((mask != 0).sum())
    return max((x.shape[:2].numel() for x in batch.values() if torch.is_tensor(x)), default=0)


def _pieces(text, tokenizer, seqlen, max_tokens, name) -> list:
    """The batches of a text that is a dict, otherwise lists of ids."""
    if isinstance(text, Mapping):
        return [dict(text)]
    bos = None
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError(f"tokenizer: expected a tokenizer for {name} of type str, got None")
        ids = _encode(tokenizer, text[: CHARACTERS_PER_TOKEN * max_tokens])
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None or ids[:1] != [bos]:
            bos = None
    else:
        try:
            ids = torch.as_tensor(text)
            if ids.dim() != 1 or ids.numel() and (ids.is_floating_point() or ids.is_complex()):
                raise TypeError
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name}: expected str, sequences of token ids or dicts of tensors, got "
                f"{type(text).__name__}"
            ) from None
        ids = ids.tolist()
    if bos is None or seqlen == 1:
        return [ids[i : i + seqlen] for i in range(0, len(ids), seqlen)]
    if len(ids) == 1:
        return []  # an empty text
    return [[bos, *ids[i : i + seqlen - 1]] for i in range(1, len(ids), seqlen - 1)]


def _encode(tokenizer, text: str) -> list[int]:
    if not text:
        return []
    try:
        # verbose: transformers would warn that the text is longer than the model's context.
        return list(tokenizer(text, verbose=False)["input_ids"])
    except TypeError:
        return list(tokenizer.encode(text))  # any other tokenizer
