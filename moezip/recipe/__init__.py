"""Recipes: several jobs on one model, as YAML. An unknown key is an error with its line, never ignored.

    version: 1
    model: path/to/checkpoint            # or `demo`, or a hub id
    output: out                          # one folder per job inside
    calibration:
      code: {data: code.jsonl, tokens: 65536}
    jobs:
      half:
        steps:
          - prune: {method: easy-ep, ratio: 0.5, calibration: code}
          - evaluate: {data: heldout/, against: source}
      grid:                              # grid-ratio0.25-reap and three more
        sweep: {ratio: [0.25, 0.5], method: [reap, easy-ep]}
        steps:
          - prune: {calibration: code}
          - evaluate: {data: heldout/, against: source}
      packed:                            # of what another job made
        model: job:half
        steps:
          - quantize: {bits: 4}
          - export: {to: compressed-tensors, for: vllm}

Paths of data and models are relative to the recipe's folder, the output and whatever comes from ``--set`` to the
current one. ``demo`` is the packaged model, ``demo:heldout/python.jsonl`` a file of the packaged text.
"""

from __future__ import annotations

from moezip.recipe.load import dump, find, load
from moezip.recipe.shape import Calibrate, Calibration, Evaluate, Export, Job, Merge, Prune, Quantize, Recipe, Step

__all__ = [
    "Calibrate",
    "Calibration",
    "Evaluate",
    "Export",
    "Job",
    "Merge",
    "Prune",
    "Quantize",
    "Recipe",
    "Step",
    "dump",
    "find",
    "load",
]
