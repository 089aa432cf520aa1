"""What passes of a base under adapters cost, from shapes alone: FLOPs and bytes. A model on the meta device will do.

The formulas are for blocks as Qwen2, Llama and Mistral have them: two norms, attention with fused kernels (its T x T
scores are never stored), a gated MLP. FLOPs are counted as torch's FlopCounterMode counts them, a multiplication and an
addition as two. Axis letters: see `llgbm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llgbm.lora.adapters import LoraSpec
from llgbm.lora.blocks import has_known_blocks
from llgbm.lora.shapes import linear_shape
from llgbm.models.encoding import EncodedPairs
from llgbm.models.quantised import bytes_a_weight, model_bits
from llgbm.runtime import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READS_THE_EMBEDDING = ("q_proj", "k_proj", "v_proj")
# Layers of the last block that the lean pass runs at the marked positions only.
_AT_MARKS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class BaseShape:
    """Numbers of a base and of its adapters that cost depends on.

    `linear` and `adapted` sum the weights of all Linear layers in blocks and in * R + out * R of those adapted;
    `first_linear` and `first_adapted` are those of the first block that read the embedding, through which no gradient
    goes further down. `last_linear` and `last_adapted` are those of the last block that the lean pass of `lora.blocks`
    runs at marked positions only; 0 for bases that it does not run. `packed` counts the quantised weights.
    """

    parameters: int
    layers: int
    hidden: int
    attention: int
    key_value: int
    intermediate: int
    vocabulary: int
    linear: int
    adapted: int
    first_linear: int
    first_adapted: int
    low: int
    element: int
    last_linear: int = 0
    last_adapted: int = 0
    packed: int = 0
    packed_bytes: float = 0.0

    @classmethod
    def of(cls, model: PreTrainedModel, spec: LoraSpec) -> BaseShape:
        """Read a model's config and Linear layers. Raises UserError for a model whose blocks are of another kind."""
        config = model.config
        try:
            heads, kv_heads, intermediate = (
                int(getattr(config, n))
                for n in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
            )
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"the cost of a {config.model_type} model cannot be estimated: only blocks like those of Qwen2 or "
                "Llama are known"
            ) from error
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        sizes = _linear_sizes(model)
        first = [
            m for m in spec.modules if m.kind in _READS_THE_EMBEDDING and _in_first_block(m.name)
        ]
        last = f".{int(config.num_hidden_layers) - 1}."
        lean = has_known_blocks(model)
        bits = model_bits(model)
        packed = sum(sizes.values()) if bits else 0
        return cls(
            parameters=_plain_parameters(model) + sum(sizes.values()),
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            attention=heads * head,
            key_value=kv_heads * head,
            intermediate=intermediate,
            vocabulary=int(config.vocab_size),
            linear=sum(sizes.values()),
            adapted=spec.n_values,
            first_linear=sum(n for name, n in sizes.items() if _reads_the_embedding(name)),
            first_adapted=spec.rank * sum(m.n_in for m in first),
            low=spec.rank * len(spec.modules),
            element=model.get_input_embeddings().weight.element_size(),
            last_linear=lean * sum(n for name, n in sizes.items() if _is_at_marks(name, last)),
            last_adapted=lean
            * spec.rank
            * sum(m.n_in + m.n_out for m in spec.modules if _is_at_marks(m.name, last)),
            packed=packed,
            packed_bytes=packed * bytes_a_weight(bits) if bits else 0.0,
        )

    def forward_flops(self, texts: int, tokens: int, marked: float | None = None) -> float:
        """One forward pass of S texts of T tokens up to the last hidden states, adapters included.

        With `marked`, the last block is run at so many positions of a text where that is possible.
        """
        everywhere = self.linear + self.adapted
        at_marks, share = self._last(tokens, marked)
        weights = everywhere - (1 - share) * at_marks
        return 2.0 * texts * tokens * weights + self._attention_flops(texts, tokens, share)

    def backward_flops(self, texts: int, tokens: int, marked: float | None = None) -> float:
        """Pass back to the adapters: no weight of the base gets a gradient."""
        _, share = self._last(tokens, marked)
        linear = self.linear - self.first_linear - (1 - share) * self.last_linear
        adapted = 2 * self.adapted - self.first_adapted - (1 - share) * 2 * self.last_adapted
        return 2.0 * texts * tokens * (linear + adapted) + 2 * self._attention_flops(
            texts, tokens, share
        )

    def _last(self, tokens: int, marked: float | None) -> tuple[int, float]:
        """Return the weights that are used at marks only, and the share of the tokens that are marked."""
        at_marks = self.last_linear + self.last_adapted
        if marked is None or not at_marks:
            return at_marks, 1.0
        return at_marks, min(1.0, marked / tokens)

    def _attention_flops(self, texts: int, tokens: int, share: float) -> float:
        """Scores and sums of all blocks, the last one's at a share of the queries."""
        return 4.0 * texts * tokens * tokens * self.attention * (self.layers - 1 + share)

    def head_flops(self, positions: int) -> float:
        """LM head at some positions, forward and back to the hidden states."""
        return 4.0 * positions * self.hidden * self.vocabulary

    def decoding_flops(self, texts: int, prompt: int, written: int) -> float:
        """Greedy decoding of so many tokens after S prompts of T tokens, with a cache, adapters and the LM head."""
        later = written - 1
        passes = self.forward_flops(texts, prompt) + texts * later * 2.0 * (
            self.linear + self.adapted
        )
        # Each later token looks at the prompt and at all tokens up to itself.
        looked_at = later * prompt + later * (later + 1) / 2
        attention = 4.0 * texts * looked_at * self.attention * self.layers
        return passes + attention + 2.0 * texts * written * self.hidden * self.vocabulary

    def activation_bytes(self, texts: int, tokens: int, checkpointing: bool = False) -> float:
        """Return the bytes held between the two passes of S texts of T tokens.

        With `checkpointing`: the inputs of all blocks, and one block, the one that is run again.
        """
        blocks = self.layers * self.hidden * self.element + self.block_bytes if checkpointing else 0
        return texts * tokens * ((blocks or self.layers * self.block_bytes) + 4 * self.hidden)

    @property
    def block_bytes(self) -> float:
        """Return the bytes that one block holds of a token.

        Counted are the inputs of its norms in float32, their outputs, q, k, v, attention, four tensors as wide as the
        MLP, and the middles of B A.
        """
        in_element = (
            2 * self.hidden + 2 * self.attention + 2 * self.key_value + 4 * self.intermediate
        )
        return 2 * 4 * self.hidden + self.element * (in_element + self.low / self.layers)

    @property
    def weight_bytes(self) -> float:
        return float((self.parameters - self.packed) * self.element) + self.packed_bytes


