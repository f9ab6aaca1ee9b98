"""Calibration windows for peers, cut as moezip cuts them: documents joined with the end-of-text token.

Imports nothing that a peer's environment may lack.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def options(what: str | None) -> argparse.ArgumentParser:
    """The options that every peer's driver has."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="the windows are shared over the files")
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    return parser


def cut(files: list[Path], tokenizer: Any, windows: int, seq_len: int) -> list[list[int]]:
    """``windows`` rows of ``seq_len`` token ids. Raises SystemExit if the text is too short for them."""
    rows: list[list[int]] = []
    for number, file in enumerate(files):
        share = windows * (number + 1) // len(files) - windows * number // len(files)
        ids: list[int] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            if len(ids) >= share * seq_len:
                break
        rows += [ids[i * seq_len : (i + 1) * seq_len] for i in range(share)]
    if {len(row) for row in rows} != {seq_len}:
        raise SystemExit("the text is too short for that many windows")
    return rows
