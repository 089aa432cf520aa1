from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llgbm.lora import LoraBatch, LoraSpec
from llgbm.lora.apply import Applied, adapters_applied
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import Base
from llgbm.models.scoring import (
    adapter_losses,
    base_accuracy,
    base_right,
    continue_texts,
    encode_examples,
    exact_match,
    greedy_answers,
    greedy_continuations,
    right_answers,
    right_per_adapter,
)
from llgbm.runtime import UserError
from llgbm.tasks.suite import Example
from llgbm.tasks.synthetic import SyntheticSuite
from llgbm.teachers.bank import Bank, read_manifest
from llgbm.teachers.build import build_bank
from llgbm.teachers.rounds import Classroom
from llgbm.teachers.train import (
    Pupil,
    TeacherConfig,
    example_source,
    shared_initial_a,
    train_teachers,
)
from llgbm.world import World

SUITE = SyntheticSuite(5, 4, n_val=2, n_test=4, n_sealed=0, n_unseen=0)
TASKS = ("copy-plain", "reverse-brackets", "count-quotes")
CONFIG = TeacherConfig(rank=3, alpha=6.0, steps=8, examples=3, learning_rate=1e-2, betas=(0.7, 0.9))


def fresh(base: Base) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base.path).float().eval()


def generated(model: PreTrainedModel, base: Base, prompt: str, max_tokens: int = 24) -> list[int]:
    """The new tokens of `generate`, greedy, one prompt at a time; the end token is the last where it came."""
    ids = torch.tensor([base.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_tokens,
        )
    return output[0, ids.shape[1] :].tolist()


def test_answers_in_any_order_and_in_pieces_are_those_of_each_adapter_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are read by length and a few at once; each result is that of its own adapter and text."""
    base, bank, suite = world.base, world.bank, world.config.suite
    batch, tasks = bank.load(), list(bank.adapters.values())
    rows = list(range(0, batch.n_adapters, 3))
    examples = [suite.examples(tasks[row], "train", 9, "pieces") for row in rows]
    texts = encode_examples(base, [e for own in examples for e in own])
    wanted = torch.stack(
        [
            right_answers(
                base.model,
                encode_examples(base, own),
                Applied(batch.select([row]), bank.spec.scaling),
            )
            for row, own in zip(rows, examples, strict=True)
        ]
    )
    assert 0 < wanted.float().mean() < 1
    for tokens in (50, 2**13):
        monkeypatch.setattr("llgbm.lora.apply.CPU_TOKENS", tokens)
        found = right_per_adapter(base.model, bank.spec, batch.select(rows), texts)
        assert torch.equal(found, wanted)


def test_the_bases_answers_are_found_in_the_order_of_the_texts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is asked for its own greedy answers, cut short for every other text."""
    base, suite = world.base, world.config.suite
    asked = [suite.examples(task, "train", 1, "base")[0] for task in suite.split.tasks][:12]
    own = continue_texts(base, [e.prompt for e in asked], 24)
    examples = [
        Example(e.prompt, answer if place % 2 else "red")
        for place, (e, answer) in enumerate(zip(asked, own, strict=True))
    ]
    monkeypatch.setattr("llgbm.lora.apply.CPU_TOKENS", 60)
    found = base_right(base, encode_examples(base, examples)).tolist()
    alone = [bool(base_right(base, encode_examples(base, [e]))) for e in examples]
    assert found == alone and any(found) and not all(found)


def test_exact_match_is_that_of_generate_under_merged_weights(world: World) -> None:
    base, bank, adapter_ids = world.base, world.bank, list(world.bank.adapters)[::3]
    batch = LoraBatch.from_state_dicts(
        [world.bank.load().to_state_dicts()[i] for i in range(0, 20, 3)]
    )
    end = base.tokenizer.eos_token_id
    examples: list[list[Example]] = []
    wanted: list[list[bool]] = []
    answers: list[list[str]] = []
    prompts: list[list[str]] = []
    for adapter_id in adapter_ids:
        model = PeftModel.from_pretrained(
            fresh(base), str(bank.adapter_folder(adapter_id))
        ).merge_and_unload()
        own = world.config.suite.examples(
            bank.adapters[adapter_id], "evaluation", 5, "against generate"
        )
        tokens = [generated(model, base, e.prompt) for e in own]
        said = [base.tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
        tried = [
            *own,
            *(Example(e.prompt, text) for e, text in zip(own, said, strict=True)),
            *(Example(e.prompt, f"{text} done") for e, text in zip(own, said, strict=True)),
            *(
                Example(e.prompt, text.rpartition(" ")[0])
                for e, text in zip(own, said, strict=True)
            ),
        ]
        closed = [
            [*base.tokenizer(e.answer, add_special_tokens=False)["input_ids"], end] for e in tried
        ]
        examples.append(tried)
        wanted.append([answer == tokens[i % 5] for i, answer in enumerate(closed)])
        prompts.append([e.prompt for e in own])
        answers.append(said)
    assert 0.1 < torch.tensor(wanted).float().mean() < 0.9
    assert len({len(text.split()) for own in answers for text in own}) >= 2

    got = exact_match(base, bank.spec, batch, examples, chunk=3)
    torch.testing.assert_close(got, torch.tensor(wanted).float().mean(1))
    flat = encode_examples(base, [e for own in examples for e in own])
    with torch.no_grad(), adapters_applied(base.model, batch, bank.spec.scaling):
        assert right_answers(base.model, flat).view(len(examples), -1).tolist() == wanted
    for example, right in zip(examples[1], wanted[1], strict=True):
        assert exact_match(base, bank.spec, batch.select([1]), [[example]]).item() == right
    assert greedy_answers(base, bank.spec, batch, prompts) == answers
    # An answer is cut where `generate` had not come to an end token.
    short = greedy_continuations(base, bank.spec, batch, prompts, 1)
    for adapter_id, own, asked in zip(adapter_ids, short, prompts, strict=True):
        model = PeftModel.from_pretrained(
            fresh(base), str(bank.adapter_folder(adapter_id))
        ).merge_and_unload()
        ended = [end in generated(model, base, prompt, 1) for prompt in asked]
        assert [answer.is_cut for answer in own] == [not one for one in ended]
    assert 0 < sum(answer.is_cut for own in short for answer in own)
    whole = greedy_continuations(base, bank.spec, batch, prompts, 24)
    assert not any(answer.is_cut for own in whole for answer in own)
    with_base = [
        Example(p, base.tokenizer.decode(generated(base.model, base, p)[:-1])) for p in prompts[0]
    ]
    assert base_accuracy(base, with_base) == 1.0


def test_lists_that_do_not_fit_the_adapters_are_refused(world: World) -> None:
    batch = world.bank.load().select([0, 1])
    with pytest.raises(ValueError, match="each needs one"):
        exact_match(world.base, world.bank.spec, batch, [[Example("a", " b")]])
    unlike = [[Example("a", " b")] * n for n in (2, 4)]
    with pytest.raises(ValueError, match="as long"):
        exact_match(world.base, world.bank.spec, batch, unlike)
    with pytest.raises(ValueError, match="as long"):
        greedy_answers(
            world.base, world.bank.spec, batch, [[e.prompt for e in own] for own in unlike]
        )
    with pytest.raises(ValueError, match="1 lists of prompts for 2 adapters"):
        greedy_answers(world.base, world.bank.spec, batch, [["a"]])


def trained(base: Base, spec: LoraSpec, tasks: Sequence[str]) -> LoraBatch:
    pupils = [Pupil(task, 0) for task in tasks]
    return train_teachers(base, spec, CONFIG, example_source(SUITE, base, pupils, CONFIG))


@pytest.fixture(scope="module")
def together(tiny_base: Base, tiny_spec: LoraSpec) -> LoraBatch:
    return trained(tiny_base, tiny_spec, TASKS)


def test_teachers_trained_together_are_those_trained_alone(
    tiny_base: Base, tiny_spec: LoraSpec, together: LoraBatch
) -> None:
    start = LoraBatch(
        {n: a[None] for n, a in shared_initial_a(tiny_spec, CONFIG.seed).items()},
        {n: torch.zeros_like(b[:1]) for n, b in together.b.items()},
    ).flatten(tiny_spec)
    moved = (together.flatten(tiny_spec) - start).abs().mean()
    for row, task in enumerate(TASKS):
        alone = trained(tiny_base, tiny_spec, [task]).flatten(tiny_spec)[0]
        assert (alone - together.flatten(tiny_spec)[row]).abs().mean() < 1e-3 * moved
    assert (
        together.flatten(tiny_spec)[0] - together.flatten(tiny_spec)[1]
    ).abs().mean() > 0.1 * moved


def answer_loss_by_peft(model: nn.Module, texts: EncodedPairs) -> Tensor:
    logits = model(input_ids=texts.input_ids_ST, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), texts.targets_ST.flatten(), ignore_index=-100
    )


def test_a_teacher_is_what_peft_and_adam_train(
    tiny_base: Base, tiny_spec: LoraSpec, together: LoraBatch
) -> None:
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=list(tiny_spec.target_modules), task_type="CAUSAL_LM"
    )
    model = get_peft_model(fresh(tiny_base), config)
    initial = {
        f"base_model.model.{name}.lora_{side}.weight": value
        for name, a in shared_initial_a(tiny_spec, CONFIG.seed).items()
        for side, value in (("A", a), ("B", torch.zeros_like(together.b[name][0])))
    }
    set_peft_model_state_dict(model, initial)
    trainable = {
        n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad
    }
    optimizer = torch.optim.Adam(trainable.values(), lr=CONFIG.learning_rate, betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, CONFIG.steps, eta_min=CONFIG.learning_rate / 20
    )
    texts_at = example_source(SUITE, tiny_base, [Pupil(TASKS[1], 0)], CONFIG)
    for step in range(CONFIG.steps):
        optimizer.zero_grad()
        answer_loss_by_peft(model, texts_at(step)).backward()
        optimizer.step()
        schedule.step()
    ours = together.to_state_dicts()[1]
    assert trainable.keys() == ours.keys()
    moved = torch.cat([(trainable[k] - initial[k]).flatten() for k in ours]).abs().mean()
    apart = torch.cat([(trainable[k] - ours[k]).flatten() for k in ours]).abs().mean()
    assert apart < 1e-3 * moved


