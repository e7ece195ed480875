"""The command line: a name, its arguments, the function that does it. `dmllm COMMAND --help` says more.

Settings of decoding, training and evaluation are not repeated here: what a command does not know itself is passed on as
`--key=value` to the configuration it is about, which names the nearest known key when there is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmllm.cli.drawing import add_drawing
from dmllm.cli.options import decode_options, example
from dmllm.cli.published import add_commands

if TYPE_CHECKING:
    from dmllm.types import Step


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors a person can mend are one line, without a stack trace."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and not arguments.passes_on:
        _parser().parse_args(argv)  # prints the usage and exits
    try:
        return arguments.run(arguments, rest) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        print(f"dmllm {arguments.command}: {error}", file=sys.stderr)
        return 2


def check(argv: Sequence[str]) -> None:
    """Parse a command without running it. Raises ValueError if it is not one."""
    try:
        arguments, rest = _parser().parse_known_args(argv)
    except SystemExit as stop:
        raise ValueError(f"dmllm {' '.join(argv)}: not a command") from stop
    if rest and not arguments.passes_on:
        raise ValueError(f"dmllm {' '.join(argv)}: unknown arguments {rest}")


def chat(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Ask once, or interactively when no question is given."""
    from rich.console import Console

    from dmllm.pipeline import load

    decode, words = decode_options(rest)
    if len(words) > 1 or (words and arguments.question):
        raise ValueError(
            f"{' '.join(words)!r} is not understood: write the question in one pair of quotes, options as --steps=8."
        )
    arguments.question = arguments.question or (words[0] if words else None)
    pipeline = load(arguments.model, device=arguments.device)
    images = [example(path) for path in arguments.image]
    if arguments.question:
        _answer(pipeline, arguments.question, images, decode, arguments)
        return
    console = Console()
    console.print(
        f"[bold]{arguments.model}[/] with {len(images)} image(s). /image PATH adds one, /new starts over, /quit ends."
    )
    messages: list[dict] = []
    while (line := _read_line(console)) is not None:
        if line.startswith("/image "):
            images.append(example(line.removeprefix("/image ").strip()))
        elif line == "/new":
            messages, images = [], [example(path) for path in arguments.image]
        elif line:
            shown = [{"type": "image", "image": image} for image in images] if not messages else []
            question = {"role": "user", "content": [*shown, {"type": "text", "text": line}]}
            try:
                reply = _answer(pipeline, [*messages, question], None, decode, arguments)
            except ValueError as error:
                console.print(f"[red]{error}[/]")
                continue
            messages += [question, {"role": "assistant", "content": [{"type": "text", "text": reply}]}]


def _answer(pipeline, question, images, decode: dict, arguments: argparse.Namespace) -> str:  # type: ignore[no-untyped-def]
    """Print the reply, with the denoising drawn or saved when asked for."""
    if not (arguments.show_steps or arguments.gif):
        reply = pipeline.chat(question, images or None, **decode)
        print(reply.text)
        return reply.text
    from dmllm.animation import play, save_gif

    steps: list[Step] = []

    def stream() -> Iterator[Step]:
        for step in pipeline.stream(question, images or None, **decode):
            steps.append(step)
            yield step

    if arguments.show_steps:
        play(stream(), pipeline.token_texts, delay=arguments.delay)
    else:
        list(stream())
    text = pipeline.text(steps[-1])
    print(text)
    if arguments.gif:
        asked = question if isinstance(question, str) else question[-1]["content"][-1]["text"]
        save_gif(steps, arguments.gif, pipeline.token_texts, image=images[0] if images else None, question=asked)
        print(f"saved {arguments.gif}", file=sys.stderr)
    return text


def _read_line(console) -> str | None:  # type: ignore[no-untyped-def]
    try:
        line = console.input("[bold cyan]you[/] ").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line


