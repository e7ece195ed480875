"""What a chat template prints around the texts of a conversation, worked out once for every shape of conversation.

Rendering jinja for every turn of every record costs as much as tokenizing it. Most templates only print the texts
(perhaps stripped), so what they print for one conversation of some roles and parts they print for all of that shape.
This is found out, not assumed: the template is rendered with texts that raise as soon as anything but printing or
stripping is done to them, and whose ends show if they were changed by other means. Where that fails, or a text contains
what the template searches texts for, the template itself is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

_PRINTED, _STRIPPED = "\ue000", "\ue001"  # private use: not in templates
# White space at both ends and a quotation mark inside: trimming or escaping a printed text would not leave it whole.
_PLACE = re.compile(f'\\n"{_PRINTED}(\\d+){_PRINTED}"\\n|"{_STRIPPED}(\\d+){_STRIPPED}"')
# Filters that print or strip a text, raise on a stand, escape it visibly, or do not look at texts.
KNOWN_FILTERS = {
    *(
        "trim",
        "string",
        "safe",
        "default",
        "d",
        "tojson",
        "escape",
        "e",
        "upper",
        "lower",
        "capitalize",
        "length",
        "count",
    ),
    *("selectattr", "rejectattr", "list", "first", "last", "items", "dictsort"),
}
_KEPT = {
    *("__new__", "__init__", "__class__", "__str__", "__repr__", "__format__", "__getattribute__", "__setattr__"),
    *("__delattr__", "__doc__", "__dir__", "__reduce__", "__reduce_ex__", "__sizeof__", "__subclasshook__"),
    *("__init_subclass__", "__getnewargs__", "__getstate__"),
}


class TouchedError(BaseException):
    """The template does more with a text than print it; not an Exception, which jinja's tests would swallow."""


class _Joined(str):
    """A text of which any use but printing and joining is an error."""

    def __add__(self, other: str) -> _Joined:  # type: ignore[override]
        return _Joined(str(self) + str(other))

    def __radd__(self, other: str) -> _Joined:
        return _Joined(str(other) + str(self))


class _Stand(_Joined):
    """Stands for text number n; may also be stripped."""

    number: int

    def strip(self, characters: str | None = None) -> str:  # type: ignore[override]
        if characters is not None:
            _touched()
        return _Joined(f'"{_STRIPPED}{self.number}{_STRIPPED}"')


def _touched(*_: Any, **__: Any) -> NoReturn:
    raise TouchedError


for _name in set(dir(str)) - _KEPT - {"__add__", "strip"}:
    setattr(_Joined, _name, _touched)
_Joined.strip = _touched  # type: ignore[assignment,method-assign]


def stand(number: int) -> str:
    """A text that stands for text `number` of a conversation."""
    text = _Stand(f'\n"{_PRINTED}{number}{_PRINTED}"\n')
    text.number = number
    return text


def segments(rendered: str) -> list[str | tuple[int, bool]] | None:
    """What was rendered with stands, as literal strings and (text number, stripped); None if a stand was changed."""
    found: list[str | tuple[int, bool]] = []
    start = 0
    for match in _PLACE.finditer(rendered):
        found += [rendered[start : match.start()], (int(match[1] or match[2]), match[1] is None)]
        start = match.end()
    found.append(rendered[start:])
    if any(isinstance(s, str) and (_PRINTED in s or _STRIPPED in s) for s in found):
        return None
    return [s for s in found if s != ""]


def filled(skeleton: Sequence[str | tuple[int, bool]], texts: Sequence[str]) -> str:
    """The skeleton with the texts in their places."""
    return "".join(s if isinstance(s, str) else texts[s[0]].strip() if s[1] else texts[s[0]] for s in skeleton)


def only_known_filters(template: str) -> bool:
    """Whether every filter of the template prints, strips, or shows that it does more; others could go unnoticed."""
    tree = _compile_jinja_template(template).environment.parse(template)
    return {found.name for found in tree.find_all(nodes.Filter)} <= KNOWN_FILTERS


def searched_for(template: str) -> tuple[str, ...]:
    """The strings that a template searches for or passes to methods: a text that contains one is rendered in full."""
    tree = _compile_jinja_template(template).environment.parse(template)
    places: list[nodes.Node] = [*tree.find_all((nodes.Call, nodes.Filter, nodes.Test))]
    places += [c for c in tree.find_all(nodes.Compare) if any(o.op in ("in", "notin") for o in c.ops)]
    constants = {c.value for place in places for c in place.find_all(nodes.Const)}
    return tuple(sorted(c for c in constants if isinstance(c, str) and c))
