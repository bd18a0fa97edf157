"""The model ``thermo`` for EleutherAI's lm-evaluation-harness: its tasks on full-precision and quantized models.

``lm_eval --model thermo --model_args pretrained=DIR --tasks ...``; ``lm_eval_plugin`` tells it of the model.

The likelihood of a text is estimated from below as for LLaDA (arXiv 2502.09992, equation 6): of ``L`` tokens, ``l`` are
masked, ``l`` uniform in ``1..L``, and ``L / l`` times their log probability is averaged over draws.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from thermo_lib.diffusion.blockwise import blocks_of, check_blocks
from thermo_lib.diffusion.inputs import SeenEnough
from thermo_lib.diffusion.rules import TokenRules
from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.tokens import Sampling
from thermo_lib.extras import needs
from thermo_lib.models.lm import stored_dtype
from thermo_lib.models.tokenizer_json import encode
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.pipeline.storage import load_any

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
else:
    TemplateLM = needs("lm_eval.api.model").TemplateLM
    register_model = needs("lm_eval.api.registry").register_model

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Pair = tuple[Sequence[int], Sequence[int]]


class _Copy(NamedTuple):
    """A masked copy of a text.

    Attributes:
        pair: number of the text.
        ids: its tokens, ``(length,)``.
        is_masked: which of them are masked, bool ``(length,)``.
    """

    pair: int
    ids: Tensor
    is_masked: Tensor


@register_model("thermo")
class HarnessLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A diffusion language model as ``lm_eval`` asks for one.

    Args:
        pretrained: ``"reference"``, a folder (full precision or quantized) or a hub id.
        dtype: of the computation: ``float32``, ``bfloat16``, ``float16``, or ``stored`` for that of the model's files.
        device: e.g. ``cuda``; by default the CPU.
        batch_size: texts, or masked copies of them, in a forward pass.
        max_batch_size: not used; ``lm_eval`` gives it to every model.
        mc_num: draws for each likelihood; an answer of one token needs a single one, which is exact.
        check_greedy: also fill each answer with the likeliest tokens, the surest first, to see whether it is the one
            asked about, which takes a pass for each of its tokens; otherwise no answer counts as greedy.
        max_new_tokens: tokens to fill for a task that doesn't say how many.
        timesteps: denoising steps of a generation, at most one for each token; as many as tokens by default.
        sampler, temperature, top_p, top_k, alg_temp, block_length, threshold: as for ``generate``; a task may ask for
            its own ``temperature``, ``top_p`` and ``top_k``.
        suppress_tokens, begin_suppress_tokens, end_tokens: ids as for ``generate``; several are given as ``1+2+3``, or
            as a list.
        suppress_end, end_last, stop_at_end: as for ``generate``.
        max_length: tokens of a text, by default those that the model was made for.
        seed: of masks and generation; equal seeds give equal scores.
        family: see ``load_model``.
        attention_block: its ``block_length``, that of a block-causal model whose files don't say it.

    Raises:
        ValueError: a value out of range, or what loading the model raises.
    """

    def __init__(
        self,
        pretrained: str = "reference",
        dtype: str = "stored",
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
        threshold: float | None = None,
        suppress_tokens: int | str | Sequence[int] = (),
        begin_suppress_tokens: int | str | Sequence[int] = (),
        end_tokens: int | str | Sequence[int] | None = None,
        suppress_end: bool = False,
        end_last: bool = False,
        stop_at_end: bool | None = None,
        max_length: int | None = None,
        seed: int = 0,
        family: str | None = None,
        attention_block: int | None = None,
    ):
        super().__init__()
        if dtype not in (*_DTYPES, "stored"):
            raise ValueError(f"dtype: found {dtype!r}, allowed are {', '.join(_DTYPES)}, stored")
        if not re.fullmatch("[1-9][0-9]{0,8}", str(batch_size)):
            raise ValueError(f"batch_size: found {batch_size!r:.80}, allowed is at least 1")
        counts = {"mc_num": mc_num, "max_new_tokens": max_new_tokens, "timesteps": timesteps, "max_length": max_length}
        for name, value in counts.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: found {value!r}, allowed are whole numbers from 1")
        precision = _DTYPES[dtype] if dtype in _DTYPES else stored_dtype(pretrained, family, attention_block)
        self.lm = load_any(pretrained, family=family, block_length=attention_block, dtype=precision)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("device: found no GPU for %r, lm_eval's default; using the CPU", device)
        elif device is not None:
            self.lm.model.to(device)
        self.batch_size, self.mc_num, self.check_greedy = int(batch_size), mc_num, check_greedy
        self.max_new_tokens, self.timesteps, self.block_length = max_new_tokens, timesteps, block_length
        self.sampling = vars(Sampling(sampler, temperature, top_p, top_k, alg_temp, threshold))
        suppressed, at_first, ends = (_listed(some) for some in (suppress_tokens, begin_suppress_tokens, end_tokens))
        rules = TokenRules(suppressed, at_first, ends, suppress_end, end_last, stop_at_end)
        blocks, by_block = blocks_of(self.lm, block_length)
        if by_block:
            check_blocks(self.lm, torch.empty((0, 0), dtype=torch.int64), blocks)
        rules.resolved(self.lm, sampler, block_by_block=by_block)  # refuses wrong ones before the work
        self.rules = vars(rules)
        # Of the timesteps that layers tell apart.
        config = self.lm.config if isinstance(self.lm, QuantizedLM) else None
        self.steps = config.timesteps if config is not None and config.num_time_groups > 1 else 1
        self.max_length = max_length or self.lm.model.longest
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
        return encode(self.lm.tokenizer, [string], add_special_tokens=bool(add_special_tokens))[0].ids

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
        pairs = []
        for _args, context, answer in requests:
            if not 1 <= len(answer) <= self.max_length:
                allowed = f"allowed are 1..{self.max_length}"
                raise ValueError(f"loglikelihood: found an answer of {len(answer)} tokens, {allowed}")
            pairs.append((context[max(0, len(context) + len(answer) - self.max_length) :], answer))
        pieces = [piece for pair in pairs for piece in self._pieces(*pair)]
        draws = sum(map(self._draws, pieces))
        tokens = sum(self._draws(piece) * sum(map(len, piece)) for piece in pieces)
        _log.info("loglikelihood: %d texts, %d masked copies of them, %d tokens", len(pairs), draws, tokens)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as bar:
            for start in range(
                0, len(order), self.batch_size
            ):  # what is done is in lm_eval's cache if a run is stopped
                numbers = order[start : start + self.batch_size]
                some = [pairs[i] for i in numbers]
                greedy = self._are_greedy(some) if self.check_greedy else [False] * len(some)
                for number, bound, is_greedy in zip(numbers, self._bounds(some), greedy, strict=True):
                    found[number] = bound, is_greedy
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                bar.update(len(some))
        return found

    def _draws(self, pair: Pair) -> int:
        """Number of masked copies of a text."""
        return 1 if len(pair[1]) == 1 else self.mc_num

    def _bounds(self, pairs: Sequence[Pair]) -> list[float]:
        """The estimated bounds of ``log p(answer | context)``, of a block-causal model block after block."""
        pieces = [(number, piece) for number, pair in enumerate(pairs) for piece in self._pieces(*pair)]
        totals = [0.0] * len(pairs)
        for (number, _), bound in zip(pieces, self._bounds_at_once([piece for _, piece in pieces]), strict=True):
            totals[number] += bound
        return totals

    def _pieces(self, context: Sequence[int], answer: Sequence[int]) -> list[Pair]:
        """An answer as parts that are masked together, each after all before it: those in a block of the model's."""
        length = self.lm.model.block_length
        if length is None:
            return [(context, answer)]
        text, end = [*context, *answer], len(context) + len(answer)
        starts = [len(context), *range((len(context) // length + 1) * length, end, length)]
        return [(text[:a], text[a:b]) for a, b in zip(starts, [*starts[1:], end], strict=True)]

    def _bounds_at_once(self, pairs: Sequence[Pair]) -> list[float]:
        """``_bounds`` of what is masked together; draws of several pairs share a forward pass."""
        totals = [0.0] * len(pairs)
        for step, batch in self._batches(pairs):
            ids, visible = _padded([copy.ids for copy in batch])
            is_masked, _ = _padded([copy.is_masked for copy in batch])
            self.lm.set_timestep(step, self.steps)
            hidden = torch.where(is_masked, self.lm.mask_token_id, ids)
            logits = self.lm.logits(hidden, is_masked, visible).double()
            log_p = logits.log_softmax(-1).gather(-1, ids[is_masked][:, None]).squeeze(-1)
            masked = [int(copy.is_masked.sum()) for copy in batch]
            for copy, part, count in zip(batch, log_p.split(masked), masked, strict=True):
                pair = pairs[copy.pair]
                totals[copy.pair] += part.sum().item() * len(pair[1]) / count / self._draws(pair)
        return totals

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[_Copy]]]:
        """Masked copies whose masks belong to one timestep, the longest texts first: what fits fits to the end."""
        waiting: dict[int, list[_Copy]] = {}
        for number in sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i]))):
            for step, copy in self._copies(number, *pairs[number], self._draws(pairs[number])):
                waiting.setdefault(step, []).append(copy)
                if len(waiting[step]) == self.batch_size:
                    yield step, waiting.pop(step)
        yield from waiting.items()

    def _copies(
        self, number: int, context: Sequence[int], answer: Sequence[int], draws: int
    ) -> Iterator[tuple[int, _Copy]]:
        """The draws of one text, and the timestep that the share of their masks belongs to."""
        count, ids = len(answer), torch.tensor([*context, *answer])
        generator = torch.Generator().manual_seed(self.seed)
        # Evenly spread over 1..L from a random start, which has less variance than independent draws.
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        masked = 1 + ((torch.arange(draws) + shift) / draws * count).long().clamp(max=count - 1)
        order = torch.rand((draws, count), generator=generator, dtype=torch.float32).argsort(1).argsort(1)
        is_masked = F.pad(order < masked[:, None], (len(context), 0))
        steps = ((1 - masked.double() / count) * self.steps).long().clamp(max=self.steps - 1)
        for step, row in zip(steps.tolist(), is_masked, strict=True):
            yield step, _Copy(number, ids, row)

    def _are_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether the likeliest tokens, the surest filled first, are the answers; a wrong one ends the filling."""
        found = [False] * len(pairs)
        by_length: dict[int, list[int]] = {}
        for number, (_context, answer) in enumerate(pairs):
            by_length.setdefault(len(answer), []).append(number)
        for numbers in by_length.values():
            for number, is_same in zip(numbers, self._fills([pairs[i] for i in numbers]), strict=True):
                found[number] = is_same
        return found

    def _fills(self, pairs: Sequence[Pair]) -> list[bool]:
        """``_are_greedy`` of answers of one length."""
        count = len(pairs[0][1])
        prompts = [torch.tensor([*context, *[self.lm.mask_token_id] * count]) for context, _ in pairs]
        ids, visible = _padded(prompts)
        wanted = torch.tensor([list(answer) for _, answer in pairs])
        same = [True] * len(pairs)

        def compare(timestep: int, rows: slice, filled: Tensor) -> None:
            tail = filled[:, -count:].cpu()
            same[rows] = ((tail == wanted[rows]) | (tail == self.lm.mask_token_id)).all(1).tolist()
            if not any(same):
                raise SeenEnough

        how: dict[str, Any] = {"timesteps": count, "sampler": "maskgit_plus", "eps": 0.0, "batch_size": len(pairs)}
        how["block_length"] = self.lm.model.block_length
        with suppress(SeenEnough):
            compare(count, slice(None), generate(self.lm, ids, attention_mask=visible, on_state=compare, **how))
        return same

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """The bound of each text, in nats; of one that is too long, of window after window, half of each known."""
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            ids, windows, done = self.tok_encode(text), [], 0
            while done < len(ids):
                known = ids[max(0, done - self.max_length // 2) : done]
                windows.append((known, ids[done : done + self.max_length - len(known)]))
                done += len(windows[-1][1])
            found.append(sum(self._bounds(windows), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The model's continuation of each text, up to the first stop string or special token."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            how = self._how(request.args[1])
            is_drawn = Sampling(**{name: how[name] for name in self.sampling}).is_random
            # What is drawn depends on a text's place in its batch, so each is alone then.
            alike.setdefault(f"{how} {number if is_drawn else ''}", []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for numbers in alike.values():
                numbers = sorted(numbers, key=lambda i: -len(requests[i].args[0]))
                for start in range(0, len(numbers), self.batch_size):
                    some = numbers[start : start + self.batch_size]
                    found = self._generate([requests[i].args[0] for i in some], self._how(requests[some[0]].args[1]))
                    for number, text in zip(some, found, strict=True):
                        texts[number] = _before(text, requests[number].args[1].get("until") or [])
                        self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                    bar.update(len(some))
        return texts

    def _how(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """How a request's text is generated: ``count`` tokens, and arguments of ``generate``."""
        count = int(wanted.get("max_gen_toks") or self.max_new_tokens)
        if not 1 <= count < self.max_length:
            raise ValueError(f"max_gen_toks: found {count}, allowed are 1..{self.max_length - 1}")
        sampling = self.sampling | {name: wanted[name] for name in ("top_p", "top_k") if name in wanted}
        if wanted.get("do_sample", True) and "temperature" in wanted:
            sampling["temperature"] = wanted["temperature"]
        steps = min(self.timesteps or count, count)
        return sampling | self.rules | {"count": count, "timesteps": steps, "block_length": self.block_length}

    def _generate(self, contexts: Sequence[str], how: Mapping[str, Any]) -> list[str]:
        """The continuations of some texts, see ``_how``."""
        count, options = how["count"], {name: value for name, value in how.items() if name != "count"}
        known, masks = self.max_length - count, [self.lm.mask_token_id] * count
        prompts = [torch.tensor([*self.tok_encode(text)[-known:], *masks]) for text in contexts]
        padded, visible = _padded(prompts)
        filled = generate(self.lm, padded, attention_mask=visible, seed=self.seed, **options)
        return [self.lm.decode(row[-count:]) for row in filled]


def _listed(ids: int | str | Sequence[int] | None) -> Any:
    """Token ids; of ``lm_eval``'s command line, whose commas end an argument, as ``1+2+3``.

    What is no list of ids is returned as it is, for ``TokenRules`` to refuse.
    """
    parts = ids.split("+") if isinstance(ids, str) else []
    return [int(part) for part in parts] if parts and all(re.fullmatch("[0-9]{1,18}", part) for part in parts) else ids


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows of any lengths, of ids or masks, as one batch, padded on the left with zeros.

    Returns:
        The batch ``(rows, longest)``, and where it isn't padding; None where there is none, which is faster.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    visible = torch.arange(longest) >= (longest - lengths)[:, None]
    batch = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    return batch, None if bool(visible.all()) else visible


def _before(text: str, until: str | Sequence[str]) -> str:
    """A text up to the first of some strings."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.partition(stop)[0] if stop else text
    return text
