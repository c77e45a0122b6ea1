"""The norm of a gradient: of millions of values, and clipped by alike under every strategy."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.strategy import check_gradient_norm, clip_gradients, gradient_norms

from support import equivalence
from support.equivalence import Case, mesh_for, whole
from support.worlds import World

CLIP = 0.003


def test_millions_of_values() -> None:
    """As it is in doubles, of one large parameter and of many, and the gradients are scaled by just that."""
    generator = torch.Generator().manual_seed(0)
    large = nn.ParameterList([nn.Parameter(torch.empty(4_000_000))])
    many = nn.ParameterList([nn.Parameter(torch.empty(1000)) for _ in range(500)])
    model: Any = nn.Module()
    model.aggregator, model.encoder = many, large
    for parameter in model.parameters():
        parameter.grad = torch.rand(parameter.shape, generator=generator)
    exact = {
        half: torch.cat([p.grad for p in getattr(model, half).parameters()]).double().square().sum().sqrt().item()
        for half in ("aggregator", "encoder")
    }
    norms = gradient_norms(model)
    assert norms.halves == pytest.approx(exact, rel=1e-12)
    total = (exact["aggregator"] ** 2 + exact["encoder"] ** 2) ** 0.5
    assert norms.total == pytest.approx(total, rel=1e-12)
    before = large[0].grad.double()
    clip_gradients(model, norms, 0.5)
    assert (large[0].grad.double() / before - 0.5 / total).abs().max() < 1e-6 * 0.5 / total
    assert gradient_norms(model).total == pytest.approx(0.5, rel=1e-7)


def test_a_norm_whose_square_is_beyond_fp32() -> None:
    parameters = nn.ParameterList([nn.Parameter(torch.empty(3))])
    parameters[0].grad = torch.full((3,), 1e30)
    model: Any = SimpleNamespace(aggregator=parameters, encoder=nn.ParameterList())
    norms = gradient_norms(model)
    check_gradient_norm(norms.total)
    assert norms.total == pytest.approx(3**0.5 * 1e30)


def clipped(_: TileGroup, names: list[str]) -> dict[str, tuple[float, torch.Tensor]]:
    """Of each strategy, the first norm of an epoch whose steps are clipped, and the parameters after it."""
    found = {}
    for name in names:
        case = Case(strategy=name)
        mesh = mesh_for(case)
        step = equivalence.make_step(case, equivalence.make_model(case), mesh)
        strategy: Any = step.strategy
        if name.startswith("zero"):
            strategy._engine._config.gradient_clipping = strategy._engine.optimizer.clip_grad = CLIP
        else:
            strategy._clip = CLIP
        norms = [result.gradient_norms["total"] for result in equivalence.steps(case, step)]
        values = torch.cat([whole(parameter).reshape(-1).clone() for parameter in strategy.model.parameters()])
        found[name] = norms[0], values
    return found


def test_every_strategy_clips_by_the_same_norm(world: Callable[..., World]) -> None:
    norm, parameters = (found := world(2).run(clipped, ["ddp", "fsdp", "zero0", "zero2", "zero3"])[0]).pop("ddp")
    assert norm > 2 * CLIP, "or nothing is clipped"
    for name, (other_norm, others) in found.items():
        assert other_norm == pytest.approx(norm, rel=1e-6), name
        assert (others - parameters).abs().max() < 1e-7, name
