"""Fused layers (Phi-3) and Conv1D (GPT-2): teachers, generators, delta, merging and stacking, held against PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from test_bases import IDS, write_family
from torch import Tensor
from transformers import AutoModelForCausalLM

from llgbm.functional import FunctionalLoRA
from llgbm.generator import GENERATORS, GeneratorConfig, make_generator
from llgbm.generator.networks import Standardiser
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import PEFT_PREFIX, adapter_config, load_adapter, save_adapter
from llgbm.lora.apply import adapters_applied
from llgbm.lora.external import read_external
from llgbm.lora.stacking import Mixture, stack_adapters
from llgbm.models.cost import BaseShape
from llgbm.models.encoding import encode_pairs
from llgbm.models.load import Base, load_base
from llgbm.models.merge import merge_adapter
from llgbm.models.scoring import answer_loss
from llgbm.teachers.peft import peft_adapter
from llgbm.teachers.train import TARGET_MODULES, TeacherConfig, named_targets

TARGETS = {
    "phi3": ("down_proj", "gate_up_proj", "o_proj", "qkv_proj"),
    "gpt2": ("c_attn", "c_fc", "c_proj"),
}
PAIRS = [("red green", " blue"), ("green", " red red")]


@pytest.fixture(scope="module", params=TARGETS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    write_family(folder, request.param)
    return load_base(folder)


@pytest.fixture
def spec(base: Base) -> LoraSpec:
    targets = named_targets(TARGETS[base.model.config.model_type])
    return TeacherConfig(rank=3, alpha=6.0, target_modules=targets).spec_of(base.model)


@pytest.fixture
def batch(spec: LoraSpec) -> LoraBatch:
    noise = torch.randn(2, spec.n_values, generator=torch.Generator().manual_seed(1))
    return LoraBatch.unflatten(spec, 0.2 * noise)


def fresh(base: Base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def save(base: Base, spec: LoraSpec, batch: LoraBatch, folder: Path) -> list[Path]:
    places = [folder / str(number) for number in range(batch.n_adapters)]
    for place, state in zip(places, batch.to_state_dicts(), strict=True):
        save_adapter(place, state, adapter_config(spec, base.path))
    return places


def test_a_written_adapter_is_peft_s_without_a_warning(
    base: Base, spec: LoraSpec, batch: LoraBatch, tmp_path: Path
) -> None:
    (first, second) = save(base, spec, batch, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of `fan_in_fan_out`
        wanted = [logits(PeftModel.from_pretrained(fresh(base), str(f))) for f in (first, second)]
    with adapters_applied(base.model, batch, spec.scaling), torch.no_grad():
        both = base.model(input_ids=IDS.repeat(2, 1), use_cache=False).logits
    torch.testing.assert_close(both, torch.cat(wanted), atol=1e-5, rtol=0)
    assert (wanted[0] - logits(base.model)).abs().max() > 1e-2
    assert load_adapter(first, spec).keys() == batch.to_state_dicts()[0].keys()


@pytest.mark.parametrize("init", [False, "pissa"])
def test_an_adapter_that_peft_wrote_is_read_as_peft_reads_it(
    init: Any, base: Base, spec: LoraSpec, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=list(spec.target_modules),
        init_lora_weights=init,
        fan_in_fan_out=spec.is_transposed,
    )
    made = get_peft_model(fresh(base), config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    made.save_pretrained(tmp_path / "adapter")
    wanted = logits(PeftModel.from_pretrained(fresh(base), str(tmp_path / "adapter")))
    plain = read_external(tmp_path / "adapter", base.model)
    one = LoraBatch.from_state_dicts([plain.state])
    with adapters_applied(base.model, one, plain.spec.scaling):
        torch.testing.assert_close(logits(base.model), wanted, atol=1e-4, rtol=0)


def test_teachers_have_the_loss_and_the_gradient_of_peft(
    base: Base, spec: LoraSpec, batch: LoraBatch
) -> None:
    texts = encode_pairs(base.tokenizer, PAIRS)
    values_AV = batch.select([0]).flatten(spec).requires_grad_()
    own = LoraBatch.unflatten(spec, values_AV)
    with adapters_applied(base.model, own, spec.scaling):
        loss = answer_loss(base.model, texts)
    loss.backward()
    assert values_AV.grad is not None
    gradient = LoraBatch.unflatten(spec, values_AV.grad)
    with peft_adapter(base, spec) as model:
        set_peft_model_state_dict(model, batch.to_state_dicts()[0])
        wanted = answer_loss(base.model, texts)
        wanted.backward()
        found = {
            name.removeprefix(PEFT_PREFIX).replace(".default", ""): p.grad
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    for name in gradient.a:
        for side, stacked in (("A", gradient.a), ("B", gradient.b)):
            peft = found[f"{name}.lora_{side}.weight"]
            torch.testing.assert_close(stacked[name][0], peft, atol=1e-5, rtol=0)
    assert gradient.flatten(spec).abs().max() > 1e-3


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_write_for_these_layers(
    name: str, base: Base, spec: LoraSpec, batch: LoraBatch, tmp_path: Path
) -> None:
    standardiser = Standardiser.fit(batch.flatten(spec))
    generator = make_generator(GeneratorConfig(name=name, hidden=16), spec, 8, standardiser, seed=0)
    made = generator.generate(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2)))
    (folder,) = save(base, spec, made, tmp_path)
    wanted = logits(PeftModel.from_pretrained(fresh(base), str(folder)))
    with adapters_applied(base.model, made, spec.scaling):
        torch.testing.assert_close(logits(base.model), wanted, atol=1e-5, rtol=0)


def test_one_adapter_as_effective_parameters_is_the_same(
    base: Base, spec: LoraSpec, batch: LoraBatch
) -> None:
    lora_model = FunctionalLoRA(base.model, 3, 6.0, spec.target_modules)
    parameters = lora_model.apply_lora_weights(batch.to_state_dicts()[0])
    with torch.no_grad():
        got = torch.func.functional_call(base.model, parameters, (IDS,), {"use_cache": False})
    with adapters_applied(base.model, batch.select([0]), spec.scaling):
        torch.testing.assert_close(got.logits, logits(base.model), atol=5e-5, rtol=0)


def test_they_are_merged_and_stacked(
    base: Base, spec: LoraSpec, batch: LoraBatch, tmp_path: Path
) -> None:
    places = save(base, spec, batch, tmp_path)
    plain = [read_external(place, base.model) for place in places]
    state, stacked, error = stack_adapters(base.model, Mixture(plain, [1.0, 0.5]))
    assert stacked.rank == 6 and error < 1e-3
    with adapters_applied(base.model, LoraBatch.from_state_dicts([state]), stacked.scaling):
        both = logits(base.model)
    wanted = logits(PeftModel.from_pretrained(fresh(base), str(places[0])))
    assert (both - wanted).abs().max() > 1e-3
    used_up = load_base(base.path)
    merged = merge_adapter(used_up, places[0], ["red green blue"], torch.float32)
    torch.testing.assert_close(logits(merged.model), wanted, atol=1e-4, rtol=0)


def test_their_cost_counts_every_layer(base: Base, spec: LoraSpec) -> None:
    linear = sum(
        parameter.numel()
        for name, parameter in base.model.named_parameters()
        if name.endswith(".weight") and parameter.ndim == 2 and ".h." in name or ".layers." in name
        if parameter.ndim == 2
    )
    shape = BaseShape.of(base.model, spec)
    assert sum(m.n_in * m.n_out for m in spec.modules) == linear
    assert shape.parameters > linear


def test_targets_that_are_typed_in_another_order_are_the_same() -> None:
    assert named_targets(["v_proj", "q_proj", "v_proj"]) == ("q_proj", "v_proj")
    assert named_targets(None) == named_targets(sorted(TARGET_MODULES)) == TARGET_MODULES
