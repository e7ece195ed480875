"""What is said of weights that do not fit is the likely cause, and what to do."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from dmllm.checkpoints import folder
from dmllm.checkpoints.causes import of_names, of_shape
from dmllm.checkpoints.example import write_example

Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head.weight"


def renamed(to):
    return lambda weights: {to(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (renamed("module.{}".format), r"Each name has 'module\.' in front, as a wrapper saves it .*DataParallel"),
        (renamed("_orig_mod.{}".format), r"Each name has '_orig_mod\.' in front.*torch\.compile"),
        (
            renamed(lambda n: n.removeprefix("model.")),
            r"Each name lacks 'model\.' in front, as of a part saved by itself",
        ),
        (lambda w: {n: t for n, t in w.items() if n != HEAD}, r"lacks lm_head\.weight .* tie_word_embeddings: true"),
        (lambda w: {n: t for n, t in w.items() if ".1." not in n}, r"All are of layers 1: a shard is not complete"),
        (
            lambda w: w | {n.replace(".1.", ".2."): t.clone() for n, t in w.items() if ".1." in n},
            "2: config.json says too few",
        ),
        (lambda w: w | {f"{Q}.qweight": w[HEAD].clone()}, "quantised weights, which are not read; take the checkpoint"),
        (lambda w: w | {f"{Q}.weight_scale_inv": w[HEAD].clone()}, "quantised weights"),
        (lambda w: {f"{Q}.lora_A.weight": w[HEAD]}, "holds an adapter .*merge_and_unload"),
        (lambda w: w | {"visual.patch_embed.weight": w[HEAD].clone()}, "belong to a vision tower"),
        (lambda w: w | {"optimizer.step": w[HEAD].clone()}, "perhaps of training"),
        (renamed(lambda n: n.replace("self_attn", "attention")), "perhaps of another model or version: `dmllm init`"),
    ],
)
def test_names_tell_why_a_checkpoint_does_not_fit(tmp_path, edit, cause):
    path = write_example("dream", tmp_path / "dream")
    save_file(edit(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=cause):
        folder.load(path)


def test_a_tower_that_is_left_out_is_asked_for(tmp_path):
    path = write_example("llada_v", tmp_path / "llada_v")
    weights = {n: t for n, t in load_file(path / "model.safetensors").items() if "vision_tower" not in n}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds the language model alone"):
        folder.load(path)


def test_nothing_is_said_where_nothing_is_wrong():
    assert of_names([], []) == ""
    assert "download" in of_names(["model.norm.weight"], [])


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("model.embed_tokens.weight", "vocab_size"),
        ("model.transformer.wte.weight", "vocab_size"),
        ("model.layers.3.self_attn.k_proj.weight", "num_key_value_heads"),
        ("model.layers.3.self_attn.k_norm.weight", "head_dim"),
        ("model.layers.3.self_attn.q_proj.weight", "num_attention_heads"),
        ("model.layers.3.mlp.up_proj.weight", "intermediate_size"),
        ("model.transformer.blocks.3.ff_out.weight", "mlp_hidden_size"),
        ("model.layers.3.mlp.experts.5.up_proj.weight", "moe_intermediate_size"),
        ("model.transformer.blocks.1.attn_norm.weight", "hidden_size"),
        ("model.mm_projector.0.weight", "mm_hidden_size"),
        ("wpe.weight", "n_positions"),
    ],
)
def test_a_shape_names_the_fields_that_decide_it(name, field):
    assert field in of_shape(name)
