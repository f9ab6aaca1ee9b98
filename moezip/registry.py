"""Names that users type, looked up with a helpful answer when they are mistyped."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moezip.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NoParams:
    """For methods without knobs."""


@dataclass(frozen=True, slots=True)
class Method:
    """One compression method: everything that the program says about it or asks of it.

    Attributes:
        name: what users type.
        family: ``prune``, ``merge`` or ``quantize``.
        summary: one line for tables.
        paper: where the formula comes from.
        needs: names of the recorded statistics that ``run`` reads (see ``moezip.calibrate.record``);
            empty for methods that need no data.
        schedule: ``global`` (observe all layers, then decide) or ``layerwise``.
        params: a frozen dataclass of the knobs that ``--set`` reaches; its docstring explains them.
        run: the method itself; for prune ``run(facts, stats, params) -> float64[E]``, higher is kept.
        weights: names of data-free statistics that are computed from the weights alone.
    """

    name: str
    family: Literal["prune", "merge", "quantize"]
    summary: str
    paper: str
    needs: tuple[str, ...]
    run: Callable[..., Any]
    params: type = NoParams
    schedule: Literal["global", "layerwise"] = "global"
    weights: tuple[str, ...] = ()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean X? `` or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def lookup(name: str, entries: Mapping[str, T], kind: str) -> T:
    """The entry called ``name``.

    Raises:
        UsageError: no such entry; the message names the nearest and lists them all.
    """
    if name in entries:
        return entries[name]
    raise UsageError(
        f"unknown {kind} {name!r}",
        next=f"{did_you_mean(name, entries)}available: {', '.join(sorted(entries))}",
    )


def parse_params(method: Method, settings: Mapping[str, str]) -> Any:
    """The method's knobs from ``--set KEY=VALUE`` texts, typed by the defaults of its dataclass.

    Raises:
        UsageError: an unknown key, or a value that does not read as the knob's type.
    """
    fields = {f.name: f for f in dataclasses.fields(method.params)}
    values: dict[str, Any] = {}
    for key, text in settings.items():
        field = lookup(key, fields, f"setting of {method.name}")
        values[key] = _read_value(str(text), type(field.default), f"--set {key}={text}")
    return method.params(**values)


def _read_value(text: str, kind: type, where: str) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() in words:
            return words[text.lower()]
    elif kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    raise UsageError(f"{text!r} does not read as {kind.__name__}", where=where)
