"""The page of machines is that of the records, and these name nobody."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.support.docs import ROOT


@pytest.fixture(scope="module")
def machines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_machines", ROOT / "docs" / "machines.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(machines: ModuleType) -> None:
    current = machines.PAGE.read_text(encoding="utf-8")
    assert current == machines.page(machines.records()), "run: python docs/machines.py"


def test_the_records_are_complete_and_name_no_place(machines: ModuleType) -> None:
    files = sorted(machines.RESULTS.iterdir())
    assert files and all(file.suffix == ".json" for file in files)
    for file, record in zip(files, machines.records(), strict=True):
        assert record["schema_version"] == 1 and record["ok"], file.name
        assert set(record["suite"]["train"]) == {"full", "lora", "qlora", "dora"}, file.name
        assert len(record["suite"]["eval"]) == 3 and record["suite"]["generation"], file.name
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', file.read_text(encoding="utf-8"))
        assert not [text for text in strings if text.startswith(("/", "~", "\\\\"))], file.name


def test_what_is_off_is_bold_and_a_line_that_a_machine_lacks_is_a_dash(
    machines: ModuleType,
) -> None:
    (record, *_) = machines.records()
    check = {**record["checks"][0], "measured": 0.5, "status": "off"}
    other = {**record, "ok": False, "checks": [check]}
    text = machines.page([record, other])
    assert "| self-test | ok | **off** |" in text
    assert re.search(rf"\| {re.escape(check['check'])} \| \S+ \| 0\.5 \*\*off\*\* \|", text)
    assert re.search(r"\| step, compiled = eager \| \S+ \| – \|", text)


def test_a_record_of_the_self_test_alone_has_no_speeds(machines: ModuleType) -> None:
    (record, *_) = machines.records()
    alone = {key: value for key, value in record.items() if key != "suite"}
    text = machines.page([record, alone])
    assert re.search(r"\| train, lora \| \S+ tokens/s, .* \| – \|", text)
    assert re.search(r"\| loss, full: = float32 on the CPU \| (\S+) \| \1 \|", text)
