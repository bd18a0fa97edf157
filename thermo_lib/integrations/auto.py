"""Make the library known to the Auto classes of ``transformers`` without importing any model.

``import thermo_lib`` registers the configurations only. The models and the quantization method, which take a second to
import, follow when the first configuration is made: ``transformers`` reads it before anything else. Families of
``transformers``' own (BERT and its like) have its configurations, so there the method waits for its first use.
"""

from typing import Any

from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from thermo_lib.models.families import PUBLISHED
from thermo_lib.models.published import Published

METHOD = "thermo"


class Waiting:
    """Stands for the method's configuration until it is needed; without any, ``transformers`` would skip the codes."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What ``ThermoConfig.from_dict`` makes, once models and method are registered."""
        from thermo_lib.pipeline.config import ThermoConfig

        register_models()
        return ThermoConfig.from_dict(config_dict, **kwargs)


def register_models() -> None:
    """Register the models and the quantization method; more than once does nothing more."""
    from thermo_lib.integrations.transformers import register

    register()


def register_configurations() -> None:
    """Register the configurations, and let the first that is made register the rest."""
    Published.on_use = staticmethod(register_models)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Waiting)
    for model_type, architecture in PUBLISHED.items():
        AutoConfig.register(model_type, architecture.config, exist_ok=True)
