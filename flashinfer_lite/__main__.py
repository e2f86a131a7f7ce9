"""python -m flashinfer_lite COMMAND: a list of commands, each in a module of its own.

A module's `add_parser(commands)` adds its parser and sets two defaults on it: `run`, a function
from the parsed arguments to the exit status, and `error`, the parser's own, with which `run`
refuses an argument that only it can judge: `--name: expected ..., got ...`.
"""

import argparse
import sys

from flashinfer_lite import _introspect, calibrate
from flashinfer_lite.dataflow import command as tune

COMMANDS = (_introspect, tune, calibrate)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status, 2 for wrong arguments."""
    parser = Parser(prog="python -m flashinfer_lite")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
