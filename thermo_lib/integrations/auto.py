"""Make the library known to the Auto classes of ``transformers`` without importing any model.

``import thermo_lib`` registers the configurations only. The models and the quantization method, which take a second to
import, follow when the first configuration is made: ``transformers`` reads it before anything else.
"""

from transformers import AutoConfig

from thermo_lib.models.families import PUBLISHED, Published


def register_models() -> None:
    """Register the models and the quantization method; more than once does nothing more."""
    from thermo_lib.integrations.transformers import register

    register()


def register_configurations() -> None:
    """Register the configurations, and let the first that is made register the rest."""
    Published.on_use = staticmethod(register_models)
    for model_type, architecture in PUBLISHED.items():
        AutoConfig.register(model_type, architecture.config, exist_ok=True)
