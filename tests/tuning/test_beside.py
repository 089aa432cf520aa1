"""Baselines that are measured in processes beside trials: real Ray, toy worlds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llgbm.evaluation import baselines
from llgbm.evaluation.baselines import GROUPS, keep_measured, known_baselines, unknown_groups
from llgbm.world import World
from tuning.sweep.beside import Beside, is_beside, pieces_to_measure
from tuning.sweep.cluster import Node, Resources, start_ray

FULL = Resources(1, 0, 2, (Node(2, 0),))
NUMBERS = {"base": {"accuracy": 0.25}}


@pytest.fixture
def own(world: World) -> World:
    """The toy world, taken for a world of full size."""
    return replace(world, config=replace(world.config, smoke=False))


@pytest.fixture
def local_ray() -> Iterator[None]:
    import ray

    start_ray(FULL)
    yield
    ray.shutdown()


def fill(cache: Path, world: World, part: str) -> None:
    for group in GROUPS:
        keep_measured(cache, world.data, part, group, NUMBERS)


def test_numbers_measured_elsewhere_are_those_that_are_known(own: World, tmp_path: Path) -> None:
    assert unknown_groups(tmp_path, own.data, "test") == list(GROUPS)
    keep_measured(tmp_path, own.data, "test", "", NUMBERS)
    assert unknown_groups(tmp_path, own.data, "test") == list(GROUPS)[1:]
    assert unknown_groups(tmp_path, own.data, "val") == list(GROUPS)
    fill(tmp_path, own, "test")
    assert known_baselines(tmp_path, own.data, own.lora_model) == NUMBERS
    keep_measured(tmp_path, own.data, "test", "", {"base": {"accuracy": 0.5}})
    assert known_baselines(tmp_path, own.data, own.lora_model) == NUMBERS


def test_only_what_no_cache_holds_is_measured_beside(own: World, tmp_path: Path) -> None:
    every = [(part, group) for part in ("test", "val") for group in GROUPS]
    assert pieces_to_measure(own, tmp_path) == every
    assert is_beside({"w": own}, tmp_path, FULL)
    assert not is_beside({"w": own}, tmp_path, replace(FULL, concurrent=1))  # memory for one
    fill(tmp_path, own, "test")
    assert pieces_to_measure(own, tmp_path) == every[len(GROUPS) :]
    fill(tmp_path, own, "val")
    assert pieces_to_measure(own, tmp_path) == []
    assert not is_beside({"w": own}, tmp_path, FULL)


def test_worlds_that_rays_store_holds_once_only_are_measured_before(
    own: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuning.sweep.beside.OBJECT_STORE_BYTES", 2 * own.n_bytes)
    assert is_beside({"w": own}, tmp_path, FULL)
    monkeypatch.setattr("tuning.sweep.beside.OBJECT_STORE_BYTES", 2 * own.n_bytes - 2)
    assert not is_beside({"w": own}, tmp_path, FULL)


def test_a_toy_worlds_baselines_are_measured_before_its_trials(
    world: World, tmp_path: Path
) -> None:
    assert world.config.smoke and not is_beside({"w": world}, tmp_path, FULL)


@pytest.mark.whole
@pytest.mark.usefixtures("local_ray")
def test_a_process_beside_the_trials_measures_what_the_driver_would(
    own: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    parts = ("test", "val")
    wanted = [known_baselines(alone, own.data, own.lora_model, part) for part in parts]
    beside = Beside({"w": own}, shared, FULL)
    beside.keep()
    monkeypatch.delattr(baselines, "measure_pieces")
    for part, numbers in zip(parts, wanted, strict=True):
        found = known_baselines(shared, own.data, own.lora_model, part)
        assert found.keys() == numbers.keys()
        for name, values in numbers.items():
            assert found[name] == pytest.approx(values, abs=1e-4)
    assert "after the trials" not in capsys.readouterr().err


@pytest.mark.whole
@pytest.mark.usefixtures("local_ray")
def test_the_first_place_is_taken_before_a_trial_can_ask(own: World, tmp_path: Path) -> None:
    import ray

    beside = Beside({"w": own}, tmp_path, FULL)
    assert ray.available_resources()["CPU"] == 1
    beside.keep()


@pytest.mark.whole
@pytest.mark.usefixtures("local_ray")
def test_what_a_process_fails_in_is_left_to_the_driver(
    own: World, tmp_path: Path, capsys: Any
) -> None:
    broken = replace(own, lora_model=None)
    Beside({"w": broken}, tmp_path, FULL).keep()
    assert "the baselines of world w are measured after the trials" in capsys.readouterr().err
    assert unknown_groups(tmp_path, own.data, "test") == list(GROUPS)
