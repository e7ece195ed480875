"""Lumina-DiMOO 8B: LLaDA's transformer over text tokens and VQ codes, rows of codes ended by a newline token.

Source: Xin et al., arXiv:2510.06308; code Alpha-VLLM/Lumina-DiMOO (config.py, model/, generators/, train/train.py).

A question about pictures is the ids of `<system>...</system><user>question`, each picture as `<IMAGE> row newline row
newline ... </IMAGE>`, then `</user>` and `<answer>`, behind which the mask tokens go: `ImageVocabulary.understanding`.
Behind the masks stands </answer> from the beginning (`suffix_ids`), which guidance hides along with the prompt.

Not seen: the config.json on the hub. The code's configuration is LLaDA's, model type "llada" included; the class's name
tells the two apart. The vocabulary ends behind the codes (126356 + 8192 = 134548 rows, as the code assumes).
"""

from __future__ import annotations

from typing import Any

from dmllm.families.family import Family, Fields
from dmllm.families.llada import EXAMPLE, KEYS, to_dmllm
from dmllm.image_vocabulary import ImageVocabulary

MASK = 126336
CLASS = "LLaDAForMultiModalGeneration"
SYSTEM = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images. Analyze each image and combine relevant details to answer."
)
IMAGES = ImageVocabulary(
    offset=126356,
    size=8192,
    begin=126349,
    end=126350,
    mask=MASK,
    newline=126084,
    draw_text="<system>Generate an image according to the text prompt.</system><user>{}</user>",
    edit_text="<system>Generate an image applying the following editing instruction based on the original image."
    "</system><user>{}</user>",
    edit_end=1,
    unconditional=126351,
    answer=(126354, 126355),
)
# Its own code names no turns but these; a second question follows the first answer in the same form.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<system>' + '" + SYSTEM + "' + '</system>' }}{% endif %}"
    "{% for message in messages %}{% set tag = {'assistant': 'answer'}.get(message['role'], message['role']) %}"
    "{{ '<' + tag + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '</' + tag + '>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
)


def recognise(config: Fields) -> bool:
    """LLaDA's model type, but the authors' class; or a model type of its own."""
    return config.get("model_type") == "lumina_dimoo" or CLASS in (config.get("architectures") or ())


def image_vocabulary(config: Fields) -> ImageVocabulary | None:
    """The ids of pictures under the authors' tokenizer; None for another, of which no config.json tells them."""
    return IMAGES if config.get("mask_token_id", MASK) == MASK else None


def of_llada(config: Fields) -> dict[str, Any]:
    """The fields of `DmllmConfig`; their code is told the mask token, config.json need not be."""
    return to_dmllm({"mask_token_id": MASK, **config})


def decode_of(config: Fields) -> dict[str, Any]:
    """What stands behind an answer, where its id is known."""
    images = image_vocabulary(config)
    return {} if images is None or images.answer is None else {"suffix_ids": [images.answer[1]]}


LUMINA_DIMOO = Family(
    name="lumina_dimoo",
    title="Lumina-DiMOO 8B",
    source="arXiv:2510.06308; Alpha-VLLM/Lumina-DiMOO",
    recognise=recognise,
    config=of_llada,
    keys=KEYS,
    ignored=(r".*rotary_emb\.inv_freq",),
    chat_template=CHAT_TEMPLATE,
    decode={
        "max_new_tokens": 1024,
        "block_steps": 32,
        "block_length": 256,
        "count_mask": True,
        "cfg_masks_draft": True,
    },
    decode_of=decode_of,
    drawing={
        "size": 1024,
        "steps": 64,
        "guidance": 4.0,
        "edit_guidance": 2.5,
        "image_guidance": 4.0,
        "temperature": 1.0,
        "schedule": "maskgit",
        "noise_schedule": "cosine",
        "order_temperature": 1.0,
        "order_cooling": "constant",
    },
    image_vocabulary=image_vocabulary,
    quirks=(
        (
            "makes an attention mask of the lengths of a batch's rows and does not use it: padding (id 0) is seen",
            "fixed",
            "padding is hidden, so that a row gets the logits that it gets alone",
        ),
        (
            "commits the mask token where that is the most probable, which leaves a hole that a later block may fill",
            "fixed",
            "the best other token is committed, by the same probability (count_mask)",
        ),
        (
            "stops with a NameError at the end of a block that holds <|endoftext|>",
            "fixed",
            "the slice names variables that are not there; an answer ends at <|endoftext|>, as was meant",
        ),
        (
            "inference_mmu.py ends the rows of a picture twice and cuts its codes to rows x columns entries",
            "fixed",
            "encode_img_with_breaks has put the newlines, begin and end already; training saw them once",
        ),
    ),
    example={**EXAMPLE, "architectures": [CLASS], "vocab_size": 384, "embedding_size": 384},
    verified="logits, picture ids, answers, forwards, guidance, loss: tests/families/test_lumina_dimoo.py; pictures "
    "and edits, seeded: tests/families/test_drawing.py",
)
