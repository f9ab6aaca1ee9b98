"""Names that users type, looked up with a helpful answer when they are mistyped."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
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
        family: ``prune``, ``merge``, ``quantize``, or ``profile`` for what is measured and reported alone.
        summary: one line for tables.
        paper: where the formula comes from.
        needs: names of the recorded statistics that ``run`` reads (see ``moezip.calibrate.record``);
            empty for methods that need no data.
        schedule: ``global`` (observe all layers, then decide) or ``layerwise``.
        params: a frozen dataclass of the knobs that ``--set`` reaches; its docstring explains them.
        run: the method itself; for prune ``run(facts, stats, params) -> float64[E]``, higher is kept.
        comparable: whether scores of different layers are on one scale, so that they may be ranked over the model.
        unit: what is scored and removed: whole experts, or ``neuron``s inside them (then ``run`` gives [E, F]).
        weights: names of data-free statistics that are computed from the weights alone; ``weights(params)`` gives them
            where they depend on the settings.
        records: where the sums depend on the settings: ``records(params)`` gives the
            ``moezip.calibrate.record.Record``s that the method reads, own ones (named by ``record_name``) or standing
            ones; a calibration for this method sums them besides the standing ones. Settings with a ``keep`` get the
            number of experts that are to stay filled in there.
        check: ``check(facts, params)`` raises where a layer is not for this method; asked before any text is read.
        choose: for prune methods that do more than rank: ``choose(facts, stats, keep, protected, params) -> kept ids``
            decides in place of the ranking, with ``stats`` mixed over the domains; ``run``'s scores are then for the
            plan's reader. For merge methods it gives the groups, ``[(dominant expert, member, ...), ...]``, and
            ``protected`` is empty.
        counts: for merge methods that let layers differ: ``counts(facts, stats by layer, total, params)`` gives how
            many experts each layer is left with, as a dict by layer.
        looks: for merge methods: whether with these settings the layers must be looked at again once groups are known.
        factored: for merge methods that store factors: ``factored(facts, params)`` gives their sizes by role.
        solve: for merge methods that do more than the common stages (``moezip.merge.solve``): called in their place.
    """

    name: str
    family: Literal["prune", "merge", "quantize", "profile"]
    summary: str
    paper: str
    needs: tuple[str, ...]
    run: Callable[..., Any]
    params: type = NoParams
    schedule: Literal["global", "layerwise"] = "global"
    unit: Literal["expert", "neuron"] = "expert"
    comparable: bool = False
    weights: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    records: Callable[[Any], tuple[Any, ...]] | None = None
    check: Callable[..., None] | None = None
    choose: Callable[..., list[Any]] | None = None
    counts: Callable[..., dict[int, int]] | None = None
    looks: Callable[[Any], bool] | None = None
    solve: Callable[..., Any] | None = None
    factored: Callable[..., dict[Any, Any]] | None = None

    @property
    def reads_text(self) -> bool:
        """Whether it needs calibration."""
        return bool(self.needs) or self.records is not None or self.schedule == "layerwise"

    @property
    def explanation(self) -> str:
        """What ``moezip methods NAME`` says of it: the docstring of the module that it is in.

        ``run`` may be another method's (``mc-smoe`` groups as ``m-smoe`` does); ``solve`` is its own.
        """
        return inspect.getdoc(inspect.getmodule(self.solve or self.run)) or self.summary

    def reads(self, params: Any) -> tuple[str, ...]:
        """Names of all recorded statistics that ``run`` and ``choose`` read with these settings."""
        own = () if self.records is None else tuple(record.name for record in self.records(params))
        return tuple(dict.fromkeys((*self.needs, *own)))

    def reads_weights(self, params: Any) -> tuple[str, ...]:
        """Names of the data-free statistics that it reads with these settings."""
        return self.weights(params) if callable(self.weights) else self.weights


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
    return read_settings(method.params, settings, method.name)


def read_settings(params: type, settings: Mapping[str, str], of: str) -> Any:
    """A dataclass of knobs from ``--set KEY=VALUE`` texts; ``of`` is what they are settings of. Errors as above."""
    fields = {f.name: f for f in dataclasses.fields(params)}
    values: dict[str, Any] = {}
    for key, text in settings.items():
        field = lookup(key, fields, f"setting of {of}")
        values[key] = _read_value(str(text), type(field.default), f"--set {key}={text}")
    return params(**values)


def record_name(method: str, settings: Mapping[str, bool | int | float | str]) -> str:
    """The name of a record that depends on settings, such as ``tcess:form=fixed,top=8,threshold=0.1``."""

    def shown(value: bool | int | float | str) -> str:
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    return f"{method}:" + ",".join(f"{key}={shown(value)}" for key, value in settings.items())


def own_settings(name: str, methods: Iterable[Method]) -> tuple[Method, Any] | None:
    """Method and settings behind a name like that, or behind the bare name of a method with records of its own.

    Settings that the name leaves out have their defaults. None if the name is neither.

    Raises:
        UsageError: ``METHOD:`` of a method that has no records of its own, or a setting that does not read.
    """
    known = {method.name: method for method in methods if method.records is not None}
    stem, colon, rest = name.partition(":")
    if not colon and name not in known:
        return None
    method = lookup(stem, known, "method with records of its own")
    settings: dict[str, str] = {}
    for text in rest.split(",") if rest else ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} is no setting", where=f"--record {name}", next="write METHOD:KEY=VALUE,...")
        settings[key] = value
    return method, parse_params(method, settings)


def own_records(name: str, methods: Iterable[Method]) -> tuple[Any, ...] | None:
    """The records behind such a name; None and errors as of ``own_settings``."""
    found = own_settings(name, methods)
    if found is None:
        return None
    method, params = found
    assert method.records is not None
    return method.records(params)


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
