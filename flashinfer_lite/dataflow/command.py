"""python -m flashinfer_lite tune: measure inflection points, or check those in force."""

import os
import sys
from pathlib import Path

import torch

from flashinfer_lite import _ops
from flashinfer_lite.dataflow import choice, measure, plot, tuning
from flashinfer_lite.dataflow.shapes import model_shapes, parse_shape
from flashinfer_lite.dataflow.table import Table, TableError, device_key

DTYPES = ("bfloat16", "float16", "float32")
DESCRIPTION = """\
Measure gemv, flat_gemm and torch's linear as the rows M of x grow, for each weight [N, K], and save
the M at which the fastest changes: the heuristic dataflow of FlashDecoding++ (arXiv 2311.01282,
section 5). flat_linear(impl="auto") goes by the saved table from then on."""
EPILOG = """\
examples:
  python -m flashinfer_lite tune --model path/to/model --plot curves.png
  python -m flashinfer_lite tune --shapes 576,576 1536,576 --dtype float32 --max-m 16
  python -m flashinfer_lite tune --check        re-measure what the table in force decides

Close other programs first; the table is refused later on another device, with another number of
threads, and after an update of flashinfer_lite or torch."""


def add_parser(commands):
    """Add the command tune."""
    import argparse

    parser = commands.add_parser(
        "tune",
        help="measure which kernel flat_linear uses for which M",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="shapes of this transformers model's config.json")
    add("--shapes", nargs="+", metavar="N,K", help="out_features,in_features of the weights")
    add("--dtype", nargs="+", choices=DTYPES, help="default: the model's, else bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=int, help="default: torch's own number; a table holds for one number")
    add("--max-m", type=int, default=64, metavar="M", help="the most rows, default 64")
    add("--seconds", type=float, default=10.0, help="of timing for each shape and dtype, about")
    add("--output", type=Path, metavar="PATH", help="default: the file that tables are read from")
    add("--plot", type=Path, metavar="PNG", help="draw the curves too")
    add(
        "--check",
        action="store_true",
        help="instead of tuning compare the choice in force with the best of the three; exit "
        f"status 1 below {tuning.ALLOWED} outside the noise. Default shapes: the table's",
    )
    parser.set_defaults(run=run, error=parser.error)


def run(args) -> int:
    """Tune or check; return the exit status."""
    _validate(args)
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return check(args) if args.check else tune(args)
    finally:
        torch.set_num_threads(threads)


def _validate(args):
    for name in ("threads", "max_m"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 4096:
            option = f"--{name.replace('_', '-')}"
            args.error(f"{option}: expected an integer from 1 to 4096, got {value}")
    if not args.seconds > 0:
        args.error(f"--seconds: expected more than 0, got {args.seconds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        args.error(f"--device: expected cpu, for torch {torch.__version__} sees no GPU, got cuda")
    if not _ops.built:
        args.error(_ops.NOT_BUILT)
    if args.check and (args.output or args.plot):
        args.error("--check: expected neither --output nor --plot, for it writes nothing")
    for name in ("output", "plot"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            args.error(f"--{name}: expected a file, got the folder {path}")
    if args.plot:
        if not args.plot.absolute().parent.is_dir():
            args.error(f"--plot: expected a file in a folder that exists, got {args.plot}")
        try:
            plot.require_matplotlib()
        except ModuleNotFoundError as error:
            args.error(f"--plot: {error}")


def work_of(args) -> list[tuple[str, int, int, str]]:
    """[(dtype, N, K, names of the layers)] that the arguments ask for."""
    if not args.model and not args.shapes:
        if not args.check:
            args.error("--model or --shapes: expected one of them, got neither")
        table = choice.in_force(args.device).table
        if table is None:
            args.error("--check: expected --model, --shapes or a table in force, got none")
        wanted = table.entries
        return [(*key, "") for key in wanted if not args.dtype or key[0] in args.dtype]
    shapes, dtype = {}, None
    if args.model:
        try:
            shapes, dtype = model_shapes(args.model)
        except ValueError as error:
            args.error(f"--model: {error}")
    for text in args.shapes or ():
        try:
            shapes.setdefault(parse_shape(text), [])
        except ValueError as error:
            args.error(f"--shapes: {error}")
    own = str(dtype).removeprefix("torch.")
    dtypes = args.dtype or [own if own in DTYPES else "bfloat16"]
    return [(d, *shape, ", ".join(names)) for d in dtypes for shape, names in shapes.items()]


class Bar:
    """tqdm's bar on stderr, where there is tqdm and a terminal; else nothing."""

    def __init__(self, work):
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=len(work), disable=None, unit="shape", leave=False)

    def show(self, title):
        """Name what is being measured."""
        if self.bar is not None:
            self.bar.set_description(title)

    def tick(self, shapes=0):
        """So many shapes more are done."""
        if self.bar is not None:
            self.bar.update(shapes)

    def print(self, lines):
        """Lines of output, above the bar."""
        if self.bar is not None:
            self.bar.clear()
        print("\n".join(lines), flush=True)

    def close(self):
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def _options(args, dtype, bar):
    return {
        "dtype": getattr(torch, dtype),
        "device": torch.device(args.device),
        "max_m": args.max_m,
        "seconds": args.seconds,
        "progress": bar.tick,
    }


def _header(args, work):
    print(f"{device_key(args.device, torch.get_num_threads())}; torch {torch.__version__}")
    print(f"{len(work)} shapes, about {args.seconds:g} s each, cold weights")


def tune(args) -> int:
    """Measure, print and save; return the exit status."""
    work = work_of(args)
    output = args.output or choice.table_path(args.device)
    _header(args, work)
    _say_what_is_replaced(args, output)
    bar, contention = Bar(work), measure.Contention(torch.get_num_threads())
    runs, table = measure.implementations(), Table(device_key(args.device, contention.threads))
    try:
        for dtype, n, k, names in work:
            bar.show(f"{dtype} [{n}, {k}]")
            entry = tuning.tune_shape(runs, n, k, **_options(args, dtype, bar))
            table.entries[dtype, n, k] = entry
            table.contention = contention.text() if args.device == "cpu" else ""
            table.save(output)  # after each, so that an interruption keeps what there is
            bar.tick(1)
            bar.print(entry_lines(dtype, n, k, names, entry))
    except OSError as error:
        print(f"tune: --output: expected a file to write, got {output}: {error}", file=sys.stderr)
        return 2
    finally:
        bar.close()
    _warn_contention(table.contention)
    print(f"saved: {output}")
    if output.absolute() == choice.table_path(args.device).absolute():
        print("in force from the next process on")
    else:
        print(f"to put it in force: export FLASHINFER_LITE_TUNED={output}")
    if args.plot:
        plot.plot(table, args.plot)
        print(f"plot: {args.plot}")
    return 0


def _say_what_is_replaced(args, output):
    if not os.path.exists(output):
        return
    try:
        Table.load(output, device_key(args.device, torch.get_num_threads()))
    except TableError as error:
        if not str(error).startswith("foreign"):
            print(f"replacing {output}: {error}")


def _warn_contention(text):
    if text:
        print(
            f"WARNING: this machine was busy ({text}): threads wait for each other; the points may "
            "be off, measure again when it is quiet"
        )


def entry_lines(dtype, n, k, names, entry) -> list[str]:
    """What tune prints of a shape: the points, and the times in microseconds."""
    title = f"{dtype} [{n}, {k}]" + (f" {names}" if names else "")
    ms = sorted(entry.curves["vendor"])
    few = ": too few, give it more --seconds" if entry.rounds < measure.MIN_ROUNDS else ""
    lines = [
        f"\n{title}: gemv to M1 = {entry.m1}, flat_gemm to M2 = {entry.m2}, then vendor "
        f"({entry.rounds} rounds{few})",
        "  M           " + "".join(f" {m:>7}" for m in ms),
    ]
    for kernel, curve in entry.curves.items():
        micro = [1e6 * curve[m] for m in ms]
        lines.append(f"  {kernel:9} us" + "".join(f" {us:>7.{us < 100:d}f}" for us in micro))
    return lines


def check(args) -> int:
    """Re-measure with the table in force; return 1 if a choice is too slow, outside the noise."""
    work = work_of(args)
    _header(args, work)
    print("\n".join(choice.report()))
    from flashinfer_lite.gemm import flat_linear

    runs = measure.implementations() | {"auto": lambda x, w: flat_linear(x, w)}
    bar, contention = Bar(work), measure.Contention(torch.get_num_threads())
    found: list[tuning.Checked] = []
    try:
        for dtype, n, k, names in work:
            bar.show(f"{dtype} [{n}, {k}]")
            of_shape = list(tuning.check_shape(runs, n, k, **_options(args, dtype, bar)))
            found += of_shape
            bar.tick(1)
            bar.print(check_lines(dtype, n, k, names, of_shape))
    finally:
        bar.close()
    if args.device == "cpu":
        _warn_contention(contention.text())
    worst = min(found, key=lambda one: one.ratio)
    failed = sum(one.failed for one in found)
    mean = tuning.geometric_mean([one.ratio for one in found])
    print(
        f"\nauto/best: geometric mean {mean:.3f}, worst {worst.ratio:.3f} at [{worst.n}, "
        f"{worst.k}] M = {worst.m} ({worst.chosen}, best {worst.best}); "
        f"{failed} of {len(found)} below {tuning.ALLOWED} outside the noise"
    )
    return 1 if failed else 0


def check_lines(dtype, n, k, names, found) -> list[str]:
    """What the check prints of a shape."""
    cells = [
        f"{one.m}: {one.ratio:.3f} {one.chosen}"
        + (f" (best {one.best}{': TOO SLOW' if one.failed else ''})" if one.ratio < 0.97 else "")
        for one in found
    ]
    title = f"{dtype} [{n}, {k}]" + (f" {names}" if names else "")
    worst = min(found, key=lambda one: one.ratio)
    return [f"\n{title}: worst {worst.ratio:.3f} at M = {worst.m}", "  " + ", ".join(cells)]
