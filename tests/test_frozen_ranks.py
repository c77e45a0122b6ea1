"""A frozen encoder on several ranks: each encodes its share, and they train as one process does."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slidescale.engine.commands import recipe as main
from slidescale.engine.config import Config, ParallelConfig
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.features import FeatureStore
from slidescale.engine.data.manifest import ManifestRow, read_manifest
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.data.tiling import TileSpec, Tiling
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.training import frozen
from slidescale.engine.training.frozen import deal, encode_cohort, encode_slide

from support.frozen import kept, losses, make_frozen_config, write_weights
from support.slides import damage
from support.tables import read_csv
from support.worlds import PATIENCE_S, World

SPEC = TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
def test_slides_are_dealt_out_by_size(ranks: int) -> None:
    sizes = np.random.default_rng(0).lognormal(8, 1, 30).astype(int).tolist()
    tiles = {f"s{index}": size for index, size in enumerate(sizes)} | {"a": 5, "b": 5}
    shares = deal(tiles, ranks)
    assert len(shares) == ranks
    assert sorted(slide_id for share in shares for slide_id in share) == sorted(tiles), "each slide once"
    loads = [sum(tiles[slide_id] for slide_id in share) for share in shares]
    assert max(loads) <= max(4 / 3 * sum(sizes) / ranks, max(sizes))
    for share in shares:
        assert share == sorted(share, key=lambda slide_id: -tiles[slide_id])
    assert deal(dict(reversed(tiles.items())), ranks) == shares, "also where slides of one size come in another order"
    assert deal({}, ranks) == [[]] * ranks


def encode_beside_a_slow_rank(group: TileGroup, config: Config) -> tuple[list[int], list[list[str]], float]:
    """Tiles of the slides that this rank encodes; the second rank's first slide takes until the first rank has ended.

    Also what was dealt, and how long ranks wait for each other at the end, in seconds.
    """
    slides: list[int] = []
    shares: list[list[str]] = []
    limits: list[float] = []
    has_ended = config.run.out / "the first rank has ended"

    def deal_and_note(*args: Any) -> list[list[str]]:
        shares.extend(deal(*args))
        return shares

    def encode(model: SlideModel, row: ManifestRow, tiling: Tiling, *args: Any, **settings: Any) -> Iterator[Tensor]:
        slides.append(len(tiling.coords))
        deadline = time.monotonic() + PATIENCE_S / 2
        while group.rank == 1 and not has_ended.exists():
            assert time.monotonic() < deadline, "the first rank waits for the second"
            time.sleep(0.05)
        yield from encode_slide(model, row, tiling, *args, **settings)
        if len(slides) == len(shares[0]):
            has_ended.touch()

    def gather(group: RankGroup, item: Any) -> Any:
        if group.process_group is not None:
            backend = group.process_group._get_backend(torch.device("cpu"))
            limits.append(backend.options._timeout.total_seconds())
        return gather_objects(group, item)

    manifest = read_manifest(config.data.manifest, config.data)
    cohort = Cohort(manifest, group, max_excluded=0, excluded_csv=config.run.out / "excluded.csv")
    cohort.tile(SPEC, config.run.out / "tilings", threads=1)
    model = make_model(config, classes=2, bf16=False, kernels="torch")
    named = {"encoder": "e", "fingerprint": "1", "precision": "fp32", "dim": model.encoder.dim}
    store = FeatureStore(config.run.out / "features", SPEC, **named)
    reader = TileReader(SPEC, threads=1, pin=False)
    gather_objects = RankGroup.gather_objects
    with (
        mock.patch.object(frozen, "deal", deal_and_note),
        mock.patch.object(frozen, "encode_slide", encode),
        mock.patch.object(RankGroup, "gather_objects", gather),
    ):
        encode_cohort(model, cohort, store, reader, Mesh(group, group), chunk=64, device=torch.device("cpu"))
    reader.close()
    (limit,) = limits
    return slides, shares, limit


def test_ranks_encode_their_shares_and_wait_once_without_a_limit(
    demo_manifest: Path, tmp_path: Path, weights: Path, world: Callable[..., World]
) -> None:
    config = make_frozen_config(demo_manifest, tmp_path, weights)
    (fast, shares, limit), (slow, others, _) = world(2).run(encode_beside_a_slow_rank, config)
    assert shares == others, "every rank deals alike"
    tiles = {name: len(load_file(file)["coords"]) for name, file in kept(tmp_path).items()}
    assert sorted(shares[0] + shares[1]) == sorted(tiles), "each slide once"
    assert [fast, slow] == [[tiles[slide_id] for slide_id in share] for share in shares]
    assert abs(sum(fast) - sum(slow)) <= max(tiles.values())
    assert limit > 30 * 86_400


def train(_: TileGroup, config: Config) -> None:
    main.run(config)


def test_two_ranks_train_as_one_does(
    cohort_copy: Path, tmp_path: Path, weights: Path, world: Callable[..., World]
) -> None:
    """DeepSpeed, FSDP2 and one process: each computes its features anew; a slide is damaged."""
    damage(cohort_copy.parent / "slides" / "slide-000.svs")
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    found = {}
    for name in ("one", "zero", "fsdp"):
        config = make_frozen_config(cohort_copy, tmp_path / name, weights)
        model, optim = replace(config.model, dropout=0.1), replace(config.optim, lr=0.05)
        config = replace(config, data=replace(config.data, k=11), model=model, optim=optim)
        if name == "one":
            main.run(config)
        elif name == "zero":
            world(2).run(train, replace(config, deepspeed_config=ds))
        else:
            world(2).run(train, replace(config, parallel=ParallelConfig(strategy="fsdp")))
        found[name] = losses(tmp_path / name / "t")
        assert [row["slide_id"] for row in read_csv(tmp_path / name / "t" / "excluded.csv")] == ["slide-000"]
        for slide, file in kept(tmp_path / name).items():
            ours, theirs = load_file(file)["features"], load_file(kept(tmp_path / "one")[slide])["features"]
            assert torch.equal(ours, theirs)
    assert len(found["one"]) > 3
    assert max(found["one"]) / min(found["one"]) > 1.02, "the losses are not all one"
    assert found["zero"] == pytest.approx(found["one"], rel=1e-4)
    assert found["fsdp"] == pytest.approx(found["one"], rel=1e-4)
