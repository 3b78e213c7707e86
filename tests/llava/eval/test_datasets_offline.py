"""Whether the data sets of tasks are on this machine."""

from __future__ import annotations

from pathlib import Path

from llava.eval.datasets_offline import find_absent


def test_hub_data_sets_count_as_there_when_either_cache_has_them(tmp_path: Path) -> None:
    hub, prepared = tmp_path / "hub", tmp_path / "datasets"
    snapshot = hub / "datasets--org--Downloaded" / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "test-0.parquet").write_text("")
    (hub / "datasets--org--CardOnly" / "snapshots" / "abc").mkdir(parents=True)
    (hub / "datasets--org--CardOnly" / "snapshots" / "abc" / "README.md").write_text("")
    arrow = prepared / "org___prepared" / "default" / "0.0.0"
    arrow.mkdir(parents=True)
    (arrow / "test.arrow").write_text("")
    configs = {name: {"dataset_path": f"org/{name}"} for name in ("Downloaded", "CardOnly", "Prepared", "Never")}
    assert find_absent(configs, hub, prepared) == {"CardOnly": "org/CardOnly", "Never": "org/Never"}


def test_local_files_are_looked_for_where_they_are(tmp_path: Path) -> None:
    there = tmp_path / "test.json"
    there.write_text("[]")
    configs = {
        "there": {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(there)}}},
        "gone": {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": [str(there), "gone.json"]}}},
        "folder": {"dataset_path": str(tmp_path), "dataset_kwargs": {"load_from_disk": True}},
        "no_data": {"dataset_path": None},
    }
    assert find_absent(configs, tmp_path, tmp_path) == {"gone": "gone.json"}
