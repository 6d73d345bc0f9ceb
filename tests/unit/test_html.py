"""report.html and the figures: complete, self-contained, and right for every kind of run."""

import html
import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bitplan.reports.html import write_report
from bitplan.search.plan import MeasuredAlso, Plan
from bitplan.tests.fakes import fake_run, flat_units, transformer_units

FIGURES = ["frontier", "allocation", "sensitivity", "prediction"]
FILES = [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")] + ["report.html"]
VOID = {"meta", "img", "br", "input", "link"}


class Balance(HTMLParser):
    """Checks that tags nest, and collects images and anything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "iframe":
            self.fetched.append(tag)
        self.fetched += [
            v or "" for k, v in attrs if k in {"src", "href"} and (v or "")[:1] not in ("#", "d")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    units = transformer_units(3, embedding=True)
    written = write_report(fake_run(tmp_path, units))
    assert written == [tmp_path / name for name in FILES]
    for path in written[:-1:2]:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1920
        assert height > 300
        svg = path.with_suffix(".svg").read_text(encoding="utf-8")
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    text = read(tmp_path)
    page = Balance()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.fetched == []
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text
    assert len(page.images) == 4
    assert all(len(image["alt"] or "") > 40 for image in page.images)
    assert len(text) < 3_000_000
    assert not list(tmp_path.glob(".*.tmp"))


def test_report_says_which_plans_are_over_the_budget(tmp_path: Path) -> None:
    write_report(fake_run(tmp_path, flat_units()))
    rows = re.findall(r'<tr class="(\w*)">\s*<th scope="row">([^<]*)</th>', read(tmp_path))
    marked = [name for _, name in rows if name.endswith(" (over budget)")]
    assert marked and [name for kind, name in rows if kind == "large"] == marked
    assert any(name.startswith("int8") for name in marked)


def test_report_states_the_result(tmp_path: Path) -> None:
    write_report(fake_run(tmp_path, transformer_units(3)))
    plan = Plan.load(tmp_path / "plan.json")
    text = html.unescape(read(tmp_path)).replace("\u00a0", " ")
    title = re.search(r"<h1>(.*?)</h1>", text, re.DOTALL)
    assert title is not None
    assert title[1].startswith("21.2 MB → 5.7 MB, 4.30 bits per weight, KL ")
    assert title[1].endswith("nats per token measured")
    assert "Best uniform format within the budget: int4-g128-asym" in text
    assert "optimal" in text
    assert "lowest within the budget on these" in text  # the measured KL is a minimum
    assert plan.model.sha256 in text
    assert plan.command is not None
    assert plan.command in text
    for module, name in plan.assignments.items():
        assert re.search(rf"{re.escape(module)}</th><td>[^<]*</td><td class=\"text\">{name}<", text)


def test_report_tells_of_the_second_text(tmp_path: Path) -> None:
    fake_run(tmp_path, transformer_units(3))
    plan = Plan.load(tmp_path / "plan.json")
    also = MeasuredAlso(
        kl=0.31, kl_stderr=0.02, tokens=4096, length=128, text="code", text_sha256="5e" * 32,
        rival="int4-g128-asym", rival_kl=0.4, rival_kl_stderr=0.03,
    )  # fmt: skip
    plan.model_copy(update={"measured_also": [also]}).save(tmp_path / "plan.json")
    write_report(tmp_path)
    text = html.unescape(read(tmp_path)).replace("\u00a0", " ")
    assert (
        "KL on another text: 0.31 ± 0.02 nats per token on 4,096 held-out tokens of code; "
        "int4-g128-asym there: KL 0.40 ± 0.03." in text
    )
    assert "5e" * 32 in text


def test_report_without_measurement_says_so(tmp_path: Path) -> None:
    write_report(fake_run(tmp_path, measured=False))
    text = read(tmp_path)
    assert "nats per token predicted</h1>" in text
    assert "Not measured yet" in text
    assert "KL<br>measured" not in text
    assert not (tmp_path / "prediction.png").exists()


@pytest.mark.parametrize(
    ("formats", "budget"),
    [
        (("int4-g64-asym",), "4.3125bpw"),
        (("bf16",), "16bpw"),
        (("int2-gc", "int4-g64-asym", "bf16"), "15bpw"),
    ],
)
def test_report_of_few_formats(tmp_path: Path, formats: tuple[str, ...], budget: str) -> None:
    write_report(fake_run(tmp_path, formats=formats, budget=budget))
    single = "stored in the same format" in read(tmp_path)
    assert single == (len(formats) == 1)


def test_report_of_a_model_without_layers(tmp_path: Path) -> None:
    write_report(fake_run(tmp_path, flat_units(), budget="4.6bpw"))
    assert "block3.conv" in read(tmp_path)


def test_names_are_escaped(tmp_path: Path) -> None:
    fake_run(tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    plan.model.id = "<script>alert(1)</script>"
    plan.save(tmp_path / "plan.json")
    write_report(tmp_path)
    assert "<script>alert" not in read(tmp_path)
    assert "&lt;script&gt;" in read(tmp_path)


def test_names_cannot_end_the_embedded_data(tmp_path: Path) -> None:
    units = tuple(replace(u, name=u.name + "</script><b>") for u in transformer_units(1))
    write_report(fake_run(tmp_path, units))
    text = read(tmp_path)
    assert "</script><b>" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["units"]["names"][0][1].endswith("</script><b>")


def test_a_thousand_units_stay_below_three_megabytes(tmp_path: Path) -> None:
    units = transformer_units(160, embedding=True)
    write_report(fake_run(tmp_path, units, confidence=True))
    assert len(units) > 1_100
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    fake_run(tmp_path)
    first = [path.read_bytes() for path in write_report(tmp_path)]
    assert first == [path.read_bytes() for path in write_report(tmp_path)]


@pytest.mark.parametrize("name", ["plan.json", "frontier.json", "profile.safetensors"])
def test_a_missing_file_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    fake_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "frontier.png").exists()
