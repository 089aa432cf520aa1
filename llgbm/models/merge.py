"""An adapter added to the weights of its base, by PEFT, and what that costs in logits.

Axis letters: see `llgbm`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llgbm.lora.external import read_external
from llgbm.models.encoding import encode_prompts
from llgbm.models.load import IDENTITY_FILES, Base
from llgbm.runtime import UserError
from llgbm.system.documents import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Files of a base that stay as they are beside other weights.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
LONGEST_TEXT = 256


class Merged(NamedTuple):
    """Model with the adapter in its weights, and its errors in logits."""

    model: PreTrainedModel
    errors: dict[str, Any]


def merge_adapter(base: Base, folder: Path, texts: Sequence[str], dtype: torch.dtype) -> Merged:
    """Merge an adapter into its base (float32), measure that, and return it in `dtype`; the base is used up.

    The sum is made in float32 and rounded once. Errors are the largest differences of logits over all tokens of
    `texts` to those of base and adapter apart in float32. Raises UserError as `read_external`.
    """
    from peft import PeftModel

    read_external(folder, base.model)
    try:
        model: Any = PeftModel.from_pretrained(base.model, str(folder))
    except Exception as error:
        raise UserError(f"PEFT cannot load the adapter in {folder} ({brief(error)})") from error
    ids_ST, mask_ST = encode_prompts(base.tokenizer, texts, padding="right")
    ids_ST = ids_ST[:, :LONGEST_TEXT].to(base.model.device)
    mask_ST = mask_ST[:, :LONGEST_TEXT].bool().to(base.model.device)
    apart = _logits(model, ids_ST, mask_ST)
    apart_half = _logits(_rounded(model, torch.bfloat16), ids_ST, mask_ST)
    whole = model.merge_and_unload(safe_merge=True)
    whole_half = _rounded(whole, torch.bfloat16)
    errors = {
        "tokens": len(apart),
        "largest_logit": float(apart.abs().max()),
        "float32": _difference(_logits(whole, ids_ST, mask_ST), apart),
        "bfloat16": _difference(_logits(whole_half, ids_ST, mask_ST), apart),
        "bfloat16_unmerged": _difference(apart_half, apart),
    }
    return Merged(whole_half if dtype == torch.bfloat16 else whole.to(dtype), errors)


def _rounded(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy with weights of another type, as it is loaded from files: angles of positions stay in float32."""
    found = copy.deepcopy(model)
    for weight in found.parameters():
        weight.data = weight.data.to(dtype)
    return found


def _logits(model: Any, ids_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """Return the logits [N, V] of all tokens of right-padded texts, in float32."""
    with torch.no_grad():
        return model(input_ids=ids_ST, use_cache=False).logits[mask_ST].float()


def _difference(got_NV: Tensor, wanted_NV: Tensor) -> dict[str, float]:
    same = got_NV.argmax(-1) == wanted_NV.argmax(-1)
    return {
        "largest_error": float((got_NV - wanted_NV).abs().max()),
        "same_next_token": round(float(same.float().mean()), 4),
    }


def write_model(folder: Path, merged: PreTrainedModel, base: Path) -> None:
    """Write a model's weights and config into a folder, with the other files of its base as they are."""
    merged.save_pretrained(str(folder))
    (folder / "generation_config.json").unlink(missing_ok=True)
    for pattern in IDENTITY_FILES:
        if pattern in WEIGHT_FILES:
            continue
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
