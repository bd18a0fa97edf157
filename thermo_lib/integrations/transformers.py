"""The models and quantized folders in ``transformers``' own ``from_pretrained`` and ``save_pretrained``.

``register`` makes the architectures known to the Auto classes, gives them ``generate`` and ``diffusion_generate`` (see
``integrations.generation``), and adds the quantization method ``thermo``:
a quantized folder loads as it is, and ``from_pretrained(folder, quantization_config=ThermoConfig(...))`` quantizes a
full-precision one while it is read, one linear after another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from thermo_lib.files.tensors import check_finite
from thermo_lib.integrations import generation
from thermo_lib.models.architectures import MODELS, MaskPredictor, checkpoint_folder
from thermo_lib.models.families import PUBLISHED, tensor_name
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import (
    QuantizedLM,
    coded_tables,
    head_bias,
    install_dynamic_ranges,
    install_time_norms,
    linear_names,
)
from thermo_lib.pipeline.quantizers import quantizer_of
from thermo_lib.pipeline.storage import check_stored, install, model_tensors, stored_type
from thermo_lib.pipeline.weights import code_tables, quantize_layer
from thermo_lib.quant.time_norms import refresh_time_norms


class _Stored(nn.Module):
    """Holds what is stored of a module until all of it is read.

    Args:
        module: the linear or embeddings whose place it takes.
        stored: name to tensor on the meta device.
    """

    def __init__(self, module: nn.Module, stored: dict[str, Tensor]):
        super().__init__()
        self.replaced = [module]  # in a list, so that it isn't a submodule
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)


class _Quantize(ConversionOps):
    """Puts a quantized layer in the place of a linear whose weight has just been read."""

    def __init__(self, quantizer: "ThermoQuantizer"):
        self.hf_quantizer = quantizer

    def convert(  # type: ignore[override]  # transformers gives all but the first by name
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(weight[0] if isinstance(weight, list) else weight, requires_grad=False)
        quantize_layer(self.hf_quantizer.lm, quantizer_of(self.hf_quantizer.quantization_config), name, None)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class ThermoQuantizer(HfQuantizer):
    """Reads quantized folders, and quantizes full-precision ones without calibration.

    Attributes:
        lm: the model with its configuration and its parameters before smoothing; without a tokenizer.
    """

    quantization_config: ThermoConfig

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse to calibrate.

        Raises:
            ValueError: a configuration that needs calibration, for a model that isn't quantized.
        """
        config = self.quantization_config
        if not self.pre_quantized and config.needs_calibration:
            found = f"found {config.needs_calibration}, which need calibration"
            instead = "use thermo_lib.quantize, or `python -m thermo_lib quantize`, and load the folder"
            raise ValueError(f"quantization_config: {found}; {instead}")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if not isinstance(model, MaskPredictor):
            found = f"model: found {type(model).__name__}"
            if (model_type := model.config.model_type) in MODELS:  # a class of transformers' own, with its Auto classes
                allowed = f"allowed with {model_type!r} is {MODELS[model_type].__name__}"
                instead = f"load_quantized({model.config.name_or_path!r})" if self.pre_quantized else "load_model"
                raise ValueError(f"{found}, {allowed}; thermo_lib.{instead} makes it")
            supported = ", ".join(model.__name__ for model in MODELS.values())
            raise ValueError(f"{found}, supported are {supported}")
        about = model.config.mask_token_id, model.config.name_or_path, self.quantization_config
        self.lm = QuantizedLM(model, None, *about)  # type: ignore[arg-type]  # as in as_lm, which adds the tokenizer
        self.linears = {f"{name}.weight" for name in linear_names(model)}
        self.folder, paths = checkpoint_folder(checkpoint_files, model.config)
        if not self.pre_quantized:
            return
        expected = check_stored(model, self.quantization_config, paths, self.folder)
        install_time_norms(model, self.quantization_config)
        self.coded = sorted(expected.keys() - model.state_dict().keys())
        owners: dict[str, dict[str, Tensor]] = {}
        for name in self.coded:
            owner, _dot, key = name.rpartition(".")
            owners.setdefault(owner, {})[key] = torch.empty_like(expected[name], dtype=stored_type(name))
        for owner, stored in owners.items():
            module = model.get_submodule(owner)
            holder = _Stored(module, stored)
            if getattr(module, "bias", None) is not None:
                holder.bias = module.bias
            model.set_submodule(owner, holder)
        if coded_tables(model, self.quantization_config):
            if (head := model.parts.head) not in owners:  # it shares the embeddings' codes
                holder = _Stored(module := model.get_submodule(head), {})
                if head_bias(model) == f"{head}.bias" and module.bias is not None:
                    holder.bias = module.bias
                model.set_submodule(head, holder)
            model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> MaskPredictor:
        assert isinstance(model, MaskPredictor)  # as was checked before
        refresh_time_norms(model)
        dtype = model.norm.weight.dtype
        for name, tensor in model.state_dict().items():
            check_finite(tensor, tensor_name(model.config, name), self.folder)
        with torch.no_grad():
            if self.pre_quantized:
                self._install(model, dtype)
            else:
                install_dynamic_ranges(self.lm)
                code_tables(self.lm)
        # Layers were made on the CPU, wherever the tensors have been read to.
        return model.requires_grad_(False).to(model.device)

    def _install(self, model: MaskPredictor, dtype: torch.dtype) -> None:
        tensors = dict(model.named_buffers())
        tensors = {name: tensors[name] for name in self.coded}
        for name, holder in list(model.named_modules()):
            if not isinstance(holder, _Stored):
                continue
            if (bias := getattr(holder, "bias", None)) is not None:
                tensors[f"{name}.bias"] = bias
            model.set_submodule(name, holder.replaced[0])
        install(self.lm, tensors, self.folder, dtype)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether it is the weight of a linear in a block."""
        return param_name in self.linears

    def get_quantize_ops(self) -> _Quantize:
        """What quantizes such a weight."""
        return _Quantize(self)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes, by the library's names."""
        return model_tensors(self.lm), {}

    def is_serializable(self) -> bool:
        """True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: gradients end at the codes."""
        return False


def register() -> None:
    """Make the models and the method known to ``transformers``; see ``integrations.auto``."""
    if ThermoConfig.quant_method in AUTO_QUANTIZER_MAPPING:
        return
    AUTO_QUANTIZATION_CONFIG_MAPPING[ThermoConfig.quant_method] = ThermoConfig  # where one may be waiting for it
    register_quantizer(ThermoConfig.quant_method)(ThermoQuantizer)
    MaskPredictor.generate, MaskPredictor.diffusion_generate = generation.generate, generation.diffusion_generate
    for model_type, architecture in PUBLISHED.items():
        for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
            auto.register(architecture.config, MODELS[model_type])
        renamings: list[WeightConverter | WeightRenaming] = [
            WeightRenaming(theirs, ours) for ours, theirs in architecture.tensors.items()
        ]
        register_checkpoint_conversion_mapping(MODELS[model_type].__name__, renamings)
