"""The jinja environment of prompts: no access to Python, bounded time, bounded values.

A template is the job author's; the values in it come from rows that nobody has read. So no value may
make a template run for ever or fill the memory: each turn of a loop and each call looks at the clock,
and whatever multiplies (``*``, ``**``, ``+``, ``~``, ``center``, ``replace``, …) is refused before it is
made when the result would be over ``MAX_VALUE_SIZE``. A single filter over a value of that size is not
interrupted; it ends by itself. Not measured: format widths, ``translate``, escaping and lists within lists.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CPU_S = 5.0
MAX_VALUE_SIZE = 4 << 20
_MAX_INTEGER_BITS = 4096
_PACED, _BOUNDED = "b2batch paced", "b2batch bounded"  # no template can spell these names
_CLOCK = "b2batch clock"


class TemplateLimitError(Exception):
    """A template went on for too long, or a value in it became too large."""


class Clock:
    """The CPU time that one rendering may take; time that others use on a busy machine does not count."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._end_s = time.thread_time() + cpu_s

    def check(self) -> None:
        """Raise TemplateLimitError once the time is over."""
        if time.thread_time() > self._end_s:
            raise TemplateLimitError(f"took more than {self._cpu_s:g} s of CPU time; does a loop not end?")


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """Compiles the templates of a job; ``generate`` is the only way to render them."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self, finalize: Callable[[Any], Any]) -> None:
        super().__init__(
            undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=finalize
        )
        del self.globals["lipsum"], self.filters["random"]  # a row's prompt must not vary
        for name in _GROWTH.keys() & self.filters.keys():
            self.filters[name] = _guarded_filter(name, self.filters[name])
        self.filters[_PACED] = _paced
        self.filters[_BOUNDED] = _bounded

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """What a macro or a block has put out, joined."""
        kept = list(pieces)
        _refuse_over(sum(map(len, kept)))
        return "".join(kept)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call within a template: a macro, a method of a value, a global such as ``range``."""
        _clock_of(context).check()
        growth = _GROWTH.get(getattr(obj, "__name__", ""))
        value = getattr(obj, "__self__", None)
        if growth is not None and isinstance(value, str | bytes):
            if growth is _size_joined and args:
                args = (list(args[0]), *args[1:])  # it may be an iterator, which can be looked at once
            _refuse_over(growth(value, *args, **kwargs))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``*``, ``**`` and ``+``, unless the result would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            _refuse_bits(operator, left, right)
        elif operator == "*":
            _refuse_over(_size(left) * right if isinstance(right, int) else _size(right) * left)
        elif operator == "+":
            _refuse_over(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, _PACED)
        return _bound_concats(tree)


def generate(template: jinja2.Template, columns: Mapping[str, Any]) -> Iterator[str]:
    """The pieces of a rendered template, of a ``PromptEnvironment``.

    Raises:
        TemplateLimitError: it takes too long, or a value is too large.
    """
    clock = Clock(MAX_TEMPLATE_CPU_S)
    for piece in template.generate({**columns, _CLOCK: clock}):
        clock.check()
        yield piece


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _bound_concats(tree: nodes.Template) -> nodes.Template:
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for field, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, field, _filtered(value, _BOUNDED))
            elif isinstance(value, list):
                value[:] = [
                    _filtered(item, _BOUNDED) if isinstance(item, nodes.Concat) else item for item in value
                ]
    return tree


def _clock_of(context: Context) -> Clock:
    clock = context.resolve_or_missing(_CLOCK)
    assert isinstance(clock, Clock)
    return clock


@jinja2.pass_context
def _paced(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    """``values``, with a look at the clock before each."""
    clock = _clock_of(context)
    for value in values:
        clock.check()
        yield value


@jinja2.pass_context
def _bounded(context: Context, text: str) -> str:
    _clock_of(context).check()
    _refuse_over(len(text))
    return text


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _refuse_over(size: float) -> None:
    if size > MAX_VALUE_SIZE:
        raise TemplateLimitError(f"makes a value of over {MAX_VALUE_SIZE} characters or items")


def _refuse_bits(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
    if bits > _MAX_INTEGER_BITS:
        raise TemplateLimitError(f"makes an integer of over {_MAX_INTEGER_BITS} bits")


# --- what can make a long text out of a short one: how long, from its arguments ------------------


def _size_joined(separator: str, values: Iterable[Any]) -> int:
    sizes = [_size(value) for value in values]
    return sum(sizes) + len(separator) * len(sizes)


def _size_replaced(s: Any, old: Any, new: Any, count: int | None = None) -> int:
    return _size(s) + s.count(old) * len(new) if isinstance(s, str | bytes) else 0


def _size_indented(s: str, width: int | str = 4, *_: Any, **__: Any) -> int:
    return _size(s) + (s.count("\n") + 1) * (width if isinstance(width, int) else len(width))


def _size_wrapped(
    s: str, width: int = 79, break_long_words: bool = True, wrapstring: str | None = None, *_: Any, **__: Any
) -> int:
    return _size(s) + len(s) // max(1, width) * len(wrapstring or "\n")


def _size_padded(value: Any, width: int = 80, *_: Any) -> int:
    return max(_size(value), width)


def _size_cut(value: Any, linecount: int = 1, *_: Any, slices: int = 1, **__: Any) -> int:
    return max(linecount, slices)


_GROWTH: dict[str, Callable[..., float]] = {
    "center": _size_padded,
    "ljust": _size_padded,
    "rjust": _size_padded,
    "zfill": _size_padded,
    "expandtabs": lambda value, tabsize=8: value.count("\t") * tabsize + _size(value),
    "batch": _size_cut,
    "slice": _size_cut,
    "indent": _size_indented,
    "wordwrap": _size_wrapped,
    "replace": _size_replaced,
    "join": _size_joined,
}


def _guarded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """``filter_``, refused where its result would be too large."""
    growth, skipped = _GROWTH[name], 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @wraps(filter_)  # with it goes the mark that says which first argument jinja passes
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if name == "join":
            given[skipped] = list(given[skipped])
            separator = kwargs.get("d", given[skipped + 1] if len(given) > skipped + 1 else "")
            _refuse_over(_size_joined(str(separator), given[skipped]))
        else:
            _refuse_over(growth(*given[skipped:], **kwargs))
        return filter_(*given, **kwargs)

    return guarded
