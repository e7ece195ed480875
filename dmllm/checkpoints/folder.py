"""Checkpoints are Hugging Face folders: config.json, model.safetensors, generation_config.json, the tokenizer's and the
processor's files, and a model card. Written beside their place and renamed, read strictly; no code is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from dmllm.checkpoints.card import model_card
from dmllm.checkpoints.image_tokenizer import save_image_tokenizer
from dmllm.checkpoints.native import read_native, save_native
from dmllm.checkpoints.published import read_published
from dmllm.checkpoints.tokenizer import read_tokenizer
from dmllm.checkpoints.vocabulary import find_mask
from dmllm.checkpoints.weights import WEIGHTS, refuse_keys
from dmllm.config import to_dict
from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.families import FAMILIES, Family, family_of
from dmllm.hub import fetch, find
from dmllm.models.configuration import DmllmConfig
from dmllm.models.image_tokenizers import ImageTokenizer
from dmllm.models.multimodal import MultimodalModel

CONFIG, GENERATION, CARD, PROCESSOR = "config.json", "generation_config.json", "README.md", "processor_config.json"
IMAGE_TOKENIZERS = ("image_tokenizer", "vqvae")  # folders in a checkpoint's; the second is Lumina-DiMOO's
DECODE = "decode_defaults"  # the configuration's attribute; never in config.json
TOKENIZER = "tokenizer.json|tokenizer_config.json"
TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt")
OTHERS = (*TOKENIZER_FILES, "*.safetensors", "README.md")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a folder held; `processor` is None where there is no tokenizer, `generation` the decode defaults.

    fresh: ids of tokens that its tokenizer lacked and got, which the model has not seen and may have no row for.
    image_tokenizer: the folder of the one that belongs to it, or None.
    """

    model: MultimodalModel
    processor: Processor | None
    generation: dict[str, Any] = field(default_factory=dict)
    fresh: tuple[int, ...] = ()
    image_tokenizer: Path | None = None


