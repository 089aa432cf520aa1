"""The one training function of all scripts: a HyperConv decoder on a bank, by any number of processes.

Letters: B adapters in a batch, N prompts, L tokens of a prompt, C width of the features, T, H, W shape of the tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast, broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dnd.bank import AdapterBank, Samples, positions, read_json
from dnd.conditions import Part, TokenFeatures
from dnd.errors import DndError
from dnd.files import read_plain_pickle
from dnd.importance import importance_weights, load_importance
from dnd.model import HyperConvDecoderModel, HyperConvDecoderModel_SuperLarge, load_checkpoint
from dnd.model.decoderonly import trained_state
from dnd.names import model_in_place
from dnd.output import Output
from dnd.tokenizer import LoraTokenizer2D, default_token_size

MODEL_FILE, SETTINGS_FILE, TRAINER_FILE = "model.safetensors", "settings.json", "trainer.pt"
# The model comes last: a folder without it is no checkpoint.
CHECKPOINT_PATTERNS = (TRAINER_FILE, SETTINGS_FILE, MODEL_FILE)


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a training depends on but for the bank.

    `features` are the shapes between the condition's and the tokens'; `token_size` None follows from the adapters.
    `max_length` tokens of a prompt are read and, where `length` is smaller, shortened to it by two linear layers.
    `batch_size` counts adapters a process.
    """

    encoder: str = "sentence-transformers/all-MiniLM-L12-v2"
    layer: int | None = None
    part: Part = "prompts"
    n_prompts: int = 128
    max_length: int = 384
    length: int | None = None
    features: tuple[tuple[int, int, int], ...] = ()
    kernel_size: int = 9
    token_size: tuple[int, int] | None = None
    criterion_weight: str | None = None
    steps: int = 5000
    batch_size: int = 8
    learning_rate: float = 3e-5
    weight_decay: float = 0.1
    warmup_steps: int = 1
    max_norm: float = 1.0
    save_every: int = 100
    workers: int = 0
    seed: int = 999

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(tuple(shape) for shape in self.features))
        for name in ("n_prompts", "max_length", "steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise DndError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise DndError(f"learning_rate is {self.learning_rate:g}; it must be above 0")


@dataclass(frozen=True)
class Trained:
    """Result of a training: the model, the loss of every step averaged over the processes, and the checkpoint."""

    model: HyperConvDecoderModel
    losses: list[float]
    checkpoint: Path


def train(
    settings: TrainSettings,
    bank: AdapterBank,
    folder: Path,
    resume: bool = False,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """Train on a bank and leave `folder/checkpoint-STEP`; every process of a launch calls this.

    Two processes do what one does with twice the batch. With `resume` it goes on from the newest checkpoint of the
    same settings, to the same numbers. Raises DndError for a folder that cannot be written or holds another training, a
    bank, encoder or checkpoint that does not fit, and where the processes end with different weights.
    """
    check_training_folder(folder, resume)
    accelerator = make_accelerator()
    run = Run(settings, bank, accelerator)
    if resume:
        run.restore(newest_checkpoint(folder))
    for batch in run.batches():
        loss = run.advance(batch)
        report(run.step, loss)
        if run.step % settings.save_every == 0 or run.step == settings.steps:
            refuse_different_weights(accelerator, run.plain)
            if accelerator.is_main_process:
                run.save(folder)
            accelerator.wait_for_everyone()
    return Trained(run.plain, run.losses, newest_checkpoint(folder))


def make_accelerator() -> Accelerator:
    """All GPUs there are, in bfloat16; the CPU in float32 where there is none."""
    on_gpu = torch.cuda.is_available()
    # Without the plugin an environment variable would divide the loss.
    whole_steps = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision="bf16" if on_gpu else "no",
        gradient_accumulation_plugin=whole_steps,
    )


@dataclass
class Run:
    """State of one process of a training."""

    settings: TrainSettings
    bank: AdapterBank
    accelerator: Accelerator
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed)
        like = next(self.bank.states())
        self.tokenizer = LoraTokenizer2D(settings.token_size or default_token_size(like))
        text_tokenizer, encoder = load_encoder(settings.encoder)
        digest = [self.bank.digest if self.accelerator.is_main_process else ""]
        self.described = {
            **describe(settings, like, self.bank.config),
            "bank": broadcast_object_list(digest)[0],
        }
        weight_T = self._importance(self.tokenizer.n_tokens(like))
        self.plain = make_model(settings, self.tokenizer, like, encoder, weight_T)
        self.samples = Samples(
            self.bank,
            self.tokenizer,
            text_tokenizer,
            settings.n_prompts,
            settings.max_length,
            settings.seed,
        )
        trained = [p for p in self.plain.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.model, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        # Not given to Accelerate, which would step it once a process: it counts the same steps on every rank.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)

    def _importance(self, n_tokens: int) -> Tensor:
        """Read, or computed by the first process from the bank and sent to the others."""
        if self.settings.criterion_weight is not None:
            return load_importance(self.settings.criterion_weight, n_tokens)
        own = (
            importance_weights(self.bank.states(), self.tokenizer)
            if self.accelerator.is_main_process
            else None
        )
        weight_T = torch.ones(n_tokens) if own is None else own
        return broadcast(weight_T.to(self.accelerator.device)).cpu()

    def _rate(self, step: int) -> float:
        """Linear warm-up, then cosine decay to 0."""
        warm, steps = self.settings.warmup_steps, self.settings.steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    def batches(self) -> DataLoader[Any]:
        """This process's share of every step from the present one on."""
        rank, n_ranks = self.accelerator.process_index, self.accelerator.num_processes
        steps = range(self.step, self.settings.steps)
        shares = [positions(step, self.settings.batch_size, rank, n_ranks) for step in steps]
        return DataLoader(self.samples, batch_sampler=shares, num_workers=self.settings.workers)

    def advance(self, batch: Mapping[str, Tensor]) -> float:
        """One step; the loss averaged over the processes."""
        placed = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        target_BTHW = placed.pop("tokens")
        loss = self.model(placed, target_BTHW)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        self.losses.append(self.accelerator.reduce(loss.detach().float(), "mean").item())
        return self.losses[-1]

    def save(self, folder: Path) -> None:
        """Write `checkpoint-STEP`, whole or not at all; those before it are then removed."""
        with Output(folder / f"checkpoint-{self.step:06d}", CHECKPOINT_PATTERNS).writing() as stage:
            save_file(
                {k: v.contiguous() for k, v in trained_state(self.plain).items()},
                stage / MODEL_FILE,
            )
            (stage / SETTINGS_FILE).write_text(json.dumps(self.described, indent=1))
            trainer = {
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            }
            with (stage / TRAINER_FILE).open(
                "wb"
            ) as stream:  # of a path torch would hide the system's error
                torch.save({**trainer, "step": self.step, "losses": self.losses}, stream)
        for older in checkpoints_in(folder)[:-1]:
            Output(older, CHECKPOINT_PATTERNS).remove()

    def restore(self, checkpoint: Path) -> None:
        """Go on from what `save` wrote. Raises DndError where settings or adapters are others."""
        # Checkpoints of an older version do not name their bank.
        stored = {"bank": self.described["bank"], **read_json(checkpoint / SETTINGS_FILE)}
        if stored != json.loads(json.dumps(self.described)):
            raise DndError(
                f"{checkpoint} is of other settings or another bank: resume with the same, or name another --out"
            )
        load_checkpoint(self.plain, checkpoint / MODEL_FILE)
        state = read_plain_pickle(checkpoint / TRAINER_FILE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.losses = state["step"], state["losses"]


def describe(
    settings: TrainSettings, like: Mapping[str, Tensor], adapter_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a checkpoint, enough to generate from it without the bank."""
    shapes = {key: list(tensor.shape) for key, tensor in like.items()}
    return {"settings": asdict(settings), "shapes": shapes, "adapter_config": dict(adapter_config)}


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a training in the order of their steps; folders of the same name by others do not count."""
    names = (MODEL_FILE, SETTINGS_FILE, TRAINER_FILE)
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d{6,}", path.name)
    ]
    return sorted((p for p in found if all((p / name).is_file() for name in names)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Step that a checkpoint's name tells."""
    return int(checkpoint.name.partition("-")[2])


def check_training_folder(folder: Path, resume: bool = False) -> None:
    """Check the folder that checkpoints will be written to, before anything else.

    Raises DndError where it cannot be written, and where it holds checkpoints that are not to be gone on from: a new
    training would be mixed up with them.
    """
    Output(folder, ())
    found = checkpoints_in(folder)
    if found and not resume:
        raise DndError(
            f"{folder} holds {found[-1].name} of an earlier training: go on with it by --resume, or name another --out"
        )


def newest_checkpoint(folder: Path) -> Path:
    """Return the last checkpoint that a training left. Raises DndError for none."""
    found = checkpoints_in(folder)
    if not found:
        raise DndError(
            f"{folder} holds no checkpoint: train first, or name the folder that a training wrote"
        )
    return found[-1]


def load_encoder(name: str) -> tuple[Any, nn.Module]:
    """Tokenizer and frozen model of a folder or a hub name, float32. Raises DndError where it cannot be loaded."""
    from transformers import AutoModel, AutoTokenizer

    try:
        source = model_in_place(name)
        tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DndError(
            f"no encoder can be loaded from {name!r}: name a folder or a hub id with --encoder"
        ) from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, model.float().eval()


def make_model(
    settings: TrainSettings,
    tokenizer: LoraTokenizer2D,
    like: Mapping[str, Tensor],
    encoder: nn.Module,
    weight_T: Tensor,
) -> HyperConvDecoderModel:
    """Model for adapters like `like` and conditions of an encoder."""
    extractor = TokenFeatures(encoder, settings.layer)
    width = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    first = (settings.n_prompts, settings.length or settings.max_length, width)
    last = (tokenizer.n_tokens(like), *tokenizer.token_size)
    config = {
        "features": [first, *settings.features, last],
        "condition_dim": first,
        "kernel_size": settings.kernel_size,
    }
    if first[1] == settings.max_length:
        return HyperConvDecoderModel(config, weight_T, extractor)
    return HyperConvDecoderModel_SuperLarge(
        config, weight_T, settings.max_length, first[1], extractor
    )


def refuse_different_weights(accelerator: Accelerator, model: HyperConvDecoderModel) -> None:
    """Raise DndError unless all processes hold the same weights to the last bit."""
    digest = hashlib.sha256()
    for tensor in trained_state(model).values():
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    own = torch.tensor([int.from_bytes(digest.digest()[:7], "big")], device=accelerator.device)
    if accelerator.gather(own).unique().numel() != 1:
        raise DndError(
            "the processes hold different weights: they did not see the same gradients; start them again"
        )
