"""Which positions are committed, by every rule."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmllm.samplers.rules import choose


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_choosing_takes_the_least_doubtful_asked_for_and_exactly_the_quota(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 9))
    doubt = torch.tensor([data.draw(st.lists(st.floats(0, 1, width=32), min_size=k, max_size=k))])
    asked = torch.tensor([data.draw(st.lists(st.booleans(), min_size=k, max_size=k))])
    quota = data.draw(st.integers(1, 9))
    chosen = choose(doubt, None, asked, torch.tensor([quota]))
    assert not (chosen & ~asked).any()
    assert int(chosen.sum()) == min(quota, int(asked.sum()))
    rest = asked & ~chosen
    if chosen.any() and rest.any():
        assert doubt[chosen].max() <= doubt[rest].min()
    sure = doubt <= 0.3
    more = choose(doubt, sure, asked, torch.tensor([quota]))
    assert torch.equal(more, chosen | (sure & asked))
