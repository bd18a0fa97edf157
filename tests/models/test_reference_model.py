"""The embedded reference model: small, complete, and good at what it was trained for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from thermo_lib import load_model
from thermo_lib.data.puzzles import MASK, SPECIAL_TOKENS, make_puzzles
from thermo_lib.evaluation.scores import solve_puzzles
from thermo_lib.files.tensors import WEIGHTS_NAME
from thermo_lib.models.architectures import DreamModel
from thermo_lib.models.lm import REFERENCE_DIR, DiffusionLM

LIMIT = 12 * 1000**2


@pytest.fixture(scope="module")
def reference() -> DiffusionLM:
    """The model that is loaded by default."""
    return load_model()


def test_the_folder_holds_the_model_and_its_papers_only() -> None:
    names = {path.name for path in Path(REFERENCE_DIR).iterdir()}
    needed = {"model.safetensors", "config.json", "tokenizer.json"}
    assert needed <= names <= needed | {"training.json", "README.md"}
    assert sum(path.stat().st_size for path in Path(REFERENCE_DIR).iterdir()) < LIMIT


def test_it_is_a_dream_model_of_one_to_five_million_parameters(reference: DiffusionLM) -> None:
    assert type(reference.model) is DreamModel
    assert reference.model.config.model_type == "Dream"
    assert 1e6 <= sum(parameter.numel() for parameter in reference.model.parameters()) <= 5e6


def test_every_width_is_a_multiple_of_256(reference: DiffusionLM) -> None:
    # Of every usual group size, so that no group of the reference model is shorter than the others.
    config = reference.model.config
    assert [w for w in (config.hidden_size, config.intermediate_size, config.vocab_size) if w % 256] == []
    layers = [m for m in reference.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert layers
    assert all(layer.in_features % 256 == layer.out_features % 256 == 0 for layer in layers)


def test_the_weights_are_stored_as_bfloat16_and_used_as_float32(reference: DiffusionLM) -> None:
    with safe_open(REFERENCE_DIR / WEIGHTS_NAME, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in reference.model.parameters()} == {torch.float32}


def test_the_tokenizer_fits_the_model(reference: DiffusionLM) -> None:
    tokenizer = reference.tokenizer
    assert tokenizer.get_vocab_size() == reference.model.config.vocab_size
    assert reference.mask_token_id == tokenizer.token_to_id(MASK)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("2024").tokens == list("2024")
    text = "def f(x):\n    return x\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_it_solves_most_fresh_sudoku_puzzles(reference: DiffusionLM) -> None:
    puzzles = make_puzzles("sudoku", 20, seed=12345, test=True)
    assert solve_puzzles(reference, puzzles, timesteps=16).accuracy > 0.5
