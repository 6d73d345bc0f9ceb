"""Several calibration texts: how they are written, their proportions, and which sequences come."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitplan.models import sampling
from bitplan.models.mixture import (
    DEFAULT_MIXTURE,
    Share,
    describe_shares,
    parse_shares,
    recorded_shares,
    turns,
)
from bitplan.models.samples import Samples, calibration_samples
from bitplan.models.workload import LoadedModel

SHIPPED = "prose:0.5,code:0.3,chat:0.2"


def rows(samples: Samples) -> torch.Tensor:
    return torch.cat(list(samples.batches))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("builtin", [("builtin", 1.0)]),
        ("prose", [("builtin", 1.0)]),
        ("notes.txt:0.7,code:0.3", [("notes.txt", 0.7), ("code", 0.3)]),
        ("code,chat", [("code", 1.0), ("chat", 1.0)]),
        ("prose:1,builtin:2,self:1", [("builtin", 3.0), ("self", 1.0)]),
        ("no.such/file", [("no.such/file", 1.0)]),
        ("C:\\notes.txt", [("C:\\notes.txt", 1.0)]),
    ],
)
def test_what_is_written_is_read(text: str, shares: list[tuple[str, float]]) -> None:
    assert parse_shares(text) == tuple(Share(*share) for share in shares)


def test_a_path_that_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c:2", "a,b.txt:3"):
        assert parse_shares(name) != (Share(name),), "no file yet"
        Path(name).write_text("words")
        assert parse_shares(name) == (Share(name),)
    assert parse_shares("./a.txt:1,a.txt:1,code:2") == (Share("a.txt", 2.0), Share("code", 2.0))
    both = parse_shares("a,b.txt:0.5,c:2:0.25,code:0.25")
    assert both == (Share("a,b.txt", 0.5), Share("c:2", 0.25), Share("code", 0.25))


def test_the_default_is_a_share_like_others() -> None:
    half = parse_shares("mixture:0.5,notes.txt:0.5")
    assert half[-1] == Share("notes.txt", 0.5)
    assert [share.source for share in half[:-1]] == [share.source for share in DEFAULT_MIXTURE]
    assert sum(share.weight for share in half[:-1]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code:0,chat:1", "weight of 'code' is 0; weights are positive"),
        ("code:-1,chat:1", "weight of 'code' is -1"),
        ("chat:1,code:-1", "weight of 'code' is -1"),
        ("code:nan,chat:1", "weight of 'code' is nan"),
        ("code:inf,chat:1", "weight of 'code' is inf"),
        ("code:0.5,chat", "'chat' has no weight in 'code:0.5,chat'"),
    ],
)
def test_bad_weights_are_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shares(text)


weights = st.lists(st.integers(1, 1000).map(lambda n: n / 100), min_size=1, max_size=6)


@given(weights, st.integers(1, 120))
def test_every_beginning_has_the_proportions(weights: list[float], count: int) -> None:
    shares = [Share(str(k), weight) for k, weight in enumerate(weights)]
    order = turns(shares, count)
    total = sum(Fraction(repr(weight)) for weight in weights)
    seen: Counter[int] = Counter()
    for n, k in enumerate(order, 1):
        seen[k] += 1
        for each, weight in enumerate(weights):
            assert abs(seen[each] - n * Fraction(repr(weight)) / total) < 1


@given(weights, st.integers(0, 60), st.integers(1, 60))
def test_an_order_does_not_depend_on_how_much_of_it_is_asked_for(
    weights: list[float], first: int, more: int
) -> None:
    shares = [Share(str(k), weight) for k, weight in enumerate(weights)]
    assert turns(shares, first + more)[:first] == turns(shares, first)
    assert turns([Share(s.source, s.weight * 2) for s in shares], first) == turns(shares, first)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(map(str, range(4000))))
    return path


def test_calls_that_go_on_share_nothing(tiny: LoadedModel, long_text: Path) -> None:
    source = f"{SHIPPED},{long_text}:0.25"

    @given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 3))
    def check(skip: int, count: int, seed: int) -> None:
        def drawn(count: int, skip: int) -> torch.Tensor:
            found = calibration_samples(tiny, source, count, 16, seed=seed, skip=skip)
            assert found.count == count
            return rows(found)

        whole = drawn(skip + count, 0)
        assert torch.equal(drawn(count, skip), whole[skip:])
        if skip:
            assert torch.equal(drawn(skip, 0), whole[:skip])
        assert len(whole.unique(dim=0)) == skip + count

    from hypothesis import settings

    settings(max_examples=8, deadline=None)(check)()


def test_a_mixture_is_made_of_what_its_texts_give(tiny: LoadedModel, long_text: Path) -> None:
    shares = [Share("builtin", 0.5), Share("code", 0.3), Share(str(long_text), 0.2)]
    mixed = rows(calibration_samples(tiny, shares, sequences=20, length=16, seed=2))
    order = torch.tensor(turns(shares, 20))
    for k, (share, count) in enumerate(zip(shares, (10, 6, 4), strict=True)):
        alone = rows(calibration_samples(tiny, share.source, count, 16, seed=2))
        assert torch.equal(mixed[order == k], alone)


def test_what_the_model_writes_goes_on_too(tiny: LoadedModel) -> None:
    source = "self:1,languages:1"
    first = calibration_samples(tiny, source, sequences=6, length=24)
    again = calibration_samples(tiny, source, sequences=6, length=24)
    later = calibration_samples(tiny, source, sequences=6, length=24, skip=6)
    assert first.sha256 == again.sha256
    assert len(torch.cat([rows(first), rows(later)]).unique(dim=0)) == 12
    sampling._kept.clear()
    whole = calibration_samples(tiny, source, sequences=80, length=24)
    assert torch.equal(rows(whole)[:12], torch.cat([rows(first), rows(later)]))
    assert len(rows(whole).unique(dim=0)) == 80


def test_languages_go_on_from_given_words(tiny: LoadedModel) -> None:
    from bitplan.models.openings import OPENINGS

    drawn = rows(calibration_samples(tiny, "languages", sequences=len(OPENINGS), length=40))
    tokenizer = tiny.workload.tokenizer
    begins = {tuple(row[:10].tolist()) for row in drawn}
    for language, texts in OPENINGS.items():
        starts = {tuple(tokenizer(text)["input_ids"][:10]) for text in texts}
        assert len(starts & begins) == 1, f"{language} takes its turn"


def test_a_model_without_a_cache_writes_the_same(tiny: LoadedModel) -> None:
    lengths: list[int] = []
    tiny.module.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    with_cache = rows(calibration_samples(tiny, "self,languages", sequences=4, length=20))
    assert lengths.count(1) > 30, "token by token"
    forward = tiny.module.forward

    def plain(input_ids: torch.Tensor, use_cache: bool = False) -> object:
        return forward(input_ids=input_ids, use_cache=False)

    tiny.module.forward = plain
    sampling._kept.clear()
    without = rows(calibration_samples(tiny, "self,languages", sequences=4, length=20))
    assert torch.equal(with_cache, without)
    assert lengths.count(1) < 40, "and then all of them again"


def test_a_short_text_says_what_to_reduce(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one two three four five six seven eight nine ten " * 20)
    with pytest.raises(
        ValueError,
        match=r"short\.txt holds \d+ sequences of 32 tokens, 100 are needed for its share of 200 "
        r"sequences\. Give less weight to it, a longer text, fewer",
    ):
        calibration_samples(tiny, f"code:0.5,{path}:0.5", sequences=200, length=32)


def test_a_mixture_is_recorded_and_found_again(tiny: LoadedModel, long_text: Path) -> None:
    source = f"mixture:0.7,{long_text}:0.3"
    samples = calibration_samples(tiny, source, sequences=8, length=16)
    record = samples.describe()
    assert record["source"] == (
        ", ".join(
            f"{'prose' if s.source == 'builtin' else s.source} {70 * s.weight:.3g}%"
            for s in DEFAULT_MIXTURE
        )
        + ", numbers.txt 30%"
    )
    shares = recorded_shares(record)
    assert shares[-1] == Share("numbers.txt", 0.3), "without its folder"
    assert shares[:-1] == parse_shares(source)[:-1]
    assert describe_shares(shares) == record["source"]
    assert "texts" not in calibration_samples(tiny, sequences=2, length=16).describe()
