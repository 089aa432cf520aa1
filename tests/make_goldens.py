"""Write reference values into `tests/data/goldens`, from torch, transformers and PEFT alone: none of this code is used.

    python tests/make_goldens.py          # then: git add -f tests/data/goldens

Models are PeftModels, one adapter after the other; gradients are plain autograd's; divergences are those of
`torch.nn.functional.kl_div`; updates ΔW = B A are formed. Scalars are computed in float64.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

FOLDER = Path(__file__).parent / "data" / "goldens"
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
RANK, ALPHA = 3, 6
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = (9, 5, 7)  # of three texts; padding is on the right
TEMPERATURE = 2.0


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    write_models()
    write_losses()


def write_models() -> None:
    """Write a base, two adapters, and what PeftModel makes of both: states, logits, deltas and gradients."""
    base = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).float().eval()
    with torch.no_grad():
        for name, value in base.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.2)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.randint(1, SHAPE["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.where(mask, ids, 0)
    pull = torch.randn(SHAPE["hidden_size"])
    with torch.no_grad():
        plain = last_states(base, ids, mask)
    found: dict[str, Tensor] = {"ids": ids, "mask": mask.long(), "pull": pull}
    found |= {f"base.{name}": value for name, value in weights.items() if name != "lm_head.weight"}
    for index in range(2):
        own = run_adapter(weights, ids, mask, pull)
        own["delta"] = own["states"].mean(0) - plain.mean(0)
        found |= {f"{index}.{name}": value.contiguous() for name, value in own.items()}
    save_file(found, FOLDER / "adapters.safetensors", {"shape": json.dumps(SHAPE)})


def last_states(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the last-layer state of each text's last token."""
    output = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    ends = torch.tensor(LENGTHS) - 1
    return output.hidden_states[-1][torch.arange(len(LENGTHS)), ends]


def run_adapter(
    weights: dict[str, Tensor], ids: Tensor, mask: Tensor, pull: Tensor
) -> dict[str, Tensor]:
    """Return a random adapter with its logits and states, and the gradient of their mean along `pull`."""
    fresh = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).float().eval()
    fresh.load_state_dict(weights)
    model = get_peft_model(
        fresh, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
    ).eval()
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {k: 0.3 * torch.randn_like(v) for k, v in state.items()})
    states = last_states(model, ids, mask)
    (states.mean(0) @ pull).backward()
    found = {"states": states.detach()}
    with torch.no_grad():
        found["logits"] = model(input_ids=ids, attention_mask=mask.long()).logits[mask]
    for name, value in model.named_parameters():
        if "lora_" in name:
            key = name.replace(".default.", ".")
            found |= {f"lora.{key}": value.detach().clone(), f"grad.{key}": value.grad}
    return found


def write_losses() -> None:
    """Write random inputs of the losses with their values, and the gradient of the divergence."""
    pred, teacher = torch.randn(4, 12), torch.randn(4, 12)
    tokens_pred, tokens_teacher = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    tokens_teacher[1, 2, 3:] = torch.nan
    student, taught = (2 * torch.randn(6, 31) for _ in range(2))
    b, a = torch.randn(2, 3, 7, 2), torch.randn(2, 3, 2, 5)  # two systems, three adapters
    found = {
        "delta_pred": pred,
        "delta_teacher": teacher,
        "tokens_pred": tokens_pred,
        "tokens_teacher": tokens_teacher,
        "student": student,
        "taught": taught,
        "a": a,
        "b": b,
    }
    p, t = pred.double(), teacher.double()
    real = ~tokens_teacher.isnan()
    weight = (tokens_pred[real].double() - tokens_teacher[real].double()).pow(2).mean()
    unit_p, unit_t = (v / v.pow(2).sum(-1, keepdim=True).sqrt() for v in (p, t))
    cosine = (unit_p * unit_t).sum(-1)
    ratio = p.pow(2).sum(-1).sqrt() / t.pow(2).sum(-1).sqrt()
    scalars = {
        "weight": weight,
        "mse": (unit_p - unit_t).pow(2).mean(),
        "mse_raw": (p - t).pow(2).mean(),
        "cosine": (1 - cosine).mean(),
        "cosine_norm": (1 - cosine + (ratio - 1) ** 2).mean(),
        **updates(a.double(), b.double()),
    }
    moved = student.double().requires_grad_()
    divergence = functional.kl_div(
        (moved / TEMPERATURE).log_softmax(-1),
        (taught.double() / TEMPERATURE).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    divergence = divergence * TEMPERATURE**2
    divergence.sum().backward()
    assert moved.grad is not None
    found |= {"kl": divergence.detach(), "kl_grad": moved.grad}
    expected = json.dumps({name: float(value) for name, value in scalars.items()})
    save_file(found, FOLDER / "losses.safetensors", {"expected": expected})


def updates(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return what is measured on formed updates ΔW [adapters, values]: predicted ones, then the teachers'."""
    own, teacher = (b @ a).flatten(2)
    size, wanted = own.norm(dim=-1), teacher.norm(dim=-1)
    cosine = (own * teacher).sum(-1) / size / wanted
    apart = (own - teacher).norm(dim=-1) / wanted
    return {
        "delta_w_error": apart.mean(),
        "delta_w_relative": apart.pow(2).mean(),
        "delta_w_cosine_norm": (1 - cosine + (size / wanted - 1) ** 2).mean(),
        "delta_w_inner_0_2": own[0] @ teacher[2],
    }


if __name__ == "__main__":
    main()
