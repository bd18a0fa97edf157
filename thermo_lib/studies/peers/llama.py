"""A model of Dream's architecture in llama.cpp: written as GGUF, quantized to a file type, and run on the processor.

Everything is done by the library that llama-cpp-python is built with, through the functions of its C interface.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.files.whole import replacing

FILE_TYPES = {"Q2_K": 10, "IQ2_XXS": 19}  # enum llama_ftype, LLAMA_FTYPE_MOSTLY_...
NEEDS_IMPORTANCE = ("IQ2_XXS",)
_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_gguf(model: nn.Module, config: PreTrainedConfig, path: Path) -> None:
    """Write a model's weights as they are, matrices in bfloat16 and vectors in float32, without a tokenizer.

    Args:
        model: of Dream's architecture, in bfloat16 on the CPU.
        config: its sizes.
        path: to write; there is no file until it is complete.
    """
    import gguf

    with replacing(path) as new:
        writer = gguf.GGUFWriter(new, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DREAM])
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DREAM, config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            key = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if tensor.ndim == 1:
                writer.add_tensor(key, tensor.float().numpy())
            else:
                bytes_ = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(key, bytes_, raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def linear_bits(path: Path) -> float:
    """Bits stored for each weight of the linears inside the blocks, from the sizes in a GGUF file."""
    import gguf

    tensors = [t for t in gguf.GGUFReader(path).tensors if t.name.endswith(tuple(f".{x}.weight" for x in _LINEARS))]
    return sum(8 * int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def quantize_gguf(source: Path, target: Path, type: str, threads: int) -> None:
    """Quantize a GGUF file with llama.cpp's own mixture of formats for a file type, and show a bar.

    A type that needs an importance matrix gets one that makes all columns equal.

    Args:
        source: in full precision.
        target: to write; there is no file until it is complete.
        type: a key of ``FILE_TYPES``.
        threads: number of threads.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    import gguf
    import llama_cpp

    tensors = gguf.GGUFReader(source).tensors
    columns = {t.name: int(t.shape[0]) for t in tensors if len(t.shape) > 1}
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[type], threads
    kept = []  # what the parameters point to
    if type in NEEDS_IMPORTANCE:
        entries = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()  # one without a name ends it
        for entry, (name, size) in zip(entries, columns.items(), strict=False):
            ones = (ctypes.c_float * size)(*[1.0] * size)
            entry.name, entry.size, entry.data = name.encode(), size, ctypes.cast(ones, ctypes.POINTER(ctypes.c_float))
            kept.append(ones)
        params.imatrix = entries
    with replacing(target) as new:
        with tqdm(total=len(tensors), desc=f"llama.cpp {type}", unit="tensor", leave=False) as bar:

            @llama_cpp.llama_log_callback
            def log(level: int, text: bytes, data: object) -> None:
                bar.update(text.startswith(b"["))  # [ 1/ 27] blk.0.attn_q.weight ...

            llama_cpp.llama_log_set(log, None)
            code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(new), ctypes.byref(params))
            llama_cpp.llama_log_set(_silent(), None)
        if code:
            raise RuntimeError(f"llama_model_quantize: found code {code} for {type}, expected 0")


def load_gguf(path: Path, most: int, threads: int, *, repack: bool = True) -> Callable[[int], Any]:
    """A model that llama.cpp runs.

    Args:
        path: of a GGUF file.
        most: tokens at a time.
        threads: number of threads.
        repack: whether llama.cpp may store weights anew in the layouts that it prefers on this processor, for AMX
            among others, as it does by default. Some builds end with an illegal instruction there, in code for AMX;
            llama.cpp's pull request 26954 has what may be the reason.

    Returns:
        Runs so many tokens, with the ids 0, 1, 2, ..., in one batch, and gives their logits, float32
        ``(tokens, vocabulary)`` in llama.cpp's own memory, which the next call overwrites.

    Raises:
        RuntimeError: llama.cpp can't read the file, or can't run it.
    """
    import llama_cpp

    llama_cpp.llama_log_set(_silent(), None)
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = repack
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), options)
    if not model:
        raise RuntimeError(f"{path.name}: found a file that llama.cpp can't load")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = most  # attention in both directions: one piece
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"{path.name}: found a model that llama.cpp can't run")
    batch = llama_cpp.llama_batch_init(most, 0, 1)
    for index in range(most):
        batch.token[index] = batch.pos[index] = index
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, True

    def run(tokens: int) -> Any:
        batch.n_tokens = tokens
        if code := llama_cpp.llama_encode(context, batch):
            raise RuntimeError(f"llama_encode: found code {code} for {tokens} tokens, expected 0")
        return llama_cpp.llama_get_logits(context)  # waits until they are there

    return run


@cache
def _silent() -> Any:
    """A callback that takes llama.cpp's messages; kept here, since llama.cpp holds a bare pointer to it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)
