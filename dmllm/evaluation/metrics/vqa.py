"""VQA accuracy: an answer is right when at least three of ten people gave it, averaged over leaving each person out.

Source: Antol et al., arXiv:1505.00468, and Goyal et al. (VQAv2), arXiv:1612.00837; the normalisation follows the
published evaluation tool (GT-Vision-Lab/VQA). Two of its habits are kept because every reported number has them: a full
stop before a digit stays wherever it stands, and a number with a comma makes all punctuation vanish instead of
becoming a space. One is not: the tool compares raw strings when all ten people agree; here, as in most later
evaluations, both sides are always normalised, so that "Red." is right when everybody said "red".
"""

from __future__ import annotations

import re

from dmllm.evaluation.metrics import Metric, Truths

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
_COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(_COUNTED.split())} | {"none": "0"}

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A word with one of its apostrophes left out is given it back. The last entry is the tool's own slip, kept with it.
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, char in enumerate(word) if char == "'"
} | {"somebody'd": "somebodyd"}

_FULL_STOP = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")


def normalise_vqa(text: str) -> str:
    """Lower case, no articles, digits for number words, apostrophes restored, punctuation dropped or made a space."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if drop_all or beside_space else " ")
    words = _FULL_STOP.sub("", cleaned).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, truths: Truths) -> float:
    """The mean over people of min(1, how many of the *others* gave this answer / 3).

    One truth alone asks for that answer. Raises ValueError for two or three: with them no answer can reach 1.
    """
    given = normalise_vqa(answer)
    people = [normalise_vqa(truth) for truth in truths]
    if len(people) == 1:
        return float(given == people[0])
    if len(people) < 4:
        raise ValueError(
            f"VQA accuracy takes one truth or at least four (ten are usual), not {len(people)}: {list(truths)}; "
            "for a list of acceptable answers use metric: exact_match."
        )
    agree = people.count(given)
    return sum(min(1.0, (agree - (person == given)) / 3) for person in people) / len(people)


VQA = Metric(name="vqa", each=vqa_accuracy)
