"""The texts that ship with Python: what they hold, and that nothing held out is calibrated on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bitplan.models import texts
from bitplan.models.dialogues import Turn, dialogues, rendered
from bitplan.models.texts import (
    builtin_prose,
    check_text,
    library_code,
    library_dialogues,
    paragraphs,
    read_text,
)
from bitplan.models.workload import LoadedModel

NAMES = ("builtin", "code", "chat")


def answers(split: texts.Split) -> set[str]:
    found = (turn for dialogue in library_dialogues(split) for turn in dialogue)
    return {part for turn in found for part in paragraphs(turn.answer)}


def parts(source: str, split: texts.Split) -> set[str]:
    if source == "chat":
        return answers(split)
    return paragraphs(builtin_prose(split) if source == "builtin" else library_code(split))


@pytest.mark.parametrize(("held_out", "source"), itertools.product(NAMES, NAMES))
def test_what_is_held_out_is_in_no_text_to_calibrate_on(held_out: str, source: str) -> None:
    shared = parts(held_out, "evaluation") & parts(source, "calibration")
    assert not {part for part in shared if len(part) > 12}


@pytest.mark.parametrize("source", NAMES)
def test_there_is_enough_of_each(source: str) -> None:
    assert len(read_text(source, "calibration")) > 200_000
    assert len(read_text(source, "evaluation")) > 50_000
    assert read_text(source, "evaluation") == read_text(source, "evaluation")


def test_code_is_code() -> None:
    import ast

    for name in ("argparse", "json/decoder"):
        assert name in texts._CODE.split()
    assert library_code("calibration").count("\n    def ") > 300
    whole = [text for text in texts._modules(["heapq"] * 4, "calibration")]
    assert len(whole) == 3
    assert ast.parse(whole[0])


def test_no_module_is_quoted_that_another_part_holds_out() -> None:
    assert not set(texts._CODE.split()) & set(texts._DOCUMENTED.split())


def test_dialogues_ask_about_what_is_documented() -> None:
    source = (
        "def half(number):\n"
        '    """The half of a number, rounded down to an integer: no float comes out.\n\n'
        "    >>> half(7)\n    3\n    >>> half(8)\n    4\n    >>> x = half(8)\n"
        '    """\n'
        "def _hidden():\n"
        '    """Nobody asks about this function, however long its documentation may be."""\n'
        "class Shape:\n"
        "    def area(self):\n"
        '        """The area of the shape in square millimetres, which is never negative."""\n'
    )
    [found] = dialogues(source, 1000)
    assert [turn.answer for turn in found] == [
        "The half of a number, rounded down to an integer: no float comes out.",
        "```\n3\n```",
        "```\n4\n```",
        "The area of the shape in square millimetres, which is never negative.",
    ]
    assert "`half`" in found[0].question
    assert "half(7)" in found[1].question
    assert "`Shape.area`" in found[3].question


DIALOGUE = ((Turn("Why?", "Because."), Turn("Really?", "Yes.")),)


class Tokenizer:
    """As much of one as dialogues need."""

    def __init__(self, template: Any, fails: bool = False, begins: bool = False) -> None:
        self.chat_template, self._fails, self._begins = template, fails, begins
        self.bos_token, self.bos_token_id = "<s>", 1

    def __call__(self, _: str) -> dict[str, list[int]]:
        return {"input_ids": [1] if self._begins else []}

    def apply_chat_template(self, messages: Any, tokenize: bool, date_string: str) -> str:
        if self._fails:
            raise RuntimeError("conversation roles must alternate")
        return "<s>" + "".join(f"[{m['role']}] {m['content']} " for m in messages) + date_string


def test_dialogues_take_the_words_of_the_chat_template() -> None:
    told = "[user] Why? [assistant] Because. [user] Really? [assistant] Yes. 26 Jul 2024"
    assert rendered(DIALOGUE, Tokenizer("{{ messages }}")) == "<s>" + told
    assert rendered(DIALOGUE, Tokenizer("{{ messages }}", begins=True)) == told
    assert rendered(DIALOGUE, Tokenizer("{{ strftime_now('%d') or date_string }}")).endswith(told)


@pytest.mark.parametrize(
    "tokenizer",
    [
        None,
        Tokenizer(None),
        Tokenizer({"default": "two templates"}),
        Tokenizer("{{ messages }}", fails=True),
        Tokenizer("{{ strftime_now('%d') }}"),
    ],
)
def test_dialogues_without_a_usable_template_are_lines(tokenizer: Tokenizer | None) -> None:
    assert rendered(DIALOGUE, tokenizer) == (
        "User: Why?\n\nAssistant: Because.\n\nUser: Really?\n\nAssistant: Yes."
    )


def test_a_python_without_its_source_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_modules", lambda names, split: [])
    texts.library_code.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"without the source of its library.*'code' is made"):
            read_text("code", "calibration")
    finally:
        texts.library_code.cache_clear()


@pytest.mark.parametrize("source", ["mixture", "self", "languages", "code,chat"])
def test_what_is_no_text_to_measure_on(source: str) -> None:
    check_text(source, "calibration")
    with pytest.raises(ValueError, match=f"No text file at {source}"):
        check_text(source, "evaluation")


def test_an_unknown_text_of_several_is_named() -> None:
    with pytest.raises(ValueError, match=r"No text file at nots\.txt"):
        check_text("nots.txt:0.5,code:0.5", "calibration")


def test_chat_is_a_text_of_a_model(tiny: LoadedModel) -> None:
    from bitplan.models.samples import evaluation_samples

    samples = evaluation_samples(tiny, "chat", tokens=64, length=32)
    assert samples.source == "chat"
    assert samples.count == 2