def test_teachers_in_parts_of_alike_lengths_are_those_of_one_pass(
    tiny_base: Base, tiny_spec: LoraSpec, together: LoraBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def losses(
        model: PreTrainedModel, spec: LoraSpec, own: LoraBatch, texts: EncodedPairs
    ) -> Tensor:
        seen.append((own.n_adapters, *texts.input_ids_ST.shape))
        return adapter_losses(model, spec, own, texts)

    monkeypatch.setattr("llgbm.teachers.train.adapter_losses", losses)
    monkeypatch.setattr("llgbm.teachers.train.TEXTS_A_PART", 3)
    apart = trained(tiny_base, tiny_spec, TASKS)
    start = shared_initial_a(tiny_spec, CONFIG.seed)
    moved = torch.stack([(a - start[n]).abs().mean() for n, a in together.a.items()]).mean()
    for one, other in ((apart.a, together.a), (apart.b, together.b)):
        for name, tensor in one.items():
            assert (tensor - other[name]).abs().mean() < 1e-3 * moved
    assert {own[:2] for own in seen} == {(1, 3)} and len(seen) == 3 * CONFIG.steps
    widths = [width for _, _, width in seen]
    by_step = [widths[i : i + 3] for i in range(0, len(widths), 3)]
    assert all(own == sorted(own) for own in by_step) and any(a[0] < a[2] for a in by_step)


def test_training_lowers_every_teachers_own_loss(
    tiny_base: Base, tiny_spec: LoraSpec, together: LoraBatch
) -> None:
    own = [e for t in TASKS for e in SUITE.examples(t, "evaluation", 16, "loss")]
    texts = encode_examples(tiny_base, own)
    nothing = LoraBatch(together.a, {n: torch.zeros_like(b) for n, b in together.b.items()})
    with torch.no_grad():
        before, after = (
            adapter_losses(tiny_base.model, tiny_spec, b, texts) for b in (nothing, together)
        )
    assert (after < before - 0.1).all()


def test_bank_has_the_layout_that_users_know(tiny_base: Base, tmp_path: Path) -> None:
    config = TeacherConfig(
        rank=2,
        per_task=2,
        steps=2,
        examples=2,
        condition_train=6,
        condition_evaluation=3,
        trajectories=2,
    )
    bank = build_bank(tmp_path, tiny_base, SUITE, config)
    assert list(bank.adapters) == [f"{task}_{i}" for task in SUITE.split.tasks for i in range(2)]
    for adapter_id, task in bank.adapters.items():
        folder = bank.folder / "checkpoints" / task / adapter_id
        assert {p.name for p in folder.iterdir()} == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "prompts.json",
        }
        prompts = bank.prompts(adapter_id)
        assert (len(prompts["train"]), len(prompts["evaluation"])) == (6, 3)
        assert not set(prompts["train"]) & set(prompts["evaluation"])
    batch = bank.load()
    assert batch.n_adapters == 2 * len(SUITE.tasks)
    values = batch.flatten(bank.spec)
    assert all(
        (values[2 * i] - values[2 * i + 1]).abs().max() > 1e-3 for i in range(len(SUITE.tasks))
    )
    trajectories = bank.trajectories()
    assert (
        set(trajectories.probes) == set(SUITE.split.tasks) and len(trajectories.of(TASKS[0])) == 2
    )

    weights = bank.adapter_folder("copy-plain_1") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="copy-plain_1"):
        bank.load()
    rebuilt = build_bank(tmp_path, tiny_base, SUITE, config)
    assert torch.equal(rebuilt.load().flatten(bank.spec), values)
    assert rebuilt.adapters == bank.adapters and rebuilt.facts["base_accuracy"] == 0.0
    stored = read_manifest(rebuilt.folder)
    assert stored["measured"]["accuracy"].keys() == stored["adapters"].keys()
    assert Bank.open(rebuilt.folder, tiny_base).load().n_adapters == batch.n_adapters


