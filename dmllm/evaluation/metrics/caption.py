"""Captions: CIDEr (the headline), BLEU-1..4 and ROUGE-L, computed by pycocoevalcap.

Sources: Vedantam et al., arXiv:1411.5726; Papineni et al., ACL 2002; Lin, ACL 2004. The tokeniser changes CIDEr by
points, so it is named in the result: "ptb" is COCO's (Stanford's PTBTokenizer, needs java), "regex" is ours.
METEOR and SPICE are left out: they fetch or start further Java programs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from dmllm.evaluation.metrics import Corpus, Metric, Truths

_WORD = re.compile(r"\w+(?:['\u2019]\w+)?")


def tokenise(text: str) -> str:
    """Lower-case words of letters and digits, joined by one space; punctuation is dropped."""
    return " ".join(_WORD.findall(text.lower()))


def caption_scores(answers: Sequence[str], truths: Sequence[Truths], *, tokeniser: str | None = None) -> Corpus:
    """CIDEr of each answer against its references (0 to 10; inverse document frequencies come from these references).

    Args:
        tokeniser: "ptb", "regex", or None for ptb where java is on the path.
    """
    scorers = _scorers()
    tokeniser = tokeniser or ("ptb" if shutil.which("java") else "regex")
    candidates = {i: [answer] for i, answer in enumerate(answers)}
    references = {i: list(truth) for i, truth in enumerate(truths)}
    if tokeniser == "ptb":
        candidates, references = (_ptb(scorers["ptb"], texts) for texts in (candidates, references))
    else:
        candidates, references = (
            {i: [tokenise(text) for text in group] for i, group in texts.items()} for texts in (candidates, references)
        )
    bleu, _ = scorers["bleu"].Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, _ = scorers["rouge"].Rouge().compute_score(references, candidates)
    cider, each = scorers["cider"].Cider().compute_score(references, candidates)
    details: dict[str, Any] = {"cider": float(cider), "rouge_l": float(rouge)}
    details |= {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return Corpus(scores=[float(score) for score in each], details=details | {"tokeniser": tokeniser})


def _ptb(module: ModuleType, texts: dict[int, list[str]]) -> dict[int, list[str]]:
    rows = {i: [{"caption": " ".join(text.split())} for text in group] for i, group in texts.items()}
    return module.PTBTokenizer().tokenize(rows)


def _scorers() -> dict[str, ModuleType]:
    try:
        from pycocoevalcap.bleu import bleu
        from pycocoevalcap.cider import cider
        from pycocoevalcap.rouge import rouge
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError:
        raise ImportError("Caption metrics need pycocoevalcap: pip install 'dmllm[captions]'") from None
    return {"bleu": bleu, "cider": cider, "rouge": rouge, "ptb": ptbtokenizer}


CAPTION = Metric(name="caption", corpus=caption_scores, bounded=False)
