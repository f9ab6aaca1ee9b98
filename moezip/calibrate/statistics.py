"""Statistics: running sums, never means, so that they add up over chunks, files, ranks and resumed runs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezip.calibrate.record import combine_of
from moezip.errors import StatisticsError

Array = npt.NDArray[np.float64]
SCHEMA = 1
LINEAR = "linear"  # stands in place of a layer's number in the file


@dataclass(frozen=True, slots=True)
class Domain:
    """What one ``--data`` path contributed.

    Attributes:
        name: the path's stem, unique inside a Statistics.
        data: fingerprints of the token rows that were summed.
        tokens: how many counted (padding excluded).
        scored: of these, tokens that the loss of a backward pass counts; 0 without one.
        loss: their summed loss in nats.
        layers: per MoE layer, the named sums as float64 arrays (``counts`` [E], ``router_gram`` [E, E], ...).
        linears: of a backward pass: per linear outside the routed experts, by its name on disk, the sum over tokens of
            the squared gradient of every output, [out] float64.
    """

    name: str
    data: tuple[str, ...]
    tokens: int
    layers: Mapping[int, Mapping[str, Array]] = field(default_factory=dict)
    scored: int = 0
    loss: float = 0.0
    linears: Mapping[str, Array] = field(default_factory=dict)

    def __add__(self, other: Domain) -> Domain:
        held, others = ({i: set(named) for i, named in one.layers.items()} for one in (self, other))
        if held != others or set(self.linears) != set(other.linears):
            raise StatisticsError(
                f"the two records of domain {self.name!r} hold different layers or statistics",
                next="calibrate both with the same --record",
            )
        layers = {
            layer: {
                name: np.maximum(sums, other.layers[layer][name])
                if combine_of(name) == "max"
                else sums + other.layers[layer][name]
                for name, sums in named.items()
            }
            for layer, named in self.layers.items()
        }
        return Domain(
            self.name,
            self.data + other.data,
            self.tokens + other.tokens,
            layers,
            self.scored + other.scored,
            self.loss + other.loss,
            {name: sums + other.linears[name] for name, sums in self.linears.items()},
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One decision, priced by a backward pass and then taken and measured, on other text if there was any.

    Attributes:
        layer: where. kind: ``experts`` or ``neurons``. size: how many of them went.
        predicted: the price, nats per token. measured: the rise of the loss.
        error: standard error of ``measured``, tokens taken one by one.
        divergence: KL(model || model without them), nats per token.
        tokens: scored.
    """

    layer: int
    kind: str
    size: int
    predicted: float
    measured: float
    error: float
    divergence: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration passes saw of one checkpoint.

    Attributes:
        source: fingerprint of the checkpoint that was run; statistics of another model are refused.
        domains: one per ``--data`` path; never summed away.
        settings: seq_len, dtype and other choices of the pass, for the reader.
        probes: decisions that were measured after a backward pass.
    """

    source: str
    domains: tuple[Domain, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(domain.tokens for domain in self.domains)

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both passes: domains of equal name are summed, the others stand side by side.

        Probes of both are kept, those that both have once.

        Raises:
            StatisticsError: they are of two different checkpoints.
        """
        if self.source != other.source:
            raise StatisticsError(
                "these statistics are of two different checkpoints and do not add up",
                where=f"fingerprints {self.source[:12]} and {other.source[:12]}",
                next="calibrate both passes on the same checkpoint",
            )
        mine = {domain.name: domain for domain in self.domains}
        for domain in other.domains:
            mine[domain.name] = mine[domain.name] + domain if domain.name in mine else domain
        probes = tuple(dict.fromkeys((*self.probes, *other.probes)))
        return Statistics(self.source, tuple(mine.values()), self.settings, probes)

    def require(self, names: tuple[str, ...], where: object = None, *, layers: Collection[int] = ()) -> None:
        """Raises StatisticsError unless every domain has all ``layers``, and each the statistics called ``names``."""
        if not self.domains:
            raise StatisticsError(
                "the statistics hold no domain", where=where, next="make them again with `moezip calibrate`"
            )
        for domain in self.domains:
            if absent := sorted(set(layers) - set(domain.layers)):
                raise StatisticsError(
                    f"the statistics lack layers {absent} (domain {domain.name})",
                    where=where,
                    next="make them again with `moezip calibrate`",
                )
            for layer, named in domain.layers.items():
                if missing := [name for name in names if name not in named]:
                    raise StatisticsError(
                        f"the statistics lack {', '.join(missing)} (domain {domain.name}, layer {layer})",
                        where=where,
                        next="calibrate again with " + " ".join(f"--record {name}" for name in missing),
                    )

    def require_source(self, fingerprint: str, where: object = None) -> None:
        """Raises StatisticsError if these are statistics of another checkpoint."""
        if self.source != fingerprint:
            raise StatisticsError(
                f"these statistics are of another checkpoint ({self.source[:12]}, not {fingerprint[:12]})",
                where=where,
                next="run `moezip calibrate` on this checkpoint, or name the checkpoint that they were taken from",
            )

    def save(self, path: Path) -> None:
        """Writes a safetensors file (one float64 tensor per domain, layer and name), whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {
            f"{number}/{layer}/{name}": sums
            for number, domain in enumerate(self.domains)
            for layer, named in domain.layers.items()
            for name, sums in named.items()
        }
        for number, domain in enumerate(self.domains):
            tensors.update({f"{number}/{LINEAR}/{name}": sums for name, sums in domain.linears.items()})
        about = {
            "schema": SCHEMA,
            "source": self.source,
            "settings": dict(self.settings),
            "domains": [
                {"name": d.name, "data": list(d.data), "tokens": d.tokens, "scored": d.scored, "loss": d.loss}
                for d in self.domains
            ],
            "probes": [asdict(probe) for probe in self.probes],
        }
        temporary = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, {"moezip": json.dumps(about)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Raises StatisticsError if ``path`` is not a statistics file, or a damaged one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                about = json.loads((file.metadata() or {})["moezip"])
                if about["schema"] != SCHEMA:
                    raise StatisticsError(
                        f"statistics of schema {about['schema']}, this moezip reads {SCHEMA}", where=path,
                        next="calibrate again with this version",
                    )  # fmt: skip
                layers: list[dict[int, dict[str, Array]]] = [{} for _ in about["domains"]]
                linears: list[dict[str, Array]] = [{} for _ in about["domains"]]
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    number, layer, name = key.split("/", 2)
                    if layer == LINEAR:
                        linears[int(number)][name] = file.get_tensor(key)
                    else:
                        layers[int(number)].setdefault(int(layer), {})[name] = file.get_tensor(key)
            domains = tuple(
                Domain(
                    entry["name"],
                    tuple(entry["data"]),
                    int(entry["tokens"]),
                    dict(sorted(layers[i].items())),
                    int(entry.get("scored", 0)),
                    float(entry.get("loss", 0.0)),
                    linears[i],
                )
                for i, entry in enumerate(about["domains"])
            )
            probes = tuple(Probe(**entry) for entry in about.get("probes", ()))
            return cls(str(about["source"]), domains, dict(about["settings"]), probes)
        except FileNotFoundError as fault:
            raise StatisticsError("there is no such statistics file", where=path, next="check --stats") from fault
        except (SafetensorError, OSError, KeyError, ValueError, IndexError, TypeError) as fault:
            raise StatisticsError(
                f"this is no statistics file, or a damaged one ({type(fault).__name__}: {fault})",
                where=path,
                next="make it again with `moezip calibrate`",
            ) from fault
