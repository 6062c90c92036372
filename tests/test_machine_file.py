"""Rates in a file: written, read with suspicion, and planned with."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import invoke

from lowmem_icl.errors import InputError
from lowmem_icl.model.store import Store
from lowmem_icl.planning.machine_file import MachineFile, read_machine

SMALL = ("--tasks", "recall", "--shots", "0", "--limit", "4", "--experiments", "evaluate,importance")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    told = invoke("measure", "--out", path, "--device", "cpu", "--memory", "3GB")
    assert told.exit_code == 0, told.output
    return path


def changed(source: Path, tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(json.loads(source.read_text()) | fields))
    return path


def test_a_plan_takes_rates_and_memory_from_the_file(machine: Path, tmp_path: Path) -> None:
    slow = changed(machine, tmp_path, disk_bytes_per_second=1.0, machine={"processor": "slow one"})
    plan = json.loads(invoke("plan", "--json", "--machine", slow, *SMALL).stdout)
    assert plan["memory"]["allowance_bytes"] == 3 * 10**9
    assert plan["rates"]["disk_bytes_per_second"] == 1.0
    evaluate = plan["stages"][0]
    assert evaluate["seconds"] == pytest.approx(evaluate["read_bytes"], rel=0.01), "a byte a second"
    given = json.loads(invoke("plan", "--json", "--machine", slow, "--memory", "2GB", *SMALL).stdout)
    assert given["memory"]["allowance_bytes"] == 2 * 10**9
    assert "measured on slow one" in invoke("plan", "--machine", slow, *SMALL).output


def test_rates_scale_with_the_weights_of_a_model(machine: Path, int8_store: Store) -> None:
    kept = read_machine(machine)
    rates = kept.rates_for(int8_store)
    attention, projection, ffn = int8_store.skeleton.weights_by_part
    assert rates.attention_seconds * kept.attention_products_per_second == pytest.approx(attention)
    assert rates.projection_seconds * kept.projection_products_per_second == pytest.approx(projection)
    assert rates.ffn_seconds * kept.ffn_products_per_second == pytest.approx(ffn)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ffn_products_per_second": 0}, "ffn_products_per_second"),
        ({"ffn_products_per_second": 1e308}, "ffn_products_per_second"),
        ({"call_seconds": 1e308}, "call_seconds"),
        ({"disk_bytes_per_second": float("nan")}, "disk_bytes_per_second"),
        ({"memory_bytes": "64GB"}, "memory_bytes"),
        ({"format": "lowmem-icl-machine/9"}, "format"),
        ({"weights": "int4"}, "weights"),
        ({"machine": [1]}, "machine"),
    ],
)
def test_odd_files_are_refused_with_the_field(
    fields: dict[str, Any], named: str, machine: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"--machine .*{named}: .*got .*lowmem-icl measure"):
        read_machine(changed(machine, tmp_path, **fields))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{" * 100_000, b"0" * (2 << 20)])
def test_files_that_are_no_machine_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(content)
    with pytest.raises(InputError, match="lowmem-icl measure"):
        read_machine(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_machine(tmp_path / "missing")


def test_rates_of_another_form_of_weights_are_refused(machine: Path, tmp_path: Path) -> None:
    told = invoke("plan", "--machine", changed(machine, tmp_path, weights="float32"), *SMALL)
    assert told.exit_code == 2
    assert "--weights int8" in told.output


def test_what_is_written_is_what_is_read(machine: Path) -> None:
    assert MachineFile.model_validate_json(machine.read_bytes()) == read_machine(machine)
