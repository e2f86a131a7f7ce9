"""FlashDecoding++ on a real language model: ``make fdpp``, or ``python examples/flashdecoding_pp.py
--help``.

Calibrates the unified-max softmax on real text, finds the inflection points of the linear layers on
this machine, proves the outputs right (perplexity token by token, the guard's counters, greedy
text), and times decoding against torch's own attention. docs/flashdecoding_pp.md explains the
parts. Exit status: 0 when every proof held, 1 when one did not, 2 for bad arguments, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SCORED = ["eager", "sdpa", "online", "unified", "unified-flat"]
MAX_POSITIONS = 8192
GREEDY_PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


@dataclass(frozen=True)
class Sizes:
    """How much is done, in tokens.

    Attributes:
        contexts: keys in the cache when decoding is timed.
        rounds: timed tokens of each variant and context.
        prefix, scored: of the perplexity: tokens before, and tokens of it.
        greedy: generated tokens.
        calibrated, held_out, seqlen: of the calibration, and how many the model sees at a time.
        tune_seconds: for each weight [N, K] and dtype; 0 leaves the table that is in force.
    """

    contexts: tuple[int, ...]
    rounds: int
    prefix: int
    scored: int
    greedy: int
    calibrated: int
    held_out: int
    seqlen: int
    tune_seconds: float


FULL = Sizes((1024, 4096), 48, 512, 384, 64, 16384, 8192, 2048, 3.0)
QUICK = Sizes((64, 192), 4, 64, 48, 16, 2048, 1024, 256, 0.05)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashdecoding_pp.py", description="FlashDecoding++ on a real language model."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small in everything, with --random: under a minute")
    add("--random", action="store_true", help="a small random-weight Llama")
    add("--contexts", type=int, nargs="+", metavar="TOKENS", help="default: 1024 4096")
    add("--rounds", type=int, metavar="N", help="timed tokens of each row, default 48")
    add("--scored", type=int, metavar="N", help="tokens of the perplexity, default 384")
    add("--tune-seconds", type=float, metavar="S", help="of each weight, default 3; 0: no tuning")
    add("--calibration", type=Path, metavar="FILE", help="use this one, do not calibrate")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--threads", type=int, default=0, metavar="N", help="default: torch's own")
    add("--output", type=Path, default=ROOT / "results" / "fdpp", metavar="DIR")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.random |= args.quick
    sizes = QUICK if args.quick else FULL
    if args.calibration and not args.calibration.is_file():
        parser.error(f"--calibration: expected a file, got {args.calibration}")
    for name in ("contexts", "rounds", "scored", "tune_seconds"):
        given = getattr(args, name)
        if given is None:
            continue
        least = 0 if name == "tune_seconds" else 1
        if min(given if name == "contexts" else [given]) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {given}")
        sizes = replace(sizes, **{name: tuple(given) if name == "contexts" else given})
    args.sizes = sizes
    if args.threads < 0:
        parser.error(f"--threads: expected 0 (torch's own) or more, got {args.threads}")
    room = MAX_POSITIONS - 8
    for name, most in (("contexts", room - sizes.rounds), ("scored", room - sizes.prefix)):
        given = max(sizes.contexts) if name == "contexts" else sizes.scored
        if given > most:
            parser.error(f"--{name}: expected at most {most}, got {given}")
    return args


def heading(text: str) -> None:
    bold, reset = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}== {text}{reset}", flush=True)


class Run:
    """The parts of a run, the records they leave, and whether their checks held."""

    def __init__(self, args, source, tokenizer, text: str):
        self.args, self.sizes, self.source = args, args.sizes, source
        self.tokenizer, self.text = tokenizer, text
        self.records, self.notices, self.failed = [], [], 0
        self.filled = {}  # part of the text -> (its ids, the cache of an fp32 prefill)

    def show(self, checks) -> None:
        for check in checks:
            print(check, flush=True)
            self.failed += not check.passed
            self.records.append({"kind": "check", "passed": check.passed, "text": check.text})

    def prepare(self, model) -> None:
        """Calibrate, tune, and prefill what the variants start from, all with the fp32 model."""
        import torch
        from fdpp_setup import calibrate_model, calibration_fields, encode, part, tune_linears
        from fdpp_variants import prefill

        from flashinfer_lite.calibrate import Calibration

        heading("calibration of the unified max")
        folder = self.args.output
        if given := self.args.calibration:
            self.calibration = Calibration.load(given)
        else:
            self.calibration = calibrate_model(model, self.tokenizer, self.text, self.sizes, folder)
        print(self.calibration.summary())
        print(given or f"{folder / 'calibration.json'}, {folder / 'calibration.png'}")
        self.records.append(calibration_fields(self.calibration))
        heading("dataflow: which kernel for M rows of x, per weight [N, K]")
        dtypes = [getattr(torch, DTYPES[name]) for name in self.args.dtypes]
        for line in tune_linears(model, dtypes, self.sizes.tune_seconds, folder):
            print(f"  {line}")
            self.records.append({"kind": "dataflow", "text": line})
        lengths = {
            "scored": (self.sizes.prefix, self.sizes.scored + 1),
            "decoded": (max(self.sizes.contexts), self.sizes.rounds + 8),
        }
        for name, (prefix, more) in lengths.items():
            ids = encode(self.tokenizer, part(self.text, name), prefix + more)
            self.filled[name] = (ids, prefill(model, ids[:prefix]))

    def prove(self, variants, dtype: str) -> None:
        """Perplexity and counters in a dtype; in fp32 greedy text too."""
        import fdpp_checks as checks
        from fdpp_variants import KINDS

        heading(f"{dtype}: perplexity of {self.sizes.scored} tokens, one at a time through decode")
        ids, filled = self.filled["scored"]
        prefix, steps = self.sizes.prefix, self.sizes.scored
        runs = {}
        for variant in variants:
            if (name := variant.name) not in SCORED:
                continue
            runs[name] = run = checks.run_forced(variant, filled, prefix, ids)
            kernels = ", ".join(f"{key} {n}" for key, n in sorted(run.kernels.items()))
            print(f"  {KINDS[name].label:31}{run.perplexity:11.5f}  {kernels or '-'}", flush=True)
            self.records.append(
                {"kind": "perplexity", "variant": name, "dtype": dtype, **run.fields()}
            )
        self.show((checks.check_fp32 if dtype == "fp32" else checks.check_bf16)(runs))
        layers_on = self.calibration.layers_on
        self.show(checks.check_counts(KINDS, runs, dtype, layers_on, self.num_heads, steps))
        self.show(checks.check_linears(variants[0].model, runs, KINDS, dtype))
        if dtype == "fp32":
            heading("fp32: greedy text")
            prompt = checks.chat_prompt(self.tokenizer, GREEDY_PROMPT)
            texts = {v.name: checks.greedy(v, prompt, self.sizes.greedy) for v in variants}
            self.show(checks.check_greedy(texts))

    def time(self, variants, dtype: str) -> list:
        """Time decoding at each context; return the rows."""
        from fdpp_speed import Contention, measure

        ids, filled = self.filled["decoded"]
        rows = []
        with Contention() as contention:
            for context in self.sizes.contexts:
                rows += measure(variants, filled, ids, context, self.sizes.rounds, dtype)
        self.records += [{**row.fields(), "others": contention.share} for row in rows]
        if notice := contention.notice():
            self.notices.append(f"  {dtype}: {notice}")
        return rows

    def run_dtype(self, dtype: str) -> list:
        """Load the model in a dtype, prove and time its variants; return the rows."""
        import torch
        from demo_model import load_model
        from fdpp_variants import KINDS, Variant

        model = load_model(self.source.spec, getattr(torch, DTYPES[dtype]), "sdpa")
        if not self.filled:
            exact = dtype == "fp32"
            self.prepare(model if exact else load_model(self.source.spec, torch.float32, "sdpa"))
        calibration = self.calibration.for_dtype(DTYPES[dtype])
        self.num_heads = model.config.num_attention_heads
        variants = [Variant(name, model, calibration) for name in KINDS]
        self.prove(variants, dtype)
        return self.time(variants, dtype)


def describe(args) -> dict:
    """Return the first record: what ran where."""
    import torch
    import transformers
    from demo_table import machine
    from fdpp_speed import clock_of

    import flashinfer_lite

    return {
        "kind": "run",
        "command": "flashdecoding_pp.py " + " ".join(args.argv),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "clock": clock_of(torch.get_num_threads()).__name__,
        "load": os.getloadavg()[0],
        "flashinfer_lite": flashinfer_lite.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run_all(args) -> int:
    import torch
    from demo_model import load_tokenizer, real_text
    from fdpp_setup import find_model, write_lines
    from fdpp_speed import format_rows
    from fdpp_variants import KINDS

    start = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    heading("model and text")
    source = find_model(args.random)
    text, described = real_text()
    about = {**describe(args), "model": source.label, "text": described}
    print(f"  {source.label}\n  {described}\n  {about['machine']}, {about['threads']} threads")
    run = Run(args, source, load_tokenizer(source.spec), text)
    run.records.append(about)
    rows = [row for dtype in args.dtypes for row in run.run_dtype(dtype)]
    heading("decode, batch 1: medians of interleaved rounds; x is speed against sdpa, DynamicCache")
    print(format_rows(rows, {name: kind.label for name, kind in KINDS.items()}))
    if run.notices:
        print("\n" + "\n".join(run.notices))
    write_lines(args.output / "fdpp.jsonl", run.records)
    print(f"\n  {args.output / 'fdpp.jsonl'}")
    print(f"\n{time.perf_counter() - start:.0f} s in all; {run.failed or 'no'} checks failed")
    return 1 if run.failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    sys.path.insert(0, str(ROOT))  # a checkout that is built but not installed works too
    try:
        import matplotlib  # noqa: F401
        import transformers

        import flashinfer_lite
    except ImportError as error:
        print(f"fdpp: {error.name or error} is missing: run `make fdpp`", file=sys.stderr)
        return 1
    if not flashinfer_lite.built:
        print('fdpp: flashinfer_lite is not built: run "make build"', file=sys.stderr)
        return 1
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return run_all(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nfdpp: interrupted", file=sys.stderr)
        sys.exit(130)
