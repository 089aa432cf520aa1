"""Base models by size name: built and pretrained here (`nano`, `micro`), or found in a folder or on the hub.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llgbm.models.checks import (
    check_finite,
    check_reading,
    check_vocabulary,
    limit_positions,
)
from llgbm.models.folder import (
    NO_BASE,
    check_weights,
    read_config,
    read_tokenizer,
    refusal,
)
from llgbm.runtime import UserError, content_hash, is_folder, split_revision
from llgbm.system.cache import describe_file, hash_files
from llgbm.system.documents import brief
from llgbm.system.hub import snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSize:
    """Size: what `Qwen2Config` needs. One of these alone is built and pretrained here."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


@dataclass(frozen=True)
class PublishedSize(ModelSize):
    """Size whose weights come from elsewhere: its hub id, and the rank and alpha that its adapters usually have."""

    rank: int
    alpha: float
    hub: str


SIZES: dict[str, ModelSize] = {
    "nano": ModelSize(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=256),
    "micro": ModelSize(hidden=192, layers=5, heads=6, kv_heads=2, intermediate=512),
    "qwen2.5-0.5b": PublishedSize(
        896, 24, 14, 2, 4864, rank=8, alpha=16.0, hub="Qwen/Qwen2.5-0.5B-Instruct"
    ),
    "qwen2.5-1.5b": PublishedSize(
        1536, 28, 12, 2, 8960, rank=16, alpha=32.0, hub="Qwen/Qwen2.5-1.5B-Instruct"
    ),
}
# The smaller and the larger size of each family; `use_small_model` picks one of the two.
FAMILIES = {"embedded": ("nano", "micro"), "qwen2.5": ("qwen2.5-0.5b", "qwen2.5-1.5b")}
OWN_PREFIX = "base-"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDENTITY_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),
)
COMMIT = r"[0-9a-f]{40}"


@dataclass(frozen=True)
class Base:
    """Loaded base model with its tokenizer, its name, the hash of its files, and the folder of these."""

    model: PreTrainedModel
    tokenizer: Any
    path: str
    hash: str
    folder: Path | None = None

    def is_named(self, hash: str) -> bool:
        """Compare with a hash that was kept in a bank or a bundle; version 0.1.0 hashed fewer files."""
        if self.folder is None or hash == self.hash:
            return hash == self.hash
        return hash == older_base_hash(self.folder, self.model.dtype)


def model_size(name: str) -> ModelSize:
    """Look a size up. Raises UserError naming the known ones."""
    if name not in SIZES:
        raise UserError(f"unknown model size {name!r}; there are: {', '.join(SIZES)}")
    return SIZES[name]


def family_size(family: str, small: bool) -> str:
    """Smaller or the larger size of a family. Raises UserError naming the known families."""
    if family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}; there are: {', '.join(FAMILIES)}")
    return FAMILIES[family][0 if small else 1]


def qwen2_config(size: ModelSize, **more: Any) -> Any:
    """`Qwen2Config` of a size; `more` goes into it (the vocabulary is Qwen2's own where it is not given)."""
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=True,
        **more,
    )


def weightless_model(name: str) -> PreTrainedModel:
    """Make a model on the meta device from its config alone: a size by name, or a folder with a `config.json`.

    Its shapes are real, it holds no weights and takes no memory. Raises UserError for a name that is neither.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(name)
    config = read_config(folder) if folder.is_dir() else qwen2_config(model_size(name))
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise refusal(
            name, f"its config.json describes no model ({brief(error)}): fetch it again"
        ) from error


def load_base(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Load a base from a local folder or a hub id, frozen and in eval mode.

    Raises UserError where there is nothing to load under that name, and for a model that is read wrongly here.
    """
    folder = find_model(path)
    config = read_config(folder)
    check_weights(folder)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, config, path)
    model = _read_model(folder, config, dtype, device)
    check_finite(model, path)
    model.generation_config = _greedy(model, tokenizer)
    nn.Module.to(model, device).eval().requires_grad_(False)
    limit_positions(model, path)
    check_reading(model, path)
    return Base(model, tokenizer, pinned_name(str(path), folder), base_hash(folder, dtype), folder)


def pinned_name(name: str, folder: Path) -> str:
    """Name a hub model with the commit that was found: `name@commit`. A folder keeps its name."""
    if is_folder(name) or not re.fullmatch(COMMIT, folder.name):
        return name
    return f"{split_revision(name)[0]}@{folder.name}"


