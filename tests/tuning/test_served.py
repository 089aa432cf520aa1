"""A served generator answers each row with one adapter, and names rows that are no prompts."""

from __future__ import annotations

import base64
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load


class WordBundle:
    """A real generator of adapters, small enough to check by hand: the weight counts the words of the prompts."""

    def generate(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        count = float(sum(len(prompt.split()) for prompt in prompts))
        return {
            "layer.lora_A.weight": torch.full((3, 2), count).T,
            "layer.lora_B.weight": torch.ones(3, 2),
        }

    def adapter_config(self) -> dict[str, object]:
        return {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def predict(*prompts: str) -> pd.DataFrame:
    from tuning.registry.served import GeneratorModel

    model = GeneratorModel()
    model.bundle = WordBundle()  # type: ignore[assignment]
    return model.predict(None, pd.DataFrame({"prompts": list(prompts)}))


def test_each_row_becomes_one_adapter() -> None:
    answer = predict(json.dumps(["one two", "three"]), json.dumps(["one"]))
    states = [load(base64.b64decode(text)) for text in answer["adapter_safetensors_base64"]]
    assert [state["layer.lora_A.weight"].tolist() for state in states] == [
        [[3.0] * 3] * 2,
        [[1.0] * 3] * 2,
    ]
    assert json.loads(answer["adapter_config"][1]) == WordBundle().adapter_config()


@pytest.mark.parametrize("bad", ["give the first word", "[]", '["a", 3]', '{"a": 1}', '["  "]'])
def test_rows_that_are_no_prompts_are_named(bad: str) -> None:
    with pytest.raises(ValueError, match="row 1: `prompts` must be a JSON list"):
        predict('["fine"]', bad)
