"""Puts the C++ kernels into the wheel, where there is a compiler; else the wheel is pure Python, and says so.

The library needs neither Python nor torch at build time, so that one wheel serves every version of both. An editable
install gets it into the cache instead, where it would be built on first need anyway.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


def _builder(root: Path) -> ModuleType:
    """``moezip.kernels.build`` by itself: the package's dependencies are not there yet."""
    spec = importlib.util.spec_from_file_location("kernels_build", root / "moezip" / "kernels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernels(BuildHookInterface):
    """A build hook of hatchling."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        builder = _builder(Path(self.root))
        try:
            if version == "editable":
                kept = builder.kept()
                if not kept.exists():
                    builder.build(kept)
                return
            self._folder = tempfile.mkdtemp(prefix="moezip-kernels-")
            library = Path(self._folder) / builder.LIBRARY
            builder.build(library)
        except builder.BuildError as error:
            self.app.display_warning(f"moezip is built without its C++ kernels ({error}); it tries again on first use")
            return
        # Not a manylinux tag: what the library links against has not been audited.
        places = (tag.platform for tag in sys_tags())
        place = next(name for name in places if "manylinux" not in name and "musllinux" not in name)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{place}"
        build_data["force_include"][str(library)] = f"moezip/kernels/{builder.LIBRARY}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if folder := getattr(self, "_folder", None):
            shutil.rmtree(folder, ignore_errors=True)
