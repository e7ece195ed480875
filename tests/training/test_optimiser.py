"""Which parameters learn, how fast, and by which optimiser."""

import pytest
import torch

from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.training.config import OptimiserConfig, PartConfig, PartsConfig
from dmllm.training.muon import Muon
from dmllm.training.optimiser import build_optimisers, hidden_matrices, set_learning

VISION = {
    "name": "timm:vit_tiny_patch16_224",
    "pretrained": False,
    "image_size": [16, 16],
    "options": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
}


@pytest.fixture
def model():
    shape = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = DmllmConfig(backbone=shape, vision=VISION, projector={"name": "linear"}, mask_token_id=2, row_break=True)
    return MultimodalModel(config)


def names_of(model, optimiser):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for group in optimiser.param_groups for p in group["params"]}


def test_muon_takes_the_matrices_between_layers_and_adamw_the_rest(model):
    optimisers = build_optimisers(model, OptimiserConfig(name="muon"), PartsConfig())
    muon, adamw = names_of(model, optimisers["muon"]), names_of(model, optimisers["adamw"])
    assert muon | adamw == {name for name, _ in model.named_parameters()}
    assert not muon & adamw
    assert muon == hidden_matrices(model)
    assert {"backbone.layers.0.self_attn.q_proj.weight", "backbone.layers.0.mlp.down_proj.weight"} <= muon
    for name in ("backbone.embed_tokens.weight", "backbone.lm_head.weight", "backbone.norm.weight", "row_break"):
        assert name in adamw
    assert not any("patch_embed" in name or "pos_embed" in name or name.endswith("bias") for name in muon)


def test_a_tied_vocabulary_projection_is_left_to_adamw():
    shape = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MultimodalModel(DmllmConfig(backbone=shape | {"tie_word_embeddings": True}))
    assert not {name for name in hidden_matrices(model) if "embed" in name or "head" in name}


def test_the_projector_stage_moves_only_the_projector_and_the_row_break(model):
    parts = PartsConfig(vision=PartConfig(learn=False), backbone=PartConfig(learn=False))
    set_learning(model, parts)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in model.named_parameters() if n.startswith(("projector.", "row_break"))}
    assert names_of(model, build_optimisers(model, OptimiserConfig(), parts)["adamw"]) == learning


def test_each_part_has_its_own_rate_and_only_matrices_decay(model):
    parts = PartsConfig(vision=PartConfig(lr_scale=0.2), projector=PartConfig(lr=1e-3))
    config = OptimiserConfig(name="muon", lr=1e-4, muon_lr=0.02, weight_decay=0.1)
    for kind, optimiser in build_optimisers(model, config, parts).items():
        peak = {"muon": 0.02, "adamw": 1e-4}[kind]
        scale = {"vision": 0.2, "projector": 10.0, "row_break": 10.0, "backbone": 1.0}
        by_id = {id(p): name for name, p in model.named_parameters()}
        for group in optimiser.param_groups:
            for p in group["params"]:
                assert group["peak_lr"] == pytest.approx(peak * scale[by_id[id(p)].split(".")[0]])
                assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)


def test_what_learns_is_kept_in_float32_and_what_does_not_stays_as_it_was(model):
    set_learning(model.bfloat16(), PartsConfig(backbone=PartConfig(learn=False)))
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())


def test_a_model_of_which_nothing_would_learn_is_refused():
    shape = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=r"the model has backbone; set --parts\.backbone\.learn=true"):
        set_learning(MultimodalModel(DmllmConfig(backbone=shape)), PartsConfig(backbone=PartConfig(learn=False)))


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_batched_muon_is_torchs_muon(rule):
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8)]
    runs = []
    for kind in (torch.optim.Muon, Muon):
        draws = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=draws)) for shape in shapes]
        optimiser = kind(weights, lr=0.1, weight_decay=0.1, adjust_lr_fn=rule)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draws)
            optimiser.step()
        runs.append(weights)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


def test_frozen_parts_become_bfloat16_only_where_that_loses_nothing(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if name.startswith("vision") else 0.1)
    set_learning(model, PartsConfig(vision=PartConfig(learn=False), backbone=PartConfig(learn=False)), compact=True)
    assert all(
        p.dtype == (torch.bfloat16 if n.startswith("vision") else torch.float32) for n, p in model.named_parameters()
    )
