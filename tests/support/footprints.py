"""Small models and their footprints."""

from functools import cache

import torch

from slidescale.engine.memory.footprint import Footprint, measure
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel


def make(name: str, tile_px: int, *, bf16: bool, checkpoint_blocks: bool = False) -> SlideModel:
    encoder = Encoder(name, tile_px=tile_px)
    encoder.set_checkpointing(checkpoint_blocks)
    aggregator = Aggregator(encoder.dim, 2, pooling="gated_attention", hidden_dim=512, attention_dim=384, dropout=0.25)
    return SlideModel(encoder, aggregator, autocast=torch.bfloat16 if bf16 else None).train()


@cache
def footprint(name: str, tile_px: int, *, bf16: bool, chunk: int, bag: int) -> Footprint:
    chunks = sorted({1, -(-chunk // 4), chunk})
    return measure(make(name, tile_px, bf16=bf16), blank(tile_px), chunks=chunks, bags=sorted({1, bag}))


def blank(tile_px: int) -> torch.Tensor:
    return torch.zeros((tile_px, tile_px, 3), dtype=torch.uint8)
