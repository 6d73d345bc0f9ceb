"""What a model's file takes besides its units is bounded before the file exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitplan
from bitplan.quantizers.checkpoint import FILE_NAME


class LongNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = "self_attention_query_projection"
        self.multimodal_language_model_layers = nn.ModuleList(
            nn.ModuleDict({layer: nn.Linear(32, 32)}) for _ in range(40)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.multimodal_language_model_layers:
            assert isinstance(block, nn.ModuleDict)
            x = torch.tanh(block["self_attention_query_projection"](x))
        return x


@pytest.mark.parametrize("fmt", ["int3-g32-asym", "int3-g32-asym+lr4", "bf16"])
def test_a_written_file_is_no_larger_than_was_counted_on(fmt: str, tmp_path: Path) -> None:
    """Else a budget for the whole file would be exceeded."""
    torch.manual_seed(0)
    model = LongNames()
    table = bitplan.profile(model, [torch.randn(4, 32)], (fmt,))
    plan = bitplan.solve(table, f"{table.uniform_bytes(fmt)}B")
    file = bitplan.quantize(plan, tmp_path / "packed", model=model) / FILE_NAME
    bound = plan.bytes + (table.provenance.outside_bytes or 0)
    assert 0.5 * bound < file.stat().st_size <= bound
