from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from contracts import WIDTH, GeneratorContract, make_spec, random_rows, random_statistics
from helpers import SHARED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llgbm.generator import (
    GENERATORS,
    GeneratorConfig,
    LoraGenerator,
    MixtureConfig,
    generator_config,
    make_generator,
    read_generator,
)
from llgbm.generator.bundle import load_generator, save_generator
from llgbm.generator.networks import Standardiser
from llgbm.lora import LoraSpec
from llgbm.runtime import UserError
from llgbm.training import TrainingConfig

GOLDENS = SHARED / "goldens"


READINGS = ((0.0, "mean"), (0.2, "mean"), (0.0, "attention"))


class TestGenerators(GeneratorContract):
    @pytest.fixture(
        params=[(name, *how) for name in sorted(GENERATORS) for how in READINGS], ids=str
    )
    def config(self, request: pytest.FixtureRequest) -> GeneratorConfig:
        name, dropout, pooling = request.param
        return generator_config(name, hidden=32, blocks=2, dropout=dropout, pooling=pooling)

    def make(
        self, config: GeneratorConfig, spec: LoraSpec | None = None, seed: int = 0
    ) -> LoraGenerator:
        spec = spec or make_spec()
        generator = make_generator(config, spec, WIDTH, random_statistics(spec), seed)
        generator.prepare_training(random_rows(spec))
        return generator


class TestTokensOfHyperConv(GeneratorContract):
    """Its decoder reads two prompts at once, so that four are two groups."""

    @pytest.fixture(params=[2, 5])
    def config(self, request: pytest.FixtureRequest) -> GeneratorConfig:
        return generator_config("hyperconv_tokens", prompts=request.param, length=2)

    make = TestGenerators.make


@pytest.mark.parametrize(
    "change", [{"hidden": 0}, {"blocks": -1}, {"dropout": 1.0}, {"dropout": -0.1}]
)
def test_config_refuses_what_no_generator_can_have(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="hidden >= 1"):
        GeneratorConfig(**change)


def test_equal_configurations_have_one_class_and_one_id() -> None:
    plain, own = (
        TrainingConfig(generator=one) for one in (GeneratorConfig("mixture"), MixtureConfig())
    )
    assert plain == own and plain.hash == own.hash
    assert isinstance(plain.generator, MixtureConfig)
    read = read_generator("mixture,bases=32,dropout=0.1")
    assert read == MixtureConfig(bases=32, dropout=0.1)
    assert (read.text, GeneratorConfig().text) == ("mixture dropout=0.1 bases=32", "default")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("default,bases=3", "has no option 'bases'; it has: hidden"),
        ("mixture,bases=few", "bases is 'few', no number"),
        ("mixture,bases=0", "writes nothing"),
        ("mixture,bases", "cannot be read"),
        ("mixture,bases=2,bases=3", "cannot be read"),
        ("default,pooling=max", "unknown pooling 'max'; there are: mean, attention"),
        ("nosuch,hidden=3", "unknown generator"),
        ("hyperconv_tokens,pooling=attention", "no trunk: leave its option pooling out"),
        ("hyperconv_tokens,length=0", "reads 16 prompts of 0 tokens"),
    ],
)
def test_a_generator_that_cannot_be_is_a_users_mistake(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_generator(text)


def test_attention_tells_prompts_apart_which_the_mean_does_not() -> None:
    """Two prompt sets of one mean: pooled alike by the mean, and not by attention."""
    apart_NC = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    sets_ANC = torch.stack([apart_NC, apart_NC.mean(0).expand(4, -1)])
    for pooling, alike in (("mean", True), ("attention", False)):
        config = GeneratorConfig(hidden=16, pooling=pooling)
        spec = make_spec()
        generator = make_generator(config, spec, WIDTH, random_statistics(spec), 0)
        first, second = generator.generate(sets_ANC).flatten(spec)
        assert torch.allclose(first, second, atol=1e-5) == alike


def test_a_mixture_writes_within_the_span_of_its_bases() -> None:
    spec = make_spec()
    generator = make_generator(
        MixtureConfig(hidden=16, bases=2), spec, WIDTH, random_statistics(spec), 0
    )
    with torch.no_grad():
        tokens = generator(torch.randn(9, 3, WIDTH))
    assert torch.linalg.matrix_rank(tokens) == 2


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