def _linear_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Weights of each Linear layer but the LM head."""
    head = model.get_output_embeddings()
    shapes = (linear_shape(n, m) for n, m in model.named_modules() if m is not head)
    return {shape.name: shape.n_in * shape.n_out for shape in shapes if shape is not None}


def _plain_parameters(model: PreTrainedModel) -> int:
    """Count the parameters that are no weight of a Linear layer in blocks: packed ones have another number."""
    head = model.get_output_embeddings()
    layers = [m for n, m in model.named_modules() if m is not head and linear_shape(n, m)]
    inside = {id(layer.get_parameter("weight")) for layer in layers}
    return sum(p.numel() for p in model.parameters() if id(p) not in inside)


def _is_at_marks(name: str, last: str) -> bool:
    return last in name and name.rsplit(".", 1)[-1] in _AT_MARKS


def _in_first_block(name: str) -> bool:
    return ".0." in name


def _reads_the_embedding(name: str) -> bool:
    return _in_first_block(name) and name.rsplit(".", 1)[-1] in _READS_THE_EMBEDDING


# What a pass holds beside its activations: gradients on their way, the logits, the allocator's waste.
HEADROOM = 2.0


def pass_bytes(shape: BaseShape, texts: EncodedPairs, checkpointing: bool = False) -> float:
    """Return the bytes that training holds of some texts: activations, and float32 logits of answers with gradient."""
    rows, tokens = texts.input_ids_ST.shape
    answers = int((texts.targets_ST >= 0).sum())
    return shape.activation_bytes(rows, tokens, checkpointing) + 3 * 4 * answers * shape.vocabulary
