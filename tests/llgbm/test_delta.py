from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llgbm.delta import (
    DeltaCache,
    compute_adapter_delta,
    compute_base_activation,
    encode_probes,
    last_token_positions,
    mean_over_probes,
    measure_deltas,
)
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.models.load import Base
from llgbm.probes import Probe, ProbeSet, create_generic_probes
from llgbm.runtime import UserError
from llgbm.teachers.bank import Bank

EXACT = {"atol": 5e-5, "rtol": 1e-5}
ADAPTERS = {"first_0": "first", "last_0": "last", "last_1": "last"}
TRAJECTORIES = ProbeSet.trajectories(
    {
        "first": [
            Probe("give the first word : apple river =>", " apple"),
            Probe("first : king lamp iron =>", ""),
        ],
        "last": [
            Probe("give the last word : apple =>", " [ apple done ]"),
            Probe("last => ", " king"),
        ],
    }
)


def fresh(base: Base) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base.path).float().eval()


def last_states(model: torch.nn.Module, base: Base, texts: list[str]) -> Tensor:
    """[S, D] by transformers alone: one text a pass, no padding, the last of `hidden_states` at the last token."""
    states = []
    for text in texts:
        ids = torch.tensor([base.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            states.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1])
    return torch.stack(states)


def texts_of(probe_set: ProbeSet) -> list[str]:
    return [probe.prompt for probe in probe_set.of("shared")]


@pytest.fixture
def peft_models(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, tmp_path: Path
) -> list[PeftModel]:
    models = []
    for index, state in enumerate(tiny_adapters.to_state_dicts()):
        save_adapter(tmp_path / str(index), state, adapter_config(tiny_spec, tiny_base.path))
        models.append(PeftModel.from_pretrained(fresh(tiny_base), str(tmp_path / str(index))))
    return models


def test_base_activation_is_the_mean_of_last_token_states_that_transformers_gives(
    tiny_base: Base,
) -> None:
    probe_set = create_generic_probes()
    assert len({len(tiny_base.tokenizer(t)["input_ids"]) for t in texts_of(probe_set)}) > 1
    wanted = last_states(fresh(tiny_base), tiny_base, texts_of(probe_set)).mean(0)
    torch.testing.assert_close(compute_base_activation(tiny_base, probe_set), wanted, **EXACT)


def test_adapter_delta_is_what_peft_moves_and_leaves_the_base_to_the_bit(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, peft_models: list[PeftModel]
) -> None:
    probe_set = create_generic_probes()
    before = compute_base_activation(tiny_base, probe_set)
    plain = last_states(fresh(tiny_base), tiny_base, texts_of(probe_set))
    measured = measure_deltas(
        tiny_base.model,
        tiny_spec,
        tiny_adapters,
        encode_probes(tiny_base.tokenizer, probe_set, ["a", "b", "c"]),
        True,
    )
    for index, state in enumerate(tiny_adapters.to_state_dicts()):
        wanted = last_states(peft_models[index], tiny_base, texts_of(probe_set)) - plain
        assert wanted.norm(dim=1).min() > 0.1
        torch.testing.assert_close(measured.delta_APQD[index, :, 0], wanted, **EXACT)
        torch.testing.assert_close(
            compute_adapter_delta(tiny_base, tiny_spec, state, probe_set, before),
            wanted.mean(0),
            **EXACT,
        )
    torch.testing.assert_close(measured.mean_AD, measured.delta_APQD[:, :, 0].mean(1), **EXACT)
    assert torch.equal(compute_base_activation(tiny_base, probe_set), before)


def test_trajectory_delta_is_the_delta_of_every_prefix(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch, peft_models: list[PeftModel]
) -> None:
    probes = encode_probes(tiny_base.tokenizer, TRAJECTORIES, list(ADAPTERS.values()))
    table = measure_deltas(tiny_base.model, tiny_spec, tiny_adapters, probes, shared=False, chunk=2)
    plain, total = fresh(tiny_base), 0
    for row, task in enumerate(ADAPTERS.values()):
        means = []
        for column, probe in enumerate(TRAJECTORIES.of(task)):
            pieces = tiny_base.tokenizer.tokenize(probe.continuation or "")
            prefixes = [
                probe.prompt + "".join(pieces[:n]).replace("Ġ", " ") for n in range(len(pieces) + 1)
            ]
            wanted = last_states(peft_models[row], tiny_base, prefixes) - last_states(
                plain, tiny_base, prefixes
            )
            valid = probes.valid_APQ[row, column]
            torch.testing.assert_close(table.delta_APQD[row, column][valid], wanted, **EXACT)
            means.append(wanted)
            total += len(prefixes)
        torch.testing.assert_close(table.mean_AD[row], torch.cat(means).mean(0), **EXACT)
    assert probes.valid_APQ.sum().item() == total and not probes.valid_APQ.all()


