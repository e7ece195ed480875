"""Frozen dataclasses <-> YAML <-> `--a.b=c` on the command line: one mechanism for every command; also the only
reader of the environment.

A configuration is a keyword-only frozen dataclass whose fields are plain values or further such dataclasses. Parsing,
types and merging are jsonargparse's; what is added here is the error that names the nearest known keys and the YAML
that a run saves beside its results.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from dmllm.registry import nearest

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """An instance of the dataclass `cls` from a YAML file and `--a.b=c` overrides (later ones win).

    Raises:
        FileNotFoundError: no such YAML file.
        ValueError: the file is not YAML, a key is unknown (the nearest known ones are named), or a value has the
            wrong type or is refused by the dataclass itself.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(cls, None, fail_untyped=False)
    values = read_yaml(path) if path is not None else {}
    known = keys_of(cls)
    refuse_unknown([*flatten(values)], known, str(path))
    refuse_unknown([o[2:].partition("=")[0] for o in overrides if o.startswith("--")], known, "the command line")
    try:
        parsed = parser.parse_args([*(["--config", yaml.safe_dump(values)] if values else []), *overrides])
        instance = parser.instantiate(parsed)
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise ValueError(f"{path or 'command line'}: {' '.join(str(error).split())}") from None
    return cls(**{f.name: instance[f.name] for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError naming the file and line when it is not one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No configuration file {path}; the working directory is {Path.cwd()}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a configuration is a mapping 'key: value'.")
    return values or {}


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to an equal instance."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    temporary.replace(path)


def to_dict(config: Any) -> Any:
    """The configuration as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def environment(name: str, default: str | None = None) -> str | None:
    """An environment variable. The rest of the project asks here, so that ENVIRONMENT lists all that is read."""
    assert name in ENVIRONMENT, name
    return os.environ.get(name, default)


ENVIRONMENT = {
    "WORLD_SIZE": "number of processes, set by torchrun",
    "RANK": "index of this process, set by torchrun",
    "LOCAL_RANK": "index of this process on its machine, set by torchrun",
    "ACCELERATE_USE_FSDP": "'true' asks accelerate for FSDP",
    "HF_HUB_OFFLINE": "'1' keeps every hub name to the local cache",
}


def refuse_unknown(keys: list[str], known: set[str] | None, where: str) -> None:
    """Raise ValueError for the first key that no field has; keys below an open `dict` field are free."""
    for key in keys:
        if known is None or key in known or any(k.endswith(".*") and key.startswith(k[:-1]) for k in known):
            continue
        parents = {k.removesuffix(".*") for k in known}
        if key in parents:
            continue
        raise ValueError(f"Unknown key {key!r} in {where}; {nearest(key, sorted(parents))}")


def keys_of(cls: type, prefix: str = "") -> set[str]:
    """Every dotted key of a configuration class; 'a.*' stands for anything below an open mapping or list."""
    keys: set[str] = set()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        keys.add(name)
        for part in _members(hints[field.name]):
            items = [a for a in typing.get_args(part) if dataclasses.is_dataclass(a)]  # of a list of dataclasses
            if dataclasses.is_dataclass(part) or items:
                for nested in items or [part]:
                    keys |= keys_of(nested, f"{name}.")  # type: ignore[arg-type]
            elif (typing.get_origin(part) or part) in (dict, list, tuple, Any):
                keys.add(f"{name}.*")
    return keys


def flatten(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a nested mapping, parents included; the entries of a list share their list's key."""
    keys: list[str] = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                keys += flatten(part, f"{prefix}{key}.")
    return keys


def _members(hint: Any) -> list[Any]:
    """The alternatives of a union type, or the type itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, _UNION) else [hint]


_UNION = type(int | str)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: 1e-4 is a number (YAML 1.1 reads it as a string), and duplicate keys are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
