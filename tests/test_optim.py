"""Parameter groups and optimizers."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slidescale.engine.config import OptimConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.strategies.optim import make_optimizer, parameter_groups

from support.networks import Unused


class OneVector(nn.Sequential):
    def forward(self, features: Any, places: Any, group: Any) -> Any:
        return super().forward(features), None


def make_model(encoder: str = "test_vit", **settings: Any) -> SlideModel:
    torch.manual_seed(0)
    aggregator = OneVector(nn.Linear(4, 3), nn.LayerNorm(3))
    return SlideModel(Encoder(encoder, tile_px=32, **settings), aggregator)


def names_in(model: SlideModel, group: dict[str, Any]) -> set[str]:
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_four_groups_without_layer_decay() -> None:
    model = make_model()
    groups = parameter_groups(model, OptimConfig(lr=0.1, encoder_lr_scale=0.5, weight_decay=0.3))
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("aggregator.decay", 0.1, 0.3),
        ("aggregator.no_decay", 0.1, 0.0),
        ("encoder.decay", 0.05, 0.3),
        ("encoder.no_decay", 0.05, 0.0),
    ]
    assert names_in(model, groups[0]) == {"aggregator.0.weight"}
    assert names_in(model, groups[1]) == {"aggregator.0.bias", "aggregator.1.weight", "aggregator.1.bias"}
    assert all(parameter.ndim > 1 for parameter in groups[2]["params"])
    spared = names_in(model, groups[3])
    assert {"encoder.backbone.pos_embed", "encoder.backbone.cls_token"} <= spared, "timm exempts these"
    assert {name for name, p in model.encoder.named_parameters(prefix="encoder") if p.ndim <= 1} < spared


@pytest.mark.parametrize("encoder", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "resnet10t"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_trained_parameter_is_in_one_group(encoder: str, layer_decay: float) -> None:
    model = make_model(encoder)
    groups = parameter_groups(model, OptimConfig(layer_decay=layer_decay))
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    assert len({group["name"] for group in groups}) == len(groups)


def test_layer_decay_of_a_transformer() -> None:
    model = make_model()
    groups = parameter_groups(model, OptimConfig(lr=1.0, encoder_lr_scale=0.1, layer_decay=0.5))
    rates = {name: group["lr"] for group in groups for name in names_in(model, group)}
    blocks = 6
    for layer, expected in (
        ("patch_embed.proj.weight", 0.1 * 0.5**blocks),
        ("pos_embed", 0.1 * 0.5**blocks),
        ("blocks.0.mlp.fc1.weight", 0.1 * 0.5 ** (blocks - 1)),
        ("blocks.0.norm1.bias", 0.1 * 0.5 ** (blocks - 1)),
        ("blocks.4.attn.qkv.weight", 0.1 * 0.5),
        ("blocks.5.attn.qkv.weight", 0.1),
        ("norm.weight", 0.1),
    ):
        assert rates[f"encoder.backbone.{layer}"] == pytest.approx(expected), layer
    assert {rates[name] for name, _ in model.named_parameters() if name.startswith("aggregator")} == {1.0}
    assert groups[0]["name"] == "aggregator.decay", "whose rate is logged"
    assert groups[2]["name"] == "encoder.layer0.decay"
    undecayed = [name for group in groups if not group["weight_decay"] for name in names_in(model, group)]
    assert "encoder.backbone.cls_token" in undecayed
    assert "encoder.backbone.blocks.3.norm1.weight" in undecayed
    assert not any(name.endswith("qkv.weight") for name in undecayed)


def test_layer_decay_needs_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    message = "--optim.layer-decay is 0.5, and timm does not say which parameters of VisionTransformer belong to which"
    monkeypatch.setattr(type(model.encoder.backbone), "group_matcher", lambda self, coarse: {"stem": r"^nothing"})
    with pytest.raises(ConfigError, match=message):
        parameter_groups(model, OptimConfig(layer_decay=0.5))
    monkeypatch.delattr(type(model.encoder.backbone), "group_matcher")
    with pytest.raises(ConfigError, match=message):
        parameter_groups(model, OptimConfig(layer_decay=0.5))
    assert len(parameter_groups(model, OptimConfig())) == 4


def test_frozen_parameters_are_left_out() -> None:
    model = make_model(lora_rank=2)
    for layer_decay in (1.0, 0.5):
        groups = parameter_groups(model, OptimConfig(layer_decay=layer_decay))
        names = {name for group in groups for name in names_in(model, group)}
        assert all("lora_" in name for name in names if name.startswith("encoder"))
    rates = {name: group["lr"] for group in groups for name in names_in(model, group)}
    first, last = (rates[f"encoder.backbone.blocks.{block}.mlp.fc1.lora_A.default.weight"] for block in (0, 5))
    assert first == pytest.approx(last * 0.5**5), "adapters have their layer's rate"
    model.encoder.requires_grad_(False)
    assert [g["name"] for g in parameter_groups(model, OptimConfig())] == ["aggregator.decay", "aggregator.no_decay"]


def test_timms_wildcards_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(type(model.encoder.backbone), "no_weight_decay", lambda self: {"blocks.*.attn.*"})
    groups = {group["name"]: names_in(model, group) for group in parameter_groups(model, OptimConfig())}
    assert not any(".attn." in name for name in groups["encoder.decay"])
    assert sum(name.endswith("qkv.weight") for name in groups["encoder.no_decay"]) == 6


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_step_by_their_definition(name: Any) -> None:
    """Two steps on one matrix and one vector, beside the formulas."""
    config = OptimConfig(optimizer=name, lr=0.1, weight_decay=0.3)
    start = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    parameters = [nn.Parameter(value.clone()) for value in start]
    groups = [
        {"name": "a", "params": parameters[:1], "lr": 0.1, "weight_decay": 0.3},
        {"name": "b", "params": parameters[1:], "lr": 0.05, "weight_decay": 0.0},
    ]
    optimizer = make_optimizer(groups, config)
    gradients = [[torch.randn_like(value) for value in start] for _ in range(2)]
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for index, (lr, decay) in enumerate(((0.1, 0.3), (0.05, 0.0))):
        value, m, v = start[index].clone(), torch.zeros(()), torch.zeros(())
        for count, step in enumerate(gradients, start=1):
            if name == "adamw":
                m, v = 0.9 * m + 0.1 * step[index], 0.999 * v + 0.001 * step[index] ** 2
                value = value * (1 - lr * decay)
                value = value - lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
            else:
                m = 0.9 * m + step[index] + decay * value
                value = value - lr * m
        torch.testing.assert_close(parameters[index].detach(), value, rtol=1e-12, atol=1e-12)


def test_adamw_runs_fused() -> None:
    optimizer = make_optimizer(parameter_groups(make_model(), OptimConfig()), OptimConfig())
    assert all(group["fused"] for group in optimizer.param_groups)
    assert [group["name"] for group in optimizer.param_groups][:2] == ["aggregator.decay", "aggregator.no_decay"]


# The parts of NVIDIA's apex that matter here, as its repository has them: the optimizers refuse to be made unless the
# extension module amp_C loads, and their zero_grad takes no argument.
NVIDIA_OPTIMIZERS = """
import torch

