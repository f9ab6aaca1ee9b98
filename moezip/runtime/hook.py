"""Registers moezip's format with transformers once transformers is there, and not before.

``import moezip`` must cost nothing, so it may not import transformers; yet after it ``from_pretrained`` must know the
format, in whichever order the two are imported. The plug-in points of transformers live in one module; what is done
here is done right after that module was executed. This module imports nothing but the standard library.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# The module with the tables of quantization methods; everything that loads models imports it.
AWAITED = "transformers.quantizers.auto"


class _Finder:
    """Finds what the other finders find, and has the awaited module's loader report when it is done."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                _report(spec)
                return spec
        return None


def _report(spec: ModuleSpec) -> None:
    loader = spec.loader
    if loader is None:
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register()

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _register() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    from moezip.runtime.quantizer import register

    register()


def install() -> None:
    """Registers now if transformers is imported, else as soon as it will be. Calling it again changes nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
