"""`python -m bench.gate`: what it makes of counts, recorded and new. Counting itself is `make gate`."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import gate
from bench.gate import Count, GateError, Record, compare

ROOT = Path(__file__).parent.parent


def count(instructions: int, work: int = 1000, unit: str = "FLOP", stores: int = 10) -> Count:
    return Count(instructions, stores, work, unit)


def record(version: str = "12.2.0", compiler: str = "gcc", **cases: Count) -> Record:
    return Record(gate.ISA, compiler, version, cases)


@pytest.fixture
def passes(monkeypatch, tmp_path, capsys):
    """Runs the gate on made-up counts; returns its exit status and what it printed."""

    def run(before: Record | str | None, now: Record, *arguments: str) -> tuple[int, str]:
        path = tmp_path / "gate.json"
        if isinstance(before, Record):
            gate.save(before, path)
        elif before is not None:
            path.write_text(before)
        monkeypatch.setattr(gate, "ROOT", tmp_path)
        monkeypatch.setattr(gate, "BUILD", tmp_path / "build")
        monkeypatch.setattr(gate, "RECORD", path)
        monkeypatch.setattr(gate, "measure", lambda: now)
        status = gate.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


@pytest.mark.parametrize(
    ("instructions", "status"), [(1000, 0), (1100, 0), (1101, 1), (2000, 1), (960, 0), (940, 0)], ids=str
)
def test_a_loss_over_a_tenth_fails(passes, instructions, status):
    got, said = passes(record(a=count(1000), b=count(50)), record(a=count(instructions), b=count(50)))
    assert got == status, said
    assert ("FAILED: 'a'" in said) == (status == 1)
    assert "'b'" not in said


@pytest.mark.parametrize(("stores", "status"), [(11, 0), (12, 1), (5, 0)], ids=str)
def test_stores_are_gated_too(passes, stores, status):
    got, said = passes(record(a=count(1000)), record(a=count(1000, stores=stores)))
    assert got == status, said
    assert ("FAILED: 'a' needs 20.0 % more stores than recorded" in said) == (status == 1)
    assert ("better: 'a' needs 50.0 % fewer stores" in said) == (stores == 5)


def test_one_loss_is_not_made_up_for_by_gains(passes):
    status, said = passes(record(a=count(1000), b=count(1000)), record(a=count(1200), b=count(100)))
    assert status == 1
    assert "'a' needs 20.0 % more" in said


def test_a_gain_asks_to_be_recorded(passes):
    status, said = passes(record(a=count(1000), b=count(1000)), record(a=count(900), b=count(960)))
    assert status == 0
    assert "better: 'a' needs 10.0 % fewer" in said
    assert "--update" in said
    assert "'b'" not in said


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"a": count(1)}, {"a": count(1), "b": count(1)}),
        ({"a": count(1), "b": count(1)}, {"a": count(1)}),
        ({"a": count(1), "b": count(1, work=7)}, {"a": count(1), "b": count(1, work=8)}),
        ({"a": count(1), "b": count(1)}, {"a": count(1), "b": count(1, unit="byte")}),
    ],
    ids=["not recorded", "no longer there", "other work", "other unit"],
)
def test_a_case_that_cannot_be_compared_fails(passes, before, now):
    status, said = passes(record(**before), record(**now))
    assert status == 1
    assert "FAILED: 'b'" in said
    assert "--update" in said


def test_cases_are_compared_by_name_in_the_order_of_the_program():
    rows = compare({"z": count(1), "c": count(2), "b": count(4)}, {"b": count(2), "a": count(1)})
    assert [row.case for row in rows] == ["b", "a", "c", "z"]
    assert [row.change_percent("instructions") for row in rows] == [-50, None, None, None]


def test_update_records_and_then_passes(passes, tmp_path):
    status, said = passes(record(a=count(1000)), record(a=count(3000), b=count(5, unit="byte")), "--update")
    assert status == 0
    assert "+200.00 %" in said
    assert gate.load(tmp_path / "gate.json") == record(a=count(3000), b=count(5, unit="byte"))
    assert [path.name for path in tmp_path.iterdir()] == ["gate.json"]


def test_update_replaces_a_file_that_cannot_be_read(passes, tmp_path):
    assert passes("not json", record(a=count(3)), "--update")[0] == 0
    assert gate.load(tmp_path / "gate.json") == record(a=count(3))


GOOD = asdict(record(a=count(1000)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        json.dumps(GOOD)[:-20],
        json.dumps({**GOOD, "cases": [1]}),
        json.dumps({**GOOD, "cases": {"a": {"instructions": 1}}}),
        json.dumps({**GOOD, "cases": {"a": {"instructions": "1", "stores": 1, "work": 1, "unit": "FLOP"}}}),
        json.dumps({**GOOD, "cases": {"a": {"instructions": 0, "stores": 1, "work": 1, "unit": "FLOP"}}}),
        json.dumps({**GOOD, "version": 12}),
        json.dumps({**GOOD, "isa": "sse2"}),
        json.dumps({**GOOD, "more": 1}),
    ],
)
def test_a_corrupt_record_is_a_clear_error(passes, content):
    status, said = passes(content, record(a=count(1000)))
    assert status == 2
    assert "does not hold recorded counts" in said
    assert "--update" in said


def test_no_record_is_a_clear_error(passes):
    status, said = passes(None, record(a=count(1000)))
    assert status == 2
    assert "does not exist" in said


def test_another_compiler_compares_and_says_so(passes):
    before = record(a=count(1000))
    same, said = passes(before, record(version="12.4.1", a=count(1200)))
    assert (same, "note:" in said) == (1, False)
    for other in (record(version="13.1.0", a=count(1200)), record(compiler="clang", version="12.0", a=count(1200))):
        status, said = passes(before, other)
        assert status == 1
        assert f"note: compiled by {other.compiler} {other.version}, but recorded with gcc 12.2.0" in said


@pytest.mark.parametrize(
    ("machine", "flags", "valgrind", "message"),
    [
        ("x86_64", {"avx2", "fma"}, None, "apt-get install valgrind"),
        ("x86_64", {"sse2"}, "/bin/valgrind", "AVX2"),
        ("aarch64", set(), "/bin/valgrind", "aarch64"),
    ],
)
def test_a_machine_that_cannot_count_is_an_error(machine, flags, valgrind, message):
    with pytest.raises(GateError, match=message):
        gate.check_machine(machine, flags, valgrind)
    gate.check_machine("x86_64", {"avx2", "fma", "sse2"}, "/bin/valgrind")


def test_a_command_that_fails_is_a_clear_error():
    with pytest.raises(GateError, match="no-such-compiler"):
        gate.run(["no-such-compiler", "-c"])
    with pytest.raises(GateError, match="exit status 3"):
        gate.run(["sh", "-c", "exit 3"])


def test_the_kernels_are_compiled_as_by_setup():
    setup = (ROOT / "setup.py").read_text()
    flags = re.findall(r'"(-[^"]*)"', setup)
    # -s strips the binary, and what is included chooses versions of symbols.
    about_code = {flag for flag in flags if not flag.startswith(("-W", "-DTORCH")) and flag not in ("-s", "-include")}
    assert about_code <= set(gate.FLAGS)
    assert set(gate.FLAGS) <= set(flags)


def test_the_committed_record_can_be_read():
    cases = gate.load(ROOT / "bench" / "gate.json").cases
    assert {count.unit for count in cases.values()} <= {"FLOP", "byte"}
