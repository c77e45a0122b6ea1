"""A K study: the same training on more and more of each slide, over several seeds, beside a frozen encoder.

It asks of your own slides what Campanella et al. 2024 ("Beyond Multiple Instance Learning") report of theirs: does the
training loss fall with the number of tiles K, does validation improve, and does training end to end beat an aggregator
alone? All runs have the same splits, epochs and settings. Their last epochs are compared, so that no epoch is chosen by
the very slides that are then reported.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from slidescale.engine.commands.command_line import demo_defaults, parse
from slidescale.engine.commands.ending import command
from slidescale.engine.commands.recipe import is_study
from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError
from slidescale.engine.logger import configure_logging
from slidescale.engine.process.launcher import is_main_rank


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What varies between the runs of a study; everything else is the same."""

    k: tuple[int | Literal["all"], ...] = (4, 16, 64, "all")
    """Tiles per training bag. Each number is an arm of the study. Validation always uses all tiles."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Values of --run.seed. Each arm is run with each of them, on the same splits."""
    frozen_encoder: str | None = "same"
    """Encoder of the arm in which only the aggregator trains, on all tiles. same: the encoder of the other arms, with
    the weights that they start from; a name, as in --model.encoder: that encoder; None: no such arm."""
    frozen_weights: Path | None = None
    """State dict of the encoder that --frozen-encoder names. None: its published weights."""
    page: Path | None = None
    """Markdown page to write, with the picture beside it."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    """Settings of every run. The runs lie in a folder that --run.name names."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if not self.k or any(k != "all" and k < 1 for k in self.k):
            raise ConfigError(f"--k is {self.k}: must be 'all' or at least 1 tile, once or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds is {self.seeds}: must be one seed or more, none negative, none twice")
        if self.frozen_encoder in ("same", None) and self.frozen_weights is not None:
            raise ConfigError(f"--frozen-weights is {self.frozen_weights}: must go with a named --frozen-encoder")
        model = self.config.model
        if self.frozen_encoder == "same" and not (model.pretrained or model.weights):
            raise ConfigError(
                f"--frozen-encoder is 'same', and {model.encoder} has random weights, of which nothing can be expected "
                "frozen: add --model.pretrained or --model.weights, or name an encoder, or give None"
            )


def main(
    description: str,
    *,
    default: StudyConfig,
    demo: StudyConfig,
    about_demo: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a study from the command line.

    Args:
        description: the study in words, for --help.
        default: the study's settings when a manifest is given.
        demo: its settings without one, for the demo cohort.
        about_demo: a paragraph for the page of a study of the demo cohort.
        argv: the command line; None takes the process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    configure_logging(is_main_rank())
    with command():
        base = default if is_study(argv) else demo
        description += demo_defaults(_flat(base), _flat(demo))
        study = parse(StudyConfig, argv, default=base, description=description)
        # It imports PyTorch, which --help does not need.
        from slidescale.engine.commands.study_results import conduct

        conduct(study, argv, about_demo if study.config.data.manifest is None else "")


def _flat(study: StudyConfig) -> dict[str, Any]:
    """All settings by dotted name."""
    own = {each.name: getattr(study, each.name) for each in fields(study) if each.name != "config"}
    return own | study.config.flat()
