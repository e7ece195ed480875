"""Chat templates: rendered turn by turn, the shortcut equal to the template itself, unusable templates refused."""

import pytest

from dmllm.data.chat import CHAT_TEMPLATE, Chat, as_messages, split_marker
from dmllm.data.skeleton import searched_for

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|image|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|hdr|>")

# As text models have it: contents are strings, trimmed; a beginning-of-text token in front.
LLAMA = (
    "{% for message in messages %}{% set content = '<|hdr|>' + message['role'] + '<|hdr|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}{{ '<|hdr|>assistant<|hdr|>\n\n' }}{% endif %}"
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}<|image|>{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Looks into the answers, as templates of thinking models do.
THINKING = (
    "{%- macro body(content) %}{{ content }}{% endmacro %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% set content = body(m.content) %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}{{ content.split('</think>')[-1] }}"
    "{%- else %}{{ content }}{% endif %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOUTING = CHATML.replace("part.text", "part.text | replace('what', 'WHAT')")
LOUD = CHATML.replace("part.text", "part.text.replace('what', 'WHAT')")
TEMPLATES = {"default": CHAT_TEMPLATE, "llama": LLAMA + PROMPT, "chatml": CHATML, "thinking": THINKING}


def chat(template, image="<|image|>"):
    return Chat(template, image_token=image, special_texts=SPECIAL, variables={"bos_token": "<s>"})


CONVERSATIONS = [
    [("user", [None, " what is this? \n"]), ("assistant", "red "), ("user", "and\nnow?"), ("assistant", "a\tb")],
    [("system", "be brief"), ("user", ["first ", None, "second", None]), ("assistant", "  two  ")],
    [("user", "no picture"), ("assistant", "so </think> it is"), ("user", "?")],
    [("user", ["{{ messages }} {% raw %}"]), ("assistant", "\ue000 \ue001 '\"")],
]


def messages(turns):
    found = []
    for role, content in turns:
        parts = [content] if isinstance(content, str) else content
        found.append(
            {
                "role": role,
                "content": [
                    {"type": "image", "image": "x"} if p is None else {"type": "text", "text": p} for p in parts
                ],
            }
        )
    return found


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_shortcut_gives_what_the_template_gives(template, turns):
    one = chat(template)
    full = one._cut_everywhere(one._plain(messages(turns)), True)
    for _ in range(2):  # found out, then remembered
        assert one.pieces(messages(turns)) == full
    end = messages(turns)[-1]["role"] != "assistant"
    assert "".join(p.text for p in full) == one.render(messages(turns), end).rstrip("\n" if not end else "")


def test_the_shortcut_is_taken_where_texts_are_only_printed_and_nowhere_else():
    question = messages([("user", [None, "what?"]), ("assistant", "red")])
    for template, taken in (
        (CHAT_TEMPLATE, True),
        (CHATML, True),
        (LLAMA + PROMPT, True),
        (SHOUTING, False),
        (LOUD, False),
    ):
        one = chat(template)
        text = "".join(p.text for p in one.pieces(question))
        assert any(one._skeletons.values()) == taken
        assert ("WHAT?" in text) == (not taken)
    assert "</think>" in searched_for(THINKING)


def test_an_answer_ends_with_its_end_token_and_the_line_break_after_it_belongs_to_the_next_turn():
    pieces = chat(CHATML).pieces(messages([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]))
    assert [tuple(p) for p in pieces] == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("b<|im_end|>", True),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("d<|im_end|>", True),
    ]


def test_a_template_for_strings_gets_the_image_tokens_text_in_the_images_place():
    one = chat(LLAMA + PROMPT)
    assert not one.reads_parts
    assert one.pieces(messages([("user", [None, "what?"])]))[0].text == (
        "<s><|hdr|>user<|hdr|>\n\n<|image|>what?<|eot_id|><|hdr|>assistant<|hdr|>\n\n"
    )


def test_templates_that_cannot_be_learned_from_are_refused():
    always = LLAMA + "{{ '<|hdr|>assistant<|hdr|>\n\n' }}"  # as LLaDA's tokenizer has it
    with pytest.raises(ValueError, match="asked for a generation prompt or not"):
        chat(always)
    with pytest.raises(ValueError, match="does not render a question"):
        chat("{{ messages[-1]['role'] }}")
    with pytest.raises(ValueError, match="refuses a conversation"):
        chat("{{ raise_exception('no') }}")


def test_a_template_that_forgets_earlier_reasoning_can_teach_and_ask_for_the_last_answer_only():
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = chat(forgetful)
    talk = messages([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    with pytest.raises(ValueError, match="use turns: one or turns: each"):
        one.pieces(talk)
    history = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    asked = (history + "<|im_start|>assistant\n", False)
    assert [tuple(p) for p in one.pieces(talk[:3], only_last=True)] == [asked]
    assert [tuple(p) for p in one.pieces(talk, only_last=True)] == [asked, ("<think>\nd<|im_end|>", True)]


def test_questions_messages_and_content_parts_become_one_form():
    text = {"type": "text", "text": "hi"}
    image = {"type": "image", "image": "a.png"}
    assert as_messages("hi") == [{"role": "user", "content": [text]}]
    assert as_messages("hi", ["a.png"]) == [{"role": "user", "content": [image, text]}]
    for part in (
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png", "image": None},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ):
        assert as_messages([{"role": "user", "content": [part, "hi"]}]) == [{"role": "user", "content": [image, text]}]
    base64 = as_messages([{"role": "user", "content": [{"type": "image", "base64": "QQ=="}]}])
    assert base64[0]["content"][0]["image"] == "data:image/*;base64,QQ=="
    placed = as_messages([{"role": "user", "content": [text, {"type": "image"}, {"type": "image"}]}], ["a", "b"])
    assert [p.get("image") for p in placed[0]["content"]] == [None, "a", "b"]


def test_unknown_roles_and_parts_and_wrong_counts_are_refused():
    with pytest.raises(ValueError, match=r"message 0: role='bot' is not one of"):
        as_messages([{"role": "bot", "content": "x"}])
    with pytest.raises(ValueError, match=r"message 0, part 0: type='audio'"):
        as_messages([{"role": "user", "content": [{"type": "audio"}]}])
    with pytest.raises(ValueError, match="2 images for 1 places"):
        as_messages([{"role": "user", "content": [{"type": "image"}]}], ["a", "b"])
    with pytest.raises(ValueError, match="0 images for 1 places"):
        as_messages([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(ValueError, match="1 images for 0 places"):
        as_messages([{"role": "user", "content": [{"type": "image", "image": "a"}]}], ["b"])
    with pytest.raises(ValueError, match="no user message"):
        as_messages([{"role": "system", "content": "x"}], ["a"])


def test_markers_split_a_text_and_take_their_line_break_along():
    kinds = lambda text: [p.get("text") for p in split_marker(text)]
    assert kinds("<image>\nwhat?") == [None, "what?"]
    assert kinds("look\n<image>") == ["look\n", None]
    assert kinds("<image><image>\r\nboth") == [None, None, "both"]
    assert kinds("a <image> b") == ["a ", None, " b"]
