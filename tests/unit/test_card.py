"""The model card of an exported folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from bitplan.exporters.card import write_card
from bitplan.exporters.source import open_source
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.runtimes import Rules
from bitplan.search.plan import Baseline, Measured, MeasuredAlso
from bitplan.testing.plans import mixed


def test_the_card_has_front_matter_figures_and_the_plan(wide: LoadedModel, tmp_path: Path) -> None:
    plan = mixed(wide, Rules.load("transformers"))
    plan = plan.model_copy(
        update={
            "measured": Measured(
                kl=0.1234, kl_stderr=0.004, ppl=20.5, ppl_original=19.25, tokens=4096, length=64,
                text="held-out.txt", text_sha256="0" * 64,
            ),
            "measured_also": [
                MeasuredAlso(
                    kl=0.25, kl_stderr=0.006, tokens=1024, length=64, text="code",
                    text_sha256="1" * 64, rival="int4-g64", rival_kl=0.375, rival_kl_stderr=0.1,
                ),
                MeasuredAlso(
                    kl=0.5, kl_stderr=0.006, tokens=1024, length=64, text="chat",
                    text_sha256="1" * 64,
                ),
            ],
            "baselines": [
                Baseline(
                    name="uniform int4-g64", bytes=12345, predicted_kl=0.2, kl=0.3, kl_stderr=0.1,
                    difference=0.1, difference_stderr=0.1,
                )
            ],
        }
    )  # fmt: skip
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    (run / "allocation.png").write_bytes(b"png")
    source = open_source(plan, model=wide)
    text = write_card(
        source, "compressed-tensors", Rules.load("transformers"), out, run
    ).read_text()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    front = yaml.safe_load(head)
    assert {"bitplan", "quantized", "compressed-tensors"} <= set(front["tags"])
    assert "base_model" not in front  # the model is a local folder, not of the Hub
    for fmt in set(plan.assignments.values()):
        assert f"`{fmt}`" in body
    assert f"together they take {plan.bytes:,} bytes" in body
    assert "0.1234" in body and "20.50 (original 19.25)" in body
    assert (
        "on another text | 0.25 ± 0.006 nats per token (1,024 tokens of code); int4-g64 0.375 |"
        in (body)
    )
    assert "on another text | 0.5 ± 0.006 nats per token (1,024 tokens of chat) |" in body
    assert "uniform int4-g64, 12,345 bytes | KL 0.3" in body
    assert "(allocation.png)" in body and "(frontier.png)" not in body
    assert (out / "allocation.png").read_bytes() == b"png"
    for_mlx = write_card(source, "mlx", Rules.load("mlx"), out).read_text()
    assert f"together they take {plan.bytes:,} bytes" not in for_mlx  # MLX stores other tensors
    hub = plan.model_copy(update={"model": plan.model.model_copy(update={"id": "owner/name"})})
    text = write_card(replace(source, plan=hub), "mlx", None, out).read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "owner/name"
    ours = plan.model_copy(
        update={"model": plan.model.model_copy(update={"id": "models/cnn.py:make"})}
    )
    text = write_card(replace(source, plan=ours), "onnx", None, out).read_text()
    assert "base_model" not in yaml.safe_load(text.split("---")[1])  # a file, not of the Hub
