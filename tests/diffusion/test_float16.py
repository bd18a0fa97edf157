"""Models in float16 and bfloat16: what is computed from their logits is float32, and an overflow is an error."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor

from thermo_lib.diffusion.path_kl import path_kl, reference_logits
from thermo_lib.diffusion.sampling import generate, unmask_probabilities
from thermo_lib.diffusion.states import Calibration, trajectory_states
from thermo_lib.diffusion.tokens import Sampling, sample_tokens
from thermo_lib.evaluation.scores import masked_token_scores
from thermo_lib.integrations.lm_eval import HarnessLM
from thermo_lib.models.checks import check_logits
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.vocabulary import NO_PROBABILITY
from thermo_lib.transition.loss import TransitionLoss, token_importance

HALVES = [torch.float16, torch.bfloat16]
TIMESTEPS = 6  # of the fixture ``calibration``


def cast(lm: DiffusionLM, dtype: torch.dtype) -> DiffusionLM:
    return replace(lm, model=copy.deepcopy(lm.model).to(dtype))


class TestPrecision:
    """What is derived from logits doesn't depend on the range of the model's type."""

    @pytest.mark.parametrize("dtype", HALVES)
    def test_logits_are_those_of_the_model_in_float32(self, tiny: DiffusionLM, random_ids, dtype: torch.dtype) -> None:
        lm, ids = cast(tiny, dtype), random_ids(2, 8)
        found = lm.logits(ids, torch.ones_like(ids, dtype=torch.bool))
        expected = lm.model(ids).logits.flatten(0, 1).float()
        expected[:, lm.mask_token_id] = NO_PROBABILITY
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    def test_float32_logits_are_not_copied(self, tiny: DiffusionLM) -> None:
        logits = torch.randn(3, tiny.vocab_size)
        assert tiny.token_logits(logits).data_ptr() == logits.data_ptr()

    def test_float64_logits_stay_float64(self, tiny: DiffusionLM) -> None:
        assert tiny.token_logits(torch.randn(3, tiny.vocab_size, dtype=torch.float64)).dtype == torch.float64

    @pytest.mark.parametrize("dtype", HALVES)
    def test_path_kl_of_a_model_to_itself_is_zero(
        self, tiny: DiffusionLM, calibration: Calibration, dtype: torch.dtype
    ) -> None:
        lm = cast(tiny, dtype)
        found = path_kl(lm, lm, calibration.parts[0], TIMESTEPS)
        assert found.total == 0
        assert found.mean_cosine == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_path_kl_is_the_sum_of_the_steps_in_double_precision(
        self, tiny: DiffusionLM, build_tiny, calibration: Calibration, dtype: torch.dtype
    ) -> None:
        p, q, states = cast(tiny, dtype), cast(build_tiny(1), dtype), calibration.parts[0]
        keep = torch.arange(tiny.model.config.vocab_size) != tiny.mask_token_id
        with torch.no_grad():
            log_p, log_q = (m.model(states.ids).logits[..., keep].double().log_softmax(-1) for m in (p, q))
        steps = (log_p.exp() * (log_p - log_q)).sum(-1).mul(states.is_masked).sum(1)
        expected = (steps * unmask_probabilities(TIMESTEPS)[states.timestep]).sum() / (len(steps) / TIMESTEPS)
        # The model's products are in batches of another shape, and so rounded otherwise.
        assert path_kl(p, q, states, TIMESTEPS).total == pytest.approx(float(expected), rel=0.02)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_negative_log_likelihoods_are_not_rounded_to_the_models_type(
        self, tiny: DiffusionLM, calibration: Calibration, dtype: torch.dtype
    ) -> None:
        lm, states = cast(tiny, dtype), calibration.parts[0]
        found = masked_token_scores(lm, states, TIMESTEPS)[2]
        (logits,) = reference_logits(lm, states[states.timestep == 0], TIMESTEPS)
        truth = states.clean[states.timestep == 0]
        expected = F.cross_entropy(logits.double(), truth.flatten(), reduction="none").view(truth.shape).sum(1)
        torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_the_transition_loss_of_a_model_to_itself_is_zero(
        self, tiny: DiffusionLM, calibration: Calibration, dtype: torch.dtype
    ) -> None:
        lm, states = cast(tiny, dtype), calibration.parts[0]
        loss = TransitionLoss(lm, lm, TIMESTEPS, {})
        targets = loss.targets(states)
        assert targets.dtype == loss.log_probabilities(states).dtype == torch.float32
        assert float(loss(states, targets)) == 0

    @pytest.mark.parametrize("dtype", HALVES)
    def test_importance_is_near_that_of_the_float32_model(
        self, tiny: DiffusionLM, calibration: Calibration, dtype: torch.dtype
    ) -> None:
        name = "model.layers.0.mlp.down_proj"
        lm, precise = cast(tiny, dtype), cast(cast(tiny, dtype), torch.float32)
        (found,), (expected,) = (token_importance(m, calibration, [name], 0)[name] for m in (lm, precise))
        assert float(found.double().sum() / expected.double().sum()) == pytest.approx(1, abs=0.25)

    def test_tiny_gradients_count(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        """A head that is 1000 times as small makes squared gradients that float16 would round to zero."""
        name, lm = "model.layers.0.mlp.down_proj", cast(tiny, torch.float16)
        lm.model.lm_head.weight.mul_(1e-3)
        (found,) = token_importance(lm, calibration, [name], 0)[name]
        (expected,) = token_importance(cast(lm, torch.float32), calibration, [name], 0)[name]
        assert float(found.double().sum() / expected.double().sum()) == pytest.approx(1, abs=0.25)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_tokens_are_drawn_from_float32_probabilities(self, dtype: torch.dtype) -> None:
        logits = torch.randn(4, 9).to(dtype)
        uniform = torch.rand(4)
        for found, expected in zip(
            sample_tokens(logits, 0.7, uniform, 0.9, 5),
            sample_tokens(logits.float(), 0.7, uniform, 0.9, 5),
            strict=True,
        ):
            assert torch.equal(found, expected)

    def test_hooks_see_float32(self, tiny: DiffusionLM, random_ids) -> None:
        lm, seen = cast(tiny, torch.float16), []

        def look(timestep: int, ids: Tensor, logits: Tensor) -> Tensor:
            seen.append(logits.dtype)
            return logits

        generate(lm, torch.full((1, 4), lm.mask_token_id), timesteps=2, on_logits=look)
        assert seen == [torch.float32] * 2


def overflowing(tiny: DiffusionLM, dtype: torch.dtype) -> DiffusionLM:
    """The model with activations beyond float16, which float32 and bfloat16 hold."""
    lm = cast(tiny, torch.float32)
    mlp = lm.model.model.layers[0].mlp
    mlp.down_proj.weight.mul_(1000)
    mlp.up_proj.weight.mul_(100)
    return cast(lm, dtype)


def work(lm: DiffusionLM, calibration: Calibration) -> dict[str, Callable[[], object]]:
    """All that is computed from a model's logits."""
    ids, states = torch.full((1, 6), lm.mask_token_id), calibration.parts[0]
    harness = HarnessLM.__new__(HarnessLM)  # around this model, instead of one in a folder
    TemplateLM.__init__(harness)
    sampling = vars(Sampling("maskgit_plus", 0.0, None, None, 0.0))
    settings = {"lm": lm, "mc_num": 4, "seed": 0, "steps": 1, "batch_size": 4, "sampling": sampling, "rules": {}}
    vars(harness).update(
        settings, timesteps=None, block_length=None, max_length=64, max_new_tokens=4, check_greedy=True
    )
    hook = {"on_logits": lambda timestep, x, logits: logits}
    return {
        "logits": lambda: lm.logits(ids, ids == lm.mask_token_id),
        "greedy": lambda: generate(lm, ids, timesteps=2),
        "drawn": lambda: generate(lm, ids, timesteps=2, temperature=1.0, sampler="origin"),
        "hook": lambda: generate(lm, ids, timesteps=2, **hook),
        "path_kl": lambda: path_kl(lm, lm, states, TIMESTEPS),
        "scores": lambda: masked_token_scores(lm, states, TIMESTEPS),
        "targets": lambda: TransitionLoss(lm, lm, TIMESTEPS, {}).targets(states),
        "transition loss": lambda: TransitionLoss(lm, lm, TIMESTEPS, {}).log_probabilities(states),
        "importance": lambda: token_importance(lm, calibration, ["model.layers.0.mlp.down_proj"], 0),
        "calibration": lambda: trajectory_states(lm, torch.zeros((2, 4), dtype=torch.int64), None, 2, 0),
        "likelihood": lambda: harness.loglikelihood([Instance("loglikelihood", {}, ("def f", "(x):"), 0)], True),
        "continuation": lambda: harness.generate_until([Instance("generate_until", {}, ("def f", {}), 0)], True),
    }


