"""MDLM: the authors' logits and losses, recorded from their code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmllm.checkpoints.published import write_published
from dmllm.objectives import build_objective
from dmllm.pipeline import load
from tests.families.recorded import Recorded, assert_written_back, corrupted, mean

RECORDED = Recorded("mdlm")


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def time_of(sigma: torch.Tensor) -> torch.Tensor:
    """The inverse of the authors' log-linear schedule."""
    return (1 - torch.exp(-sigma)) / (1 - 1e-3)


def subs(logits: torch.Tensor, ids: torch.Tensor, mask: int) -> torch.Tensor:
    """Section 3.2.3: no mass on the mask token, and what is known is known."""
    logits = logits.clone()
    logits[..., mask] = -torch.inf
    known = torch.nn.functional.one_hot(ids, logits.shape[-1]).log()
    return torch.where((ids == mask)[..., None], logits.log_softmax(-1), known).clamp(min=-1e6)


def test_logits_are_those_of_the_authors(pipe):
    ids = RECORDED.inputs["xt"]
    logits = pipe.logits(ids)
    assert (logits - RECORDED.expected["fwd_sigma0.backbone_logits"]).abs().max() < 1e-4
    found, wanted = subs(logits, ids, 99), RECORDED.expected["fwd_sigma0.subs_log_probs"]
    assert (found - wanted)[..., :99].abs().max() < 1e-4
    assert wanted[..., 99].max() < -9e5


def test_a_model_that_is_not_conditioned_on_time_does_not_look_at_it(pipe):
    ids = RECORDED.inputs["xt"]
    assert torch.equal(pipe.logits(ids, time=torch.tensor([0.2, 0.9])), pipe.logits(ids))


def test_a_model_conditioned_on_time_reads_the_noise_level_of_each_row_or_token(tmp_path):
    pipe = RECORDED.changed(tmp_path, time_conditioning=True)
    ids, time = RECORDED.inputs["xt"], time_of(RECORDED.inputs["sigma2"])
    expected = RECORDED.expected["fwd_time_conditioned.backbone_logits"]
    assert (pipe.logits(ids, time=time) - expected).abs().max() < 1e-4
    assert (pipe.logits(ids, time=time[:, None].expand_as(ids)) - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="conditioned on time; give time="):
        pipe.logits(ids)


def test_padding_changes_nothing(pipe):
    ids = RECORDED.inputs["xt"]
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    assert (pipe.logits(padded, mask)[:, 3:] - pipe.logits(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["loss_continuous", "loss_T1000"])
def test_losses_are_those_of_the_authors(pipe, case):
    """The bound weighs by 1/t, for infinitely many steps and, with nothing on the mask token, for 1000 alike."""
    clean, scored = RECORDED.inputs["x0"], RECORDED.inputs["am"].bool()
    noisy, move_chance = RECORDED.expected[f"{case}.xt"], RECORDED.expected[f"{case}.move_chance"]
    time = move_chance / (1 - 1e-3)  # [3, 1], the end of the step of 1000 in which t lies
    objective = build_objective("masked", {"zero_masking": True}, pipe.special, "full")
    recorded = corrupted(objective, noisy, clean, time, scored=scored)
    assert torch.equal(recorded.batch.input_ids, noisy)
    assert mean(objective, pipe.model, recorded) == pytest.approx(float(RECORDED.expected[f"{case}.loss"]), abs=1e-4)


def test_without_zero_masking_the_mask_token_has_a_share_and_the_loss_is_another(pipe):
    clean, noisy = RECORDED.inputs["x0"], RECORDED.expected["loss_continuous.xt"]
    losses = []
    for zero_masking in (False, True):
        objective = build_objective("masked", {"zero_masking": zero_masking}, pipe.special, "full")
        one = corrupted(objective, noisy, clean, torch.ones(()), scored=clean >= 0)
        losses.append(mean(objective, pipe.model, one))
    assert losses[0] > losses[1]


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path):
    assert_written_back(pipe, RECORDED, tmp_path)


