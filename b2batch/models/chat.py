"""A conversation → token ids, exactly as each family was trained to read it.

Baichuan's format is ids, not text:

    2:  [system] (195 [user] | 196 [assistant])*  196      whole rounds are kept from the newest back
    1:  (195 [user] | 196 [assistant] 2)*  196             no system role

195 and 196 come from the checkpoint's generation config. Source: the chat input builders that ship
with the released checkpoints; ``max_input_tokens = model_max_length - max_new_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from b2batch.errors import RowError, RowFault, Stage
from b2batch.models.tokenizer import BaichuanTokenizer, TransformersTokenizer

Messages = Sequence[Mapping[str, str]]


class ChatFormat(Protocol):
    """How a family's conversations become ids."""

    def encode(self, messages: Messages, *, allow_special: bool = False) -> list[int]:
        """Ids of the whole conversation, ready for the answer; nothing is dropped.

        Raises:
            RowError: the conversation is not one this format can say.
        """
        ...

    def encode_newest(
        self, messages: Messages, *, max_model_len: int, max_new_tokens: int, allow_special: bool = False
    ) -> list[int]:
        """As ``encode``, but drops the oldest rounds, then the oldest ids, to leave room for the answer.

        Raises:
            RowError: also when ``max_new_tokens`` leaves no room for any input.
        """
        ...


def input_budget(max_model_len: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may take; RowError where upstream's slice would silently keep the wrong end."""
    budget = max_model_len - max_new_tokens
    if budget <= 0:
        raise RowError(
            RowFault.PROMPT_TOO_LONG,
            f"max_tokens {max_new_tokens} leaves no room for a prompt in a context of {max_model_len}",
            Stage.ENCODE,
        )
    return budget


@dataclass(frozen=True, slots=True)
class Baichuan2Chat:
    """Baichuan 2's format; a role other than system and user counts as the assistant."""

    tokenizer: BaichuanTokenizer
    user_token_id: int
    assistant_token_id: int

    def encode(self, messages: Messages, *, allow_special: bool = False) -> list[int]:
        """See ``ChatFormat``."""
        system, rounds = self._split(messages, allow_special)
        return system + [i for ids in rounds for i in ids] + self._answer_turn(messages)

    def encode_newest(
        self, messages: Messages, *, max_model_len: int, max_new_tokens: int, allow_special: bool = False
    ) -> list[int]:
        """See ``ChatFormat``."""
        budget = input_budget(max_model_len, max_new_tokens)
        system, rounds = self._split(messages, allow_special)
        room = budget - len(system)
        history: list[int] = []
        for ids in reversed(rounds):
            if history and len(history) + len(ids) > room:
                break
            history = ids + history
            if len(history) >= room:
                break
        return (system + history + self._answer_turn(messages))[-budget:]

    def _split(self, messages: Messages, allow_special: bool) -> tuple[list[int], list[list[int]]]:
        """Ids of the system text, and of each round: a user turn with the answers that follow it."""
        if not messages:
            raise RowError(RowFault.PROMPT_EMPTY, "the conversation has no messages", Stage.ENCODE)
        system: list[int] = []
        rounds: list[list[int]] = []
        for index, message in enumerate(messages):
            role = message["role"]
            ids = self.tokenizer.encode(message["content"], allow_special=allow_special)
            if role == "system":
                if index:
                    raise _bad_role(index, "system", "a system message can only be the first")
                system = ids
            elif role == "user":
                rounds.append([self.user_token_id, *ids])
            else:
                rounds = rounds or [[]]
                rounds[-1] += [self.assistant_token_id, *ids]
        return system, rounds

    def _answer_turn(self, messages: Messages) -> list[int]:
        return [] if messages[-1]["role"] == "assistant" else [self.assistant_token_id]


@dataclass(frozen=True, slots=True)
class Baichuan1Chat:
    """Baichuan-13B-Chat's format: an end token after each answer, and always a new assistant turn."""

    tokenizer: BaichuanTokenizer
    user_token_id: int
    assistant_token_id: int
    eos_token_id: int

    def encode(self, messages: Messages, *, allow_special: bool = False) -> list[int]:
        """See ``ChatFormat``."""
        newest_first = list(self._rounds(messages, allow_special))
        return [i for ids in reversed(newest_first) for i in ids] + [self.assistant_token_id]

    def encode_newest(
        self, messages: Messages, *, max_model_len: int, max_new_tokens: int, allow_special: bool = False
    ) -> list[int]:
        """See ``ChatFormat``; at least half of the context stays for the input."""
        input_budget(max_model_len, max_new_tokens)
        budget = max(max_model_len // 2, max_model_len - max_new_tokens)
        history: list[int] = []
        for ids in self._rounds(messages, allow_special):
            if history and len(history) + len(ids) > budget:
                break
            history = ids + history
            if len(history) >= budget:
                break
        return [*history[-budget:], self.assistant_token_id]

    def _rounds(self, messages: Messages, allow_special: bool) -> Iterator[list[int]]:
        """Ids of each round, newest first; answers before the first user turn belong to none."""
        if not any(message["role"] == "user" for message in messages):
            raise RowError(RowFault.PROMPT_EMPTY, "the conversation has no user message", Stage.ENCODE)
        answers: list[int] = []
        for index in range(len(messages) - 1, -1, -1):
            role, content = messages[index]["role"], messages[index]["content"]
            ids = self.tokenizer.encode(content, allow_special=allow_special)
            if role == "user":
                yield [self.user_token_id, *ids, *answers]
                answers = []
            elif role == "assistant":
                answers = [self.assistant_token_id, *ids, self.eos_token_id, *answers]
            else:
                raise _bad_role(index, role, "Baichuan 1 knows the roles user and assistant")


@dataclass(frozen=True, slots=True)
class TemplateChat:
    """The chat template that a transformers checkpoint brings along."""

    tokenizer: TransformersTokenizer

    def encode(self, messages: Messages, *, allow_special: bool = False) -> list[int]:
        """See ``ChatFormat``."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.encode_chat(messages, allow_special=allow_special)
        except (TemplateError, ValueError) as error:
            message = f"the model's chat template refuses the conversation: {error}"
            raise RowError(RowFault.PROMPT_TEMPLATE, message, Stage.ENCODE) from error

    def encode_newest(
        self, messages: Messages, *, max_model_len: int, max_new_tokens: int, allow_special: bool = False
    ) -> list[int]:
        """See ``ChatFormat``; the first message is kept when it is the system's."""
        budget = input_budget(max_model_len, max_new_tokens)
        head = 1 if messages and messages[0]["role"] == "system" else 0
        for start in range(head, len(messages)):
            if messages[start]["role"] != "user" and start > head:
                continue
            ids = self.encode([*messages[:head], *messages[start:]], allow_special=allow_special)
            if len(ids) <= budget:
                return ids
        return self.encode(messages, allow_special=allow_special)[-budget:]


def _bad_role(index: int, role: str, rule: str) -> RowError:
    return RowError(RowFault.PROMPT_TYPE, f"message {index} has the role {role!r}: {rule}", Stage.ENCODE)
