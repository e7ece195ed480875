"""Learning rates over a run."""

import pytest

from dmllm.training.config import ScheduleConfig
from dmllm.training.schedule import learning_rate_factor


def curve(steps=100, **options):
    factor = learning_rate_factor(ScheduleConfig(**options), steps)
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_every_step_moves_and_none_exceeds_the_peak(name):
    values = curve(name=name, warmup=10)
    assert all(0 < v <= 1 for v in values)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == 1.0


def test_cosine_ends_at_its_ratio():
    values = curve(name="cosine", warmup=0, min_ratio=0.1)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1, abs=1e-3)


def test_wsd_stays_and_decays_linearly_at_the_end():
    values = curve(name="wsd", warmup=0.1, decay=0.2)
    assert values[10:80] == [1.0] * 70
    assert values[90] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.05)


def test_a_decay_longer_than_the_run_is_refused_with_one_that_fits():
    with pytest.raises(ValueError, match=r"--schedule.decay=90"):
        learning_rate_factor(ScheduleConfig(name="wsd", warmup=10, decay=95), 100)
