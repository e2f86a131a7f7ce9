"""python -m flashinfer_lite doctor"""

import argparse
import sys

from flashinfer_lite._introspect import doctor


def main():
    parser = argparse.ArgumentParser(prog="python -m flashinfer_lite")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, levels, and a self-test of the kernels")
    parser.parse_args()
    sys.exit(0 if doctor() else 1)


if __name__ == "__main__":
    main()
