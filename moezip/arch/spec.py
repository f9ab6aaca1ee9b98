"""What moezip knows about a model family, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from moezip.arch.layout import Layout
from moezip.arch.mone import KEY, LEAF
from moezip.errors import ArchitectureError

ExpertRole = Literal["gate", "up", "down", "gate_up", "gate_bias", "up_bias", "gate_up_bias", "down_bias"]
Scoring = Literal["softmax", "sigmoid", "sparsemixer"]


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One kind of expert tensor on disk.

    Attributes:
        role: what it is; ``gate_up`` where gate and up share one tensor.
        template: its name, with ``{layer}`` and, where each expert has a tensor of its own, ``{expert}``.
        transposed: stored [in, out] per expert instead of the canonical [out, in].
        interleaved: for ``gate_up``: output channels alternate gate, up, gate, up, ... instead of all gate
            channels, then all up channels.
    """

    role: ExpertRole
    template: str
    transposed: bool = False
    interleaved: bool = False

    @property
    def fused(self) -> bool:
        """All experts of the layer sit in one tensor, along axis 0."""
        return "{expert}" not in self.template


@dataclass(frozen=True, slots=True)
class RouterTensor:
    """A tensor with one entry per expert that must follow the experts (router row, selection bias, ...).

    Attributes:
        template: its name, with ``{layer}``.
        axis: the axis that counts experts.
    """

    template: str
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """What one tensor name of a checkpoint is.

    Attributes:
        kind: ``expert`` (one expert's own tensor), ``fused`` (all experts of a layer), ``router`` (one entry per
            expert), ``constant`` (what stands for an expert of a MoNE checkpoint), ``extra`` (multi-token
            prediction) or ``other``.
        layer: decoder layer, None for ``other`` and ``extra``.
        expert: for ``expert`` and ``constant`` only.
        tensor: the table's entry that claimed it.
        suffix: what follows the templated name: the pieces of a stored quantization (``_scale_inv``, ``_packed``,
            ...), or what stands for its ``weight`` (``qweight``, ...); else empty.
    """

    kind: Literal["expert", "fused", "router", "constant", "extra", "other"]
    layer: int | None = None
    expert: int | None = None
    tensor: ExpertTensor | RouterTensor | None = None
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """All that a method may know of one MoE layer.

    Attributes:
        layer: its index among the decoder layers.
        experts: routed experts E.
        top_k: experts per token k.
        hidden: D. width: F, the experts' inner size.
        groups: number of router groups (1 where the router has none).
        top_groups: groups that a token may use.
        group_rank: how many of a group's experts make its score (2 in DeepSeek-V3, which adds the two best).
        shared: number of shared experts' worth of width, 0 where there are none (for reports).
    """

    layer: int
    experts: int
    top_k: int
    hidden: int
    width: int
    groups: int = 1
    top_groups: int = 1
    group_rank: int = 1
    shared: int = 0


