"""Score a model: answer loss, greedy decoding and exact match, alone or under many adapters.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from llgbm.lora.adapters import LoraBatch, LoraSpec
from llgbm.lora.apply import (
    PASS_LOGITS,
    Applied,
    adapters_applied,
    chunks,
    head_logits,
    quickest_tokens,
    states_at_marks,
)
from llgbm.models.encoding import (
    EncodedPairs,
    encode_pairs,
    encode_prompts,
    example_prompt,
    prompt_tokens,
)
from llgbm.models.load import Base
from llgbm.tasks.suite import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llgbm.models.reading import Writer

# The texts of an adapter are read in up to so many parts of alike lengths, each of at least so many: less is padding.
PARTS, TEXTS_A_PART = 4, 4


def answer_loss(model: PreTrainedModel, texts: EncodedPairs) -> Tensor:
    """Return the mean cross-entropy over the answer tokens and the end token; the prompt is not learnt."""
    return _answer_losses(model, texts, "mean")


def _answer_losses(
    model: PreTrainedModel, texts: EncodedPairs, reduction: str, applied: Applied | None = None
) -> Tensor:
    marked = texts.targets_ST >= 0
    logits = head_logits(model, states_at_marks(model, texts.input_ids_ST, marked, applied))
    targets = texts.targets_ST[marked]
    return nn.functional.cross_entropy(logits.float(), targets, reduction=reduction)


def encode_examples(base: Base, examples: Sequence[Example]) -> EncodedPairs:
    """Encode examples for a base, on its device; those that are turns of a chat in the base's own template."""
    pairs = [(example_prompt(base.tokenizer, e), e.answer) for e in examples]
    return encode_pairs(base.tokenizer, pairs).to(base.model.device)


def adapter_losses(
    model: PreTrainedModel, spec: LoraSpec, batch: LoraBatch, texts: EncodedPairs
) -> Tensor:
    """Mean answer cross-entropy [A] of each adapter on its own texts (adapter-major)."""
    losses_ST = token_losses(model, texts, Applied(batch, spec.scaling))
    per_adapter = losses_ST.view(batch.n_adapters, -1).sum(1)
    return per_adapter / (texts.targets_ST >= 0).view(batch.n_adapters, -1).sum(1)


def token_losses(
    model: PreTrainedModel, texts: EncodedPairs, applied: Applied | None = None
) -> Tensor:
    """Return the cross-entropy [S, T] of every answer token, 0 elsewhere, under adapters given or applied by hooks."""
    losses = _answer_losses(model, texts, "none", applied)
    marked = texts.targets_ST >= 0
    return torch.zeros(marked.shape, device=losses.device).masked_scatter(marked, losses)


class Continuation(NamedTuple):
    """Text that a model wrote; `is_cut` where it had not ended by its last token allowed."""

    text: str
    is_cut: bool


def greedy_answers(
    base: Base,
    spec: LoraSpec,
    batch: LoraBatch,
    prompts: Sequence[Sequence[str]],
    max_tokens: int = 24,
) -> list[list[str]]:
    """Texts of `greedy_continuations`."""
    found = greedy_continuations(base, spec, batch, prompts, max_tokens)
    return [[answer.text for answer in own] for own in found]


def greedy_continuations(
    base: Base,
    spec: LoraSpec,
    batch: LoraBatch,
    prompts: Sequence[Sequence[str]],
    max_tokens: int,
) -> list[list[Continuation]]:
    """Greedy continuations of each adapter on its own prompts, up to the end token or `max_tokens`.

    Raises ValueError where there are not as many lists of prompts as adapters, all of one length.
    """
    if (
        len(prompts) != batch.n_adapters
        or len({len(own) for own in prompts}) != 1
        or not prompts[0]
    ):
        raise ValueError(
            f"{len(prompts)} lists of prompts for {batch.n_adapters} adapters: each needs one as long"
        )
    longest = max(map(len, prompt_tokens(base.tokenizer, list(chain.from_iterable(prompts)))))
    answers: list[list[Continuation]] = []
    for rows in chunks(batch.n_adapters, len(prompts[0]) * (longest + max_tokens)):
        flat = list(chain.from_iterable(prompts[rows]))
        with adapters_applied(base.model, batch.select(rows), spec.scaling):
            texts = iter(continuations(base, flat, max_tokens))
        answers += [list(islice(texts, len(own))) for own in prompts[rows]]
    return answers


