"""MMaDA 8B: LLaDA's transformer over text tokens and MAGVIT-v2 codes, one softmax for both.

Source: Yang et al., arXiv:2505.15809; code Gen-Verse/MMaDA (models/modeling_mmada.py, training/prompting_utils.py).

A question about a picture is `<|mmu|> <|soi|> codes <|eoi|>` and then the chat template's ids: see
`ImageVocabulary.understanding`. Code 0 has the first id behind the tokenizer's (`len(tokenizer)`, 126349), not the
first behind LLaDA's rows (`llm_vocab_size`, 126464).

Training runs attention with an additive bias of 1 at real tokens and 0 at padding in place of a mask, so that padding
is seen with a weight of 1/e; inference does not. Its loss of pictures is also that of the two tokens around their
codes, which are labelled and never hidden.

Not seen: the config.json on the hub. Its fields are taken to be those that the code reads.
"""

from __future__ import annotations

from dmllm.families.family import Family, Fields
from dmllm.families.llada import CHAT_TEMPLATE, EXAMPLE, KEYS, to_dmllm
from dmllm.image_vocabulary import ImageVocabulary

MASK = 126336
IMAGES = ImageVocabulary(
    offset=126349,
    size=8192,
    begin=126084,
    end=126085,
    mask=MASK,
    understand=(126089,),
    draw=(126088, 126080),
    draw_end=(126081,),
    draw_length=513,
    pad=126093,
)


def image_vocabulary(config: Fields) -> ImageVocabulary | None:
    """The ids of pictures under LLaDA's tokenizer; None for another, whose length no config.json tells."""
    return IMAGES if config.get("mask_token_id") == MASK and config.get("codebook_size", IMAGES.size) == 8192 else None


MMADA = Family(
    name="mmada",
    title="MMaDA 8B base and MixCoT",
    source="arXiv:2505.15809; Gen-Verse/MMaDA",
    recognise=lambda config: config.get("model_type") == "mmada",
    config=to_dmllm,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    chat_template=CHAT_TEMPLATE,
    decode={"max_new_tokens": 512, "block_steps": 64, "block_length": 128, "count_mask": True},
    drawing={
        "size": 512,
        "steps": 15,
        "guidance": 3.5,
        "temperature": 1.0,
        "schedule": "maskgit_fixed",
        "noise_schedule": "cosine",
        "order_temperature": 1.0,
        "order_cooling": "compounding",
    },
    image_vocabulary=image_vocabulary,
    quirks=(
        (
            "the noise on the order of codes is made smaller by 1 - r at every call, each time by what is left of it",
            "order_cooling: compounding, the default here; linear is MaskGIT's",
            "what its pictures were made with; of 15 calls the eighth has a twentieth of the first noise",
        ),
        (
            "counts what stays masked from all codes of a picture, also where most of them are given",
            "schedule: maskgit_fixed, the default here; maskgit counts what was open",
            "with much of a picture given, its first calls find one code each",
        ),
        (
            "training adds 1 to attention at real tokens and 0 at padding, in place of a mask",
            "objective.options.padding: hidden, the default; faint is theirs",
            "padding is seen with a weight of 1/e; the authors' own inference hides it",
        ),
        (
            "commits the mask token where that is the most probable, which leaves a hole or wastes a call",
            "fixed",
            "the best other token is committed, by the same probability (count_mask)",
        ),
        (
            "mmu_generate with guidance ignores attention_mask",
            "fixed",
            "the mask is passed in the unguided branch only",
        ),
    ),
    example={
        **EXAMPLE,
        "architectures": ["MMadaModelLM"],
        "model_type": "mmada",
        "llm_vocab_size": 320,
        "codebook_size": 64,
        "vocab_size": 384,
        "embedding_size": 384,
        "new_vocab_size": 384,
    },
    verified="logits, answers about pictures, forwards: tests/families/test_mmada.py; losses: "
    "tests/families/test_losses.py; pictures, seeded: tests/families/test_drawing.py",
)
