"""What ``test_wheel.py`` asks the installed library in an empty folder, after README's snippets.

Prints one line of JSON. Needs the library's own dependencies only.
"""

import json

import torch
import transformers

import thermo_lib
from thermo_lib.diffusion.states import Calibration
from thermo_lib.models.lm import DiffusionLM


def look(lm: DiffusionLM, calibration: Calibration, quantized: DiffusionLM, folder: str) -> None:
    """Print what is found.

    Args:
        lm: the embedded model.
        calibration: its states.
        quantized: the model that was quantized with them.
        folder: where it was saved.
    """
    timesteps = calibration.timesteps
    config = thermo_lib.ThermoConfig()
    ids = lm.tokenizer.encode("def add(a, b):\n    return", add_special_tokens=False).ids
    ids = torch.tensor([ids + [lm.mask_token_id] * 8])
    masked = ids == lm.mask_token_id

    def log_probabilities(model: DiffusionLM) -> torch.Tensor:
        model.set_timestep(1, timesteps)
        return model.logits(ids, masked).log_softmax(-1)

    def kl(model: DiffusionLM) -> float:
        """Mean KL divergence of the model's predictions from those in full precision, in nats a token."""
        return torch.nn.functional.kl_div(
            log_probabilities(model), log_probabilities(lm), log_target=True, reduction="batchmean"
        ).item()

    loaded = thermo_lib.load_quantized(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    text = DiffusionLM(model, lm.tokenizer, lm.mask_token_id, folder)
    filled = thermo_lib.generate(loaded, ids, timesteps=timesteps)
    found = {
        "file": thermo_lib.__file__,
        "default": config == thermo_lib.ThermoConfig.from_dict(config.to_dict()),
        "data_free": kl(thermo_lib.quantize(lm, "fast")),
        "states": sum(len(part.timestep) for part in calibration.parts),
        "gptq": kl(quantized),
        "loaded_is_the_same": torch.equal(log_probabilities(loaded), log_probabilities(quantized)),
        "auto_model": type(model).__name__,
        "auto_model_is_the_same": torch.equal(log_probabilities(text), log_probabilities(quantized)),
        "prompt_is_kept": torch.equal(filled[~masked], ids[~masked]),
        "masks_left": int((filled == lm.mask_token_id).sum()),
    }
    print(json.dumps(found))
