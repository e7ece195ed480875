"""A tiny byte-level tokenizer, pictures and data files."""

import json

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dmllm.data.chat import CHAT_TEMPLATE, SPECIAL_TOKENS
from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.tiling import TilingConfig
from dmllm.types import Record, SpecialTokens

TEXTS = ["what colour is the circle left of the square?", "how many objects are there?", "red", "blue", "three"]
SPECIAL = SpecialTokens(pad=0, eos=1, mask=2, image=3)


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        mask_token="<|mask|>",
        extra_special_tokens=["<|image|>", "<|user|>", "<|assistant|>", "<|system|>"],
    )


@pytest.fixture(scope="session")
def make_processor(tokenizer):
    """A processor with 2x2 rows for a 4x4 picture; keyword arguments are the configuration's."""

    def make(chat_template=CHAT_TEMPLATE, **options):
        options = {"tiling": TilingConfig(tile_size=(4, 4), grid=(2, 2)), **options}
        return Processor(tokenizer, ProcessorConfig(**options), SPECIAL, chat_template)

    return make


@pytest.fixture
def picture(tmp_path):
    """Writes a one-coloured 4x4 PNG and returns its path."""

    def write(name="a.png", colour=(200, 30, 40), size=(4, 4)):
        path = tmp_path / name
        Image.new("RGB", size, colour).save(path)
        return str(path)

    return write


@pytest.fixture
def record():
    """A record from (role, text or [parts]) pairs; a part is a text or ("image", source)."""

    def make(*turns):
        messages = []
        for role, content in turns:
            parts = [content] if isinstance(content, str) else content
            messages.append(
                {
                    "role": role,
                    "content": [
                        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p[1]}
                        for p in parts
                    ],
                }
            )
        return Record(messages=messages, source="set", location="set.json: record 7")

    return make


@pytest.fixture
def llava_file(tmp_path):
    """Writes `num` LLaVA records, each with its own colour and three questions; returns the JSON file."""

    def write(num=10, name="data.json", turns=3, broken=()):
        rows = []
        for i in range(num):
            image = f"{name}-{i}.png"
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / image)
            if i in broken:
                (tmp_path / image).write_bytes(b"not a picture")
            conversation = []
            for k in range(turns):
                question = f"{'<image>' + chr(10) if k == 0 else ''}question {i} {k}?"
                conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": f"answer {i} {k}"}]
            rows.append({"id": str(i), "image": image, "conversations": conversation})
        path = tmp_path / name
        path.write_text(json.dumps(rows))
        return path

    return write
