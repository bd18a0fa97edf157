"""Path KL is the KL divergence between two denoising processes: checked against every path of a small one.

The small model has tokens a, b, c and the mask, two positions, and logits that are a random table by state, so that
both processes can be enumerated: a path is the sequence of states from all masks to a text.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from thermo_lib import generate, path_kl
from thermo_lib.diffusion.path_kl import reference_logits
from thermo_lib.diffusion.states import Calibration, States, trajectory_states
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.codes import pack, unpack
from thermo_lib.quant.gptq import gptq
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.transition.chains import Chains
from thermo_lib.transition.loss import token_importance
from thermo_lib.transition.parameters import TrainableWeight

MASK, LENGTH, VOCABULARY = 0, 2, 4
TEXTS = list(itertools.product(range(1, VOCABULARY), repeat=LENGTH))

State = tuple[int, ...]


@dataclass
class ToyLM:
    """A model whose logits depend on the whole state and are read from a table, ``(4, 4, positions, 4)``."""

    table: Tensor
    mask_token_id: int = MASK
    device = torch.device("cpu")
    rows_at_a_time = 3
    writable = torch.arange(1, VOCABULARY)

    @classmethod
    def random(cls, seed: int) -> "ToyLM":
        """A model with logits of standard deviation 1.5."""
        generator = torch.Generator().manual_seed(seed)
        return cls(1.5 * torch.randn((VOCABULARY,) * LENGTH + (LENGTH, VOCABULARY), generator=generator))

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """Nothing depends on the timestep."""

    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """As ``DiffusionLM.logits``: the mask token gets no probability."""
        logits = self.table[ids[:, 0], ids[:, 1]][at].clone()
        logits[:, MASK] = -1e30
        return logits

    @property
    def vocab_size(self) -> int:
        """As ``DiffusionLM.vocab_size``."""
        return VOCABULARY

    def logit_parts(self, ids: Tensor, at: Tensor, attention_mask: None = None, **_: object) -> Iterator[Tensor]:
        """As ``DiffusionLM.logit_parts``; of many rows a quarter is a part."""
        is_asked = at if at.dtype == torch.bool else torch.zeros(ids.numel()).index_fill(0, at, 1).bool().view_as(ids)
        logits = self.logits(ids, is_asked)
        yield from logits.split(max(self.rows_at_a_time, len(logits) // 4))

    def probability(self, state: State, position: int, token: int) -> float:
        """Of a token at a masked position, computed without torch's softmax."""
        exponentials = [math.exp(self.table[state][position, t].item()) for t in range(1, VOCABULARY)]
        return exponentials[token - 1] / sum(exponentials)


def transitions(lm: ToyLM, state: State, rho: float) -> Iterator[tuple[State, float]]:
    """The states that one ancestral step can lead to: each masked position is filled with probability ``rho``."""
    options = []
    for position, token in enumerate(state):
        if token != MASK:
            options.append([(token, 1.0)])
            continue
        filled = [(t, rho * lm.probability(state, position, t)) for t in range(1, VOCABULARY)]
        options.append(filled + ([(MASK, 1 - rho)] if rho < 1 else []))
    for choice in itertools.product(*options):
        yield tuple(token for token, _ in choice), math.prod(p for _, p in choice)


def paths(lm: ToyLM, timesteps: int) -> dict[tuple[State, ...], float]:
    """Every path of the ancestral process, with its probability."""
    found = {((MASK,) * LENGTH,): 1.0}
    for timestep in range(timesteps):
        rho = 1 / (timesteps - timestep)  # 1 - t_{i+1} / t_i with t_i = 1 - i/T
        found = {
            (*path, state): probability * step
            for path, probability in found.items()
            for state, step in transitions(lm, path[-1], rho)
        }
    return found


def text_probabilities(lm: ToyLM, timesteps: int) -> np.ndarray:
    """The distribution of the texts at the end, in the order of ``TEXTS``."""
    totals = dict.fromkeys(TEXTS, 0.0)
    for path, probability in paths(lm, timesteps).items():
        totals[path[-1]] += probability
    return np.array(list(totals.values()))


