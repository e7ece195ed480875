"""Attention annealing: from what a causal model sees to what a denoiser does; and a causal model on that way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import dmllm.training.loop
from dmllm.checkpoints.compose import ModelSpec, compose
from dmllm.checkpoints.convert import convert
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.nn.visibility import layout
from dmllm.objectives import build_objective, requirements
from dmllm.objectives.anneal import anneal, openness
from dmllm.objectives.draws import Draws
from dmllm.pipeline import load
from dmllm.training import TrainConfig, train
from dmllm.training.config import ObjectiveConfig
from dmllm.types import IGNORE, PADDING, PREFIX, TEXT, Batch, SpecialTokens
from tests.checkpoints.test_start import source

NEVER = 1e12  # steps: what is behind a token stays closed
PACKED = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, PADDING, PADDING, PADDING, PADDING]])
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]])


def draws(step: int = 0, num_steps: int | None = 100, start: int = 0) -> Draws:
    return Draws(seed=0, step=step, num_examples=2, indices=torch.arange(start, start + 2), num_steps=num_steps)


def look(kind: str = "full"):
    return layout(kind, documents=PACKED, canvas=torch.ones_like(PACKED).bool(), positions=PLACES)


def opened(length: int, r: float, step: int = 0) -> torch.Tensor:
    places = torch.arange(length)[None]
    rule = layout("full", documents=torch.zeros_like(places), canvas=torch.ones_like(places).bool())
    return anneal(rule, places, draws(step), r).dense()[0, 0]


def test_closed_it_is_the_causal_rule_and_open_the_full_one_in_packed_rows_too():
    assert torch.equal(anneal(look(), PLACES, draws(), 0.0).dense(), look("causal").dense())
    assert anneal(look(), PLACES, draws(), 1.0).extra is None
    documents = torch.tensor([[PREFIX, PREFIX, 0, 0, 1, 1]])
    places, canvas = torch.tensor([[0, 1, 2, 3, 2, 3]]), torch.tensor([[0, 0, 0, 1, 0, 1]]).bool()
    prefix = layout("prefix", documents=documents, canvas=canvas)
    causal = layout("causal", documents=documents, canvas=canvas, positions=places)
    assert torch.equal(anneal(prefix, places, draws(), 0.0).dense(), causal.dense())


@pytest.mark.parametrize("r", [0.2, 0.7])
def test_what_is_behind_a_row_is_open_to_its_share_and_what_is_not_is_open_always(r):
    seen, length = opened(200, r), 200
    pairs = length * (length - 1) / 2
    assert seen.tril().sum() == pairs + length
    behind = float(seen.triu(1).sum())
    assert abs(behind / pairs - r) < 4 * (r * (1 - r) / pairs) ** 0.5
    columns = seen.triu(1).sum(0)[50:] / torch.arange(50, 200)
    assert (columns - r).abs().max() < 0.3, "evenly over places"


def test_what_is_open_is_drawn_anew_each_step_and_is_the_same_for_every_example_and_length():
    assert not torch.equal(opened(20, 0.5), opened(20, 0.5, step=1))
    assert torch.equal(opened(20, 0.5), opened(33, 0.5)[:20, :20])
    one, other = (anneal(look(), PLACES, draws(start=start), 0.5).extra for start in (0, 640))
    assert one is not None
    assert torch.equal(one, other)
    assert bool((opened(20, 0.7) >= opened(20, 0.3)).all())


def test_the_share_rises_evenly_to_one_and_is_one_outside_training():
    assert [openness(draws(step), 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert openness(draws(9), 0.2) == 0.5
    assert openness(draws(0), 0) == 1
    assert openness(draws(0, num_steps=None), 50) == 1


def test_under_block_what_is_behind_a_token_in_its_own_block_is_what_opens():
    ids = torch.randint(0, 10, (1, 8), generator=torch.Generator().manual_seed(0))
    batch = text_batch(ids, ids)
    special = SpecialTokens(mask=11, eos=10, pad=10)
    learned = build_objective("block", {"anneal_steps": NEVER}, special, "block:4")
    mask = learned.prepare(batch, draws()).visibility.dense()[0, 0]
    place, causal = torch.arange(8), torch.ones(8, 8, dtype=torch.bool).tril()
    block = place // 4
    given = torch.cat([causal, torch.zeros(8, 8, dtype=torch.bool)], 1)
    noised = torch.cat([block[:, None] > block, (block[:, None] == block) & causal], 1)
    assert torch.equal(mask, torch.cat([given, noised]))


def test_a_causal_model_gets_the_visibility_under_which_it_is_to_denoise():
    assert requirements("masked", {}, "causal") == {"visibility": "full", "process": "absorbing"}
    assert requirements("masked", {}, "prefix")["visibility"] == "prefix"
    assert requirements("block", {"block_length": 4}, "causal") == {"visibility": "block:4", "process": "absorbing"}
    assert requirements("block", {"block_length": 4}, "block:8")["visibility"] == "block:8"


def text_batch(ids: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=torch.full_like(ids, TEXT),
        documents=torch.zeros_like(ids),
        positions=torch.arange(ids.shape[1]).expand_as(ids),
        indices=torch.arange(len(ids)),
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The folder of a tiny random Qwen3, and the model as transformers has it."""
    folder = tmp_path_factory.mktemp("causal") / "qwen3"
    return folder, source(folder, "qwen3")


