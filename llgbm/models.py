"""Base models by size name: built and pretrained here (`nano`, `micro`), loaded with the Auto classes of transformers.

Letters: S texts, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llgbm.batched import final_hidden, head_logits
from llgbm.cache import hash_files
from llgbm.encoding import EncodedPairs
from llgbm.runtime import UserError, progress, seed_everything

VERSION = 1
PAD, EOS = "<|endoftext|>", "<|im_end|>"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ModelSize:
    """An embedded size: what `Qwen2Config` needs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


SIZES = {
    "nano": ModelSize(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=256),
    "micro": ModelSize(hidden=192, layers=5, heads=6, kv_heads=2, intermediate=512),
}


@dataclass(frozen=True)
class PretrainConfig:
    """How a base is pretrained on instructions whose answers follow another task.

    For the first `bare_fraction` of the steps the prompts go without the instruction, which says nothing anyway.
    """

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    bare_fraction: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError("pretraining needs at least one step and one example a step")


@dataclass(frozen=True)
class Base:
    """A loaded base model with its tokenizer, its folder and the hash of its weights."""

    model: PreTrainedModel
    tokenizer: Any
    path: str
    hash: str


def model_size(name: str) -> ModelSize:
    """Look a size up. Raises UserError naming the known ones."""
    if name not in SIZES:
        raise UserError(f"unknown model size {name!r}; there are: {', '.join(SIZES)}")
    return SIZES[name]


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of Qwen2's kind in which every word of `texts` is one token (and any text encodes).

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
        vocab_size=100_000, min_frequency=1, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="right")


def new_model(size: ModelSize, tokenizer: Any, seed: int) -> PreTrainedModel:
    """A freshly initialised `Qwen2ForCausalLM` of this size."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    seed_everything(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config).float()


def pretrain(
    model: PreTrainedModel, config: PretrainConfig, next_batch: Callable[[int, bool], EncodedPairs], device: str = "cpu"
) -> list[float]:
    """Train all weights on the answers of `next_batch(batch_size, bare)`; return the loss of every step.

    AdamW with linear warm-up and cosine decay (the one-cycle schedule of torch).
    """
    nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    for step in progress(range(config.steps), "base model"):
        bare = step < config.bare_fraction * config.steps
        loss = answer_loss(model, next_batch(config.batch_size, bare).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def answer_loss(model: PreTrainedModel, texts: EncodedPairs) -> Tensor:
    """Mean cross-entropy over the answer tokens (and the end token); the prompt is not learnt."""
    marked = texts.targets_ST >= 0
    logits = head_logits(model, final_hidden(model, texts.input_ids_ST)[marked])
    return nn.functional.cross_entropy(logits.float(), texts.targets_ST[marked])


def load_base(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Load a base from a local folder or a hub id, frozen and in eval mode.

    Raises UserError when there is nothing to load under that name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(str(path), trust_remote_code=False, **{_dtype_name(): dtype})
    except (OSError, ValueError) as error:
        raise UserError(
            f"no base model can be loaded from {path}: name a folder in the Hugging Face layout, "
            "or a hub id that this machine can reach"
        ) from error
    nn.Module.to(model, device).eval().requires_grad_(False)
    return Base(model, tokenizer, str(path), base_hash(path))


def _dtype_name() -> str:
    """The argument of `from_pretrained` that sets the dtype; it was renamed in transformers 4.56."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def base_hash(path: str | Path) -> str:
    """Hash the weights, config and tokenizer of a local base; a hub id hashes to itself."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    return hash_files(_identity_files(folder))


def _identity_files(folder: Path) -> list[Path]:
    kinds: Iterable[str] = ("*.safetensors", "config.json", "tokenizer.json", "vocab.json", "merges.txt")
    return sorted(path for kind in kinds for path in folder.glob(kind))
