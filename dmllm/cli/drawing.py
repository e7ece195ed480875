"""The command that draws pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dmllm.cli.options import decode_options, example


def imagine(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Draw a picture of a description, or make one into another."""
    from dmllm.animation import save_pictures
    from dmllm.pipeline import load

    options, words = decode_options(rest)
    if words:
        raise ValueError(f"{' '.join(words)!r} is not understood: write the description in one pair of quotes.")
    pipeline = load(arguments.model, device=arguments.device, image_tokenizer=arguments.image_tokenizer)
    for name in ("size", "expand"):
        options |= {name: tuple(options[name])} if isinstance(options.get(name), list) else {}
    if arguments.image:
        mask = None if arguments.mask is None else example(arguments.mask)
        steps = pipeline.editing(example(arguments.image), arguments.description, mask=mask, **options)
    else:
        steps = pipeline.imagining(arguments.description, **options)
    shown = list(steps)
    out, many = Path(arguments.out), len(shown[-1]) > 1
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(shown[-1]):
        path = out.with_stem(f"{out.stem}-{number}") if many else out
        image.save(path)
        print(path)
    if arguments.gif:
        print(save_pictures([images[0] for images in shown], arguments.gif))


def add_drawing(command: Callable) -> None:
    """Enter it among the others."""
    p = command("imagine", imagine, passes_on=True)
    p.add_argument("model", help="a folder, a packaged name, or a hub name")
    p.add_argument("description", help="what is to be seen; with --image alone, what is to be done")
    p.add_argument("--out", default="picture.png", help="where the picture goes; several are numbered")
    p.add_argument("--image", help="path of a picture that is made into another")
    p.add_argument("--mask", help="path of a picture, white where --image is drawn anew")
    p.add_argument("--image-tokenizer", help="folder of what makes pictures of codes; the model's own if it has one")
    p.add_argument("--gif", help="save how the first picture comes to be, as an animation")
    p.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")
