"""Tells ``lm_eval`` of the model ``thermo``, wherever thermo_lib is installed.

Its registry knows the models of its own package and has no entry points for others. ``thermo_lm_eval.pth`` imports this
module when Python starts, so it only waits here: once ``lm_eval.models`` has filled the registry, the name of the class
is added to it. Nothing of torch, ``lm_eval`` or ``thermo_lib`` is imported before a program asks for it.
"""

import sys

TYPE_CHECKING = False  # that of typing would be imported whenever Python starts
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _Finder:
    """Finds ``lm_eval.models`` where it is, and lets the registration follow its execution."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != "lm_eval.models":
            return None
        sys.meta_path.remove(self)  # before the search for others, which asks this one too
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None or spec.loader is None:  # another package of that name
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: "ModuleType") -> None:
            execute(module)
            from lm_eval.api.registry import model_registry

            if "thermo" not in model_registry:  # as it is after ``import thermo_lib.integrations.lm_eval``
                model_registry.register("thermo", target="thermo_lib.integrations.lm_eval:HarnessLM")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


sys.meta_path.insert(0, _Finder())
