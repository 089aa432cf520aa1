"""An estimate against what a real step on this machine is counted to do and seen to hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rows, write_rows
from test_memory import bytes_held
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llgbm.dataset import batch_deltas
from llgbm.estimate import (
    ProbeSize,
    TrialEstimate,
    WorldSketch,
    estimate_trial,
    generator_flops,
    human,
    weightless_generator,
    weightless_rows,
)
from llgbm.generator import GENERATORS
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.apply import adapters_applied
from llgbm.models.cost import BaseShape
from llgbm.models.load import Base, PublishedSize, model_size, weightless_model
from llgbm.training import TrainingConfig, Trial
from llgbm.world import World
from tuning import run_ablation
from tuning.dry_run import estimate_study
from tuning.studies import StudyOptions, phase_4_5

SAVERS = (
    {},
    {"probe_chunk": 1},
    {"activation_checkpointing": True},
    {"probe_chunk": 1, "activation_checkpointing": True},
    {"lambda_delta": 0.0},
    {"terms": {"delta": 0, "kl": 1}},
    {"lambda_delta": 0.0, "terms": {"answers": 1, "kl": 1}},
    {"lambda_delta": 0.0, "terms": {"layers": 1}},
)


def one_step(
    world: World, config: TrainingConfig
) -> tuple[Trial, dict[str, torch.Tensor], TrialEstimate]:
    """A trial, its first batch, and the estimate for probes as long as that batch's."""
    trial = Trial(config, world.data, world.lora_model)
    batch = next(iter(trial.batches()))
    probes = batch_deltas(batch).probes
    marked = probes.valid_APQ.float().sum(-1).mean().item()
    size = ProbeSize(probes.ids_APT.shape[-1], marked, probes.valid_APQ.shape[-1])
    width = world.data.conditions.train_ANC.shape[-1]
    n_teachers = len(world.data.rows["train"])
    return (
        trial,
        batch,
        estimate_trial(config, world.base.model, world.bank.spec, n_teachers, width, size),
    )


@pytest.mark.parametrize("change", SAVERS, ids=str)
def test_flops_of_a_step_are_those_that_torch_counts(
    world: World, config: TrainingConfig, change: dict[str, float]
) -> None:
    trial, batch, estimate = one_step(world, replace(config, **change))  # type: ignore[arg-type]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trial.compute_loss(batch)["loss"].backward()
    assert estimate.step_flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_generator_can_be_estimated(world: World, config: TrainingConfig, name: str) -> None:
    settings = replace(config, generator=replace(config.generator, name=name))
    trial, batch, estimate = one_step(world, settings)
    assert estimate.generator_parameters == sum(p.numel() for p in trial.generator.parameters())
    buffers = sum(b.numel() for b in trial.generator.buffers())
    tables = 4 * (6 * estimate.generator_parameters + 2 * buffers)
    assert estimate.memory["generator and optimiser"] == tables
    generator = weightless_generator(settings, world.bank.spec, batch["condition"].shape[-1])
    assert all(p.is_meta for p in generator.parameters())
    trial.generator.train()
    with FlopCounterMode(display=False) as counter:
        tokens, penalties = trial.generator.training_forward(batch)
        sum(penalties.values(), tokens.sum()).backward()
    wanted = counter.get_total_flops()
    width = batch["condition"].shape[-1]
    generator.prepare_training(
        weightless_rows(settings, world.bank.spec, width, len(world.data.rows["train"]))
    )
    assert generator_flops(generator, settings, width) == pytest.approx(wanted, rel=0.02)


def test_what_a_step_holds_is_what_was_estimated(world: World, config: TrainingConfig) -> None:
    """Probes enough that the base's activations outweigh the rest, as at full size."""
    trial, batch, estimate = one_step(world, replace(config, n_probes=4, batch_size=8))
    modules = (
        *trial.generator.parameters(),
        *trial.generator.buffers(),
        *world.base.model.parameters(),
    )
    own = {t.untyped_storage().data_ptr() for t in modules}
    own |= {t.untyped_storage().data_ptr() for t in (*batch.values(), *world.base.model.buffers())}
    _, held = bytes_held(lambda: trial.compute_loss(batch)["loss"], ignore=own)
    adapters = 2 * 8 * world.bank.spec.n_values * 4
    assert estimate.memory["activations"] + adapters == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize(
    ("name", "adapters", "generator", "values"),
    [("qwen2.5-0.5b", 16, 59e6, 4_399_104), ("qwen2.5-1.5b", 8, 212e6, 18_464_768)],
)
def test_published_sizes_fit_a_gpu_of_80_gigabytes(
    name: str, adapters: int, generator: float, values: int
) -> None:
    """With no saver of memory on: 5 probes of 64 tokens each, a bank of 100, 384 values a condition."""
    size = model_size(name)
    assert isinstance(size, PublishedSize)
    base = weightless_model(name)
    spec = LoraSpec.from_model(base, size.rank, size.alpha)
    config = TrainingConfig(model_size=name, batch_size=adapters, n_probes=5)
    estimate = estimate_trial(config, base, spec, 100, 384, ProbeSize(64))
    assert estimate.adapter_values == values
    assert estimate.generator_parameters == pytest.approx(generator, rel=0.02)
    assert estimate.peak_bytes < 0.8 * 80e9
    saving = replace(config, activation_checkpointing=True, probe_chunk=1)
    saved = estimate_trial(saving, base, spec, 100, 384, ProbeSize(64))
    assert saved.memory["activations"] < estimate.memory["activations"] / 10
    assert saved.step_flops == pytest.approx(2 * estimate.step_flops, rel=0.05)


def test_a_study_is_a_table_before_anything_is_built() -> None:
    study = phase_4_5(StudyOptions(seeds=(0, 1)))
    text = estimate_study(study)
    lines = text.splitlines()
    assert [
        sum(name in line for line in lines) for name in ("multitask", "delta-only", "weight-only")
    ] == [1, 1, 1]
    assert "training of 6 trials" in text and "adapters of a step" in lines[0]
    sketch = WorldSketch(study.worlds[0])
    assert all(p.is_meta for p in sketch.base.parameters())
    assert sketch.probe_tokens(study.trials[0].config) > 10
    assert sketch.teacher_flops > 1e12


def test_numbers_for_people() -> None:
    assert [human(n) for n in (0, 12, 1500, 4_399_104, 2.5e12)] == [
        "0",
        "12",
        "1.5 k",
        "4.4 M",
        "2.5 T",
    ]
    assert human(1e9, "B") == "1 GB"


def test_flops_of_written_answers_are_those_that_torch_counts(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch
) -> None:
    shape, ids = BaseShape.of(tiny_base.model, tiny_spec), torch.arange(18).view(2, 9)
    batch = tiny_adapters.select([0])
    model: Any = tiny_base.model  # `generate` is of a mixin that its type does not name
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        adapters_applied(tiny_base.model, batch, 2.0),
        FlopCounterMode(display=False) as counter,
    ):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12
        )
    wanted = shape.decoding_flops(2, 9, 12)
    assert wanted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_answers_that_are_read_are_part_of_an_estimate(
    tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for topic in ("river", "stone", "cloud"):
        write_rows(tmp_path, topic, rows(topic, 32))
    command = ["--base", tiny_base.path, "--data", str(tmp_path), "--tasks", "river", "stone"]
    assert run_ablation.main([*command, "--held-out", "cloud", "--seeds", "0", "--estimate"]) == 0
    assert "written out to be read: up to" in capsys.readouterr().out
    assert run_ablation.main(["--smoke", "--estimate"]) == 0
    assert "written out" not in capsys.readouterr().out
