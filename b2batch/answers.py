"""What the engine finished → what stands in the row's columns, or the error that the row gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from b2batch.encoding import RowEncoder
from b2batch.engine.engine import Engine
from b2batch.engine.request import Completion, Finished, Score
from b2batch.errors import ModelError, RowError, RowFault, Stage
from b2batch.inputs.processors import load_processor, process
from b2batch.labelling.classify import decide, label_probabilities, mean_prior
from b2batch.labelling.grammar import parse_answer
from b2batch.labelling.votes import majority, pick
from b2batch.models.tokenizer import Tokenizer
from b2batch.outputs.parsed import conform
from b2batch.outputs.schema import confidence_column, parsed_type, postprocessed_types
from b2batch.rows import Generation, Sample
from b2batch.spec import JobSpec


class AnswerReader:
    """Reads the answers of one job. ``prior`` is what ``classify.calibrate_with`` divides out."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, prior: Sequence[float] | None = None) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._prior = prior
        self._parsed_type = parsed_type(spec.structured_outputs)
        self._postprocessed_types = postprocessed_types(spec)
        self._postprocess = (
            load_processor(spec.postprocess, "postprocess") if spec.postprocess.function else None
        )
        self._label_names = [label.name for label in spec.labels]

    def read(
        self, finished: Finished, row: Mapping[str, Any] | None = None, *, prompt_truncated: bool = False
    ) -> Generation:
        """The result of one request.

        Args:
            row: the input's columns, for the job's postprocessor; without them it is not run.

        Raises:
            RowError: the model gave no finite number, or the postprocessor failed.
        """
        error = next((completion.error for completion in finished.completions if completion.error), None)
        if error is not None:
            raise _not_finite(error)
        samples = tuple(read_sample(completion, self._tokenizer) for completion in finished.completions)
        columns = self._columns(finished, samples)
        sure = confidence_column(self._spec)
        if self._spec.review.below is not None and sure is not None:
            columns["needs_review"] = columns[sure] < self._spec.review.below
        if self._postprocess is not None and row is not None:
            columns |= self._postprocessed(row, samples, columns)
        return Generation(finished.num_prompt_tokens, samples, prompt_truncated, columns)

    def _postprocessed(
        self, row: Mapping[str, Any], samples: Sequence[Sample], columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The columns of the user's function, which sees the row and its answer."""
        text = (
            {}
            if not samples
            else {
                "generated_text": samples[0].text,
                "finish_reason": samples[0].finish_reason.value,
                "samples": [sample.text for sample in samples],
            }
        )
        assert self._postprocess is not None
        given = process(self._postprocess, "postprocess", Stage.GENERATE, row, {**text, **columns})
        try:
            return {name: conform(value, self._postprocessed_types[name]) for name, value in given.items()}
        except KeyError as error:
            told = f"postprocess: {error} is not among postprocess.columns"
        except ValueError as error:
            told = f"postprocess: {error}"
        raise RowError(RowFault.PROCESSOR, told, Stage.GENERATE)

    def _columns(self, finished: Finished, samples: Sequence[Sample]) -> dict[str, Any]:
        """The values of the columns that only this task has."""
        if self._spec.task == "classify":
            return self._classified(finished.scores)
        if self._spec.task == "score":
            return _scored(finished.scores[0])
        if self._spec.task == "embed":
            return self._embedded(finished.embedding)
        return self._generated(samples)

    def _generated(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The parsed answer, and what all answers vote for."""
        columns: dict[str, Any] = {}
        if self._spec.structured_outputs.is_set:
            value, error = self._parse(samples[0])
            columns |= {"parsed": value, "parse_error": error}
        if self._spec.vote is not None:
            columns |= majority([self._voted(sample) for sample in samples]).columns()
        return columns

    def _voted(self, sample: Sample) -> Any:
        if self._spec.vote_on == "text":
            return sample.text.strip()
        return pick(self._parse(sample)[0], self._spec.vote_on.split(".")[1:])

    def _parse(self, answer: Sample) -> tuple[Any, str | None]:
        """The answer's value, or None and why it has none."""
        try:
            return parse_answer(self._spec.structured_outputs, answer, self._parsed_type), None
        except (ValueError, RecursionError) as error:
            return None, str(error)[:500]

    def _classified(self, scores: Sequence[Score]) -> dict[str, Any]:
        settings = self._spec.classify
        try:
            probabilities = label_probabilities(scores, settings.normalize)
        except ValueError as error:
            raise _not_finite(str(error)) from None
        return decide(self._label_names, probabilities, self._prior).columns(settings.threshold)

    def _embedded(self, vector: Sequence[float]) -> dict[str, Any]:
        length = math.hypot(*vector)
        if not math.isfinite(length):
            raise _not_finite("the model gave no finite hidden state")
        if self._spec.embed.normalize and length > 0:
            vector = [value / length for value in vector]
        return {"embedding": vector}


def make_reader(spec: JobSpec, encoder: RowEncoder, engine: Engine, tokenizer: Tokenizer) -> AnswerReader:
    """A reader for an idle engine, which computes the prior of the labels first where the job wants one."""
    for request in encoder.prior_requests():
        engine.add(request)
    found = []
    while engine.has_work:
        found += engine.step()
    try:
        priors = [label_probabilities(finished.scores, spec.classify.normalize) for finished in found]
    except ValueError as error:
        raise ModelError(f"classify.calibrate_with: {error}") from None
    return AnswerReader(spec, tokenizer, mean_prior(priors))


def read_sample(completion: Completion, tokenizer: Tokenizer) -> Sample:
    """A completion as text, without the stop token or the stop string that ended it."""
    text = tokenizer.decode(completion.token_ids[: completion.num_text_tokens])
    text = text[: len(text) - completion.num_cut_chars]
    return Sample(text, completion.token_ids, completion.finish_reason, completion.logprobs)


def _scored(score: Score) -> dict[str, Any]:
    if not math.isfinite(score.loglikelihood):
        raise _not_finite("the log-likelihood is not finite")
    return {
        "loglikelihood": score.loglikelihood,
        "num_scored_tokens": score.num_tokens,
        "is_greedy": score.is_greedy,
        "perplexity": math.exp(min(-score.loglikelihood / score.num_tokens, 700.0)),
    }


def _not_finite(message: str) -> RowError:
    return RowError(RowFault.NAN, message, Stage.GENERATE)