def test_a_bank_of_nothing_is_refused() -> None:
    for name in ("per_task", "steps", "examples", "trajectories", "more_examples"):
        with pytest.raises(UserError, match="at least one"):
            TeacherConfig(**{name: 0})

    for values in ({"rounds": 0}, {"target": 1.5}, {"target": -0.1}):
        with pytest.raises(UserError, match="at least one round"):
            TeacherConfig(**values)

    for betas in ((1.0, 0.9), (0.9, -0.1), (0.9, math.nan), (0.9,)):
        with pytest.raises(UserError, match="betas of teachers"):
            TeacherConfig(betas=betas)


def test_only_laggards_go_on_and_those_that_are_good_stay_as_they_are(
    tiny_base: Base, tiny_spec: LoraSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracies of the gate are made up, so that the second teacher lags for two rounds and the third for one.

    Each round after the first has steps of twice the examples.
    """
    measured = iter([[1.0, 0.2, 0.9], [0.5, 0.98], [1.0]])
    monkeypatch.setattr(
        "llgbm.teachers.rounds.exact_match", lambda *_: torch.tensor(next(measured))
    )
    config = replace(CONFIG, target=0.97, rounds=5, more_examples=2)
    pupils = [Pupil(task, 0) for task in TASKS]
    found = Classroom(tiny_base, tiny_spec, config, SUITE).train(pupils)
    assert found.rounds == (1, 3, 2) and found.accuracy_A.tolist() == pytest.approx([1, 1, 0.98])
    once = trained(tiny_base, tiny_spec, TASKS)
    assert torch.equal(found.adapters.flatten(tiny_spec)[0], once.flatten(tiny_spec)[0])

    expected, later = once.select([1, 2]), replace(CONFIG, examples=2 * CONFIG.examples)
    for number in (1, 2):
        left = [Pupil(task, 0) for task in TASKS[1 : 4 - number]]
        source = example_source(SUITE, tiny_base, left, later, number)
        expected = train_teachers(
            tiny_base, tiny_spec, later, source, expected.select(slice(0, len(left)))
        )
    assert torch.equal(found.adapters.flatten(tiny_spec)[1], expected.flatten(tiny_spec)[0])


def test_laggards_end_at_the_cap_and_are_told(tiny_base: Base, tmp_path: Path) -> None:
    config = replace(
        CONFIG, steps=1, target=1.0, rounds=2, condition_train=2, condition_evaluation=1
    )
    bank = build_bank(tmp_path, tiny_base, SUITE, replace(config, trajectories=1))
    assert bank.facts["teachers_below_target"] == len(SUITE.split.tasks)
    entries = read_manifest(bank.folder)["adapters"].values()
    assert {entry["rounds"] for entry in entries} == {2}


def test_other_trajectories_are_answered_by_the_same_teachers(
    tmp_path: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, steps=2, examples=1, condition_train=2, condition_evaluation=2)
    suite = SyntheticSuite(2, 2, n_val=1, n_test=1, n_sealed=0, n_unseen=0)
    first = build_bank(tmp_path, tiny_base, suite, config)
    monkeypatch.setattr("llgbm.teachers.rounds.train_teachers", None)
    more = replace(config, trajectories=18, max_tokens=3)
    second = build_bank(tmp_path, tiny_base, suite, more)
    assert second.hash != first.hash and second.adapters == first.adapters
    for adapter_id in first.adapters:
        assert second.prompts(adapter_id) == first.prompts(adapter_id)
    same = second.load().flatten(second.spec), first.load().flatten(first.spec)
    assert torch.equal(*same)
    short, long = (bank.trajectories() for bank in (second, first))
    for task in suite.tasks:
        assert len(short.of(task.name)) == 18 and len(long.of(task.name)) == 16
        for cut, whole in zip(short.of(task.name), long.of(task.name), strict=False):
            assert cut.prompt == whole.prompt
            # A token may end within a letter.
            assert str(whole.continuation).startswith(str(cut.continuation).rstrip("\ufffd"))


def test_answers_that_are_cut_are_counted(world: World, capsys: pytest.CaptureFixture) -> None:
    batch = world.bank.load().select([0])
    prompts = [[probe.prompt for probe in next(iter(world.bank.trajectories().probes.values()))]]
    whole = greedy_continuations(world.base, world.bank.spec, batch, prompts, 60)[0]
    tokens = [len(world.base.tokenizer(text)["input_ids"]) for text, _ in whole]
    for limit in (1, 3, 5):
        cut = greedy_continuations(world.base, world.bank.spec, batch, prompts, limit)[0]
        # The end token counts, too.
        wanted = [is_cut or n + 1 > limit for (_, is_cut), n in zip(whole, tokens, strict=True)]
        assert [is_cut for _, is_cut in cut] == wanted
