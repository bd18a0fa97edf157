"""What ``transformers`` saves of a model takes the place of an earlier one's files together; other files stay."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from thermo_lib.files.tensors import INDEX_NAME, WEIGHTS_NAME
from thermo_lib.files.whole import replacing_together
from thermo_lib.models.tokenization import copy_tokenizer

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


def save_into(folder: str | Path, save: Callable[[Path], object], source: Path | None) -> None:
    """Save a model into a folder, in which the earlier files stay whole until all new ones are complete.

    Args:
        folder: it may hold an earlier model, whose weights and tokenizer go where new ones come.
        save: writes the model's files into the folder that it is given.
        source: the model's own folder, whose tokenizer comes too; None for none.

    Raises:
        ValueError: what ``copy_tokenizer`` raises.
        OSError: no space left, or no right to write.
    """
    target, others = Path(os.path.realpath(folder)), list[Path]()
    with replacing_together(target) as new:
        save(new)
        if source is not None:
            others = copy_tokenizer(source, new, target)
        others += _earlier_weights(target, [path.name for path in new.iterdir()])
    for path in others:
        path.unlink(missing_ok=True)


def _earlier_weights(folder: Path, new: Iterable[str]) -> list[Path]:
    """The weights of an earlier model in a folder, in other files than the new one's."""
    whole = {_SHARD.sub("", name) for name in new if name.endswith(".safetensors")}
    whole |= {INDEX_NAME} if WEIGHTS_NAME in whole else set()
    return [path for path in folder.iterdir() if path.name not in new and _SHARD.sub("", path.name) in whole]
