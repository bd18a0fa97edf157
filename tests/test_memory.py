"""What a large model would not leave room for is held in parts, elsewhere or not at all, and nothing changes by it."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import DEVICE, MEMORY, OnDevice, PretendedDevice
from torch import Tensor, nn

from thermo_lib import Calibration, ThermoConfig, generate, load_model, optimize_transitions, quantize
from thermo_lib.diffusion.states import calibrate
from thermo_lib.diffusion.tokens import SAMPLERS, sample_tokens
from thermo_lib.models.checks import LateChecks, check_logits
from thermo_lib.models.lm import DiffusionLM, build_reference, save_model
from thermo_lib.models.streamed import HostEmbedding, load_streamed
from thermo_lib.pipeline.parts import GPTQ, Blocks, LeastSquares, PathKL, RoundToNearest, Trellis
from thermo_lib.pipeline.streaming import quantize_checkpoint
from thermo_lib.quant import trellis as search
from thermo_lib.transition import blocks
from thermo_lib.transition.loss import TransitionLoss, token_importance
from thermo_lib.transition.parameters import TrainableWeight

TIMESTEPS = 6
NETWORK = PathKL(what="network", steps=2, batch=4)


@pytest.fixture
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the vocabulary were so large that the logits of three positions are held at a time."""
    monkeypatch.setattr(DiffusionLM, "rows_at_a_time", 3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_texts_from_logits_in_parts(
    tiny: DiffusionLM, sampler: str, request: pytest.FixtureRequest, random_ids: Callable[..., Tensor]
) -> None:
    ids = random_ids(3, 14)
    ids[:, 4:] = tiny.mask_token_id
    how: dict[str, Any] = {"timesteps": 5, "sampler": sampler, "temperature": 0.7, "top_k": 20, "alg_temp": 0.3}
    expected = generate(tiny, ids, **how)
    request.getfixturevalue("three_rows")
    assert torch.equal(generate(tiny, ids, **how), expected)


def test_the_loss_and_its_gradients_in_parts(
    tiny: DiffusionLM, calibration: Calibration, request: pytest.FixtureRequest
) -> None:
    quantized = quantize(tiny, ThermoConfig(timesteps=TIMESTEPS, weights=LeastSquares(group_size=16)))
    layers = quantized.quantized_layers()
    weights = {name: TrainableWeight(layer) for name, layer in layers.items()}
    loss = TransitionLoss(tiny, quantized, TIMESTEPS, {}, weights)
    states = calibration.parts[0][torch.arange(0, 36, 5)]
    head = quantized.model.lm_head.weight.requires_grad_()

    def found() -> list[Tensor]:
        with loss:
            value = loss(states, loss.targets(states))
            grown = torch.autograd.grad(value, [head, *(weight.log_scale for weight in weights.values())])
        return [value.detach(), *grown]

    whole, targets = found(), loss.targets(states)
    request.getfixturevalue("three_rows")
    torch.testing.assert_close(loss.targets(states), targets, rtol=1e-5, atol=1e-6)
    for part, expected in zip(found(), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-5)


def test_what_a_token_counts_in_parts(
    tiny: DiffusionLM, calibration: Calibration, request: pytest.FixtureRequest
) -> None:
    name = "model.layers.0.mlp.down_proj"
    [whole] = token_importance(tiny, calibration, [name], 0)[name]
    assert whole.max() > 0
    request.getfixturevalue("three_rows")
    [parts] = token_importance(tiny, calibration, [name], 0)[name]
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6 * float(whole.max()))


@pytest.mark.parametrize("weights", [GPTQ(group_size=16), Trellis(bits=2.3, beam=2)], ids=str)
def test_codes_that_arent_held_are_unpacked(
    tiny: DiffusionLM, calibration: Calibration, weights: GPTQ | Trellis
) -> None:
    quantized = quantize(tiny, ThermoConfig(timesteps=TIMESTEPS, weights=weights), calibration)
    for layer in quantized.quantized_layers().values():
        held, unpacked = TrainableWeight(layer), TrainableWeight(layer, holds_codes=False)
        assert unpacked.position is None
        assert torch.equal(held(), unpacked())
        assert torch.equal(*(torch.autograd.grad(w().square().sum(), w.log_scale)[0] for w in (held, unpacked)))


def test_training_in_place_is_training_a_copy(tiny: DiffusionLM, calibration: Calibration) -> None:
    start = quantize(tiny, ThermoConfig(timesteps=TIMESTEPS, weights=LeastSquares(group_size=16)))
    before = {name: tensor.clone() for name, tensor in start.model.state_dict().items()}
    how = NETWORK.model_dump(exclude={"phase"})
    copy = optimize_transitions(start, tiny, calibration, **how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.model.state_dict().items())
    changed = optimize_transitions(start, tiny, calibration, in_place=True, **how)
    assert changed.model is start.model
    for name, tensor in changed.model.state_dict().items():
        assert torch.equal(tensor, copy.model.state_dict()[name]), name