def whole_number(value: Any, key: str) -> int:
    """``value`` as an int. Raises ArchitectureError where it is a list, a text, a fraction, ..."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArchitectureError(
            f"config.json says {key} = {value!r}, which is not a whole number",
            next="a list means that layers differ, which moezip cannot read yet; else correct the file",
        )
    return value


# Pieces that a stored quantization hangs on a tensor's name (DeepSeek fp8 blocks; gpt-oss mxfp4).
STORED_SUFFIXES = ("_scale_inv", "_blocks", "_scales")
# The same of packed codes, which no router can be stored as: its entries could not be taken apart.
PACKED_SUFFIXES = ("_packed", "_scale", "_scale_step", "_zero_point", "_shape", "_g_idx")
# The same of a matrix that is stored as factors.
FACTOR_SUFFIXES = ("_left", "_right", "_rows", "_rows_index")
# What GPTQ checkpoints have in place of ``weight``.
GPTQ_NAMES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Architecture:
    """One model family. One entry of ``moezip.arch.families`` = one architecture, and nothing else to edit.

    Attributes:
        name: the ``model_type`` of its config.
        experts: the expert tensors on disk, plain form.
        router: tensors with one entry per expert; the first is the router's weight.
        count_keys: config keys that hold the number of experts, the hub's name first, then the aliases that some
            loader reads instead; every one is written, and those present must agree.
        top_k_key: config key of the number of experts per token.
        width_key: config key of the experts' inner size F.
        moe_layers: which decoder layers have experts; a function of the config, in ascending order.
        block: name of the MoE block inside a decoder layer, in memory.
        experts_module, router_module: names inside the block, in memory.
        norm: name, inside the decoder layer, of the norm that feeds the block. The input of that norm is the
            residual stream h of EASY-EP.
        residual_scale_key: config key of a factor on the block's output as it joins the residual stream.
        layers: name of the list of decoder layers, in memory and on disk.
        layers_key: config key of the number of decoder layers.
        hidden_key: config key of D.
        scoring: how logits become scores, for reports and ``gates_independent``; routing itself is always the
            model's own.
        gate_norm: whether the gates of the chosen k are divided by their sum: always, never, or as the config key of
            this name says.
        group_keys: config keys of (number of groups, groups kept per token), empty without groups.
        group_when: (config key, value) without which the group keys are there but mean nothing.
        group_rank: see LayerFacts.
        shared_key: config key that says how many shared experts there are, for reports.
        shared_is_width: ``shared_key`` gives their whole inner width instead of their number.
        width_is_dense_too: ``width_key`` is also the size of dense layers' MLPs, which stay as they are.
        shared_modules: what sits in the block beside router and experts (shared experts and their gate), the same
            names in memory and on disk.
        extra_prefixes: name prefixes of multi-token-prediction layers, ``{layers}`` = number of decoder layers: such
            a prefix stands for that layer and all later ones.
        extra_count_keys: config keys that count those layers; 0 once they are dropped.
        config_defaults: values for keys that old configs leave out.
        published: how the family publishes its experts, where ``experts`` says how moezip's own format splits them
            (see ``split``); else empty.
        notes: limits worth saying in the table.
    """

    name: str
    experts: tuple[ExpertTensor, ...]
    router: tuple[RouterTensor, ...]
    count_keys: tuple[str, ...]
    moe_layers: Callable[[Mapping[str, Any]], list[int]]
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    block: str = "mlp"
    experts_module: str = "experts"
    router_module: str = "gate"
    norm: str = "post_attention_layernorm"
    residual_scale_key: str | None = None
    layers: str = "model.layers"
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    scoring: Scoring = "softmax"
    gate_norm: bool | str = True
    group_keys: tuple[str, str] | tuple[()] = ()
    group_when: tuple[str, str] | tuple[()] = ()
    group_rank: int = 1
    shared_key: str | None = None
    shared_is_width: bool = False
    shared_modules: tuple[str, ...] = ()
    width_is_dense_too: bool = False
    extra_prefixes: tuple[str, ...] = ()
    extra_count_keys: tuple[str, ...] = ()
    config_defaults: Mapping[str, Any] | None = None
    published: tuple[ExpertTensor, ...] = ()
    notes: str = ""

    # -- config ---------------------------------------------------------------------------------------------

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        """A config value, or the family's default for it. Raises ArchitectureError if there is neither."""
        if config.get(key) is not None:
            return config[key]
        if self.config_defaults and key in self.config_defaults:
            return self.config_defaults[key]
        raise ArchitectureError(
            f"config.json of a {self.name} model has no {key!r}", next="use the config.json that came with the weights"
        )

    def integer(self, config: Mapping[str, Any], key: str) -> int:
        """A whole number of the config. Raises ArchitectureError where it is missing or something else."""
        return whole_number(self.value(config, key), key)

    def expert_count(self, config: Mapping[str, Any]) -> int:
        """E. Raises ArchitectureError where two count keys disagree or none is there."""
        found = {key: whole_number(config[key], key) for key in self.count_keys if config.get(key) is not None}
        if not found and self.config_defaults:
            found = {key: int(value) for key, value in self.config_defaults.items() if key in self.count_keys}
        if not found:
            raise ArchitectureError(
                f"config.json has none of {', '.join(self.count_keys)}, so the number of experts is unknown",
                next="use the config.json that came with the weights",
            )
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{key} = {value}" for key, value in found.items())
            raise ArchitectureError(
                f"config.json gives two different numbers of experts: {listed}",
                next="loaders would take one of them at random; correct the file",
            )
        return next(iter(found.values()))

    def groups(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """(number of router groups, groups that a token may use); (1, 1) where the router has none."""
        if not self.group_keys or (self.group_when and config.get(self.group_when[0]) != self.group_when[1]):
            return 1, 1
        total, used = (whole_number(config.get(key) or 1, key) for key in self.group_keys)
        return total, used

    def gates_renormalised(self, config: Mapping[str, Any]) -> bool:
        """Whether a token's k gates are divided by their sum."""
        return bool(self.value(config, self.gate_norm)) if isinstance(self.gate_norm, str) else self.gate_norm

    def gates_independent(self, config: Mapping[str, Any]) -> bool:
        """Whether taking away an expert that a token did not choose leaves the gates of that token as they are.

        So it is where every expert is scored by itself (sigmoid) or the softmax's denominator cancels (renormalised).
        Not so with groups, whose choice depends on every member, nor with phimoe's sparsemixer, whose denominator
        may count experts that were not chosen.
        """
        if self.groups(config)[0] > 1 or self.scoring == "sparsemixer":
            return False
        return self.scoring == "sigmoid" or self.gates_renormalised(config)

    def layer_facts(self, config: Mapping[str, Any]) -> list[LayerFacts]:
        """One LayerFacts per MoE layer, ascending; of a ragged checkpoint each layer's own number and largest width.

        Raises ArchitectureError where the config does not say them, or says what the router cannot work with.
        """
        groups, top_groups = self.groups(config)
        experts, top_k = self.expert_count(config), self.integer(config, self.top_k_key)
        hidden, width = self.integer(config, self.hidden_key), self.integer(config, self.width_key)
        shared = whole_number(config.get(self.shared_key) or 0, self.shared_key) if self.shared_key else 0
        if self.shared_is_width:
            shared = -(-shared // width)
        facts = [
            LayerFacts(
                layer=layer,
                experts=experts,
                top_k=top_k,
                hidden=hidden,
                width=width,
                groups=groups,
                top_groups=top_groups,
                group_rank=self.group_rank if groups > 1 else 1,
                shared=shared,
            )
            for layer in self.moe_layers(config)
        ]
        layout = Layout.of(config)
        return facts if layout is None else layout.facts(facts)

    def with_width(self, config: Mapping[str, Any], width: int) -> dict[str, Any]:
        """The config keys to change for experts of another inner size F.

        Raises:
            ArchitectureError: the key also sizes something else, which would change with it.
        """
        if self.width_is_dense_too:
            raise ArchitectureError(
                f"{self.width_key} of a {self.name} model sizes its dense layers too, so its experts stay as wide",
                next="prune whole experts of this model",
            )
        edits = {self.width_key: width}
        shared = config.get(self.shared_key) if self.shared_key and not self.shared_is_width else None
        if shared:
            assert self.shared_key is not None
            whole = whole_number(shared, self.shared_key) * self.integer(config, self.width_key)
            if whole % width:
                raise ArchitectureError(
                    f"the shared experts are {whole} wide, which is no multiple of {width}: a loader builds them as "
                    f"{self.shared_key} x {self.width_key}",
                    next="keep a number of neurons that divides it",
                )
            edits[self.shared_key] = whole // width
        return edits

    # -- names ----------------------------------------------------------------------------------------------

    @cached_property
    def split(self) -> Architecture:
        """The family as moezip's own format stores it: every expert's gate, up and down are tensors of their own.

        Itself where it is published so. A family with one tensor for all experts gets names that it does not publish,
        ``<experts>.{expert}.gate_proj.weight``, ``up_proj`` and ``down_proj``, all [out, in], and ``.bias`` [out]
        where it has biases.
        """
        if not any(tensor.fused for tensor in self.experts):
            return self
        stem = f"{self.layers}.{{layer}}.{self.disk_block}.{self.experts_module}.{{expert}}"
        biased = any(tensor.role == "down_bias" for tensor in self.experts)
        roles: tuple[ExpertRole, ...] = ("gate", "up", "down")
        biases: tuple[ExpertRole, ...] = ("gate_bias", "up_bias", "down_bias") if biased else ()
        tensors = tuple(ExpertTensor(role, f"{stem}.{role}_proj.weight") for role in roles)
        tensors += tuple(ExpertTensor(role, f"{stem}.{role.removesuffix('_bias')}_proj.bias") for role in biases)
        return replace(self, experts=tensors, published=self.experts)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], ExpertTensor | RouterTensor]]:
        suffix = "(?P<suffix>" + "|".join(STORED_SUFFIXES + PACKED_SUFFIXES + FACTOR_SUFFIXES) + ")?"
        compiled: list[tuple[re.Pattern[str], ExpertTensor | RouterTensor]] = []
        claimants: tuple[ExpertTensor | RouterTensor, ...] = (*self.experts, *self.router)
        for tensor in claimants:
            text = re.escape(tensor.template)
            text = text.replace(re.escape("{layer}"), r"(?P<layer>\d+)").replace(
                re.escape("{expert}"), r"(?P<expert>\d+)"
            )
            text, weight, _ = text.partition(r"\.weight")
            text += rf"\.(?:weight{suffix}|(?P<instead>{'|'.join(GPTQ_NAMES)}))" if weight else suffix
            compiled.append((re.compile(text + r"\Z"), tensor))
        return compiled

    @property
    def disk_block(self) -> str:
        """Name of the MoE block inside a decoder layer on disk (in memory it may differ: ``block``)."""
        return self.router[0].template.split("{layer}.", 1)[1].split(".", 1)[0]

    def _is_extra(self, name: str, config: Mapping[str, Any]) -> bool:
        for prefix in self.extra_prefixes:
            head, numbered, _ = prefix.partition("{layers}")
            if name.startswith(head):
                number = name[len(head) :].split(".", 1)[0]
                if not numbered or (number.isdecimal() and int(number) >= self.integer(config, self.layers_key)):
                    return True
        return False

    def _matched(self, name: str) -> Claim | None:
        for pattern, tensor in self._patterns:
            if match := pattern.match(name):
                layer, suffix = int(match["layer"]), match["suffix"] or match.groupdict().get("instead") or ""
                if isinstance(tensor, RouterTensor):
                    if suffix and suffix not in STORED_SUFFIXES:
                        raise ArchitectureError(
                            f"{name} is a piece of a router that is stored as packed codes",
                            next="start from a checkpoint whose routers are plain numbers",
                        )
                    return Claim("router", layer, None, tensor, suffix)
                if tensor.fused:
                    return Claim("fused", layer, None, tensor, suffix)
                return Claim("expert", layer, int(match["expert"]), tensor, suffix)
        return None

    def claim_extra(self, name: str) -> Claim:
        """What a tensor of a multi-token-prediction layer is inside that layer, which is built like a decoder layer.

        Raises:
            ArchitectureError: it is an expert's, but not in the layout of the decoder layers.
        """
        if found := self._matched(re.sub(r"^mtp\.", "model.", name)):
            return found
        if ".experts." in name:
            raise ArchitectureError(
                f"{name} belongs to a multi-token-prediction layer whose experts moezip cannot follow",
                where=name,
                next="leave these layers out (--set mtp=drop, the default)",
            )
        return Claim("other")

    def claim(self, name: str, config: Mapping[str, Any]) -> Claim:
        """What the tensor called ``name`` is.

        Raises:
            ArchitectureError: the name lies where only experts live, yet no entry of the table claims it; carrying
                it along unseen would leave a hole or a stale tensor in the output.
        """
        if self._is_extra(name, config):
            return Claim("extra")
        if found := self._matched(name):
            return found
        if config.get(KEY) and name.endswith(f".{LEAF}"):
            for tensor in self.experts:
                beside = self._matched(name.removesuffix(LEAF) + tensor.template.partition("{expert}.")[2])
                if beside is not None and beside.kind == "expert":
                    return Claim("constant", beside.layer, beside.expert)
        if ".experts." in name:
            raise ArchitectureError(
                f"the tensor {name} looks like an expert's, but the entry for {self.name} does not claim it",
                where=name,
                next="the checkpoint may use a layout that moezip does not know yet; please report the tensor name",
            )
        return Claim("other")