def test_the_form_of_the_hub_is_the_same_model(pipe, tmp_path):
    flat = {"model_type": "mdlm", "hidden_dim": 48, "cond_dim": 16, "n_blocks": 2, "n_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    weights = {f"backbone.{name}": tensor for name, tensor in RECORDED.weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    hub = load(str(tmp_path), device="cpu")
    assert (hub.logits(RECORDED.inputs["xt"]) - pipe.logits(RECORDED.inputs["xt"])).abs().max() < 1e-5
    assert hub.special.mask == 99
    written = load_file(write_published(hub.model, tmp_path / "out") / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_generation_fills_the_canvas_and_never_writes_the_mask(pipe):
    found = pipe.generate(RECORDED.inputs["xt"][:1, :4], max_new_tokens=8, steps=8, generator=0)
    assert found.sequences.shape == (1, 12)
    assert (found.sequences[:, 4:] != 99).all()


@pytest.fixture
def told(monkeypatch):
    """The times that a pipeline's model is told, call by call."""

    def listen(pipe):
        times, forward = [], pipe.model.forward
        monkeypatch.setattr(pipe.model, "forward", lambda **given: times.append(given["time"]) or forward(**given))
        return times

    return listen


def test_a_model_conditioned_on_time_is_told_the_noise_level_from_1_downwards(tmp_path, told):
    pipe, ids = RECORDED.changed(tmp_path, time_conditioning=True), RECORDED.inputs["xt"][:1, :4]
    times, options = told(pipe), {"max_new_tokens": 8, "steps": 4, "eos_token_id": []}
    assert (pipe.generate(ids, generator=0, **options).sequences[:, 4:] != 99).all()
    assert torch.equal(torch.cat(times), torch.linspace(1, 1e-5, 5)[:4]), "the authors' steps"
    times.clear()
    pipe.generate(ids, schedule="even", remasking="low_confidence", temperature=0.0, **options)
    assert torch.cat(times).tolist() == [1, 0.75, 0.5, 0.25], "what is unknown"
    times.clear()
    pipe.score(ids, [ids[0]], hidden=[[True, True, False, False], [False, True, True, True]])
    assert torch.cat(times).tolist() == [0.5, 0.75]


def test_told_hitting_times_a_row_of_a_batch_gets_the_tokens_and_times_that_it_gets_alone(tmp_path, told):
    """Other settings than the family's in one word: what it says of steps is set aside."""
    pipe, ids = RECORDED.changed(tmp_path, time_conditioning=True), RECORDED.inputs["xt"][:2, :4]
    times, options = told(pipe), {"max_new_tokens": 8, "schedule": "first_hitting", "eos_token_id": []}
    both = pipe.generate(ids, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], **options)
    assert both.num_forwards.tolist() == [8, 8]
    together = torch.stack(times)
    assert (together.diff(dim=0) < 0).all()
    assert bool(((together > 0) & (together < 1)).all())
    for row in range(2):
        times.clear()
        alone = pipe.generate(ids[row : row + 1], generator=torch.Generator().manual_seed(row + 1), **options)
        assert torch.equal(alone.sequences[0], both.sequences[row])
        assert torch.equal(torch.cat(times), together[:, row])


def test_told_the_time_a_row_of_a_batch_and_a_guided_one_get_the_tokens_that_they_get_alone(tmp_path):
    pipe, ids = RECORDED.changed(tmp_path, time_conditioning=True), RECORDED.inputs["xt"][:2, :6]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 8, "steps": 8, "generator": 3, "cfg_scale": 0.5, "eos_token_id": [5, 17, 40]}
    both = pipe.generate(ids, mask, **options).sequences
    assert both[0].tolist() == pipe.generate(ids[:1], **options).sequences[0].tolist()
    assert both[1, 3:].tolist() == pipe.generate(ids[1:, 3:], **options).sequences[0].tolist()


def test_a_prompt_that_is_told_the_time_is_not_cached(tmp_path):
    pipe, ids = RECORDED.changed(tmp_path, time_conditioning=True), RECORDED.inputs["xt"][:1, :4]
    options = {"max_new_tokens": 4, "generator": 0, "visibility": "prefix"}
    assert pipe.generate(ids, **options).sequences.shape == (1, 8)
    with pytest.raises(ValueError, match="the prompt is told the time, so what is cached would change"):
        pipe.generate(ids, use_cache=True, **options)


def test_the_tokens_of_a_model_that_is_not_conditioned_on_time_do_not_depend_on_it(pipe, monkeypatch):
    ids, options = RECORDED.inputs["xt"][:1, :4], {"max_new_tokens": 8, "steps": 8, "generator": 0}
    told, forward = pipe.generate(ids, **options), pipe.model.forward
    monkeypatch.setattr(pipe.model, "forward", lambda **given: forward(**{**given, "time": None}))
    assert torch.equal(pipe.generate(ids, **options).sequences, told.sequences)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parameterization": "sedd"}, "parameterization='sedd' is not supported; 'subs' is"),
        ({"noise": {"type": "cosine"}}, "type='cosine' is not supported"),
        ({"backbone": "dimamba"}, "backbone='dimamba' is not supported"),
        ({"mask_index": None}, "lacks mask_index"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_weights_are_read_strictly(tmp_path):
    weights = dict(RECORDED.weights)
    lost = weights.pop("blocks.1.attn_qkv.weight")
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.attn_qkv\.weight"):
        RECORDED.changed(tmp_path, {**weights})
    with pytest.raises(ValueError, match=r"blocks\.1\.attn_qkv\.weight has 96 rows; the configuration says 48\+48\+48"):
        RECORDED.changed(tmp_path, {**weights, "blocks.1.attn_qkv.weight": lost[:96].clone()})
    with pytest.raises(ValueError, match=r"unexpected blocks\.2\.norm1\.weight"):
        RECORDED.changed(tmp_path, {**RECORDED.weights, "blocks.2.norm1.weight": torch.ones(48)})
    with pytest.raises(ValueError, match=r"rotary_emb\.inv_freq is not what config.json makes it"):
        RECORDED.changed(tmp_path, {**RECORDED.weights, "rotary_emb.inv_freq": torch.ones(6)})
