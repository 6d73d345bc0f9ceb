"""Packed modules and operators against the plain computation with the dequantized weight."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitplan.kernels.launch import PackedMeta
from bitplan.models.layers import runs_own_code
from bitplan.models.packed_modules import PackedEmbedding, PackedLinear, PackedModule
from bitplan.models.packing import replace
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor

fit_grid = METHODS.trait("rtn", "grid")
SPECS = ["int4-g64-asym", "int3-g32", "int8-gc-asym", "int5-gt", "bf16"]
SPECS += ["nf4-g64", "int3-g64-asym+lr4", "nf4-gc+lr2", "q4_k", "mxfp4"]


def pack(matrix: Tensor, spec: str = "int4-g64-asym") -> PackedTensor:
    """Pack a weight [rows, cols]."""
    fmt = Format.parse(spec)
    return PackedTensor.pack(matrix.detach(), fmt, fit_grid(matrix.detach(), fmt))


class TinyModel(nn.Module):
    """An embedding, a Conv1D, a linear and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 96)
        self.conv1d = Conv1D(64, 96)
        self.linear = nn.Linear(64, 96)
        self.head = nn.Linear(96, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: Tensor) -> Tensor:
        logits: Tensor = self.head(self.linear(self.conv1d(self.embed(indices))))
        return logits


def pack_tiny(model: TinyModel, spec: str) -> tuple[TinyModel, dict[str, PackedTensor]]:
    """The model with dequantized weights, and the packed weights."""
    packed = {
        "embed": pack(model.embed.weight, spec),
        "conv1d": pack(model.conv1d.weight.T, spec),
        "linear": pack(model.linear.weight, spec),
    }
    plain = copy.deepcopy(model)
    plain.embed.weight.data = packed["embed"].dequantize()
    plain.conv1d.weight.data = packed["conv1d"].dequantize().T
    plain.linear.weight.data = packed["linear"].dequantize()
    return plain, packed


@pytest.mark.parametrize("spec", SPECS)
def test_packed_model_equals_the_dequantized_model(spec: str) -> None:
    model = TinyModel()
    plain, packed = pack_tiny(model, spec)
    replace(model, packed, {"head": "embed"})
    assert isinstance(model.embed, PackedEmbedding)
    assert all(isinstance(m, PackedLinear) for m in (model.conv1d, model.linear, model.head))
    indices = torch.tensor([[3, 0, 39], [3, 7, 1]])
    assert torch.allclose(model(indices), plain(indices), atol=1e-5)
    assert torch.equal(model.embed(indices), plain.embed(indices))


def test_packed_modules_have_the_sizes_of_the_plain_ones() -> None:
    model = TinyModel()
    replace(model, pack_tiny(model, "int4-g64-asym")[1], {"head": "embed"})
    assert (model.linear.in_features, model.linear.out_features) == (64, 96)
    assert (model.embed.num_embeddings, model.embed.embedding_dim) == (40, 96)


def test_tied_modules_share_tensors() -> None:
    model = TinyModel()
    replace(model, pack_tiny(model, "int4-g64-asym")[1], {"head": "embed"})
    assert model.head.get_buffer("codes") is model.embed.get_buffer("codes")


@pytest.mark.parametrize("spec", SPECS)
def test_convolution(spec: str) -> None:
    module = nn.Conv2d(6, 8, (3, 5), stride=2, padding=1, groups=2)
    packed = pack(module.weight.flatten(1), spec)
    model = nn.Sequential(module)
    replace(model, {"0": packed}, {})
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[0]._modules["weight"], PackedModule)
    x = torch.randn(2, 6, 20, 20)
    kernel = packed.dequantize().view(module.weight.shape)
    expected = nn.functional.conv2d(x, kernel, module.bias, 2, 1, 1, 2)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_hooks_of_a_replaced_layer_still_run() -> None:
    layer = nn.Linear(64, 8)
    model = nn.Sequential(layer)
    layer.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    layer.register_forward_hook(lambda _module, _args, output: output + 1)
    packed = pack(layer.weight)
    plain = copy.deepcopy(model)
    plain[0].weight.data = packed.dequantize()
    replace(model, {"0": packed}, {})
    x = torch.randn(3, 64)
    assert isinstance(model[0], PackedLinear)
    assert torch.allclose(model(x), plain(x), atol=1e-5)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        result: Tensor = super()._conv_forward(input, centred, bias)
        return result


