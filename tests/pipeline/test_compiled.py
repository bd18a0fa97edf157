"""A compiled model computes what it did: graphs belong to a shape and, where it matters, to a timestep."""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from configurations import TIMESTEPS, Quantize
from torch import Tensor

from thermo_lib import backend, compile, generate
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.compiled import GraphedPass
from thermo_lib.quant.calls import denoising


class Recorder:
    """Captures a pass as a graph would: what was captured is repeated, into the same memory, on ids of one shape."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, function: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[Tensor], Tensor]:
        self.shapes.append(tuple(ids.shape))
        found = function(ids)

        def replay(other: Tensor) -> Tensor:
            assert other.shape == ids.shape
            return found.copy_(function(other))

        return replay


def graphed(lm: DiffusionLM, most: int = 8) -> tuple[DiffusionLM, Recorder]:
    """A copy of a model whose passes are recorded."""
    found, recorder = copy.deepcopy(lm), Recorder()
    found.model.hidden = GraphedPass(found.model, most, recorder)
    return found, recorder


@torch.no_grad()
def test_passes_are_those_of_the_model(tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> None:
    lm, recorder = graphed(tiny)
    batches = [random_ids(*shape, seed=seed) for seed in range(2) for shape in ((2, 7), (1, 5))]
    found = [lm.model(ids).logits for ids in batches]
    for ids, logits in zip(batches, found, strict=True):
        assert torch.equal(logits, tiny.model(ids).logits), "a later pass overwrites nothing"
    assert recorder.shapes == [(2, 7), (1, 5)]


def test_texts_are_those_of_the_model(tiny: DiffusionLM) -> None:
    lm, recorder = graphed(tiny)
    ids = torch.full((3, 12), tiny.mask_token_id)
    how = {"timesteps": 4, "temperature": 1.0, "seed": 2}
    assert torch.equal(generate(lm, ids, **how), generate(tiny, ids, **how))
    assert recorder.shapes == [(3, 12)]


@torch.no_grad()
def test_a_graph_for_each_timestep_where_weights_depend_on_it(
    quantized: Quantize, random_ids: Callable[..., Tensor]
) -> None:
    for changes, count in (({"num_time_groups": 3}, TIMESTEPS), ({}, 1)):
        lm, recorder = graphed(quantized(**changes))
        plain, ids = quantized(**changes), random_ids(2, 6)
        for _ in range(2):
            for timestep in range(TIMESTEPS):
                for model in (lm, plain):
                    model.set_timestep(timestep, TIMESTEPS)
                assert torch.equal(lm.model(ids).logits, plain.model(ids).logits)
        assert len(recorder.shapes) == count


@torch.no_grad()
def test_rows_at_several_timesteps_are_in_no_graph(quantized: Quantize, random_ids: Callable[..., Tensor]) -> None:
    lm, recorder = graphed(quantized(num_time_groups=3))
    ids, steps = random_ids(2, 6), torch.tensor([0, TIMESTEPS - 1])
    with denoising((0, 1), rows=(steps, TIMESTEPS)):
        found = lm.model(ids).logits
    assert recorder.shapes == []
    for row, step in enumerate(steps.tolist()):
        lm.set_timestep(step, TIMESTEPS)
        torch.testing.assert_close(found[row], lm.model(ids).logits[row])


@torch.no_grad()
def test_the_graph_that_was_used_longest_ago_is_dropped(tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> None:
    lm, recorder = graphed(tiny, most=2)
    for length in (3, 4, 3, 5, 3, 4):
        lm.model(random_ids(1, length))
    assert [shape[1] for shape in recorder.shapes] == [3, 4, 5, 4]
    assert len(lm.model.hidden.graphs) == 2


def test_padding_and_gradients_run_as_before(tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> None:
    lm, recorder = graphed(tiny)
    ids, visible = random_ids(2, 6), torch.arange(6) >= torch.tensor([[0], [2]])
    with torch.no_grad():
        assert torch.equal(lm.model(ids, visible).logits, tiny.model(ids, visible).logits)
    with torch.enable_grad():
        assert torch.equal(lm.model(ids).logits, tiny.model(ids).logits)
    assert recorder.shapes == []


@torch.no_grad()
def test_a_copy_has_graphs_of_its_own(tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> None:
    lm, _ = graphed(tiny)
    ids = random_ids(1, 4)
    before = lm.model(ids).logits
    other = copy.deepcopy(lm)
    other.model.model.embed_tokens.weight.mul_(2)
    assert other.model.hidden.model is other.model
    assert not torch.equal(other.model(ids).logits, before)
    assert torch.equal(lm.model(ids).logits, before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_on_a_cpu_the_linears_are_compiled(quantized: Quantize, tiny: DiffusionLM) -> None:
    lm = copy.deepcopy(quantized())
    compile(lm)
    assert set(backend(lm.model).values()) == {"compiled"}
    assert "hidden" not in vars(lm.model)
    compile(tiny)  # has no quantized linears
    with pytest.raises(ValueError, match="graphs: found 0, allowed are whole numbers from 1"):
        compile(tiny, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_graphs_compute_the_same(quantized: Quantize, random_ids: Callable[..., Tensor]) -> None:
    for changes in ({}, {"num_time_groups": 3}, {"quantizer": "trellis", "average_bits": 2.2}):
        lm = copy.deepcopy(quantized(**changes))
        lm.model.to("cuda", torch.bfloat16)
        batches = [random_ids(2, 16, seed=seed).cuda() for seed in range(3)]
        expected = [lm.model(ids).logits for ids in batches]
        compile(lm)
        for ids, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(lm.model(ids).logits, logits, rtol=0.02, atol=0.25)
        assert len(lm.model.hidden.graphs) == 1
