"""Run-time skipping: a token's lesser experts are not run where a rule says that they will hardly be missed.

``config.json`` has the rule, under a key that other loaders do not know and therefore ignore::

    "expert_skipping": {"rule": "odp", "renormalise": true, "protect": 0.02,
                        "thresholds": {"<decoder layer>": [0.0, <of the second>, ..., <of the k-th>], ...}}
    "expert_skipping": {"rule": "otp", "renormalise": true, "layers": [<decoder layer>, ...],
                        "masks": "moezip/skipping.safetensors", "sha256": ...}

Layers that are not listed run all their experts. A rule replaces, before the experts run, the ids of dropped experts by
one that stands for nobody, and sets their gates to 0.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moezip.errors import ArchitectureError, CheckpointError

if TYPE_CHECKING:
    import torch

    from moezip.arch.spec import Architecture
    from moezip.prune.otp import MaskNetwork
    from moezip.runtime.attended import Attended

KEY = "expert_skipping"
MASKS = "moezip/skipping.safetensors"
AGAIN = "write the checkpoint again with `moezip skip`, or use the config.json that came with the weights"
Rule = Literal["naee", "odp", "otp"]


@dataclass(frozen=True, slots=True)
class Skipping:
    """A rule as the config states it.

    Attributes:
        rule: ``naee`` (thresholds), ``odp`` (thresholds, some tokens protected) or ``otp`` (mask networks).
        renormalise: whether the gates that stay are made to add up to what all of a token's gates did.
        thresholds: per layer and rank, the ratio to the token's best gate below which an expert is dropped; of rank 0
            it is 0. Empty for otp.
        protect: share of each window's tokens that keep all, by importance (``moezip.runtime.attended``).
        layers: those with a mask network; empty for the others.
        sha256: of the file of mask networks; None for the others.
    """

    rule: Rule
    renormalise: bool
    thresholds: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    protect: float = 0.0
    layers: tuple[int, ...] = ()
    sha256: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Skipping | None:
        """What a config states, None where it states nothing. Raises ArchitectureError where it is damaged."""
        given = config.get(KEY)
        if given is None:
            return None
        try:
            rule, renormalise, protect = given["rule"], given["renormalise"], float(given.get("protect", 0.0))
            thresholds = {
                int(layer): tuple(float(limit) for limit in row) for layer, row in given.get("thresholds", {}).items()
            }
            layers = tuple(int(layer) for layer in given.get("layers", ()))
            sha256 = given.get("sha256")
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise _corrupt(f"{KEY} cannot be read ({type(fault).__name__}: {fault})") from fault
        if rule not in ("naee", "odp", "otp"):
            raise _corrupt(f"{KEY} names the rule {rule!r}, which this moezip does not know")
        if not isinstance(renormalise, bool) or not 0 <= protect <= 1:
            raise _corrupt(f"{KEY} says renormalise = {renormalise!r}, protect = {protect:g}")
        if any(not row or row[0] != 0 or not all(0 <= limit <= 1 for limit in row) for row in thresholds.values()):
            raise _corrupt(f"{KEY} has thresholds that are not 0 first and between 0 and 1")
        if rule == "otp" and not (layers and isinstance(sha256, str)):
            raise _corrupt(f"{KEY} names no mask networks")
        return cls(rule, renormalise, thresholds, protect, layers, sha256)

    def to_config(self) -> dict[str, Any]:
        """What stands under ``expert_skipping``."""
        found: dict[str, Any] = {"rule": self.rule, "renormalise": self.renormalise}
        if self.rule == "otp":
            return {**found, "layers": list(self.layers), "masks": MASKS, "sha256": self.sha256}
        if self.protect:
            found["protect"] = self.protect
        return {**found, "thresholds": {str(layer): list(row) for layer, row in sorted(self.thresholds.items())}}

    def require_fits(self, architecture: Architecture, config: Mapping[str, Any]) -> None:
        """Raises ArchitectureError if a layer is listed that has no experts, or not one threshold per rank."""
        facts = {fact.layer: fact for fact in architecture.layer_facts(config)}
        for layer in (*self.thresholds, *self.layers):
            if layer not in facts:
                raise _corrupt(f"{KEY} lists layer {layer}, which has no experts")
        for layer, row in self.thresholds.items():
            if len(row) != facts[layer].top_k:
                raise _corrupt(f"{KEY} has {len(row)} thresholds for layer {layer}, whose tokens have "
                               f"{facts[layer].top_k} experts")  # fmt: skip


def _corrupt(what: str) -> ArchitectureError:
    return ArchitectureError(what, where="config.json", next=AGAIN)


# -- mask networks ------------------------------------------------------------------------------------------


def masks_bytes(networks: Mapping[int, MaskNetwork]) -> bytes:
    """The file of mask networks by decoder layer: ``<layer>.inputs`` [k, D], ``.ratios`` [k, k], ``.bias`` [k], F32."""
    from safetensors.torch import save

    tensors = {}
    for layer, network in sorted(networks.items()):
        for name in ("inputs", "ratios", "bias"):
            tensors[f"{layer}.{name}"] = getattr(network, name).float().contiguous()
    return save(tensors)


def masks_of(skipping: Skipping, folder: Path, architecture: Architecture, config: Mapping[str, Any]) -> Any:
    """The mask networks that a config names, by layer; empty for a rule without any.

    Raises:
        CheckpointError: the file is not there, or not the one that the config names.
    """
    if skipping.rule != "otp":
        return {}
    from safetensors.torch import load

    from moezip.prune.otp import MaskNetwork

    path = folder / MASKS
    try:
        raw = path.read_bytes()
    except OSError as fault:
        raise CheckpointError(
            f"the mask networks that {KEY} of config.json names are not there ({fault.strerror})", where=path,
            next="copy the whole folder, or run `moezip skip --rule otp` on this checkpoint again",
        ) from fault  # fmt: skip
    if hashlib.sha256(raw).hexdigest() != skipping.sha256:
        raise CheckpointError("the mask networks are not those that config.json names", where=path, next=AGAIN)
    tensors, facts = load(raw), {fact.layer: fact for fact in architecture.layer_facts(config)}
    found = {}
    for layer in skipping.layers:
        shapes = {"inputs": (facts[layer].top_k, facts[layer].hidden), "ratios": 2 * (facts[layer].top_k,),
                  "bias": (facts[layer].top_k,)}  # fmt: skip
        for name, shape in shapes.items():
            if f"{layer}.{name}" not in tensors or tuple(tensors[f"{layer}.{name}"].shape) != shape:
                raise CheckpointError(f"the mask network of layer {layer} lacks {name} of {list(shape)}", where=path,
                                      next=AGAIN)  # fmt: skip
        found[layer] = MaskNetwork(*(tensors[f"{layer}.{name}"] for name in shapes))
    return found


# -- running ------------------------------------------------------------------------------------------------


class Skips:
    """A rule at work in a model; printed, a sentence.

    Attributes:
        skipping: the rule.
        calls: per decoder layer that has experts, calls that the router asked for so far, padding included.
        dropped: of these, those that were not made.
    """

    def __init__(self, skipping: Skipping):
        self.skipping = skipping
        self.calls: dict[int, int] = {}
        self.dropped: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def share(self) -> float:
        """Of all expert calls, the share that was not made."""
        return sum(self.dropped.values()) / max(sum(self.calls.values()), 1)

    def count(self, layer: int, calls: int, dropped: int) -> None:
        """Adds calls of one layer; micro-batches may run side by side."""
        with self._lock:
            self.calls[layer] = self.calls.get(layer, 0) + calls
            self.dropped[layer] = self.dropped.get(layer, 0) + dropped

    def reset(self) -> None:
        """Counts from 0 again."""
        with self._lock:
            self.calls, self.dropped = {}, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Skips:
        return self  # a copied model counts with the one that it was copied from; locks cannot be copied

    def __str__(self) -> str:
        return f"{self.skipping.rule}: {self.share:.1%} of {sum(self.calls.values()):,} expert calls skipped"


def attach(model: Any, architecture: Architecture, config: Mapping[str, Any], folder: Path) -> Skips | None:
    """Has a model skip as its config says; None where that says nothing.

    The model's experts run by moezip's implementation from now on, which leaves out what is dropped, and where tokens
    are protected its attention tells how much each of them receives.

    Args:
        model: of transformers, its weights loaded or not.
        config: of the checkpoint. folder: where it lies.

    Returns:
        The rule at work, which is ``model.moezip_skipping`` too.

    Raises:
        ArchitectureError: a rule that is damaged or does not fit the model.
        CheckpointError: mask networks that are not there.
    """
    skipping = Skipping.of(config)
    if skipping is None:
        return None
    from moezip.calibrate.experts import register

    skipping.require_fits(architecture, config)
    networks = masks_of(skipping, folder, architecture, config)
    skips = Skips(skipping)
    model.config._experts_implementation = register()
    if skipping.protect:
        from moezip.runtime.attended import use_twins

        use_twins(model)
    for fact in architecture.layer_facts(config):
        layer = model.get_submodule(f"{architecture.layers}.{fact.layer}")
        block = layer.get_submodule(architecture.block)
        attended = None
        if skipping.protect and fact.layer in skipping.thresholds:
            from moezip.runtime.attended import watch

            attended = watch(layer, block)
        chooser = Chooser(skipping, fact.layer, skips, attended, networks.get(fact.layer))
        block.get_submodule(architecture.experts_module).register_forward_pre_hook(chooser)
    model.moezip_skipping = skips
    return skips


class Chooser:
    """Drops experts of one layer, called before they run: a forward pre-hook of the experts module."""

    def __init__(
        self, skipping: Skipping, layer: int, skips: Skips, attended: Attended | None, network: MaskNetwork | None
    ):
        self.skipping, self.layer, self.skips = skipping, layer, skips
        self._attended, self._network = attended, network
        self._limits = skipping.thresholds.get(layer)

    def __call__(self, experts: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, ids, gates, *more = given
        drop = self.dropped(hidden, gates)
        count = 0 if drop is None else int(drop.sum())
        self.skips.count(self.layer, ids.numel(), count)
        if drop is None or not count:
            return None
        nobody = getattr(experts, "nobody", experts.num_experts)
        return hidden, ids.masked_fill(drop, nobody), remaining(gates, drop, self.skipping.renormalise), *more

    def dropped(self, hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor | None:
        """Which of the experts of each token are dropped: [T, k] bool, in the order of the gates; None for none."""
        import torch

        from moezip.calibrate.skips import ranked

        if self._network is not None:
            places, ratios = ranked(gates)
            if self._network.bias.device != hidden.device:
                self._network = self._network.to(hidden.device)
            kept = self._network.kept(hidden, ratios)
            lesser = torch.arange(ratios.shape[1], device=kept.device) >= kept[:, None]
        elif self._limits is not None and any(self._limits):
            places, ratios = ranked(gates)
            lesser = ratios < torch.tensor(self._limits, dtype=ratios.dtype, device=ratios.device)
            received = None if self._attended is None else self._attended.received
            if received is not None:
                from moezip.runtime.attended import important

                lesser &= ~important(received, hidden, self.skipping.protect)[:, None]
        else:
            return None
        return torch.zeros_like(lesser).scatter_(1, places, lesser)


def remaining(gates: torch.Tensor, drop: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """Gates [T, k] with the dropped ones 0; tokens that drop nothing keep theirs to the bit.

    Args:
        drop: [T, k] bool.
        renormalise: the others of a token grow in proportion until they add up to what all did.
    """
    import torch

    left = gates.float().masked_fill(drop, 0.0)
    if renormalise:
        whole, part = gates.float().sum(-1, keepdim=True), left.sum(-1, keepdim=True)
        left = left * torch.where(part != 0, whole / part, torch.ones_like(part))
    return torch.where(drop.any(-1, keepdim=True), left.to(gates.dtype), gates)
