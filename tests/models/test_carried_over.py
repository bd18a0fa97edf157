"""Whatever a checkpoint says of its special tokens, tokenizer and generation, a folder made from it says too."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import ended_by
from layouts import BOTH, DREAM, LLADA, Layout
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, modeling_utils

from thermo_lib import ThermoConfig, load_model, load_quantized, quantize, quantize_checkpoint, save_quantized
from thermo_lib.models import tokenization
from thermo_lib.models.lm import save_model
from thermo_lib.models.tokenization import ChatTemplate, read_chat_template
from thermo_lib.pipeline.storage import load_any

CONFIG = ThermoConfig(quantizer="rtn", activation_bits=16, num_time_groups=1, group_size=16)
IDS = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 5}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
    "pad_token": "<|endoftext|>",
    "padding_side": "left",
    "model_max_length": 77,
}
SPECIAL = {"additional_special_tokens": ["<|im_start|>"]}
GENERATION = {"eos_token_id": 6, "pad_token_id": 7, "max_length": 99}
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


def streamed(source: Path, target: Path) -> None:
    quantize_checkpoint(source, target, CONFIG)


def quantized(source: Path, target: Path) -> None:
    save_quantized(quantize(load_model(str(source)), CONFIG), target)


def quantized_twice_saved(source: Path, target: Path) -> None:
    quantized(source, target.with_name("between"))
    save_quantized(load_quantized(target.with_name("between")), target)


def full_precision(source: Path, target: Path) -> None:
    save_model(load_model(str(source)), target)


def by_transformers(source: Path, target: Path) -> None:
    AutoModel.from_pretrained(source).save_pretrained(target)


def quantized_by_transformers(source: Path, target: Path) -> None:
    quantized(source, target.with_name("between"))
    AutoModel.from_pretrained(target.with_name("between")).save_pretrained(target)


def quantized_on_the_fly(source: Path, target: Path) -> None:
    AutoModel.from_pretrained(source, quantization_config=CONFIG).save_pretrained(target)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LIBRARY = [streamed, quantized, quantized_twice_saved, full_precision]
TRANSFORMERS = [by_transformers, quantized_by_transformers, quantized_on_the_fly]
EVERY_WAY = pytest.mark.parametrize("make", LIBRARY + TRANSFORMERS)


@pytest.fixture
def write(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a checkpoint with settings of tokenizer and generation."""

    def make(layout: Layout = DREAM, **changes: Any) -> Path:
        folder = layout.write(tmp_path / "source", tokenizer, **changes)
        auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
        for name, content in (
            ("tokenizer_config.json", TOKENIZER | auto_map),
            ("special_tokens_map.json", SPECIAL),
            ("generation_config.json", GENERATION),
        ):
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        return folder

    return make


@BOTH
@EVERY_WAY
def test_what_a_checkpoint_says_is_carried_over(
    write: Callable[..., Path], tmp_path: Path, layout: Layout, make: Callable[[Path, Path], None]
) -> None:
    source, target = write(layout, **IDS), tmp_path / "target"
    make(source, target)
    config = json.loads((target / "config.json").read_text())
    assert {key: config[key] for key in IDS} == IDS
    assert json.loads((target / "tokenizer_config.json").read_text()) == TOKENIZER, "all but auto_map"
    assert json.loads((target / "special_tokens_map.json").read_text()) == SPECIAL
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation.items() >= GENERATION.items()
    assert (target / "chat_template.jinja").read_text() == TEMPLATE
    assert load_any(str(target)).chat([{"content": "hi"}]) == "<|im_start|>hi"