def _read_model(folder: Path, config: Any, dtype: torch.dtype, device: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **{_dtype_name(): dtype},
                # Quantised layers are made where they stay; without that the library picks a place.
                **({"device_map": {"": device}} if hasattr(config, "quantization_config") else {}),
            )
    except Exception as error:
        raise refusal(
            folder,
            f"its weights do not fit its config.json, or cannot be loaded ({brief(error)}): fetch both again",
        ) from error
    model, said = loaded
    if odd := sorted(said["mismatched_keys"], key=str):
        name, stored, wanted = odd[0]
        raise refusal(
            folder,
            f"its weights do not fit its config.json: {name} is {list(stored)}, not {list(wanted)}: fetch both again",
        )
    if missing := sorted(said["missing_keys"]):
        raise refusal(
            folder,
            f"its files lack {len(missing)} weights of the model, such as {missing[0]}: fetch them again",
        )
    return model


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Keep the library from printing a table of what does not fit: a refusal names it in one sentence."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _greedy(model: PreTrainedModel, tokenizer: Any) -> Any:
    """Return settings for plain greedy decoding, up to any of the model's own end tokens or the tokenizer's."""
    from transformers import GenerationConfig

    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    ends = [tokenizer.eos_token_id, *(end for end in listed if end is not None)]
    ends = list(dict.fromkeys(ends))
    return GenerationConfig(
        do_sample=False,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def find_model(name: str | Path, download: bool = True) -> Path:
    """Local folder of a base: a folder as it is, a hub id as its files in the hub's cache.

    Files that are not there yet are fetched, unless HF_HUB_OFFLINE is set or `download` is False. Raises UserError,
    which says what to fetch and where to put it, for a name that leads to nothing.
    """
    if is_folder(name):
        return Path(name).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        raise UserError(
            NO_BASE.format(name)
            + "there is no such folder, and it is no hub id such as Qwen/Qwen2.5-0.5B-Instruct, or id@revision"
        )
    hub_id, revision = split_revision(str(name))
    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
    patterns.append("README.md")  # it names the licence
    try:
        return snapshot(hub_id, revision, patterns, download)
    except (OSError, ValueError) as error:
        raise UserError(
            NO_BASE.format(name)
            + "it is no folder here, not in the hub's cache, and the hub cannot be asked or does "
            f"not know it; where there is a network run `hf download {hub_id} --local-dir DIR`, bring the folder here "
            "and name it (HF_HUB_OFFLINE=1 keeps the hub out altogether)"
        ) from error


@dataclass(frozen=True)
class BaseSource:
    """Base that is loaded, not built: its name as the user gave it, its dtype, and a hash of its files."""

    path: str = field(compare=False)
    hash: str
    dtype: str = "float32"

    @classmethod
    def find(cls, name: str, dtype: str = "float32", download: bool = True) -> BaseSource:
        """Find a base by folder or hub id. Raises UserError as `find_model`, and for an unknown dtype."""
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
        folder = find_model(name, download)
        read_config(folder)
        check_weights(folder)
        read_tokenizer(folder)
        path = str(folder.resolve()) if is_folder(name) else pinned_name(name, folder)
        return cls(path, base_hash(folder, DTYPES[dtype]), dtype)

    def load(self, device: str) -> Base:
        """Load it. Raises UserError if its files are no longer what they were when it was found."""
        base = load_base(self.path, device, DTYPES[self.dtype])
        if base.hash != self.hash:
            raise UserError(
                f"the files of the base {self.path} changed since this run was planned: start it again"
            )
        return base


def check_size(name: str, folder: Path) -> None:
    """Raise UserError unless the model in a folder has the shape that its size name says."""
    size, config = model_size(name), read_config(folder)
    wanted = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "intermediate_size": size.intermediate,
    }
    found = tuple(getattr(config, key, None) for key in wanted)
    if found != tuple(wanted.values()):
        raise UserError(
            f"{folder} is no {name}: it has hidden size, layers and intermediate size {found}, "
            f"{name} has {tuple(wanted.values())}; leave the size out or name another folder"
        )


def _dtype_name() -> str:
    """Argument of `from_pretrained` that sets the dtype; it was renamed in transformers 4.56."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def base_hash(path: str | Path, dtype: torch.dtype = torch.float32) -> str:
    """Hash all files of a local base that its numbers depend on, and the dtype that it is used in."""
    files = [[path.name, describe_file(path)[1]] for path in _identity_files(Path(path))]
    return content_hash("base model", files, str(dtype))


def _identity_files(folder: Path) -> list[Path]:
    """List weights, configs, and everything that a tokenizer reads."""
    return sorted(set(chain.from_iterable(map(folder.glob, IDENTITY_FILES))))


def folder_is_named(folder: Path, hash: str) -> bool:
    """Say if a folder's files have a base's hash, in whichever dtype it is used."""
    for dtype in DTYPES.values():
        if hash in (base_hash(folder, dtype), older_base_hash(folder, dtype)):
            return True
    return False


def older_base_hash(path: str | Path, dtype: torch.dtype = torch.float32) -> str:
    """Hash a base as version 0.1.0 did, which left most files of the tokenizer out: older banks are named by it."""
    folder = Path(path)
    kinds = (
        "*.safetensors",
        "config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "*.jinja",
    )
    files = list(chain.from_iterable(map(folder.glob, kinds)))
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and '"chat_template"' in settings.read_text(
        encoding="utf-8", errors="replace"
    ):
        files.append(settings)
    found = hash_files(sorted(files))
    if dtype == torch.float32:
        return found
    return hashlib.sha256(
        json.dumps([found, str(dtype)], separators=(",", ":")).encode()
    ).hexdigest()[:16]
