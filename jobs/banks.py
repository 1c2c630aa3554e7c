"""What `ditflow bank` does: banks listed, shown, checked and copied.

`ditflow.banks.bank` and all that needs torch is imported where it is used: listing thousands of banks is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.catalogue import Catalogue, Contents, chosen_where
from pipeline.conditions import rows_sorted, rows_where
from pipeline.store import Store, read_uri

SHOWN = ("id", "bytes", "model", "grid", "mean_displacement", "direction", "loss_first", "loss_final", "tags", "prompt")
"""Columns of the catalogue that people see; machines get all."""

Say = Callable[[str], Any]


def listed(
    uri: str, options: dict[str, Any], where: str | None, sort: str | None, limit: int | None, say: Say
) -> list[dict[str, Any]]:
    """Return the chosen banks of a folder or of a job's output, with their URIs; `say` what else there is to know."""
    catalogue = Catalogue.at(uri, options)
    contents = catalogue.refresh()
    _tell(contents, say)
    table = contents.table if where is None else rows_where(contents.table, where, "--where")
    table = table if sort is None else rows_sorted(table, sort, "--sort")
    say(f"{table.num_rows} of {contents.table.num_rows} banks")
    return [{**row, "uri": catalogue.store.uri_of(row["key"])} for row in table.slice(0, limit).to_pylist()]


def _tell(contents: Contents, say: Say) -> None:
    """Say what a catalogue leaves out, and whether it could be kept."""
    for message in contents.refused.values():
        say(f"left out: {message}")
    if contents.unwritten is not None:
        say(f"the catalogue was read from the banks, and is not kept for the next time: {contents.unwritten}")


def shown(uri: str, options: dict[str, Any], plot: Path | None) -> dict[str, Any]:
    """Return all that a bank says of itself, and draw the flow of its reference."""
    from dataclasses import asdict

    from ditflow.banks.bank import MotionBank

    data = read_uri(uri, options)
    bank = MotionBank.from_bytes(data, uri)
    if plot is not None:
        _draw(bank, uri, plot)
    tensors = {part: values.nbytes for part, values in bank.parts.items()}
    kept = {name: tensor.nbytes for name in ("latents", "flow") if (tensor := getattr(bank, name)) is not None}
    return {**asdict(bank.header), "bytes": len(data), "tensor_bytes": tensors | kept}


def _draw(bank: Any, uri: str, plot: Path) -> None:
    """Draw a bank's flow; ValueError for one without."""
    from ditflow.media.plot import plot_consecutive_flow

    header, motion = bank.header, bank.header.motion
    if bank.flow is None or motion is None:
        raise ValueError(f"--plot: {uri} has no flow: it was learned by {header.method.get('name')}, which keeps none")
    # A bank that no job made may not know its size: then a patch is drawn as 16 pixels.
    _, height, width = header.provenance.get("size", (1, 16 * header.grid[1], 16 * header.grid[2]))
    way = "no direction" if motion.direction is None else f"{motion.direction:.0f}° ({motion.concentration:.2f})"
    facts = f"mean {motion.mean_displacement:.2f} patches a frame, {motion.moving:.0%} move, {way}"
    plot_consecutive_flow(bank.flow.numpy(), header.grid, (height, width), plot, title=f"{facts}: {Path(uri).stem}")


def exported(uri: str, target: str, options: dict[str, Any], where: str | None, say: Say) -> int:
    """Copy the chosen banks of a folder or of a job's output to another folder; return how many."""
    from pipeline.bank_files import copy_banks

    catalogue = Catalogue.at(uri, options)
    contents = catalogue.read()
    _tell(contents, say)
    rows = contents.table if where is None else chosen_where(contents, where, "--where")
    return len(list(copy_banks(catalogue, rows, Store(target, options))))
