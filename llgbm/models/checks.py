"""Check a loaded model: it is read here as it reads itself, and no text is longer than its table of positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llgbm.lora.apply import final_hidden, head_logits
from llgbm.models.folder import refusal
from llgbm.models.quantised import model_bits
from llgbm.runtime import UserError
from llgbm.system.documents import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_finite(model: nn.Module, path: str | Path) -> None:
    """Raise UserError for a model with a weight that is no finite number: all that is made with it would have some."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise refusal(path, f"{name} holds NaN or infinite values: fetch its weights again")


def check_vocabulary(tokenizer: Any, config: Any, path: str | Path) -> None:
    """Raise UserError for a tokenizer with more tokens than the model has."""
    known = config.get_text_config().vocab_size
    if len(tokenizer) > known:
        raise refusal(
            path,
            f"its tokenizer has {len(tokenizer)} tokens, the model {known}: fetch the tokenizer that goes with it",
        )


def limit_positions(model: PreTrainedModel, path: str | Path) -> None:
    """Have a model with a table of positions refuse texts that are longer than that."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # Some tables begin with a few rows that are not for texts.
    if any(most <= table.num_embeddings <= most + 8 for table in tables):
        check = partial(_check_length, most=most, path=path)
        for module in (model, model.base_model):  # decoding runs the one, `final_hidden` the other
            module.register_forward_pre_hook(check, with_kwargs=True)


def _check_length(
    _model: nn.Module, given: Sequence[Any], named: Mapping[str, Any], most: int, path: str | Path
) -> None:
    ids, past = (*given, named.get("input_ids"))[0], named.get("past_key_values")
    tokens = 0 if ids is None else int(ids.shape[1])
    tokens += past.get_seq_length() if past is not None else 0
    if tokens > most:
        raise UserError(
            f"a text of {tokens} tokens is longer than the {most} positions that the base {path} has: leave such texts "
            "out (--longest-row), give fewer examples in context or tokens for an answer, or name another base"
        )


def check_reading(model: PreTrainedModel, path: str | Path) -> None:
    """Check that states and head, read apart, give the model's own logits, and that no state depends on later tokens.

    Raises UserError for a model of which that is not so: losses and deltas would be of another model.
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    changed = torch.cat([ids[:, :3], ids[:, :1]], dim=1)
    try:
        with torch.no_grad():
            states = final_hidden(model, ids)
            wanted = model(input_ids=ids, use_cache=False).logits.float()
            got = head_logits(model, states).float()
            others = final_hidden(model, changed)[:, :3]
    except Exception as error:
        raise refusal(
            path, f"a {model.config.model_type} model cannot be run here ({brief(error)})"
        ) from error
    # In 8 bits inputs are rounded, large ones by what the whole pass holds.
    is_exact = model.dtype == torch.float32 and model_bits(model) != 8
    tolerance = 1e-4 if is_exact else 2e-2
    if not _are_close(got, wanted, tolerance):
        raise refusal(
            path, f"the head of a {model.config.model_type} model does more than is known here"
        )
    if not _are_close(others.float(), states[:, :3].float(), tolerance):
        raise refusal(
            path, f"a {model.config.model_type} model looks at later tokens: it does not write text"
        )


def _are_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-6))
