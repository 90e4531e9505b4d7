"""Lightning's and transformers' Trainer and accelerate train with the optimizers and resume bit for bit."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.optim.adapter_cases import (
    ADAPTERS,
    assert_equal,
    assert_states_equal,
    batch,
    every_adapter,
    network,
    objective,
    weights,
)

pytestmark = pytest.mark.integrations


def library(name: str) -> Any:
    """A library, or nothing where these tests are not run."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


BATCHES, EXAMPLES = 4, 8
DATA = TensorDataset(*(torch.cat(part) for part in zip(*map(batch, range(BATCHES)), strict=True)))


# --- Lightning ------------------------------------------------------------------------------------------------------


def lightning_module(name: str, *, manual: bool = False) -> Any:
    """A LightningModule around the network, with a schedule of every step."""
    lightning = library("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = network(), not manual

        def training_step(self, pair: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.model(pair[0]), pair[1])
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = ADAPTERS[name].make(self.named_parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def lightning_trainer(epochs: int, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return library("lightning").Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet, **options
    )


@every_adapter
def test_lightning_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    loader = DataLoader(DATA, EXAMPLES)
    straight = lightning_module(name)
    lightning_trainer(4, gradient_clip_val=0.5).fit(straight, loader)
    begun, trainer = lightning_module(name), lightning_trainer(2, gradient_clip_val=0.5)
    trainer.fit(begun, loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = lightning_module(name)
    lightning_trainer(4, gradient_clip_val=0.5).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(straight), weights(resumed))
    assert not torch.equal(weights(straight)[0], weights(begun)[0])


def test_lightning_trains_by_hand_and_accumulates() -> None:
    loader = DataLoader(DATA, EXAMPLES)
    by_hand, automatic = lightning_module("soap", manual=True), lightning_module("soap")
    lightning_trainer(2).fit(by_hand, loader)
    lightning_trainer(2, accumulate_grad_batches=2, precision="bf16-mixed").fit(automatic, loader)
    assert all(p.isfinite().all() for p in (*by_hand.parameters(), *automatic.parameters()))


def test_fabric_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    fabric = library("lightning").Fabric(accelerator="cpu", devices=1)

    def begin() -> Any:
        model = network()
        return fabric.setup(model, ADAPTERS["soap"].make(model.named_parameters(), lr=0.05))

    def go_on(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            fabric.backward(objective(model, step))
            optimizer.step()

    model, optimizer = begin()
    go_on(model, optimizer, range(5))
    fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    go_on(model, optimizer, range(5, 9))
    other, second = begin()
    fabric.load(tmp_path / "fabric.ckpt", {"model": other, "optimizer": second})
    go_on(other, second, range(5, 9))
    assert_equal(weights(model), weights(other))


# --- transformers ---------------------------------------------------------------------------------------------------


class Tokens(Dataset[dict[str, Tensor]]):
    """Sixteen sequences of six tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(50, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def transformers_trainer(name: str, folder: Path, steps: int) -> Any:
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    decays = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decays, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = ADAPTERS[name].make(groups, lr=0.01)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 12)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4, use_cpu=True,
        report_to=[], disable_tqdm=True, max_grad_norm=1.0, logging_strategy="no",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), optimizers=(optimizer, scheduler))


@every_adapter
def test_transformers_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight = transformers_trainer(name, tmp_path / "straight", 8)
    straight.train()
    transformers_trainer(name, tmp_path / "half", 4).train()
    resumed = transformers_trainer(name, tmp_path / "half", 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert_equal(weights(straight.model), weights(resumed.model))
    assert_states_equal(straight.optimizer.optimizer, resumed.optimizer.optimizer)


# --- accelerate -----------------------------------------------------------------------------------------------------


def accelerated(name: str) -> tuple[Any, ...]:
    accelerate = library("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = ADAPTERS[name].make(model.named_parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def go_on(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, steps: range) -> None:
    for step in steps:
        with accelerator.accumulate(model):
            accelerator.backward(objective(model, step))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@every_adapter
def test_accelerate_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    accelerator, model, optimizer, scheduler = accelerated(name)
    go_on(accelerator, model, optimizer, scheduler, range(6))
    accelerator.save_state(str(tmp_path / "state"))
    go_on(accelerator, model, optimizer, scheduler, range(6, 12))
    second, other, again, schedule = accelerated(name)
    second.load_state(str(tmp_path / "state"))
    go_on(second, other, again, schedule, range(6, 12))
    assert_equal(weights(model), weights(other))
