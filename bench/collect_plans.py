"""What is kept of the runs of train_plans.py: `collect` copies small files and makes the tables of all runs.

    RESULTS/plans.csv, uptrain.csv, speed.csv    a row a run, the lowest loss or the highest speed first
    RESULTS/text.json, tokenizer.json            the text they were trained on, and its tokenizer
    RESULTS/<run>/result.json                    the row of the run
    RESULTS/<run>/...                            config.yaml, the run's CSV files, the model's config.json and
                                                 fusion.safetensors, the fusion weights

`python -m fusedkv_ext plot` takes RESULTS/<run> for the run directory, whose checkpoint is too large to keep.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fusedkv_ext.checks import expect
from fusedkv_ext.config import read_json
from fusedkv_ext.data import TOKENIZER_NAME
from fusedkv_ext.model import CONFIG_NAME, WEIGHTS_NAME
from fusedkv_ext.plots import CONFIG, FUSION, METRICS, MODEL, PROJECTIONS, VALIDATION

RESULT, TEXT = "result.json", "text.json"
KEPT = (CONFIG, METRICS, VALIDATION, PROJECTIONS, "fusion.csv", "conversion.csv")


def table_of(name: str) -> str:
    """The table that a run belongs to."""
    return {"uptrain": "uptrain.csv", "speed": "speed.csv"}.get(name.partition("-")[0], "plans.csv")


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the finished runs in a folder, by the name of the run."""
    return {path.parent.name: read_json(path) for path in sorted(folder.glob(f"*/{RESULT}"))}


def collect(work: Path, out: Path) -> None:
    """Copy the finished runs of `work` into a folder that may hold earlier ones, and make its tables anew.

    Raises:
        ValueError: no run is finished, or the folder has another run of one of the names, or runs on other
            data or, in one table, with other hyperparameters; nothing is written then.
    """
    done, held = results(work), results(out)
    expect(len(done) > 0, "collect", str(work), "at least one finished run", "none")
    for name in sorted(done.keys() & held.keys()):
        same = done[name] == held[name]
        expect(same, "collect", str(out / name), f"none, or that of {work}", "another run of this name")
    if (out / TEXT).is_file():
        ours, theirs = (read_json(folder / TEXT)["train"]["sha256"] for folder in (work, out))
        expect(ours == theirs, "collect", str(out / TEXT), f"the tokens of {work}", "others")
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, row in (held | done).items():
        tables.setdefault(table_of(name), []).append(row)
    for table, rows in tables.items():
        kinds = {row["hyperparameters"]: row["name"] for row in rows}
        wanted = "runs with the same hyperparameters"
        expect(len(kinds) == 1, "collect", str(out / table), wanted, f"others in {sorted(kinds.values())}")

    for name in done.keys() - held.keys():
        _copy(work / name, out / name)
    shutil.copyfile(work / TEXT, out / TEXT)
    shutil.copyfile(work / "data" / TOKENIZER_NAME, out / TOKENIZER_NAME)
    for table, rows in tables.items():
        rows.sort(key=lambda row: row.get("validation_loss", -row["tokens_per_s"]))
        with (out / table).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _copy(run: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for name in KEPT if (run / MODEL).is_dir() else ():  # what was only timed has tables without rows
        if (run / name).is_file():
            shutil.copyfile(run / name, to / name)
    if (run / MODEL).is_dir():
        shutil.copyfile(run / MODEL / CONFIG_NAME, to / CONFIG_NAME)
        weights = load_file(run / MODEL / WEIGHTS_NAME)
        save_file({name: x for name, x in weights.items() if ".fusion." in name}, to / FUSION)
    shutil.copyfile(run / RESULT, to / RESULT)  # the last: without it the copy counts as none