class _Fused(torch.optim.Optimizer):
    def zero_grad(self):
        super().zero_grad()

class FusedAdam(_Fused):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        import amp_C
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))
        self.adam_w_mode = 1 if adam_w_mode else 0

class FusedLAMB(_Fused):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False):
        import amp_C
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay, grad_averaging=grad_averaging,
                                      max_grad_norm=max_grad_norm))
        self.adam_w_mode = 1 if adam_w_mode else 0
"""
NVIDIA = {
    "apex/__init__.py": "import torch\nfrom . import optimizers\n",
    "apex/optimizers/__init__.py": NVIDIA_OPTIMIZERS,
    "apex-0.1.dist-info/METADATA": (
        "Metadata-Version: 2.4\nName: apex\nVersion: 0.1\nSummary: PyTorch Extensions written by NVIDIA\n"
    ),
}
# What `pip install apex` gives, another project of that name.
PYPI = {
    "apex/__init__.py": "from pyramid_mailer.interfaces import IMailer\nfrom apex.i18n import MessageFactory\n",
    "apex/lib/__init__.py": "",
    "apex/models.py": "",
    "apex-0.9.10.dev0.dist-info/METADATA": (
        "Metadata-Version: 2.4\nName: apex\nVersion: 0.9.10.dev0\n"
        "Summary: Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions\n"
        "Home-page: http://thesoftwarestudio.com/apex/\nRequires-Dist: velruse>=1.0.3\nRequires-Dist: pyramid>1.1.2\n"
    ),
}
# An extension that was built for another PyTorch.
BROKEN = "raise ImportError('amp_C.so: undefined symbol: _ZN3c10')\n"
SOURCE = "git clone https://github.com/NVIDIA/apex"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from, in place of any apex that is installed."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    others = [place for place in sys.path if not (Path(place) / "apex").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    forget()
    yield tmp_path
    forget()


def install(site: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


def groups_on(device: str) -> list[dict[str, Any]]:
    """Without memory of their own, so that there may be no such device."""
    with FakeTensorMode():
        matrix, vector = (nn.Parameter(torch.empty(shape, device=device)) for shape in ((3, 2), (4,)))
    return [
        {"name": "a", "params": [matrix], "lr": 0.1, "weight_decay": 0.3},
        {"name": "b", "params": [vector], "lr": 0.1, "weight_decay": 0.0},
    ]


def make_apex(name: Any, device: str = "cuda") -> Any:
    return make_optimizer(groups_on(device), OptimConfig(optimizer=name, lr=0.1, weight_decay=0.3))


@pytest.mark.parametrize("name", ["apex_adam", "apex_lamb"])
def test_apex_that_is_missing_is_told(site: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--optim.optimizer {name}: apex is not installed; install .*{SOURCE}"):
        make_apex(name)


def test_pypis_apex_is_recognised_and_not_imported(site: Path) -> None:
    install(site, PYPI)
    with pytest.raises(
        ConfigError,
        match=r"the installed package apex 0\.9\.10\.dev0 \(Pyramid toolkit .*\) is not NVIDIA's apex but another, "
        rf"which `pip install apex` gets; remove it with `pip uninstall apex`, and install .*{SOURCE}",
    ):
        make_apex("apex_adam")
    assert "apex" not in sys.modules


def test_folder_called_apex_is_recognised(site: Path) -> None:
    """As the clone of NVIDIA's repository is, to who starts Python beside it."""
    install(site, {f"apex/{name}": text for name, text in NVIDIA.items() if name.startswith("apex/")})
    with pytest.raises(ConfigError, match=rf"what Python finds as apex, in {site / 'apex'}, is not NVIDIA's"):
        make_apex("apex_adam")


