"""Hessians weigh tokens as configured, and average bits are kept over all layers."""

import torch
from configurations import TIMESTEPS, Quantize

from thermo_lib import Calibration
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import linear_names
from thermo_lib.pipeline.weights import input_hessians
from thermo_lib.quant.codes import unpack
from thermo_lib.time_aware.groups import TimeGroups


class TestTransitionHessian:
    """GPTQ whose tokens count by what their error costs in path KL."""

    def test_weights_of_one_are_the_uniform_hessian(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        names, groups = linear_names(tiny.model)[:2], TimeGroups(TIMESTEPS, 2)
        ones = {name: [torch.ones(part.ids.shape) for part in calibration.parts] for name in names}
        uniform = input_hessians(tiny, calibration, names, groups)
        weighted = input_hessians(tiny, calibration, names, groups, ones)
        for name in names:
            assert torch.equal(uniform[name], weighted[name])

    def test_each_token_counts_by_its_weight(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        name = linear_names(tiny.model)[0]
        (part,) = calibration.parts
        with torch.no_grad():
            x = tiny.model.model.layers[0].input_layernorm(tiny.model.model.embed_tokens(part.ids)).double()
        weight = torch.rand(part.ids.shape, generator=torch.Generator().manual_seed(0))
        expected = torch.einsum("sl,sli,slj->ij", weight.double(), x, x)
        found = input_hessians(tiny, calibration, [name], TimeGroups(TIMESTEPS, 1), {name: [weight]})
        torch.testing.assert_close(found[name][0], expected, rtol=1e-4, atol=1e-4)

    def test_it_changes_the_codes(self, quantized: Quantize) -> None:
        layers = [quantized(quantizer="gptq", hessian=h).quantized_layers() for h in ("uniform", "transition")]
        assert any(not torch.equal(layers[0][name].packed, layers[1][name].packed) for name in layers[0])


def test_average_bits_are_kept_over_all_layers_and_differ_between_them(quantized: Quantize) -> None:
    layers = quantized(quantizer="trellis", average_bits=2.3).quantized_layers()
    column_bits = {name: unpack(layer.packed_column_bits, 4, layer.in_features) for name, layer in layers.items()}
    spent = sum(layers[name].out_features * int(counts.sum()) for name, counts in column_bits.items())
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert 2.29 < spent / weights <= 2.3
    assert len({float(counts.float().mean()) for counts in column_bits.values()}) > 3
