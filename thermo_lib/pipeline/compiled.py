"""A model that computes as fast as it can: a pass as a CUDA graph on a GPU, quantized linears in C++ on a CPU."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.loaded import as_lm
from thermo_lib.pipeline.model import QuantizedLM
from thermo_lib.quant.buffers import TimestepTable
from thermo_lib.quant.calls import CALL
from thermo_lib.quant.graphs import captured
from thermo_lib.quant.planes import compile_linears
from thermo_lib.quant.time_norms import TimeNorm

Pass = Callable[[Tensor], Tensor]


def compile(lm: DiffusionLM | MaskPredictor, graphs: int = 8) -> None:
    """Let a model compute without Python's launches between its kernels; the model stays the same object.

    On CUDA a pass is captured as a graph at the first use of a shape of ids, and of a timestep where weights, ranges
    or norms depend on it, and replayed from then on. Passes with an attention mask, for gradients, or with rows at
    several timesteps run as before. Parameters may be changed where they are; one that is replaced by another tensor
    isn't seen by a graph. On a CPU there are no launches to save, and the linears of a quantized model are compiled,
    see ``compile_linears``.

    Args:
        lm: the model, also one of ``transformers``' Auto classes.
        graphs: number of graphs that are kept; beyond it the one that was used longest ago is dropped. Each holds the
            activations of its pass.

    Raises:
        ValueError: a number of graphs below 1, or no compiler on a CPU.
    """
    if type(graphs) is not int or graphs < 1:
        raise ValueError(f"graphs: found {graphs!r}, allowed are whole numbers from 1")
    lm = as_lm(lm)
    if lm.device.type == "cuda":
        lm.model.hidden = GraphedPass(lm.model, graphs)  # type: ignore[method-assign]  # it stands for the method
    elif isinstance(lm, QuantizedLM):
        compile_linears(lm.model)


class GraphedPass:
    """Stands for a model's ``hidden``, replays graphs of it.

    Args:
        model: the model.
        most: number of graphs that are kept.
        capture: records a pass on ids: given a function and its argument, returns a function that repeats it for other
            ids of that shape, and whose result is overwritten by the next call.
    """

    def __init__(self, model: MaskPredictor, most: int, capture: Callable[[Pass, Tensor], Pass] | None = None):
        self.model, self.most, self.capture = model, most, capture or captured
        self.graphs: OrderedDict[tuple[Any, ...], Pass] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self.model, memo), self.most, self.capture)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """See ``MaskPredictor.hidden``."""
        plain = type(self.model).hidden
        steps_differ = CALL.rows is not None and self._depends_on_timestep
        if attention_mask is not None or torch.is_grad_enabled() or steps_differ:
            return plain(self.model, input_ids, attention_mask)
        key = tuple(input_ids.shape), self.model.step.value if self._depends_on_timestep else None
        if key not in self.graphs:
            self.graphs[key] = self.capture(lambda ids: plain(self.model, ids), input_ids)
            if len(self.graphs) > self.most:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key](input_ids).clone()

    @cached_property
    def _depends_on_timestep(self) -> bool:
        """Whether weights, ranges or norms do."""
        modules = list(self.model.modules())
        tables = (module for module in modules if isinstance(module, TimestepTable))
        norms = (module for module in modules if isinstance(module, TimeNorm))
        return any(len(table.scale) > 1 for table in tables) or any(norm.depends_on_timestep for norm in norms)
