"""Questions and answers made from documentation strings and their examples."""

from __future__ import annotations

import ast
import doctest
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_LEAST, _LONGEST = 60, 1200  # characters of an answer
_EXAMPLES = 3  # asked about after the explanation
_TURNS = 4  # of a dialogue, at least, where a module has as many
_DATE = "26 Jul 2024"  # templates that print the day would else give another text tomorrow

_ASKED = (
    "What does {name} do in Python?",
    "How do I use {name}?",
    "Can you explain {name} to me, please?",
    "I came across {name} in somebody's code. What is it for?",
    "Tell me about {name} and what it expects.",
    "When would I reach for {name}?",
)
_TRIED = (
    "What does this give?\n\n```python\n{code}\n```",
    "And what happens when I run the following?\n\n```python\n{code}\n```",
    "Please show me the output of\n\n```python\n{code}\n```",
)


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


Dialogue = tuple[Turn, ...]


def dialogues(source: str, most: int) -> Iterator[Dialogue]:
    r"""Dialogues about the public functions and classes of one module, in its order.

    Args:
        source: Python source.
        most: Characters of answers after which no further dialogue begins.

    >>> told = "The half of a number, rounded down to an integer: no float comes out."
    >>> [(asked,)] = dialogues(f"def half(number):\n    '{told}'", 1000)
    >>> asked.question, asked.answer == told
    ('What does `half` do in Python?', True)
    """
    turns: list[Turn] = []
    length = 0
    for number, (name, text) in enumerate(_documented(ast.parse(source))):
        about = list(_turns(name, text, number))
        turns += about
        length += sum(len(turn.answer) for turn in about)
        if len(turns) >= _TURNS:
            yield tuple(turns)
            turns = []
            if length > most:
                return
    if turns:
        yield tuple(turns)


def rendered(found: Iterable[Dialogue], tokenizer: Any = None) -> str:
    """Dialogues as one text, in the words of the tokenizer's chat template if it has one.

    A template that takes no such messages, or prints the day whatever it is told, is passed over:
    the dialogues are then lines of a user and an assistant.
    """
    template = getattr(tokenizer, "chat_template", None)
    template = template if isinstance(template, str) else None
    if template and not ("strftime_now" in template and "date_string" not in template):
        try:
            texts = [_templated(dialogue, tokenizer) for dialogue in found]
        except Exception:  # whatever a template raises: it is a program of the model's makers
            pass
        else:
            return "\n".join(texts)
    return "\n\n".join(
        f"User: {turn.question}\n\nAssistant: {turn.answer}"
        for dialogue in found
        for turn in dialogue
    )


def messages_as_text(chats: Iterable[Sequence[Mapping[str, str]]], tokenizer: Any = None) -> str:
    """Messages with roles as one text, by the tokenizer's chat template if it has one.

    What the template does not take, such as a role that it does not know, becomes plain lines.

    >>> messages_as_text([[{"role": "user", "content": "Hi"}]])
    'User: Hi'
    """
    has_template = isinstance(getattr(tokenizer, "chat_template", None), str)
    texts = []
    for messages in chats:
        text = None
        if has_template:
            try:
                text = _by_template(list(messages), tokenizer)
            except Exception:  # whatever a template raises: it is a program of the model's makers
                text = None
        if text is None:
            lines = (f"{m['role'].capitalize()}: {m['content']}" for m in messages)
            text = "\n\n".join(lines)
        texts.append(text)
    return ("\n" if has_template else "\n\n").join(texts)


def _templated(dialogue: Dialogue, tokenizer: Any) -> str:
    messages: list[Mapping[str, str]] = []
    for turn in dialogue:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return _by_template(messages, tokenizer)


def _by_template(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE)
    first = tokenizer.bos_token_id
    begins = first is not None and first in tokenizer("")["input_ids"][:1]
    return text.removeprefix(tokenizer.bos_token) if begins else text  # sequences begin with it


def _documented(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and documentation of public functions and classes, members after their class."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = prefix + node.name
        text = ast.get_docstring(node)
        if text and len(text) >= _LEAST:
            yield name, text
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, f"{name}.")


def _turns(name: str, text: str, number: int) -> Iterator[Turn]:
    """The explanation before the first example, then the examples one by one."""
    try:
        examples = doctest.DocTestParser().get_examples(text)
    except ValueError:  # not laid out as doctest wants it
        examples = []
    told = inspect.cleandoc(text.partition(">>>")[0] if examples else text)
    if len(told) > _LONGEST:
        told = told[:_LONGEST].rpartition("\n\n")[0] or told[:_LONGEST].rpartition("\n")[0]
    if told:
        yield Turn(_ASKED[number % len(_ASKED)].format(name=f"`{name}`"), told)
    shown = [example for example in examples if example.want.strip()][:_EXAMPLES]
    for i, example in enumerate(shown, number):
        code, want = example.source.rstrip(), example.want.rstrip()
        yield Turn(_TRIED[i % len(_TRIED)].format(code=code), f"```\n{want}\n```")
