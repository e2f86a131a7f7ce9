"""One attention variant of the demo's table, measured in a process of its own.

Prints one JSON object per line: ``{"event": "tick", "label": ...}`` while it works and ``{"event":
"result", ...}`` at the end. Peak memory is the process's own high-water mark, which is why every
variant has its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import sys
import time

import torch
from demo_model import load_model
from demo_table import SHORT_REPEATS, VARIANTS, WARMUP_STEPS


def tick(label: str) -> None:
    print(json.dumps({"event": "tick", "label": label}), flush=True)


def free_attention(module, query, key, value, attention_mask, **kwargs):
    """Return zeros of the right shape: what is left is the cost of everything that is not
    attention."""
    batch_size, num_heads_q, seqlen_q, _ = query.shape
    return query.new_zeros(batch_size, seqlen_q, num_heads_q, value.shape[-1]), None


def build(variant: str, spec: str, dtype: torch.dtype):
    """Return ``(model, make_cache)`` of a variant."""
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

    if variant in ("ours", "ours-dynamic"):
        from flashinfer_lite import hf

        model = load_model(spec, dtype)
        hf.patch(model, linear=False, cache=variant == "ours")
    elif variant == "ceiling":
        AttentionInterface.register("costs_nothing", free_attention)
        AttentionMaskInterface.register("costs_nothing", lambda *args, **kwargs: None)
        model = load_model(spec, dtype)
        model.set_attn_implementation("costs_nothing")
    else:
        model = load_model(spec, dtype, variant.removesuffix("-ourcache"))
    if variant in ("ours", "sdpa-ourcache", "ceiling"):
        from flashinfer_lite import hf

        return model, lambda: hf.Cache(config=model.config)
    return model, lambda: DynamicCache(config=model.config)


def prefill(model, ids: torch.Tensor, cache) -> tuple[float, torch.Tensor]:
    """Run the whole prompt at once; return seconds and the last position's logits [vocab]."""
    start = time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    return time.perf_counter() - start, logits


def decode(model, forced: torch.Tensor, cache) -> tuple[list[float], list[int]]:
    """Feed the text's own next tokens one by one; return the seconds of each step and the predicted
    ids.

    The text decides what comes next, not the prediction, so that every variant does the same work
    on the same tokens.
    """
    seconds, predicted = [], []
    for token in forced:
        start = time.perf_counter()
        out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        predicted.append(int(out.logits[0, -1].argmax()))
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:], predicted


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_context(model, make_cache, ids: torch.Tensor, context: int, steps: int, repeats: int):
    """Return the JSON fields of one context length, and the filled cache."""
    times = []
    for repeat in range(repeats):
        tick(f"prefill {context}")
        cache = None  # the previous repeat's cache is released before the next one is made
        cache = make_cache()
        seconds, logits = prefill(model, ids[:, :context], cache)
        if repeat or repeats == 1:  # with repeats, the first one is the warm-up
            times.append(seconds)
    tick(f"decode {context}")
    steps_s, predicted = decode(model, ids[0, context : context + steps], cache)
    return {
        "context": context,
        "prefill_s": statistics.median(times),
        "decode_s": statistics.median(steps_s),
        "decode_s_all": steps_s,
        "predicted": [int(logits.argmax()), *predicted],
        "peak_mb": peak_mb(),
    }, cache


def decode_in_bf16(model, make_cache, filled, ids: torch.Tensor, context: int, steps: int) -> dict:
    """Decode in bf16 on a copy of the first ``context`` keys and values of an fp32 run.

    Without bf16 matrix instructions a bf16 prefill takes torch many times as long as an fp32 one,
    while decoding, which is bound by memory, is faster in bf16: so only the decoding is done in
    bf16.
    """
    tick(f"bf16 decode {context}")
    model.to(torch.bfloat16)
    cache = make_cache()
    for index, layer in enumerate(filled.layers):
        keys = layer.keys[:, :, :context].to(torch.bfloat16)
        values = layer.values[:, :, :context].to(torch.bfloat16)
        cache.update(keys, values, index)
        layer.keys = layer.values = None  # the fp32 copy of this layer is no longer needed
    seconds, predicted = decode(model, ids[0, context : context + steps], cache)
    return {"decode_s": statistics.median(seconds), "predicted": predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--ids", required=True, help="a file of token ids, saved by torch.save")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--contexts", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    tick("load")
    ids = torch.load(args.ids)
    model, make_cache = build(args.variant, args.spec, getattr(torch, args.dtype))
    result = {"event": "result", "variant": args.variant, "loaded_mb": peak_mb(), "contexts": []}
    steps = args.steps + WARMUP_STEPS
    with torch.inference_mode():
        for context in args.contexts:
            # Seconds long at the last context: once is enough there, and eager alone takes most of
            # the demo's time.
            repeats = 1 if context == args.contexts[-1] else SHORT_REPEATS + 1
            fields, cache = measure_context(model, make_cache, ids, context, steps, repeats)
            result["contexts"].append(fields)
        if args.dtype == "float32":
            result["bf16"] = decode_in_bf16(model, make_cache, cache, ids, context, steps)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)
