"""transformers' AutoConfig, AutoModel, AutoModelForImageTextToText and AutoProcessor load dmllm's folders.

Those classes live in modules that take seconds to import, so `import dmllm` does not import them: it waits until
someone does, and then enters dmllm's classes in their tables. If they are there already, it does so at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def install() -> None:
    """Register now what is imported, and the rest when it will be. A second call changes nothing."""
    if any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Watcher())
    for name, register in REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])


class LazyModel:
    """Stands for `MultimodalModel` in transformers' tables, and imports it when a model is asked for."""

    config_class: Any = None  # DmllmConfig, once that is registered

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """`MultimodalModel.from_pretrained`."""
        return _model_class().from_pretrained(*arguments, **options)

    @classmethod
    def _from_config(cls, *arguments: Any, **options: Any) -> Any:
        return _model_class()._from_config(*arguments, **options)


def _model_class() -> Any:
    from dmllm.models.multimodal import MultimodalModel

    return MultimodalModel


def _register_config(module: ModuleType) -> None:
    from dmllm.models.configuration import DmllmConfig

    module.AutoConfig.register(DmllmConfig.model_type, DmllmConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    from dmllm.models.configuration import DmllmConfig

    LazyModel.config_class = DmllmConfig
    for auto in (module.AutoModel, module.AutoModelForImageTextToText):
        auto.register(DmllmConfig, LazyModel, exist_ok=True)


def _register_processor(module: ModuleType) -> None:
    from dmllm.data.processor import Processor
    from dmllm.models.configuration import DmllmConfig

    module.AutoProcessor.register(DmllmConfig, Processor, exist_ok=True)


REGISTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _Watcher(MetaPathFinder):
    """Finds those three modules where Python would, and registers when they have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                REGISTER[fullname](module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
