"""vLLM's offline interface, under an interpreter that has it. Standard library and vllm only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from b2batch.bench.peer_job import Answer, Answers, BenchRow, PeerJob

_CPU_SEQS = 64
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # one core for a service, none for the model would be worse
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its CPU time is seen
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def load(job: PeerJob) -> VllmPeer:
    """See ``Peer``."""
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    limits: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": _CPU_SEQS} if job.device == "cpu" else {}
    llm = LLM(
        job.model,
        dtype=job.dtype,
        max_model_len=job.max_model_len,
        seed=job.seed,
        enable_prefix_caching=job.kind != "vllm-no-prefix",
        **limits,
    )
    return VllmPeer(job, llm)


class VllmPeer:
    """``vllm``, ``vllm-no-prefix`` and, with ``prompt_logprobs`` and one request a choice, ``score-vllm``."""

    def __init__(self, job: PeerJob, llm: Any) -> None:
        self._job = job
        self._llm = llm
        self._tokenizer = llm.get_tokenizer()

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """See ``Peer``."""
        prompts = [self._encode(row) for row in rows]
        return Answers(
            self._score(rows, prompts) if self._job.kind == "score-vllm" else self._generate(rows, prompts)
        )

    def _encode(self, row: BenchRow) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in row.messages], tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(self, rows: Sequence[BenchRow], prompts: Sequence[list[int]]) -> list[Answer]:
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                n=self._job.n,
                temperature=self._job.temperature,
                seed=self._job.seed if self._job.temperature else None,
                max_tokens=row.max_tokens,
                ignore_eos=self._job.ignore_eos,
            )
            for row in rows
        ]
        outputs = self._run(prompts, sampling)
        return [
            Answer(
                len(prompt),
                [list(sample.token_ids) for sample in output.outputs],
                [sample.text for sample in output.outputs],
            )
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def _score(self, rows: Sequence[BenchRow], prompts: Sequence[list[int]]) -> list[Answer]:
        from vllm import SamplingParams

        prefix = self._ids(self._job.answer_prefix)
        choices = [[self._ids(choice) for choice in row.choices] for row in rows]
        requests = [
            prompt + prefix + choice for prompt, own in zip(prompts, choices, strict=True) for choice in own
        ]
        outputs = iter(self._run(requests, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)))
        answers = []
        for prompt, own in zip(prompts, choices, strict=True):
            scores = [_loglikelihood(next(outputs), choice) for choice in own]
            answers.append(Answer(len(prompt) + len(prefix), label=scores.index(max(scores))))
        return answers

    def _run(self, prompts: Sequence[list[int]], sampling: Any) -> Any:
        from vllm.inputs import TokensPrompt

        return self._llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _loglikelihood(output: Any, choice: Sequence[int]) -> float:
    """Of the last tokens of a prompt, which are the choice."""
    tail = output.prompt_logprobs[-len(choice) :]
    return float(sum(found[token].logprob for found, token in zip(tail, choice, strict=True)))
