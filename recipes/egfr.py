"""EGFR mutation from H&E slides of lung adenocarcinoma: tile encoder and gated attention, trained end to end.

The task and the model's arrangement are those of Campanella et al. 2024, "Beyond Multiple Instance Learning: Full
Resolution All-In-Memory End-To-End Pathology Slide Modeling"; encoder, rates and lengths are this recipe's own.

    deepspeed recipes/egfr.py --deepspeed_config ds.json --data.manifest slides.csv
"""

from slidescale.engine.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimConfig, RunConfig
from slidescale.engine.main import main

STUDY = Config(
    run=RunConfig(name="egfr"),
    data=DataConfig(),
    model=ModelConfig(encoder="resnet50_gn"),
    optim=OptimConfig(lr=1e-4),
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
    main(__doc__, default=STUDY, demo=DEMO)