def states_of(all_paths: list[tuple[State, ...]]) -> States:
    """The states that the steps of some paths start from, as ``trajectory_states`` orders them."""
    timesteps = len(all_paths[0]) - 1
    ids = torch.tensor([path[timestep] for timestep in range(timesteps) for path in all_paths])
    clean = torch.tensor([path[-1] for path in all_paths]).repeat(timesteps, 1)
    return States(ids, ids == MASK, torch.arange(timesteps).repeat_interleave(len(all_paths)), clean)


def exact_kl(p: ToyLM, q: ToyLM, timesteps: int) -> float:
    """``sum over paths of p log(p / q)``, straight from the definition."""
    under_q = paths(q, timesteps)
    return sum(probability * math.log(probability / under_q[path]) for path, probability in paths(p, timesteps).items())


def expected_estimate(p: ToyLM, q: ToyLM, timesteps: int) -> float:
    """The expectation of the estimate of ``path_kl`` over the paths of ``p``."""
    under_p = paths(p, timesteps)
    result = path_kl(p, q, states_of(list(under_p)), timesteps)
    return float((result.per_sequence.sum(1) * torch.tensor(list(under_p.values()), dtype=torch.float64)).sum())


class TestEnumeration:
    """The estimate against the enumerated processes."""

    def test_the_paths_are_a_distribution_and_end_in_texts(self) -> None:
        # Each position is filled at one of the T steps with one of 3 tokens: (3 T)^2 paths.
        for timesteps in (1, 2, 3):
            found = paths(ToyLM.random(0), timesteps)
            assert len(found) == (3 * timesteps) ** 2
            assert sum(found.values()) == pytest.approx(1, abs=1e-12)
            assert all(MASK not in path[-1] for path in found)

    @pytest.mark.parametrize("timesteps", [1, 2, 3])
    @given(seed=st.integers(0, 1000))
    @settings(max_examples=10)
    def test_the_estimate_is_unbiased(self, timesteps: int, seed: int) -> None:
        p, q = ToyLM.random(seed), ToyLM.random(seed + 5000)
        exact = exact_kl(p, q, timesteps)
        assert exact > 0.1
        assert expected_estimate(p, q, timesteps) == pytest.approx(exact, abs=1e-6)

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=8)
    def test_it_bounds_the_change_of_every_event_s_probability(self, seed: int) -> None:
        # Pinsker's inequality, and the text is a function of the path: |p(A) - q(A)| <= sqrt(KL / 2).
        p = ToyLM.random(seed)
        noise = ToyLM.random(seed + 5000).table
        for size in (0.05, 0.3, 1.0):
            q = ToyLM(p.table + size * noise)
            difference = text_probabilities(p, 2) - text_probabilities(q, 2)
            events = np.array(list(itertools.product((0, 1), repeat=len(TEXTS))))
            assert np.abs(events @ difference).max() <= math.sqrt(expected_estimate(p, q, 2) / 2)

    def test_the_sampler_follows_the_enumerated_process(self) -> None:
        lm, count = ToyLM.random(3), 20_000
        texts = generate(
            lm,
            torch.full((count, LENGTH), MASK),
            timesteps=2,
            sampler="origin",
            temperature=1.0,
            batch_size=count,
        )
        number = texts[:, 0] * VOCABULARY + texts[:, 1]
        counts = [int((number == a * VOCABULARY + b).sum()) for a, b in TEXTS]
        assert chisquare(counts, text_probabilities(lm, 2) * count).pvalue > 1e-3

    def test_a_step_counts_only_where_the_models_differ_on_its_states(self) -> None:
        # q differs from p only where nothing is filled yet. At T = 2 that is every first state, and the second state
        # of the paths whose first step fills nothing.
        p = ToyLM.random(0)
        q = ToyLM(p.table.clone())
        q.table[MASK, MASK] = ToyLM.random(1).table[MASK, MASK]
        all_paths = list(paths(p, 2))
        result = path_kl(p, q, states_of(all_paths), 2).per_sequence
        differs = torch.tensor([[path[i] == (MASK, MASK) for i in range(2)] for path in all_paths])
        assert torch.equal(result > 0, differs)
        # The first step fills with half the probability of the last: rho = 1/2 and 1.
        assert torch.equal(result[differs.all(1), 1], 2 * result[differs.all(1), 0])


