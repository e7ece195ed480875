"""Which parameters learn, at what rate, and by which optimiser.

Muon orthogonalises the update of a matrix between hidden layers (Jordan et al., 2024; torch.optim.Muon); embeddings,
the vocabulary projection, norms, biases and convolutions keep AdamW, as its authors advise.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from torch.nn import Parameter

from dmllm.training.config import OptimiserConfig, PartConfig, PartsConfig
from dmllm.training.muon import Muon


def part_of(name: str) -> str:
    """The part (vision, projector, backbone) that a parameter's name belongs to; heads are of the backbone."""
    root = name.split(".", 1)[0]
    return {"row_break": "projector", "heads": "backbone"}.get(root, root)


def set_learning(model: nn.Module, parts: PartsConfig, *, compact: bool = False) -> None:
    """Freeze what does not learn; what learns is kept in float32.

    Args:
        compact: frozen parts whose every weight bfloat16 holds exactly (published ones mostly do) are kept in it.

    Raises:
        ValueError: nothing is left to learn.
    """
    frozen: dict[str, list[Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_part(parts, name).learn)
        if not parameter.requires_grad:
            frozen[part_of(name)].append(parameter)
        elif parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    for parameters in frozen.values() if compact else ():
        if all(torch.equal(p.data.bfloat16().to(p.dtype), p.data) for p in parameters):
            for parameter in parameters:
                parameter.data = parameter.data.bfloat16()
    if not any(p.requires_grad for p in model.parameters()):
        has = sorted({part_of(name) for name, _ in model.named_parameters()})
        raise ValueError(f"No part learns: the model has {', '.join(has)}; set --parts.{has[0]}.learn=true.")


def build_optimisers(
    model: nn.Module, config: OptimiserConfig, parts: PartsConfig, *, fused: bool = True
) -> dict[str, torch.optim.Optimizer]:
    """{"adamw": ...} or {"muon": ..., "adamw": ...} over what learns; a group remembers its peak as `peak_lr`.

    Args:
        fused: one kernel per step for AdamW, on CPU and CUDA.
    """
    matrices = hidden_matrices(model) if config.name == "muon" else set()
    groups: dict[str, dict[tuple[float, float], list[Parameter]]] = {
        "muon": defaultdict(list),
        "adamw": defaultdict(list),
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale, decay = _scale(_part(parts, name), config), config.weight_decay if parameter.ndim > 1 else 0.0
            groups["muon" if name in matrices else "adamw"][scale, decay].append(parameter)
    optimisers: dict[str, torch.optim.Optimizer] = {}
    if groups["muon"]:
        optimisers["muon"] = Muon(
            _groups(groups["muon"], config.muon_lr),
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            adjust_lr_fn=config.muon_adjust,
        )
    if groups["adamw"]:
        optimisers["adamw"] = torch.optim.AdamW(
            _groups(groups["adamw"], config.lr), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
        )
    return optimisers


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the 2-D weights between hidden layers: of linear and attention modules, but neither the vocabulary
    projection nor a patch embedding."""
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    names = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.MultiheadAttention) or "patch_embed" in path:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 and id(parameter) not in outside:
                names.add(f"{path}.{name}" if path else name)
    return names


def set_learning_rates(optimisers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """Every group at `factor` times its peak."""
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * factor


def _part(parts: PartsConfig, name: str) -> PartConfig:
    return getattr(parts, part_of(name))


def _scale(part: PartConfig, config: OptimiserConfig) -> float:
    return part.lr_scale if part.lr is None else part.lr / config.lr


def _groups(groups: dict[tuple[float, float], list[Parameter]], lr: float) -> list[dict[str, object]]:
    return [
        {"params": parameters, "lr": lr * scale, "peak_lr": lr * scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
