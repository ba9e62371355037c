"""A run on disk, to go on from exactly."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.files import PARTIAL, put_in_place
from training.recipe import Recipe
from training.run import Run, TrainingError
from training.tensor_file import read_tensor_file, write_tensor_file

CHECKPOINT = "checkpoint.pt"
ALWAYS = {"net", "adapters", "optimizer", "epoch", "recipe"}
"""What even the oldest checkpoint holds."""

Origin = dict[str, Any]
"""What a checkpoint must agree with besides the recipe: the network, the data."""


def save_checkpoint(run: Run, recipe: Recipe, origin: Origin, folder: Path) -> None:
    """Replace the folder's checkpoint, so that a crash leaves the old or the new one whole."""
    state = {
        "net": run.net.state_dict(),
        "adapters": run.student.adapters.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "average": run.average and {"state": run.average.state, "updates": run.average.updates},
        "epoch": run.epoch,
        "step": run.step,
        "names": run.names,
        "sums": run.sums,
        "seconds": run.seconds,
        "history": run.history,
        "recipe": asdict(recipe),
        "origin": origin,
    }
    for left in folder.glob(f".{CHECKPOINT}.*{PARTIAL}"):  # by a run that was killed as it saved
        left.unlink()
    put_in_place(folder / CHECKPOINT, lambda partial: write_tensor_file(partial, state))


def check_unused(folder: Path) -> None:
    """Raise TrainingError where a new run would write over an earlier one."""
    if (folder / CHECKPOINT).exists():
        raise TrainingError(
            f"{folder} holds a run already; go on with --resume, or choose another --out"
        )


def resume(run: Run, recipe: Recipe, origin: Origin, folder: Path) -> None:
    """Go on from the folder's checkpoint, exactly where it was written.

    Raises:
        TrainingError: there is none, it is damaged, or it belongs to another run.
    """
    file = folder / CHECKPOINT
    try:
        state = read_tensor_file(file)
    except FileNotFoundError:
        raise TrainingError(f"there is no {file} to resume; leave --resume out") from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{file} cannot be read: {error}") from error
    if not _is_of_a_run(state):
        raise TrainingError(f"{file} was not written by a run; start again in another folder")
    # What an older checkpoint does not mention had no effect then, which is each default.
    _check_same(file, asdict(Recipe()) | state["recipe"], asdict(recipe))
    _check_same(file, origin | state.get("origin", {}), origin)
    try:
        _restore(run, state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise TrainingError(f"{file} is damaged: {first}; start again in another folder") from error


def _is_of_a_run(state: Any) -> bool:
    kinds = {"recipe": dict, "origin": dict, "epoch": int, "step": int, "history": list}
    return (
        isinstance(state, dict)
        and state.keys() >= ALWAYS
        and all(isinstance(state.get(name, kind()), kind) for name, kind in kinds.items())
    )


def _restore(run: Run, state: dict[str, Any]) -> None:
    run.net.load_state_dict(state["net"])
    run.student.adapters.load_state_dict(state["adapters"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state.get("scaler", {}) or run.scaler.state_dict())
    if run.average is not None:
        for name, value in state["average"]["state"].items():
            run.average.state[name].copy_(value)
        run.average.updates = state["average"]["updates"]
    run.epoch, run.step = state["epoch"], state.get("step", 0)
    run.names, run.history = state.get("names", []), state.get("history", [])
    sums, device = state.get("sums"), next(run.net.parameters()).device
    run.seconds = state.get("seconds", 0.0)
    run.sums = None if sums is None else sums.to(device)


def _check_same(file: Path, written: dict[str, Any], asked: dict[str, Any]) -> None:
    differ = [
        f"{name} {written.get(name)!r} and not {value!r}"
        for name, value in asked.items()
        if written.get(name) != value
    ]
    if differ:
        raise TrainingError(
            f"{file} was written with {', '.join(differ)}; resume with the same options, "
            "--storage among them, or start again in another folder"
        )
