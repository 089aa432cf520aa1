"""Serve a registered generator as an MLflow model: prompts in, PEFT adapters out.

MLflow stores this file next to the bundle and runs it on loading (models from code), so nothing is pickled.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

if TYPE_CHECKING:
    from llgbm.generator.bundle import GeneratorBundle


# Of one request; a task is described by far fewer.
MOST_PROMPTS = 1000
# What a row may ask with beside prompts.
OTHERS = {"description": str, "subsets": int, "seed": int, "sample": int}


class GeneratorModel(PythonModel):
    """Generates one LoRA adapter per row.

    A row's `prompts` is a JSON list of texts: one adapter is generated from all prompts of a task. It may be an object
    of `prompts`, `description` and `subsets` instead, or of `seed` and `sample` to draw one. A column of lists would
    not survive CSV and some clients of MLflow's scoring server.
    """

    bundle: GeneratorBundle

    def load_context(self, context: Any) -> None:
        """Load the bundle that was registered with the model. Raises UserError if it is damaged."""
        from llgbm.generator.bundle import GeneratorBundle

        self.bundle = GeneratorBundle.load(context.artifacts["bundle"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return `adapter_safetensors_base64` and `adapter_config` (JSON), row by row.

        Write the decoded first as `adapter_model.safetensors` and the second as `adapter_config.json` into a folder,
        and PEFT loads it. Raises MlflowException naming the row whose prompts cannot be used: of other errors the
        server keeps the reason to itself.
        """
        config = json.dumps(self.bundle.adapter_config())
        rows = [_asked(index, text) for index, text in enumerate(model_input["prompts"])]
        adapters = [self._adapter(*asked) for asked in rows]
        return pd.DataFrame(
            {"adapter_safetensors_base64": adapters, "adapter_config": [config] * len(rows)}
        )

    def _adapter(self, prompts: list[str], others: dict[str, Any]) -> str:
        try:
            if "sample" in others:
                seed, number = others["seed"], others["sample"]
                description = others.get("description", "")
                content = self.bundle.pack_sample(prompts, seed, number, description)
            else:
                content = self.bundle.pack_adapter(prompts, **others)
        except ValueError as error:  # what a user can mend, such as an encoder that is another
            raise _refusal(str(error)) from error
        return base64.b64encode(content).decode("ascii")


def _asked(index: int, text: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the prompts of a row, and what else it asks with."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return _prompts(index, text, found), {}
    others = {name: found[name] for name, kind in OTHERS.items() if type(found.get(name)) is kind}
    odd = found.keys() - others.keys() - {"prompts"}
    halves = ("seed" in others) != ("sample" in others)
    if odd or halves or not others or {"subsets", "sample"} <= others.keys():
        raise _refusal(
            f"row {index}: `prompts` must be a JSON list of texts, or an object of prompts (a list), description (a "
            f"text) and subsets (a number) or seed and sample (two numbers), got {str(text)[:80]!r}"
        )
    prompts = found.get("prompts", [])
    return prompts and _prompts(index, text, prompts), others


def _prompts(index: int, text: Any, prompts: Any) -> list[str]:
    usable = (
        isinstance(prompts, list)
        and prompts
        and all(isinstance(p, str) and p.strip() for p in prompts)
    )
    if not usable:
        raise _refusal(
            f"row {index}: `prompts` must be a JSON list of one or more texts, got {str(text)[:80]!r}"
        )
    if len(prompts) > MOST_PROMPTS:
        raise _refusal(f"row {index}: {len(prompts)} prompts, at most {MOST_PROMPTS} are read")
    return prompts


def _refusal(reason: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(reason)


set_model(GeneratorModel())
