"""The model ``thermo`` for EleutherAI's lm-evaluation-harness: its tasks on full-precision and quantized models.

``lm_eval --model thermo --model_args pretrained=DIR --tasks ...``; ``lm_eval_plugin`` tells it of the model.

The likelihood of a text is estimated from below as for LLaDA (arXiv 2502.09992, equation 6): of ``L`` tokens, ``l`` are
masked, ``l`` uniform in ``1..L``, and ``L / l`` times their log probability is averaged over draws.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.sampling import Sampling, generate
from thermo_lib.extras import needs
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.storage import load_any

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

TemplateLM = needs("lm_eval.api.model").TemplateLM
register_model = needs("lm_eval.api.registry").register_model

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@register_model("thermo")
class HarnessLM(TemplateLM):
    """A diffusion language model as ``lm_eval`` asks for one.

    Args:
        pretrained: ``"reference"``, a folder (full precision or quantized) or a hub id.
        dtype: of the computation: ``float32``, ``bfloat16`` or ``float16``.
        device: e.g. ``cuda``; by default the CPU.
        batch_size: masked copies of a text in a forward pass.
        max_batch_size: not used; ``lm_eval`` gives it to every model.
        mc_num: draws for each likelihood; an answer of one token needs a single one, which is exact.
        check_greedy: also fill each answer with the likeliest tokens, the surest first, to see whether it is the one
            asked about, which takes a pass for each of its tokens; otherwise no answer counts as greedy.
        max_new_tokens: tokens to fill for a task that doesn't say how many.
        timesteps: denoising steps of a generation, at most one for each token; as many as tokens by default.
        sampler, temperature, top_p, top_k, alg_temp, block_length: as for ``generate``; a task may ask for its own
            ``temperature``, ``top_p`` and ``top_k``.
        max_length: tokens of a text, by default those that the model was made for.
        seed: of masks and generation; equal seeds give equal scores.

    Raises:
        ValueError: a value out of range, or what loading the model raises.
    """

    def __init__(
        self,
        pretrained: str = "reference",
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        mc_num: int = 128,
        check_greedy: bool = True,
        max_new_tokens: int = 128,
        timesteps: int | None = None,
        sampler: str = "maskgit_plus",
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        alg_temp: float = 0.0,
        block_length: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: found {dtype!r}, allowed are {', '.join(_DTYPES)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: found {batch_size!r}, allowed is at least 1")
        counts = {"mc_num": mc_num, "max_new_tokens": max_new_tokens, "timesteps": timesteps, "max_length": max_length}
        for name, value in counts.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: found {value!r}, allowed are whole numbers from 1")
        self.lm = load_any(pretrained, dtype=_DTYPES[dtype])
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("device: found no GPU for %r, lm_eval's default; using the CPU", device)
        elif device is not None:
            self.lm.model.to(device)
        self.batch_size, self.mc_num, self.check_greedy = int(batch_size), mc_num, check_greedy
        self.max_new_tokens, self.timesteps, self.block_length = max_new_tokens, timesteps, block_length
        self.sampling = vars(Sampling(sampler, temperature, top_p, top_k, alg_temp))
        # Of the timesteps that layers tell apart.
        grouped = isinstance(self.lm, QuantizedLM) and self.lm.config.num_time_groups > 1
        self.steps = self.lm.config.timesteps if grouped else 1
        self.max_length = max_length or self.lm.model.config.max_position_embeddings
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        """Not used: an empty context stays empty."""
        raise NotImplementedError("a masked diffusion model needs no token before a text")

    @property
    def tokenizer_name(self) -> str:
        """Where the model, and with it the tokenizer, comes from."""
        return self.lm.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the checkpoint, if a task is to use it."""
        return self.lm.chat_template.source if chat_template and self.lm.chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's text; raises what ``DiffusionLM.chat`` raises."""
        return self.lm.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; no special tokens unless asked for."""
        return self.lm.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The bound of each answer after its context, in nats, and whether it is what the model fills greedily."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            encoded = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            pairs.append(((context, continuation), *encoded))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for args, context, answer in tqdm(requests, desc="loglikelihood", disable=disable_tqdm):
            if not 1 <= len(answer) <= self.max_length:
                allowed = f"allowed are 1..{self.max_length}"
                raise ValueError(f"loglikelihood: found an answer of {len(answer)} tokens, {allowed}")
            context = context[max(0, len(context) + len(answer) - self.max_length) :]
            result = self._bound(context, answer), self.check_greedy and self._is_greedy(context, answer)
            self.cache_hook.add_partial("loglikelihood", args, result)
            found.append(result)
        return found

    def _bound(self, context: Sequence[int], answer: Sequence[int]) -> float:
        """The estimated bound of ``log p(answer | context)``."""
        count, start = len(answer), len(context)
        draws = 1 if count == 1 else self.mc_num
        generator = torch.Generator().manual_seed(self.seed)
        # Evenly spread over 1..L from a random start, which has less variance than independent draws.
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        masked = 1 + ((torch.arange(draws) + shift) / draws * count).long().clamp(max=count - 1)
        order = torch.rand((draws, count), generator=generator, dtype=torch.float32).argsort(1).argsort(1)
        is_masked = torch.zeros((draws, start + count), dtype=torch.bool)
        is_masked[:, start:] = order < masked[:, None]
        ids = torch.tensor([*context, *answer]).expand(draws, -1)
        masked_ids = torch.where(is_masked, self.lm.mask_token_id, ids)
        total = 0.0
        for step, rows in self._by_timestep(1 - masked.double() / count):
            self.lm.set_timestep(step, self.steps)
            logits = self.lm.logits(masked_ids[rows], is_masked[rows]).double()
            log_p = logits.log_softmax(-1).gather(-1, ids[rows][is_masked[rows]][:, None]).squeeze(-1)
            weight = (count / masked.double())[rows]  # of every token of a draw
            total += (log_p * weight.repeat_interleave(masked[rows])).sum().item()
        return total / draws

    def _by_timestep(self, progress: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Batches of draws whose masks belong to the same timestep; all of them where nothing depends on it."""
        steps = (progress * self.steps).long().clamp(max=self.steps - 1)
        for step in steps.unique().tolist():
            for rows in (steps == step).nonzero().squeeze(-1).split(self.batch_size):
                yield step, rows

    def _is_greedy(self, context: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether the likeliest tokens, the surest filled first, are the answer."""
        ids = torch.tensor([[*context, *[self.lm.mask_token_id] * len(answer)]])
        filled = generate(self.lm, ids, timesteps=len(answer), sampler="maskgit_plus", eps=0.0)
        return filled[0, len(context) :].tolist() == list(answer)

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """The bound of each text, in nats; of one that is too long, of window after window, half of each known."""
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            ids = self.tok_encode(text)
            total, done = 0.0, 0
            while done < len(ids):
                known = ids[max(0, done - self.max_length // 2) : done]
                rest = ids[done : done + self.max_length - len(known)]
                total += self._bound(known, rest)
                done += len(rest)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The model's continuation of each text, up to the first stop string or special token."""
        texts = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, wanted = request.args
            text = self._generate(context, wanted)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _generate(self, context: str, wanted: Mapping[str, Any]) -> str:
        count = int(wanted.get("max_gen_toks") or self.max_new_tokens)
        if not 1 <= count < self.max_length:
            raise ValueError(f"max_gen_toks: found {count}, allowed are 1..{self.max_length - 1}")
        prompt = self.tok_encode(context)[-(self.max_length - count) :]
        sampling = self.sampling | {name: wanted[name] for name in ("top_p", "top_k") if name in wanted}
        if wanted.get("do_sample", True) and "temperature" in wanted:
            sampling["temperature"] = wanted["temperature"]
        filled = generate(
            self.lm,
            torch.tensor([prompt + [self.lm.mask_token_id] * count]),
            timesteps=min(self.timesteps or count, count) if self.block_length is None else self.timesteps or count,
            block_length=self.block_length,
            seed=self.seed,
            **sampling,
        )
        text = self.lm.decode(filled[0, len(prompt) :])
        until = wanted.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.partition(stop)[0] if stop else text
        return text
