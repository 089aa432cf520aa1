"""Build and pretrain the embedded base models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import ModelSize, qwen2_config
from llgbm.models.muon import Muon
from llgbm.models.packing import packed_answer_loss
from llgbm.runtime import UserError, keep_freed_memory, progress, seed_everything

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_VERSION = 5
# Shares of the steps over which the rates rise and fall.
RISE, FALL = 0.05, 0.4
PAD, EOS = "<|endoftext|>", "<|im_end|>"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PretrainConfig:
    """Settings for pretraining a base on instructions whose answers follow another task.

    For the first `bare_fraction` of the steps the prompts go without the instruction, which says nothing anyway. After
    `even_fraction` of the steps, and every `measure_every` steps from then on, the base is measured, and practises most
    what it cannot do yet. A base with a task below `target` (`Ability.worst`) goes on at half the rates for
    `more_steps`, in up to `rounds` rounds.
    Matrices are stepped by Muon at `learning_rate`, embeddings and vectors by AdamW at `vector_rate`.
    """

    steps: int = 880
    batch_size: int = 64
    learning_rate: float = 0.01
    vector_rate: float = 3e-3
    bare_fraction: float = 0.4
    seed: int = 0
    target: float = 0.7
    rounds: int = 8
    more_steps: int = 200
    even_fraction: float = 0.5
    measure_every: int = 55

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.rounds, self.more_steps, self.measure_every)
        if min(counts) < 1:
            raise UserError(
                "pretraining needs at least one step, one round, one example a step and one step between measurements"
            )
        if not 0 <= self.target <= 1:
            raise UserError(
                f"the target of pretraining is a share from 0 to 1, not {self.target:g}"
            )

    def of_round(self, number: int) -> PretrainConfig:
        """Return the settings of a round, counted from 0."""
        if number == 0:
            return self
        return replace(
            self,
            steps=self.more_steps,
            learning_rate=self.learning_rate / 2,
            vector_rate=self.vector_rate / 2,
            bare_fraction=0.0,
            even_fraction=0.0,
        )

    @property
    def measured_at(self) -> range:
        """Steps before which the base is measured; a later round begins with what was measured before it."""
        first = int(self.even_fraction * self.steps) or self.measure_every
        return range(first, self.steps, self.measure_every)


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE tokenizer of Qwen2's kind in which every word of `texts` is one token (and any text encodes).

    It is built with the pre-tokenizer of Qwen2, since `AutoTokenizer` reads a Qwen2 folder with that one.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="right"
    )


def new_model(size: ModelSize, tokenizer: Any, seed: int) -> PreTrainedModel:
    """Freshly initialised `Qwen2ForCausalLM` of this size."""
    from transformers import Qwen2ForCausalLM

    seed_everything(seed)
    return Qwen2ForCausalLM(
        qwen2_config(
            size,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).float()


def pretrain(
    model: PreTrainedModel,
    config: PretrainConfig,
    next_batch: Callable[[int, bool], EncodedPairs],
    device: str = "cpu",
    measure: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train all weights on the answers of `next_batch(batch_size, bare)`; return the loss of every step.

    `measure` is called before the steps `config.measured_at`. The rates rise over the first 20th of the steps and fall
    linearly over the last two fifths.
    """
    keep_freed_memory()
    nn.Module.to(model, device).train()
    optimizers = make_optimizers(model, config)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(own, partial(rate_at, n_steps=config.steps))
        for own in optimizers
    ]
    losses = []
    for step in progress(range(config.steps), "base model"):
        if step in config.measured_at:
            model.eval()
            measure()
            model.train()
        bare = step < config.bare_fraction * config.steps
        loss = packed_answer_loss(model, next_batch(config.batch_size, bare))
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def make_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Create Muon for the matrices of the blocks and AdamW for embeddings, head, norms and biases."""
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_submodule("lm_head").weight
    matrices = [
        p for p in model.parameters() if p.ndim == 2 and p not in embeddings and p is not head
    ]
    own = set(matrices)
    others = [p for p in model.parameters() if p not in own]
    return [
        Muon(matrices, config.learning_rate),
        torch.optim.AdamW(
            others, config.vector_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        ),
    ]


def rate_at(step: int, n_steps: int) -> float:
    """Factor of the learning rates at a step: a trapezoid from 0 to 1 to 0."""
    rising, falling = (step + 1) / (RISE * n_steps), (n_steps - step) / (FALL * n_steps)
    return min(1.0, rising, falling)
