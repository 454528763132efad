"""Write the digits data set as parquet: scikit-learn's 1797 scanned digits, as questions.

    .venv/bin/python -m scripts.environment.install train
    PYTHONPATH=.venv/beside/train .venv/bin/python scripts/model/digits.py --out data/digits

Columns: id (int32, index in scikit-learn's data set), image (64 x 64 RGB PNG), question, answer.
The split is fixed: the same 500 pictures are the test set every time.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

IMAGE_SIDE = 64  # pixels; the scans have 8
BRIGHTEST = 16  # the scans' gray values go from 0 to 16
TEST_PICTURES = 500
SPLIT_SEED = 0
QUESTION = "which digit is shown in the image?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="output directory")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    from sklearn.datasets import load_digits  # in a part of its own, see requirements/train.in

    scans = load_digits()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(scans.images))
    for name, indices in (("test", order[:TEST_PICTURES]), ("train", order[TEST_PICTURES:])):
        path = out / f"{name}.parquet"
        to_dataset(scans.images, scans.target, indices).to_parquet(path)
        print(f"{path}: {len(indices)} pictures, {path.stat().st_size} bytes")


def to_dataset(
    images: np.ndarray, targets: np.ndarray, indices: Sequence[int] | np.ndarray
) -> datasets.Dataset:
    """The rows of one split; `images` is [N, 8, 8] with values 0..16, `targets` is [N]."""
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    columns = {
        "id": [int(index) for index in indices],
        "image": [{"bytes": to_png(images[index]), "path": None} for index in indices],
        "question": [QUESTION] * len(indices),
        "answer": [str(targets[index]) for index in indices],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def to_png(scan: np.ndarray) -> bytes:
    """Encode an 8 x 8 scan as a 64 x 64 RGB PNG, each scanned pixel a block of 8 x 8."""
    gray = (scan * 255 / BRIGHTEST).round().astype(np.uint8)
    image = Image.fromarray(gray).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