WORK = (
    "logits",
    "greedy",
    "drawn",
    "hook",
    "path_kl",
    "scores",
    "targets",
    "transition loss",
    "importance",
    "calibration",
    "likelihood",
    "continuation",
)


class TestOverflow:
    """NaN logits are an error wherever they are used, and say what to do."""

    @pytest.mark.parametrize("what", WORK)
    def test_an_overflow_of_float16_is_an_error(self, tiny: DiffusionLM, calibration: Calibration, what: str) -> None:
        run = work(overflowing(tiny, torch.float16), calibration)[what]
        with pytest.raises(ValueError, match=r"logits: found NaN in torch.float16.*65504.*bfloat16 or float32"):
            run()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("what", WORK)
    def test_wider_types_hold_the_same_model(
        self, tiny: DiffusionLM, calibration: Calibration, dtype: torch.dtype, what: str
    ) -> None:
        work(overflowing(tiny, dtype), calibration)[what]()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    def test_a_single_number_is_found(self, value: float, dtype: torch.dtype) -> None:
        logits = torch.zeros((70, 300), dtype=dtype)
        check_logits(logits)
        check_logits(logits[:0])
        logits[61, 123] = value
        with pytest.raises(ValueError, match="found NaN" if value != value else "found infinity"):
            check_logits(logits)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("sampler", ["origin", "entropy", "low_confidence"])
    def test_a_hook_may_not_return_it(self, tiny: DiffusionLM, value: float, temperature: float, sampler: str) -> None:
        ids = torch.full((1, 4), tiny.mask_token_id)
        hook = {"on_logits": lambda timestep, x, logits: logits.index_fill(-1, torch.tensor([7]), value)}
        with pytest.raises(ValueError, match=f"logits: found a row whose largest is {value}"):
            generate(tiny, ids, timesteps=2, temperature=temperature, sampler=sampler, **hook)

    def test_a_hook_may_rule_out_tokens_but_not_all(self, tiny: DiffusionLM) -> None:
        ids, vocabulary = torch.full((1, 4), tiny.mask_token_id), torch.arange(tiny.model.config.vocab_size)
        only = {"on_logits": lambda timestep, x, logits: logits.masked_fill(vocabulary != 7, -torch.inf)}
        assert generate(tiny, ids, timesteps=2, temperature=1.0, **only).tolist() == [[7, 7, 7, 7]]
        none = {"on_logits": lambda timestep, x, logits: torch.full_like(logits, -torch.inf)}
        with pytest.raises(ValueError, match="logits: found a row whose largest is -inf"):
            generate(tiny, ids, timesteps=2, **none)

    def test_a_temperature_that_overflows_is_an_error(self) -> None:
        logits, uniform = torch.tensor([[1.0, 2.0]]), torch.zeros(1)
        assert sample_tokens(logits, 1e-37, uniform)[0].tolist() == [1]
        with pytest.raises(ValueError, match="largest is inf at temperature 1e-40"):
            sample_tokens(logits, 1e-40, uniform)
