"""Experts: all rows in one grouped product give what one expert after another gives, and the router's rules."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dmllm.models.backbones.transformer import Transformer, TransformerConfig
from dmllm.nn.moe import Experts, MixtureOfExperts, MoEConfig, Router, Routing, balance
from dmllm.nn.visibility import Visibility, layout
from dmllm.types import PADDING

WIDTH = 12
SOFTMAX = MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8)
GROUPED = MoEConfig(
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=16,
    score_function="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    n_group=4,
    topk_group=2,
    expert_bias=True,
)


def mixture(config: MoEConfig) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(WIDTH, config)


def one_after_another(module: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every row through every one of its experts by itself."""
    rows, experts = x.flatten(0, 1), module.experts
    routing = module.router(rows)
    answers = []
    for row, chosen, weights in zip(rows, routing.experts.tolist(), routing.weights, strict=True):
        total = torch.zeros(WIDTH)
        for expert, weight in zip(chosen, weights, strict=True):
            inner = F.silu(experts.gate_proj[expert] @ row) * (experts.up_proj[expert] @ row)
            total = total + weight * (experts.down_proj[expert] @ inner)
        answers.append(total)
    mixed = torch.stack(answers).view(x.shape)
    return mixed if module.shared_expert is None else mixed + module.shared_expert(x)


@pytest.mark.parametrize(
    "config",
    [SOFTMAX, GROUPED, replace(SOFTMAX, moe_intermediate_size=7)],
    ids=["softmax", "sigmoid in groups", "of a width that the grouped product refuses"],
)
def test_one_grouped_product_is_one_expert_after_another_and_so_are_its_gradients(config):
    module, x = mixture(config), torch.randn(2, 9, WIDTH, requires_grad=True)
    probe = torch.randn_like(x)
    found = []
    for answer in (module(x)[0], one_after_another(module, x)):
        wanted = (x, *module.parameters())
        found.append((answer, *torch.autograd.grad((answer * probe).sum(), wanted)))
    for grouped, looped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=1e-5, atol=1e-6)


def test_experts_that_no_row_chose_and_a_single_row_are_no_exception():
    module = Experts(WIDTH, SOFTMAX)
    rows, weights = torch.randn(1, WIDTH), torch.ones(1, 2)
    answer = module(rows, torch.tensor([[4, 1]]), weights)
    answer.sum().backward()
    assert module.gate_proj.grad is not None
    assert module.gate_proj.grad.flatten(1).any(1).tolist() == [False, True, False, False, True, False]


def test_weights_that_begin_anywhere_in_a_mapped_file_give_the_same():
    module, rows = mixture(SOFTMAX), torch.randn(1, 9, WIDTH)
    expected = module(rows)[0]
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack = getattr(module.experts, name).detach()
        anywhere = torch.empty(stack.numel() + 1)[1:].view(stack.shape).copy_(stack)
        assert anywhere.data_ptr() % 16
        setattr(module.experts, name, torch.nn.Parameter(anywhere))
    torch.testing.assert_close(module(rows)[0], expected)


def test_a_rows_answer_does_not_depend_on_the_other_rows():
    module, x = mixture(GROUPED), torch.randn(3, 5, WIDTH)
    alone = torch.cat([module(row[None])[0] for row in x])
    torch.testing.assert_close(module(x)[0], alone, rtol=1e-6, atol=1e-6)


def test_softmax_weights_are_shares_among_all_experts_and_are_not_divided_by_their_sum():
    router, rows = mixture(SOFTMAX).router, torch.randn(7, WIDTH)
    routing = router(rows)
    best = (rows @ router.weight.T).softmax(-1).topk(2)
    assert torch.equal(routing.experts, best.indices)
    torch.testing.assert_close(routing.weights, best.values)
    assert (routing.weights.sum(-1) < 1).all()


def test_the_bias_chooses_but_does_not_weigh():
    router = Router(WIDTH, MoEConfig(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=8, expert_bias=True))
    rows = torch.randn(20, WIDTH)
    assert router.bias is not None
    router.bias[2] = 100.0
    routing = router(rows)
    assert (routing.experts == 2).all()
    torch.testing.assert_close(routing.weights, routing.scores[:, 2:3])