def continue_texts(base: Base | Writer, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """Texts of `continuations`."""
    return [answer.text for answer in continuations(base, prompts, max_tokens)]


def continuations(
    base: Base | Writer, prompts: Sequence[str], max_tokens: int
) -> list[Continuation]:
    """Return greedy continuations under whatever adapters are applied, one pass of the library's `generate`."""
    ids, mask = encode_prompts(base.tokenizer, prompts, padding="left")
    with torch.no_grad():
        written = cast(Any, base.model).generate(
            input_ids=ids.to(base.model.device),
            attention_mask=mask.to(base.model.device),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
    new = written[:, ids.shape[1] :]
    texts = base.tokenizer.batch_decode(new, skip_special_tokens=True)
    ends = torch.tensor(end_tokens(base.model), device=new.device)
    is_cut = ~torch.isin(new, ends).any(1)
    return [Continuation(*pair) for pair in zip(texts, is_cut.tolist(), strict=True)]


def exact_match(
    base: Base,
    spec: LoraSpec,
    batch: LoraBatch,
    examples: Sequence[Sequence[Example]],
    chunk: int = 48,
) -> Tensor:
    """Exact-match accuracy [A] of greedy decoding on each adapter's examples, in one teacher-forced pass.

    Greedy decoding gives the wanted answer if and only if every answer token (the end token too) is the most likely
    one after the right prefix; so no token needs to be generated. Raises ValueError for a mismatch in number.
    """
    if (
        len(examples) != batch.n_adapters
        or len({len(own) for own in examples}) != 1
        or not examples[0]
    ):
        raise ValueError(
            f"{len(examples)} lists of examples for {batch.n_adapters} adapters: each needs one, all as long"
        )
    texts = encode_examples(base, list(chain.from_iterable(examples)))
    return accuracy_per_adapter(base.model, spec, batch, texts, chunk)


def accuracy_per_adapter(
    model: PreTrainedModel,
    spec: LoraSpec,
    batch: LoraBatch,
    texts: EncodedPairs,
    at_most: int = 48,
) -> Tensor:
    """Return the exact-match accuracy [A] of each adapter on its own texts (adapter-major), `at_most` in one pass."""
    return right_per_adapter(model, spec, batch, texts, at_most).float().mean(1)


def right_per_adapter(
    model: PreTrainedModel,
    spec: LoraSpec,
    batch: LoraBatch,
    texts: EncodedPairs,
    at_most: int = 48,
) -> Tensor:
    """Return whether each adapter gives the answers of its own texts (adapter-major), [A, N]."""
    lengths_AN = texts.lengths_S.view(batch.n_adapters, -1)
    right_AN = torch.zeros_like(lengths_AN, dtype=torch.bool)
    for rows_K, places_KQ in _alike_lengths(lengths_AN, at_most):
        own = texts.select((rows_K[:, None] * lengths_AN.shape[1] + places_KQ).flatten())
        applied = Applied(batch.select(rows_K.tolist()), spec.scaling)
        with torch.no_grad():
            right_S = right_answers(model, own, applied)
        right_AN[rows_K[:, None], places_KQ] = right_S.view(places_KQ.shape)
    return right_AN


def _alike_lengths(lengths_AN: Tensor, at_most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield up to `at_most` adapters [K] and places [K, Q] of texts of theirs for one pass, short texts first."""
    n, tokens = lengths_AN.shape[1], quickest_tokens(lengths_AN.device)
    by_length_AN = lengths_AN.argsort(dim=1, stable=True)
    for places_AQ in by_length_AN.split(max(TEXTS_A_PART, -(-n // PARTS)), dim=1):
        longest_A = lengths_AN.gather(1, places_AQ).amax(1)
        rows_A = longest_A.argsort(dim=0, stable=True)
        tokens_a_row = places_AQ.shape[1] * int(longest_A.max())
        for own in chunks(len(rows_A), tokens_a_row, at_most, tokens):
            yield rows_A[own], places_AQ[rows_A[own]]


def right_answers(
    model: PreTrainedModel, texts: EncodedPairs, applied: Applied | None = None
) -> Tensor:
    """Return whether greedy decoding would give the answer, [S], under adapters given or applied by hooks."""
    marked = texts.targets_ST >= 0
    states = states_at_marks(model, texts.input_ids_ST, marked, applied)
    pieces = states.split(max(1, PASS_LOGITS // model.config.get_text_config().vocab_size))
    likeliest = torch.cat([head_logits(model, piece).argmax(-1) for piece in pieces])
    targets = texts.targets_ST[marked]
    right = likeliest == targets
    ends = torch.tensor(end_tokens(model), device=right.device)
    right |= torch.isin(targets, ends) & torch.isin(likeliest, ends)
    wrong = torch.zeros(marked.shape, dtype=torch.bool, device=right.device).masked_scatter(
        marked, ~right
    )
    return ~wrong.any(1)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the tokens that decoding stops at."""
    ends = model.generation_config.eos_token_id
    return [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


def base_accuracy(base: Base, examples: Sequence[Example]) -> float:
    """Exact-match accuracy of the base without any adapter."""
    return base_right(base, encode_examples(base, examples)).float().mean().item()


def base_right(base: Base, texts: EncodedPairs) -> Tensor:
    """Return whether the base without any adapter gives the answers of texts, [S]."""
    right_S = torch.zeros(len(texts), dtype=torch.bool, device=texts.input_ids_ST.device)
    by_length_S = texts.lengths_S.argsort(dim=0, stable=True)
    longest, tokens = texts.input_ids_ST.shape[1], quickest_tokens(right_S.device)
    for rows in chunks(len(texts), longest, at_most=len(texts), tokens=tokens):
        own = by_length_S[rows]
        with torch.no_grad():
            right_S[own] = right_answers(base.model, texts.select(own))
    return right_S
