"""Other projects' code, from checkouts that the user names; none of it is part of this one.

Fast-dLLM (github.com/NVlabs/Fast-dLLM, llada/) brings LLaDA's model file and three loops, LLaDA
(github.com/ML-GSAI/LLaDA) its own loop, LLaDA-V (github.com/ML-GSAI/LLaDA-V) a method `generate_with_embeds`. The
files are loaded by their place and run as they are. Their sampling in float64 can be switched to float32 at run time,
so that a row shows what is left.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shape import Shape
from dmllm.nn.visibility import layout
from dmllm.pipeline import Pipeline

LLADA_VOCABULARY = 126464
LLADA_FIELDS = {
    "mlp_ratio": 4, "activation_type": "silu", "block_type": "llama", "rope": True, "rope_theta": 500000.0,
    "rope_full_precision": True, "layer_norm_type": "rms", "layer_norm_with_affine": True, "rms_norm_eps": 1e-5,
    "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False,
    "weight_tying": False, "max_sequence_length": 4096, "flash_attention": False, "attention_dropout": 0.0,
    "residual_dropout": 0.0, "embedding_dropout": 0.0, "alibi": False, "multi_query_attention": False,
    "input_emb_norm": False, "scale_logits": False, "block_group_size": 1, "init_device": "cpu", "init_fn": "mitchell",
    "init_std": 0.02, "init_cutoff_factor": None, "precision": "fp32", "use_cache": False,
}  # fmt: skip
LLADA_V_FILE = "train/llava/model/language_model/modeling_llada.py"
FAST_DLLM_LOOPS = {
    "no cache": "generate",
    "prefix cache": "generate_with_prefix_cache",
    "dual cache": "generate_with_dual_cache",
}
SINGLE = ", its float64 as float32"
BORROWED = ("add_gumbel_noise", "get_num_transfer_tokens", "generate_with_embeds")


@dataclass(frozen=True)
class Way:
    """A way to answer a request."""

    name: str
    dtype: str
    answer: Callable[[Tensor], Tensor]  # ids [1, P] -> the new tokens [1, N]
    module: nn.Module  # whose calls count
    peer: bool = False


class Single:
    """torch, but with float32 where code asks for float64."""

    float64 = double = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def fast_dllm(checkout: Path, checkpoint: Path, shape: Shape) -> list[Way]:
    """Its loops without a cache, with the prefix's and with both, in float32; with both also in bfloat16."""
    folder = folder_of(checkout)
    model = fast_dllm_model(checkout, load_file(checkpoint / "model.safetensors"), shape)
    half = deepcopy(model).to(torch.bfloat16)
    as_is, single = fast_dllm_loops(folder)
    ways = []
    for said, own in ((as_is, ""), (single, SINGLE)):
        for name, verb in FAST_DLLM_LOOPS.items():
            ways.append(loop(f"Fast-dLLM {name}{own}", "fp32", getattr(said, verb), model, shape))
    ways.append(loop(f"Fast-dLLM dual cache{SINGLE}", "bf16", single.generate_with_dual_cache, half, shape))
    return ways


def folder_of(checkout: Path) -> Path:
    """Where Fast-dLLM's code for LLaDA lies."""
    return _folder(checkout, "llada", "generate.py")


