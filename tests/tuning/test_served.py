"""A served generator answers each row with one adapter, and names rows that are no prompts."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load

from llgbm.lora.adapters import pack_weights
from llgbm.runtime import UserError


class WordBundle:
    """A real generator of adapters, small enough to check by hand: the weight counts the words of the prompts."""

    def generate(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        count = float(sum(len(prompt.split()) for prompt in prompts))
        return {
            "layer.lora_A.weight": torch.full((3, 2), count).T,
            "layer.lora_B.weight": torch.ones(3, 2),
        }

    def pack_adapter(self, prompts: list[str]) -> bytes:
        return pack_weights(self.generate(prompts), self.adapter_config())[0]

    def adapter_config(self) -> dict[str, object]:
        return {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def predict(*prompts: str) -> pd.DataFrame:
    from tuning.registry.served import GeneratorModel

    model = GeneratorModel()
    model.bundle = WordBundle()
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
    with pytest.raises(MlflowException, match="row 1: `prompts` must be a JSON list"):
        predict('["fine"]', bad)


def test_what_a_user_can_mend_is_told() -> None:
    from tuning.registry.served import GeneratorModel

    class Other(WordBundle):
        def pack_adapter(self, prompts: list[str]) -> bytes:
            raise UserError("the encoder is another")

    model = GeneratorModel()
    model.bundle = Other()
    with pytest.raises(MlflowException, match="the encoder is another"):
        model.predict(None, pd.DataFrame({"prompts": ['["a"]']}))


def payload(cell: object, column: str = "prompts") -> dict[str, object]:
    return {"dataframe_split": {"columns": [column], "data": [[cell]]}}


# What a client may send, and what the message of the answer says of it.
WRONG = [
    (payload("give the first word"), "must be a JSON list of one or more texts"),
    (payload("[]"), "must be a JSON list of one or more texts, got '[]'"),
    (payload('[""]'), "must be a JSON list of one or more texts"),
    (payload("[1, 2]"), "must be a JSON list of one or more texts, got '[1, 2]'"),
    (payload('[["a"], ["b"]]'), "must be a JSON list of one or more texts"),
    (payload('{"a": 1}'), "must be a JSON list of texts, or an object of prompts"),
    (payload('{"prompts": ["a"], "subsets": true}'), "an object of prompts (a list)"),
    (payload('{"prompts": ["a"], "subsets": 2, "x": 1}'), "an object of prompts (a list)"),
    (payload('{"prompts": "a", "subsets": 2}'), "must be a JSON list of one or more texts"),
    (payload("[" * 100_000), "must be a JSON list of one or more texts"),
    (payload(json.dumps(["word"] * 10_000)), "10000 prompts, at most 1000 are read"),
    (payload(["a", "b"]), "prompts"),
    (payload([["a"], ["b"]]), "prompts"),
    (payload([]), "prompts"),
    (payload(7), "prompts"),
    (payload(None), "prompts"),
    (payload('["a"]', "prompt"), "missing inputs ['prompts']"),
    ({"prompts": ["a"]}, "exactly one of the input fields"),
    ({"inputs": {"prompts": "text"}}, "must be a JSON list of one or more texts"),
    ({"inputs": ["a", "b"]}, "prompts"),
    ({"dataframe_records": [{"prompts": "text"}]}, "must be a JSON list of one or more texts"),
    ({"dataframe_records": "text"}, "Dataframe records format must be a list"),
    ([], "JSON"),
    ("text", "JSON"),
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[object], tuple[int, str]]:
    """Ask MLflow's scoring server; return its status and message."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.pyfunc.scoring_server import invocations
    from mlflow.types.schema import ColSpec, Schema

    from tuning.registry.served import GeneratorModel

    class Small(GeneratorModel):
        def load_context(self, context: object) -> None:
            self.bundle = WordBundle()

    folder = tmp_path_factory.mktemp("served") / "model"
    schema = Schema([ColSpec("string", "prompts")])
    mlflow.pyfunc.save_model(
        folder, python_model=Small(), signature=ModelSignature(schema), pip_requirements=[]
    )
    model = mlflow.pyfunc.load_model(str(folder))

    def score(body: object) -> tuple[int, str]:
        try:
            answer = invocations(json.dumps(body), "application/json", model, schema)
        except MlflowException as error:
            return error.get_http_status_code(), str(
                json.loads(error.serialize_as_json())["message"]
            )
        return answer.status, answer.response

    return score


@pytest.mark.parametrize(("body", "reason"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_request_gets_its_reason_in_the_message(
    scored: Callable[[object], tuple[int, str]], body: object, reason: str
) -> None:
    status, message = scored(body)
    assert status == 400 and reason in message and "Traceback" not in message
    assert "unexpected error" not in message


def test_a_right_request_is_answered(scored: Callable[[object], tuple[int, str]]) -> None:
    status, answer = scored(payload('["one two", "three"]'))
    (row,) = json.loads(answer)["predictions"]
    assert status == 200 and json.loads(row["adapter_config"])["r"] == 2
