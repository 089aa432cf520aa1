"""Loss terms: values and gradients beside other formulations, options, names, and terms of other packages."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dnd.importance import importance_weights
from dnd.model.decoderonly import weighted_token_mse
from peft import PeftModel
from term_steps import Scene, check_gradient, trial_batch
from test_bases import FAMILIES, write_family
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from llgbm.generator import GeneratorConfig
from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.adapters import adapter_config, save_adapter
from llgbm.losses import MultiTaskLoss, weight_loss
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import Base, load_base
from llgbm.runtime import UserError
from llgbm.terms import step as step_module
from llgbm.terms.answers import Answers
from llgbm.terms.delta import Delta
from llgbm.terms.delta_w import DeltaW
from llgbm.terms.kl import KL
from llgbm.terms.norms import L1, L2
from llgbm.terms.registry import Objective, built_in_terms, find_term, make_term
from llgbm.terms.term import MATCHES, READS, Term
from llgbm.terms.weight import Weight
from llgbm.training import TrainingConfig, Trial
from llgbm.world import World


@pytest.fixture(scope="module")
def scene(tiny_base: Base, tiny_spec: LoraSpec) -> Scene:
    return Scene.of(tiny_base, tiny_spec)


def torch_kl(student_SV: Tensor, teacher_SV: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence by torch's own function, mean over positions, times the temperature squared."""
    logs = (log_softmax(logits / temperature, -1) for logits in (student_SV, teacher_SV))
    return temperature**2 * kl_div(*logs, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradient_are_those_of_torch_on_the_merged_model(
    scene: Scene, temperature: float
) -> None:
    teacher_SV = scene.marked_logits(scene.teacher_AV).detach()

    def independent(values_AV: Tensor) -> Tensor:
        return torch_kl(scene.marked_logits(values_AV), teacher_SV, temperature)

    check_gradient(scene, KL(temperature), independent)


def test_kl_is_that_of_the_logits_of_peft(scene: Scene, tiny_base: Base, tmp_path: Path) -> None:
    def peft_logits(values_AV: Tensor, name: str) -> Tensor:
        states = LoraBatch.unflatten(scene.lora_model.spec, values_AV).to_state_dicts()
        found = []
        for row, state in enumerate(states):
            folder = tmp_path / f"{name}{row}"
            save_adapter(folder, state, adapter_config(scene.lora_model.spec, tiny_base.path))
            fresh = AutoModelForCausalLM.from_pretrained(tiny_base.path).float().eval()
            with torch.no_grad():
                model = PeftModel.from_pretrained(fresh, str(folder))
                logits = model(input_ids=scene.probes.ids_APT[row]).logits
            found.append(scene.read_marks(logits, row))
        return torch.cat(found)

    wanted = torch_kl(
        peft_logits(scene.student_AV, "student"), peft_logits(scene.teacher_AV, "teacher")
    )
    assert scene.value(KL(), scene.student_AV).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert wanted > 0.01


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "qwen2"])
def test_kl_reads_heads_with_scales_and_caps(kind: str, tmp_path: Path) -> None:
    targets, settings = FAMILIES[kind]
    write_family(tmp_path, kind, **settings)
    base = load_base(tmp_path)
    scene = Scene.of(base, LoraSpec.from_model(base.model, 2, 4.0, targets))
    with torch.no_grad():
        wanted = torch_kl(*map(scene.marked_logits, (scene.student_AV, scene.teacher_AV)))
    assert scene.value(KL(), scene.student_AV).item() == pytest.approx(
        wanted.item(), rel=1e-3, abs=1e-6
    )
    assert wanted > 1e-4


def test_top_k_tells_apart_the_teachers_likeliest_tokens_alone(scene: Scene) -> None:
    def independent(values_AV: Tensor) -> Tensor:
        found = []
        teacher_SV = scene.marked_logits(scene.teacher_AV).detach().softmax(-1)
        for p, q in zip(teacher_SV, scene.marked_logits(values_AV).softmax(-1), strict=True):
            best = p.argsort(descending=True)[:3]
            rest = torch.ones(len(p), dtype=torch.bool).index_fill(0, best, False)
            parts = [(p[i], q[i]) for i in best] + [(p[rest].sum(), q[rest].sum())]
            found.append(sum(a * (a.log() - b.log()) for a, b in parts))
        return torch.stack(found).mean()

    check_gradient(scene, KL(top_k=3), independent)
    whole, coarse = (scene.value(KL(top_k=k), scene.student_AV) for k in (0, 3))
    assert coarse < whole
    for k in (len(scene.marked_logits(scene.student_AV)[0]) + add for add in (-1, 0, 7)):
        assert torch.equal(scene.value(KL(top_k=k), scene.student_AV), whole)