@pytest.mark.parametrize(
    ("extension", "reason"), [({}, "No module named 'amp_C'"), ({"amp_C.py": BROKEN}, "undefined symbol: _ZN3c10")]
)
def test_apex_without_its_extensions_is_told(site: Path, extension: dict[str, str], reason: str) -> None:
    install(site, NVIDIA | extension)
    with pytest.raises(
        ConfigError, match=rf"NVIDIA's apex is installed without CUDA extensions that load here \(.*{reason}\); install"
    ):
        make_apex("apex_lamb")


def test_apex_optimizers_take_decoupled_decay_and_do_not_clip(site: Path) -> None:
    install(site, NVIDIA | {"amp_C.py": ""})
    adam, lamb = make_apex("apex_adam"), make_apex("apex_lamb")
    for optimizer, name in ((adam, "FusedAdam"), (lamb, "FusedLAMB")):
        assert type(optimizer).__module__ == "apex.optimizers"
        assert type(optimizer).__name__ == name
        assert optimizer.adam_w_mode == 1
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3), (0.1, 0.0)]
    assert lamb.defaults["max_grad_norm"] == math.inf


def test_apex_on_a_cpu_is_refused(site: Path) -> None:
    install(site, NVIDIA | {"amp_C.py": ""})
    with pytest.raises(ConfigError, match="apex runs on GPUs only, and parameters are on cpu; take adamw"):
        make_apex("apex_adam", "cpu")


def test_apex_on_split_parameters_is_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, NVIDIA | {"amp_C.py": ""})
    monkeypatch.setattr("slidescale.engine.strategies.optim.DTensor", nn.Parameter)  # as if fsdp had made them
    with pytest.raises(ConfigError, match="apex cannot step parameters that fsdp has split; take adamw"):
        make_apex("apex_adam")


@pytest.mark.parametrize(
    ("encoder", "last", "before"),
    [
        ("test_convnext", "stages.3.blocks.1.mlp.fc2.weight", "stages.3.blocks.0.mlp.fc2.weight"),
        ("vit_relpos_small_patch16_224", "blocks.11.mlp.fc2.weight", "blocks.10.mlp.fc2.weight"),
    ],
)
def test_a_normalisation_at_the_end_is_no_step_of_layer_decay(encoder: str, last: str, before: str) -> None:
    """ConvNeXt's `head.norm` and the `fc_norm` of transformers that average their tokens: timm numbers them apart."""
    with torch.device("meta"):
        model = SlideModel(Encoder(encoder, tile_px=32), Unused())
    groups = parameter_groups(model, OptimConfig(lr=1.0, layer_decay=0.5))
    rates = {name: group["lr"] for group in groups for name in names_in(model, group)}
    norm = next(name for name in rates if name.endswith(("head.norm.weight", "fc_norm.weight")))
    assert rates[norm] == rates[f"encoder.backbone.{last}"] == max(rates.values()) == 1.0
    assert rates[f"encoder.backbone.{before}"] == 0.5
