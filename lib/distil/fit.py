"""The training that the embedded pair and the adapters share: batches, schedule, loop, states and log.

A training goes from state to state. What lies between two states, a *chunk* of batches, is a function of the
place where it begins, so a run that was broken off goes on to the same weights as one that was not."""

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..runs import exclusive, read_state, write_state, write_text
from ..settings import UserError, path_shown

Window = tuple[list[int], list[bool]]  # token ids, and for each whether it is learnt
Batch = tuple[Tensor, Tensor, int]  # ids and targets [rows, length], and the tokens without padding


@dataclass
class Place:
    """Where a training stands: chunks, optimiser steps and tokens so far, and how often weights were kept."""

    chunk: int = 0
    step: int = 0
    tokens: int = 0
    kept: int = 0


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over the first 3% of tokens, flat to 50%, then linear to 2% of the peak."""
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * max(0.02, min(1.0, (1 - progress) / 0.5))


def batches_of(windows: Iterable[Window], batch_tokens: int, rng: random.Random) -> list[Batch]:
    """Batches of at most ``batch_tokens`` tokens with padding: windows of like length together, in random
    order. Targets are -100 where nothing is learnt."""
    groups: list[list[Window]] = [[]]
    for window in sorted(windows, key=lambda window: len(window[0])):
        if groups[-1] and (len(groups[-1]) + 1) * len(window[0]) > batch_tokens:
            groups.append([])
        groups[-1].append(window)
    rng.shuffle(groups)
    return [padded(group) for group in groups]


def padded(windows: Sequence[Window]) -> Batch:
    """Windows as one batch, padded on the right with id 0 and target -100."""
    x = torch.zeros(len(windows), max(len(ids) for ids, _ in windows), dtype=torch.long)
    y = torch.full_like(x, -100)
    for i, (ids, learnt) in enumerate(windows):
        x[i, : len(ids)] = torch.tensor(ids)
        y[i, : len(ids)] = torch.where(torch.tensor(learnt), x[i, : len(ids)], -100)
    return x, y, sum(len(ids) for ids, _ in windows)


def token_losses(model: PreTrainedModel, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats [learnt tokens] of the targets ``y`` [rows, length]."""
    x, y = x.to(model.device), y.to(model.device)
    learnt = y[:, 1:] != -100
    head = model.get_output_embeddings()
    # the model's own logits, caps and scales included, but of these positions alone
    with head.register_forward_pre_hook(lambda module, args: (args[0][:, :-1][learnt][None],)):
        logits = model(input_ids=x, use_cache=False).logits[0]
    return cross_entropy(logits.float(), y[:, 1:][learnt], reduction="none")


class Optimiser:
    """AdamW on float32 copies of what takes gradients in a model: at a learning rate that decays, weights in
    bfloat16 would drop the last updates. ``decay`` is the weight decay of matrices; vectors have none."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies = {name: p.detach().float().clone() for name, p in self.weights.items()}
        groups = [
            {"params": [c for c in self.copies.values() if c.ndim >= 2], "weight_decay": decay},
            {"params": [c for c in self.copies.values() if c.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), fused=True)

    def load(self, copies: Mapping[str, Tensor], adam: dict) -> None:
        self.adam.load_state_dict(adam)
        for name, copy in self.copies.items():
            copy.copy_(copies[name])
        self._show()

    def step(self, loss: Tensor, rate: float) -> None:
        """One update at the learning rate ``rate``, gradients clipped to the norm 1."""
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = rate
        for name, weight in self.weights.items():
            self.copies[name].grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies.values(), 1.0)
        self.adam.step()
        self._show()

    def _show(self) -> None:
        for name, weight in self.weights.items():
            weight.data.copy_(self.copies[name])


def fit(
    name: str,
    model: torch.nn.Module,
    losses: Callable[[Tensor, Tensor], Tensor],
    chunk: Callable[[Place], Iterable[Batch]],
    folder: Path,
    budget: int,
    rate: float,
    decay: float = 0.0,
    keep_every: float = math.inf,
    snapshot: Callable[[], Mapping[str, Tensor]] | None = None,
    key: str = "model",
    report: Callable[[str], None] = print,
) -> None:
    """Train ``model`` on ``budget`` tokens, from ``folder``/state.pt if that exists.

    The mean of ``losses(x, y)`` [learnt tokens] is minimised with the peak learning rate ``rate`` (see
    ``Optimiser`` for ``decay``). ``chunk(place)`` gives the batches up to the next state. After each chunk
    come a line of log.jsonl, every ``keep_every`` tokens ``snapshot()`` as kept_<tokens>.pt, and the state,
    with the weights under ``key``.

    Raises FloatingPointError if the loss is not finite, UserError if another run is at work in the folder."""
    with exclusive(folder, f"training {name}"):
        folder.mkdir(parents=True, exist_ok=True)
        place, optimiser, state_file = Place(), Optimiser(model, decay), folder / "state.pt"
        if state_file.is_file():
            state = read_state(state_file)
            place = Place(**{field: state.get(field, 0) for field in asdict(place)})
            optimiser.load(state[key], state["optimizer"])
        cut_log(folder / "log.jsonl", place.tokens)
        while place.tokens < budget:
            began, start, values = time.monotonic(), place.tokens, []
            for x, y, size in chunk(place):
                each = losses(x, y)
                loss = each.mean() if len(each) else each.sum()  # nothing is learnt inside a long question
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss of {name} is {loss.item()} at step {place.step}: lower the learning rate"
                        f" ({rate})"
                    )
                optimiser.step(loss, learning_rate(place.tokens / budget, rate))
                values += [loss.item()] if len(each) else []
                place.tokens += size
                place.step += 1
            place.chunk += 1
            speed = round((place.tokens - start) / max(time.monotonic() - began, 1e-6))
            mean = round(sum(values) / max(len(values), 1), 4)
            numbers = {"chunk": place.chunk, "step": place.step, "tokens": place.tokens, "loss": mean}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"stage": name, **numbers, "tokens_per_second": speed}) + "\n")
            report(f"{name}: {place.tokens:,}/{budget:,} tokens, loss {mean:.3f}, {speed:,} tokens/s")
            if place.tokens >= (place.kept + 1) * keep_every:
                # before the state: a run that is killed in between keeps these weights once more
                place.kept += 1
                write_state(folder / f"kept_{place.tokens:09d}.pt", snapshot())
            state = {key: optimiser.copies, "optimizer": optimiser.adam.state_dict(), **asdict(place)}
            write_state(state_file, state)


def claim(folder: Path, recipe) -> None:
    """Write ``folder``/recipe.json. UserError if the folder holds a run with another recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n"
    if file.is_file() and json.loads(file.read_text()) != json.loads(text):
        raise UserError(
            f"{path_shown(folder)} holds a run with another recipe ({file.name}): choose another folder, or"
            " remove it"
        )
    write_text(file, text)


def cut_log(file: Path, tokens: int) -> None:
    """Drop the lines of a log after ``tokens``: a run that was killed may have logged more than it saved."""
    if not file.is_file():
        return
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # half a line
            if json.loads(line)["tokens"] <= tokens:
                lines.append(line + "\n")
    write_text(file, "".join(lines))