@torch.no_grad()
@pytest.mark.parametrize("hidden", ["all", "some", "last"])
def test_at_first_a_causal_model_scores_hidden_tokens_as_transformers_does_from_the_row_before(qwen, hidden):
    """With only the last one hidden that is its next-token loss. Once all is open the loss is another."""
    folder, theirs = qwen
    torch.manual_seed(1)
    model = compose(ModelSpec(backbone=str(folder), shift=True))[0].eval()
    mask = model.config.special.mask
    for rows, own in (
        (theirs.model.embed_tokens, model.backbone.embed_tokens),
        (theirs.lm_head, model.backbone.lm_head),
    ):
        rows.weight[mask] = own.weight[mask]  # the token that the model did not have
    ids = torch.randint(0, 250, (2, 9))
    batch = text_batch(ids, ids.clone())
    batch.labels[:, :3] = IGNORE
    out = batch.labels != IGNORE
    if hidden == "some":
        out &= torch.rand(2, 9) < 0.5
    if hidden == "last":
        out[:, :-1] = False
    learned = build_objective("masked", {"weight": "none", "reduction": "masked"}, model.config.special, "full")
    noised = learned.corrupt(batch, out, torch.ones(2, 9))
    closed = replace(noised, visibility=anneal(noised.visibility, batch.positions, draws(), 0.0))
    fed = ids if hidden == "last" else ids.masked_fill(out, mask)
    expected = F.cross_entropy(theirs(fed).logits[:, :-1][out[:, 1:]], ids[:, 1:][out[:, 1:]])
    losses = [learned.loss(model, n)["masked"] for n in (closed, noised)]
    assert float(losses[0].total / losses[0].count) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float((losses[0].total - losses[1].total) / losses[0].count)) > 1e-3


@pytest.mark.parametrize(("name", "visibility"), [("masked", "full"), ("block", "block:4")])
def test_a_causal_checkpoint_is_trained_into_a_denoiser_and_its_folder_says_so(qwen, tmp_path, name, visibility):
    """A causal one with shifted logits, as `dmllm convert` or training left it; resumed half way it is the same."""
    data = [{"id": str(n), "conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "so it is"}]}
            for n in range(8)]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(data))
    convert(str(qwen[0]), tmp_path / "causal", to="causal")
    options = {"anneal_steps": 0.75, **({"block_length": 4} if name == "block" else {})}
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelSpec(checkpoint=str(tmp_path / "causal")),
        data=DataConfig(datasets=(DataSource(json_path=str(tmp_path / "data.json")),)),
        objective=ObjectiveConfig(name=name, options=options),
        steps=4,
        batch_size=4,
        save_every=2,
        log_every=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmllm.training.loop, "save_checkpoint", killed_after_saving())
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resumed = train(config)
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    assert resumed.model is not None
    assert whole.model is not None
    one, other = (load_file(result.model / "model.safetensors") for result in (resumed, whole))
    assert all(torch.equal(one[key], other[key]) for key in other)
    pipeline = load(str(whole.model))
    assert pipeline.model.config.visibility == visibility
    assert pipeline.model.config.shift
    assert pipeline.chat("say", max_new_tokens=8).num_forwards >= 1


def killed_after_saving():
    """Saves as always, and then the run is killed."""
    real = dmllm.training.loop.save_checkpoint

    def saving(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    return saving
