"""Train the demonstration model on one GPU.

Reads the corpus that `babelephant demo-corpus` builds; the run is seeded, logged and resumable. The shipped checkpoint came
from two runs of 495 s each on one H200.
"""

from engine.demo.training.command import EXAMPLES, add_arguments, run

__all__ = ["EXAMPLES", "add_arguments", "run"]
