"""python -m flashinfer_lite calibrate"""

import importlib.util
from pathlib import Path

import torch

from flashinfer_lite.calibrate.guard import BY_NAME


def add_parser(commands) -> None:
    """Add the command calibrate."""
    from flashinfer_lite.calibrate.run import MAX_TOKENS, RECOMPUTE_RATE, SEQLEN

    parser = commands.add_parser(
        "calibrate", help="choose phi for a model's unified-max softmax from real text"
    )
    add = parser.add_argument
    add("model_dir", metavar="MODEL_DIR", help="folder of a transformers causal language model")
    add("--text", nargs="+", required=True, metavar="FILE", help="text to calibrate on, UTF-8")
    add("--output", required=True, metavar="FILE", help="where the calibration goes, JSON")
    add("--plot", metavar="PNG", help="draw the distributions")
    add("--held-out", nargs="+", metavar="FILE", help="other text, to measure the rate on")
    add("--recompute-rate", type=float, default=RECOMPUTE_RATE, metavar="RATE")
    add("--seqlen", type=int, help=f"tokens at a time (default: {SEQLEN}, or the model's maximum)")
    add("--max-tokens", type=int, default=MAX_TOKENS, help="of the text (default: %(default)s)")
    add("--dtype", choices=["auto", *BY_NAME], default="auto", help="what the model will run in")
    add("--device", default="cpu")
    parser.set_defaults(run=_run, error=parser.error)


def _run(args) -> int:
    from flashinfer_lite.calibrate.run import calibrate

    texts = {name: _read(args, name) for name in ("text", "held_out")}
    for name in ("output", "plot"):
        path = getattr(args, name)
        if path and Path(path).is_dir():
            args.error(f"--{name}: expected a file, got the folder {path}")
        if path and not Path(path).resolve().parent.is_dir():
            args.error(f"--{name}: expected a file in a folder that exists, got {path}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        args.error("--plot: expected matplotlib to be installed, got none: pip install matplotlib")
    model, tokenizer = _load(args)
    try:
        calibration = calibrate(
            model,
            texts["text"],
            tokenizer=tokenizer,
            recompute_rate=args.recompute_rate,
            held_out=texts["held_out"],
            max_tokens=args.max_tokens,
            seqlen=args.seqlen,
        )
    except ValueError as error:
        # "max_tokens: expected ..." is about --max-tokens; "texts" is the one name that differs.
        name, _, rest = str(error).partition(": ")
        option = "text" if name == "texts" else name.replace("_", "-")
        args.error(f"--{option}: {rest}" if hasattr(args, option.replace("-", "_")) else str(error))
    except NotImplementedError as error:  # an argument of its attention, which hf.patch refuses too
        args.error(f"MODEL_DIR: {type(model).__name__} is not supported: {error}")
    print(calibration.summary())
    calibration.save(args.output)
    if args.plot:
        calibration.plot(args.plot)
    return 0


def _read(args, name: str) -> list[str] | None:
    texts = []
    for path in getattr(args, name) or []:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            args.error(f"--{name.replace('_', '-')}: expected a UTF-8 text file, got {path}: {why}")
    return texts or None


def _device(args) -> torch.device:
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        why = str(error).splitlines()[0]
        args.error(f"--device: expected a device that torch sees, got {args.device}: {why}")
    return device


def _load(args):
    """(model, tokenizer) of the folder; nothing is ever downloaded."""
    if not Path(args.model_dir, "config.json").is_file():
        args.error(f"MODEL_DIR: expected a folder with a config.json, got {args.model_dir}")
    device = _device(args)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        args.error('calibrate needs transformers: pip install "flashinfer-lite[hf]"')
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_dir, local_files_only=True)
        dtype = "auto" if args.dtype == "auto" else BY_NAME[args.dtype]
        model = AutoModelForCausalLM.from_pretrained(
            args.model_dir, dtype=dtype, local_files_only=True
        )
        return model.to(device), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        args.error(f"MODEL_DIR: {args.model_dir} could not be loaded: {error}")
