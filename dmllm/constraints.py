"""What an answer must be, as a caller says it (choices, a regular expression, a JSON schema), made ready for decoding.

Each is compiled once into an automaton over the model's tokens and kept, the most recent ones. What must match is the
text before the end token, as `Reply.text` shows it; special and added tokens are never part of it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from dmllm.data.pieces import Pieces, pieces
from dmllm.samplers.automaton import TokenAutomaton
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.constraint import Constraint
from dmllm.samplers.language import choices, regex
from dmllm.samplers.outlines import schema_regex

KEPT = 64  # automata


class Constraints:
    """The constraints that one model's tokens have been asked to follow.

    Args:
        processor: a `Processor`: its tokenizer, and `decode`, by which an answer is shown; None where there is none.
        model: whose `config` says its special tokens and how many rows its vocabulary has.
    """

    def __init__(self, processor: Any, model: Any):
        self.processor, self.special = processor, model.config.special
        self.vocab_size = dict(getattr(model.config, "backbone", None) or {}).get("vocab_size")
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], TokenAutomaton] = OrderedDict()

    def of(self, config: DecodeConfig, canvas: Canvas) -> Constraint | None:
        """What `denoise` takes for a canvas of one row a request; None where any text will do.

        Raises:
            ValueError: a constraint is not understood, cannot be followed or has no text that fits on the canvas; or
                there are not as many as requests.
        """
        if config.constraint is None and config.choices is None:
            return None
        batch = len(canvas)
        rows = [("constraint", said) for said in _each(config.constraint, "constraint", batch)]
        if config.choices is not None:
            of_all = all(isinstance(text, str) for text in config.choices)
            each = [config.choices] * batch if of_all else _each(config.choices, "choices", batch)
            rows = [("choices", said) for said in each]
        automata = [None if said is None else self.compile(**{kind: said}, ends=config.stop_ids) for kind, said in rows]
        found = Constraint(automata, config.max_new_tokens)
        found.check(canvas)
        return found

    def compile(
        self, constraint: Any = None, *, choices: Any = None, ends: Sequence[int] | None = None
    ) -> TokenAutomaton:
        """One constraint over the model's tokens; its `report` says its size and how long this took.

        Args:
            ends: the tokens that end an answer; None is the model's end token.
        """
        ends = (self.special.eos,) if ends is None else tuple(ends)
        key = json.dumps([constraint, choices], default=repr), ends
        if key not in self._kept:
            texts = _language(constraint, choices)
            fill = [self.special.pad] if ends else []
            automaton = TokenAutomaton.of(texts, *self._pieces, ends, fill)
            self._kept[key] = automaton
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    @cached_property
    def _pieces(self) -> Pieces:
        if self.processor is None:
            raise ValueError("A constraint is on text, and this checkpoint has no tokenizer; leave it out.")
        found = pieces(self.processor.tokenizer, self.processor.decode)
        never = {self.special.mask, self.special.eos, self.special.pad, self.special.image}
        size = self.vocab_size or len(found.within)

        def of_model(own: list[bytes | None]) -> list[bytes | None]:
            own = [None if token in never else piece for token, piece in enumerate(own[:size])]
            return own + [None] * (size - len(own))

        return Pieces(of_model(found.within), of_model(found.first))


def _each(said: Any, name: str, batch: int) -> list[Any]:
    if not isinstance(said, list | tuple):
        return [said] * batch
    if len(said) != batch:
        raise ValueError(f"{name}: {len(said)} for {batch} requests; give one for all, or one (or None) for each.")
    return list(said)


def _language(constraint: Any, texts: Any) -> Any:
    if texts is not None or isinstance(constraint, list | tuple):
        return choices(constraint if texts is None else texts)
    if isinstance(constraint, str):
        return regex(constraint)
    if isinstance(constraint, dict):
        return regex(schema_regex(constraint))
    raise ValueError(
        f"constraint={constraint!r:.200} must be a regular expression (a text), a JSON schema (a dict), or a list with "
        "one of these, a list of choices or None for each request."
    )
