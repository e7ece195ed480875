"""Which record is example i: once each an epoch or by weight, and the same from wherever one starts."""

import json
import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from dmllm.config import load_config
from dmllm.data.mixture import BLOCK, DataConfig, load_mixture, read_data_config, sampled
from dmllm.data.sources import DataSource


@pytest.fixture
def files(tmp_path):
    """Two data sets of 5 and 12 records."""
    for name, num in (("a", 5), ("b", 12)):
        rows = [{"id": f"{name}{i}", "conversations": [{"from": "gpt", "value": "x"}]} for i in range(num)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def mixture(files, *entries, seed=0, **options):
    sources = [DataSource(json_path=str(files / f"{name}.json"), **keys) for name, keys in entries]
    return load_mixture(DataConfig(datasets=sources), seed=seed, **options)


PLAIN = (("a", {}), ("b", {}))
WEIGHTED = (("a", {"weight": 3}), ("b", {"weight": 1}))


def taken(found, start, count):
    return list(islice(found.order(start), count))


def test_an_epoch_is_every_record_once_in_another_order_each_time(files):
    found = mixture(files, *PLAIN)
    assert len(found) == 17
    epochs = [[(d, r) for _, d, r in taken(found, 17 * e, 17)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(5)] + [(1, i) for i in range(12)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert [i for i, _, _ in taken(found, 30, 4)] == [30, 31, 32, 33]


@pytest.mark.parametrize("entries", [PLAIN, WEIGHTED])
def test_the_order_from_k_is_the_order_from_0_without_its_first_k(files, entries):
    whole = taken(mixture(files, *entries), 0, BLOCK + 200)
    for start in (0, 1, 16, 17, 100, BLOCK - 1, BLOCK, BLOCK + 7):
        assert taken(mixture(files, *entries), start, 60) == whole[start : start + 60]
    sent = pickle.loads(pickle.dumps(mixture(files, *entries)))
    assert taken(sent, 33, 10) == whole[33:43]


def test_the_seed_decides_the_order(files):
    for entries in (PLAIN, WEIGHTED):
        one, same, other = (taken(mixture(files, *entries, seed=s), 0, 40) for s in (1, 1, 2))
        assert one == same
        assert one != other


def test_weights_are_the_shares_and_each_data_set_is_read_through_before_it_repeats(files):
    drawn = taken(mixture(files, *WEIGHTED), 0, 8000)
    shares = Counter(d for _, d, _ in drawn)
    assert abs(shares[0] / 8000 - 0.75) < 0.02
    for number, size in ((0, 5), (1, 12)):
        stream = [r for _, d, r in drawn if d == number]
        for epoch in range(len(stream) // size):
            assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_records_can_stay_in_the_order_of_the_files(files):
    found = mixture(files, *PLAIN, shuffle=False)
    assert [(d, r) for _, d, r in taken(found, 3, 16)] == [(0, 3), (0, 4), *((1, i) for i in range(12)), (0, 0), (0, 1)]


def test_sampling_strategies_keep_what_they_say():
    assert sampled(10, "all", 0, "x").tolist() == list(range(10))
    assert sampled(10, "first:3", 0, "x").tolist() == [0, 1, 2]
    assert sampled(10, "end:3", 0, "x").tolist() == [7, 8, 9]
    assert sampled(15, "first:10%", 0, "x").tolist() == [0, 1]  # rounded up
    assert sampled(10, "end:25%", 0, "x").tolist() == [7, 8, 9]
    assert sampled(1000, "first:0.5%", 0, "x").tolist() == list(range(5))
    random = sampled(100, "random:7", 0, "x")
    assert len(set(random.tolist())) == 7
    assert np.array_equal(random, sampled(100, "random:7", 0, "x"))
    assert not np.array_equal(random, sampled(100, "random:7", 1, "x"))
    assert len(sampled(100, "random:20%", 0, "x")) == 20
    for strategy in ("some", "first", "first:-1", "first:1.5", "last:3", "random:x%"):
        with pytest.raises(ValueError, match="use all, first:N, end:N or random:N"):
            sampled(10, strategy, 0, "x")
    with pytest.raises(ValueError, match="asks for 11 of 10 records"):
        sampled(10, "first:11", 0, "x")


def test_only_sampled_records_appear(files):
    found = mixture(files, ("a", {"sampling_strategy": "first:2"}), ("b", {"sampling_strategy": "end:3"}))
    assert sorted((d, r) for _, d, r in taken(found, 0, 5)) == [(0, 0), (0, 1), (1, 9), (1, 10), (1, 11)]
    with pytest.raises(ValueError, match="keeps none of its 5 records"):
        mixture(files, ("a", {"sampling_strategy": "first:0"}))


def test_what_stands_in_for_a_bad_record_depends_on_the_example_alone(files):
    for entries in (PLAIN, WEIGHTED):
        found, again = mixture(files, *entries), mixture(files, *entries)
        taken(again, 0, 50)
        chosen = [found.reserve(i, attempt) for i in range(20) for attempt in range(2)]
        assert chosen == [again.reserve(i, attempt) for i in range(20) for attempt in range(2)]
        assert len(set(chosen)) > 5


def test_llavas_yaml_is_read_as_it_is_and_paths_are_found_from_it(files, monkeypatch):
    (files / "mix.yaml").write_text(
        "datasets:\n  - json_path: a.json\n    sampling_strategy: 'first:2'\n"
        "  - json_path: b.json\n    sampling_strategy: random:50%\n    name: bees\n    turns: one\non_error: skip\n"
    )
    monkeypatch.chdir("/")
    found = load_mixture(files / "mix.yaml", seed=0)
    assert [s.name for s in found.sources] == ["a", "bees"]
    assert len(found) == 2 + 6
    assert found.sources[1].entry.turns == "one"
    assert found.record(0, 1).id == "a1"
    assert found.record(0, 1).location.endswith("a.json: record 1")
    assert read_data_config(files / "mix.yaml").on_error == "skip"


def test_configurations_that_cannot_work_are_refused(files):
    with pytest.raises(ValueError, match="weight to every data set or to none; b has none"):
        mixture(files, ("a", {"weight": 1}), ("b", {}))
    with pytest.raises(ValueError, match="must be greater than 0"):
        mixture(files, ("a", {"weight": 0}))
    with pytest.raises(ValueError, match="is empty"):
        DataConfig(datasets=())
    with pytest.raises(ValueError, match="use raise or skip"):
        DataConfig(datasets=(DataSource(json_path="a"),), on_error="ignore")
    (files / "typo.yaml").write_text("datasets:\n  - json_path: a.json\n    sampling_strateg: all\n")
    with pytest.raises(ValueError, match="sampling_strateg"):
        load_config(DataConfig, files / "typo.yaml")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_mixture(files / "nowhere.yaml", seed=0)
