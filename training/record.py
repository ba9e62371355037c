"""What a calibration leaves in the bundle's report, for evaluation to draw."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from model.bundle import REPORT, Bundle
from model.files import write_atomically
from training.calibration import Calibrated
from training.data import DataError
from training.ladder import Thresholds

RECORD = "calibration.json"


class Record(BaseModel):
    """The curves of a calibration, as `calibration.json` holds them."""

    model_config = ConfigDict(frozen=True)

    weights_sha256: str
    path: tuple[Thresholds, ...]
    """The nested thresholds that were tested."""
    budgeted: tuple[Thresholds, ...]
    """Thresholds of the classical budgeted curve."""


def save_record(bundle: Bundle, result: Calibrated) -> None:
    """Write the record of a calibration."""
    record = Record(
        weights_sha256=result.policy.weights_sha256,
        path=tuple(result.path),
        budgeted=tuple(result.budgeted),
    )
    folder = bundle.path / REPORT
    folder.mkdir(exist_ok=True)
    write_atomically(folder / RECORD, record.model_dump_json(indent=1).encode() + b"\n")


def load_record(bundle: Bundle) -> Record | None:
    """Read it; None where calibration left none for these weights.

    Raises:
        DataError: it is malformed.
    """
    file = bundle.path / REPORT / RECORD
    try:
        record = Record.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{file} is malformed at {where}: {first['msg']}; calibrate the bundle again"
        ) from error
    return record if record.weights_sha256 == bundle.description.weights_sha256 else None