def test_answers_are_the_cross_entropy_of_the_teachers_likeliest_tokens(scene: Scene) -> None:
    labels_S = scene.marked_logits(scene.teacher_AV).argmax(-1)

    def independent(values_AV: Tensor) -> Tensor:
        return cross_entropy(scene.marked_logits(values_AV), labels_S)

    check_gradient(scene, Answers(), independent)


@pytest.mark.parametrize("loss", ["cosine_norm", "mse_raw"])
def test_delta_is_that_of_states_of_the_merged_model(scene: Scene, loss: str) -> None:
    head = scene.lora_model.model.get_output_embeddings().weight
    inverse = torch.linalg.pinv(head.double())

    def states(values_AV: Tensor) -> Tensor:
        return scene.marked_logits(values_AV).double() @ inverse.T

    base_SD = states(torch.zeros_like(scene.teacher_AV)).detach()

    def independent(values_AV: Tensor) -> Tensor:
        pred, teacher = (states(v) - base_SD for v in (values_AV, scene.teacher_AV))
        if loss == "mse_raw":
            return (pred - teacher.detach()).square().mean().float()
        cosine = (pred * teacher).sum(-1) / (pred.norm(dim=-1) * teacher.norm(dim=-1))
        ratio = pred.norm(dim=-1) / teacher.norm(dim=-1)
        return (1 - cosine + (ratio - 1) ** 2).mean().float()

    check_gradient(scene, Delta(loss), independent, atol=1e-4)


@pytest.mark.parametrize("term", [KL(), KL(2.0, 2), Delta()])
def test_a_student_that_is_its_teacher_has_no_distance(scene: Scene, term: KL | Delta) -> None:
    tokens = scene.teacher_AV.clone().requires_grad_()
    value = scene.value(term, tokens)
    value.backward()
    assert abs(value.item()) < 1e-6 and tokens.grad.abs().max() < 1e-4


@pytest.mark.parametrize("term", [KL(), Answers()])
def test_padding_of_positions_counts_for_nothing(scene: Scene, term: KL | Answers) -> None:
    whole = scene.step(scene.student_AV)
    wider = {
        name: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 3) + (0, 2), value=0)
        for name, value in whole.batch.items()
        if name in ("positions", "valid", "base_states", "delta")
    }
    step = step_module.Step(
        {**whole.batch, **wider}, whole.tokens, whole.generator, whole.lora_model
    )
    assert torch.equal(term.value(step), term.value(whole))
    assert not whole.deltas.probes.valid_APQ.all(), "the scene has padding of its own"


