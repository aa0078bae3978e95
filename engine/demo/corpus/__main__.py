"""`python -m engine.demo.corpus`: builds the demonstration corpus and prints what is in it."""

from __future__ import annotations

import argparse

from engine.demo.corpus.command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m engine.demo.corpus", description=__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
