"""Further heads on a model's hidden rows, by name: what an objective learns beside the tokens.

An entry is a pair (module class, config class); the module is built as `Module(config, hidden_size, vocab_size)` and
called as `module(hidden, backbone)`, hidden rows [..., D] and the backbone for its embedding and vocabulary projection.
A head has `initialise()` for its random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmllm.config import keys_of, refuse_unknown
from dmllm.registry import Table

HEADS = Table(
    "head",
    {
        "mtp": "dmllm.models.mtp:MTP",
        "next_sentence": "dmllm.models.next_sentence:NEXT_SENTENCE",
        "insertion": "dmllm.models.missing:MISSING",
        "latent": "dmllm.models.latent:LATENT",
        "self_conditioning": "dmllm.models.feedback:SELF_CONDITIONING",
    },
)


def build_head(name: str, options: Mapping[str, Any], hidden_size: int, vocab_size: int) -> Any:
    """The head `name`. Raises ValueError for an unknown name or option."""
    module, config = HEADS.load(name)
    refuse_unknown(list(options), keys_of(config), f"the options of head {name!r}")
    return module(config(**options), hidden_size, vocab_size)
