"""Rows of every common form become the same records; what is wrong is named by file and record."""

import json
import pickle

import pytest
from PIL import Image

from dmllm.data.sources import DataSource, open_source
from dmllm.data.sources.files import expand


def written(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def source(path, **options):
    return open_source(DataSource(json_path=str(path), **options))


def shown(record):
    """Roles and parts, images by file name."""
    return [
        (m["role"], [p["text"] if p["type"] == "text" else f"[{p['image'].rpartition('/')[2]}]" for p in m["content"]])
        for m in record.messages
    ]


LLAVA = {
    "id": "x7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat?", "kind": "colour"},
        {"from": "gpt", "value": "réd"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes"},
    ],
}


def test_llava_rows_become_messages_of_parts(tmp_path):
    record = source(written(tmp_path / "d.json", [LLAVA]))[0]
    assert shown(record) == [
        ("user", ["[a.png]", "what?"]),
        ("assistant", ["réd"]),
        ("user", ["sure?"]),
        ("assistant", ["yes"]),
    ]
    assert record.messages[0]["kind"] == "colour"
    assert record.messages[0]["content"][0]["image"] == f"{tmp_path}/a.png"
    assert (record.id, record.source, record.location) == ("x7", "d", f"{tmp_path}/d.json: record 0")


def test_images_go_where_the_markers_are_or_before_the_first_question(tmp_path):
    rows = [
        {
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "one <image> two\n<image>"},
                {"from": "gpt", "value": "x"},
            ],
        },
        {
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image>\none"},
                {"from": "gpt", "value": "x"},
                {"from": "human", "value": "<image>two"},
                {"from": "gpt", "value": "y"},
            ],
        },
        {
            "image": ["a.png", "b.png"],
            "conversations": [{"from": "human", "value": "none"}, {"from": "gpt", "value": "x"}],
        },
        {"conversations": [{"from": "human", "value": "text only"}, {"from": "gpt", "value": "x"}]},
        {"system": "be kind", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]},
    ]
    found = [shown(record) for record in source(written(tmp_path / "d.jsonl", rows))]
    assert found[0] == [("system", ["s"]), ("user", ["one ", "[a.png]", " two\n", "[b.png]"]), ("assistant", ["x"])]
    assert [turn[1] for turn in found[1]] == [["[a.png]", "one"], ["x"], ["[b.png]", "two"], ["y"]]
    assert found[2][0] == ("user", ["[a.png]", "[b.png]", "none"])
    assert found[3][0] == ("user", ["text only"])
    assert found[4][0] == ("system", ["be kind"])


def test_messages_with_images_and_content_parts_become_the_same_records(tmp_path):
    answer = {"role": "assistant", "content": "red"}
    rows = [
        {"messages": [{"role": "user", "content": "<image>what?"}, answer], "images": ["a.png"]},
        {
            "messages": [{"role": "user", "content": "<image>what?"}, answer],
            "images": [{"path": "a.png", "bytes": None}],
        },
        {
            "conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}],
            "images": ["a.png"],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
                answer,
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "what?"},
                    ],
                },
                answer,
            ]
        },
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, answer],
            "images": ["a.png"],
        },
    ]
    for record in source(written(tmp_path / "d.json", rows)):
        assert shown(record) == [("user", ["[a.png]", "what?"]), ("assistant", ["red"])]
        assert record.messages[0]["content"][0]["image"] == f"{tmp_path}/a.png"


def test_data_urls_addresses_and_absolute_paths_stay_as_they_are(tmp_path):
    for image in ("data:image/png;base64,QQ==", "https://x.org/a.png", "/somewhere/a.png"):
        row = {
            "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}],
            "images": [image],
        }
        record = source(written(tmp_path / "d.json", [row]))[0]
        assert record.messages[0]["content"][0]["image"] == image


def test_an_image_folder_is_found_from_the_working_directory_then_from_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "configs" / "pictures").mkdir(parents=True)
    written(tmp_path / "configs" / "d.json", [LLAVA])
    monkeypatch.chdir(tmp_path)
    entry = DataSource(json_path="d.json", image_folder="pictures")
    assert (
        open_source(entry, tmp_path / "configs")[0].messages[0]["content"][0]["image"]
        == f"{tmp_path}/configs/pictures/a.png"
    )
    (tmp_path / "pictures").mkdir()
    assert open_source(entry, tmp_path / "configs")[0].messages[0]["content"][0]["image"] == "pictures/a.png"
    with pytest.raises(ValueError, match="image_folder nowhere is not a folder"):
        open_source(DataSource(json_path="d.json", image_folder="nowhere"), tmp_path / "configs")


@pytest.mark.parametrize("text", ["q", "ünï 漢字 🙂", '\u2028 ] , [ { " \\ \n'])
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_records_are_found_at_their_bytes_whatever_the_characters(tmp_path, text, ascii, mark):
    rows = [{"id": f"{text}{i}", "conversations": [{"from": "gpt", "value": text * i or "x"}]} for i in range(4)]
    (tmp_path / "d.json").write_text(mark + json.dumps(rows, ensure_ascii=ascii, indent=2), encoding="utf-8")
    lines = "\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    (tmp_path / "d.jsonl").write_text(mark + lines + "\r\n   \n", encoding="utf-8")
    for name in ("d.json", "d.jsonl"):
        found = source(tmp_path / name)
        assert [record.id for record in found] == [row["id"] for row in rows]
        assert [record.messages[0]["content"][0]["text"] for record in found] == [text * i or "x" for i in range(4)]
        assert [r.id for r in pickle.loads(pickle.dumps(found))] == [row["id"] for row in rows]
    assert source(tmp_path / "d.jsonl")[2].location.endswith("d.jsonl: line 5")


