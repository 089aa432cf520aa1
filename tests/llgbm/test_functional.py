from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llgbm.delta import encode_probes, measure_deltas, read_states
from llgbm.functional import FunctionalLoRA, compute_delta_differentiable
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.models.load import Base, ModelSize
from llgbm.models.pretrain import new_model
from llgbm.probes import Probe, ProbeSet

EXACT = {"atol": 3e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def lora_model(tiny_base: Base, tiny_spec: LoraSpec) -> FunctionalLoRA:
    return FunctionalLoRA(tiny_base.model, tiny_spec.rank, tiny_spec.alpha)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 400, (4, 9), generator=torch.Generator().manual_seed(0))


def fresh(base: Base) -> PreTrainedModel:
    """The base once more from its folder: PEFT changes the model that it is given."""
    return AutoModelForCausalLM.from_pretrained(base.path).float().eval()


def peft_output(model: PeftModel, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model.eval()(
            input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
        )
    return output.hidden_states[-1], output.logits


def test_equals_peft_on_adapters_read_from_disk(
    lora_model: FunctionalLoRA,
    tiny_base: Base,
    tiny_adapters: LoraBatch,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    hidden = lora_model.forward_with_lora(tiny_adapters, ids, hidden_only=True)
    logits = lora_model.forward_with_lora(tiny_adapters, ids)
    with torch.no_grad():
        plain = fresh(tiny_base)(input_ids=ids).logits
    for index, state in enumerate(tiny_adapters.to_state_dicts()):
        save_adapter(tmp_path / str(index), state, adapter_config(lora_model.spec, tiny_base.path))
        wanted = peft_output(
            PeftModel.from_pretrained(fresh(tiny_base), str(tmp_path / str(index))), ids
        )
        torch.testing.assert_close((hidden[index], logits[index]), wanted, **EXACT)
        assert (wanted[1] - plain).abs().max() > 0.1


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("v_proj",)])
def test_equals_peft_on_other_target_modules_and_on_states_that_peft_made(
    tiny_base: Base, ids: Tensor, targets: tuple[str, ...]
) -> None:
    config = LoraConfig(r=2, lora_alpha=5, target_modules=list(targets), init_lora_weights=False)
    models = [get_peft_model(fresh(tiny_base), config) for _ in range(2)]
    states = [
        {k: v.clone() for k, v in get_peft_model_state_dict(model).items()} for model in models
    ]
    lora_model = FunctionalLoRA(tiny_base.model, 2, 5, targets)
    hidden = lora_model.forward_with_lora(LoraBatch.from_state_dicts(states), ids, hidden_only=True)
    torch.testing.assert_close(
        hidden, torch.stack([peft_output(m, ids)[0] for m in models]), **EXACT
    )


def test_a_batch_equals_single_passes_on_shared_and_on_own_texts(
    lora_model: FunctionalLoRA, tiny_adapters: LoraBatch, ids: Tensor
) -> None:
    own = torch.stack([ids, ids.flip(0), ids.flip(1)])
    for given in (ids, own):
        together = lora_model.forward_with_lora(tiny_adapters, given)
        for index in range(3):
            texts = given if given.ndim == 2 else given[index]
            alone = lora_model.forward_with_lora(tiny_adapters.select([index]), texts)[0]
            torch.testing.assert_close(together[index], alone, **EXACT)
    assert (together[0] - together[1].flip(0)).abs().max() > 0.1


