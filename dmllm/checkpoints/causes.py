"""Why weights do not fit: the likely cause, told from their names and shapes, and what to do about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

QUANTISED = r"(qweight|qzeros|g_idx|absmax|quant_map|SCB|.*quant_state.*|weight_scale(_inv)?|weight_packed|scales)"
ADAPTER = r"lora_|\.adapter|modules_to_save"
TOWER = r"vision|visual|mm_projector|multi_modal_projector|image_newline"
HEAD = r"(lm_head|model\.transformer\.ff_out)\.weight"
LAYER = r"\.(layers|blocks|h)\.(\d+)\."
FIELDS = (  # of config.json, by the weights whose shape they decide
    (r"vision|visual|projector", "the vision tower's configuration and mm_hidden_size"),
    (r"embed|wte|lm_head|transformer\.ff_out|vocab", "vocab_size (embedding_size); perhaps the vocabulary was resized"),
    (r"wpe", "n_positions"),
    (r"expert|router|mlp\.gate\.", "num_experts and moe_intermediate_size (expert_intermediate_size)"),
    (r"[qk]_norm", "head_dim"),
    (r"norm|ln_", "hidden_size (d_model)"),
    (r"[kv]_proj", "num_key_value_heads (n_kv_heads) and head_dim"),
    (r"q_proj|o_proj|attn|attention|qkv|query_key_value", "num_attention_heads (n_heads) and head_dim"),
    (r"mlp|ff", "intermediate_size (mlp_hidden_size)"),
    (r"", "hidden_size (d_model)"),
)


def of_names(missing: Collection[str], unexpected: Collection[str]) -> str:
    """A sentence on why a checkpoint lacks some names and has others; "" where there are neither."""
    if not missing and not unexpected:
        return ""
    if any(re.fullmatch(QUANTISED, name.rpartition(".")[2]) for name in unexpected):
        return "They are quantised weights, which are not read; take the checkpoint that they were made from."
    if any(re.search(ADAPTER, name) for name in unexpected):
        return "It holds an adapter (LoRA); merge it into its base model (peft: merge_and_unload) and save that."
    if wrapped := _prefix(missing, unexpected):
        return wrapped
    if missing and not unexpected and all(re.fullmatch(HEAD, name) for name in missing):
        return (
            "Its embedding is perhaps the vocabulary projection too: then config.json must say tie_word_embeddings: "
            "true (weight_tying for LLaDA's own layout)."
        )
    layers = {n for name in (*missing, *unexpected) for n in re.findall(LAYER, name)[:1]}
    if layers and all(re.search(LAYER, name) for name in (*missing, *unexpected)) and not (missing and unexpected):
        numbers = ", ".join(sorted({number for _, number in layers}, key=int)[:8])
        said = "a shard is not complete, or config.json says too many" if missing else "config.json says too few"
        return f"All are of layers {numbers}: {said} (num_hidden_layers, n_layers)."
    if unexpected and all(re.search(TOWER, name) for name in unexpected):
        return "They belong to a vision tower, which this config.json does not speak of: it is of another model."
    if missing and all(re.search(TOWER, name) for name in missing):
        return (
            "It holds the language model alone; the vision tower's weights belong into it, saved by its authors' code."
        )
    if missing and unexpected:
        return "It is perhaps of another model or version: `dmllm init` writes the names that are expected."
    if missing:
        return "The download is perhaps not complete, or config.json is of another model."
    return "They are perhaps of training (an optimiser, an average), or config.json is of another model."


def of_shape(name: str) -> str:
    """A sentence on the fields of config.json that decide the shape of the published weight of this name."""
    return f"Its shape follows from {next(fields for pattern, fields in FIELDS if re.search(pattern, name))}."


def _prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """A sentence on what stands before every name, or is left out before it; "" where that is not it."""
    for given, wanted, what in ((unexpected, missing, "has"), (missing, unexpected, "lacks")):
        names, starts = set(given), Counter()
        for name in wanted:
            starts.update(one.removesuffix(name) for one in names if one != name and one.endswith(f".{name}"))
        if starts and (most := starts.most_common(1)[0])[1] * 2 > len(wanted):
            why = (
                "as a wrapper saves it (DataParallel, torch.compile, PEFT); save what is inside"
                if what == "has"
                else ("as of a part saved by itself; save the whole model")
            )
            return f"Each name {what} {most[0]!r} in front, {why}, or rename them."
    return ""
