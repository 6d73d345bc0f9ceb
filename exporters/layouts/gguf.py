"""GGUF files: which tensor is which module, the order of its rows, and copies with other types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from ...models.gguf_names import gguf_architecture, gguf_tensors
from ...models.gguf_parts import SPLIT, open_gguf
from ...models.load import smollm2_path
from ...models.workload import LoadedModel
from ...quantizers.block_sizes import BLOCKS, INTEGER_BLOCKS
from ...quantizers.blocks import pack_blocks
from ...quantizers.packed import PackedTensor, unpack_bits

TYPE_OF_FORMAT = {fmt: name.upper() for name, fmt in INTEGER_BLOCKS.items()}
TYPE_OF_FORMAT |= {name: name.upper() for name in BLOCKS if name not in INTEGER_BLOCKS}
TYPE_OF_FORMAT |= {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
FORMAT_OF_TYPE = {kind: fmt for fmt, kind in TYPE_OF_FORMAT.items()}
# Types whose codebooks are no format here, and the format of about as many bits.
NEAREST = {
    "IQ1_S": "q2_k",
    "IQ1_M": "q2_k",
    "TQ1_0": "q2_k",
    "TQ2_0": "q2_k",
    "IQ2_XXS": "q2_k",
    "IQ2_XS": "q2_k",
    "IQ2_S": "q2_k",
    "IQ3_XXS": "q3_k",
    "IQ3_S": "q3_k",
    "NVFP4": "iq4_nl",
}


class Block(NamedTuple):
    """A tensor to write: its type, its shape as a matrix, and its bytes [rows, bytes of a row]."""

    kind: str
    shape: tuple[int, ...]
    data: NDArray[Any]


def base_file(model: LoadedModel, model_id: str, like: Path | None) -> Path:
    """The GGUF file that lends metadata and unplanned tensors.

    Raises:
        ValueError: If the model did not come from one and none is given.
    """
    if like is not None:
        if not like.is_file():
            raise ValueError(f"There is no GGUF file at --like {like}.")
        return like
    if model_id == "smollm2":
        return smollm2_path()
    if model_id.endswith(".gguf") and Path(model_id).is_file():
        return Path(model_id)
    raise ValueError(
        f"A GGUF file needs metadata that {model.id} does not have: the tokenizer in llama.cpp's "
        "own form, for one. Convert the model once with convert_hf_to_gguf.py of llama.cpp "
        "(--outtype f16 or bf16) and give that file with --like; only its metadata and what the "
        "plan leaves as it was are taken from it. --plan-only needs no such file."
    )


def architecture_of(model: LoadedModel) -> tuple[str, int]:
    """The GGUF architecture of a Hugging Face model and its number of blocks.

    Raises:
        ValueError: If it is not a language model of transformers, or llama.cpp has none like it.
    """
    config: Any = getattr(model.module, "config", None)
    if getattr(config, "model_type", None) is None:
        raise ValueError(
            f"{model.id} is no language model of transformers, so it has no GGUF form."
        )
    return gguf_architecture(config)


def module_names(reader: gguf.GGUFReader, model: LoadedModel | None) -> dict[str, str]:
    """GGUF tensor name -> module name, for all matrices whose module is known."""
    architecture, blocks = _architecture(reader)
    if model is not None:
        modules = [name for name, _ in model.module.named_modules()]
        return {
            tensor: module for module, tensor in gguf_tensors(architecture, blocks, modules).items()
        }
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    mapping = gguf.get_tensor_name_map(known[architecture], blocks).mapping
    best: dict[str, str] = {}
    for module, (_, tensor) in mapping.items():
        if _likeness(module) > _likeness(best.get(tensor + ".weight", "")):
            best[tensor + ".weight"] = module
    return best


def _likeness(module: str) -> int:
    """How much a module is named as in the Llama of transformers, whose names most use."""
    if module in ("model.embed_tokens", "lm_head"):
        return 9
    parts = module.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) != 5:
        return 0 if module == "" else 1
    usual = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return 2 + 3 * (parts[3] in ("self_attn", "mlp")) + 3 * (parts[4] in usual)


def row_order(
    reader: gguf.GGUFReader, tensor: str, rows: int, distance: Callable[[Tensor | None], float]
) -> Tensor | None:
    """Where llama.cpp keeps the rows of a matrix: its row i is our row ``order[i]``.

    Some architectures have the rows of queries and keys in another order, which suits llama.cpp's
    rotary embedding: the halves of every head interleaved.

    Args:
        reader: The file.
        tensor: Name of the tensor.
        rows: Its rows.
        distance: How far the file's matrix is from the model's, in an order of the model's rows.

    Returns:
        The order that fits; None for the model's own.
    """
    if ".attn_q." not in tensor and ".attn_k." not in tensor:
        return None
    return min((None, *_interleaved(reader, rows)), key=distance)


def usual_order(reader: gguf.GGUFReader, tensor: str, rows: int) -> Tensor | None:
    """:func:`row_order` by the architecture alone."""
    architecture, _ = _architecture(reader)
    if architecture not in ("llama", "granite", "minicpm") or ".attn_" not in tensor:
        return None
    if ".attn_q." in tensor:
        return next(_interleaved(reader, rows), None)
    return list(_interleaved(reader, rows))[-1] if ".attn_k." in tensor else None


def _interleaved(reader: gguf.GGUFReader, rows: int) -> Iterator[Tensor]:
    architecture, _ = _architecture(reader)
    for key in ("head_count", "head_count_kv"):
        field = reader.get_field(f"{architecture}.attention.{key}")
        heads = field.contents() if field else None
        if isinstance(heads, int) and heads and rows % (2 * heads) == 0:
            yield torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def blocks_of(packed: PackedTensor, order: Tensor | None) -> Block:
    """A packed weight as llama.cpp stores it, its rows in the given order."""
    fmt, kind = packed.fmt, TYPE_OF_FORMAT[packed.fmt.name]
    if fmt.floating:
        weight = packed.tensors["weight"]
        data = (weight if order is None else weight[order]).contiguous()
        return Block(kind, packed.shape, data.view(torch.uint8).numpy())
    if fmt.block_size > 1:
        data = packed.tensors["blocks"]
    else:
        codes = unpack_bits(packed.tensors["codes"], fmt.bits, packed.shape[1])
        padded = pad(codes, (0, -codes.shape[1] % 32))
        data = pack_blocks(kind.lower(), padded, packed.tensors["scale"], None)
    return Block(kind, packed.shape, (data if order is None else data[order]).numpy())


def weight_of(tensor: gguf.ReaderTensor, order: Tensor | None) -> Tensor:
    """The matrix of a tensor, float32 [rows, cols], rows in the model's own order."""
    weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).float()
    if order is None:
        return weight
    restored = torch.empty_like(weight)
    restored[order] = weight
    return restored


