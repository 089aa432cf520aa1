"""The packaged MiniLM-L6 (Wang et al. 2020) in plain torch: importing a library of models takes longer than encoding.

Its embeddings are bit-identical to those of sentence-transformers; tests/llgbm/test_minilm.py holds that.

Letters: B prompts in a batch, T tokens, H attention heads, C embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from llgbm.runtime import UserError, pick_device

BATCH = 128
# The network that this file computes; any other one is read by sentence-transformers.
NETWORK = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


class MiniLM:
    """Sentence encoder: a BERT, the mean over its tokens, unit length.

    Source: Wang et al. 2020, "MiniLM" (arXiv 2002.10957), pooled as in Reimers and Gurevych 2019, "Sentence-BERT"
    (arXiv 1908.10084).
    """

    def __init__(self, folder: Path) -> None:
        """Read weights, sizes and tokenizer from a folder of sentence-transformers."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        if {name: config.get(name) for name in NETWORK} != NETWORK:
            raise UserError(f"{folder} holds no MiniLM: name it as an encoder's folder instead")
        self._heads, self._eps = config["num_attention_heads"], config["layer_norm_eps"]
        self._layers = range(config["num_hidden_layers"])
        self._device = pick_device()
        self._weights = load_file(folder / "model.safetensors", self._device)
        limits = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8-sig"))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(limits["max_seq_length"])
        self._tokenizer.enable_padding(pad_id=config["pad_token_id"])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, C] of unit length, float32 on the CPU."""
        order = np.argsort(
            [-len(prompt) for prompt in prompts]
        ).tolist()  # as sentence-transformers
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        found = torch.cat([self._encode([prompts[index] for index in batch]) for batch in batches])
        return found[torch.tensor(order).argsort()]

    @torch.no_grad()
    def token_states(self, prompts: Sequence[str]) -> Iterator[Tensor]:
        """Yield the last layer's states [T, C] of each prompt's tokens, float32 on the CPU."""
        for start in range(0, len(prompts), BATCH):
            hidden_BTC, mask_BT = self._states(prompts[start : start + BATCH])
            counts = mask_BT.sum(1).tolist()
            yield from (own[:count] for own, count in zip(hidden_BTC.cpu(), counts, strict=True))

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        hidden_BTC, mask_BT = self._states(prompts)
        weights_BTC = mask_BT[..., None].expand(hidden_BTC.shape).float()
        mean_BC = (hidden_BTC * weights_BTC).sum(1) / weights_BTC.sum(1).clamp(min=1e-9)
        return F.normalize(mean_BC, p=2.0, dim=1).cpu()

    def _states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States [B, T, C] of the last layer, and the mask [B, T] of real tokens."""
        encoded = self._tokenizer.encode_batch([prompt.strip() for prompt in prompts])
        ids_BT = torch.tensor([one.ids for one in encoded], device=self._device)
        mask_BT = torch.tensor([one.attention_mask for one in encoded], device=self._device)
        hidden_BTC = self._embed(ids_BT)
        allowed = None if mask_BT.all() else mask_BT.bool()[:, None, None, :]
        for layer in self._layers:
            hidden_BTC = self._block(f"encoder.layer.{layer}", hidden_BTC, allowed)
        return hidden_BTC, mask_BT

    def _embed(self, ids_BT: Tensor) -> Tensor:
        words, positions, kinds = (
            self._weights[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        )
        hidden_BTC = F.embedding(ids_BT, words) + kinds[0] + positions[: ids_BT.shape[1]]
        return self._normalise("embeddings.LayerNorm", hidden_BTC)

    def _block(self, name: str, hidden_BTC: Tensor, allowed: Tensor | None) -> Tensor:
        q, k, v = (
            self._split(self._linear(f"{name}.attention.self.{part}", hidden_BTC))
            for part in ("query", "key", "value")
        )
        mixed_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        mixed_BTC = mixed_BHTd.transpose(1, 2).reshape(hidden_BTC.shape)
        added = self._linear(f"{name}.attention.output.dense", mixed_BTC) + hidden_BTC
        hidden_BTC = self._normalise(f"{name}.attention.output.LayerNorm", added)
        wide = F.gelu(self._linear(f"{name}.intermediate.dense", hidden_BTC))
        added = self._linear(f"{name}.output.dense", wide) + hidden_BTC
        return self._normalise(f"{name}.output.LayerNorm", added)

    def _split(self, states_BTC: Tensor) -> Tensor:
        batch, tokens, _ = states_BTC.shape
        return states_BTC.view(batch, tokens, self._heads, -1).transpose(1, 2)

    def _linear(self, name: str, states: Tensor) -> Tensor:
        return F.linear(states, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _normalise(self, name: str, states: Tensor) -> Tensor:
        scale, shift = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(states, scale.shape, scale, shift, self._eps)