@EVERY_WAY
def test_transformers_sees_the_same_tokenizer_and_model_settings(
    write: Callable[..., Path], tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    source, target = write(LLADA, **IDS), tmp_path / "target"
    make(source, target)
    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModel.from_pretrained(target)
    assert (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|mask|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
    assert {key: getattr(model.config, key) for key in IDS} == IDS
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (6, 7)


class TestTokenIds:
    @BOTH
    @pytest.mark.parametrize("ids", [{}, {"eos_token_id": [4, 6]}, {"eos_token_id": 126081, "pad_token_id": None}])
    def test_they_are_the_files_and_no_default(
        self, write: Callable[..., Path], tmp_path: Path, layout: Layout, ids: dict[str, Any]
    ) -> None:
        source = write(layout, **IDS)
        path = source / "config.json"
        config = {key: value for key, value in json.loads(path.read_text()).items() if key not in IDS}
        path.write_text(json.dumps(config | ids))
        for model in (load_model(str(source)).model, AutoModel.from_pretrained(source)):
            assert [getattr(model.config, key) for key in IDS] == [ids.get(key) for key in IDS]
        full_precision(source, tmp_path / "target")
        written = json.loads((tmp_path / "target/config.json").read_text())
        assert {key: written[key] for key in IDS if key in written} == {k: v for k, v in ids.items() if v is not None}

    @BOTH
    def test_the_padding_token_changes_no_logit(self, write: Callable[..., Path], layout: Layout) -> None:
        model = load_model(str(write(layout, **IDS))).model
        assert model.config.pad_token_id == model.generation_config.pad_token_id == IDS["pad_token_id"]
        assert model.model.embed_tokens.padding_idx is None
        assert model.model.embed_tokens.weight[IDS["pad_token_id"]].any()

    @BOTH
    @pytest.mark.parametrize(
        ("key", "found"),
        [("pad_token_id", [1]), ("eos_token_id", "4"), ("eos_token_id", [4, -1]), ("bos_token_id", True)],
    )
    def test_another_thing_than_an_id_is_refused(
        self, write: Callable[..., Path], layout: Layout, key: str, found: Any
    ) -> None:
        source = write(layout, **{key: found})
        for load in (load_model, AutoModel.from_pretrained):
            with pytest.raises(ValueError, match=f"{key}: found .*, allowed are whole numbers from 0"):
                load(str(source))


class TestChatTemplate:
    def test_one_of_its_own_takes_the_place_of_what_was_carried_over(
        self, write: Callable[..., Path], tmp_path: Path
    ) -> None:
        lm = load_model(str(write()))
        lm.chat_template = ChatTemplate("{{ eos_token }}!", {"eos_token": "<|endoftext|>"})
        save_model(lm, tmp_path / "target")
        assert read_chat_template(tmp_path / "target").render([]) == "<|endoftext|>!"
        written = json.loads((tmp_path / "target/tokenizer_config.json").read_text())
        assert written == TOKENIZER | {"chat_template": "{{ eos_token }}!"}
        lm.chat_template = None
        save_model(lm, tmp_path / "target")
        assert load_model(str(tmp_path / "target")).chat_template is None


class TestSavePretrained:
    def test_files_of_another_tokenizer_do_not_stay(self, write: Callable[..., Path], tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            (target / name).write_text("another's")
        source = write()
        (source / "special_tokens_map.json").unlink()
        by_transformers(source, target)
        assert not {path.name for path in target.iterdir()} & {"vocab.json", "merges.txt", "special_tokens_map.json"}

    def test_a_folder_without_a_tokenizer_is_saved_without_one(
        self, write: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = write()
        (source / "tokenizer.json").unlink()
        by_transformers(source, tmp_path / "target")
        assert not (tmp_path / "target/tokenizer.json").exists()

    def test_it_may_save_where_it_has_read(self, write: Callable[..., Path]) -> None:
        source = write()
        expected = load_model(str(source)).model.state_dict()
        before = (source / "tokenizer.json").read_bytes()
        by_transformers(source, source)
        assert (source / "tokenizer.json").read_bytes() == before
        again = load_model(str(source)).model.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("sizes", [("1KB", "1GB"), ("1GB", "1KB")], ids=["shards, then a file", "the other way"])
    def test_weights_of_an_earlier_model_do_not_stay(
        self, write: Callable[..., Path], tmp_path: Path, sizes: tuple[str, str]
    ) -> None:
        model = AutoModel.from_pretrained(write())
        for factor, size in enumerate(sizes, start=1):
            model.model.norm.weight.data.fill_(factor)
            model.save_pretrained(tmp_path / "target", max_shard_size=size)
        assert (load_model(str(tmp_path / "target")).model.model.norm.weight == 2).all()

    @pytest.mark.parametrize("is_killed", [True, False])
    @pytest.mark.parametrize("last", [1, 2, 3])
    def test_what_was_in_the_folder_stays_whole_until_all_is_written(
        self, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, is_killed: bool
    ) -> None:
        """Whichever file is the last one, and whatever ends it."""
        model, target, left = AutoModel.from_pretrained(write()), tmp_path / "target", last
        model.save_pretrained(target, max_shard_size="40KB")
        (target / "thesis.tex").write_text("Chapter 1", encoding="utf-8")
        before = contents(target)

        def limited(function: Callable[..., Any]) -> Callable[..., Any]:
            def until(*arguments: Any, **more: Any) -> None:
                nonlocal left
                left -= 1
                function(*arguments, **more)
                if not left and is_killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                if not left:
                    raise OSError("No space left on device")

            return until

        def save() -> None:
            with suppress(OSError):
                model.save_pretrained(target, max_shard_size="60KB")

        model.model.norm.weight.data.fill_(2)
        with monkeypatch.context() as patch:
            patch.setattr(modeling_utils, "safe_save_file", limited(modeling_utils.safe_save_file))
            patch.setattr(tokenization, "_write", limited(tokenization._write))
            assert (ended_by(save) == signal.SIGKILL) if is_killed else (save() is None)
        found = contents(target)
        assert {name: text for name, text in found.items() if not name.startswith(".")} == before
        assert (found == before) is not is_killed
        save()
        whole = tmp_path / "whole"
        model.save_pretrained(whole, max_shard_size="60KB")
        assert contents(target) == contents(whole) | {"thesis.tex": b"Chapter 1"}

    def test_a_state_of_another_quantized_model_is_refused(self, write: Callable[..., Path], tmp_path: Path) -> None:
        model = AutoModel.from_pretrained(write(), quantization_config=CONFIG)
        with pytest.raises(ValueError, match=r"state_dict: found one for a quantized model.* has that state"):
            model.save_pretrained(tmp_path / "target", state_dict=model.state_dict())
        assert not (tmp_path / "target").exists()

    def test_a_state_of_another_full_precision_model_is_saved(self, write: Callable[..., Path], tmp_path: Path) -> None:
        model = AutoModel.from_pretrained(write())
        state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path / "target", state_dict=state)
        assert all((tensor == 1).all() for tensor in load_model(str(tmp_path / "target")).model.state_dict().values())
