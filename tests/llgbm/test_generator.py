from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from contracts import WIDTH, GeneratorContract, make_spec, random_statistics
from helpers import SHARED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llgbm.generator import GENERATORS, GeneratorConfig, LoraGenerator, make_generator
from llgbm.generator.bundle import load_generator, save_generator
from llgbm.generator.networks import Standardiser
from llgbm.lora import LoraSpec
from llgbm.runtime import UserError

GOLDENS = SHARED / "goldens"


class TestGenerators(GeneratorContract):
    @pytest.fixture(
        params=[(name, dropout) for name in sorted(GENERATORS) for dropout in (0.0, 0.2)], ids=str
    )
    def config(self, request: pytest.FixtureRequest) -> GeneratorConfig:
        name, dropout = request.param
        return GeneratorConfig(name=name, hidden=32, blocks=2, dropout=dropout)

    def make(
        self, config: GeneratorConfig, spec: LoraSpec | None = None, seed: int = 0
    ) -> LoraGenerator:
        spec = spec or make_spec()
        return make_generator(config, spec, WIDTH, random_statistics(spec), seed)


@pytest.mark.parametrize(
    "change", [{"hidden": 0}, {"blocks": -1}, {"dropout": 1.0}, {"dropout": -0.1}]
)
def test_config_refuses_what_no_generator_can_have(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="hidden >= 1"):
        GeneratorConfig(**change)


def test_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"'nosuch'; there are: .*{sorted(GENERATORS)[0]}"):
        make_generator(
            GeneratorConfig(name="nosuch"), make_spec(), WIDTH, random_statistics(make_spec()), 0
        )


def test_statistics_of_another_base_are_refused() -> None:
    with pytest.raises(ValueError, match="another base or rank"):
        make_generator(GeneratorConfig(), make_spec(2), WIDTH, random_statistics(make_spec(3)), 0)


def test_folder_without_a_generator_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no generator"):
        load_generator(tmp_path)


def test_spoiled_generator_is_refused_in_one_sentence_that_names_it(tmp_path: Path) -> None:
    config, statistics = GeneratorConfig(hidden=16), random_statistics(make_spec())
    generator = make_generator(config, make_spec(), WIDTH, statistics, 0)
    weights, facts = tmp_path / "generator.safetensors", tmp_path / "generator.json"
    damages: list[Callable[[], object]] = [
        lambda: weights.write_bytes(weights.read_bytes()[:1000]),
        lambda: weights.write_bytes(b""),
        lambda: facts.write_text(facts.read_text()[:50]),
        lambda: facts.write_text("{}"),
        lambda: facts.write_text("[]"),
        lambda: facts.write_text(facts.read_text().replace('"hidden": 16', '"hidden": 8')),
        lambda: save_file(
            {**load_file(weights), "inlet.bias": torch.full((16,), float("nan"))}, weights
        ),
    ]
    for damage in damages:
        save_generator(tmp_path, generator, config, {})
        load_generator(tmp_path)
        damage()
        with pytest.raises(UserError) as caught:
            load_generator(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_standardiser_decodes_what_it_encodes_and_survives_a_constant_value() -> None:
    values = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) * 3 + 2
    values[:, 4] = 1.5
    fitted = Standardiser.fit(values)
    assert torch.isfinite(fitted.encode(values)).all()
    torch.testing.assert_close(fitted.decode(fitted.encode(values)), values)
    torch.testing.assert_close(fitted.encode(values).mean(0), torch.zeros(9), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least two"):
        Standardiser.fit(values[:1])


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not (GOLDENS / name).is_file():
        pytest.skip(f"no golden {name} beside the repository")
    with safe_open(GOLDENS / name, "pt") as stream:
        return {key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata()


def base_framework(name: str) -> ModuleType:
    return pytest.importorskip(name)


def test_hyperconv_decoder_gives_the_output_of_upstream() -> None:
    tensors, facts = golden("hyperconv_decoder.safetensors")
    decoders = base_framework("dnd.model.decoderonly")
    features = [tuple(shape) for shape in json.loads(facts["features"])]
    model = decoders.HyperConvDecoder(
        features=features, condition_dim=features[0], kernel_size=int(facts["kernel_size"])
    )
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    model.load_state_dict(state, strict=True)
    given = tensors["input"].clone()
    with torch.no_grad():
        output = model.eval()(given)
    torch.testing.assert_close(output, tensors["output"], atol=1e-5, rtol=0)
    assert torch.equal(given, tensors["input"])


@pytest.mark.parametrize("size", ["2505", "2515"])
def test_tokenizer_gives_the_tokens_of_upstream_and_the_way_back(size: str) -> None:
    tensors, facts = golden(f"tokenizer_qwen{size}.safetensors")
    register = base_framework("dnd.tokenizer.register")
    tokenizer = getattr(register, f"Qwen{size}LoRA_Tokenizer2D")(
        token_size=tuple(json.loads(facts["token_size"]))
    )
    lora = OrderedDict((key, tensors[f"lora.{key}"]) for key in json.loads(facts["key_order"]))
    tokens = tokenizer.tokenize(OrderedDict(lora))
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    torch.testing.assert_close(tokens, tensors["tokens"], atol=1e-6, rtol=0, equal_nan=True)
    back = tokenizer.detokenize(OrderedDict(lora), tensors["tokens"].clone())
    for key, value in lora.items():
        torch.testing.assert_close(back[key], value, atol=1e-6, rtol=0)
