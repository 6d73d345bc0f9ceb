"""Golden files of exact results: how they are kept, and how results become comparable text."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FOLDER = Path(__file__).parent / "frozen"
CHANGING = {"versions", "created", "command", "transformers_version", "definition_sha256"}


class Frozen:
    """One golden file: a JSON object whose entries are compared one at a time."""

    def __init__(self, name: str, update: bool) -> None:
        self.path, self.update = FOLDER / f"{name}.json", update

    def check(self, key: str, found: Any) -> None:
        """Compare exactly with what is kept, or keep it."""
        found = json.loads(json.dumps(found))  # tuples become lists
        assert found == self.kept(key, found)

    def kept(self, key: str, found: Any) -> Any:
        """The entry of the file; ``found`` itself when the file is being rewritten."""
        entries = json.loads(self.path.read_text()) if self.path.exists() else {}
        if self.update:
            entries[key] = found
            self.path.write_text(json.dumps(entries, indent=0, sort_keys=True) + "\n")
        assert key in entries, f"{self.path.name} has no {key!r}; run with --update-golden"
        return entries[key]

    def check_here(self, key: str, found: Any) -> None:
        """Compare exactly, but only where processor, torch and numpy made the file."""
        found = {"on": machine(), "found": json.loads(json.dumps(found))}
        kept = self.kept(key, found)
        assert kept["on"] != machine() or found == kept

    def check_table(
        self, key: str, found: Mapping[str, NDArray[Any] | None], elsewhere: float = 1e-5
    ) -> None:
        """Compare float arrays: exactly where the file was made, else only nearly.

        Sums in float32 end in other bits on another processor, so bit equality cannot be promised
        there: six significant digits are kept and compared.

        Args:
            key: The entry of the file.
            found: Name -> array [rows, columns], or scores [samples, units, formats].
            elsewhere: Relative tolerance on another processor.
        """
        made = {name: _rounded(array) for name, array in found.items()}
        kept = self.kept(key, made)
        assert made.keys() == kept.keys()
        for name, array in made.items():
            before = kept[name]
            assert (array is None) == (before is None), name
            if array is not None:
                given, wanted = np.array(array, float), np.array(before, float)
                np.testing.assert_allclose(given, wanted, rtol=elsewhere, err_msg=name)
        exact = {name: None if a is None else digest(a) for name, a in found.items()}
        self.check_here(f"{key}, bits", exact)


def _rounded(array: NDArray[Any] | None) -> Any:
    """Six digits; only the shape and the root mean square of per-sample scores."""
    if array is None:
        return None
    if array.ndim == 3:
        return [*array.shape, float(f"{np.sqrt((array.astype(np.float64) ** 2).mean()):.6g}")]
    return [[f"{value:.6g}" for value in row] for row in array.tolist()]


def machine() -> str:
    """A short digest of what decides the last bits of a sum."""
    model = platform.processor()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        lines = cpus.read_text().splitlines()
        model = next((line for line in lines if line.startswith("model name")), model)
    parts = [model, torch.backends.cpu.get_cpu_capability(), *map(version, ("torch", "numpy"))]
    return digest(" ".join(parts))[:16]


def digest(value: Tensor | NDArray[Any] | bytes | str) -> str:
    """SHA-256 of the bytes of a tensor, an array or a text."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).tobytes()
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()


def plain(data: Any) -> Any:
    """JSON data with floats as ``float.hex()`` and without versions and dates."""
    if isinstance(data, Mapping):
        return {str(k): plain(v) for k, v in data.items() if k not in CHANGING}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, np.generic):
        return plain(data.item())
    return data.hex() if isinstance(data, float) else data


def numbers(values: Iterable[Any]) -> str:
    """Integers in one line."""
    return " ".join(str(int(value)) for value in values)


def tensor_digests(path: Path) -> dict[str, str]:
    """Name -> dtype, shape and digest of every tensor of a safetensors file, and its metadata."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {k: _data(v) for k, v in (file.metadata() or {}).items()}
    found = {
        name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} {digest(t)}"
        for name, t in tensors.items()
    }
    return found | {"metadata": digest(json.dumps(plain(metadata), sort_keys=True))}


def _data(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def gguf_digests(path: Path) -> dict[str, str]:
    """Name -> type, shape and digest of every tensor of a GGUF file, and its key-value pairs."""
    import gguf

    reader = gguf.GGUFReader(path)
    found = {
        t.name: f"{t.tensor_type.name} {[int(n) for n in t.shape]} {digest(t.data)}"
        for t in reader.tensors
    }
    fields = {
        name: [field.parts[i].tobytes().hex() for i in field.data]
        for name, field in reader.fields.items()
    }
    return found | {"fields": digest(json.dumps(fields, sort_keys=True))}


def onnx_digest(path: Path) -> dict[str, str]:
    """Digests of a graph's operators, counted, and of its constants, whatever their names."""
    import onnx

    graph = onnx.load(path).graph
    kinds: dict[str, int] = {}
    for node in graph.node:
        kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    constants = sorted(
        f"{c.data_type} {list(c.dims)} {digest(onnx.numpy_helper.to_array(c).tobytes())}"
        for c in graph.initializer
        if len(c.dims) == 2 or c.data_type not in {onnx.TensorProto.INT64, onnx.TensorProto.FLOAT}
    )
    return {
        "constants": digest("\n".join(constants)),
        "MatMulNBits": str(kinds.get("MatMulNBits", 0)),
        "DequantizeLinear": str(kinds.get("DequantizeLinear", 0)),
    }


def folder_digests(path: Path, source: Path) -> dict[str, str]:
    """What an exporter wrote: a digest per file.

    Tensors and normalised JSON are hashed, not the files that hold them.  Of ``config.json``, only
    what differs from the original model's; the tokenizer's and generation files are transformers'
    own.

    Args:
        path: The file or folder.
        source: The original model's folder.
    """
    original = json.loads((source / "config.json").read_text())
    found = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        name = str(file.relative_to(path)) if path.is_dir() else "file"
        if "tokenizer" in name or "generation" in name or "chat_template" in name:
            continue
        if file.suffix == ".safetensors":
            content: Any = tensor_digests(file)
        elif file.suffix == ".gguf":
            content = gguf_digests(file)
        elif file.suffix == ".onnx":
            content = onnx_digest(file)
        elif file.suffix == ".json":
            content = json.loads(file.read_text())
            if name == "config.json":
                content = {k: v for k, v in content.items() if original.get(k) != v}
        else:
            content = file.read_text()
        found[name] = digest(json.dumps(plain(content), sort_keys=True))
    return found
