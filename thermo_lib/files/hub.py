"""Files of a model on the hub, downloaded where they aren't at hand; none of its code."""

from pathlib import Path

TEXTS = ("*.json", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)


def from_hub(name: str, *patterns: str, revision: str | None = None) -> Path:
    """The folder of a hub id.

    Args:
        name: the hub id.
        patterns: of the names of the files that are needed.
        revision: a commit or a branch; None for the newest.

    Raises:
        ConnectionError: no hub id, no such model, or none that can be reached; the text says which, in short.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        kind = type(error).__name__
        raise ConnectionError(f"{kind}; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else kind) from error
