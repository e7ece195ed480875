"""The house rules, executed: who may import whom, how large a room may be, what may be said where."""

import ast
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dmllm
from dmllm.objectives import OBJECTIVES
from dmllm.registry import Table
from dmllm.samplers import PROCESSES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dmllm"
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
SHIPPED = [
    *MODULES,
    ROOT / "train.py",
    *(p for folder in ("eval", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))),
]

# Downward only; rooms of one level do not import each other, but for the pairs listed below.
LEVELS = {
    "types": 0, "config": 0, "registry": 0,
    "hub": 1, "diffusion": 1, "nn": 1, "tiling": 1, "image_vocabulary": 1,
    "models": 2, "data": 2,
    "objectives": 3, "samplers": 3, "families": 3, "checkpoints": 3,
    "requests": 3, "replies": 4, "encoded": 4, "computed": 4, "prompted": 4, "likelihoods": 4, "predictor": 4,
    "logits": 4, "scoring": 4, "infilling": 4, "pipeline": 4, "constraints": 4, "animation": 4, "auto": 4, "growing": 4,
    "drawing": 4, "board": 4, "imagining": 4,
    "training": 5,
    "serve": 6, "evaluation": 6, "rl": 6,
    "cli": 8, "__main__": 8, "__init__": 8,
}  # fmt: skip
SIBLINGS = {
    ("config", "registry"), ("checkpoints", "families"), ("computed", "encoded"), ("logits", "encoded"),
    ("prompted", "computed"), ("likelihoods", "computed"), ("likelihoods", "prompted"), ("predictor", "computed"),
    ("predictor", "prompted"), ("scoring", "computed"), ("scoring", "prompted"), ("infilling", "predictor"),
    ("infilling", "scoring"), ("infilling", "growing"), ("growing", "predictor"),
    ("drawing", "prompted"), ("board", "drawing"), ("imagining", "board"), ("imagining", "drawing"),
    ("pipeline", "imagining"),
    ("pipeline", "encoded"), ("pipeline", "computed"), ("pipeline", "replies"),
    *(("pipeline", part) for part in ("predictor", "likelihoods", "constraints", "logits", "scoring", "infilling")),
}  # fmt: skip
OPTIONAL = {
    "timm", "open_clip", "torchvision", "matplotlib", "sklearn", "pycocoevalcap", "datasets", "wandb", "trackio",
    "tensorboard", "transformers", "outlines_core", "diffusers", "lpips",
}  # fmt: skip
MAX_LINES, MAX_FUNCTION = 400, 80


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> set[str]:
    """Dotted names of dmllm modules imported by a file."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dmllm":
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "dmllm"}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_downward_only(path):
    here = room(path)
    assert here in LEVELS, f"{here} has no level: add it to LEVELS"
    for name in imported(path):
        there = name.split(".")[1] if "." in name else "__init__"
        if there == here or there not in LEVELS or here == "__init__":
            continue
        allowed = LEVELS[there] < LEVELS[here] or (here, there) in SIBLINGS
        assert allowed, f"{path.relative_to(ROOT)} (level {LEVELS[here]}) imports {name} (level {LEVELS[there]})"


def test_there_are_no_import_cycles():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in MODULES}
    graph = {name: {n for n in imported(path) if n in modules and n != name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: two ideas in one file?"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints_and_only_config_reads_the_environment(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert room(path) == "cli", f"{path.name}:{node.lineno} prints"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            assert room(path) == "config", f"{path.name}:{node.lineno} reads the environment; ask dmllm.config"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_open_with_what_they_are_and_leave_nothing_open(path):
    assert ast.get_docstring(tree(path)) or not path.read_text().strip(), f"{path} needs a module docstring"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError|breakpoint\(", text)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_inside_functions_are_optional_dependencies(path):
    for function in ast.walk(tree(path)):
        if not isinstance(function, ast.FunctionDef) or function.name == "__getattr__":
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for name in names:
                    allowed = name.split(".")[0] in OPTIONAL or room(path) in ("cli", "auto")
                    assert allowed, f"{path.name}:{node.lineno} imports {name} inside {function.name}"


@pytest.mark.parametrize(
    "part",
    [
        "models/backbones",
        "models/multimodal.py",
        "training/loop.py",
        "samplers/denoise.py",
        "predictor.py",
        "pipeline.py",
    ],
)
def test_backbone_loop_and_pipeline_name_no_paradigm(part):
    """What is learned is the objective's affair alone: no import of one, no branch on its name."""
    where = PACKAGE / part
    for path in sorted(where.rglob("*.py")) if where.is_dir() else [where]:
        named = {n for n in imported(path) if n.startswith("dmllm.objectives.")} - {
            "dmllm.objectives.build_objective", "dmllm.objectives.draws", "dmllm.objectives.draws.Draws",
        }  # fmt: skip
        assert not named, f"{path.name} imports {named}"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                paradigms = {*OBJECTIVES, *PROCESSES} - {"absorbing"}  # what a config that names none undoes
                assert node.value not in paradigms, f"{path.name}:{node.lineno} names {node.value!r}"


def tables() -> list[Table]:
    found = {}
    for module in pkgutil.walk_packages([str(PACKAGE)], "dmllm."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Table):
                found[id(value)] = value
    return list(found.values())


def test_every_table_entry_can_be_loaded_or_says_what_to_install():
    assert len(tables()) >= 5
    for table in tables():
        for name in table:
            said = ""
            try:
                table.load(name)
            except ImportError as error:
                said = str(error)
            assert not said or "pip install" in said, f"{table.kind} {name}: {said}"


@pytest.mark.parametrize(
    "path",
    [p for p in ROOT.rglob("*.y*ml") if not {".venv", ".venv-min", ".tools", "runs"} & set(p.relative_to(ROOT).parts)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_every_yaml_parses(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""


def test_every_path_in_the_readme_exists():
    pattern = (
        r"(?<![\w./])((?:dmllm|data_configs|eval|benchmarks|tests|examples|docs)/[\w./*-]+|\w+\.py|Makefile)(?![\w/])"
    )
    paths = {p.rstrip(".") for p in re.findall(pattern, README)}
    assert len(paths) > 5
    missing = [p for p in paths if not list(ROOT.glob(p.rstrip("/")))]
    assert not missing, f"README names paths that do not exist: {missing}"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_every_python_block_in_the_readme_runs(block, tmp_path):
    result = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_every_command_in_the_readme_is_known():
    """Commands are not run here (some take long), but each parses: the sub-command and the options exist."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    commands = [said for block in blocks for line in block.splitlines() if (said := line.split("#")[0].strip())]
    assert commands
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    cli = importlib.import_module("dmllm.cli")
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "dmllm":
            cli.check(words[1:])


def test_the_version_is_said_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dmllm.__version__)
