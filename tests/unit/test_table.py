"""The profile file: round trip, and clear words about damaged ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bitplan.models.samples import calibration_samples
from bitplan.models.units import UnitInfo
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.provenance import ModelRef, Provenance
from bitplan.sensitivity.table import SensitivityTable, stored_bytes

OLD = Path(__file__).parents[1] / "data" / "profile_schema1.safetensors"


def table() -> SensitivityTable:
    units = (
        UnitInfo("a", ("a",), ((4, 8),), "a", 0),
        UnitInfo("{b,c}", ("b", "c"), ((2, 8), (2, 8)), "{b,c}", None, ("d",)),
    )
    kl = np.array([[0.5, 0.1], [0.25, np.nan]])
    scores = np.ones((3, 2, 2), dtype=np.float32)
    formats = ("int4-g32", "int8-g32")
    size = stored_bytes(units, [Format.parse(name) for name in formats])
    return SensitivityTable(
        units, formats, size, kl, kl / 10, scores, provenance=Provenance(seed=1)
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    table().save(path)
    found = SensitivityTable.load(path)
    assert found.units == table().units
    assert found.provenance == Provenance(seed=1)
    np.testing.assert_array_equal(found.kl, table().kl)
    assert found.scores is not None
    np.testing.assert_array_equal(found.scores, np.ones((3, 2, 2)))
    assert found.weights == 64
    assert found.uniform_bytes("int4-g32") == (16 + 8) + 2 * (8 + 4)
    assert (tmp_path / "profile.json").is_file()


def test_missing_truncated_foreign_and_newer_files(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    with pytest.raises(ValueError, match="No profile at"):
        SensitivityTable.load(path)
    table().save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        SensitivityTable.load(path)
    path.rename(tmp_path / "profile.json")
    with pytest.raises(ValueError, match=r"give the profile\.safetensors"):
        SensitivityTable.load(tmp_path / "profile.json")
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a bitplan profile"):
        SensitivityTable.load(path)
    save_file({"x": np.zeros(1)}, path, metadata={"bitplan_profile": '{"schema": 9}'})
    with pytest.raises(ValueError, match="schema 9, this version reads 1 and 2"):
        SensitivityTable.load(path)
    save_file({"x": np.zeros(1)}, path, metadata={"bitplan_profile": "{"})
    with pytest.raises(ValueError, match=r"The header of .* is damaged"):
        SensitivityTable.load(path)
    save_file({"x": np.zeros(1)}, path, metadata={"bitplan_profile": '{"schema": 1}'})
    with pytest.raises(ValueError, match="is damaged"):
        SensitivityTable.load(path)


@pytest.mark.parametrize("field", ["bytes", "kl", "stderr"])
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "profile.safetensors"
    good = table()
    getattr(good, field)[0, 1] = -7
    good.save(path)
    with pytest.raises(ValueError, match="unit 'a' in int8-g32 has"):
        SensitivityTable.load(path)


def test_shapes_and_unmeasured_units_are_checked() -> None:
    good = table()
    with pytest.raises(ValueError, match=r"kl has shape \(1, 2\)"):
        SensitivityTable(good.units, good.formats, good.bytes, good.kl[:1], good.stderr)
    with pytest.raises(ValueError, match="Unit 'a' has no measured format"):
        SensitivityTable(good.units, good.formats, good.bytes, good.kl * np.nan, good.stderr)


GROUPS = ("q_proj,k_proj,v_proj", "gate_proj,up_proj")


@pytest.mark.parametrize("metric", ["fisher", "fisher_probe", "gradient"])
def test_merging_equals_profiling_with_groups(tiny: LoadedModel, metric: str) -> None:
    formats = ("int2-g32", "int4-g64-asym", "bf16")
    samples = calibration_samples(tiny, sequences=12, length=48)
    together = profile(tiny, samples, formats, metric=metric, groups=GROUPS)
    merged = profile(tiny, samples, formats, metric=metric).merged(GROUPS)
    assert merged.units == together.units
    assert (merged.bytes == together.bytes).all()
    assert merged.scores is not None
    assert together.scores is not None
    np.testing.assert_allclose(merged.scores, together.scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(merged.kl, together.kl, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(merged.stderr, together.stderr, rtol=1e-5, atol=1e-12)
    assert merged.weights == together.weights


def rows(scores: Any, kl: Any, stderr: Any) -> SensitivityTable:
    """Units ``a.q``, ``b``, ``a.k`` in one format."""
    units = tuple(UnitInfo(n, (n,), ((4, 8),), n[-1], 0) for n in ("a.q", "b", "a.k"))
    size = stored_bytes(units, [Format.parse("int4-g32")])
    return SensitivityTable(
        units, ("int4-g32",), size, kl, stderr, scores, provenance=Provenance(seed=1)
    )


def test_signed_scores_add_with_their_cross_terms() -> None:
    s = np.array([[1.0, 3.0, -2.0], [2.0, 1.0, 2.0]])[..., None]
    kl = (s**2).mean(axis=0)
    stderr = (s**2).std(axis=0, ddof=1) / 2**0.5
    merged = rows(s.astype(np.float32), kl, stderr).merged(["q,k"])
    assert [(u.name, u.kind) for u in merged.units] == [("a.{q,k}", "{q,k}"), ("b", "b")]
    assert merged.scores is not None
    assert merged.scores[:, 0, 0].tolist() == [-1.0, 4.0]
    assert merged.kl[:, 0].tolist() == pytest.approx([(1 + 16) / 2, kl[1, 0]])
    assert merged.stderr[:, 0].tolist() == pytest.approx([15 / 2, stderr[1, 0]])
    assert merged.provenance == Provenance(seed=1)


def test_signed_scores_add_even_where_all_are_above_zero(tmp_path: Path) -> None:
    """Also after a trip through a file: without the mark they would be taken for roots."""
    s = np.array([[1.0, 3.0, 0.5], [2.0, 1.0, 0.8]])[..., None]
    kl, stderr = (s**2).mean(axis=0), (s**2).std(axis=0, ddof=1) / 2**0.5
    path = tmp_path / "profile.safetensors"
    replace(rows(s.astype(np.float32), kl, stderr), signed=True).save(path)
    merged = SensitivityTable.load(path).merged(["q,k"])
    assert merged.signed is True
    assert merged.kl[0, 0] == pytest.approx((1.5**2 + 2.8**2) / 2)
    roots = replace(rows(s.astype(np.float32), kl, stderr), signed=False).merged(["q,k"])
    assert roots.kl[0, 0] == pytest.approx((1 + 0.25 + 4 + 0.64) / 2)


@pytest.mark.parametrize("metric", ["fisher_probe", "gradient"])
def test_a_profile_says_whether_its_scores_are_signed(tiny: LoadedModel, metric: str) -> None:
    samples = calibration_samples(tiny, sequences=4, length=16)
    table = profile(tiny, samples, ("int4-g32",), metric=metric)
    assert table.signed is (metric == "fisher_probe")


def test_a_profile_of_schema_1_is_read(tmp_path: Path) -> None:
    """Its scores count as signed if one is negative; saved again it is of schema 2."""
    old = SensitivityTable.load(OLD)
    assert [unit.name for unit in old.units] == ["q_proj", "k_proj", "out"]
    assert [unit.shapes for unit in old.units] == [((16, 16),), ((16, 16),), ((4, 16),)]
    assert old.formats == ("int3-gc", "int8-gc")
    assert (old.provenance.model.id, old.provenance.metric) == ("Attention", "fisher")
    assert (old.provenance.words.one, old.provenance.outside_bytes) == ("sample", 3184)
    assert (old.signed, old.provenance.coverage) == (None, None)
    fused = old.merged(["q_proj,k_proj"])
    assert old.scores is not None and (old.scores < 0).any()
    assert fused.scores is not None
    np.testing.assert_allclose(fused.scores[:, 0], old.scores[:, :2].sum(axis=1), rtol=1e-6)
    old.save(tmp_path / "new.safetensors")
    new = SensitivityTable.load(tmp_path / "new.safetensors")
    assert (new.units, new.provenance, new.signed) == (old.units, old.provenance, None)
    assert '"schema": 2' in (tmp_path / "new.json").read_text()


def test_units_of_some_rows_of_a_matrix(tmp_path: Path) -> None:
    names = ("up[rows:0]", "up[rows:1]")
    rows = (((0, 2), (6, 8)), ((2, 6),))
    units = tuple(
        UnitInfo(name, (name, "down"), ((4, 8), (2, 8)), "up", 0, (), (some, None))
        for name, some in zip(names, rows, strict=True)
    )
    size = stored_bytes(units, [Format.parse("int4-g32")])
    path = tmp_path / "profile.safetensors"
    SensitivityTable(units, ("int4-g32",), size, np.ones((2, 1)), np.ones((2, 1))).save(path)
    found = SensitivityTable.load(path)
    assert found.units == units
    assert [part.module for part in found.units[0].parts] == ["up", "down"]


def test_provenance_is_checked(tmp_path: Path) -> None:
    good = table()
    assert replace(good, provenance={"seed": 1}).provenance == good.provenance  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"provenance\.modle: Extra"):
        Provenance.from_json({"modle": "x"})
    path = tmp_path / "profile.safetensors"
    header = {"schema": 2, "units": [], "formats": [], "provenance": {"seed": "late"}}
    arrays = {name: np.zeros((0, 0)) for name in ("bytes", "kl", "stderr")}
    save_file(arrays, path, metadata={"bitplan_profile": json.dumps(header)})
    with pytest.raises(ValueError, match=r"is damaged \(provenance\.seed: Input should"):
        SensitivityTable.load(path)


def test_what_prices_depend_on_leaves_out_what_follows() -> None:
    model = ModelRef(id="a", sha256="00")
    found = Provenance(model=model, calibration={"seed": 3, "per": "sample"}, versions={"x": "1"})
    decisive = found.decisive()
    assert (decisive["model.sha256"], decisive["calibration.seed"]) == ("00", 3)
    assert not {"model.id", "calibration.per", "versions.x", "coverage", "outside_bytes"} & set(
        decisive
    )


def test_without_scores_prices_add_and_errors_add_in_quadrature() -> None:
    kl, stderr = np.array([[1.0], [2.0], [4.0]]), np.array([[0.3], [0.1], [0.4]])
    merged = rows(None, kl, stderr).merged(["q,k"])
    assert merged.kl[:, 0].tolist() == [5.0, 2.0]
    assert merged.stderr[:, 0].tolist() == pytest.approx([0.5, 0.1])
    assert merged.bytes[:, 0].tolist() == [48, 24]


def test_a_format_that_one_member_lacks_stays_closed() -> None:
    two = table()
    units = tuple(
        replace(u, name=n, modules=(n,), shapes=((4, 8),))
        for u, n in zip(two.units, "qk", strict=True)
    )
    merged = replace(two, units=units).merged(["q,k"])
    assert np.isnan(merged.kl).tolist() == [[False, True]]


def test_rules_that_match_nothing_or_what_is_fused_change_nothing() -> None:
    kl = np.ones((3, 1))
    once = rows(None, kl, kl).merged(["q,k", "gate,up"])
    again = once.merged(["q,k", "x,y"])
    assert again.units == once.units
    assert (again.kl == once.kl).all()
    with pytest.raises(ValueError, match="needs at least two names"):
        once.merged(["q"])


def test_a_fused_unit_takes_part_with_all_its_matrices() -> None:
    names = ("m.q", "m.k", "m.v")
    units = tuple(UnitInfo(n, (n,), ((4, 8),), n[2:], 0) for n in names)
    size = stored_bytes(units, [Format.parse("int4-g32")])
    kl = np.ones((3, 1))
    apart = SensitivityTable(units, ("int4-g32",), size, kl, kl)
    merged = apart.merged(["q,v"]).merged(["q,k,v"])
    assert [(u.name, u.kind, u.modules) for u in merged.units] == [
        ("m.{q,v,k}", "{q,v,k}", ("m.q", "m.v", "m.k"))
    ]
    assert merged.kl[0, 0] == 3
