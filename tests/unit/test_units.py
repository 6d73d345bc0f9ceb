"""Which matrices become units, and what their names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitplan.models.find import as_stored, find_units, unplanned_tensors
from bitplan.models.sites import places
from bitplan.models.workload import LoadedModel, tie


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(8)


def test_tied_weights_are_one_unit_counted_once() -> None:
    units = find_units(Net())
    assert [u.name for u in units][:2] == ["embed", "layers.0.q_proj"]
    assert units[0].aliases == ("head",)
    assert units[0].weights == 160
    assert units[1].kind == "q_proj"
    assert units[1].layer == 0
    assert units[0].layer is None


def test_units_are_the_same_without_weights() -> None:
    with torch.device("meta"):
        net = Net()
    assert find_units(net) == find_units(Net())


def test_include_and_exclude_are_globs_on_any_name_of_a_weight() -> None:
    assert [u.name for u in find_units(Net(), include=["head"])] == ["embed"]
    names = [u.name for u in find_units(Net(), include=["layers.*"], exclude=["*.out"])]
    assert names == [f"layers.{i}.{p}" for i in (0, 1) for p in ("q_proj", "k_proj")]


def test_fused_matrices_share_a_unit() -> None:
    units = find_units(Net(), groups=["q_proj,k_proj"])
    fused = units[1]
    assert fused.name == "layers.0.{q_proj,k_proj}"
    assert fused.modules == ("layers.0.q_proj", "layers.0.k_proj")
    assert fused.shapes == ((8, 8), (4, 8))
    assert fused.kind == "{q_proj,k_proj}"
    assert len(units) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["layer.*"]}, r"No layer matches 'layer\.\*'.*looks like"),
        ({"exclude": ["nothing"]}, "No layer matches 'nothing'"),
        ({"include": ["layers.*"], "exclude": ["layers.*"]}, "leaves no unit"),
        ({"groups": ["q_proj"]}, "needs at least two names"),
        ({"groups": ["gate,up"]}, "matches nothing"),
    ],
)
def test_bad_selections_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_units(Net(), **options)


def test_a_model_without_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to"):
        find_units(nn.LayerNorm(4))


def test_two_stacks_keep_their_kinds_apart() -> None:
    module = nn.ModuleDict(
        {
            "layer1": nn.ModuleList(
                [nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)}) for _ in range(3)]
            ),
            "layer2": nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)})]),
        }
    )
    cells = [(u.layer, u.kind) for u in find_units(module)]
    assert cells == [(0, "conv"), (1, "conv"), (2, "conv"), (None, "layer2.0.conv")]


def test_every_float_parameter_with_two_dimensions_is_in_a_unit() -> None:
    class Scaled(nn.Embedding):
        pass

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bias = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.ones(3))

    module = nn.ModuleDict(
        {"embed": Scaled(8, 4), "head": nn.Linear(4, 8), "odd": Odd(), "rnn": nn.LSTM(4, 2)}
    )
    module["head"].weight = module["embed"].weight
    units = {unit.name: (unit.shapes[0], unit.aliases) for unit in find_units(module)}
    assert units == {
        "embed": ((8, 4), ("head",)),
        "odd.table": ((6, 4), ()),
        "rnn.weight_ih_l0": ((8, 4), ()),
        "rnn.weight_hh_l0": ((8, 2), ()),
    }


def test_matrices_are_views_with_outputs_as_rows() -> None:
    conv, linear, transposed = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(3, 5), Conv1D(7, 2)
    for module, shape in ((conv, (6, 18)), (linear, (5, 3)), (transposed, (7, 2))):
        (place,) = places(module)
        matrix = place.matrix(place.parameter)
        assert tuple(matrix.shape) == place.shape == shape
        assert matrix.data_ptr() == module.weight.data_ptr()
        assert torch.equal(place.restored(matrix), place.parameter)


def test_unplanned_tensors_are_everything_else_once(tiny: LoadedModel) -> None:
    units = find_units(tiny.module, include=["model.layers.*"])
    others, tied = unplanned_tensors(tiny.module, units)
    assert "model.embed_tokens.weight" in others
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in others
    assert not any("proj" in name for name in others)
    everything = sum(u.weights for u in units) + sum(t.numel() for t in others.values())
    assert everything == sum(p.numel() for p in tiny.module.parameters())
    assert isinstance(next(iter(others.values())), torch.Tensor)


def test_a_module_under_two_names_is_one_unit() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    module["b"] = module["a"]
    units = find_units(module)
    assert [(u.name, u.aliases) for u in units] == [("a", ("b",)), ("c", ())]
    others, tied = unplanned_tensors(module, units)
    assert set(others) == {"a.bias", "c.bias"}
    assert tied == {"b.bias": "a.bias"}


def test_only_what_fits_is_stored_in_the_checkpoint_dtype() -> None:
    exact, fine = torch.tensor([1.5]), torch.tensor([1.0 + 2**-20])
    assert as_stored(exact, torch.bfloat16).dtype == torch.bfloat16
    assert as_stored(fine, torch.bfloat16).dtype == torch.float32


def test_parameters_on_the_same_memory_are_one() -> None:
    net = Net()
    net.head.weight = nn.Parameter(net.embed.weight.data)
    separate = [unit for unit in find_units(net) if unit.aliases]
    tie(net)
    assert net.head.weight is net.embed.weight
    assert [unit for unit in find_units(net) if unit.aliases] == separate


def test_other_views_of_the_same_memory_are_other_weights() -> None:
    net = Net()
    net.head.weight = nn.Parameter(net.embed.weight.data[:10])
    tie(net)
    assert not any(unit.aliases for unit in find_units(net))
    units = find_units(net, include=["layers.*"])
    assert {"embed.weight", "head.weight"} <= unplanned_tensors(net, units)[0].keys()