def test_braces_and_globs_name_several_files(tmp_path):
    for name in ("b", "a", "c"):
        written(tmp_path / f"{name}.json", [{**LLAVA, "id": f"{name}{i}"} for i in range(2)])
    assert [r.id for r in source(tmp_path / "{b,a}.json")] == ["b0", "b1", "a0", "a1"]
    assert [r.id for r in source(tmp_path / "*.json")] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert source(tmp_path / "{b,a}.json")[3].location.endswith("a.json: record 1")
    assert expand(str(tmp_path / "{x,y}.json")) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "not list"),
        ({"a": 1}, "no list of turns under 'conversations' or 'messages'; the keys are 'a'"),
        ({"conversations": []}, "no list of turns"),
        ({"conversations": ["x"]}, "turn 0 is str"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "the speaker 'bot' is not one of"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0: its text is int"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "1 <image> markers for 0 images"),
        (
            {"image": ["a", "b"], "conversations": [{"from": "human", "value": "<image>"}]},
            "1 <image> markers for 2 images",
        ),
        ({"image": "a", "conversations": [{"from": "gpt", "value": "<image>"}]}, "in a turn of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "type='video'"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path, row, said):
    good = {"conversations": [{"from": "gpt", "value": "x"}]}
    for name, place in (("d.json", "record 1"), ("d.jsonl", "line 2")):
        opened = source(written(tmp_path / name, [good, row]))
        assert opened[0].messages
        with pytest.raises(ValueError, match=f"{name}: {place}: ") as error:
            opened[1]
        assert said in str(error.value)


def test_files_that_are_not_data_are_refused_when_they_are_opened(tmp_path):
    for name, content, said in (
        ("a.json", '{"data": []}', "is a JSON list of records"),
        ("b.json", "[]", "an empty list"),
        ("c.json", '[{"a": 1},\n{"b": }]', "line 2, record 1: not valid JSON"),
        ("d.json", '[{"a": 1}\n{"b": 2}]', "line 2: expected ',' or ']' after record 0"),
        ("e.json", "", "is empty"),
        ("f.txt", "x", "end in .json or .jsonl"),
        ("g.json", '[{"a": 1}', "expected ',' or ']'"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name) as error:
            source(tmp_path / name)
        assert said in str(error.value)
    with pytest.raises(ValueError, match=r"gone\.json: there is no such file"):
        source(tmp_path / "gone.json")
    (tmp_path / "h.jsonl").write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(ValueError, match=r"h\.jsonl: line 2: not valid JSON"):
        source(tmp_path / "h.jsonl")[1]


def test_a_format_that_is_named_is_the_only_one_read(tmp_path):
    path = written(tmp_path / "d.json", [LLAVA])
    with pytest.raises(ValueError, match="under 'messages'"):
        source(path, format="messages")[0]
    literal = {"messages": [{"role": "user", "content": "what is <image>?"}, {"role": "assistant", "content": "a tag"}]}
    path = written(tmp_path / "o.json", [literal])
    assert shown(source(path, format="openai")[0])[0] == ("user", ["what is <image>?"])
    with pytest.raises(ValueError, match="use auto, llava, messages or openai"):
        DataSource(json_path="d.json", format="parquet")


def test_a_source_is_called_by_its_name_its_file_or_its_folder():
    assert DataSource(json_path="x/llava_150k.json").label == "llava_150k"
    assert DataSource(json_path="x/scenes/data.json").label == "scenes"
    assert DataSource(json_path="hf:lmms-lab/docvqa").label == "docvqa"
    assert DataSource(json_path="x/data.json", name="mine").label == "mine"


def test_hugging_face_data_sets_give_the_same_records(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.save(tmp_path / "a.png")
    text = {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        }
    )
    rows = [{"image": str(tmp_path / "a.png"), **text}, {"image": image, **text}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "one")
    several = datasets.Dataset.from_list(
        [
            {
                "images": [image, image],
                "messages": [{"role": "user", "content": "<image><image>q"}, {"role": "assistant", "content": "a"}],
            }
        ],
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            }
        ),
    )
    datasets.DatasetDict({"val": several}).save_to_disk(tmp_path / "two")
    for record in source(tmp_path / "one"):
        assert [p["type"] for p in record.messages[0]["content"]] == ["image", "text"]
        assert isinstance(record.messages[0]["content"][0]["image"], dict)  # as stored, not decoded here
    (record,) = source(tmp_path / "two", split="val")
    assert [p["type"] for p in record.messages[0]["content"]] == ["image", "image", "text"]
    assert record.location.endswith("two: row 0")
    with pytest.raises(ValueError, match="there is no split 'train'; it has val"):
        source(tmp_path / "two")
