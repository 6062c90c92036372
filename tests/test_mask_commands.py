"""The commands about masks: listing, comparing, combining, and where masks are looked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import NAME, write_masks
from commands import invoke_wide as invoke
from typer.testing import CliRunner

from lowmem_icl.cli.app import app
from lowmem_icl.cli.evaluate import read_masks
from lowmem_icl.errors import InputError
from lowmem_icl.masks.files import read_mask, write_mask
from lowmem_icl.masks.mask import Mask

DEMO_MASK = Path(__file__).parents[1] / "masks" / "demo" / "greedy-recall-16shot.json"


def test_mask_commands_print_names_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[v2] masks [b-c]"
    left, right = write_masks(folder)
    listed = invoke("masks", "list", folder)
    assert listed.stdout.count(NAME) == 3, listed.output
    assert invoke("masks", "show", left).stdout.count(NAME) == 2
    assert "[v2] masks [b-c]" in invoke("masks", "show", left).stdout
    (pair,) = json.loads(invoke("masks", "compare", left, right, "--json").stdout)
    assert pair == {
        "left": "left",
        "right": "right",
        "both": 1,
        "only_left": 1,
        "only_right": 1,
        "jaccard": 1 / 3,
    }
    assert "0.333" in invoke("masks", "compare", left, right).stdout


def test_evaluate_takes_the_masks_of_a_folder_and_of_a_run(tmp_path: Path) -> None:
    left, right = write_masks(tmp_path / "run" / "masks")
    (tmp_path / "run" / "run.json").write_text("{}")
    (left.parent / "schema.json").write_text("{}")
    for given in ([left.parent], [tmp_path / "run"], [left, right]):
        assert list(read_masks(given)) == ["left", "right"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no mask files in that folder"):
        read_masks([tmp_path / "empty"])


def test_masks_are_compared_and_listed_within_80_columns(tmp_path: Path) -> None:
    source = read_mask(DEMO_MASK)
    names = [f"gradient-ffns-{level}-present_participle-0shot" for level in (10, 20)]
    paths = [tmp_path / f"{name}.json" for name in names]
    for path, name in zip(paths, names, strict=True):
        write_mask(path, replace(source, name=name))
    for arguments in (["compare", *paths], ["compare", tmp_path], ["list", tmp_path]):
        told = CliRunner().invoke(app, ["masks", *map(str, arguments)], env={"COLUMNS": "80"}).stdout
        assert max(map(len, told.splitlines())) <= 80
        assert "…" not in told
    assert all(name in invoke("masks", "compare", *paths).stdout for name in names)


def test_a_runs_masks_are_listed_whole_by_number_without_those_that_remove_nothing(tmp_path: Path) -> None:
    source = read_mask(DEMO_MASK)
    names = [f"icl_effect-heads-90-recall-{shots}shot" for shots in (0, 4, 16)]
    for name in names:
        made = {"method": "icl_effect", "tasks": ["recall"], "shots": [int(name.split("-")[-1][:-4])]}
        write_mask(tmp_path / "masks" / f"{name}.json", replace(source, name=name, made=made))
    empty = replace(source, name="empty-recall-0shot", mask=Mask(), made={"method": "empty"})
    write_mask(tmp_path / "masks" / "empty-recall-0shot.json", empty)

    def told(*more: str, columns: int = 80) -> str:
        arguments = ["masks", "list", str(tmp_path), *more]
        return str(CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)}).stdout)

    for columns, headings in (
        (80, "name shots removed accuracy verdict"),
        (120, "name method task shots removed"),
    ):
        lines = told(columns=columns).splitlines()
        assert " ".join(lines[0].split()).startswith(headings)
        assert [line.split()[0] for line in lines if "icl_effect" in line] == names
        assert all("holds" in line for line in lines if "icl_effect" in line)
    assert lines[-1] == "1 mask that removes nothing is left out; --all lists it"
    assert "empty-recall-0shot" in told("--all")
    assert "left out" not in told("--all")
    narrow = told(columns=40).splitlines()
    assert "icl_effect-" in narrow[2].split()
    shown = invoke("masks", "show", tmp_path / "masks" / f"{names[0]}.json").stdout
    assert "tasks: recall\nshots: 0\nremoved: 28 of 32 heads, 3 of 4 FFNs\n" in shown
    assert "accuracy: 0.986 under the mask, 0.984 clean\nverdict: holds\n" in shown
    assert "None" not in (shown := invoke("masks", "show", write_masks(tmp_path / "more")[0]).stdout)
    assert "accuracy" not in shown


def test_of_many_pairs_those_most_alike_are_printed(tmp_path: Path) -> None:
    source = read_mask(DEMO_MASK)
    for number in range(12):
        mask = Mask(frozenset((0, head) for head in range(8) if head != number % 8))
        write_mask(tmp_path / f"m{number}.json", replace(source, name=f"m{number}", mask=mask))
    told = invoke("masks", "compare", tmp_path).stdout
    assert told.endswith("the 50 pairs most alike of 66; --json prints all\n")
    assert told.index("1.000") < told.index("0.750")
    assert len(json.loads(invoke("masks", "compare", tmp_path, "--json").stdout)) == 66


def test_masks_are_looked_for_in_a_run_where_there_is_no_such_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "masks is not a folder here; give a run's folder" in invoke("masks", "list").stderr


def test_masks_are_combined_into_files_that_can_be_read(tmp_path: Path) -> None:
    left, right = write_masks(tmp_path)
    for operation, heads, ffns in (("union", 2, 1), ("intersection", 1, 0), ("difference", 1, 0)):
        out = tmp_path / f"{operation}.json"
        told = invoke("masks", "combine", left, right, "--out", out, "--operation", operation)
        assert told.exit_code == 0, told.output
        mask = read_mask(out).mask
        assert (len(mask.heads), len(mask.ffns)) == (heads, ffns)
    for name in ("my mask.json", "[v2].json", "plain"):
        refused = invoke("masks", "combine", left, right, "--out", tmp_path / name)
        assert refused.exit_code == 2
        assert "choose another name" in refused.stderr
        assert not (tmp_path / name).exists()


def test_mask_commands_report_errors_as_all_commands_do(tmp_path: Path) -> None:
    bad = tmp_path / "[b].json"
    bad.write_text("{}")
    left, right = write_masks(tmp_path / "masks")
    other = tmp_path / "other.json"
    other.write_text(left.read_text().replace('"layers": 2', '"layers": 3'))
    for arguments in (
        ["show", bad], ["list", tmp_path], ["list", tmp_path / "[none]"], ["export", tmp_path / "none.json"],
        ["compare", left], ["combine", left, other, "--out", tmp_path / "new.json"],
        ["combine", left, right, "--out", other],
    ):  # fmt: skip
        result = invoke("masks", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("lowmem-icl: ")
        assert len(result.stderr.splitlines()) == 1
