"""EGFR mutation from H&E slides of lung adenocarcinoma: tile encoder and gated attention, trained end to end.

    deepspeed recipes/egfr.py --deepspeed_config ds.json --data.manifest slides.csv --data.classes wild_type mutant

The task and the architecture are those of Campanella et al. 2024, "Beyond Multiple Instance Learning: Full Resolution
All-In-Memory End-To-End Pathology Slide Modeling"; encoder, learning rates and lengths are this recipe's own. The
encoder begins with ImageNet weights unless you say otherwise (--model.no-pretrained, --model.weights FILE). Without a
manifest it trains a small network from random weights on a demo cohort that it draws.

--preset eagle has the settings of the released trainer of the EGFR study that followed (EAGLE): GigaPath as the
encoder, for whose weights you accept their licence on the hub (or give a file: --model.no-pretrained --model.weights
FILE), 2,208 tiles per slide, half of the slides per epoch. Its dropout of 0.25 in each factor of the attention gate
equals a dropout of 0.4375 on their product. Its class weight of 0.7 is left out: its loss is a weighted mean over a
batch of one slide, in which the weight cancels. Differences: bf16 instead of fp16; tiles sampled without replacement,
so that a slide with fewer gives each once; no Gaussian blur among the augmentations; PyTorch's initial weights of the
aggregator; validation after each epoch; gradients clipped at a norm of 1.
"""

from slidescale.engine.commands.recipe import main
from slidescale.engine.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimConfig, RunConfig

STUDY = Config(
    run=RunConfig(name="egfr"),
    data=DataConfig(),
    model=ModelConfig(encoder="resnet50_gn", pretrained=True),
    optim=OptimConfig(lr=1e-4),
)

EAGLE = Config(
    run=RunConfig(name="egfr-eagle", epochs=20),
    data=DataConfig(classes=("wild_type", "mutant"), tile_px=224, k=2208, epoch_share=0.5, augment_symmetry=True),
    model=ModelConfig(
        encoder="gigapath", pretrained=True, hidden_dim=512, attention_dim=384, dropout=0.25, attention_dropout=0.4375
    ),
    optim=OptimConfig(lr=1e-6, min_lr_ratio=0.01, warmup_epochs=2, weight_decay=0.04, weight_decay_end=0.4),
)

# Small enough for a laptop, with no data and no weights at hand.
DEMO = Config(
    run=RunConfig(name="egfr-demo", epochs=12),
    data=DataConfig(tile_px=64, k=256, classes=("wild_type", "mutant")),
    model=ModelConfig(encoder="test_resnet", slide_norm=True, hidden_dim=128, attention_dim=64, dropout=0.0),
    memory=MemoryConfig(chunk=64),
    optim=OptimConfig(lr=1e-3, encoder_lr_scale=0.3),
)

if __name__ == "__main__":
    main(__doc__, default=STUDY, demo=DEMO, presets={"eagle": EAGLE})
