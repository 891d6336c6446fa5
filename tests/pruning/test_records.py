"""Records of ``prune.json`` and ``report.json``: to JSON and back, and as text."""

from __future__ import annotations

import json
from dataclasses import replace

from mlx_slim.models.fidelity import Fidelity
from mlx_slim.pruning.records import (
    CalibrationRows,
    GroupChange,
    LayerChange,
    ModelRow,
    PrunedFidelity,
    PruneRecord,
    Recovery,
    RecoveryReport,
    TaskFigures,
    TextFigures,
    ValidationText,
)

NARROWER = GroupChange(before=128, after=64, importance_removed=0.25, removed="0-63")
RECORD = PruneRecord(
    schema_version=1,
    source="owner/name",
    revision=None,
    axis="width",
    method="taylor",
    options={"ratio": 0.5},
    calibration=CalibrationRows("notes.txt", 4, 32),
    score="taylor",
    layers=[
        LayerChange(0, {"mlp": NARROWER}),
        LayerChange(1, {"heads": replace(NARROWER, after=128)}),
    ],
    parameters_before=1000,
    parameters_after=750,
    bytes_before=2000,
    bytes_after=1500,
    stock_mlx_lm_reads_it=True,
    fidelity=PrunedFidelity(Fidelity(0.1, 0.9, 1.0, 1.1, 64), 2.7, 3.0),
    notes=["a note"],
    provenance={"mlx": "0"},
    seconds=2.0,
    peak_memory_bytes=10**6,
)


def test_a_prune_record_is_read_back() -> None:
    values = json.loads(json.dumps(RECORD.as_json()))
    assert PruneRecord.from_json(values) == RECORD
    assert values["layers"][0] == {
        "layer": 0,
        "mlp": {"before": 128, "after": 64, "importance_removed": 0.25, "removed": "0-63"},
    }
    assert values["fidelity"]["kl"] == 0.1 and values["fidelity"]["perplexity_after"] == 3.0
    bare = replace(RECORD, calibration=None, fidelity=None)
    assert PruneRecord.from_json(json.loads(json.dumps(bare.as_json()))) == bare


def test_channels_of_the_residual_stream_are_one_entry_of_all_layers() -> None:
    channels = GroupChange(before=576, after=512, importance_removed=0.05, removed="3,9-71")
    record = replace(RECORD, hidden=channels, layers=[LayerChange(0), LayerChange(1)])
    values = json.loads(json.dumps(record.as_json()))
    assert PruneRecord.from_json(values) == record
    assert values["hidden"]["removed"] == "3,9-71" and values["layers"][1] == {"layer": 1}
    assert record.lines()[0] == "all layers 576 -> 512 channels (5.0% of importance)"
    assert not any(line.startswith("layer ") for line in record.lines())
    del values["hidden"]  # as earlier versions wrote it
    assert PruneRecord.from_json(values).hidden is None


def test_removed_layers_are_read_back_without_what_a_method_does_not_give() -> None:
    layers = [
        LayerChange(0, removed=False),
        LayerChange(1, removed=True, score=0.5),
        LayerChange(2, removed=True, score=0.7, step=1, loss_after_step=2.0),
    ]
    for layer in layers:
        assert LayerChange.from_json(layer.as_json()) == layer
    assert layers[0].as_json() == {"layer": 0, "removed": False}
    assert layers[0].line("nats") is None
    assert (layers[1].line("nats") or "").split() == ["layer", "1", "removed", "nats", "0.5"]


def test_the_summary_has_a_line_a_fact() -> None:
    lines = RECORD.lines()
    assert lines[0] == "layer   0  128 -> 64 neurons (25.0% of importance)"
    assert lines[1] == "layer   1  unchanged"
    assert "parameters 1,000 -> 750 (25.0% fewer)" in lines
    assert any("perplexity 2.70 -> 3.00, KL 0.1000 nats" in line for line in lines)
    assert "note       a note" in lines


def test_a_recovery_report_is_read_back() -> None:
    figures = TaskFigures(4, {"acc": 0.5}, 0.25, {"acc": Recovery(100.0, None)})
    rows = [
        ModelRow("original", 10, 20, 0, {"t": figures}, TextFigures(2.0, 0.0, 1.0)),
        ModelRow("pruned", 5, 10, 0, {"t": figures}),
    ]
    report = RecoveryReport(1, "m", {"axis": "width"}, None, ValidationText("x", 8), 3, rows, {})
    values = json.loads(json.dumps(report.as_json()))
    assert RecoveryReport.from_json(values) == report
    assert values["held_out"] == {"text": "x", "tokens": 8}
    assert values["rows"][0]["perplexity"] == 2.0 and "perplexity" not in values["rows"][1]