def test_chunking_and_selection_change_no_delta(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch
) -> None:
    probes = encode_probes(tiny_base.tokenizer, TRAJECTORIES, list(ADAPTERS.values()))
    whole = measure_deltas(tiny_base.model, tiny_spec, tiny_adapters, probes, shared=False)
    for chunk in (1, 2):
        parts = measure_deltas(
            tiny_base.model, tiny_spec, tiny_adapters, probes, shared=False, chunk=chunk
        )
        torch.testing.assert_close(parts.delta_APQD, whole.delta_APQD, **EXACT)
    alone = measure_deltas(
        tiny_base.model, tiny_spec, tiny_adapters.select([2]), probes.select([2]), shared=False
    )
    torch.testing.assert_close(whole.select([2]).delta_APQD, alone.delta_APQD, **EXACT)
    picked = whole.select([2, 0], torch.tensor([[1], [0]]))
    assert torch.equal(
        picked.delta_APQD, torch.stack([whole.delta_APQD[2, [1]], whole.delta_APQD[0, [0]]])
    )
    assert torch.equal(
        picked.probes.ids_APT, torch.stack([probes.ids_APT[2, [1]], probes.ids_APT[0, [0]]])
    )
    with pytest.raises(ValueError, match="each needs its own row"):
        measure_deltas(
            tiny_base.model, tiny_spec, tiny_adapters, probes.select([0, 1]), shared=False
        )


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4
    )
)
def test_last_token_is_found_whichever_side_is_padded(rows: list[tuple[int, int, int]]) -> None:
    width = max(sum(row) for row in rows)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, (left, length, _) in enumerate(rows):
        mask[index, left : left + length] = 1
    assert last_token_positions(mask).tolist() == [left + length - 1 for left, length, _ in rows]
    with pytest.raises(ValueError, match="all padding"):
        last_token_positions(torch.cat([mask, torch.zeros(1, width, dtype=torch.long)]))


def test_mean_over_probes_counts_valid_positions_only() -> None:
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    wanted = torch.stack([values[row][valid[row]].mean(0) for row in range(2)])
    torch.testing.assert_close(mean_over_probes(values, valid), wanted)


def test_tasks_with_unlike_numbers_of_probes_are_refused(tiny_base: Base) -> None:
    unlike = ProbeSet.trajectories(
        {"one": [Probe("a", " b")], "two": [Probe("a", " b"), Probe("c", " d")]}
    )
    with pytest.raises(ValueError, match="each needs as many"):
        encode_probes(tiny_base.tokenizer, unlike, ["one", "two"])
    mixed = ProbeSet.trajectories({"one": [Probe("a", " b"), Probe("c")]})
    with pytest.raises(ValueError, match="cannot be read in one set"):
        encode_probes(tiny_base.tokenizer, mixed, ["one"])


def test_base_activation_of_another_width_is_refused(
    tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch
) -> None:
    state = tiny_adapters.to_state_dicts()[0]
    with pytest.raises(ValueError, match="another base"):
        compute_adapter_delta(tiny_base, tiny_spec, state, create_generic_probes(), torch.zeros(7))


Build = Callable[..., DeltaCache]


@pytest.fixture
def build(tmp_path: Path, tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch) -> Build:
    def make(probe_set: ProbeSet, base: Base = tiny_base, bank: str = "bank") -> DeltaCache:
        own = Bank(tmp_path, bank, tiny_spec, ADAPTERS)
        return DeltaCache.build(tmp_path / "cache", base, own, probe_set, tiny_adapters)

    return make


