"""The model of weak scaling: its arithmetic by hand, its bytes against the engine's, and that a wrong one is found."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slidescale.engine.errors import ConfigError

from support.cells import BENCHMARKS, run_in_kept_worlds
from support.worlds import PATIENCE_S, World


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def model() -> ModuleType:
    from scaling import model as scaling_model

    return scaling_model


@pytest.fixture
def networks() -> ModuleType:
    from scaling import networks

    return networks


@pytest.fixture
def command() -> ModuleType:
    import weak_scaling

    return weak_scaling


def job_and_costs(model: ModuleType, networks: ModuleType, **settings: Any) -> tuple[Any, Any]:
    shape = model.Shape(dim=768, pooled=512, encoder=10_000_000, aggregator=1_000_000, units=4, modules=40)
    job = model.Job(
        **{"shape": shape, "strategy": "fsdp", "policy": "recompute", "tiles": 100, "chunk": 30, "tile_ranks": 1024}
        | settings
    )
    costs = model.Costs(
        forward_s=0.01,
        both_s=0.03,
        aggregate_s=0.005,
        update_s=lambda strategy, ranks: 0.02,
        read_s=0.001,
        cores=4,
        readers=2,
        computing=0,
        hides=(),
        network=networks.NETWORKS["dgx-h100"],
    )
    return job, costs


def test_collectives_by_hand(networks: ModuleType) -> None:
    inside, across = networks.Link(1e-3, 1e6), networks.Link(1e-2, 1e5)
    network = networks.Network("by hand", 4, inside, across)
    # In a ring of 4: three hops, and three quarters of 2 MB; an all-reduce goes round twice.
    assert network.seconds("all-gather", 4, 2e6) == pytest.approx(3e-3 + 1.5)
    assert network.seconds("reduce-scatter", 4, 2e6) == pytest.approx(3e-3 + 1.5)
    assert network.seconds("all-reduce", 4, 2e6) == pytest.approx(2 * (3e-3 + 1.5))
    # Little is doubled: two hops of 4 B.
    assert network.seconds("all-reduce", 4, 4) == pytest.approx(2 * (1e-3 + 4e-6))
    # Two nodes: in the ring inside the whole, across a quarter of it, of which half is sent.
    assert network.seconds("all-gather", 8, 2e6) == pytest.approx(3e-3 + 1.5 + 1e-2 + 0.5 * 0.5e6 / 1e5)
    # Eight nodes: in a ring seven hops, and 7/8 of a quarter; in trees, for an all-reduce, three hops and a quarter.
    assert network.seconds("all-gather", 32, 4e3) == pytest.approx(3e-3 + 3e-3 + 7e-2 + 7 / 8 * 1e3 / 1e5)
    assert network.seconds("all-reduce", 32, 4e4) == pytest.approx(2 * (3e-3 + 3e-2) + 2 * (3e-2 + 1e4 / 1e5))
    assert network.seconds("all-reduce", 1, 2e6) == 0
    # With room for all in one node, nodes make no difference; with one rank a node, all goes across.
    flat = networks.Network("one node", 64, inside, across)
    assert flat.seconds("all-reduce", 4, 2e6) == network.seconds("all-reduce", 4, 2e6)
    apart = networks.Network("one rank a node", 1, inside, across)
    assert apart.seconds("all-gather", 4, 2e6) == pytest.approx(3e-2 + 0.75 * 2e6 / 1e5)
    with pytest.raises(ValueError, match="6 ranks do not fill nodes of 4"):
        network.seconds("all-gather", 6, 1.0)


def test_what_a_fit_measured_is_what_the_network_says(networks: ModuleType) -> None:
    from scaling.calibration import _fit

    for n in (2, 3, 4):
        link = networks.Link(*_fit(n, [0.002, 0.05], [1e3, 1e7], messages=n - 1, passes=1))
        network = networks.Network("measured", n, networks.Link(0, 1), networks.Link(0, 1), 0, {"all-gather": link})
        for seconds, size in ((0.002, 1e3), (0.05, 1e7)):
            assert network.seconds("all-gather", n, size) == pytest.approx(seconds)


def test_the_merge_does_not_depend_on_k(model: ModuleType, networks: ModuleType) -> None:
    terms = []
    for tiles in (10, 100_000):
        job, costs = job_and_costs(model, networks, tiles=tiles)
        merged = [each for each in model.messages(job, 64) if each.term == "merge" and each.operation == "all-reduce"]
        assert sum(each.calls * each.size for each in merged) == model.merge_bytes(512) == 4116
        terms.append(model.step_terms(job, costs, 64)["merge"])
    assert terms[0] == terms[1] > 0
    assert model.hub_bytes(100, 768) == 4 * 100 * 768
    assert job.k(64) == 64 * 100_000
    # Beyond the ranks that share a slide, slides are side by side.
    assert replace(job, tile_ranks=8).k(64) == 8 * 100_000


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_scaling_is_at_most_linear(model: ModuleType, networks: ModuleType, strategy: str) -> None:
    job, costs = job_and_costs(model, networks, strategy=strategy)
    assert model.efficiency(job, costs, 1) == 1
    assert list(model.messages(job, 1)) == []
    before = model.step_terms(job, costs, 1)
    # 100 tiles forward, and forward and backward with the forward again before it.
    assert before["pass 1"] == pytest.approx(1.0)
    assert before["pass 2"] == pytest.approx(3.0)
    assert model.step_terms(replace(job, policy="keep"), costs, 1)["pass 2"] == pytest.approx(2.0)
    for ranks in (2, 8, 64, 1024):
        terms = model.step_terms(job, costs, ranks)
        assert terms["reading"] == 0  # hidden behind the step
        for term in model.TERMS:
            assert terms[term] >= before[term], term
        assert 0 < model.efficiency(job, costs, ranks) < 1
        before = terms


def test_gathers_by_chunk_and_pass(model: ModuleType, networks: ModuleType) -> None:
    def gathered(**settings: Any) -> float:
        job, _ = job_and_costs(model, networks, **settings)
        return sum(each.calls * each.size for each in model.messages(job, 8) if each.term == "gathers")

    encoder, aggregator = 4e7, 4e6
    for strategy in ("zero3", "fsdp"):
        assert gathered(strategy=strategy) == pytest.approx(3 * 4 * encoder + 2 * aggregator)
        assert gathered(strategy=strategy, policy="keep") == pytest.approx(2 * 4 * encoder + 2 * aggregator)
    assert gathered(strategy="ddp") == gathered(strategy="zero2") == 0


def test_gathers_hide_behind_computing(model: ModuleType, networks: ModuleType) -> None:
    job, costs = job_and_costs(model, networks)
    shown = model.step_terms(job, costs, 64)["gathers"]
    hidden = model.step_terms(job, replace(costs, hides=("fsdp",)), 64)["gathers"]
    a_unit = costs.network.seconds("all-gather", 64, 1e7)
    assert hidden == pytest.approx(a_unit)
    assert 0 < hidden < shown


def test_reading_takes_what_cores_it_shares(model: ModuleType, networks: ModuleType) -> None:
    _, costs = job_and_costs(model, networks)
    # One core for one thread that computes and two that read: all of it is added.
    assert model.reading_seconds(3.0, 100.0, replace(costs, cores=1, computing=1)) == pytest.approx(3.0)
    # Two cores for the three: they read for 9/4 s, in which a third of the computing is lost.
    assert model.reading_seconds(3.0, 100.0, replace(costs, cores=2, computing=1)) == pytest.approx(0.75)
    # A GPU computes meanwhile, and waits only where readers need longer.
    assert model.reading_seconds(3.0, 100.0, costs) == 0
    assert model.reading_seconds(30.0, 10.0, costs) == pytest.approx(15.0 - 10.0)


def small_cell(**settings: Any) -> Any:
    from cells.ways import Cell

    cell = Cell(
        policy="recompute",
        strategy="fsdp",
        ranks=2,
        k=12,
        encoder="test_resnet",
        tile=32,
        chunk=2,
        dtype="float32",
        device="cpu",
        steps=1,
    )
    return replace(cell, **settings)


def test_the_calibration_starts_as_a_module(tmp_path: Path) -> None:
    """In a process of its own, as a single rank."""
    found = calibrated(tmp_path, small_cell(strategy="single", ranks=1))
    assert set(found["update_s"]) == {"single"} and found["links"] == {}
    assert min(found["forward_s"], found["aggregate_s"], found["update_s"]["single"], found["read_s"]["32"]) > 0


def test_the_calibration_measures_links(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from scaling import calibration

    run_in_kept_worlds(monkeypatch, world, calibration)
    found = calibrated(tmp_path, small_cell())
    assert set(found["update_s"]) == {"ddp", "fsdp"}
    assert set(found["links"]) == {"all-reduce", "all-gather", "reduce-scatter"}
    for latency, bandwidth in found["links"].values():
        assert latency >= 0 and bandwidth > 0


def calibrated(folder: Path, cell: Any) -> dict[str, Any]:
    from cells.drawn_slide import write_slide
    from cells.harness import Limits
    from scaling.calibration import calibrate

    write_slide(folder / "slide.tiff", cell.k, cell.tile)
    limits = Limits(PATIENCE_S, 2**34)
    return calibrate(cell, slides={cell.tile: folder / "slide.tiff"}, limits=limits, log=folder / "log")


def test_bytes_are_those_of_the_engine(
    model: ModuleType, world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Counted on 2 ranks with 3 chunks each."""
    from cells import cell as cells
    from cells.drawn_slide import write_slide
    from cells.harness import Limits
    from scaling.checking import job_of, shape_for

    run_in_kept_worlds(monkeypatch, world, cells)
    write_slide(tmp_path / "slide.tiff", 12, 32)
    cell = small_cell(counted=(12,))
    limits = Limits(PATIENCE_S, 2**34)
    ended, row = cells.measure(cell, slide=tmp_path / "slide.tiff", limits=limits, log=tmp_path / "log")
    assert ended.status == "ok", ended.message
    shape = shape_for(cell)
    job = job_of(cell, shape, tile_ranks=2)
    assert job.chunks == row["chunks"] == 3
    counted: dict[str, float] = {}
    for phase, calls in row["communication"]["12"].items():
        for each in calls:
            if phase not in ("reading", "optimizer"):
                counted[each["operation"]] = counted.get(each["operation"], 0.0) + each["payload"]
    predicted: dict[str, float] = {}
    for each in model.messages(job, 2):
        if each.term != "update" and each.size != 16:  # the small ones, which are of reading
            predicted[each.operation] = predicted.get(each.operation, 0.0) + each.calls * each.size
    assert counted["all-reduce"] == predicted["all-reduce"] == model.merge_bytes(shape.pooled)
    # Shards are padded to equal sizes; and one unit's gather more or less goes with which was the last.
    assert counted["reduce-scatter"] == pytest.approx(predicted["reduce-scatter"], rel=0.01)
    assert abs(counted["all-gather"] - predicted["all-gather"]) < 1.02 * max(shape.encoder, shape.aggregator) * 4
    assert predicted["all-gather"] > 8 * shape.encoder * 4