class TestPathKL:
    """Laws of the estimate on a model's own trajectories."""

    @pytest.fixture(scope="class")
    @classmethod
    def states(cls, tiny: DiffusionLM) -> States:
        """Five trajectories of four steps."""
        return trajectory_states(tiny, torch.full((5, 8), tiny.mask_token_id), None, 4, seed=0)

    def test_a_model_has_no_divergence_from_itself(self, tiny: DiffusionLM, states: States) -> None:
        result = path_kl(tiny, tiny, states, 4)
        assert torch.equal(result.per_sequence, torch.zeros(5, 4, dtype=torch.float64))
        assert result.total == 0
        assert result.mean_cosine == pytest.approx(1, abs=1e-6)

    def test_another_model_diverges_at_every_step(
        self, tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], states: States
    ) -> None:
        result = path_kl(tiny, build_tiny(1), states, 4)
        has_masks = states.is_masked.view(4, 5, 8).any(-1).T
        assert torch.equal(result.per_sequence > 0, has_masks)
        assert torch.equal(result.cosine.isnan(), ~has_masks)
        assert -1 < result.mean_cosine < 0.5
        torch.testing.assert_close(result.per_timestep, result.per_sequence.mean(0))
        assert result.total == pytest.approx(float(result.per_timestep.sum()), rel=1e-12)

    def test_neither_the_batch_size_nor_given_logits_change_it(
        self, tiny: DiffusionLM, build_tiny: Callable[[int], DiffusionLM], states: States
    ) -> None:
        other = build_tiny(1)
        together = path_kl(tiny, other, states, 4)
        for batch_size in (1, 2, 3):
            found = path_kl(tiny, other, states, 4, batch_size=batch_size)
            torch.testing.assert_close(found.per_sequence, together.per_sequence, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.cosine, together.cosine, rtol=1e-4, atol=1e-5, equal_nan=True)
        given_logits = path_kl(tiny, other, states, 4, reference_outputs=reference_logits(tiny, states, 4))
        assert torch.equal(given_logits.per_sequence, together.per_sequence)

    def test_the_cosine_is_that_of_centred_logits_without_the_mask_token(self) -> None:
        p = ToyLM.random(0)
        all_paths = list(paths(p, 2))
        states = states_of(all_paths)
        for q, expected in ((ToyLM(3 * p.table + 7), 1.0), (ToyLM(-p.table), -1.0)):
            assert path_kl(p, q, states, 2).mean_cosine == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        ("timestep", "timesteps"),
        [
            ([0, 0, 1], 2),  # no whole number of sequences
            ([0, 0, 0, 1], 2),  # a sequence without its second state
            ([0, 0, 1, 1], 3),
            ([0, 1, 2, 3], 2),  # steps of another schedule
            ([0, 0], 2),
        ],
    )
    def test_incomplete_states_are_refused(self, timestep: list[int], timesteps: int) -> None:
        ids = torch.full((len(timestep), LENGTH), MASK)
        states = States(ids, ids == MASK, torch.tensor(timestep), ids)
        lm = ToyLM.random(0)
        with pytest.raises(ValueError, match=rf"expected every sequence at each of {timesteps} timesteps"):
            path_kl(lm, lm, states, timesteps)


@dataclass
class ToyLoss:
    """What chains need of the two models."""

    reference: ToyLM
    quantized: ToyLM
    timesteps: int

    def targets(self, states: States) -> Tensor:
        """Of the full-precision model."""
        return self.reference.logits(states.ids, states.is_masked).log_softmax(-1)

    def log_probabilities(self, states: States) -> Tensor:
        """Of the other one."""
        return self.quantized.logits(states.ids, states.is_masked).log_softmax(-1)