def test_convolutions_with_code_of_their_own_are_known() -> None:
    assert runs_own_code(Standardized(3, 4, 3))
    assert not runs_own_code(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("spec", SPECS)
def test_state_dict_has_the_names_of_a_checkpoint(spec: str) -> None:
    model, other = nn.Sequential(nn.Linear(96, 8)), nn.Sequential(nn.Linear(96, 8))
    replace(model, {"0": pack(torch.randn(8, 96), spec)}, {})
    replace(other, {"0": pack(torch.randn(8, 96), spec)}, {})
    parts = Format.parse(spec).tensors((8, 96))
    assert set(model.state_dict()) == {"0.bias", *(f"0.{part}" for part in parts)}
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("spec", SPECS)
def test_casting_keeps_the_stored_tensors(spec: str) -> None:
    model = TinyModel()
    packed = pack_tiny(model, spec)[1]
    replace(model, packed, {"head": "embed"})
    model.to(torch.bfloat16)
    for part, tensor in packed["linear"].tensors.items():
        assert torch.equal(model.linear.get_buffer(part), tensor)
    assert model.embed(torch.tensor([1])).dtype == torch.bfloat16
    assert model(torch.tensor([1])).dtype == torch.bfloat16


def test_a_model_on_the_meta_device_can_be_filled() -> None:
    model = TinyModel()
    packed = pack_tiny(model, "int4-g64-asym")[1]
    biases = {name: p.detach() for name, p in model.named_parameters() if "bias" in name}
    with torch.device("meta"):
        empty = TinyModel()
    replace(empty, packed, {"head": "embed"})
    replace(model, packed, {"head": "embed"})
    empty.load_state_dict(biases, strict=False, assign=True)
    empty.to(torch.float32)  # nothing is left on the meta device
    indices = torch.tensor([1, 2])
    assert torch.equal(empty(indices), model(indices))


@pytest.mark.parametrize("spec", SPECS)
def test_compiled_model_is_one_graph(spec: str) -> None:
    model = TinyModel()
    replace(model, pack_tiny(model, spec)[1], {"head": "embed"})
    torch._dynamo.reset()  # it counts what it compiled in other tests
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    indices = torch.tensor([[1, 2, 3]])
    assert torch.allclose(compiled(indices), model(indices), atol=1e-5)


@pytest.mark.parametrize("spec", ["int4-g64-asym", "int3-g32"])
def test_operators_are_well_formed(spec: str) -> None:
    packed = pack(torch.randn(8, 96), spec)
    meta = PackedMeta.of(packed.fmt, packed.shape)
    parts = (packed.tensors["codes"], packed.tensors["scale"], packed.tensors.get("zero"))
    x = torch.randn(2, 3, 96, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    linear, dequantize = torch.ops.bitplan.packed_linear, torch.ops.bitplan.dequantize
    torch.library.opcheck(linear.default, (x, *parts, bias, *meta))
    torch.library.opcheck(linear.default, (x.detach(), *parts, None, *meta))
    torch.library.opcheck(dequantize.default, (*parts, None, *meta))
    torch.library.opcheck(dequantize.default, (*parts, torch.tensor([5, 5, 0]), *meta))


def test_gradients_reach_inputs_and_biases() -> None:
    weight = pack(torch.randn(8, 96))
    x = torch.randn(2, 3, 96, requires_grad=True)
    bias = nn.Parameter(torch.randn(8))
    inputs = [x, bias]
    found = torch.autograd.grad(PackedLinear(weight, bias, x)(x).square().sum(), inputs)
    plain = nn.functional.linear(x, weight.dequantize(), bias).square().sum()
    for gradient, expected in zip(found, torch.autograd.grad(plain, inputs), strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("names", "aliases", "message"),
    [
        (["embed", "layer"], {"head": "embed"}, "'layer' is not in the model"),
        (["embed", "linear"], {"head": "embed"}, r"'linear' is \[40, 96\].* needs \[96, 64\]"),
        (["embed", "norm"], {"head": "embed"}, "'norm' .* cannot hold a packed weight"),
        (["embed", "act"], {"head": "embed"}, "'act' .* cannot hold a packed weight"),
        (["embed"], {}, "'head' is tied to 'embed'"),
        (["embed"], {"head": "elsewhere"}, "'head' is tied to 'elsewhere', .* no packed weight"),
    ],
)
def test_replacing_fails_and_changes_nothing(
    names: list[str], aliases: dict[str, str], message: str
) -> None:
    model = TinyModel()
    model.norm, model.act = nn.LayerNorm(96), nn.ReLU()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace(model, dict.fromkeys(names, pack(model.embed.weight)), aliases)
    assert dict(model.named_modules()) == before