def test_every_a_and_b_gets_the_gradient_that_the_other_paths_give(
    lora_model: FunctionalLoRA, tiny_base: Base, tiny_adapters: LoraBatch, ids: Tensor
) -> None:
    weight = torch.randn(
        4, 9, lora_model.model.config.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    leaves = {k: v.clone().requires_grad_() for k, v in tiny_adapters.to_state_dicts()[1].items()}
    batch = LoraBatch.from_state_dicts([tiny_adapters.to_state_dicts()[0], leaves])
    batched = (lora_model.forward_with_lora(batch, ids, hidden_only=True)[1] * weight).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(batched, list(leaves.values())), strict=True))

    output = torch.func.functional_call(
        lora_model.model,
        lora_model.apply_lora_weights(leaves),
        kwargs={"input_ids": ids, "output_hidden_states": True},
    )
    effective = torch.autograd.grad(
        (output.hidden_states[-1] * weight).sum(), list(leaves.values())
    )

    config = LoraConfig(
        r=lora_model.spec.rank, lora_alpha=6, target_modules=list(lora_model.spec.target_modules)
    )
    peft = get_peft_model(fresh(tiny_base), config)
    set_peft_model_state_dict(peft, {k: v.detach() for k, v in leaves.items()})
    states = peft(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    (states * weight).sum().backward()
    trained = {
        n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.requires_grad
    }

    assert len(leaves) == 2 * len(lora_model.spec.modules) == len(trained)
    for (key, gradient), other in zip(gradients.items(), effective, strict=True):
        assert gradient.abs().max() > 1e-4, key
        scale = gradient.abs().max()
        torch.testing.assert_close(gradient / scale, other / scale, **EXACT)
        torch.testing.assert_close(gradient / scale, trained[key] / scale, **EXACT)
    assert all(p.grad is None and not p.requires_grad for p in lora_model.model.parameters())


def test_effective_weights_give_the_logits_of_the_batched_pass(
    lora_model: FunctionalLoRA, tiny_adapters: LoraBatch, ids: Tensor
) -> None:
    for index, state in enumerate(tiny_adapters.to_state_dicts()):
        output = torch.func.functional_call(
            lora_model.model,
            lora_model.apply_lora_weights(state),
            kwargs={"input_ids": ids, "use_cache": False},
        )
        batched = lora_model.forward_with_lora(tiny_adapters, ids)[index]
        torch.testing.assert_close(output.logits, batched, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_state(
    lora_model: FunctionalLoRA, tiny_base: Base, tiny_adapters: LoraBatch, ids: Tensor, side: str
) -> None:
    lengths = (9, 4, 6, 1)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    places = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        padded[row, place], mask[row, place] = ids[row, : lengths[row]], 1
    hidden = lora_model.forward_with_lora(tiny_adapters, padded, mask, hidden_only=True)
    for row, place in enumerate(places):
        alone = lora_model.forward_with_lora(
            tiny_adapters, ids[row : row + 1, : lengths[row]], hidden_only=True
        )[:, 0]
        torch.testing.assert_close(hidden[:, row, place], alone, **EXACT)
    peft = get_peft_model(
        fresh(tiny_base),
        LoraConfig(r=3, lora_alpha=6, target_modules=lora_model.spec.target_modules),
    )
    set_peft_model_state_dict(peft, tiny_adapters.to_state_dicts()[2])
    wanted = peft_output(peft, padded, mask)[0]
    torch.testing.assert_close(hidden[2][mask.bool()], wanted[mask.bool()], **EXACT)


def test_adapters_of_another_rank_or_base_are_refused_and_ids_of_another_number(
    lora_model: FunctionalLoRA, tiny_base: Base, tiny_adapters: LoraBatch, ids: Tensor
) -> None:
    def zeros(model: PreTrainedModel, rank: int) -> LoraBatch:
        spec = LoraSpec.from_model(model, rank, 6.0)
        return LoraBatch.unflatten(spec, torch.zeros(1, spec.n_values))

    tokenizer = tiny_base.tokenizer
    wider = new_model(
        ModelSize(hidden=40, layers=2, heads=4, kv_heads=2, intermediate=48), tokenizer, 0
    )
    deeper = new_model(
        ModelSize(hidden=32, layers=3, heads=4, kv_heads=2, intermediate=48), tokenizer, 0
    )
    for wrong in (zeros(tiny_base.model, 2), zeros(wider, 3), zeros(deeper, 3)):
        with pytest.raises(ValueError, match="another (rank or )?base"):
            lora_model.forward_with_lora(wrong, ids)
        with pytest.raises(ValueError, match="another (rank or )?base"):
            lora_model.apply_lora_weights(wrong.to_state_dicts()[0])
    with pytest.raises(ValueError, match="ids have shape"):
        lora_model.forward_with_lora(tiny_adapters, ids.expand(2, 4, 9))


def test_the_base_is_left_as_it_was_even_by_a_pass_that_fails(
    lora_model: FunctionalLoRA, tiny_base: Base, tiny_adapters: LoraBatch, ids: Tensor
) -> None:
    before = {k: v.clone() for k, v in lora_model.model.state_dict().items()}
    with torch.no_grad():
        wanted = lora_model.model(input_ids=ids).logits
    leaves = {n: a.clone().requires_grad_() for n, a in tiny_adapters.a.items()}
    lora_model.forward_with_lora(LoraBatch(leaves, tiny_adapters.b), ids).sum().backward()
    with pytest.raises(IndexError):
        lora_model.forward_with_lora(tiny_adapters, torch.full((1, 3), 10**6))
    with torch.no_grad():
        assert torch.equal(lora_model.model(input_ids=ids).logits, wanted)
    assert all(torch.equal(v, before[k]) for k, v in lora_model.model.state_dict().items())
    assert not any(
        m._forward_hooks for m in lora_model.model.modules() if isinstance(m, torch.nn.Linear)
    )


@pytest.mark.parametrize("scope", ["shared", "per_task"])
def test_differentiable_delta_equals_the_measured_one(
    lora_model: FunctionalLoRA, tiny_base: Base, tiny_adapters: LoraBatch, scope: str
) -> None:
    tasks = ["one", "two", "three"]
    texts = ["give the first word : apple river =>", "reverse : king lamp iron =>", "count =>"]
    if scope == "shared":
        probe_set = ProbeSet.shared("test", texts)
    else:
        answers = {task: [" ".join([" done"] * n) for n in (1, 3, 2)] for task in tasks}
        probe_set = ProbeSet.trajectories(
            {
                task: [Probe(t, a) for t, a in zip(texts, answers[task], strict=True)]
                for task in tasks
            }
        )
    probes = encode_probes(tiny_base.tokenizer, probe_set, tasks)
    measured = measure_deltas(
        lora_model.model, lora_model.spec, tiny_adapters, probes, scope == "shared", chunk=2
    )
    delta = compute_delta_differentiable(lora_model, tiny_adapters, probes, measured.base_APQD)
    torch.testing.assert_close(delta, measured.delta_APQD, **EXACT)
    assert delta[probes.valid_APQ].norm(dim=-1).min() > 0.1

    with torch.no_grad():
        base_states = read_states(lora_model.model, probes)
    torch.testing.assert_close(measured.base_APQD, base_states, **EXACT)
    leaves = LoraBatch(
        *(
            {n: t.clone().requires_grad_() for n, t in s.items()}
            for s in (tiny_adapters.a, tiny_adapters.b)
        )
    )
    compute_delta_differentiable(lora_model, leaves, probes, base_states).square().sum().backward()
    for tensor in (*leaves.a.values(), *leaves.b.values()):
        assert tensor.grad is not None and (tensor.grad.flatten(1).norm(dim=1) > 0).all()

    with pytest.raises(ValueError, match="other probes"):
        compute_delta_differentiable(lora_model, tiny_adapters, probes, measured.base_APQD[:, :2])
