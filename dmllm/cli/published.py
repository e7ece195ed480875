"""Commands on published models: what there is, what a checkpoint holds, random ones, from one format to another."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def models(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Published models that load, and what of them is verified."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Sheet

    from dmllm.families.document import families, markdown

    if arguments.markdown:
        print(markdown(), end="")
        return
    sheet = Sheet(box=SIMPLE_HEAD)
    for title in ("family", "models", "source", "verified"):
        sheet.add_column(title, overflow="fold")
    for family in families():
        sheet.add_row(f"[bold]{family.name}[/]", family.title, family.source, family.verified)
    console = Console()
    if not console.is_terminal:  # paths of tests stay whole where another program reads them
        console.width = 240
    console.print(sheet)


def info(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Family, parts, sizes, ids, caches and decode defaults of a checkpoint."""
    from rich.console import Console
    from rich.table import Table as Sheet

    from dmllm.pipeline import load

    pipeline = load(arguments.model, device="meta", dtype="auto")  # names and shapes; no weight is kept
    said = pipeline.describe()
    said["weights"] = f"{pipeline.model.dtype}, as stored"
    del said["device"]
    sheet = Sheet(show_header=False, box=None)
    for name, value in said.items():
        sheet.add_row(f"[bold]{name}[/]", str(value))
    Console().print(sheet)


def init(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Write a random model in a family's published format, to try things without weights."""
    from dmllm.checkpoints.example import write_example

    print(write_example(arguments.family, arguments.out, size=arguments.size, seed=arguments.seed))


def convert(arguments: argparse.Namespace, rest: list[str]) -> None:
    """A published checkpoint to a dmllm folder, that back to published, or a causal language model to a start."""
    from dmllm.checkpoints.convert import convert as run

    paths = [*([arguments.source] if arguments.source else []), *arguments.paths]
    if len(paths) != 2:
        raise ValueError("write IN OUT, or --from IN OUT: one checkpoint and the folder that is written.")
    print(run(*paths, to=arguments.to, shift=arguments.shift, vision=arguments.vision, revision=arguments.revision))


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Their arguments."""
    p = command("models", models)
    p.add_argument("--markdown", action="store_true", help="print what docs/models.md holds")

    command("info", info).add_argument("model")

    p = command("init", init)
    p.add_argument("--family", required=True, help="a name that `dmllm models` lists")
    p.add_argument("--size", default="tiny", help="tiny, small, or a YAML of config.json fields that replace tiny's")
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=0, help="of the weights")

    p = command("convert", convert)
    p.add_argument("paths", nargs="+", metavar="PATH", help="IN OUT: a checkpoint, and the folder that is written")
    p.add_argument("--from", dest="source", metavar="IN", help="the checkpoint, in place of the first path")
    p.add_argument(
        "--to",
        default="dmllm",
        help="dmllm; published (from a dmllm folder that came from there); of a causal language model, with vision or "
        "not: masked (full attention), block or block:N (block diffusion, N is 32 unless said)",
    )
    p.add_argument(
        "--shift",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="causal language models: go on predicting a token from the row before it",
    )
    p.add_argument("--vision", help="causal language models: put this encoder before it, e.g. hf:NAME or timm:NAME")
    p.add_argument("--revision", help="branch, tag or commit of a hub name")
