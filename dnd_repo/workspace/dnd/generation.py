"""From a checkpoint and prompts of a task to PEFT adapters. Letters as in `training`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dnd.bank import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, read_json
from dnd.conditions import encode_texts
from dnd.errors import DndError
from dnd.model import HyperConvDecoderModel, load_checkpoint
from dnd.output import ADAPTER_PATTERNS, Output
from dnd.tokenizer import LoraTokenizer2D, default_token_size
from dnd.training import (
    MODEL_FILE,
    SETTINGS_FILE,
    TrainSettings,
    describe,
    load_encoder,
    make_model,
    newest_checkpoint,
)


@dataclass(frozen=True)
class AdapterWriter:
    """Trained model with all that is needed to write adapters."""

    model: HyperConvDecoderModel
    settings: TrainSettings
    tokenizer: LoraTokenizer2D
    text_tokenizer: Any
    like: Mapping[str, Tensor]
    adapter_config: Mapping[str, Any]

    @classmethod
    def load(
        cls, source: Path, settings: TrainSettings | None = None, like: Path | None = None
    ) -> AdapterWriter:
        """From the folder of a training; or from a bare `.pth` or safetensors file, with the `settings` that it was
        trained with and the folder of an adapter `like` those it writes.

        Raises DndError for what is missing, torn or does not fit.
        """
        if source.is_file():
            weights, described = source, describe_file(source, settings, like)
        else:
            checkpoint = source if (source / MODEL_FILE).is_file() else newest_checkpoint(source)
            weights, described = checkpoint / MODEL_FILE, read_json(checkpoint / SETTINGS_FILE)
        used = TrainSettings(**described["settings"])
        shaped = {key: torch.empty(1).expand(shape) for key, shape in described["shapes"].items()}
        tokenizer = LoraTokenizer2D(used.token_size or default_token_size(shaped))
        text_tokenizer, encoder = load_encoder(used.encoder)
        model = make_model(used, tokenizer, shaped, encoder, torch.ones(tokenizer.n_tokens(shaped)))
        load_checkpoint(model, weights)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            model.to(device).eval(),
            used,
            tokenizer,
            text_tokenizer,
            shaped,
            described["adapter_config"],
        )

    def generate(self, texts: Sequence[str], seed: int = 0) -> dict[str, Tensor]:
        """One adapter from N of these texts, drawn by the seed. Raises DndError for too few."""
        needed = self.settings.n_prompts
        if len(texts) < needed:
            raise DndError(
                f"{len(texts)} prompts given, this model reads {needed}: give at least as many"
            )
        drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:needed]
        encoded = encode_texts(
            self.text_tokenizer, [texts[i] for i in drawn], self.settings.max_length
        )
        device = self.model.criterion_weight.device
        with torch.no_grad():
            tokens_BTHW = self.model.generate({k: v[None].to(device) for k, v in encoded.items()})
        return {
            k: v.contiguous()
            for k, v in self.tokenizer.detokenize(self.like, tokens_BTHW[0].cpu()).items()
        }

    def write(self, texts: Sequence[str], folder: Path, seed: int = 0) -> None:
        """Write one adapter as a PEFT folder, whole or not at all.

        Raises DndError for a folder that cannot be written or holds an adapter of others.
        """
        output = adapter_output(folder)
        state = self.generate(texts, seed)
        with output.writing() as stage:
            save_file(state, stage / ADAPTER_WEIGHTS, {"format": "pt"})
            (stage / ADAPTER_CONFIG).write_text(
                json.dumps(self.adapter_config, indent=2, sort_keys=True)
            )


def adapter_output(folder: Path) -> Output:
    """Check a folder that an adapter will be written to. Raises DndError as `AdapterWriter.write`."""
    return Output(folder, ADAPTER_PATTERNS)


def describe_file(
    source: Path, settings: TrainSettings | None, like: Path | None
) -> dict[str, Any]:
    """Describe a bare checkpoint as the folder of its training would."""
    if settings is None or like is None:
        raise DndError(
            f"{source} is a file without settings: name with --like the folder of an adapter like it writes"
        )
    return describe(
        settings, read_adapter(like / ADAPTER_WEIGHTS), read_json(like / ADAPTER_CONFIG)
    )