class TestChains:
    """Fresh trajectories: the states that the ancestral sampler visits, a step at a time."""

    T, COUNT = 3, 600

    def chains(self, own: int = 0, count: int = COUNT) -> Chains:
        """Chains of two toy models."""
        loss = ToyLoss(ToyLM.random(0), ToyLM.random(1), self.T)
        return Chains(loss, lambda _: torch.full((LENGTH,), MASK), count, own, seed=0)

    def test_they_are_spread_over_the_timesteps_and_start_anew_at_the_end(self) -> None:
        chains = self.chains(count=6)
        for turn in range(2 * self.T):
            states, targets = chains.step()
            assert states.timestep.tolist() == [(step + turn) % self.T for step in (0, 0, 1, 1, 2, 2)]
            assert (states.ids[states.timestep == 0] == MASK).all()
            assert torch.equal(states.is_masked, states.ids == MASK)
            assert torch.equal(targets, chains.loss.targets(states))

    def test_a_token_once_filled_stays_until_the_end(self) -> None:
        chains = self.chains()
        for _ in range(2 * self.T):
            states, _ = chains.step()
            goes_on = states.timestep < self.T - 1
            kept = ~states.is_masked & goes_on[:, None]
            assert torch.equal(chains.ids[kept], states.ids[kept])

    @pytest.mark.parametrize("own", [0, COUNT])
    def test_their_states_are_those_of_the_model_that_takes_the_steps(self, own: int) -> None:
        chains = self.chains(own)
        model = chains.loss.quantized if own else chains.loss.reference
        expected: dict[State, float] = {}
        for path, probability in paths(model, self.T).items():
            expected[path[-2]] = expected.get(path[-2], 0.0) + probability
        seen = dict.fromkeys(expected, 0)
        for _ in range(30):
            states, _ = chains.step()
            for state in states.ids[states.timestep == self.T - 1].tolist():
                seen[tuple(state)] += 1
        total = sum(seen.values())
        assert chisquare(list(seen.values()), [total * p for p in expected.values()]).pvalue > 1e-3

    def test_equal_seeds_give_equal_chains(self) -> None:
        one, other = self.chains(), self.chains()
        for _ in range(self.T):
            assert torch.equal(one.step()[0].ids, other.step()[0].ids)

    def test_no_more_than_all_of_them_take_the_quantized_model_s_steps(self) -> None:
        with pytest.raises(ValueError, match=r"own: found 7, allowed are 0..6"):
            self.chains(own=7, count=6)


