"""Detection of breast cancer as in CAMELYON: whether there is tumor anywhere on a slide of a lymph node.

    deepspeed recipes/breast.py --deepspeed_config ds.json --data.manifest slides.csv

Labels are normal and tumor; --data.label-map negative normal itc tumor micro tumor macro tumor renames those of
CAMELYON17. A metastasis may cover a few of ten thousand tiles. So all tiles of a slide are used, pooled by two
attention branches: a sample would often miss the metastasis, and teach the encoder that tumor is normal. The encoder
begins with ImageNet weights unless you say otherwise (--model.no-pretrained, --model.weights FILE). Without a manifest
it trains a small network from random weights on a demo cohort that it draws, in which tiles with foci are rare, too.
"""

from slidescale.engine.commands.recipe import main
from slidescale.engine.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimConfig, RunConfig

CLASSES = ("normal", "tumor")

STUDY = Config(
    run=RunConfig(name="breast", epochs=30),
    data=DataConfig(classes=CLASSES, k="all", augment_symmetry=True, stain_jitter=0.05),
    model=ModelConfig(encoder="resnet50_gn", pretrained=True, attention_branches=2, attention_dropout=0.25),
    optim=OptimConfig(lr=1e-4),
)

DEMO = Config(
    run=RunConfig(name="breast-demo", epochs=8),
    data=DataConfig(classes=CLASSES, tile_px=64, k="all"),
    model=ModelConfig(
        encoder="test_resnet", slide_norm=True, attention_branches=2, hidden_dim=128, attention_dim=64, dropout=0.0
    ),
    memory=MemoryConfig(chunk=64),
    optim=OptimConfig(lr=1e-3, encoder_lr_scale=0.3),
)

if __name__ == "__main__":
    main(__doc__, default=STUDY, demo=DEMO)
