"""The wheel, installed where nothing of the repository is in reach, answers about its own picture with its own model.

Its dependencies are those of the environment the tests run in, lent through a .pth file: installing torch's 5 GB again
would show nothing more. Python does not read the .pth files in a folder that a .pth file names, so an editable
installation of dmllm stays out. Building takes hatchling from the package index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import dmllm

ROOT = Path(__file__).parent.parent
MODEL = "dmllm/assets/models/dmllm-tiny"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)
MAX_BYTES = 12_000_000  # of the shipped weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str | Path, cwd: Path) -> str:
    """What the command says, in an environment without a path to the repository."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def find_uv() -> str | None:
    """uv as the Makefile finds it."""
    own = ROOT / ".tools" / "bin" / "uv"
    return shutil.which("uv") or (str(own) if own.exists() else None)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out, uv = tmp_path_factory.mktemp("dist"), find_uv()
    builder = [uv, "build"] if uv else [sys.executable, "-m", "build"]
    run(*builder, "--wheel", ROOT, *(["--out-dir", out] if uv else ["--outdir", out]), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of an environment that holds the wheel."""
    place, uv = tmp_path_factory.mktemp("env"), find_uv()
    venv.create(place, with_pip=uv is None, symlinks=True)
    python = place / "bin" / "python"
    installer = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    run(*installer, "--no-deps", "--no-index", wheel, cwd=place)
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own,) = place.glob("lib/python*/site-packages")
    (own / "lent.pth").write_text("".join(f"{path}\n" for path in lent), encoding="utf-8")
    return python.parent


def test_it_holds_the_package_its_assets_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
        (metadata,) = (archive.read(name).decode() for name in sizes if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {dmllm.__version__}\n" in metadata
    assert {name.split("/")[0] for name in sizes} == {"dmllm", f"dmllm-{dmllm.__version__}.dist-info"}
    assert not [name for name in sizes if "test" in name.split("/") or "tests" in name.split("/") or ".pyc" in name]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dmllm").rglob("*.py")}
    assert modules == {name for name in sizes if name.endswith(".py")}
    assert "dmllm/evaluation/report.html.jinja" in sizes
    examples = {str(path.relative_to(ROOT)) for path in (ROOT / "dmllm" / "assets" / "examples").iterdir()}
    assert "dmllm/assets/examples/scene.png" in examples
    assert examples <= set(sizes)
    assert {f"{MODEL}/{name}" for name in MODEL_FILES} <= set(sizes)
    assert sizes[f"{MODEL}/model.safetensors"] <= MAX_BYTES


def test_the_installed_package_is_the_one_that_is_imported(installed, tmp_path):
    where = run(installed / "python", "-c", "import dmllm; print(dmllm.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_chat_answers_with_a_number_from_an_empty_folder(installed, tmp_path):
    question = "how many objects are there?"
    said = run(installed / "dmllm", "chat", "dmllm-tiny", "--image", "examples/scene.png", question, cwd=tmp_path)
    assert re.fullmatch(r"\d+", said.strip()), said
    assert not list(tmp_path.iterdir())


def test_info_describes_the_packaged_model(installed, tmp_path):
    said = run(installed / "dmllm", "info", "dmllm-tiny", cwd=tmp_path)
    assert re.search(r"parameters\s+[\d,]+", said)
    assert "timm:" in said
