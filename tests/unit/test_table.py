"""The profile file: round trip, and clear words about damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bitplan.quantizers.format import Format
from bitplan.sensitivity.table import SensitivityTable, UnitInfo, stored_bytes


def table() -> SensitivityTable:
    units = (
        UnitInfo("a", ("a",), ((4, 8),), "a", 0),
        UnitInfo("{b,c}", ("b", "c"), ((2, 8), (2, 8)), "{b,c}", None, ("d",)),
    )
    kl = np.array([[0.5, 0.1], [0.25, np.nan]])
    scores = np.ones((3, 2, 2), dtype=np.float32)
    formats = ("int4-g32", "int8-g32")
    size = stored_bytes(units, [Format.parse(name) for name in formats])
    return SensitivityTable(units, formats, size, kl, kl / 10, scores, {"seed": 1})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    table().save(path)
    found = SensitivityTable.load(path)
    assert found.units == table().units
    assert found.provenance == {"seed": 1}
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
    with pytest.raises(ValueError, match="schema 9, this version reads 1"):
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
