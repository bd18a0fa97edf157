"""Tiny models and settings that the tests share; nothing here is read from the trained reference model."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Its import otherwise starts two processes that import torch and build ahead what is built at its first use anyway.
os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from small_runs import Run, small_calibration, small_overhead, small_suite
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thermo_lib import __main__ as command_line
from thermo_lib import commands, compare
from thermo_lib.data import corpus
from thermo_lib.data.corpus import train_tokenizer
from thermo_lib.data.puzzles import MASK, SPECIAL_TOKENS
from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.models.lm import DiffusionLM, build_reference, save_model

settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

TEXTS = ["def f(x):\n    return x + 1\n", "for i in range(10):\n    print(i, 2 * i)\n", "class A:\n    pass\n"] * 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TIMESTEPS = 6


def pytest_collection_finish() -> None:
    """Keep what was imported out of the search for garbage, which otherwise takes a third of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are faster on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Nothing waits for the disk, which would take minutes in all; tests of power cuts set another ``os.fsync``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """About 290 tokens: the special ones, the bytes and a few merges."""
    return train_tokenizer(iter(TEXTS), 300)


@pytest.fixture(scope="session")
def build_tiny(tokenizer: Tokenizer) -> Callable[..., DiffusionLM]:
    """Builds a model from a seed, with two layers of width 32 or other sizes; its weights are large, so that its logits
    differ."""

    def build(seed: int = 0, **sizes: int) -> DiffusionLM:
        mask_token_id = tokenizer.token_to_id(MASK)
        model = build_reference(tokenizer.get_vocab_size(), mask_token_id, SIZES | sizes, seed)
        model.eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(8)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
        model.lm_head.weight.mul_(3)
        return DiffusionLM(model, tokenizer, mask_token_id, "tiny")

    return build


@pytest.fixture(scope="session")
def tiny(build_tiny: Callable[[int], DiffusionLM]) -> DiffusionLM:
    """The tiny model that most tests use; they don't change it."""
    return build_tiny(0)


@pytest.fixture(scope="session")
def random_ids(tokenizer: Tokenizer) -> Callable[..., torch.Tensor]:
    """Makes token ids without special tokens, from a shape and a seed."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(SPECIAL_TOKENS), tokenizer.get_vocab_size(), shape, generator=generator)

    return make


@pytest.fixture(scope="session")
def calibration(tiny: DiffusionLM, random_ids: Callable[..., torch.Tensor]) -> Calibration:
    """Six sequences of 16 tokens on their trajectories of 6 timesteps."""
    batches = [(random_ids(6, 16), None)]
    return calibrate(tiny, batches, timesteps=TIMESTEPS, source="trajectory", seed=0, progress=False)


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts one file of sixty functions, named after the split, in the place of each split of the training code."""

    def load(split: str, packages: Mapping[str, str] | None = None) -> dict[str, str]:
        return {f"{split}.py": "".join(f"def {split}_{i}(x):\n    return x + {i}\n" for i in range(60))}

    monkeypatch.setattr(corpus, "load_corpus", load)


@pytest.fixture(scope="module")
def folder(
    build_tiny: Callable[[int], DiffusionLM], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved model that often guesses a space, so that some of its guesses are right."""
    lm = build_tiny(0)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    lm.model.model.embed_tokens.weight += 0.5 * direction
    lm.model.lm_head.weight[tokenizer.token_to_id("Ġ")] += direction
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(lm, path)
    return path


class _OneDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and x.ndim]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2, f"{func} of tensors on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_device() -> AbstractContextManager[None]:
    """Refuses tensors of several devices in one operation, as a GPU would; numbers may come from anywhere."""
    return _OneDevice()


@pytest.fixture
def run(
    small_corpus: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Run:
    """Runs a command in an empty folder on little data; gives exit status, stdout and stderr."""
    monkeypatch.setattr(commands, "calibrate", small_calibration)
    monkeypatch.setattr(commands, "build_suite", small_suite)
    monkeypatch.setattr(commands, "smoothing_overhead", small_overhead)
    monkeypatch.setattr(commands, "reproducible", lambda: None)  # it has tests of its own
    monkeypatch.setattr(compare, "reproducible", lambda: None)  # or all later tests would have its threads and kernels
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def command(*arguments: object) -> tuple[int, str, str]:
        status = command_line.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command
