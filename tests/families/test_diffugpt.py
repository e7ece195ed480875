"""DiffuGPT: the authors' logits, full and causal, loss and a generation, recorded from their code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmllm
from dmllm.checkpoints.published import write_published
from dmllm.families import family_of
from dmllm.families.diffugpt import DIFFUGPT
from dmllm.nn.visibility import layout
from dmllm.objectives import build_objective
from tests.families.recorded import Recorded, assert_written_back, corrupted, mean

RECORDED = Recorded("diffugpt")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def aligned(logits: torch.Tensor) -> torch.Tensor:
    """The authors' logits, which score the token after a position, in the place of the token that they score."""
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("case", "ids", "visibility"),
    [
        ("fwd_bidirectional", "ids", None),
        ("fwd_causal_ratio0", "ids", "causal"),
        ("fwd_long", "long", None),  # as many tokens as there are positions
    ],
)
def test_logits_are_those_of_the_authors_one_to_the_right(pipe, case, ids, visibility):
    found = pipe.logits(INPUTS[ids], visibility=visibility)
    assert (found - aligned(EXPECTED[f"{case}.logits"])).abs().max() < 1e-4


def test_the_loss_is_that_of_the_authors(pipe):
    """1/t, divided by the number of hidden tokens; nothing predicts the first one, and a given source is not hidden."""
    clean, noisy, time = INPUTS["train"], EXPECTED["loss_shift.xt"], EXPECTED["loss_shift.t"]
    assert (pipe.logits(noisy) - aligned(EXPECTED["loss_shift.logits"])).abs().max() < 1e-4
    scored = (torch.arange(clean.shape[1]) > 0) & (INPUTS["train_src_mask"] == 0)
    for weight, name in (("elbo", "loss"), ("none", "unweighted_loss")):
        objective = build_objective("masked", {"reduction": "masked", "weight": weight}, pipe.special, "full")
        recorded = corrupted(objective, noisy, clean, time[:, None], scored=scored)
        assert torch.equal(recorded.batch.input_ids, noisy)
        assert mean(objective, pipe.model, recorded) == pytest.approx(float(EXPECTED[f"loss_shift.{name}"]), rel=1e-5)


def test_a_generation_is_the_authors_in_the_order_drawn_by_the_same_numbers(pipe):
    """Row k of a call's numbers came from a generator seeded with k; a tiny top_p left them one token a place."""
    options = {"max_new_tokens": 12, "steps": 6, "temperature": 0, "top_p": 1.0, "eos_token_id": []}
    out = pipe.generate(INPUTS["prompt"], generator=draws(0, 1), **options)
    assert torch.equal(out.sequences[:, 1:], EXPECTED["sample_T6.tokens"])  # they leave the first token out
    assert out.num_forwards.tolist() == [6, 6]
    fed = EXPECTED["sample_T6.fed"][1:, :, 6:]  # before each later call
    assert torch.equal(torch.stack([step.ids for step in out.trajectory[:-1]]), fed)


def test_rows_of_a_batch_of_several_lengths_get_what_they_get_alone(pipe):
    prompts = [INPUTS["prompt"][0], INPUTS["prompt"][1, :3], INPUTS["long"][0, :11]]
    options = {"max_new_tokens": 12, "steps": 4, "eos_token_id": []}
    padded, mask = torch.full((3, 11), 5), torch.zeros(3, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 11 - len(prompt) :], mask[row, 11 - len(prompt) :] = prompt, 1
    both = pipe.generate(padded, mask, generator=draws(0, 1, 2), **options).sequences[:, 11:]
    for row, prompt in enumerate(prompts):
        alone = pipe.generate(prompt[None], generator=draws(row), **options).sequences[0, len(prompt) :]
        assert torch.equal(both[row], alone)


def test_under_prefix_visibility_the_stored_prompt_answers_as_one_that_is_fed_again(pipe):
    ids = torch.cat([INPUTS["prompt"], torch.full((2, 12), pipe.special.mask)], 1)
    canvas = torch.arange(18).expand_as(ids) >= 6
    look = layout("prefix", documents=torch.zeros_like(ids), canvas=canvas)
    logits = pipe.model(ids, visibility=look).logits[:, 6:]
    logits[..., pipe.special.mask] = -torch.inf
    options = {"max_new_tokens": 12, "steps": 1, "temperature": 0, "top_p": 1.0, "eos_token_id": []}
    out = pipe.generate(INPUTS["prompt"], visibility="prefix", **options)
    assert torch.equal(out.sequences[:, 6:], logits.argmax(-1))
    assert not torch.equal(out.sequences, pipe.generate(INPUTS["prompt"], **options).sequences)


