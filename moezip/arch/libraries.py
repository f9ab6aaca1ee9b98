"""The first import of torch, transformers and a model's code."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import cache
from typing import Any


def import_model_code(config: Mapping[str, Any]) -> None:
    """Imports what building this model takes, unless it is imported already.

    That makes half a million objects which all stay. Python's collector walks over them again and again on the way,
    finds nothing, and takes a quarter of the time (measured: 1.0 of 4.4 s). So it rests meanwhile, and is told to leave
    them alone ever after. What was garbage before is collected first, or it would stay as well.

    Args:
        config: ``config.json``. A model that transformers does not know is no error here but where it is built.
    """
    for name in config.get("architectures") or ():
        _import(str(name))


@cache
def _import(name: str) -> None:
    running = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        import transformers

        getattr(transformers, name, None)  # imported by being asked for
        gc.freeze()
    finally:
        if running:
            gc.enable()
