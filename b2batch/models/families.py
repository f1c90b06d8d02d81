"""What differs between model families: tokenizer, chat format, class. One line in ``MODELS`` each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from b2batch.errors import ModelError, SpecError
from b2batch.models.chat import Baichuan1Chat, Baichuan2Chat, ChatFormat, TemplateChat
from b2batch.models.checkpoint import Checkpoint, read_json
from b2batch.models.tokenizer import BaichuanTokenizer, Tokenizer, TransformersTokenizer
from b2batch.spec import ModelSpec

_VOCAB_SIZE_1 = 64_000  # every released Baichuan 1; Baichuan 2 has 125,696


def has_norm_head(vocab_size: int, architectures: Sequence[str] | None) -> bool:
    """Whether a Baichuan checkpoint is a Baichuan 2, as far as its config tells.

    No key says so: every released Baichuan 1 has 64,000 pieces or is a ``BaiChuanForCausalLM``.
    """
    return vocab_size != _VOCAB_SIZE_1 and "BaiChuanForCausalLM" not in (architectures or ())


@dataclass(frozen=True, slots=True)
class PromptCodec:
    """How prompts of one checkpoint become ids and ids become text.

    ``chat`` is None for base models. ``stop_token_ids`` end an answer unless ``ignore_eos``.
    ``max_model_len`` counts prompt and answer together.
    """

    tokenizer: Tokenizer
    chat: ChatFormat | None
    stop_token_ids: frozenset[int]
    max_model_len: int


class Family(Protocol):
    """How one family's checkpoints are read."""

    def codec(self, checkpoint: Checkpoint, spec: ModelSpec) -> PromptCodec:
        """The tokenizer, chat format and limits; loads no weight and imports no torch."""
        ...

    def config_overrides(self, checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
        """Make transformers know the family, and say which config values the spec overrides."""
        ...


class BaichuanFamily:
    """Baichuan 1 and 2, natively: ``models/baichuan.py``."""

    def codec(self, checkpoint: Checkpoint, spec: ModelSpec) -> PromptCodec:
        """See ``Family``."""
        settings = read_json(checkpoint.directory / "tokenizer_config.json") or {}
        model_file = checkpoint.directory / "tokenizer.model"
        if not model_file.exists():
            raise ModelError(
                f"{checkpoint.directory}: no tokenizer.model, which every Baichuan checkpoint has"
            )
        tokenizer = BaichuanTokenizer(model_file, add_bos=bool(settings.get("add_bos_token", False)))
        if checkpoint.config.get("vocab_size") is None:
            raise ModelError(f"{checkpoint.source}: config.json has no vocab_size")
        if tokenizer.vocab_size > int(checkpoint.config["vocab_size"]):
            raise ModelError(
                f"{model_file}: has {tokenizer.vocab_size} pieces, but the model only "
                f"{checkpoint.config['vocab_size']} embeddings (config.json, vocab_size)"
            )
        stops = _stop_token_ids(checkpoint)
        return PromptCodec(
            tokenizer, self._chat(checkpoint, spec, tokenizer), stops, _max_len(checkpoint, spec)
        )

    def config_overrides(self, checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
        """See ``Family``."""
        from b2batch.models import baichuan

        baichuan.register()
        given = {"position": spec.position, "norm_head": spec.norm_head}
        return {key: value for key, value in given.items() if value != "auto"}

    def _chat(
        self, checkpoint: Checkpoint, spec: ModelSpec, tokenizer: BaichuanTokenizer
    ) -> ChatFormat | None:
        generation = checkpoint.generation_config
        if generation.get("user_token_id") is None or generation.get("assistant_token_id") is None:
            return None
        user, assistant = int(generation["user_token_id"]), int(generation["assistant_token_id"])
        if max(user, assistant) >= int(checkpoint.config["vocab_size"]):
            raise ModelError(
                f"{checkpoint.source}: generation_config.json: the role tokens {user} and {assistant} are "
                f"beyond the {checkpoint.config['vocab_size']} embeddings"
            )
        if self._is_first(checkpoint, spec):
            return Baichuan1Chat(tokenizer, user, assistant, int(generation.get("eos_token_id", 2)))
        return Baichuan2Chat(tokenizer, user, assistant)

    def _is_first(self, checkpoint: Checkpoint, spec: ModelSpec) -> bool:
        if spec.norm_head != "auto":
            return not spec.norm_head
        config = checkpoint.config
        declared = config.get("norm_head")
        if declared is not None:
            return not declared
        return not has_norm_head(int(config["vocab_size"]), config.get("architectures"))


class TransformersFamily:
    """Every other causal LM whose layers go through transformers' attention interface."""

    def codec(self, checkpoint: Checkpoint, spec: ModelSpec) -> PromptCodec:
        """See ``Family``."""
        tokenizer = TransformersTokenizer(checkpoint.directory)
        chat = TemplateChat(tokenizer) if tokenizer.has_chat_template else None
        return PromptCodec(tokenizer, chat, _stop_token_ids(checkpoint), _max_len(checkpoint, spec))

    def config_overrides(self, checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
        """See ``Family``; the Baichuan switches are refused rather than ignored."""
        for field in ("position", "norm_head"):
            if getattr(spec, field) != "auto":
                raise SpecError(
                    f"model.{field}: only for Baichuan checkpoints, and {checkpoint.source} is a "
                    f"{checkpoint.model_type}"
                )
        return {}


MODELS: dict[str, Family] = {"baichuan": BaichuanFamily()}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that reads a checkpoint; transformers' own classes where we have none."""
    return MODELS.get(checkpoint.model_type, TransformersFamily())


def _stop_token_ids(checkpoint: Checkpoint) -> frozenset[int]:
    for config in (checkpoint.generation_config, checkpoint.config):
        eos = config.get("eos_token_id")
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


def _max_len(checkpoint: Checkpoint, spec: ModelSpec) -> int:
    """Context length: the spec's, at most what the checkpoint was trained for."""
    config = checkpoint.config
    text = config.get("text_config", config)
    trained = text.get("max_position_embeddings") or text.get("model_max_length")
    if trained is None:
        raise ModelError(f"{checkpoint.source}: config.json gives no context length; set model.max_model_len")
    if spec.max_model_len is None:
        return int(trained)
    if spec.max_model_len > int(trained):
        raise SpecError(f"model.max_model_len: {spec.max_model_len} is more than the {trained} the model has")
    return spec.max_model_len