def test_unknown_names_are_refused(
    command: ModuleType, networks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"--network is 'dgx-1': must be one of dgx-a100, dgx-h100"):
        networks.find_network("dgx-1")
    assert networks.find_network("DGX-H100").name == "dgx-h100"
    for words, message in (
        (["--device-name", "H1000"], "--device-name is 'H1000': must be one of"),
        (["--network", "token-ring"], "--network is 'token-ring': must be one of"),
        (["--gpus", "12"], "12 GPUs do not fill nodes of 8"),
        (["--shown", "zero1"], "--shown zero1: must be one of --strategy"),
        (["--ranks", "1"], "2 or more"),
    ):
        monkeypatch.setattr(sys, "argv", ["weak_scaling.py", *words])
        with pytest.raises(SystemExit) as ended:
            command.parse()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


PARTS = {
    "forward_s": 0.01,
    "both_s": 0.03,
    "aggregate_s": 0.01,
    "read_s": {"32": 0.001},
    "links": {"all-reduce": [1e-3, 1e9], "all-gather": [1e-3, 1e9], "reduce-scatter": [1e-3, 1e9]},
}


@pytest.mark.parametrize("error", [1.05, 1.3, math.nan])
def test_a_prediction_that_is_off_is_found(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, error: float
) -> None:
    """A machine that takes as long as its parts say, within 15% or not."""
    from cells.harness import Ended
    from scaling import checking

    calls = {"parts": 0, "steps": 0}

    def calibrate(cell: Any, **_: Any) -> dict[str, Any]:
        calls["parts"] += 1
        alone = cell.ranks == 1
        return PARTS | {
            "update_s": {"single": 0.01} if alone else {"ddp": 0.01},
            "links": {} if alone else PARTS["links"],
        }

    def measure(cell: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        calls["steps"] += 1
        return Ended("ok", ""), {"step_s": error * predicted[cell.ranks]}

    words = (
        "--encoder test_resnet --tile 32 --tiles-a-rank 8 --device cpu --dtype float32 --check-policy recompute "
        "--check-strategy ddp --project-encoder test_resnet --project-tile 32 --project-tiles 16 --gpus 1 8 64 "
        "--strategy ddp fsdp --out"
    )
    page = ["--page", str(tmp_path / "docs" / "page.md")]
    monkeypatch.setattr(sys, "argv", ["weak_scaling.py", *words.split(), str(tmp_path), *page])
    monkeypatch.setattr(checking, "calibrate", calibrate)
    monkeypatch.setattr(checking, "measure", measure)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # 8 tiles: forward, and forward and backward; the aggregator; the update; what is read and said is little.
    predicted = {1: 8 * 0.04 + 0.02, 2: 8 * 0.04 + 0.02 + 0.008 + 0.01}
    status = command.main()
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "weak_scaling.jsonl").read_text(encoding="utf-8").splitlines()]
    checks = [row for row in rows if row["kind"] == "check"]
    assert [row["ranks"] for row in checks] == [1, 2]
    if error == 1.05:
        assert status == 0, printed.err
        assert calls == {"parts": 2, "steps": 2}, "measured once"
        assert [row["gpus"] for row in rows if row["kind"] == "projection"] == [1, 8, 64] * 2
        page = (tmp_path / "docs" / "page.md").read_text(encoding="utf-8")
        assert "weak_scaling.png" in page
        assert "**Measured**" in page and "**Modelled**" in page
        assert (tmp_path / "docs" / "weak_scaling.png").stat().st_size > 10_000
    else:
        assert status == 1
        assert calls == {"parts": 6, "steps": 6}, "three times before it is called wrong"
        assert "PREDICTION IS OFF: recompute, single: predicted" in printed.err
        assert "recompute, ddp × 2: predicted" in printed.err
