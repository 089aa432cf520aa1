"""Base models by size name: built and pretrained here (`nano`, `micro`), or found in a folder or on the hub.

Letters: S texts, T tokens, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llgbm.cache import hash_files
from llgbm.runtime import UserError, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSize:
    """A size: what `Qwen2Config` needs. One of these alone is built and pretrained here."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


@dataclass(frozen=True)
class PublishedSize(ModelSize):
    """A size whose weights come from elsewhere: its hub id, and the rank and alpha that its adapters usually have."""

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
NO_BASE = "no base model can be loaded from {}: "


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


def family_size(family: str, small: bool) -> str:
    """The smaller or the larger size of a family. Raises UserError naming the known families."""
    if family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}; there are: {', '.join(FAMILIES)}")
    return FAMILIES[family][0 if small else 1]


def qwen2_config(size: ModelSize, **more: Any) -> Any:
    """The `Qwen2Config` of a size; `more` goes into it (the vocabulary is Qwen2's own where it is not given)."""
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
    """A model on the meta device from its config alone: a size by name, or a folder with a `config.json`.

    Its shapes are real, it holds no weights and takes no memory. Raises UserError for a name that is neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(name).is_dir():
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    else:
        config = qwen2_config(model_size(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_base(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Load a base from a local folder or a hub id, frozen and in eval mode.

    Raises UserError when there is nothing to load under that name.
    """
    folder = find_model(path)
    try:
        model, tokenizer = _read_model(folder, dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            NO_BASE.format(path)
            + "name a folder in the Hugging Face layout with config.json, *.safetensors and the "
            f"tokenizer's files ({str(error).splitlines()[0]})"
        ) from error
    nn.Module.to(model, device).eval().requires_grad_(False)
    return Base(model, tokenizer, str(path), base_hash(folder, dtype))


def _read_model(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer. Decoding is plain greedy, whatever the folder's own settings for generation say."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), trust_remote_code=False, use_safetensors=True, **{_dtype_name(): dtype}
    )
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def find_model(name: str | Path, download: bool = True) -> Path:
    """The local folder of a base: a folder as it is, a hub id as its files in the hub's cache.

    Files that are not there yet are fetched, unless HF_HUB_OFFLINE is set or `download` is False. Raises UserError,
    which says what to fetch and where to put it, for a name that leads to nothing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(
            NO_BASE.format(name)
            + "there is no such folder, and it is no hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja"]
    try:
        return Path(
            snapshot_download(str(name), allow_patterns=patterns, local_files_only=not download)
        )
    except (OSError, ValueError) as error:
        raise UserError(
            NO_BASE.format(name)
            + "it is no folder here, not in the hub's cache, and the hub cannot be asked or does "
            f"not know it; where there is a network run `hf download {name} --local-dir DIR`, bring the folder here "
            "and name it (HF_HUB_OFFLINE=1 keeps the hub out altogether)"
        ) from error


@dataclass(frozen=True)
class BaseSource:
    """A base that is loaded, not built: its name as the user gave it, its dtype, and a hash of its files."""

    path: str = field(compare=False)
    hash: str
    dtype: str = "float32"

    @classmethod
    def find(cls, name: str, dtype: str = "float32", download: bool = True) -> BaseSource:
        """Find a base by folder or hub id. Raises UserError as `find_model`, and for an unknown dtype."""
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
        folder = find_model(name, download)
        path = str(folder.resolve()) if Path(name).expanduser().is_dir() else name
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
    from transformers import AutoConfig

    size, config = (
        model_size(name),
        AutoConfig.from_pretrained(str(folder), trust_remote_code=False),
    )
    found = (config.hidden_size, config.num_hidden_layers, config.intermediate_size)
    if found != (size.hidden, size.layers, size.intermediate):
        raise UserError(
            f"{folder} is no {name}: it has hidden size, layers and intermediate size {found}, "
            f"{name} has {(size.hidden, size.layers, size.intermediate)}; leave the size out or name another folder"
        )


def _dtype_name() -> str:
    """The argument of `from_pretrained` that sets the dtype; it was renamed in transformers 4.56."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def base_hash(path: str | Path, dtype: torch.dtype = torch.float32) -> str:
    """Hash the weights, config and tokenizer of a local base, and the dtype that it is used in."""
    found = hash_files(_identity_files(Path(path)))
    return found if dtype == torch.float32 else content_hash(found, str(dtype))


def _identity_files(folder: Path) -> list[Path]:
    """What a base is: weights, config, tokenizer, and its chat template where it has one."""
    kinds: Iterable[str] = (
        "*.safetensors",
        "config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "*.jinja",
    )
    settings = folder / "tokenizer_config.json"
    own_template = settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")
    return sorted(
        [
            *(path for kind in kinds for path in folder.glob(kind)),
            *([settings] if own_template else []),
        ]
    )