def train(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Train from a recipe."""
    from dmllm.training.command import main as run

    return run([arguments.recipe, *rest])


def evaluate(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Evaluate a model on a suite and write a report."""
    from dmllm.config import load_config
    from dmllm.evaluation.config import SuiteConfig
    from dmllm.evaluation.report import write_report
    from dmllm.evaluation.results import summary_lines
    from dmllm.evaluation.runner import evaluate as run
    from dmllm.pipeline import load

    suite = load_config(SuiteConfig, arguments.suite, rest)
    pipeline = load(arguments.model, device=arguments.device)
    out = Path(arguments.out or f"runs/eval/{Path(arguments.suite).stem}-{Path(arguments.model).name}")
    run(pipeline, suite, out, model_name=arguments.model)
    compared = [*map(Path, arguments.against), out]
    curve = Path(arguments.run_folder) / "metrics.jsonl" if arguments.run_folder else None
    report = write_report(out, [(folder.name, folder) for folder in compared], loss_curve=curve, pipeline=pipeline)
    for line in summary_lines(compared):
        print(line)
    print(f"report: {report}")


def compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Train and measure several paradigms side by side, and write a report."""
    import logging

    from dmllm.evaluation.comparison.config import read_comparison
    from dmllm.evaluation.comparison.driver import compare as run
    from dmllm.evaluation.comparison.report import REPORT, SUMMARY, write_into, write_report

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dmllm.evaluation").setLevel(logging.INFO)
    config = read_comparison(
        arguments.suite, rest, short=arguments.short, only=arguments.only, studies=arguments.studies
    )
    out = Path(arguments.out or f"runs/compare/{Path(arguments.suite).stem}{'-short' if arguments.short else ''}")
    write_report(run(config, out), config, out)
    if arguments.page:
        write_into(arguments.page, out / SUMMARY)
    print(f"report: {out / REPORT}")


def data_make(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Write a built-in data set as LLaVA JSON and PNG."""
    from dmllm.data.builtin import make

    names = ("num", "seed", "split", "size", "turns", "reading", "large_print", "kinds")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    print(make(arguments.name, arguments.out, **options))


def data_check(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Look a data configuration over before training on it."""
    from dmllm.checkpoints.folder import load_processor
    from dmllm.data.check import check as look

    processor = load_processor(arguments.model) if arguments.model else None
    report = look(arguments.config, processor, samples=arguments.samples, out=Path(arguments.out))
    for line in report.lines():
        print(line)
    if report.problems:
        raise ValueError(f"{len(report.problems)} problems found.")


def tokenizer_train(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Train a byte-level BPE on texts."""
    from dmllm.checkpoints.tokenizer import train_tokenizer

    print(
        train_tokenizer(arguments.files, vocab_size=arguments.vocab_size, out=arguments.out, isolate=arguments.isolate)
    )


def tokenizer_train_image(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Train a tokenizer of images on a folder of pictures, or on a built-in data set."""
    import logging

    from dmllm.config import load_config
    from dmllm.training.image_tokenizers import ImageTokenizerConfig, train_image_tokenizer

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dmllm").setLevel(logging.INFO)
    trained = train_image_tokenizer(load_config(ImageTokenizerConfig, arguments.recipe, rest))
    if trained.model is None or trained.quality is None:
        return 130
    print(f"{trained.model}: {trained.quality.line()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dmllm", description="Multimodal diffusion language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, *, under=commands, passes_on: bool = False, help: str | None = None):  # type: ignore[no-untyped-def]
        sub = under.add_parser(name, help=help or (run.__doc__ or "").splitlines()[0], description=run.__doc__)
        sub.set_defaults(run=run, passes_on=passes_on, command=sub.prog.removeprefix("dmllm "))
        return sub

    def group(name: str, help: str):  # type: ignore[no-untyped-def]
        return commands.add_parser(name, help=help).add_subparsers(dest="action", required=True, metavar="ACTION")

    p = command("chat", chat, passes_on=True)
    p.add_argument("model", help="a folder, a packaged name such as dmllm-tiny, or a hub name")
    p.add_argument("question", nargs="?", help="leave out for a conversation")
    p.add_argument("--image", action="append", default=[], help="path of a picture; may be repeated")
    p.add_argument("--show-steps", action="store_true", help="draw the denoising in the terminal")
    p.add_argument("--delay", type=float, default=0.15, help="seconds between drawn steps")
    p.add_argument("--gif", help="save the denoising as an animation")
    p.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")

    add_drawing(command)
    add_commands(command)

    p = command("train", train, passes_on=True)
    p.add_argument("recipe", help="a training YAML such as data_configs/dmllm_tiny.yaml; --a.b=c overrides it")

    p = command("eval", evaluate, passes_on=True)
    p.add_argument("suite", help="a suite YAML such as eval/suites/scenes.yaml; --a.b=c overrides it")
    p.add_argument("--model", required=True)
    p.add_argument("--out", help="folder for predictions, results and report")
    p.add_argument(
        "--against", action="append", default=[], help="folder of an earlier evaluation to show beside; may be repeated"
    )
    p.add_argument("--run", dest="run_folder", help="folder of the training run whose loss curve the report shows")
    p.add_argument("--device")

    p = command("compare", compare, passes_on=True)
    p.add_argument("suite", help="a comparison such as eval/suites/paradigms.yaml; --a.b=c overrides it")
    p.add_argument("--out", help="folder for runs, results and report")
    p.add_argument("--short", action="store_true", help="what the file calls short: minutes, to see that it runs")
    p.add_argument("--only", nargs="+", default=[], help="only these paradigms")
    p.add_argument("--studies", nargs="+", default=[], help="only these studies")
    p.add_argument("--page", help="a Markdown page whose results part is written anew, such as docs/paradigms.md")

    data = group("data", "make and check data sets")
    p = command("make", data_make, under=data)
    p.add_argument("name", help="scenes, digits or stories")
    p.add_argument("--out", required=True)
    p.add_argument("--num", type=int, required=True, help="pictures, or texts")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=["train", "val", "test"], default="train")
    p.add_argument("--size", type=int, help="side of the pictures in pixels")
    p.add_argument("--turns", type=int, help="questions a picture")
    p.add_argument("--reading", type=float, help="scenes: share of pictures with lines of text")
    p.add_argument("--large-print", type=float, help="scenes: share of pictures with a few large characters")
    p.add_argument("--kinds", nargs="+", help="scenes, stories: only these kinds, e.g. relation exist")
    p = command("check", data_check, under=data)
    p.add_argument("config", help="a data YAML: datasets: [...]")
    p.add_argument("--model", help="count tokens with this checkpoint's processor")
    p.add_argument("--samples", type=int, default=3)
    p.add_argument("--out", default="runs/data_check.png", help="picture of rendered samples")

    tokenizer = group("tokenizer", "train a tokenizer of texts or images")
    p = command("train", tokenizer_train, under=tokenizer)
    p.add_argument("files", nargs="+", help="text files, or LLaVA JSON")
    p.add_argument("--vocab-size", type=int, required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--isolate", help="regular expression of characters that stay one token each, e.g. '[A-Z0-9]'")
    p = command("train-image", tokenizer_train_image, under=tokenizer, passes_on=True)
    p.add_argument("--recipe", help="a YAML of settings; --data.path=FOLDER --output_dir=FOLDER and others override it")
    return parser
