"""A tokenizer for random models that are served: the demonstration model's, with a word for every other id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"


def write_stand_in_tokenizer(out_dir: Path, vocab_size: int) -> bool:
    """Write tokenizer.json and tokenizer_config.json for ids below `vocab_size` into `out_dir`. False, and nothing is
    written, where the demonstration model has more.

    Texts become the ids that they are for the demonstration model. Ids beyond its own are words such as `w12032`, which no
    text becomes.
    """
    raw = json.loads((_DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    # in the model's own vocabulary too: `tokenizers` numbers added tokens that it lacks from that one's end on
    vocabulary |= {token["content"]: token["id"] for token in raw["added_tokens"]}
    num_ids = len(vocabulary)
    if num_ids > vocab_size:
        return False
    vocabulary |= {f"▁w{token_id}": token_id for token_id in range(num_ids, vocab_size)}
    (out_dir / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(_DEMO / "tokenizer_config.json", out_dir / "tokenizer_config.json")
    return True
