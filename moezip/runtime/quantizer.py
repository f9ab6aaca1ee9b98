"""moezip's checkpoint format as a quantization method of transformers.

That is what the library calls the place where a loader may change the modules of an empty model before weights are
read, which is all that ragged and packed checkpoints need. Imported by ``moezip.runtime.hook``, once transformers is
there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moezip.arch.factoring import factoring_of
from moezip.arch.layout import METHOD, STORED, Layout
from moezip.arch.packing import packing_of
from moezip.errors import ArchitectureError, CheckpointError

if TYPE_CHECKING:
    import torch

    from moezip.arch.spec import Architecture


class DecodeBlocks(ConversionOps):
    """fp8 codes with their factors to the numbers that they stand for; other weights as they are."""

    def __init__(self, block: tuple[int, int]):
        self.block = block

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **about: Any
    ) -> dict[str, Any]:
        from moezip.formats.fp8_block import decode

        found = {key.removesuffix("$"): value[0] if isinstance(value, list) else value
                 for key, value in input_dict.items()}  # fmt: skip
        weight, factors = found["weight"], found.get("weight_scale_inv")
        return {about["full_layer_name"]: weight if factors is None else decode(weight, factors, self.block)}


# Key of a config that ``moezip.load`` makes for packed checkpoints of others: the one that they came with.
FOREIGN = "foreign"


class MoezipConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint, as it is: ``moezip.arch.layout``, ``moezip.arch.packing``."""

    def __init__(self, **given: Any):
        self.__dict__.update(given, quant_method=METHOD)

    def to_dict(self) -> dict[str, Any]:
        """What is beside the weights, and is saved beside them again."""
        foreign = self.__dict__.get(FOREIGN)
        return dict(super().to_dict() if foreign is None else foreign)


class MoezipQuantizer(HfQuantizer):
    """Loads ragged and packed checkpoints: makes room for them in the model, checks the files before and after."""

    requires_calibration = True  # it reads checkpoints and makes none
    _dtype: torch.dtype
    _dtypes: dict[str, torch.dtype]
    _skipping: tuple[Architecture, dict[str, Any], Path]

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """
        Raises:
            CheckpointError: there are no files to check, or they are damaged.
            ArchitectureError: files and layout disagree.
        """
        import torch

        from moezip.arch.experts import check_shapes, decoded, packed_grids
        from moezip.arch.families import identify
        from moezip.arch.ragged import RaggedExperts, make_ragged
        from moezip.arch.skeleton import target_dtypes
        from moezip.calibrate.experts import register as register_experts
        from moezip.checkpoint.reader import Checkpoint
        from moezip.runtime.factored import FactoredExperts, make_factored
        from moezip.runtime.linear import PackedExperts
        from moezip.runtime.packing import make_packed, require_filled

        if not checkpoint_files:
            raise CheckpointError(
                "a checkpoint of moezip's format is loaded from its files", next="give from_pretrained a folder"
            )
        # a tensor that is missing would be filled with random numbers, with no more than a warning
        with torch.device("cpu"), Checkpoint.open(Path(checkpoint_files[0]).parent) as checkpoint:  # else it is "meta"
            config, given = checkpoint.config, self.quantization_config.to_dict()
            entry = identify(config, checkpoint.folder)
            self._skipping = entry, config, checkpoint.folder
            layout, grids = Layout.of(config), packed_grids(checkpoint)
            if not _same(config.get("quantization_config"), given):
                raise ArchitectureError(
                    "the quantization_config in use is not the one beside the weights", where=checkpoint.folder,
                    next="load the folder with the config.json that came with the weights",
                )  # fmt: skip
            check_shapes(checkpoint, entry)
            factors = factoring_of(config)
            wired, kind = layout is not None, PackedExperts if grids else FactoredExperts if factors else RaggedExperts
            make_ragged(model, entry, layout or Layout.uniform(entry.layer_facts(config)), wired=wired, kind=kind)
            if grids:
                make_packed(model, entry, decoded(checkpoint), grids)
            if factors:
                make_factored(model, entry, decoded(checkpoint), factors)
            if grids or factors:
                require_filled(model, entry, checkpoint)
        self._dtypes = target_dtypes(model, self._dtype)
        if model.config._experts_implementation != "eager":
            model.config._experts_implementation = register_experts()

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Without those that stack experts; ``model`` is given from transformers 5.21 on."""

        def stacks(conversion: Any) -> bool:
            targets = [str(target).replace("\\", "") for target in conversion.target_patterns]
            return any(target.endswith(("experts.gate_up_proj", "experts.down_proj")) for target in targets)

        kept = [conversion for conversion in weight_conversions if not stacks(conversion)]
        if getattr(self.quantization_config, STORED, None):
            from moezip.formats.fp8_block import block_size

            block = block_size({"quantization_config": self.quantization_config.to_dict()})
            kept.append(WeightConverter(["weight$", "weight_scale_inv$"], "weight", [DecodeBlocks(block)]))
        return kept

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from moezip.arch.ragged import RaggedExperts
        from moezip.runtime import unpacked
        from moezip.runtime.factored import FactoredMatrix
        from moezip.runtime.linear import Packed, PackedExperts
        from moezip.runtime.skipping import attach

        # up to 5.20 transformers leaves what a quantizer loads under another name in the dtype of the file
        for name, tensor in model.state_dict().items():
            if tensor.dtype != self._dtypes.get(name, tensor.dtype):
                owner = model.get_parameter_or_buffer(name)
                owner.data = owner.data.to(self._dtypes[name])
        for name, module in model.named_modules():
            if isinstance(module, RaggedExperts):
                if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
                    raise ArchitectureError(
                        "experts of a ragged or packed checkpoint cannot be offloaded", where=name,
                        next="choose a device_map that keeps every layer on a device, such as device_map=\"cpu\"",
                    )  # fmt: skip
                module.join()
            elif isinstance(module, Packed | FactoredMatrix):
                module.require_sound(name)
        packed = [module for module in model.modules() if isinstance(module, Packed | PackedExperts)]
        for module in packed:
            module.lay_out()
        if packed:
            unpacked.use(model)
        attach(model, *self._skipping)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        if getattr(self.quantization_config, STORED, None):
            raise CheckpointError(
                "the checkpoint stores fp8 codes, which were decoded to load it and are no longer there",
                next="copy the folder that it was loaded from",
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _same(beside: Any, given: dict[str, Any]) -> bool:
    """Whether the config in use tells the layers and codes that the one beside the weights does."""
    if not isinstance(beside, dict) or beside.get("quant_method") != given.get("quant_method"):
        return False
    if given["quant_method"] != METHOD:
        return beside == given
    configs = [{"quantization_config": each} for each in (beside, given)]
    tables: tuple[Callable[[dict[str, Any]], object], ...] = (Layout.of, packing_of, factoring_of)
    return all(table(configs[0]) == table(configs[1]) for table in tables)


def register() -> None:
    """Makes the format known to transformers; again and again if need be."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, MoezipConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, MoezipQuantizer)
