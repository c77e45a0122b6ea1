"""The settings of a run: frozen dataclasses that refuse nonsense and explain themselves on the command line."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.aggregator import PoolingName


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Slides, tiles and bags."""

    manifest: Path | None = None
    """CSV with one row a slide: slide_id, case_id, path, label, split (train, val or test); paths are relative to
    the CSV's folder. Without one the recipe draws its demo cohort and trains on that."""
    slide_column: str = "slide_id"
    """Manifest column with a unique name for each slide."""
    case_column: str = "case_id"
    """Manifest column with the patient; a patient's slides must all be in one split."""
    path_column: str = "path"
    """Manifest column with the slide file."""
    label_column: str = "label"
    """Manifest column with the class."""
    split_column: str = "split"
    """Manifest column with train, val or test."""
    classes: tuple[str, ...] = ()
    """Labels in the order of the logits, negative class first; empty: the sorted labels of the train split."""
    mpp_um: float = 0.5
    """Resolution to read tiles at, in µm a pixel."""
    default_mpp_um: float | None = None
    """Level-0 resolution, in µm a pixel, assumed for slides whose file does not state one."""
    tile_px: int = 224
    """Side of a tile, in pixels at `mpp_um`."""
    k: int | Literal["all"] = "all"
    """Tiles in a training bag: all tissue tiles of the slide, or a random sample of this many, newly drawn each epoch
    (a slide with fewer gives all it has). Validation always uses all."""
    min_tissue: float = 0.5
    """Smallest share of a tile's area that must be tissue, 0 to 1."""
    max_excluded: float = 0.1
    """Largest share of the manifest's slides that may prove unusable before the run stops, 0 to 1."""
    readers: int = 2
    """Threads a rank that read tiles in the background."""
    prefetch: int = 1
    """Training bags a rank reads ahead of the step; each holds its pixels as uint8."""
    demo_slides: int = 64
    """Slides in the demo cohort that is drawn when there is no manifest."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(self.mpp_um > 0, "data.mpp_um", self.mpp_um, "must be a positive number of µm a pixel")
        _require(self.default_mpp_um is None or self.default_mpp_um > 0, "data.default_mpp_um", self.default_mpp_um, "must be a positive number of µm a pixel")  # fmt: skip  # noqa: E501
        _require(self.tile_px >= 16, "data.tile_px", self.tile_px, "must be at least 16 pixels")
        _require(self.k == "all" or self.k >= 1, "data.k", self.k, "must be 'all' or at least 1 tile")
        _require(0 < self.min_tissue <= 1, "data.min_tissue", self.min_tissue, "must be a share above 0, at most 1")
        _require(0 <= self.max_excluded <= 1, "data.max_excluded", self.max_excluded, "must be a share from 0 to 1")
        _require(self.readers >= 1, "data.readers", self.readers, "must be at least 1 thread")
        _require(self.prefetch >= 1, "data.prefetch", self.prefetch, "must be at least 1 bag")
        _require(len(set(self.classes)) == len(self.classes), "data.classes", self.classes, "must be distinct")
        _require(len(self.classes) != 1, "data.classes", self.classes, "must be at least two, or none")
        _require(self.demo_slides >= 8, "data.demo_slides", self.demo_slides, "must be at least 8 slides")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Tile encoder and slide aggregator."""

    encoder: str = "resnet50_gn"
    """A timm model name, or hf-hub:owner/model."""
    pretrained: bool = False
    """Start from the weights timm publishes for the encoder (downloaded from the hub, or in its local cache)."""
    weights: Path | None = None
    """Start from a local state dict of the encoder (.pth or .safetensors) instead."""
    pooling: PoolingName = "gated_attention"
    """How tiles' features become the slide's."""
    slide_norm: bool = False
    """Standardise each feature over the slide's tiles before pooling; lets an encoder learn from random weights, and
    takes away differences of stain between slides, with all else that a slide's tiles have in common."""
    hidden_dim: int = 512
    """Width of the aggregator's two projection layers."""
    attention_dim: int = 384
    """Width of the attention gate (gated_attention only)."""
    dropout: float = 0.25
    """Probability of dropout after each projection layer, 0 to 1."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(self.hidden_dim >= 1, "model.hidden_dim", self.hidden_dim, "must be at least 1")
        _require(self.attention_dim >= 1, "model.attention_dim", self.attention_dim, "must be at least 1")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be a probability from 0, below 1")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a step may hold in memory."""

    chunk: int = 32
    """Tiles that go through the encoder at once; activation memory grows with this, and not with K."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(self.chunk >= 1, "memory.chunk", self.chunk, "must be at least 1 tile")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Objective, optimizer and schedule: AdamW, linear warm-up, cosine decay, unless ds.json names others."""

    lr: float = 1e-4
    """Peak learning rate of the aggregator."""
    encoder_lr_scale: float = 1.0
    """Peak learning rate of the encoder, as a share of `lr`."""
    weight_decay: float = 0.04
    """Decoupled weight decay of matrices; biases and normalisation layers get none."""
    warmup_epochs: float = 1.0
    """Length of the linear warm-up, in epochs."""
    min_lr_ratio: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm a step is taken with; 0 never clips."""
    class_weights: tuple[float, ...] = ()
    """Factor on the loss of each class, in the order of data.classes; empty: 1 for all."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        _require(self.encoder_lr_scale > 0, "optim.encoder_lr_scale", self.encoder_lr_scale, "must be positive")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must not be negative")
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "must not be negative")
        _require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "must be a share from 0 to 1")
        _require(self.clip >= 0, "optim.clip", self.clip, "must be 0 or a norm")
        _require(all(w > 0 for w in self.class_weights), "optim.class_weights", self.class_weights, "must be positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and precision of the run."""

    name: str
    """Folder of the run under `out`; when it is taken by an earlier run, a number is added."""
    out: Path = Path("runs")
    """Folder of all runs, of the tile grids computed once a slide, and of the demo cohort."""
    epochs: int = 20
    """Passes over the training slides."""
    seed: int = 0
    """Of everything random; the same seed gives the same bags on any number of ranks."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of matrix products; weights and optimizer stay fp32. auto: as ds.json says, else bf16 where the
    processor or GPU has it."""
    heatmaps: int = 4
    """Validation slides whose tile attention is drawn each time validation improves."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(bool(self.name) and "/" not in self.name, "run.name", self.name, "must be a folder name")
        _require(self.epochs >= 1, "run.epochs", self.epochs, "must be at least 1")
        _require(self.seed >= 0, "run.seed", self.seed, "must not be negative")
        _require(self.heatmaps >= 0, "run.heatmaps", self.heatmaps, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    run: RunConfig
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    resume: bool = False
    """Continue the latest run of this name from its last checkpoint."""
    deepspeed_config: Path | None = None
    """DeepSpeed's settings (ds.json). Without it one process trains with plain PyTorch."""
    local_rank: int = -1
    """Given by the launcher; not for you to set."""

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {value!r}: {rule}")
