"""Named configurations, each the best that this project knows for its purpose, as fields of ``ThermoConfig``.

``docs/presets.md`` has what each of them measures on the reference model.
"""

from typing import Any

DEFAULT = "gptq"

_NETWORK = (
    {"phase": "sequential", "states": "fresh"},
    {"phase": "path_kl", "what": "network", "states": "fresh"},
)
_BEST = {"weights": {"method": "trellis", "bits": 2.17}, "training": _NETWORK}

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"weights": {"method": "least_squares"}, "embedding_bits": 8},
    "gptq": {"weights": {"method": "gptq"}},
    "best": _BEST,
    "small": {**_BEST, "weights": {"method": "trellis", "bits": 2.02}},
    "w2a4": {**_BEST, "activations": {"ranges": "dynamic", "bits": 4, "clip": 0.9}},
    "w2a4-static": {
        "weights": {"method": "gptq"},
        "activations": {"ranges": "static", "bits": 4},
        "training": ({"phase": "path_kl"},),
    },
}