def matrix_shape(tensor: gguf.ReaderTensor) -> tuple[int, int] | None:
    """(rows, cols) of a tensor; None if it is no matrix."""
    if len(tensor.shape) != 2:
        return None
    return int(tensor.shape[1]), int(tensor.shape[0])


def relative_distance(theirs: Tensor, ours: Tensor) -> float:
    """||theirs - ours|| / ||ours||."""
    return float((theirs - ours).norm() / ours.norm().clamp_min(1e-30))


def original_weight(module: nn.Module | None) -> Tensor | None:
    """The plain weight of a module as a matrix, if it has one."""
    from ...models.layers import original_matrix

    return original_matrix(module)


def copy_with(
    base: Path,
    out: Path,
    kinds: Mapping[str, tuple[str, tuple[int, ...], int]],
    block: Callable[[str, gguf.GGUFReader], Block],
    extra: Mapping[str, str | float],
) -> None:
    """Copy a GGUF file, some of its tensors in another type, one tensor at a time.

    Args:
        base: The file.
        out: Where to write.
        kinds: Tensor name -> type, shape and bytes of those that change.
        block: Makes such a tensor.
        extra: Further metadata.
    """
    reader = open_gguf(base)
    architecture, _ = _architecture(reader)
    writer = gguf.GGUFWriter(out, architecture)
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", SPLIT)) or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for key, value in extra.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        if tensor.name in kinds:
            name, shape, size = kinds[tensor.name]
            kind_ = gguf.GGMLQuantizationType[name]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, kind_)
        else:
            shape_ = tuple(int(n) for n in reversed(tensor.shape))
            size = int(tensor.n_bytes)
            dtype = np.dtype(np.float32)
            writer.add_tensor_info(tensor.name, shape_, dtype, size, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data = block(tensor.name, reader).data if tensor.name in kinds else tensor.data
        writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8).reshape(-1))
    writer.close()


def open_reader(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file, or all parts of one.

    Raises:
        ValueError: If it is damaged, or a part is missing.
    """
    return open_gguf(path)


def _architecture(reader: gguf.GGUFReader) -> tuple[str, int]:
    field = reader.get_field("general.architecture")
    architecture = str(field.contents()) if field else ""
    count = reader.get_field(f"{architecture}.block_count")
    if count is None:
        raise ValueError("The GGUF file holds no model (no architecture or block count).")
    return architecture, int(count.contents())
