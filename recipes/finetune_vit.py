"""Gentle fine-tuning of a pretrained vision transformer on slide labels, which keeps what it has learnt before.

    deepspeed recipes/finetune_vit.py --deepspeed_config ds.json --data.manifest slides.csv --model.encoder uni

The encoder is frozen for two epochs, in which the random aggregator learns. Then it warms up, each block at 0.7 times
the learning rate of the next (layer-wise decay: Bao et al. 2022, arXiv:2106.08254), with stochastic depth.
--model.lora-rank 8 trains low-rank adapters instead of the weights. --model.encoder takes any timm transformer
(ViT-B/16 with ImageNet weights unless you say otherwise), or uni, uni2, virchow, virchow2, h_optimus_0, h_optimus_1 and
gigapath, which the hub hands out after you have accepted their licence. With a file: --model.no-pretrained
--model.weights FILE. Without a manifest it trains a very small transformer from random weights on a demo cohort that it
draws.
"""

from slidescale.engine.commands.recipe import main
from slidescale.engine.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimConfig, RunConfig

STUDY = Config(
    run=RunConfig(name="finetune-vit"),
    data=DataConfig(augment_symmetry=True, stain_jitter=0.05),
    model=ModelConfig(encoder="vit_base_patch16_224", pretrained=True, drop_path=0.1),
    optim=OptimConfig(
        lr=1e-4, encoder_lr_scale=0.2, layer_decay=0.7, encoder_frozen_epochs=2, warmup_epochs=2, weight_decay=0.05
    ),
)

DEMO = Config(
    run=RunConfig(name="finetune-vit-demo", epochs=8),
    data=DataConfig(tile_px=64, k=256, classes=("negative", "positive"), augment_symmetry=True),
    model=ModelConfig(
        encoder="test_vit", slide_norm=True, drop_path=0.1, hidden_dim=128, attention_dim=64, dropout=0.0
    ),
    memory=MemoryConfig(chunk=64),
    optim=OptimConfig(lr=1e-3, layer_decay=0.7, encoder_frozen_epochs=0.5),
)

if __name__ == "__main__":
    main(__doc__, default=STUDY, demo=DEMO)
