"""Bases quantised with bitsandbytes, held against PEFT on the same base; without the package they are refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils
from peft import LoraConfig, PeftModel, get_peft_model
from spoiled_bases import change
from test_bases import IDS, write_family
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llgbm.__main__ import main
from llgbm.functional import FunctionalLoRA
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import PEFT_PREFIX, adapter_config, save_adapter
from llgbm.lora.apply import adapters_applied
from llgbm.lora.external import read_external
from llgbm.models.cost import BaseShape
from llgbm.models.encoding import encode_pairs
from llgbm.models.load import Base, base_hash, load_base, weightless_model
from llgbm.models.quantised import check_quantised, model_bits
from llgbm.models.scoring import answer_loss
from llgbm.runtime import UserError
from llgbm.teachers.peft import peft_adapter

FLOAT32 = {"bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **FLOAT32},
    "fp4, scales quantised": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        **FLOAT32,
    },
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("base")
    write_family(folder, "qwen2")
    plain = base_hash(folder)
    config = BitsAndBytesConfig(**KINDS[request.param])
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(folder)
    assert base_hash(folder) != plain
    return load_base(folder)


@pytest.fixture
def spec(base: Base) -> LoraSpec:
    return LoraSpec.from_model(base.model, rank=3, alpha=6.0)


@pytest.fixture
def values_AV(spec: LoraSpec) -> Tensor:
    return 0.2 * torch.randn(2, spec.n_values, generator=torch.Generator().manual_seed(1))


def fresh(base: Base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()


def test_logits_and_gradients_are_those_of_peft(
    base: Base, spec: LoraSpec, values_AV: Tensor, tmp_path: Path
) -> None:
    """Each adapter alone in its pass; then two in one, where 8 bits find large inputs in the whole pass."""
    leaf = values_AV.requires_grad_()
    batch, text = LoraBatch.unflatten(spec, leaf), IDS[:1]
    with torch.no_grad(), adapters_applied(base.model, batch, spec.scaling):
        both = base.model(input_ids=text.repeat(2, 1), use_cache=False).logits
    with torch.no_grad():
        own = base.model(input_ids=text, use_cache=False).logits
    for index, state in enumerate(batch.to_state_dicts()):
        save_adapter(tmp_path / str(index), state, adapter_config(spec, base.path))
        model = PeftModel.from_pretrained(
            fresh(base), str(tmp_path / str(index)), is_trainable=True
        ).eval()
        wanted = model(input_ids=text, use_cache=False).logits
        with adapters_applied(base.model, batch.select([index]), spec.scaling):
            alone = base.model(input_ids=text, use_cache=False).logits
        torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=1e-5)
        assert (wanted - own).abs().max() > 0.1
        bound = 1e-5 if model_bits(base.model) == 4 else 0.1
        torch.testing.assert_close(both[index : index + 1], wanted, atol=bound, rtol=bound)

        wanted.square().mean().backward()
        (gradient_AV,) = torch.autograd.grad(alone.square().mean(), leaf)
        gradient = LoraBatch.unflatten(spec, gradient_AV)
        parameters = dict(model.named_parameters())
        for shape in spec.modules:
            for side, ours in (("A", gradient.a), ("B", gradient.b)):
                theirs = parameters[f"{PEFT_PREFIX}{shape.name}.lora_{side}.default.weight"].grad
                torch.testing.assert_close(ours[shape.name][index], theirs, atol=1e-5, rtol=1e-3)


def test_a_teacher_is_trained_as_peft_does(base: Base, spec: LoraSpec, values_AV: Tensor) -> None:
    """The two methods for teachers, PEFT's model and the batch under hooks, have one loss; the base stays."""
    texts = encode_pairs(base.tokenizer, [("red green", " blue"), ("green", " red red")])
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    batch = LoraBatch.unflatten(spec, values_AV).select([0])
    with peft_adapter(base, spec) as model:
        for shape in spec.modules:
            own: Any = model.get_submodule(PEFT_PREFIX + shape.name)
            own.lora_A["default"].weight.data = batch.a[shape.name][0].clone()
            own.lora_B["default"].weight.data = batch.b[shape.name][0].clone()
        wanted = answer_loss(base.model, texts)
        wanted.backward()
        assert own.lora_A["default"].weight.grad.abs().max() > 0
    with torch.no_grad(), adapters_applied(base.model, batch, spec.scaling):
        got = answer_loss(base.model, texts)
    torch.testing.assert_close(got, wanted.detach(), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    assert not any(p.requires_grad for p in base.model.parameters())


def test_it_travels_to_workers(base: Base) -> None:
    """Ray hands the worlds of a sweep to its workers as pickles."""
    again = pickle.loads(pickle.dumps(base.model))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, base.model(IDS).logits)


def test_its_size_is_counted(base: Base, spec: LoraSpec) -> None:
    shape = BaseShape.of(base.model, spec)
    sketch = BaseShape.of(weightless_model(str(base.folder)), spec)
    held = sum(p.nbytes for p in base.model.parameters())
    assert shape == sketch
    assert held <= shape.weight_bytes < 1.1 * held


def test_what_needs_whole_weights_is_refused(
    base: Base, spec: LoraSpec, values_AV: Tensor, tmp_path: Path, capsys: Any
) -> None:
    batch = LoraBatch.unflatten(spec, values_AV)
    save_adapter(tmp_path / "one", batch.to_state_dicts()[0], adapter_config(spec, base.path))
    out = tmp_path / "out"
    assert main(["merge", "--adapter", str(tmp_path / "one"), "--out", str(out)]) == 2
    assert "rounded to its few bits" in capsys.readouterr().err and not out.exists()
    lora_model = FunctionalLoRA(base.model, spec.rank, spec.alpha, spec.target_modules)
    with pytest.raises(UserError, match="packed weights"):
        lora_model.apply_lora_weights(batch.to_state_dicts()[0])
    write_family(tmp_path / "plain", "qwen2")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(plain, config).save_pretrained(tmp_path / "pissa")
    with pytest.raises(UserError, match="quantised here"):
        read_external(tmp_path / "pissa", base.model)


@pytest.mark.parametrize(
    "stored", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"load_in_4bit": True}]
)
def test_without_the_package_it_is_named(
    stored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: False)
    write_family(tmp_path, "qwen2")
    change(tmp_path / "config.json", quantization_config=stored)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_base(tmp_path)


def test_other_methods_are_refused_by_name() -> None:
    for method in ("gptq", "awq"):
        assert f"quantised ({method})" in str(check_quantised({"quant_method": method, "bits": 4}))
    assert "neither 4 nor 8 bits" in str(check_quantised({"quant_method": "bitsandbytes"}))
