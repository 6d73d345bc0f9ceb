"""`bitplan kernels devices`: the devices whose speed is known."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from ..console import out
from ..lazy import verb

app = verb()


@app.command()
def devices() -> None:
    """List the devices whose speed can be predicted, with their kernels and how sure that is."""
    from ...kernels.latency import DENSE, Device, names

    table = Table("--latency-device", "kernel", "memory", "16-bit peak", "its efficiency there")
    table.box = box.SIMPLE_HEAD
    for name in names():
        device = Device.load(name)
        kernels = [device.default, *sorted(set(device.kernels) - {device.default, DENSE})]
        for kernel in kernels:
            numbers = device.kernels[kernel]
            reached = numbers.eta_bandwidth
            why = f": {reached.source}" if reached.basis == "assumed" else " to published timings"
            table.add_row(
                name if kernel == device.default else f"{name}:{kernel}",
                escape(numbers.description),
                f"{device.bandwidth.value / 1e12:.3g} TB/s",
                f"{device.peak.value / 1e12:,.4g} T",
                escape(reached.basis + why),
            )
    out.print(table)
    out.print(
        "What the maker publishes is exact; what a launch takes in a running model is assumed "
        "everywhere. Matrices that are not quantized run on torch's own kernel. A file that "
        "`bitplan kernels bench --refit` wrote works like a name.",
        markup=False,
    )
