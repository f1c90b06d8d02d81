"""Every peer that is installed answers the same rows with the same tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from b2batch.bench import peer_main
from b2batch.bench.comparison import Setting, make_job
from b2batch.bench.peer_job import PeerRound
from b2batch.bench.prompts import make_rows
from b2batch.bench.workload import GenerateWorkload, PromptShape, ScoreWorkload

SHAPE = PromptShape(shared_words=40, min_words=3, max_words=30)
GENERATE = GenerateWorkload(
    kind="generate",
    description="",
    model="",
    rows=6,
    warmup=2,
    max_tokens=5,
    prompts=SHAPE,
    peers=("engine",),
    ignore_eos=True,
)
SCORE = ScoreWorkload(
    kind="score",
    description="",
    model="",
    rows=6,
    choices=(" time", " year of people", " way"),
    answer_prefix="Label:",
    prompts=SHAPE,
    peers=("score-engine",),
)


def answer(name: str, model: Path, workload: GenerateWorkload | ScoreWorkload) -> PeerRound:
    job = make_job(name, workload, make_rows(workload), Setting(model, "cpu", "float32"))
    return PeerRound(**peer_main.run(asdict(job)))


def tokens(found: PeerRound) -> list[list[list[int]]]:
    return [[list(ids) for ids in samples] for samples in found.samples]


@pytest.fixture(scope="module")
def by_loop(tiny_model: Path) -> PeerRound:
    return answer("loop", tiny_model, GENERATE)


@pytest.mark.parametrize(
    "name", ["engine", "engine-no-cascade", "engine-no-prefix", "static4", "sorted4", "hf-continuous2"]
)
def test_greedy_tokens_are_the_loops(name: str, tiny_model: Path, by_loop: PeerRound):
    found = answer(name, tiny_model, GENERATE)

    assert tokens(found) == tokens(by_loop)
    assert found.num_prompt_tokens == by_loop.num_prompt_tokens
    assert found.num_generated_tokens == 6 * 5
    assert found.versions.keys() >= {"torch", "transformers"}
    assert min(found.wall_s, found.cpu_s, found.load_s, found.peak_bytes) > 0


def test_the_engine_tells_what_its_prefixes_saved(tiny_model: Path):
    names = ("engine", "engine-no-cascade", "engine-no-prefix")
    with_prefix, read_by_each, without = (answer(name, tiny_model, GENERATE).facts for name in names)

    assert with_prefix["prefix_tokens_saved"] >= 40 * 4
    assert read_by_each["prefix_tokens_saved"] == with_prefix["prefix_tokens_saved"]
    assert without["prefix_tokens_saved"] == 0
    assert 0 < with_prefix["occupancy"] <= 1


@pytest.mark.parametrize("name", ["engine", "loop", "static3"])
def test_several_samples_a_row(name: str, tiny_model: Path):
    workload = GENERATE.model_copy(update={"n": 3, "temperature": 1.0})
    found = answer(name, tiny_model, workload)

    assert [len(samples) for samples in found.samples] == [3] * 6
    assert any(len(set(map(tuple, samples))) > 1 for samples in tokens(found))
    assert found.num_generated_tokens == 6 * 3 * 5


def test_labels_are_those_of_one_request_a_choice(tiny_model: Path):
    ours, theirs = answer("score-engine", tiny_model, SCORE), answer("score-loop4", tiny_model, SCORE)

    assert ours.labels == theirs.labels
    assert ours.num_prompt_tokens == theirs.num_prompt_tokens
    assert set(ours.labels) <= {0, 1, 2}
    assert None not in ours.labels
