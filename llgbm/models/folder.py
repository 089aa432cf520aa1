"""Check the folder of a base before it is loaded: config, weight files and tokenizer.

All functions raise UserError, in one sentence that names the file.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from llgbm.models.quantised import check_quantised
from llgbm.runtime import UserError
from llgbm.system.documents import brief, decode, parse_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NO_BASE = "no base model can be loaded from {}: "
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
# How a file begins that git-lfs has not fetched yet.
POINTER = b"version https://git-lfs"


def refusal(folder: Path | str, reason: str) -> UserError:
    return UserError(NO_BASE.format(folder) + reason)


def read_config(folder: Path) -> PretrainedConfig:
    """Read the config of a causal language model that the library itself knows, plain or of bitsandbytes."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    stored = _read_json(folder, "config.json")
    kind = stored.get("model_type") or ""
    is_known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if stored.get("auto_map") and not is_known:
        raise refusal(
            folder,
            f"a {kind or 'nameless'} model needs code of its own, and code from a model's folder is never run",
        )
    if not is_known:
        raise refusal(folder, _unknown_type(kind))
    quantised = stored.get("quantization_config")
    if quantised and (reason := check_quantised(quantised)):
        raise refusal(folder, reason)
    try:
        # The library's own reader stops at a byte-order mark.
        if (folder / "config.json").read_bytes().startswith(codecs.BOM_UTF8):
            config = CONFIG_MAPPING[kind].from_dict(stored)
        else:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise refusal(
            folder, f"its config.json cannot be used ({brief(error)}): fetch it again"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if hasattr(config, "vision_config"):
            raise refusal(
                folder, f"a {kind} model reads images beside text: name a model of text alone"
            )
        raise refusal(folder, f"a {kind} model does not write text token by token")
    if other := _other_head(config):
        raise refusal(folder, f"it is a {other}, whose head writes no text: name a model that does")
    return config


def _other_head(config: PretrainedConfig) -> str | None:
    """Return the class of a checkpoint whose head is known to the library as one of another task."""
    from transformers.models.auto import modeling_auto

    kind, named = config.model_type, config.architectures
    if not isinstance(named, list) or not named:
        return None
    writes = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    for task in ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING"):
        other = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(kind)
        if named[0] == other != writes:
            return other
    return None


def _unknown_type(kind: Any) -> str:
    from transformers import __version__

    if not kind or not isinstance(kind, str):
        return "its config.json names no model_type: fetch it again"
    return (
        f"the installed transformers {__version__} knows no models of type {kind[:80]!r}: install one that does, or "
        "name another base"
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = path.read_bytes()
        _check_fetched(folder, name, content)
        found = parse_json(decode(content))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise refusal(
            folder,
            f"it holds no {name}; name a folder in the Hugging Face layout with config.json, *.safetensors and the "
            "tokenizer's files",
        ) from error
    except (OSError, ValueError) as error:
        raise refusal(folder, f"{name} cannot be read ({brief(error)}): fetch it again") from error
    return found


def _check_fetched(folder: Path, name: str, begins: bytes) -> None:
    if begins.startswith(POINTER):
        raise refusal(folder, f"{name} is a pointer of git-lfs: run `git lfs pull` there")


def check_weights(folder: Path) -> None:
    """Check that all weight files are there, whole, in safetensors."""
    for name in _weight_names(folder):
        path = folder / name
        try:
            if not path.is_file():
                raise refusal(folder, f"{name} is missing, which {INDEX} lists: fetch it")
            with path.open("rb") as stream:
                _check_fetched(folder, name, stream.read(len(POINTER)))
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise refusal(
                folder, f"{name} is truncated or no safetensors file: fetch it again"
            ) from error


def _weight_names(folder: Path) -> Sequence[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        listed = _read_json(folder, INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise refusal(folder, f"{INDEX} lists no weights: fetch it again")
        return sorted({str(name) for name in listed.values()})
    if any(folder.glob("*.bin")):
        raise refusal(
            folder,
            "its weights are .bin files, pickles, which are not read here: load it with transformers and save it "
            "again, which writes safetensors",
        )
    raise refusal(
        folder,
        f"it holds no {WEIGHTS}; name a folder in the Hugging Face layout with config.json, *.safetensors and the "
        "tokenizer's files",
    )


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer; one without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        is_empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:  # a file of another version of tokenizers raises a bare Exception
        raise refusal(
            folder,
            f"its tokenizer cannot be read by the installed transformers and tokenizers ({brief(error)}): fetch "
            "tokenizer.json and tokenizer_config.json again",
        ) from error
    if is_empty:
        raise refusal(
            folder, "it holds no tokenizer: fetch tokenizer.json and tokenizer_config.json"
        )
    if tokenizer.eos_token_id is None:
        raise refusal(
            folder, "its tokenizer has no end token, which eos_token in tokenizer_config.json names"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