class TestTokenImportance:
    """The trace of path KL's Fisher information, token by token."""

    def test_it_is_the_exact_one_on_average(
        self, tiny: DiffusionLM, random_ids: Callable[..., Tensor], build_tiny: Callable[[int], DiffusionLM]
    ) -> None:
        ids = random_ids(2, 5, seed=3)
        is_masked = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
        states = States(ids.masked_fill(is_masked, tiny.mask_token_id), is_masked, torch.tensor([0, 1]), ids)
        many = Calibration((states[torch.arange(2).repeat(40)],), 2, "forward")  # each draws tokens of its own
        name = "model.layers.1.mlp.down_proj"
        total = torch.zeros(ids.shape)
        for seed in range(10):
            total += token_importance(tiny, many, [name], seed)[name][0].view(40, *ids.shape).sum(0)
        exact = torch.zeros(ids.shape)
        rho = (0.5, 1.0)
        for row in range(2):
            outputs: list[Tensor] = []
            hook = tiny.model.get_submodule(name).register_forward_hook(
                lambda _, inputs, output, outputs=outputs: outputs.append(output.requires_grad_())
            )
            with torch.enable_grad():
                hidden = tiny.model.hidden(states.ids[row : row + 1])
                logits = tiny.model.lm_head(hidden[is_masked[row : row + 1]])
                logits[:, tiny.mask_token_id] = -1e30
                log_p = logits.log_softmax(-1)
            hook.remove()
            for position in range(len(log_p)):
                for token in range(log_p.shape[1]):
                    if log_p[position, token] < -12:
                        continue
                    (gradient,) = torch.autograd.grad(log_p[position, token], outputs[0], retain_graph=True)
                    weight = 2 * rho[row] * float(log_p[position, token].detach().exp())
                    exact[row] += weight * gradient[0].square().mean(-1)
        torch.testing.assert_close(total / 400, exact, rtol=0.25, atol=0.02 * float(exact.max()))

    def test_states_without_masks_cost_nothing(self, tiny: DiffusionLM, random_ids: Callable[..., Tensor]) -> None:
        ids = random_ids(2, 5)
        states = States(ids, torch.zeros(ids.shape, dtype=torch.bool), torch.tensor([0, 1]), ids)
        found = token_importance(tiny, Calibration((states,), 2, "forward"), ["model.layers.0"], 0)
        assert not found["model.layers.0"][0].any()

    def test_the_model_stays_as_it_was(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        before = {name: len(module._forward_hooks) for name, module in tiny.model.named_modules()}
        found = token_importance(tiny, calibration, ["model.layers.0"], 0)["model.layers.0"]
        assert [weight.shape for weight in found] == [part.ids.shape for part in calibration.parts]
        assert (found[0] > 0).any()
        assert before == {name: len(module._forward_hooks) for name, module in tiny.model.named_modules()}
        assert not any(p.requires_grad for p in tiny.model.parameters())


class TestTrainableWeight:
    """A quantized weight that can be trained."""

    @pytest.fixture
    @classmethod
    def weight(cls) -> Tensor:
        """Three rows of ten, so that the last group of four is shorter."""
        return torch.randn((3, 10), generator=torch.Generator().manual_seed(0))

    @pytest.fixture
    @classmethod
    def layer(cls, weight: Tensor) -> QuantizedLinear:
        """Two bits by GPTQ, whose codes aren't the nearest."""
        inputs = torch.randn((50, 10), generator=torch.Generator().manual_seed(1)) @ torch.randn((10, 10))
        found = gptq(weight, inputs.T @ inputs, 2, 4, damping=0.01, ridge=0.001)
        layer = QuantizedLinear(10, 3, bits=2, group_size=4, bias=False)
        layer.packed, layer.scale, layer.zero_point = pack(found.codes, 2), found.scale[None], found.zero_point[None]
        return layer

    @pytest.mark.parametrize("codes", [False, True])
    def test_it_starts_as_the_layer_and_is_stored_as_it(
        self, layer: QuantizedLinear, weight: Tensor, codes: bool
    ) -> None:
        trainable = TrainableWeight(layer, weight if codes else None)
        torch.testing.assert_close(trainable(), layer.weight())
        packed = trainable.packed()
        assert torch.equal(packed, layer.packed) if codes else packed is None
        scale, zero_point = trainable.stored()
        torch.testing.assert_close(scale, layer.scale[0], rtol=1e-3, atol=0)
        torch.testing.assert_close(zero_point, layer.zero_point[0])

    def test_a_code_starts_on_the_side_of_its_weight(self, layer: QuantizedLinear, weight: Tensor) -> None:
        trainable = TrainableWeight(layer, weight)
        beyond = weight - layer.weight()
        moved = trainable.position - trainable.codes()
        assert (moved.abs() < 0.5).all()
        clear = beyond.abs() > 1e-3
        assert torch.equal(moved[clear].sign(), beyond[clear].sign())

    def test_gradients_are_those_of_the_dequantized_weight(self, layer: QuantizedLinear, weight: Tensor) -> None:
        trainable = TrainableWeight(layer, weight)
        trainable().sum().backward()
        codes, scale = trainable.codes().detach(), layer.scale[0].float()
        width = torch.tensor([4.0, 4.0, 2.0])
        torch.testing.assert_close(trainable.zero_point.grad, -scale * width)
        sums = torch.stack([part.sum(1) for part in codes.split(4, 1)], 1)
        torch.testing.assert_close(
            trainable.log_scale.grad, scale * (sums - width * layer.zero_point[0].float()), rtol=1e-3, atol=1e-5
        )
        # Straight through the rounding: a code is worth its group's scale.
        torch.testing.assert_close(trainable.position.grad, scale.repeat_interleave(4, 1)[:, :10])

    def test_a_code_that_was_trained_past_the_last_one_stays_it(self, layer: QuantizedLinear, weight: Tensor) -> None:
        trainable = TrainableWeight(layer, weight)
        with torch.no_grad():
            trainable.position += 9
        assert (unpack(trainable.packed(), 2, 10) == 3).all()

    @given(seed=st.integers(0, 10_000))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_the_stored_code_is_the_nearest(self, layer: QuantizedLinear, weight: Tensor, seed: int) -> None:
        trainable = TrainableWeight(layer, weight)
        with torch.no_grad():
            trainable.position.uniform_(-0.4, 3.4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(unpack(trainable.packed(), 2, 10).float(), trainable.position.round().abs())
