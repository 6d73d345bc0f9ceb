"""JSON records: one way to write a file with a schema number, and to say what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .files import read_json_text, write_json


class Strict(BaseModel):
    """A part of a record: a key that this version does not know is an error, never dropped."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Record(Strict):
    """The content of a JSON file that is read back.

    A subclass says what it is and has a field ``schema_version`` with the alias ``schema``.
    Older files are brought to the newest schema by :meth:`upgraded` before they are checked.

    Attributes:
        KIND: What the file is, in errors: ``plan``.
        MAKE: How to get one where there is none, as a sentence.
        MEND: What to do about one that is damaged, as a sentence.
    """

    KIND: ClassVar[str]
    MAKE: ClassVar[str] = ""
    MEND: ClassVar[str] = ""

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The data of a file of an older schema as the newest one has it; others as they are."""
        return data

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read a record from its text.

        Args:
            text: JSON.
            where: The file, for the error.

        Raises:
            ValueError: If it is not JSON or breaks the schema; the first fault is named.
        """
        try:
            data = json.loads(text)
            return cls.model_validate(cls.upgraded(data) if isinstance(data, dict) else data)
        except (
            ValidationError,
            json.JSONDecodeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(
                f"{where} is not a valid {cls.KIND}: {_fault(error)}. {cls.MEND}".strip()
            ) from error

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a record from its file.

        Raises:
            ValueError: If the file is missing, is not JSON, or breaks the schema.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"No {cls.KIND} at {path}. {cls.MAKE}".strip())
        return cls.parse(read_json_text(path, cls.KIND), str(path))

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically, keys in declaration order."""
        write_json(path, self.model_dump(by_alias=True))


def first_fault(error: ValidationError) -> str:
    """``solver.seed: Field required``: where a record first breaks its schema, and how."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"]) or "the file"
    return f"{where}: {fault['msg']}"


def _fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return first_fault(error)
    if isinstance(error, json.JSONDecodeError):
        return f"the file: Invalid JSON: {error}"
    return f"the file: {type(error).__name__} {error}"  # while an older schema was converted
