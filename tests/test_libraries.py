"""The first import of a model's code."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from moezip.arch.libraries import import_model_code

# In a process of its own: here everything is imported already.
CODE = """
import gc, sys
from moezip.arch.libraries import import_model_code
assert "torch" not in sys.modules
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
import_model_code({"architectures": ["Qwen3MoeForCausalLM"]})
print(len(runs), gc.isenabled(), gc.get_freeze_count() > 100_000,
      "transformers.models.qwen3_moe.modeling_qwen3_moe" in sys.modules)
"""


def test_collector_rests_while_model_code_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True", "True", "True"], done.stderr  # one collection: start, stop


def test_second_import_freezes_nothing_more() -> None:
    config = {"architectures": ["Qwen3MoeForCausalLM"]}
    import_model_code(config)
    frozen, kept = gc.get_freeze_count(), [[] for _ in range(10_000)]
    import_model_code(config)
    # objects may leave the frozen ones, but ours did not join them
    assert len(kept) == 10_000 and gc.get_freeze_count() <= frozen


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": ["NoSuchModel"]}])
def test_unknown_model_is_no_error_here(config: dict[str, object]) -> None:
    import_model_code(config)


def test_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        import_model_code({"architectures": ["AnotherUnknownModel"]})
        assert not gc.isenabled()
    finally:
        gc.enable()