@pytest.mark.parametrize(
    "probe_set", [create_generic_probes(), TRAJECTORIES], ids=["shared", "per task"]
)
def test_cache_has_the_layout_that_users_know_and_gives_back_what_was_measured(
    build: Build,
    probe_set: ProbeSet,
    tiny_base: Base,
    tiny_spec: LoraSpec,
    tiny_adapters: LoraBatch,
) -> None:
    cache = build(probe_set)
    assert cache.folder.name == "deltas"
    assert {p.name for p in cache.folder.iterdir()} == {
        "manifest.json",
        "base_activation.npy",
        *(f"{adapter_id}.npy" for adapter_id in ADAPTERS),
    }
    assert json.loads((cache.folder / "manifest.json").read_text())["adapters"] == ADAPTERS
    probes = encode_probes(tiny_base.tokenizer, probe_set, list(ADAPTERS.values()))
    shared = probe_set.scope == "shared"
    measured = measure_deltas(tiny_base.model, tiny_spec, tiny_adapters, probes, shared)
    table = cache.table(tiny_base, probe_set)
    assert torch.equal(table.delta_APQD, measured.delta_APQD) and torch.equal(
        table.base_APQD, measured.base_APQD
    )
    assert torch.equal(table.probes.ids_APT, probes.ids_APT)
    for row, adapter_id in enumerate(ADAPTERS):
        stored = np.load(cache.folder / f"{adapter_id}.npy", allow_pickle=False)
        assert np.array_equal(stored, measured.delta_APQD[row].numpy())
        assert torch.equal(cache.per_probe(adapter_id), measured.delta_APQD[row])
    if shared:
        activation = mean_over_probes(cache.base_activation, probes.valid_APQ[:1])[0]
        torch.testing.assert_close(
            activation, compute_base_activation(tiny_base, probe_set), **EXACT
        )


def test_cache_of_another_base_or_of_other_probes_is_refused(
    build: Build, tiny_base: Base, tmp_path: Path
) -> None:
    probe_set = create_generic_probes()
    cache = build(probe_set)
    for base, asked in ((replace(tiny_base, hash="other"), probe_set), (tiny_base, TRAJECTORIES)):
        with pytest.raises(UserError, match="another base or probe set"):
            cache.table(base, asked)
    with pytest.raises(UserError, match="no delta of adapter 'nosuch'"):
        cache.per_probe("nosuch")
    with pytest.raises(UserError, match="no manifest.json"):
        DeltaCache(tmp_path).table(tiny_base, probe_set)


def test_cache_is_found_again_by_all_that_made_it_and_by_nothing_less(
    build: Build, tiny_base: Base
) -> None:
    probe_set = create_generic_probes()
    first = build(probe_set)
    written = (first.folder / "manifest.json").stat().st_mtime_ns
    assert build(probe_set).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == written
    others = [
        build(TRAJECTORIES),
        build(probe_set, bank="other"),
        build(probe_set, replace(tiny_base, hash="other")),
    ]
    assert len({c.folder for c in (first, *others)}) == 4


def test_torn_cache_is_built_again(build: Build, tiny_base: Base) -> None:
    probe_set = create_generic_probes()
    cache = build(probe_set)
    wanted = cache.table(tiny_base, probe_set)

    def forge() -> None:
        np.save(cache.folder / "last_0.npy", np.zeros_like(wanted.delta_APQD[1].numpy()))

    damages: list[Callable[[], object]] = [
        (cache.folder / "last_0.npy").unlink,
        lambda: (cache.folder / "last_0.npy").write_bytes(b"\x93NUMPY"),
        forge,
        lambda: shutil.rmtree(cache.folder),
        (cache.folder.parent / "entry.json").unlink,
    ]
    for damage in damages:
        damage()
        assert torch.equal(
            build(probe_set).table(tiny_base, probe_set).delta_APQD, wanted.delta_APQD
        )


def test_nothing_to_measure_is_refused(
    tmp_path: Path, tiny_base: Base, tiny_spec: LoraSpec, tiny_adapters: LoraBatch
) -> None:
    for adapters in ({}, {"first_0": "first"}):
        with pytest.raises(ValueError, match="each needs one"):
            bank = Bank(tmp_path, "bank", tiny_spec, adapters)
            DeltaCache.build(tmp_path, tiny_base, bank, create_generic_probes(), tiny_adapters)
    assert not list(tmp_path.iterdir())