def test_experts_are_looked_for_in_the_groups_with_the_best_two():
    """Of groups (9 0), (5 5), (6 0), (7 1) the best two are (5 5) and (9 0); 7 and 6 are out of reach."""
    router = Router(
        8, MoEConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=8, n_group=4, topk_group=2)
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    routing = router(torch.tensor([[9.0, 0.0, 5.0, 5.1, 6.0, 0.0, 7.0, 1.0]]).log1p())
    chosen = torch.tensor([9.0, 0.0, 5.0, 5.1, 6.0, 0.0, 7.0, 1.0])[routing.experts[0]]
    assert sorted(chosen.tolist()) == pytest.approx([5.0, 5.1, 9.0])


def test_normalised_weights_sum_to_the_scale():
    routing = mixture(GROUPED).router(torch.randn(5, WIDTH))
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((5,), 2.5))


def test_under_autocast_experts_compute_in_bfloat16_and_the_router_in_float32():
    module, x = mixture(GROUPED), torch.randn(2, 6, WIDTH)
    exact, chosen = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, routing = module(x)
    assert torch.equal(routing.experts, chosen.experts)
    assert torch.equal(routing.weights, chosen.weights)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_balance_is_one_where_experts_are_used_alike_and_E_where_one_is():
    even = Routing(torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4, torch.ones(8, 1))
    one = Routing(F.one_hot(torch.zeros(8, dtype=torch.int64), 4).float(), torch.zeros(8, 1).long(), torch.ones(8, 1))
    assert balance([even])["load_balance"] == pytest.approx(1.0)
    assert balance([one])["load_balance"] == pytest.approx(4.0)
    both = balance([even, one])
    assert both["load_balance"] == pytest.approx(2.5)
    assert both["expert_load"].tolist() == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]


def transformer(**other) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, moe=dict(vars(GROUPED)) | other
        )
    )
    model.initialise()
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, Visibility]:
    documents = torch.zeros(2, 10, dtype=torch.int64)
    documents[1, 6:] = PADDING
    positions = torch.arange(10).expand(2, -1)
    rule = layout("full", documents=documents, canvas=documents >= 0, positions=positions)
    return torch.randint(0, 32, (2, 10), generator=torch.Generator().manual_seed(1)), positions, rule


def test_in_training_a_model_says_how_its_experts_are_used_in_evaluation_it_does_not():
    model, (ids, positions, rule) = transformer(dense_layers=[0]), inputs()
    aux = model.train()(model.embed(ids), positions, rule).aux
    assert aux["expert_load"].shape == (2, 8)
    torch.testing.assert_close(aux["expert_load"].sum(1), torch.ones(2))
    aux["load_balance"].backward()
    assert model.layers[1].mlp.router.weight.grad.abs().sum() > 0
    assert model.eval()(model.embed(ids), positions, rule).aux == {}


def test_padding_is_not_counted_whichever_way_attention_is_computed():
    found = []
    for form in ("dense", "ragged"):
        model, (ids, positions, rule) = transformer(), inputs()
        object.__setattr__(model.config, "attention", form)
        found.append(model.train()(model.embed(ids), positions, rule).aux)
    for name in ("load_balance", "expert_load"):
        torch.testing.assert_close(found[0][name], found[1][name])


def test_recomputed_in_the_backward_pass_gradients_and_balance_are_the_same():
    found = []
    for recomputed in (False, True):
        model, (ids, positions, rule) = transformer(), inputs()
        model.gradient_checkpointing = recomputed
        output = model.train()(model.embed(ids), positions, rule)
        (output.hidden.square().sum() + output.aux["load_balance"]).backward()
        found.append([output.aux["expert_load"], *(p.grad for n, p in model.named_parameters() if "lm_head" not in n)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_every_expert_learns_and_the_expert_bias_is_stored_but_not_learned():
    model, (ids, positions, rule) = transformer(), inputs()
    model.train()(model.embed(ids), positions, rule).hidden.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lm_head" not in n)
    assert "layers.0.mlp.router.bias" in model.state_dict()
    assert "layers.0.mlp.router.bias" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"score_function": "tanh"}, "softmax, sigmoid"),
        ({"n_group": 4}, "num_experts=6 is not a multiple of n_group=4"),
        ({"n_group": 2, "topk_group": 3}, "topk_group=3"),
        ({"n_group": 3, "num_experts_per_tok": 3}, "more than the 2 experts"),
        ({"num_experts_per_tok": 0}, "at least 1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        MoEConfig(**{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **fields})


def test_only_the_leading_features_turn_with_positions():
    with pytest.raises(ValueError, match="rotary_dim=7"):
        TransformerConfig(hidden_size=16, num_attention_heads=2, rotary_dim=7)
