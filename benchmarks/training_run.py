"""Train in stages that are counted in steps and go on where they were stopped; used by the training scripts."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from records import write_record
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


def setting(default: Any, meaning: str) -> Any:
    """A field of a recipe, with what its option's help says."""
    return field(default=default, metadata={"help": meaning})


def add_recipe(parser: argparse.ArgumentParser, recipe_class: type, about: str) -> None:
    """Give a script an option for each setting of its recipe."""
    group = parser.add_argument_group("recipe", about)
    for item in fields(recipe_class):
        shown = "" if item.default is None else f" (default: {item.default:.6g})"
        kind: dict[str, Any] = {"type": int if item.default is None else type(item.default), "metavar": "N"}
        if isinstance(item.default, bool):
            shown, kind = "", {"action": argparse.BooleanOptionalAction}
        flag = f"--{item.name.replace('_', '-')}"
        group.add_argument(flag, default=item.default, help=item.metadata["help"] + shown, **kind)


def recipe_of(args: argparse.Namespace, recipe_class: type) -> Any:
    """Return the recipe that those options say."""
    return recipe_class(**{item.name: getattr(args, item.name) for item in fields(recipe_class)})


def work_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the unfinished run, made; refuse an earlier run's without --resume, and no saving."""
    if args.save_every < 1:
        raise SystemExit(f"--save-every must be at least 1 step, got {args.save_every}")
    work = args.work or args.out.with_name(args.out.name + ".work")
    if work.exists() and any(work.iterdir()) and not args.resume:
        raise SystemExit(f"{work} holds an earlier run: give --resume to go on with it, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    return work


def tell(report: dict[str, Any], path: Path | None) -> None:
    """Print a run's report, and write it where --json says."""
    print(json.dumps(report, indent=1))
    if path is not None:
        write_record(path, report)


@dataclass
class Progress:
    """How far a run is, written with the weights: finished stages, the step of the current one, seconds spent."""

    done: list[str] = field(default_factory=list)
    step: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def autocast(bfloat16: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)


def optimizer_for(modules: Iterable[nn.Module], rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not norms, biases and embeddings."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            (free if parameter.ndim < 2 or "embed" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


class TrainingRun:
    """One training run in a work folder: what it trains, how far it is, and how to go on from there.

    A subclass names its `stages` in order and has a method for each.

    recipe   a dataclass of everything that decides the weights, with `bfloat16`
    modules  what is saved, by name
    """

    stages: ClassVar[tuple[str, ...]]

    def __init__(self, recipe: Any, work: Path, save_every: int, modules: dict[str, nn.Module]) -> None:
        self.recipe, self.work, self.save_every, self.modules = recipe, work, save_every, modules
        self.progress = Progress()
        self.stored: dict[str, Any] | None = None

    def used(self, name: str) -> bool:
        """Whether a field of the recipe has had its effect already, so that --resume cannot change it any more."""
        return True

    def go(self, resume: bool) -> None:
        """Run the stages that are still to run."""
        if resume and (self.work / "state.pt").exists():
            self.resume()
        for stage in self.stages:
            if stage not in self.progress.done:
                getattr(self, stage)()

    def resume(self) -> None:
        stored = torch.load(self.work / "state.pt", weights_only=True)
        progress = stored["progress"]
        self.progress = Progress(progress["done"], progress["step"], defaultdict(float, progress["seconds"]))
        changed = [name for name, value in asdict(self.recipe).items() if stored["recipe"].get(name) != value]
        changed = [name for name in changed if self.used(name)]
        if changed:
            raise SystemExit(f"--resume needs the recipe the run was started with; changed: {', '.join(changed)}")
        for name, module in self.modules.items():
            module.load_state_dict(stored[name])
        self.stored = stored

    def save(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "progress": {**vars(self.progress), "seconds": dict(self.progress.seconds)},
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": optimizer.state_dict() if optimizer else None,
        }
        torch.save(state, self.work / "state.part")
        os.replace(self.work / "state.part", self.work / "state.pt")

    def train(
        self,
        stage: str,
        batches: Dataset,
        modules: list[nn.Module],
        rate: float,
        loss_of: Callable[[dict[str, Tensor]], Tensor],
        report: Callable[[], dict[str, float]],
    ) -> None:
        """Take the steps of a stage that are still to take, saving now and then."""
        optimizer, steps = optimizer_for(modules, rate), len(batches)  # type: ignore[arg-type]
        if self.stored and self.stored["optimizer"]:
            optimizer.load_state_dict(self.stored["optimizer"])
        self.stored = None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        order = range(self.progress.step, steps)
        loader = DataLoader(batches, batch_size=None, sampler=order, num_workers=1, prefetch_factor=4)
        bar = tqdm(loader, desc=stage, initial=self.progress.step, total=steps, mininterval=5)
        clock, mean = time.monotonic(), None
        for step, batch in zip(order, bar, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step, steps)
            with autocast(self.recipe.bfloat16):
                loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            self.progress.step = step + 1
            if (step + 1) % self.save_every == 0 or step + 1 == steps:
                tqdm.write(f"{stage} {step + 1}: loss {mean:.3f}, {report()}")
                self.progress.seconds[stage] += time.monotonic() - clock
                clock = time.monotonic()
                self.save(optimizer)
        self.finish_stage(stage)

    def finish_stage(self, stage: str) -> None:
        self.progress.done.append(stage)
        self.progress.step = 0
        self.save()
