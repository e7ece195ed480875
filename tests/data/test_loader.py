"""The batches of a run are the same however it is divided and wherever it is resumed."""

import logging
from itertools import islice

import pytest
import torch

from dmllm.data.loader import build_loader, example_seed
from dmllm.data.mixture import DataConfig, load_mixture
from dmllm.data.sources import DataSource
from dmllm.types import PADDING

NAMES = ("input_ids", "labels", "image_slots", "documents", "positions", "pixel_values", "indices")


@pytest.fixture
def processor(make_processor):
    return make_processor(turns="one", answer_lengths=(16, 32), longer=0.5)


def mixture(path, **options):
    return load_mixture(DataConfig(datasets=(DataSource(json_path=str(path), **options),)), seed=3)


def batches(path, processor, count, **options):
    loader = build_loader(mixture(path), processor, seed=3, **{"batch_size": 4, **options})
    found = list(islice(loader, count))
    loader.close()
    return found, loader


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES)


def rows(found):
    """index -> (ids without padding, pixels) of every row."""
    out = {}
    for batch in found:
        for row, index in enumerate(batch.indices.tolist()):
            out[index] = (
                batch.input_ids[row][batch.documents[row] != PADDING].tolist(),
                batch.pixel_values[row].flatten()[0].item(),
            )
    return out


def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(llava_file, processor):
    path = llava_file(10)
    whole, _ = batches(path, processor, 8)
    for skipped in (1, 3, 5):
        resumed, _ = batches(path, processor, 8 - skipped, start=4 * skipped)
        assert all(same(a, b) for a, b in zip(resumed, whole[skipped:], strict=True))
    middle, _ = batches(path, processor, 1, start=6)
    assert middle[0].indices.tolist() == [6, 7, 8, 9]


def test_two_ranks_together_see_what_one_sees(llava_file, processor):
    path = llava_file(10)
    one, _ = batches(path, processor, 6)
    ranks = [batches(path, processor, 6, batch_size=2, rank=rank, world_size=2)[0] for rank in range(2)]
    assert [b.indices.tolist() for b in ranks[1]] == [[4 * k + 2, 4 * k + 3] for k in range(6)]
    assert {**rows(ranks[0]), **rows(ranks[1])} == rows(one)


def test_worker_processes_change_nothing(llava_file, processor):
    path = llava_file(10)
    alone, _ = batches(path, processor, 7)
    shared, _ = batches(path, processor, 7, num_workers=2)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_an_epoch_shows_every_picture_once(llava_file, processor):
    found, _ = batches(llava_file(12), processor, 3)
    assert sorted(colour for _, colour in rows(found).values()) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_replaced_counted_and_named(llava_file, processor, workers, caplog):
    path = llava_file(10, broken=(2, 7))
    with caplog.at_level(logging.WARNING):
        found, loader = batches(path, processor, 5, on_error="skip", num_workers=workers)
    assert [i for batch in found for i in batch.indices.tolist()] == list(range(20))
    shown = rows(found)
    assert not {2, 7} & {colour for _, colour in shown.values()}
    good, _ = batches(llava_file(10, name="good.json"), processor, 5)
    for index, row in rows(good).items():
        if row[1] not in (2, 7):
            assert shown[index] == row  # the others are where they were
    assert loader.skipped == sum(loader.reasons.values()) >= 4  # each is met once an epoch
    assert {reason.partition(": ")[2].split(":")[0] for reason in loader.reasons} == {"record 2", "record 7"}
    assert "record 2" in caplog.text
    resumed, _ = batches(path, processor, 2, on_error="skip", start=12)
    assert all(same(a, b) for a, b in zip(resumed, found[3:], strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_stops_the_run_by_name_unless_skipping(llava_file, processor, workers):
    with pytest.raises(ValueError, match=r"data\.json: record 2: .*not a readable image"):
        batches(llava_file(10, broken=(2,)), processor, 5, num_workers=workers)


def test_data_of_which_nothing_can_be_used_is_given_up(llava_file, processor):
    with pytest.raises(ValueError, match="100 records in a row could not be used; the last one: "):
        batches(llava_file(2, broken=(0, 1)), processor, 1, on_error="skip")


def test_an_examples_own_draws_depend_on_seed_and_index(llava_file):
    seeds = {example_seed(seed, index, attempt) for seed in range(3) for index in range(50) for attempt in range(2)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_data_set_may_say_which_turns_it_wants(llava_file, make_processor):
    path = llava_file(4)
    loader = build_loader(mixture(path, turns="each"), make_processor(image_prefix=True), batch_size=2)
    assert next(loader).documents.max() == 2


def test_loaders_that_cannot_work_are_refused(llava_file, processor):
    found = mixture(llava_file(4))
    with pytest.raises(ValueError, match="ranks count from 0"):
        build_loader(found, processor, batch_size=2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least 1"):
        build_loader(found, processor, batch_size=0)
