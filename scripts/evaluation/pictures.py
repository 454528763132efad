"""The pictures that this repository's own tasks ask about, and their data sets in lmms_eval's forms."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ASSETS = Path(__file__).parents[1] / "assets"
DIGITS = ASSETS / "digits" / "test.parquet"  # scripts/model/digits.py wrote it
PLAIN, LETTERED = "digits_plain", "digits_lettered"
TASKS = Path(__file__).parent / "tasks"
OWN_TASKS = (PLAIN, LETTERED)  # they need no download
DIGIT_NAMES, LETTERS = "0123456789", "ABCDEFGHIJ"
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Picture:
    """A scanned digit: 64 x 64 pixels as PNG, and what it shows."""

    name: str
    png: bytes
    question: str
    answer: str

    @property
    def url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def pictures(count: int | None = None) -> list[Picture]:
    """The first `count` pictures of the test set, in its order."""
    rows = pq.read_table(DIGITS).slice(0, count).to_pylist()
    return [Picture(str(row["id"]), row["image"]["bytes"], row["question"], row["answer"]) for row in rows]


def write_data_sets(folder: Path) -> None:
    """Put the data of both own tasks where their yaml files look for it: in lmms_eval's current directory."""
    shutil.copy(DIGITS, folder / f"{PLAIN}.parquet")
    rows = [mmmu_row(number, picture) for number, picture in enumerate(pictures())]
    fields = [pa.field(name, PICTURE if name == "image_1" else pa.string()) for name in rows[0]]
    # lmms_eval's loader takes the column for a picture because the file says so.
    features = {
        name: {"_type": "Image"} if name == "image_1" else {"dtype": "string", "_type": "Value"}
        for name in rows[0]
    }
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{LETTERED}.parquet")


def mmmu_row(number: int, picture: Picture) -> dict[str, Any]:
    """A picture in the columns of MMMU: ten options, of which the letter is the answer."""
    return {
        "id": f"validation_Digits_{number}",
        "question": f"<image 1> {picture.question}",
        "options": str(list(DIGIT_NAMES)),
        "explanation": "",
        "image_1": {"bytes": picture.png, "path": None},
        "img_type": "['digit']",
        "answer": LETTERS[DIGIT_NAMES.index(picture.answer)],
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Digits",
    }
