"""DnD's tokens as the standardisation of training data, and the generator that predicts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contracts import WIDTH, make_spec, random_conditions, random_statistics
from dnd.errors import DndError
from dnd.tokenizer import LoraTokenizer2D
from helpers import facts_of

from llgbm.dataset import Draw, Sampling, Text2Qwen25LoRA_DeltaDataset
from llgbm.generator import GeneratorConfig, HyperConvGenerator, make_generator
from llgbm.generator.bundle import GeneratorBundle
from llgbm.generator.conditions import BaseModelEncoder
from llgbm.generator.hyperconv import TokenStandardiser, token_statistics
from llgbm.generator.networks import Standardiser
from llgbm.lora import LoraSpec
from llgbm.lora.adapters import load_adapter
from llgbm.losses import weight_loss
from llgbm.models.load import Base
from llgbm.probes import create_generic_probes
from llgbm.training import TrainingConfig, train
from llgbm.world import World
from tuning.registry.register import _code_paths


@pytest.mark.parametrize("rank", [1, 3])
def test_tokens_of_flat_adapters_come_back(rank: int) -> None:
    spec = make_spec(rank)
    values = torch.randn(4, spec.n_values, generator=torch.Generator().manual_seed(0)) * 0.1
    standardiser = TokenStandardiser(spec)
    tokens = standardiser.encode(values)
    assert tokens.shape == (4, *standardiser.shape) and tokens.isnan().any()
    torch.testing.assert_close(standardiser.decode(tokens), values, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        standardiser.decode(tokens.nan_to_num(nan=7.0)), values, atol=1e-6, rtol=0
    )


def test_a_token_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(DndError, match="do not divide"):
        TokenStandardiser(make_spec(), (4, 6))


def test_the_data_set_of_a_bank_gives_the_tokens_of_dnd(world: World, tmp_path: Path) -> None:
    tasks = list(world.bank.adapters.values())[:3]
    encoder = BaseModelEncoder(world.base)
    probes = create_generic_probes()
    dataset = Text2Qwen25LoRA_DeltaDataset(
        world.bank, world.base, encoder, probes, tmp_path, Sampling(tuple(tasks), 2, 2)
    )
    assert len(dataset) == len([t for t in world.bank.adapters.values() if t in tasks])
    for row, adapter_id in enumerate(list(world.bank.adapters)[: len(dataset)]):
        state = load_adapter(world.bank.adapter_folder(adapter_id))
        order = [
            f"base_model.model.{m.name}.lora_{side}.weight"
            for m in world.bank.spec.modules
            for side in "AB"
        ]
        wanted = LoraTokenizer2D((6, 66)).tokenize({key: state[key] for key in order})
        got = dataset[Draw(row, 0)]["tokens"]
        torch.testing.assert_close(got, wanted, equal_nan=True)
        assert weight_loss(got[None], wanted[None]).item() < 1e-9


def hyperconv() -> HyperConvGenerator:
    spec = make_spec()
    made = make_generator(GeneratorConfig("hyperconv", 32), spec, WIDTH, random_statistics(spec), 0)
    assert isinstance(made, HyperConvGenerator)
    return made


def test_hyperconv_starts_near_the_mean_adapter() -> None:
    """What its decoder writes is counted from there; statistics with a small spread leave next to nothing else."""
    spec = make_spec()
    exact = random_statistics(spec)
    narrow = Standardiser(exact.mean_V, exact.scale_V * 1e-3)
    start, spread = token_statistics(TokenStandardiser(spec), narrow)
    torch.testing.assert_close(
        TokenStandardiser(spec).decode(start[None])[0], exact.mean_V, atol=1e-2, rtol=1e-2
    )
    assert (spread > 0).all() and spread.isfinite().all()
    generator = hyperconv()
    with torch.no_grad():
        for parameter in generator.decoder.parameters():
            parameter.zero_()
        tokens = generator(random_conditions())
    assert torch.equal(tokens, generator.start_UXY.expand_as(tokens))


def test_hyperconv_reads_its_shapes_off_the_spec() -> None:
    generator = hyperconv()
    assert generator.decoder.token_dim == TokenStandardiser(make_spec()).shape
    assert generator(random_conditions(2)).shape == (2, *generator.decoder.token_dim)


@pytest.mark.parametrize(
    ("weights", "name"), [((1.0, 0.0), "loss/weight"), ((0.0, 1.0), "loss/delta")]
)
def test_hyperconv_trains_on_weights_and_on_behaviour(
    world: World, config: TrainingConfig, weights: tuple[float, float], name: str
) -> None:
    own = replace(
        config, lambda_weight=weights[0], lambda_delta=weights[1], steps=40, eval_every=40
    )
    found: list[float] = []
    own = replace(own, generator=GeneratorConfig("hyperconv", 64))
    train(
        own, world.data, world.lora_model, lambda step, metrics: found.append(metrics[name]) or True
    )
    assert sum(found[-5:]) < sum(found[:5])


def test_a_bundle_of_hyperconv_writes_what_it_wrote_before_and_its_code_is_shipped(
    tiny_base: Base, tiny_spec: LoraSpec, tmp_path: Path
) -> None:
    config, width = GeneratorConfig("hyperconv", 32), tiny_base.model.config.hidden_size
    made = make_generator(config, tiny_spec, width, random_statistics(tiny_spec), 0)
    facts = facts_of(tiny_base)
    GeneratorBundle.save(tmp_path, made, config, facts)
    prompts = ["give the last word : red green =>", "give the last word : one two =>"]
    wanted, got = (
        GeneratorBundle(made, facts).generate(prompts),
        GeneratorBundle.load(tmp_path).generate(prompts),
    )
    assert all(torch.equal(got[key], value) for key, value in wanted.items())
    shipped = [Path(folder) for folder in _code_paths()]
    assert any((folder / "model" / "decoderonly.py").is_file() for folder in shipped)
