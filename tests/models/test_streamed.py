"""A model whose blocks are read when they run computes what the whole one does, and holds one block at a time."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoder_layouts import ANY, AnyLayout
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from thermo_lib import calibrate, load_model
from thermo_lib.diffusion.sampling import generate
from thermo_lib.files.snapshots import digest
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.streamed import StreamedLM, hold, keep, load_streamed, release
from thermo_lib.transition.loss import token_importance


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[[AnyLayout], Path]:
    """Writes a checkpoint of a layout."""
    return lambda layout: layout.write(tmp_path / "source", tokenizer)


def loaded(lm: DiffusionLM) -> list[int]:
    """The numbers of the blocks that have weights."""
    return [n for n, block in enumerate(lm.model.blocks) if not any(p.is_meta for p in block.parameters())]


@pytest.fixture
def streamed(folder: Path) -> StreamedLM:
    return load_streamed(str(folder))


@ANY
def test_it_computes_what_the_whole_model_does(write: Callable[[AnyLayout], Path], layout: AnyLayout) -> None:
    source = write(layout)
    whole, found = layout.load(source), load_streamed(str(source), family=layout.family)
    ids = torch.randint(0, whole.model.config.vocab_size - 1, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 4:] = whole.mask_token_id
    at = ids == whole.mask_token_id
    assert torch.equal(found.logits(ids, at), whole.logits(ids, at))
    padding = torch.arange(9) >= torch.tensor([[0], [2], [3]])
    assert torch.equal(found.logits(ids, at, padding), whole.logits(ids, at, padding))
    assert torch.equal(generate(found, ids, timesteps=4, seed=3), generate(whole, ids, timesteps=4, seed=3))
    assert loaded(found) == []


def test_one_block_is_there_at_a_time(streamed: StreamedLM, random_ids: Callable[..., Tensor]) -> None:
    seen = []
    for block in streamed.model.model.layers:
        block.mlp.register_forward_hook(lambda *_: seen.append(loaded(streamed)))
    streamed.model(random_ids(2, 6))
    assert seen == [[number] for number in range(len(streamed.model.model.layers))]


def test_a_block_that_is_held_stays_until_it_is_released(
    streamed: StreamedLM, random_ids: Callable[..., Tensor]
) -> None:
    first, second = streamed.model.model.layers[:2]
    hold(first)
    weight = first.mlp.up_proj.weight
    streamed.model(random_ids(2, 6))
    assert first.mlp.up_proj.weight is weight
    assert loaded(streamed) == [0]
    hold(first)  # a second time changes nothing
    release(first)
    release(second)  # which nobody held
    assert loaded(streamed) == []


def test_a_block_that_is_kept_can_be_changed(streamed: StreamedLM, random_ids: Callable[..., Tensor]) -> None:
    ids = random_ids(2, 6)
    before = streamed.model(ids).logits
    other = copy.deepcopy(streamed.model)
    keep(other.model.layers[0])
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    hold(other.model.layers[0])
    release(other.model.layers[0])
    assert not torch.equal(other(ids).logits, before)
    assert torch.equal(streamed.model(ids).logits, before), "a copy has blocks of its own"
    assert loaded(streamed) == []


def test_a_failure_inside_a_block_drops_its_weights(streamed: StreamedLM, random_ids: Callable[..., Tensor]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    hook = streamed.model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        streamed.model(random_ids(2, 6))
    assert loaded(streamed) == []
    hook.remove()
    streamed.model(random_ids(2, 6))


def test_gradients_are_those_of_the_whole_model(folder: Path, random_ids: Callable[..., Tensor]) -> None:
    whole, found = load_model(str(folder)), load_streamed(str(folder))
    states = calibrate(whole, [(random_ids(3, 8), None)], timesteps=4, progress=False)
    names = ["model.layers.0", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    expected, importance = (token_importance(lm, states, names, seed=0) for lm in (whole, found))
    for name in names:
        assert torch.equal(importance[name][0], expected[name][0])
    assert loaded(found) == []


def test_on_the_way_back_one_block_is_there_at_a_time(folder: Path, random_ids: Callable[..., Tensor]) -> None:
    found = load_streamed(str(folder))
    seen = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        seen.append(loaded(found))

    for block in found.model.model.layers:
        block.mlp.up_proj.register_forward_hook(note)
    embedded = found.model.model.embed_tokens(random_ids(2, 6)).requires_grad_()
    found.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state.sum().backward()
    count = len(found.model.model.layers)
    assert seen == [[number] for number in [*range(count), *reversed(range(count))]]


def test_bad_weights_are_named_when_they_are_read(
    folder: Path, tmp_path: Path, random_ids: Callable[..., Tensor]
) -> None:
    folder = shutil.copytree(folder, tmp_path / "bad")
    path = folder / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    found = load_streamed(str(folder))
    with pytest.raises(ValueError, match=f"tensor {name}: found NaN or infinity"):
        found.model(random_ids(2, 6))
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"missing tensors {name}"):
        load_streamed(str(folder))


def test_its_identity_is_that_of_the_files(folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "copy")
    before = digest(load_streamed(str(folder)).identity())
    assert digest(load_streamed(str(folder)).identity()) == before
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "more": "1"})
    assert digest(load_streamed(str(folder)).identity()) != before
