"""The head that counts missing tokens: what it says at first, and where it is asked."""

import torch

from tests.test_pipeline import make


def test_it_expects_one_token_in_every_gap_until_something_is_learned():
    model = make("full").model
    model.adapt(heads={"insertion": {}})
    ids = torch.randint(0, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[0, 4], [1, 2]])
    said = model(ids, rows=rows[:, :1], heads={"insertion": rows}).heads["insertion"]
    assert said.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_its_rows_are_those_of_the_stream_in_either_form():
    model = make("full").model
    model.adapt(heads={"insertion": {"intermediate_size": 8}})
    torch.nn.init.normal_(model.heads["insertion"].down_proj.weight)
    ids = torch.randint(0, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[0, 4], [1, 2]])
    flat = (rows + torch.tensor([[0], [5]])).flatten()
    asked = [model(ids, rows=r, heads={"insertion": r}).heads["insertion"].flatten() for r in (rows, flat)]
    torch.testing.assert_close(*asked)
    assert len(set(asked[0].tolist())) == 4
