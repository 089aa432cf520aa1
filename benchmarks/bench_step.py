"""One multitask step of a generator for a base of full size, both randomly initialised: seconds, tokens/s, peak memory.

    python benchmarks/bench_step.py --device cuda
    python benchmarks/bench_step.py --device cpu --layers 2 --sizes qwen2.5-0.5b --adapters 4

The step is that of `llgbm.training.Trial`, on made-up teachers and probes; the numbers do not depend on what is learnt.
`--layers` cuts the base's depth where the machine is too small for all of it; the result says so. The last line of
standard output is one JSON object, which also goes to `benchmarks/results` (from a dirty tree: to `scratch/` there).
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from record import environment, save
from torch import nn
from transformers import Qwen2ForCausalLM

from llgbm.dataset import ExperimentData
from llgbm.delta import DeltaTable, EncodedProbes
from llgbm.estimate import ProbeSize, estimate_trial
from llgbm.functional import FunctionalLoRA
from llgbm.generator.conditions import ConditionPools
from llgbm.models.encoding import EncodedPairs
from llgbm.models.load import DTYPES, OWN_PREFIX, PublishedSize, model_size, qwen2_config
from llgbm.runtime import UserError, pick_device
from llgbm.training import TrainingConfig, Trial

ADAPTERS = {"qwen2.5-0.5b": 16, "qwen2.5-1.5b": 8}
TOY = PublishedSize(
    hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, rank=2, alpha=4.0, hub=""
)
CONDITION = 384


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", nargs="+", default=list(ADAPTERS))
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of the base; the generator is float32"
    )
    parser.add_argument("--adapters", type=int, help="a step (default: 16 for 0.5B, 8 for 1.5B)")
    parser.add_argument("--probes", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bank", type=int, default=32, help="teachers")
    parser.add_argument("--layers", type=int, help="cut the base to so many")
    parser.add_argument("--steps", type=int, default=10, help="timed, after two that are not")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--probe-chunk", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a toy size; says nothing but that it runs"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.sizes, options.adapters, options.bank, options.steps, options.tokens = (
            ["toy"],
            2,
            3,
            1,
            8,
        )
    return options


def make_base(size: PublishedSize, device: str, dtype: torch.dtype) -> FunctionalLoRA:
    """A base with random weights, made on its device in its dtype."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Qwen2ForCausalLM(qwen2_config(size))
        torch.set_default_dtype(torch.float32)
    return FunctionalLoRA(nn.Module.eval(model), size.rank, size.alpha)


def make_data(
    lora_model: FunctionalLoRA, n: int, probes: int, tokens: int, device: str
) -> ExperimentData:
    """Made-up teachers, each a task of its own, with probes read at the last two tokens."""
    hidden, vocabulary = lora_model.model.config.hidden_size, lora_model.model.config.vocab_size
    ids = torch.randint(vocabulary, (n, probes, tokens))
    positions = torch.tensor([tokens - 2, tokens - 1]).expand(n, probes, 2).contiguous()
    encoded = EncodedProbes(ids, positions, torch.ones_like(positions, dtype=torch.bool))
    states = torch.randn(2, n, probes, 2, hidden)
    table = DeltaTable(encoded, states[0], states[1])
    names = tuple(f"task{i}" for i in range(n))
    return ExperimentData(
        adapter_ids=names,
        tasks=names,
        families=names,
        rows={"train": tuple(range(n)), "val": (), "test": ()},
        values_AV=0.01 * torch.randn(n, lora_model.spec.n_values),
        multitask_V=torch.zeros(lora_model.spec.n_values),
        conditions=ConditionPools(
            torch.randn(n, 32, CONDITION), torch.randn(n, 16, CONDITION), torch.randn(4, CONDITION)
        ),
        loss_deltas=table,
        shared_deltas=table,
        generic_deltas=table,
        examples=EncodedPairs(ids[:, 0], ids[:, 0]),
        n_examples=1,
        encoder="random",
        hash="random",
    ).to(device)


def peak_bytes(device: str) -> int:
    """Of the GPU since the last reset; of this process since its start."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_steps(trial: Trial, steps: int, device: str) -> list[float]:
    """Seconds of each step, two more run before."""
    seconds = []
    for batch in trial.batches():
        started = time.perf_counter()
        trial.advance(batch)  # it reads its loss, which waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds[2 : steps + 2]


def measure(name: str, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The numbers of one size."""
    size = TOY if name == "toy" else model_size(name)
    if not isinstance(size, PublishedSize):
        raise UserError(f"{name} is no published size; there are: {', '.join(ADAPTERS)}")
    size = replace(size, layers=arguments.layers or size.layers)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(device)
    lora_model = make_base(size, device, DTYPES[arguments.dtype])
    adapters = arguments.adapters or ADAPTERS[name]
    config = TrainingConfig(
        model_size=f"{OWN_PREFIX}toy" if name == "toy" else name,
        steps=arguments.steps + 2,
        batch_size=adapters,
        n_probes=arguments.probes,
        activation_checkpointing=arguments.checkpointing,
        probe_chunk=arguments.probe_chunk,
    )
    n = max(arguments.bank, adapters)
    data = make_data(lora_model, n, arguments.probes, arguments.tokens, device)
    seconds = statistics.median(
        time_steps(Trial(config, data, lora_model), arguments.steps, device)
    )
    estimate = estimate_trial(
        config, lora_model.model, lora_model.spec, n, CONDITION, ProbeSize(arguments.tokens)
    )
    return {
        "size": name,
        "layers": size.layers,
        "whole": arguments.layers is None,
        "adapters": adapters,
        "teachers": n,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(adapters * arguments.probes * arguments.tokens / seconds),
        "tflops": round(estimate.step_flops / seconds / 1e12, 3),
        "peak_gb": round(
            (peak_bytes(device) - (0 if device.startswith("cuda") else before)) / 1e9, 3
        ),
        "estimated_peak_gb": round(estimate.peak_bytes / 1e9, 3),
        "estimated_memory_gb": {
            key: round(value / 1e9, 3) for key, value in estimate.memory.items()
        },
        "generator_parameters": estimate.generator_parameters,
        "config": {k: v for k, v in asdict(config).items() if k != "generator"}
        | asdict(config.generator),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each size in turn."""
    arguments = parse_arguments(argv)
    device = pick_device(arguments.device)
    results = []
    for name in arguments.sizes:
        results.append(measure(name, arguments, device))
        gc.collect()
    card = torch.cuda.get_device_name() if device == "cuda" else device
    facts = {**environment("torch", "transformers"), "device": card}
    result = {
        "benchmark": "step",
        "config": vars(arguments),
        "environment": facts,
        "results": results,
    }
    cut = "" if arguments.layers is None else "_cut"
    save(f"step_{device}{cut}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