def test_padding_changes_nothing(pipe):
    ids = INPUTS["ids"]
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    assert (pipe.logits(padded, mask)[:, 3:] - pipe.logits(ids)).abs().max() < 1e-4


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path):
    assert_written_back(pipe, RECORDED, tmp_path)


@pytest.mark.parametrize("twice", [False, True])
def test_under_the_names_of_a_gpt2_and_with_the_head_stored_too_it_is_the_same_model_and_keeps_them(
    pipe, tmp_path, twice
):
    weights = {name.replace("denoise_model.", "transformer."): tensor for name, tensor in RECORDED.weights.items()}
    weights["transformer.wte.weight"] = weights.pop("embed_tokens.weight")
    if twice:
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    renamed = RECORDED.changed(tmp_path, weights)
    assert torch.equal(renamed.logits(INPUTS["ids"]), pipe.logits(INPUTS["ids"]))
    assert renamed.model.backbone.lm_head.weight is renamed.model.backbone.embed_tokens.weight
    written = load_file(write_published(renamed.model, tmp_path / "out") / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused_unless_it_is_not_tied(pipe, tmp_path):
    weights = {**RECORDED.weights, "lm_head.weight": RECORDED.weights["embed_tokens.weight"] + 1}
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding, .*tie_word_embeddings: false"):
        RECORDED.changed(tmp_path, weights)
    weights["lm_head.weight"] = 2 * RECORDED.weights["embed_tokens.weight"]
    untied = RECORDED.changed(tmp_path, weights, tie_word_embeddings=False)
    assert (untied.logits(INPUTS["ids"]) - 2 * pipe.logits(INPUTS["ids"])).abs().max() < 1e-4


def test_what_old_files_hold_of_the_causal_mask_is_not_asked(pipe, tmp_path):
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    found = RECORDED.changed(tmp_path, {**RECORDED.weights, "denoise_model.h.0.attn.bias": mask})
    assert torch.equal(found.logits(INPUTS["ids"]), pipe.logits(INPUTS["ids"]))


@pytest.mark.parametrize(("width", "rows", "mask"), [(768, 50257, 10541), (1024, 50258, 50257)])
def test_the_released_models_need_no_mask_token_in_their_config(width, rows, mask):
    """Small took a word; medium's is new, and the embedding grew to an even number of rows."""
    config = {**DIFFUGPT.example, "n_embd": width, "vocab_size": 50257, "eos_token_id": 50256}
    del config["mask_token_id"]
    assert family_of(config) is DIFFUGPT
    ours = DIFFUGPT.config(config)
    assert (ours["mask_token_id"], ours["backbone"]["vocab_size"]) == (mask, rows)


def test_a_gpt2_is_this_family_only_by_its_mask_token_or_the_authors_class(tmp_path):
    plain = {"architectures": ["GPT2LMHeadModel"], "mask_token_id": None}
    with pytest.raises(ValueError, match="type 'gpt2'"):
        RECORDED.changed(tmp_path, **plain)
    save_file(RECORDED.weights, tmp_path / "model.safetensors")
    assert dmllm.load(str(tmp_path), device="cpu", config={"mask_token_id": 90}).special.mask == 90


def test_a_tokenizer_of_a_class_that_was_never_published_is_gpt2s(tmp_path):
    pipe = RECORDED.changed(tmp_path)
    words = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 88, "[M]": 90}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {"tokenizer_class": "MaskTokenWrapper", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert pipe.processor is None
    tokenizer = dmllm.load(str(tmp_path), device="cpu").processor.tokenizer
    assert tokenizer("aab", add_special_tokens=False).input_ids == [0, 2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation_function": "relu"}, "activation_function='relu' is not supported; 'gelu_new' or"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"n_layer": 3}, r"lacks denoise_model\.h\.2\.attn\.c_attn\.bias"),
        ({"n_layer": 1}, r"unexpected denoise_model\.h\.1\.attn\.c_attn\.bias"),
        ({"n_positions": 41}, r"wpe\.weight is \[40, 32\], but config\.json makes it \[41, 32\]"),
        ({"n_inner": 96}, r"mlp\.c_fc\.(weight|bias) has 128 rows; the configuration says 96"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_more_tokens_than_positions_are_refused(pipe):
    with pytest.raises(ValueError, match="41 tokens is longer than the 40 positions"):
        pipe.logits(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match=r"45 tokens is longer than the 40 positions .* smaller max_new_tokens"):
        pipe.generate(INPUTS["long"], max_new_tokens=5)
