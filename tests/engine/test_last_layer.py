"""The last layer runs for the wanted tokens only, and gives them the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from b2batch.engine.request import ScoreRequest
from b2batch.models.loading import LoadedModel
from engine.serving import answer, engine_of, serve

LoadedOf = Callable[[str], LoadedModel]

PROMPT = list(range(10, 70))


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """The rows of each call of ``module``."""
    rows: list[int] = []
    hook = module.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    yield rows
    hook.remove()


def test_of_a_prompt_the_last_layer_runs_one_token(loaded: LoadedOf) -> None:
    model: Any = loaded("b2_7b").model
    with counted(model.model.layers[-1].mlp) as last, counted(model.model.layers[-2].mlp) as other:
        answer(engine_of(model), PROMPT, max_tokens=3, ignore_eos=True)
    assert (last, other) == ([1, 1, 1], [60, 1, 1])


@pytest.mark.parametrize("variant", ["b2_7b", "b2_13b"])
def test_scores_inside_a_prompt_are_those_of_all_tokens(variant: str, loaded: LoadedOf) -> None:
    """Some wanted tokens stand inside a chunk; in some steps no token is wanted, in some most are."""
    model = loaded(variant).model
    continuations = ((5, 6, 7), (5, 6, 9), (300, 4), tuple(range(400, 440)))
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        expected = [
            _loglikelihood(model(input_ids=torch.tensor([[*PROMPT, *c]])).logits[0], c) for c in continuations
        ]
    engine = engine_of(model, max_num_seqs=8, max_num_batched_tokens=17, max_model_len=128)
    finished = serve(engine, [ScoreRequest("row", PROMPT, continuations)])["row"]
    assert [score.loglikelihood for score in finished.scores] == pytest.approx(expected, abs=1e-3)


def _loglikelihood(logits: torch.Tensor, continuation: tuple[int, ...]) -> float:
    logprobs = logits.float().log_softmax(-1)[len(PROMPT) - 1 :]
    return sum(float(logprobs[i, token]) for i, token in enumerate(continuation))
