"""Give the configurations of plan-only targets to their tools, and see that they obey them.

Run it with the interpreter of an environment that has bitplan and some of torchao, hqq and nncf; it
needs nothing but a random Llama made on the spot:

    python benchmarks/export_configs.py
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.exporters.source import open_source
from bitplan.exporters.targets import find
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.runtimes import Rules
from bitplan.testing.plans import mixed

IDS = torch.arange(32).view(1, 32)


class Logits(nn.Module):
    """The model as a function from ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
        heads: dict[str, Any] = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
        }
        self.llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [samples, positions] to logits [samples, positions, 512]."""
        logits: Tensor = self.llama(input_ids=ids, use_cache=False).logits
        return logits


def torchao(model: nn.Module, text: str) -> int:
    """Every module gets the type it was given; the number of modules."""
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    entries = json.loads(text)["_data"]["fqn_to_config"]
    quantize_(model, config_from_dict(json.loads(text)), filter_fn=None)
    for name, entry in entries.items():
        weight: Any = model.get_submodule(name).weight
        wanted = entry and f"torch.{entry['_data']['weight_dtype']['_data']}"
        found = getattr(weight, "target_dtype", None)
        assert (found and str(found)) == wanted, (name, found, wanted)
    return len(entries)


def hqq(model: nn.Module, text: str) -> int:
    """Every layer becomes one of HQQ's, with the bits it was given."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    entries = json.loads(text)
    for name, entry in entries.items():
        parent, _, child = name.rpartition(".")
        layer = HQQLinear(
            model.get_submodule(name),
            BaseQuantizeConfig(**entry),
            compute_dtype=torch.float32,
            device="cpu",
        )
        assert layer.meta["nbits"] == entry["nbits"], name
        setattr(model.get_submodule(parent), child, layer)
    return len(entries)


def nncf(model: nn.Module, text: str) -> int:
    """One pass per format, each on what the passes before left; the number of passes."""
    import nncf

    passes = json.loads(text)
    for entry in passes:
        mode = nncf.CompressWeightsMode(entry["mode"])
        low: dict[str, Any] = {"ratio": 1.0, "all_layers": True, "group_size": entry["group_size"]}
        nncf.compress_weights(
            model,
            mode=mode,
            dataset=nncf.Dataset([IDS]),
            ignored_scope=nncf.IgnoredScope(patterns=entry["ignored_patterns"], validate=False),
            **({} if entry["mode"].startswith("int8") else low),
        )
    return len(passes)


def main() -> None:
    """Run every tool that is installed."""
    tools: dict[str, Callable[[nn.Module, str], int]] = {
        "torchao": torchao,
        "hqq": hqq,
        "nncf": nncf,
    }
    with torch.no_grad():
        for name, run in tools.items():
            if importlib.util.find_spec(name) is None:
                print(f"{name}: not installed")
                continue
            model = Logits()
            original = model(IDS).log_softmax(-1)
            loaded = LoadedModel("random", model, "float32", Workload(model))
            source = open_source(mixed(loaded, Rules.load(name)), model=loaded)
            count = run(model, find(name)[1].config(source))
            kl = (original.exp() * (original - model(IDS).log_softmax(-1))).sum(-1).mean()
            assert kl > 0
            print(f"{name}: {count} entries obeyed, KL {kl:.3g} from the original")


if __name__ == "__main__":
    main()