def save(
    path: str | Path,
    model: MultimodalModel,
    processor: Processor | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: torch.dtype | None = None,
    image_tokenizer: ImageTokenizer | None = None,
) -> Path:
    """Write the folder; one that is there is replaced at the end, so a reader never sees half of it.

    Args:
        generation: decode defaults; None is what the model was loaded or composed with (`decode_defaults`).
        card: text for the model card, such as what it was trained on.
        dtype: of the weights in the file; None as they are.
        image_tokenizer: what makes pictures of its codes, which goes into a folder of its own.

    Raises:
        ValueError: `path` is a folder that holds something other than a checkpoint.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise ValueError(
            f"{path} holds files but no {CONFIG}, so it is no checkpoint to be replaced; name another folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        with _quiet():
            if hasattr(model, "stored_names"):
                save_native(model, new, dtype)
            else:
                model.save_pretrained(new, state_dict=_cast(model.state_dict(), dtype))
        config = {key: value for key, value in read_json(new / CONFIG).items() if key != DECODE}
        _write(new / CONFIG, config if dtype is None else {**config, "dtype": str(dtype).removeprefix("torch.")})
        if processor is not None:
            processor.save_pretrained(new)
        defaults = decode_defaults(model) if generation is None else dict(generation)
        _write(new / GENERATION, to_dict(defaults))
        if image_tokenizer is not None:
            save_image_tokenizer(image_tokenizer, new / IMAGE_TOKENIZERS[0])
        (new / CARD).write_text(model_card(path.name, model, defaults, card), encoding="utf-8")
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return path


def dtype_of(given: torch.dtype | str | None, device: torch.device) -> Any:
    """The type of the weights: None is float32 on a CPU and the checkpoint's own elsewhere, which "auto" is everywhere.

    Raises:
        ValueError: a name that is no type.
    """
    if isinstance(given, str) and given != "auto":
        found = getattr(torch, given, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype={given!r} is not a torch dtype; use auto, float32, bfloat16 or float16.")
        return found
    return torch.float32 if given is None and device.type == "cpu" else given


def load(
    path_or_name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read a folder, the folder of a packaged model, or a hub name, for evaluation.

    Args:
        device: where the model goes; None is the CPU.
        dtype: of the weights; "auto" is the file's own, None that too, but float32 on a CPU.
        revision: branch, tag or commit of a hub name.
        config: fields over those of a published config.json, e.g. {"image_aspect_ratio": "pad"}.

    Raises:
        FileNotFoundError: there is no such folder or name; says what there is and how to get it.
        ValueError: it is another kind of model, or weights are missing, unexpected or of the wrong shape; named.
    """
    folder = resolve(path_or_name, revision=revision)
    device = torch.device(device or "cpu")
    if model_type(folder) != DmllmConfig.model_type:
        published = {**read_json(folder / CONFIG), **(config or {})}
        if family := family_of(published):
            return _load_published(folder, family, published, device, dtype)
    if config:
        raise ValueError(
            f"{folder} is no published checkpoint of a known family, so config={dict(config)} has no place."
        )
    ours = read_config(folder)
    if ours.family is not None and (family := FAMILIES.load(ours.family)).native is not None:
        return _load_published(folder, family, ours.published or {}, device, dtype)
    kept: Any = dtype or (torch.float32 if device.type == "cpu" else "auto")
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    generation.pop("transformers_version", None)
    with _quiet():
        loaded: Any = MultimodalModel.from_pretrained(
            folder,
            config=ours,
            dtype=kept,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    model, report = loaded
    set_decode_defaults(model, generation)
    wrong = [f"{name} ({list(stored)} for {list(wanted)})" for name, stored, wanted in report["mismatched_keys"]]
    refuse_keys(report["missing_keys"], [*report["unexpected_keys"], *wrong], folder, f"the model of its {CONFIG}")
    processor = Processor.from_pretrained(folder) if (folder / PROCESSOR).is_file() else None
    return Loaded(
        model=model.to(device).eval(), processor=processor, generation=generation, image_tokenizer=_drawing(folder)
    )


def _drawing(folder: Path) -> Path | None:
    """The folder of a checkpoint's image tokenizer."""
    return next((folder / name for name in IMAGE_TOKENIZERS if (folder / name / CONFIG).is_file()), None)


def _load_published(
    folder: Path, family: Family, published: Mapping[str, Any], device: torch.device, dtype: Any
) -> Loaded:
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    if model_type(folder) != DmllmConfig.model_type:  # whose config.json holds what stood beside theirs
        published = {**_beside(folder, family), **published}
    read, decode = read_published, family.decode_defaults(published)
    if family.native is not None:
        own = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
        read, decode = read_native, decode | {key: value for key, value in own.items() if value is not None}
    with _quiet():
        model = read(folder, family, published, device=device, dtype=None if dtype == "auto" else dtype)
    set_decode_defaults(model, decode)
    processor, fresh = None, ()
    if find(folder, TOKENIZER) is not None:
        tiling = model.tiling
        config = ProcessorConfig(
            **{key: value for key, value in family.processor.items() if key != "tiling"},
            tiling=None if tiling is None else replace(tiling, **family.processor.get("tiling", {})),
            image_frame=getattr(model, "image_frame", ()),
        )
        with _quiet():
            tokenizer = read_tokenizer(folder, family.tokenizer)
        if family.start:
            said = (published.get("text_config") or {}).get("mask_token_id", published.get("mask_token_id"))
            mask, new = find_mask(tokenizer, said)
            model.config.mask_token_id, fresh = mask, (mask,) if new else ()
        processor = Processor(tokenizer, config, model.config.special, family.chat_template)
    return Loaded(model=model, processor=processor, generation=decode, fresh=fresh, image_tokenizer=_drawing(folder))


def _beside(folder: Path, family: Family) -> dict[str, Any]:
    """The JSON files that stand beside a family's config.json, by the names they have without ".json"."""
    found = [folder / name for name in family.beside if (folder / name).is_file()]
    return {path.stem: read_json(path) for path in found}


def decode_defaults(model: MultimodalModel) -> dict[str, Any]:
    """The decode settings that the model was loaded or composed with, which `save` writes to generation_config.json."""
    return dict(getattr(model.config, DECODE, {}))


def set_decode_defaults(model: MultimodalModel, values: Mapping[str, Any]) -> None:
    """They travel on the configuration, so that a model rebuilt from it (gathered from several processes) has them."""
    setattr(model.config, DECODE, dict(values))


def load_processor(path_or_name: str | Path, *, revision: str | None = None) -> Processor:
    """The processor alone, without reading weights. Raises ValueError for a folder that has none, else as `load`."""
    folder = resolve(path_or_name, revision=revision)
    if not (folder / PROCESSOR).is_file():
        raise ValueError(f"{folder} has no {PROCESSOR}: it is a model without a tokenizer, which works on ids only.")
    return Processor.from_pretrained(folder)


def read_config(folder: Path) -> DmllmConfig:
    """The folder's configuration. Raises ValueError where it is another kind of model."""
    kind = model_type(folder)
    if kind != DmllmConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {kind!r}, not {DmllmConfig.model_type!r}. A Llama- or Qwen-shaped "
            f"language model can be the start of one; in a training YAML: model: {{backbone: {folder}, vision: ...}}."
        )
    return DmllmConfig.from_pretrained(folder)


def model_type(folder: Path) -> str | None:
    """What kind of model a folder says it holds."""
    return read_json(folder / CONFIG).get("model_type")


def resolve(path_or_name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: an existing one, else a packaged model's, else a hub name's."""
    name = str(path_or_name)
    need = (CONFIG, WEIGHTS)
    if not Path(name).is_dir():
        packaged = {path.name: path for path in _packaged()}
        if name in packaged:
            return fetch(str(packaged[name]), need)
        if name.count("/") != 1:
            known = ", ".join(sorted(packaged)) or "none"
            raise FileNotFoundError(
                f"{name!r} is neither a folder (seen from {Path.cwd()}) nor a packaged model (there are: {known}); "
                "a hub name has the form 'owner/name'."
            )
    return fetch(name, need, also=OTHERS, revision=revision)


def _packaged() -> list[Path]:
    """Folders of the models that come with dmllm."""
    root = Path(str(files("dmllm"))) / "assets" / "models"
    return [path for path in root.iterdir() if (path / CONFIG).is_file()] if root.is_dir() else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its own report on keys, which is an error here."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)  # as published
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _cast(weights: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    if dtype is None:
        return weights
    cast: dict[Any, torch.Tensor] = {}
    return {
        name: cast.setdefault(
            (w.data_ptr(), w.shape), w.to(dtype) if w.is_floating_point() else w
        )  # tied ones stay one
        for name, w in weights.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ValueError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
