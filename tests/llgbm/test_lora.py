from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contracts import make_spec
from dnd.output import RECORD
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    load_adapter,
    save_adapter,
)
from llgbm.models.load import Base
from llgbm.runtime import UserError

SPEC = make_spec()


def random_states(rank: int, count: int, prefix: str, seed: int = 0) -> list[dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(seed)
    return [
        {
            f"{prefix}{name}.lora_{side}.weight": torch.randn(shape, generator=noise)
            for name, side, shape in make_spec(rank).pieces
        }
        for _ in range(count)
    ]


@given(
    rank=st.integers(1, 5),
    count=st.integers(1, 4),
    prefix=st.sampled_from(["", "base_model.model."]),
    infix=st.sampled_from(["", ".default"]),
)
@settings(max_examples=30, deadline=None)
def test_state_dicts_of_either_spelling_come_back(
    rank: int, count: int, prefix: str, infix: str
) -> None:
    states = random_states(rank, count, prefix)
    spelled = [
        {k.replace(".weight", f"{infix}.weight"): v for k, v in state.items()} for state in states
    ]
    batch = LoraBatch.from_state_dicts(spelled)
    batch.check(make_spec(rank))
    assert batch.n_adapters == count
    back = batch.to_state_dicts(prefix)
    assert [list(state) for state in back] == [list(state) for state in states]
    assert all(torch.equal(b[k], s[k]) for b, s in zip(back, states, strict=True) for k in s)


@given(rank=st.integers(1, 5), count=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_flatten_and_unflatten_undo_each_other(rank: int, count: int, seed: int) -> None:
    spec = make_spec(rank)
    values = torch.randn(count, spec.n_values, generator=torch.Generator().manual_seed(seed))
    batch = LoraBatch.unflatten(spec, values)
    assert torch.equal(batch.flatten(spec), values)
    backwards = LoraBatch(dict(reversed(batch.a.items())), dict(reversed(batch.b.items())))
    assert torch.equal(backwards.flatten(spec), values)
    assert torch.equal(batch.select([count - 1]).flatten(spec), values[-1:])


def test_stacking_refuses_nothing_foreign_keys_and_unlike_adapters() -> None:
    one = random_states(2, 1, "")[0]
    some_key = next(iter(one))
    without = {k: v for k, v in one.items() if k != some_key}
    short = {k: v for k, v in one.items() if not k.startswith("layers.0.q_proj")}
    wrong: list[tuple[list[dict[str, Tensor]], str]] = [
        ([], "at least one"),
        ([{}], "each module needs one of both"),
        ([without], "each module needs one of both"),
        ([{**one, "layers.0.q_proj.lora_magnitude_vector": torch.ones(1)}], "no LoRA weight key"),
        ([one, short], "adapter 1 and adapter 0 differ in 1 modules"),
        ([one, random_states(3, 1, "")[0]], "share rank and base"),
    ]
    for states, message in wrong:
        with pytest.raises(ValueError, match=message):
            LoraBatch.from_state_dicts(states)


def test_flat_values_of_another_width_are_refused() -> None:
    for shape in ((2, SPEC.n_values + 1), (SPEC.n_values,), (1, 2, SPEC.n_values)):
        with pytest.raises(ValueError, match="flat adapters have shape"):
            LoraBatch.unflatten(SPEC, torch.zeros(shape))
    with pytest.raises(ValueError, match="another rank or base"):
        LoraBatch.unflatten(SPEC, torch.zeros(1, SPEC.n_values)).flatten(make_spec(3))


def test_spec_is_what_the_model_has(tiny_base: Base, tiny_spec: LoraSpec) -> None:
    weights = {
        n.removesuffix(".weight"): p
        for n, p in tiny_base.model.named_parameters()
        if "_proj.weight" in n
    }
    assert {m.name: (m.n_out, m.n_in) for m in tiny_spec.modules} == {
        n: tuple(p.shape) for n, p in weights.items()
    }
    assert len(tiny_spec.modules) == 14
    assert tiny_spec.n_values == sum(3 * sum(p.shape) for p in weights.values())
    with pytest.raises(UserError, match="no Linear layer called c_attn"):
        LoraSpec.from_model(tiny_base.model, 3, 6.0, ("q_proj", "c_attn"))
    for rank, alpha in ((0, 1.0), (-1, 1.0), (2, 0.0)):
        with pytest.raises(UserError, match="it must be"):
            LoraSpec(SPEC.modules, rank, alpha)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    save_adapter(
        folder, random_states(2, 1, "base_model.model.")[0], adapter_config(SPEC, "some/base")
    )
    return folder


def test_the_config_written_is_the_one_that_peft_would_make(adapter: Path) -> None:
    from peft import LoraConfig

    made = LoraConfig(
        r=SPEC.rank,
        lora_alpha=int(SPEC.alpha),
        target_modules=list(SPEC.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path="some/base",
        inference_mode=True,
    )
    assert LoraConfig.from_pretrained(str(adapter)).to_dict() == made.to_dict()


def edit_weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = change(load_file(folder / ADAPTER_WEIGHTS))
        save_file(state, folder / ADAPTER_WEIGHTS)

    return spoil


def edit_config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(change(config)))

    return spoil


def cut_weights_to(share: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        whole = (folder / ADAPTER_WEIGHTS).read_bytes()
        (folder / ADAPTER_WEIGHTS).write_bytes(whole[: int(share * len(whole))])

    return spoil


def poison(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        list(state.values())[3][0, 0] = value
        return state

    return change


SPOILED: dict[str, Callable[[Path], object]] = {
    "truncated": cut_weights_to(0.7),
    "only a header": cut_weights_to(0.05),
    "empty": cut_weights_to(0),
    "a pickle": lambda folder: torch.save({"x": torch.ones(1)}, folder / ADAPTER_WEIGHTS),
    "text": lambda folder: (folder / ADAPTER_WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    ),
    "no weights": lambda folder: (folder / ADAPTER_WEIGHTS).unlink(),
    "a folder": lambda folder: (
        (folder / ADAPTER_WEIGHTS).unlink(),
        (folder / ADAPTER_WEIGHTS).mkdir(),
    ),
    "NaN": edit_weights(poison(float("nan"))),
    "infinite": edit_weights(poison(float("inf"))),
    "no tensor": edit_weights(lambda state: {}),
    "a missing key": edit_weights(lambda state: dict(list(state.items())[1:])),
    "a missing module": edit_weights(
        lambda state: {k: v for k, v in state.items() if "layers.1.q_proj" not in k}
    ),
    "another module": edit_weights(
        lambda state: {k.replace("layers.1", "layers.2"): v for k, v in state.items()}
    ),
    "a foreign key": edit_weights(lambda state: {**state, "lm_head.weight": torch.ones(2, 2)}),
    "another rank": edit_weights(lambda state: random_states(3, 1, "base_model.model.")[0]),
    "a transposed shape": edit_weights(
        lambda state: {k: v.T.contiguous() for k, v in state.items()}
    ),
    "no config": lambda folder: (folder / ADAPTER_CONFIG).unlink(),
    "config of another rank": edit_config(lambda config: {**config, "r": 8}),
    "config of another alpha": edit_config(lambda config: {**config, "lora_alpha": 32}),
    "scaled by the root of the rank": edit_config(lambda config: {**config, "use_rslora": True}),
    "DoRA": edit_config(lambda config: {**config, "use_dora": True}),
    "alpha by module": edit_config(lambda config: {**config, "alpha_pattern": {"q_proj": 64}}),
    "trained biases": edit_config(lambda config: {**config, "bias": "all"}),
    "config without rank": edit_config(
        lambda config: {k: v for k, v in config.items() if k != "r"}
    ),
    "config that is a list": edit_config(lambda config: [config]),
    "config that is torn": lambda folder: (folder / ADAPTER_CONFIG).write_text('{"r": 2, "lora_al'),
    "config that is binary": lambda folder: (folder / ADAPTER_CONFIG).write_bytes(b"\xff\xfe\x00{"),
}


@pytest.mark.parametrize("damage", SPOILED)
def test_a_spoiled_adapter_is_refused_in_one_sentence_that_names_it(
    adapter: Path, damage: str
) -> None:
    load_adapter(adapter, SPEC)
    SPOILED[damage](adapter)
    with pytest.raises(UserError) as caught:
        load_adapter(adapter, SPEC)
    message = str(caught.value)
    assert str(adapter) in message and "\n" not in message and len(message) < 500


def test_an_adapter_comes_back_as_float32_to_the_bit(adapter: Path, tmp_path: Path) -> None:
    state = random_states(2, 1, "base_model.model.")[0]
    loaded = load_adapter(adapter, SPEC)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    save_adapter(
        tmp_path / "half",
        {k: v.bfloat16() for k, v in state.items()},
        adapter_config(SPEC, "some/base"),
    )
    assert {v.dtype for v in load_adapter(tmp_path / "half", SPEC).values()} == {torch.float32}


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_write_that_fails_leaves_the_older_adapter_and_nothing_half_written(
    adapter: Path,
) -> None:
    before, names = files_under(adapter), os.listdir(adapter.parent)
    unwritable = {"r": object()}
    for target in (adapter, adapter.parent / "new"):
        with pytest.raises(TypeError):
            save_adapter(target, random_states(2, 1, "", seed=1)[0], unwritable)
    assert files_under(adapter) == before and os.listdir(adapter.parent) == names


def test_an_older_adapter_is_replaced_and_a_foreign_folder_is_not(
    adapter: Path, tmp_path: Path
) -> None:
    newer = random_states(2, 1, "base_model.model.", seed=1)[0]
    save_adapter(adapter, newer, adapter_config(SPEC, "some/base"))
    assert all(torch.equal(v, newer[k]) for k, v in load_adapter(adapter, SPEC).items())
    assert set(files_under(adapter)) == {ADAPTER_WEIGHTS, ADAPTER_CONFIG, RECORD}
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / ADAPTER_CONFIG).write_text("days of training")
    file.write_text("kept")
    for target in (foreign, file, file / "below"):
        with pytest.raises(UserError, match="name another folder"):
            save_adapter(target, newer, adapter_config(SPEC, "some/base"))
    assert (
        files_under(foreign) == {ADAPTER_CONFIG: b"days of training"} and file.read_text() == "kept"
    )
    assert sorted(os.listdir(tmp_path)) == ["adapter", "file", "foreign"]
