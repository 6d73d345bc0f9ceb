"""How long a packed matrix product takes on a device, from a few numbers kept as data.

    t = t0 + (T_memory⁴ + T_issue⁴ + T_math⁴)^¼

    T_memory = bytes / (eta_bandwidth · bandwidth)
    T_issue  = instructions per weight · rows · cols / (eta_issue · issue_rate)
    T_math   = 2 · max(tokens, tile_tokens) · rows · cols / (eta_peak · peak)

A device is one TOML file in ``kernels/devices``: what its maker publishes, and for every kernel
what it makes of that.  Every number says where it comes from.  ``kernels/fitting.py`` makes them
from measurements.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from .._base.files import atomic_path, read_toml
from .._base.hints import did_you_mean
from ..quantizers.format import Format

FOLDER = Path(__file__).resolve().parent / "devices"
DENSE = "dense"  # the kernel of matrices that are not quantized
NORM = 4  # how sharply the slowest of the three parts wins
WIDTHS = range(1, 9)
ACTIVATION_BYTES = 2

Basis = Literal["fitted", "published", "counted", "assumed"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(_Strict):
    """Where a number comes from.

    Attributes:
        basis: ``fitted`` to timings, ``published`` by the maker, ``counted`` in compiled code, or
            ``assumed``.
        source: Which timings or page, or why it was assumed.
    """

    basis: Basis
    source: str = Field(min_length=1)


class Number(Origin):
    """A positive number of a device, in the unit that its field says."""

    value: PositiveFloat


class Widths(Origin):
    """A number for every width of codes that a kernel runs: bits -> value."""

    value: dict[int, NonNegativeFloat] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if odd := sorted(set(self.value) - set(WIDTHS)):
            raise ValueError(f"there are no codes of {odd[0]} bits")
        return self


class Kernel(_Strict):
    """What one kernel makes of a device.

    Attributes:
        description: Which kernel.
        tile_tokens: Fewer tokens than this take as long as so many.
        instructions: Thread instructions per weight to decode a code of each width it runs; None
            for a kernel that decodes nothing.
        eta_bandwidth: Part of the bandwidth it reaches.
        eta_issue: Part of the issue rate it reaches.
        eta_peak: Part of the peak arithmetic it reaches.
        launch: Seconds per product besides its work, where they are not the device's.
        harness: Seconds per product in the timings it was fitted to, where those were not taken in
            a running model; takes the place of ``launch`` when compared with them.
    """

    description: str
    tile_tokens: PositiveInt = 8
    instructions: Widths | None = None
    eta_bandwidth: Number
    eta_issue: Number
    eta_peak: Number
    launch: Number | None = None
    harness: Number | None = None

    def decode(self, bits: NDArray[np.int64]) -> NDArray[np.float64]:
        """Instructions per weight [P]; 0 for 0 bits and for more than 8, which are no codes.

        Raises:
            ValueError: If it does not run a width.
        """
        widths = {} if self.instructions is None else self.instructions.value
        known = np.full(WIDTHS[-1] + 1, 0.0 if self.instructions is None else np.nan)
        known[0] = 0.0
        known[list(widths)] = list(widths.values())
        found: NDArray[np.float64] = known[np.where(bits <= WIDTHS[-1], bits, 0)]
        if np.isnan(found).any():
            runs = ", ".join(map(str, sorted(widths)))
            missing = bits[np.isnan(found)].min()
            raise ValueError(f"{self.description} runs codes of {runs} bits, not of {missing}.")
        return found


class Device(_Strict):
    """A device and its kernels.

    Attributes:
        name: The file's name without ``.toml``.
        description: The device in words.
        family: Decides the layout of packed weights: ``nvidia``, ``amd`` or ``cpu``.
        matches: Globs on the name that a driver gives the device.
        default: The kernel that a plan is taken to run on.
        processors: Streaming multiprocessors, compute units or cores.
        bandwidth: Of the main memory, bytes per second.
        peak: Of 16-bit products with 32-bit sums, operations per second; without sparsity.
        issue_rate: Thread instructions per second.
        launch: Seconds that every product takes besides its work, in a running model.
        kernels: By name; ``dense`` is that of matrices that are not quantized.
    """

    name: str
    description: str
    family: Literal["nvidia", "amd", "cpu"]
    matches: tuple[str, ...] = ()
    default: str
    processors: PositiveInt
    bandwidth: Number
    peak: Number
    issue_rate: Number
    launch: Number
    kernels: dict[str, Kernel]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (self.default, DENSE):
            if name not in self.kernels:
                raise ValueError(f"kernels: there is no {name!r}")
        for name, kernel in self.kernels.items():
            if name != DENSE and kernel.instructions is None:
                raise ValueError(f"kernels.{name}: instructions are missing")
        return self

    @classmethod
    def load(cls, text: str) -> Device:
        """A device by name or file; ``h200:humming`` takes another kernel than the default.

        Raises:
            ValueError: If there is no such device, kernel or file, or the file is not valid.
        """
        path = Path(text)
        kernel = ""
        if not path.is_file():
            text, _, kernel = text.rpartition(":") if ":" in text else (text, "", "")
            path = Path(text) if text.endswith(".toml") else FOLDER / f"{text}.toml"
        if not path.is_file():
            hint = did_you_mean(text.lower(), names())
            raise ValueError(
                f"Unknown device {text!r}.{hint} Available: {', '.join(names())}, or a .toml file "
                "that `bitplan kernels bench --refit` wrote."
            )
        device = cls.read(path)
        return device.running(kernel) if kernel else device

    @classmethod
    def read(cls, path: Path) -> Device:
        """The device in a TOML file.

        Raises:
            ValueError: If it is not TOML or breaks the schema; says where.
        """
        return read_toml(path, cls, "device")

    @classmethod
    def of(cls, driver_name: str) -> Device | None:
        """The device that a driver calls so, such as ``NVIDIA H100 80GB HBM3``; None if unknown."""
        devices = (cls.read(FOLDER / f"{name}.toml") for name in names())
        return next(
            (d for d in devices if any(fnmatchcase(driver_name, m) for m in d.matches)), None
        )

    def running(self, kernel: str) -> Device:
        """The same device with another default kernel.

        Raises:
            ValueError: If it has no such kernel.
        """
        packed = [name for name in self.kernels if name != DENSE]
        if kernel not in packed:
            raise ValueError(f"{self.name} has no kernel {kernel!r}: {', '.join(packed)}.")
        return self.model_copy(update={"default": kernel})

    def save(self, path: Path) -> None:
        """Write the device as TOML, atomically; :meth:`read` gives it back."""
        with atomic_path(path) as temporary:
            temporary.write_text(
                _toml(self.model_dump(exclude={"name"}, exclude_none=True)), encoding="utf-8"
            )

    @property
    def title(self) -> str:
        """The name, with the kernel."""
        return f"{self.name}:{self.default}"

    @property
    def sureness(self) -> str:
        """How sure predictions of packed matrices are: which numbers were fitted, which assumed."""
        kernel = self.kernels[self.default]
        numbers: dict[str, Origin | None] = {
            "launch": kernel.launch or self.launch,
            "eta_bandwidth": kernel.eta_bandwidth,
            "eta_issue": kernel.eta_issue,
            "eta_peak": kernel.eta_peak,
            "instructions": kernel.instructions,
        }
        by_basis: dict[str, list[str]] = {}
        for name, number in numbers.items():
            if number is not None:
                by_basis.setdefault(number.basis, []).append(name)
        return "; ".join(f"{', '.join(found)} {basis}" for basis, found in by_basis.items())

    def seconds(
        self,
        fmt: Format,
        shape: tuple[int, int],
        tokens: int,
        *,
        weight_bytes: int | None = None,
        overhead: float | None = None,
    ) -> float:
        """Predicted seconds of one product of a packed matrix with ``tokens`` vectors.

        Args:
            fmt: The format of the matrix.
            shape: ``(rows, cols)``, rows = output features.
            tokens: Vectors at a time: the batch while decoding.
            weight_bytes: Bytes that are read of the matrix; by default what it stores.
            overhead: Seconds besides the work; by default ``launch``.
        """
        kernel = self._kernel(fmt)
        size = fmt.stored_bytes(shape) if weight_bytes is None else weight_bytes
        bits = fmt.bits if fmt.layout == "codes" else 0
        work = self.work(kernel, *np.array([[bits], [shape[0]], [shape[1]], [tokens], [size]]))
        return (self.overhead(fmt) if overhead is None else overhead) + float(work[0])

    def overhead(self, fmt: Format) -> float:
        """Seconds that a product of a matrix in a format takes besides its work."""
        return (self._kernel(fmt).launch or self.launch).value

    def one_launch(self, fmt: Format) -> bool:
        """Whether parts of a matrix in such formats, whatever their widths, are one product."""
        return self.family != "cpu" and fmt.layout == "codes"

    def _kernel(self, fmt: Format) -> Kernel:
        return self.kernels[self.default if fmt.layout == "codes" else DENSE]

    def work(
        self,
        kernel: Kernel,
        bits: NDArray[np.int64],
        rows: NDArray[np.int64],
        cols: NDArray[np.int64],
        tokens: NDArray[np.int64],
        weight_bytes: NDArray[Any],
    ) -> NDArray[np.float64]:
        """Seconds [P] of P products without ``t0``; see :meth:`Kernel.decode`."""
        weights = (rows * cols).astype(np.float64)
        moved = weight_bytes + ACTIVATION_BYTES * tokens * (rows + cols)
        instructions = kernel.decode(bits) * weights
        operations = 2 * np.maximum(tokens, kernel.tile_tokens) * weights
        parts = (
            moved / (kernel.eta_bandwidth.value * self.bandwidth.value),
            instructions / (kernel.eta_issue.value * self.issue_rate.value),
            operations / (kernel.eta_peak.value * self.peak.value),
        )
        seconds: NDArray[np.float64] = sum(part**NORM for part in parts) ** (1 / NORM)
        return seconds


def names() -> list[str]:
    """The devices there are files for."""
    return sorted(path.name.removesuffix(".toml") for path in FOLDER.glob("*.toml"))


def _toml(table: dict[str, Any], prefix: str = "") -> str:
    """A nested table as TOML: a number with its origin on one line, other tables as sections."""
    lines, sections = [], []
    for key, value in table.items():
        if isinstance(value, dict) and "basis" not in value:
            name = f"{prefix}{key}"
            heading = f"\n[{name}]\n" if name != "kernels" else ""
            sections.append(heading + _toml(value, f"{name}."))
        else:
            lines.append(f"{key} = {_toml_value(value)}\n")
    return "".join(lines + sections)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        first = sorted(value, key=lambda name: name != "value")  # and where it comes from last
        return "{ " + ", ".join(f"{k} = {_toml_value(value[k])}" for k in first) + " }"
    if isinstance(value, float):
        return f"{value:.6g}" if value < 1e6 else f"{value:.4e}".replace("e+", "e")
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # TOML's basic strings escape like JSON's
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)
