"""Where pictures stand in a vocabulary: told by a checkpoint's own config.json, and kept when it is saved."""

from pathlib import Path

import pytest
import torch

import dmllm
from dmllm.checkpoints import folder
from dmllm.checkpoints.published import config_of
from dmllm.families import FAMILIES
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.models.configuration import DmllmConfig

GOLDEN = Path(__file__).parent / "golden"
ROWS = ImageVocabulary(offset=10, size=4, begin=1, end=2, mask=9, newline=3, answer=(4, 5), draw=(6,), draw_end=(7, 8))


@pytest.mark.parametrize("name", ["mmada", "lumina_dimoo"])
def test_a_published_model_says_where_its_codes_are(name):
    family = FAMILIES.load(name)
    published = {**family.example, "mask_token_id": 126336, "codebook_size": 8192}
    config = config_of(family, published)
    assert config.images == family.image_vocabulary(published)
    assert DmllmConfig.from_dict(config.to_dict()).images == config.images
    assert "image_vocabulary" not in config.published


def test_what_the_caller_says_of_the_codes_is_kept_when_the_model_is_saved(tmp_path):
    own = {"offset": 128, "size": 64, "begin": 100, "end": 101, "mask": 120, "draw": [104, 118]}
    pipeline = dmllm.load(str(GOLDEN / "mmada"), device="cpu", config={"image_vocabulary": own})
    assert pipeline.model.config.images == ImageVocabulary(**own)
    folder.save(tmp_path / "saved", pipeline.model)
    assert dmllm.load(str(tmp_path / "saved"), device="cpu").model.config.images == ImageVocabulary(**own)
    assert dmllm.load(str(GOLDEN / "mmada"), device="cpu").model.config.images is None


def test_a_field_that_there_is_not_and_a_mask_among_the_codes_are_refused():
    with pytest.raises(ValueError, match=r"image_vocabulary has no field 'ofset'.*offset"):
        ImageVocabulary.of({"ofset": 1})
    with pytest.raises(ValueError, match="mask=12 is the id of code 2"):
        ImageVocabulary(offset=10, size=4, begin=1, end=2, mask=12)


def test_a_canvas_has_masks_where_codes_go_and_all_that_frames_them():
    ids, slots = ROWS.canvas(2, 3)
    assert ids.tolist() == [9, 9, 9, 3, 9, 9, 9, 3, 2, 5]
    assert slots.tolist() == [0, 1, 2, 4, 5, 6]
    codes = torch.tensor([[0, 1, 2], [3, 0, 1]])
    filled = ids.clone()
    filled[slots] = codes.flatten() + 10
    framed = ROWS.picture(codes)
    assert torch.equal(filled[:-1], framed[1:])


def test_a_long_description_loses_what_stands_before_its_end():
    short = ImageVocabulary(**{**vars(ROWS), "draw_length": 5})
    assert ROWS.drawing([20, 21, 22]) == [6, 20, 21, 22, 7, 8, 4, 1]
    assert short.drawing([20, 21, 22]) == [6, 20, 21, 7, 8, 4, 1]
    assert short.drawing([]) == [6, 7, 8, 4, 1]


def test_what_a_picture_is_to_be_made_into_stands_around_it():
    codes = torch.tensor([[1, 2]])
    assert ROWS.editing([codes], [20, 21]) == [1, 11, 12, 3, 2, *ROWS.drawing([20, 21])]
    inside = ImageVocabulary(**{**vars(ROWS), "edit_end": 1})
    assert inside.editing([codes, codes], [20, 21]) == [6, 20, *[1, 11, 12, 3, 2] * 2, 21, 7, 8, 4, 1]