def fast_dllm_loops(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Its loops as they are, and with float32 where they ask for float64."""
    as_is, single = (_module(folder / "generate.py", f"fast_dllm_{n}", folder) for n in ("as_is", "single"))
    vars(single)["torch"] = Single()
    return as_is, single


def fast_dllm_model(
    checkout: Path, weights: dict[str, Tensor], shape: Shape, fields: dict[str, Any] | None = None
) -> nn.Module:
    """LLaDA in Fast-dLLM's model file, holding these weights under LLaDA's names, no copies of them."""
    folder = folder_of(checkout)
    with _Importing(folder):
        found = importlib.import_module("model.modeling_llada")
        config = importlib.import_module("model.configuration_llada").LLaDAConfig(
            **{**LLADA_FIELDS, **shape.fields(), **(fields or {})}
        )
    model = found.LLaDAModelLM(config, init_params=False).eval()
    model.load_state_dict(weights, assign=True)
    model.config.use_cache = False
    return model


def llada(checkout: Path, model: nn.Module, shape: Shape) -> Way:
    """LLaDA's loop on a model of its format."""
    folder = _folder(checkout, ".", "generate.py")
    return loop(
        "LLaDA generate", "fp32", _module(folder / "generate.py", "llada_generate", folder).generate, model, shape
    )


class AsTheirs(nn.Module):
    """Our modules behind the call that LLaDA's loop makes; where its model file is not at hand."""

    def __init__(self, pipeline: Pipeline):
        super().__init__()
        self.inner = pipeline.model
        self.device = pipeline.device

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return self.inner(input_ids=ids, attention_mask=attention_mask)


def llada_v(checkout: Path, pipeline: Pipeline, shape: Shape) -> list[Way]:
    """LLaDA-V's loop on our modules, as it is and with its float64 as float32."""
    backbone = pipeline.model.backbone
    text = (
        _folder(checkout, "train/llava/model/language_model", "modeling_llada.py") / "modeling_llada.py"
    ).read_text()
    ways = []
    for name, library in (("", torch), (SINGLE, Single())):
        self = borrow(text, shape.vocabulary, library)()
        self.model, self.lm_head = _Body(backbone), backbone.lm_head
        ways.append(Way(f"LLaDA-V generate_with_embeds{name}", "fp32", _embeds(self, backbone, shape), backbone, True))
    return ways


def suppressed(vocabulary: int) -> list[int]:
    """The tokens that LLaDA-V never gives, in a vocabulary of another size."""
    return [_fit(token, vocabulary) for token in (126081, 126080, 126346, 126347)]


def borrow(text: str, vocabulary: int, library: Any) -> type:
    """A class with three of LLaDA-V's methods, as they stand in its file; its token ids lie as far from the end of the
    vocabulary as in their own."""
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    methods: list[ast.stmt] = [
        part for node in classes for part in node.body if isinstance(part, ast.FunctionDef) and part.name in BORROWED
    ]
    for node in ast.walk(ast.Module(methods, [])):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > LLADA_VOCABULARY - 1000:
            node.value = _fit(node.value, vocabulary)
    names = {"torch": library, "F": F, "np": numpy, "dLLMCache": _NoCache}
    exec(compile(ast.Module(methods, []), LLADA_V_FILE, "exec"), names)
    return type("Borrowed", (), {name: names[name] for name in BORROWED})


def _fit(token: int, vocabulary: int) -> int:
    return token - LLADA_VOCABULARY + vocabulary


def _embeds(self: Any, backbone: Any, shape: Shape) -> Callable[[Tensor], Tensor]:
    def answer(ids: Tensor) -> Tensor:
        return self.generate_with_embeds(
            backbone.embed_tokens(ids),
            steps=shape.steps,
            gen_length=shape.tokens,
            block_length=shape.block,
            mask_id=shape.mask_id,
        )

    return answer


class _Body:
    """`.model(inputs_embeds=...)[0]` is the hidden rows."""

    def __init__(self, backbone: Any):
        self.backbone, self.embed_tokens = backbone, backbone.embed_tokens

    def __call__(self, inputs_embeds: Tensor) -> tuple[Tensor]:
        batch, length = inputs_embeds.shape[:2]
        places = torch.arange(length, device=inputs_embeds.device).expand(batch, -1)
        rule = layout("full", documents=torch.zeros_like(places), canvas=places >= 0)
        return (self.backbone(inputs_embeds, places, rule).hidden,)


class _NoCache:
    """Stands for the cache that LLaDA-V's loop resets whether it is used or not."""

    def reset_cache(self, _: int) -> None:
        pass


def loop(name: str, dtype: str, generate: Any, model: nn.Module, shape: Shape) -> Way:
    """One of their loops with their signature."""

    def answer(ids: Tensor) -> Tensor:
        found = generate(
            model,
            ids,
            steps=shape.steps,
            gen_length=shape.tokens,
            block_length=shape.block,
            temperature=0.0,
            mask_id=shape.mask_id,
        )
        return (found[0] if isinstance(found, tuple) else found)[:, ids.shape[1] :]

    return Way(name, dtype, answer, model, True)


def _folder(checkout: Path, inside: str, file: str) -> Path:
    """Where in a checkout, or in that part of it, a file lies. Raises FileNotFoundError saying what was looked for."""
    for folder in (checkout / inside, checkout):
        if (folder / file).is_file():
            return folder
    raise FileNotFoundError(f"{checkout} holds no {inside}/{file}; give the folder of the public checkout.")


class _Importing:
    """A folder whose modules can be imported by their own names."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __enter__(self) -> None:
        sys.path.insert(0, self.folder)

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self.folder)


def _module(path: Path, name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _Importing(folder):
        spec.loader.exec_module(module)
    return module