def test_logits_in_pieces_have_the_same_value_and_gradient(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = (scene.student_AV.clone().requires_grad_() for _ in range(2))
    value = scene.value(KL(), whole)
    value.backward()
    monkeypatch.setattr(step_module, "PASS_LOGITS", 1)
    other = scene.value(KL(), pieces)
    other.backward()
    assert other.grad_fn is not None
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(pieces.grad, whole.grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("term", [KL(), Answers(), Delta()])
def test_what_cannot_be_compared_is_never_a_loss_of_zero(scene: Scene, term: KL) -> None:
    step = scene.step(scene.student_AV)
    nowhere = {**step.batch, "valid": torch.zeros_like(step.batch["valid"])}
    with pytest.raises(ValueError, match="no marked position is valid|empty"):
        term.value(step_module.Step(nowhere, step.tokens, step.generator, step.lora_model))
    poisoned = {**step.batch, "delta": torch.full_like(step.batch["delta"], math.nan)}
    with pytest.raises(ValueError, match="teacher's .* NaN"):
        term.value(step_module.Step(poisoned, step.tokens, step.generator, step.lora_model))
    with pytest.raises(ValueError, match="predicted .* NaN"):
        scene.value(term, torch.full_like(scene.student_AV, math.inf))


def test_weight_and_delta_sum_up_as_before(scene: Scene) -> None:
    step = scene.step(scene.student_AV)
    found = Objective.of({"delta": 0.7, "weight": 0.3}, {"delta.loss": "cosine"})(step)
    wanted = MultiTaskLoss(0.3, 0.7, "cosine")(
        step.delta_pred,
        step.deltas.delta_APQD,
        step.tokens,
        step.teacher_tokens,
        step.deltas.probes.valid_APQ,
    )
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_any_terms_are_summed_with_their_weights(scene: Scene) -> None:
    found = Objective.of({"kl": 2.0, "answers": 0.5, "weight": 0.0}, {})(
        scene.step(scene.student_AV)
    )
    assert list(found) == ["loss", "loss_answers", "loss_kl"]
    total = 2 * found["loss_kl"] + 0.5 * found["loss_answers"]
    torch.testing.assert_close(found["loss"], total)


def test_every_term_declares_what_it_is() -> None:
    assert list(built_in_terms())[:2] == ["weight", "delta"]
    for name, term in built_in_terms().items():
        assert find_term(name) is term and term.name == name
        assert term.title and set(term.reads) <= set(READS) and term.matches in MATCHES
        assert make_term(name, {}).identity == "", "a first version adds nothing to an id"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("l7", {}, "unknown loss term 'l7'; there are: weight, delta, "),
        ("nowhere.terms:L7", {}, "cannot be imported"),
        ("llgbm.losses:L7", {}, "has no 'L7'"),
        ("llgbm.losses:MultiTaskLoss", {}, "is no subclass of"),
        ("kl", {"kl.heat": 2}, "has no option 'heat'; it has: temperature, top_k"),
        ("kl", {"kl.temperature": "hot"}, "must be a number"),
        ("kl", {"kl.temperature": -1.0}, "must be above 0"),
        ("kl", {"kl.top_k": 2.5}, "must be a whole number"),
        ("kl", {"kl.top_k": "-3"}, "must be at least 1"),
        ("answers", {"answers.k": 1}, "it has none"),
    ],
)
def test_an_unknown_term_or_option_is_a_users_mistake(name: str, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_term(name, options)


def formed(values_AV: Tensor, spec: LoraSpec) -> Tensor:
    """[A, everything]: every ΔW formed and laid end to end."""
    batch = LoraBatch.unflatten(spec, values_AV.double())
    return torch.cat([(batch.b[name] @ batch.a[name]).flatten(1) for name in batch.a], dim=1)


@pytest.mark.parametrize("measure", ["cosine_norm", "relative"])
def test_delta_w_is_that_of_formed_matrices(scene: Scene, measure: str) -> None:
    teacher_AX = formed(scene.teacher_AV, scene.lora_model.spec)

    def independent(values_AV: Tensor) -> Tensor:
        own_AX = formed(values_AV, scene.lora_model.spec)
        if measure == "relative":
            error_A = (own_AX - teacher_AX).square().sum(1) / teacher_AX.square().sum(1)
            return error_A.mean().float()
        cosine_A = torch.nn.functional.cosine_similarity(own_AX, teacher_AX, dim=1)
        ratio_A = own_AX.norm(dim=1) / teacher_AX.norm(dim=1)
        return (1 - cosine_A + (ratio_A - 1) ** 2).mean().float()

    check_gradient(scene, DeltaW(measure), independent, atol=2e-5)


def test_delta_w_is_free_of_the_gauge_which_the_weight_loss_is_not(scene: Scene) -> None:
    spec = scene.lora_model.spec
    teacher = LoraBatch.unflatten(spec, scene.teacher_AV)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(9)) + 2 * torch.eye(3)
    turned = LoraBatch(
        {n: torch.linalg.inv(turn) @ a for n, a in teacher.a.items()},
        {n: b @ turn for n, b in teacher.b.items()},
    ).flatten(spec)
    for term, least in ((DeltaW(), 0.0), (DeltaW("relative"), 0.0), (Weight(), 1e-3)):
        value = scene.value(term, turned).item()
        assert value > least if least else abs(value) < 1e-5, term


def test_delta_w_of_nothing_is_finite_and_of_a_teacher_of_nothing_refused(scene: Scene) -> None:
    nothing = torch.zeros_like(scene.student_AV).requires_grad_()
    value = scene.value(DeltaW(), nothing)
    value.backward()
    assert value.item() == pytest.approx(2.0) and nothing.grad.isfinite().all()
    step = scene.step(scene.student_AV)
    empty = {**step.batch, "tokens": torch.zeros_like(step.teacher_tokens)}
    with pytest.raises(ValueError, match="teacher's ΔW is zero"):
        DeltaW().value(step_module.Step(empty, step.tokens, step.generator, step.lora_model))


@pytest.mark.parametrize(
    ("term", "function"),
    [(L1(), lambda v: v.abs().sum() / v.numel()), (L2(), lambda v: (v * v).sum() / v.numel())],
)
def test_sizes_are_those_of_a_and_b(scene: Scene, term: Term, function: Any) -> None:
    check_gradient(scene, term, function, atol=1e-8)