@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_that_the_head_doesnt_share_stay_with_the_host(
    tiny: DiffusionLM,
    tmp_path: Path,
    random_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    is_tied: bool,
) -> None:
    tiny = load_copy(tiny, tmp_path, is_tied)
    ids = random_ids(2, 9)
    expected = tiny.model(ids).logits
    with PretendedDevice():
        there = load_streamed(str(tmp_path / "model"), device=DEVICE)
        embedding = there.model.model.embed_tokens
        assert isinstance(embedding, HostEmbedding) != is_tied
        assert isinstance(embedding.weight, OnDevice) == is_tied
        assert there.device == DEVICE
        found = there.model(OnDevice(ids)).logits
        assert isinstance(found, OnDevice)
        if not is_tied:
            looked_up, look_up = [], nn.Embedding.forward
            monkeypatch.setattr(nn.Embedding, "forward", lambda self, x: looked_up.append(x) or look_up(self, x))
            assert embedding(OnDevice(torch.full((3, 50), 7))).shape == (3, 50, tiny.model.config.hidden_size)
            assert [some.tolist() for some in looked_up] == [[7]], "what is moved is one token's"
    torch.testing.assert_close(found.held, expected, rtol=1e-3, atol=1e-3)


def load_copy(lm: DiffusionLM, folder: Path, is_tied: bool) -> DiffusionLM:
    """The model after it was written, its head perhaps tied to the embeddings."""
    if is_tied:
        config = lm.model.config
        sizes = {
            name: getattr(config, name)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        }
        model = build_reference(config.vocab_size, lm.mask_token_id, sizes, 0)
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        lm = DiffusionLM(model.eval(), lm.tokenizer, lm.mask_token_id, "tied")
    save_model(lm, folder / "model", torch.float32)
    return load_model(str(folder / "model"))


@pytest.mark.slow
def test_hidden_states_in_the_hosts_memory(
    folder: Path, random_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ThermoConfig(timesteps=2, weights=RoundToNearest(group_size=16), training=(Blocks(steps=1, batch=2),))
    with PretendedDevice():
        lm = load_streamed(str(folder), device=DEVICE)
        calibration = calibrate(lm, [(random_ids(2, 6), None)], timesteps=2, progress=False)
        device = quantize(lm, config, calibration)
        monkeypatch.setattr(blocks, "_ON_DEVICE", 0)
        stream = blocks.BlockStream(lm, calibration)
        assert not any(isinstance(hidden, OnDevice) for hidden in stream.hidden)
        host = quantize(load_streamed(str(folder), device=DEVICE), config, calibration)
    for name, layer in device.quantized_layers().items():
        found = host.quantized_layers()[name]
        assert all(torch.equal(getattr(layer, key).held, getattr(found, key).held) for key in ("packed", "scale"))


def test_a_gpu_with_room_holds_many_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 2**30, 141 * 2**30))
    homes = [blocks._home(card, size * 2**30).type for size in (1, 2, 29, 31)]
    assert homes == ["cuda", "cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 * 2**30))
    assert [blocks._home(card, size * 2**30).type for size in (2, 3)] == ["cuda", "cpu"]


def test_the_search_for_a_trellis_holds_half_of_what_it_reckons_with() -> None:
    """A GPU's allocator can't use every gap, and an operation may need some memory inside."""
    rows, columns, beam = 128, 256, 16
    weight, hessian = torch.randn(rows, columns), torch.eye(columns, dtype=torch.float64)
    with PretendedDevice():
        there = weight.to(DEVICE), hessian.to(DEVICE)
        MEMORY.start()
        before = MEMORY.now
        search.trellis(*there, torch.full((columns,), 2), columns, 0.01, beam)
    assert MEMORY.peak - before < search._HELD / 2 * rows * beam * columns


def test_checks_that_wait_hold_no_logits() -> None:
    """Those of a step are as large as a model, where it fills many positions."""
    late, logits = LateChecks(), torch.randn(3, 50, dtype=torch.bfloat16)
    alive = [weakref.ref(logits)]
    check_logits(logits, late)
    precise = logits.float()
    alive.append(weakref.ref(precise))
    probabilities = sample_tokens(precise, 1.0, torch.rand(3), late=late)[1]
    alive.append(weakref.ref(probabilities))
    del logits, precise, probabilities
    assert [tensor() for tensor in alive] == [None, None, None]
    late.finish()


@pytest.mark.slow
def test_memory_doesnt_grow_with_the_blocks(
    tiny: DiffusionLM, tmp_path: Path, random_ids: Callable[..., Tensor]
) -> None:
    """A block more takes what its codes and a hidden state for the way back need, not its weights.

    Peaks are counted in all phases of the recipe, with training of the network at its end.
    """
    phases = Blocks(steps=1, batch=2), PathKL(what="network", steps=1, batch=1)
    config = ThermoConfig(timesteps=2, weights=RoundToNearest(group_size=64), training=phases)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    peaks, weights = [], 0
    for count in (2, 3):
        built = build_reference(
            tiny.model.config.vocab_size, tiny.mask_token_id, sizes | {"num_hidden_layers": count}, 0
        )
        lm = DiffusionLM(built.eval(), tiny.tokenizer, tiny.mask_token_id, "wide")
        save_model(lm, tmp_path / str(count))
        states = calibrate(lm, [(random_ids(1, 4), None)], timesteps=2, progress=False)
        MEMORY.start()
        before = MEMORY.now
        with PretendedDevice():
            quantize_checkpoint(tmp_path / str(count), tmp_path / f"{count}q", config, states, device=DEVICE)
        peaks.append(MEMORY.peak - before)
        weights = sum(m.weight.nbytes for m in built.model.layers[0].modules() if isinstance(m, nn.Linear))
    assert peaks[1] - peaks[0] < weights / 3
