"""The training loop: loss, schedule, averaged weights, and the best of them on the validation reviews."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional

from .answers import accuracy
from .examples import Batch, ExampleMaker
from .network import Network
from .reviews import Review

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
NUM_WARMUP = 100
EMA_DECAY = 0.99
EOS_WEIGHT = 0.1
LM_WEIGHT = 0.3


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many steps to train, and after how many to look at the validation reviews."""

    num_steps: int
    eval_every: int
    seed: int

    def rate(self, step: int) -> float:
        """Factor on the learning rate at ``step``: linear warm-up, then linear decay to zero."""
        return min((step + 1) / NUM_WARMUP, (self.num_steps - step) / (self.num_steps - NUM_WARMUP))

    def evaluates(self, step: int) -> bool:
        """Whether validation follows ``step``. Before half of the training nothing can be the best."""
        done = step + 1
        return done == self.num_steps or (2 * done >= self.num_steps and done % self.eval_every == 0)


class AveragedWeights:
    """The exponential moving average of a network's weights."""

    def __init__(self, network: Network) -> None:
        self._network = copy.deepcopy(network).eval()
        self._num_updates = 0

    @torch.no_grad()
    def update(self, network: Network) -> None:
        self._num_updates += 1
        decay = min(EMA_DECAY, self._num_updates / (self._num_updates + 9))
        for average, weight in zip(self._network.parameters(), network.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    def shipped(self) -> Network:
        """A copy as the checkpoint will hold it: rounded to bfloat16, computed in float32."""
        return copy.deepcopy(self._network).bfloat16().float()


def loss_of(network: Network, batch: Batch) -> Tensor:
    """Cross entropy of the answer, plus a little of ``</s>`` and of some of the review's own pieces."""
    hidden_BTH = network(batch.inputs)
    answer = _cross_entropy(network, hidden_BTH, batch.targets, batch.answer)
    eos = _cross_entropy(network, hidden_BTH, batch.targets, batch.eos)
    review = _cross_entropy(network, hidden_BTH, batch.targets, batch.review)
    return answer + EOS_WEIGHT * eos + LM_WEIGHT * review


def _cross_entropy(network: Network, hidden_BTH: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over the masked positions; 0 where a batch has none (all its reviews are a piece long)."""
    logits = network.logits(hidden_BTH[mask_BT])
    total = functional.cross_entropy(logits, targets_BT[mask_BT], reduction="sum")
    return total / mask_BT.sum().clamp(min=1)


def train(
    network: Network,
    tokenizer: sentencepiece.SentencePieceProcessor,
    train_reviews: Sequence[Review],
    valid_reviews: Sequence[Review],
    schedule: Schedule,
) -> Network:
    """Train ``network`` and return the averaged weights that did best on ``valid_reviews``."""
    torch.manual_seed(schedule.seed)
    average = AveragedWeights(network)
    best, best_accuracy = average.shipped(), -1.0
    for step in _steps(
        network, average, ExampleMaker(tokenizer, schedule.seed).batches(train_reviews), schedule
    ):
        if not schedule.evaluates(step):
            continue
        candidate = average.shipped()
        reached = accuracy(candidate, tokenizer, valid_reviews)
        print(f"step {step + 1}: valid accuracy {reached:.4f}", flush=True)
        if reached > best_accuracy:
            best, best_accuracy = candidate, reached
    return best


def _steps(
    network: Network, average: AveragedWeights, batches: Iterator[Batch], schedule: Schedule
) -> Iterator[int]:
    """Do one optimiser step after another, yielding the number of each when it is done."""
    optimizer = _optimizer(network)
    network.train()
    started_s = time.monotonic()
    for step in range(schedule.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule.rate(step)
        loss = loss_of(network, next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update(network)
        if (step + 1) % 20 == 0:
            print(
                f"step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - started_s:.0f} s", flush=True
            )
        yield step


def _optimizer(network: Network) -> torch.optim.Optimizer:
    matrices = [p for name, p in network.named_parameters() if "layers" in name and p.dim() == 2]
    decayed = set(map(id, matrices))
    rest = [p for p in network.parameters() if id(p) not in decayed]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
