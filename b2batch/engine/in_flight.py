"""A step that is on its way: launched, and its tokens not read by the host yet.

    host      launch n ── read n-1 ── launch n+1 ───────── read n ── launch n+2 ──
    device    ────── n-1 ──────┤├────────── n ──────────┤├───── n+1 ─────┤

So the device has the next step before the host knows the tokens of the last one. Those tokens stay on
the device and are the next step's input; on the host, ``-1 - row`` stands for each until it is read. An
answer that turns out to be over has by then one more row in the step that was launched since: nobody
reads it. What that row writes goes to the sequence's own span, which is given to others after the step
was launched, and the device does things in the order in which they were launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from b2batch.engine.sampling import read_logprobs, token_logprobs
from b2batch.engine.sequence import Sequence
from b2batch.rows import TokenLogprob


@dataclass(frozen=True, slots=True)
class NewToken:
    """What a sequence was given. ``token`` is None where there was no finite number to choose by."""

    sequence: Sequence
    token: int | None
    logprob: TokenLogprob | None


@dataclass(slots=True)
class InFlight:
    """The sequences that get a token, by their row in ``tokens`` (R,), which is where the model is."""

    sequences: dict[int, Sequence]
    tokens: Tensor
    _tokens_on_host: Tensor
    _logprobs_on_host: Tensor | None
    _arrival: torch.cuda.Event | None

    @classmethod
    def of(cls, sequences: list[Sequence], logits_RV: Tensor, tokens_R: Tensor) -> InFlight:
        """Begin to bring to the host what was sampled, with the log-probabilities that are asked for."""
        num_top = [s.sampling.logprobs for s in sequences if s.sampling.logprobs is not None]
        logprobs = token_logprobs(logits_RV, tokens_R, max(num_top)) if num_top else None
        on_host = _to_host(tokens_R), None if logprobs is None else _to_host(logprobs)
        is_later = tokens_R.is_cuda
        arrival = torch.cuda.current_stream(tokens_R.device).record_event() if is_later else None
        return cls(dict(enumerate(sequences)), tokens_R, *on_host, arrival)

    def begin(self, is_over: Callable[[Sequence], bool]) -> None:
        """Let a number stand for the token of each sequence that goes on, and forget the others."""
        self.sequences = {row: s for row, s in self.sequences.items() if not is_over(s)}
        for row, sequence in self.sequences.items():
            sequence.tokens.append(-1 - row)

    def read(self) -> Iterator[NewToken]:
        """Wait for the tokens, and take away what stood for them; nothing is added to the sequences."""
        if self._arrival is not None:
            self._arrival.synchronize()
        tokens = self._tokens_on_host.tolist()
        logprobs = None if self._logprobs_on_host is None else self._logprobs_on_host.tolist()
        for row, sequence in self.sequences.items():
            sequence.tokens.pop()
            token, num_top = tokens[row], sequence.sampling.logprobs
            if token < 0:
                yield NewToken(sequence, None, None)
            elif logprobs is None or num_top is None:
                yield NewToken(sequence, token, None)
            else:
                yield NewToken(sequence, token, read_logprobs(logprobs[row], token, num_top))


def _to_host(tensor: Tensor) -> Tensor:
    """Where the values will be once the device has come so far."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