def test_labels_are_the_cross_entropy_of_true_answers_to_drawn_examples(
    world: World, config: TrainingConfig
) -> None:
    trial, batch = trial_batch(world, config, terms={"labels": 1.0})
    tokens = trial.generator(batch["condition"]).detach().requires_grad_()
    step = step_module.Step(
        batch, tokens, trial.generator, world.lora_model, prepared=trial.loss.prepared
    )
    value = trial.loss.terms[0].value(step)
    (got,) = torch.autograd.grad(value, tokens, retain_graph=True)

    each, pool = trial.loss.prepared["labels"]
    assert each == 32 and len(pool) == 32 * len(world.data.rows["train"])
    losses = []
    for place, (row, draw) in enumerate(zip(batch["row"], batch["draw"], strict=True)):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(int(draw)))
        state = step.adapters.select([place]).to_state_dicts()[0]
        weights = world.lora_model.apply_lora_weights(state)
        texts = pool.select(slice(int(row) * 32, int(row) * 32 + 32))
        own = EncodedPairs(texts.input_ids_ST[order[:2]], texts.targets_ST[order[:2]])
        logits = torch.func.functional_call(
            world.base.model, weights, kwargs={"input_ids": own.input_ids_ST}
        ).logits
        losses.append(
            cross_entropy(logits.flatten(0, 1), own.targets_ST.flatten(), ignore_index=-100)
        )
    wanted = torch.stack(losses).mean()
    torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4)
    (other,) = torch.autograd.grad(wanted, tokens)
    torch.testing.assert_close(got, other, atol=1e-6, rtol=1e-3)


def test_labelled_examples_are_of_the_rows_own_tasks_and_of_no_evaluation(world: World) -> None:
    data, suite = world.data, world.config.suite
    assert data.labelled is not None
    tasks = [data.tasks[row] for row in data.rows["train"]]
    texts = world.base.tokenizer.batch_decode(data.labelled.input_ids_ST, skip_special_tokens=True)
    for index, task in enumerate(tasks):
        wanted = suite.examples(task, "train", 32, "labels")
        assert texts[index * 32].startswith(wanted[0].prompt), task
    others = {
        e.prompt for task in tasks for e in suite.examples(task, "evaluation", 24, "evaluation")
    }
    assert not any(text.startswith(prompt) for text in texts for prompt in others)


@pytest.mark.parametrize("options", [{"labels.examples": 0}, {"labels.examples": 33}])
def test_labels_that_there_are_not_are_refused(
    world: World, config: TrainingConfig, options: dict
) -> None:
    with pytest.raises(UserError, match="labels.examples is"):
        trial_batch(world, config, terms={"labels": 1}, term_options=options)
    bare = replace(world.data, labelled=None)
    own = replace(config, terms={"labels": 1})
    with pytest.raises(UserError, match="holds no labelled examples"):
        Trial(own, bare, world.lora_model)


@pytest.mark.parametrize("name", ["default", "hyperconv"])
def test_importance_weighs_tokens_as_dnd_does(
    world: World, config: TrainingConfig, name: str
) -> None:
    config = replace(config, generator=GeneratorConfig(name, hidden=8))
    trial, batch = trial_batch(world, config, terms={"importance": 1.0})
    spec, values_AV = world.bank.spec, world.data.values_AV[list(world.data.rows["train"])]
    value = trial.compute_loss(batch)["loss_importance"]
    pred, teacher = trial.generator(batch["condition"]).detach(), batch["tokens"]
    if name == "hyperconv":
        states = LoraBatch.unflatten(spec, values_AV).to_state_dicts()
        weight_U = importance_weights(states, trial.generator.standardiser.tokenizer)
        wanted = weighted_token_mse(pred, teacher, weight_U)
    else:
        parts = [rows * columns for _, _, (rows, columns) in spec.pieces]
        deviation = values_AV.std(0, correction=0)
        weights = [part.mean() / deviation.mean() for part in deviation.split(parts)]
        errors = (pred - teacher).square().split(parts, dim=1)
        wanted = sum(w * e.sum() for w, e in zip(weights, errors, strict=True)) / pred.numel()
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-4, atol=1e-6)
    assert value.item() != pytest.approx(weight_loss(pred, teacher).item(), rel=1e-4)


def test_every_term_trains_and_lowers_itself(world: World, config: TrainingConfig) -> None:
    for name in set(built_in_terms()) - {"weight", "delta"}:
        trial, batch = trial_batch(world, config, terms={name: 1.0})
        losses = [trial.advance(batch)[f"loss/{name}"] for _ in range(4)]
        assert losses[-1] < losses[0], (name, losses)
