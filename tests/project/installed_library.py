"""What ``test_wheel.py`` runs in an empty folder with the installed library: quantize, save, load, generate.

Prints one line of JSON. Needs the library's own dependencies only.
"""

import json
from pathlib import Path

import torch
import transformers

import thermo_lib
from thermo_lib.diffusion.states import calibration_batches

TIMESTEPS = 4
torch.set_num_threads(1)
found: dict[str, object] = {
    "file": thermo_lib.__file__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}

config = thermo_lib.ThermoConfig()
found["default"] = config == thermo_lib.ThermoConfig.from_dict(config.to_dict())

lm = thermo_lib.load_model()
ids = lm.tokenizer.encode("def add(a, b):\n    return", add_special_tokens=False).ids
ids = torch.tensor([ids + [lm.mask_token_id] * 8])
masked = ids == lm.mask_token_id


def log_probabilities(model: thermo_lib.models.lm.DiffusionLM) -> torch.Tensor:
    model.set_timestep(1, TIMESTEPS)
    return model.logits(ids, masked).log_softmax(-1)


def kl(model: thermo_lib.models.lm.DiffusionLM) -> float:
    """Mean KL divergence of the model's predictions from those in full precision, in nats a token."""
    return torch.nn.functional.kl_div(
        log_probabilities(model), log_probabilities(lm), log_target=True, reduction="batchmean"
    ).item()


data_free = thermo_lib.quantize(lm, "fast")
found["data_free"] = kl(data_free)

calibration = thermo_lib.calibrate(
    lm, calibration_batches(lm, sequences=2, puzzles=1), timesteps=TIMESTEPS, progress=False
)
found["states"] = sum(len(part.timestep) for part in calibration.parts)
quantized = thermo_lib.quantize(lm, thermo_lib.ThermoConfig.preset("gptq", timesteps=TIMESTEPS), calibration)
found["gptq"] = kl(quantized)

folder = Path("quantized")
thermo_lib.save_quantized(quantized, folder)
loaded = thermo_lib.load_quantized(folder)
found["loaded_is_the_same"] = torch.equal(log_probabilities(loaded), log_probabilities(quantized))

model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
found["auto_model"] = type(model).__name__
text = thermo_lib.models.lm.DiffusionLM(model, lm.tokenizer, lm.mask_token_id, str(folder))
found["auto_model_is_the_same"] = torch.equal(log_probabilities(text), log_probabilities(quantized))

filled = thermo_lib.generate(loaded, ids, timesteps=TIMESTEPS)
found["prompt_is_kept"] = torch.equal(filled[~masked], ids[~masked])
found["masks_left"] = int((filled == lm.mask_token_id).sum())
print(json.dumps(found))
