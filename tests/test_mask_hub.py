"""Masks to the hub and from it, against a local stand-in."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import invoke, invoke_wide
from test_hub import Hub, served

from lowmem_icl.export.card import mask_card
from lowmem_icl.export.hub import is_mask_name
from lowmem_icl.masks.files import MaskFile, fill_of_table, read_mask, write_mask
from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans, means_file

REPOSITORY = "someone/demo-masks"
DEMO_MASKS = Path(__file__).parents[1] / "masks" / "demo"
NAMES = ("greedy-recall-16shot", "certified-category-4shot")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    with served(Hub(folder, REPOSITORY), tmp_path, monkeypatch) as serving:
        yield serving


def mean_mask() -> MaskFile:
    source = read_mask(DEMO_MASKS / f"{NAMES[0]}.json")
    means = UnitMeans(np.ones((4, 192), dtype=np.float32), np.ones((4, 192), dtype=np.float32))
    mask = Mask(frozenset({(1, 2)}), frozenset({3}), fill_of_table(means))
    return replace(source, name="mean-recall", mask=mask, means=means)


def folder_of_masks(folder: Path) -> list[MaskFile]:
    masks = [*(read_mask(DEMO_MASKS / f"{name}.json") for name in NAMES), mean_mask()]
    for mask_file in masks:
        write_mask(folder / f"{mask_file.name}.json", mask_file)
    return masks


def test_masks_go_to_the_hub_and_come_back_the_same(hub: Hub, tmp_path: Path) -> None:
    masks = folder_of_masks(tmp_path / "own")
    pushed = invoke_wide("masks", "push", tmp_path / "own", REPOSITORY)
    assert pushed.exit_code == 0, pushed.stderr
    assert pushed.stdout == f"{hub.endpoint}/{REPOSITORY}: 3 masks and a card\n"
    assert hub.posted[0] == "/api/repos/create"
    table = means_file(masks[2].means.digest) if masks[2].means else ""
    assert {path.name for path in hub.folder.iterdir()} == {
        "README.md", table, *(f"{mask_file.name}.json" for mask_file in masks),
    }  # fmt: skip
    pulled = invoke_wide("masks", "pull", REPOSITORY, tmp_path / "others")
    assert pulled.exit_code == 0, pulled.stderr
    names = sorted(mask_file.name for mask_file in masks)
    assert pulled.stdout.splitlines() == [str(tmp_path / "others" / f"{name}.json") for name in names]
    for mask_file in masks:
        found = read_mask(tmp_path / "others" / f"{mask_file.name}.json")
        assert found == mask_file
        assert (found.means is None) == (mask_file.means is None)
    again = invoke_wide("masks", "pull", REPOSITORY, tmp_path / "others")
    assert again.stdout == pulled.stdout
    assert "README.md" not in hub.fetched


def test_the_card_names_the_model_and_what_is_removed() -> None:
    masks = [read_mask(DEMO_MASKS / f"{name}.json") for name in NAMES]
    fetched = {"id": "facebook/opt-1.3b", "revision": "c" * 40}
    masks[0] = replace(masks[0], model=masks[0].model.model_copy(update=fetched))
    # A folder of somebody's.
    masks[1] = replace(masks[1], model=masks[1].model.model_copy(update={"id": "models/opt"}))
    _, front, text = mask_card(masks, REPOSITORY).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lowmem-icl",
        "tags": ["lowmem-icl", "pruning", "attention-heads", "interpretability"],
        "base_model": "facebook/opt-1.3b",
    }
    made = "| greedy-recall-16shot | facebook/opt-1.3b | greedy | recall | 16"
    assert f"{made} | 28 of 32 | 3 of 4 | 0.984 → 0.986 |" in text
    assert f"lowmem-icl masks pull {REPOSITORY}" in text


def test_texts_of_files_stay_cells_of_the_cards_table() -> None:
    mask_file = read_mask(DEMO_MASKS / f"{NAMES[0]}.json")
    hostile = "x | y\n---\n<script>`a`"
    hostile_file = replace(
        mask_file,
        model=mask_file.model.model_copy(update={"id": hostile}),
        made={"method": hostile, "tasks": [hostile]},
        scores={"before": {"acc": "1"}, "after": None, "verdict": hostile},
    )
    card = mask_card([hostile_file], REPOSITORY)
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") is None
    assert "<script>" not in card.replace("\\<", "")
    (row,) = [line for line in card.splitlines() if line.startswith("| greedy-recall")]
    assert row.replace("\\|", "").count("|") == 10


def test_only_masks_and_their_tables_are_fetched_and_what_is_no_mask_is_left_out(
    hub: Hub, tmp_path: Path
) -> None:
    masks = folder_of_masks(hub.folder)
    for name in ("config.json", "model.safetensors", "means-0123456789abcdef.safetensors", "run.py"):
        (hub.folder / name).write_text("{}")
    (hub.folder / "broken.json").write_text("{}")
    (hub.folder / "empty.json").write_text("")
    (hub.folder / "other-name.json").write_text((hub.folder / f"{NAMES[0]}.json").read_text())
    hub.listed = {"../up.json": b"{}", "sub/deep.json": b"{}", "/root.json": b"{}", ".hidden.json": b"{}"}
    pulled = invoke_wide("masks", "pull", REPOSITORY, tmp_path / "others")
    assert pulled.exit_code == 0, pulled.stderr
    assert len(pulled.stdout.splitlines()) == 3
    for told in ("broken.json: format:", "empty.json: empty", "other-name.json: is called greedy-recall"):
        assert told in pulled.stderr
    assert masks[2].means is not None
    table = means_file(masks[2].means.digest)
    assert set(hub.fetched) == {
        *(f"{mask_file.name}.json" for mask_file in masks), "broken.json", "other-name.json", table,
    }  # fmt: skip
    kept = {path.name for path in (tmp_path / "others").iterdir()}
    assert kept == {*(f"{mask_file.name}.json" for mask_file in masks), table}
    assert not (tmp_path / "up.json").exists()


def test_a_mask_without_its_own_table_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    mask_file = mean_mask()
    write_mask(hub.folder / f"{mask_file.name}.json", mask_file)
    (table,) = hub.folder.glob("means-*")
    content = table.read_bytes()
    table.write_bytes(content[:-4] + b"\0\0\0\0")
    refused = invoke_wide("masks", "pull", REPOSITORY, tmp_path / "others")
    assert refused.exit_code == 2
    assert "holds no mask files (means" in refused.stderr
    table.unlink()
    assert "cannot be read" in invoke_wide("masks", "pull", REPOSITORY, tmp_path / "others").stderr
    assert not (tmp_path / "others").exists()


def test_what_is_there_already_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    masks = folder_of_masks(hub.folder)
    other = replace(masks[0], mask=Mask(frozenset({(0, 0)})))
    write_mask(tmp_path / "others" / f"{NAMES[0]}.json", other)
    refused = invoke_wide("masks", "pull", REPOSITORY, tmp_path / "others")
    assert refused.exit_code == 2
    assert "exists and is another mask; give another folder" in refused.stderr
    assert [path.name for path in (tmp_path / "others").iterdir()] == [f"{NAMES[0]}.json"]


def test_a_hub_that_refuses_is_reported_in_one_line(hub: Hub, tmp_path: Path) -> None:
    mask = DEMO_MASKS / f"{NAMES[0]}.json"
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, told in (
        (("push", mask, "someone/else"), "someone/else could not be written"),
        (("push", mask, "not a name"), "not a name could not be written"),
        (("push", empty, REPOSITORY), "holds no mask files"),
        (("pull", "someone/else"), "someone/else could not be read"),
        (("pull", REPOSITORY, tmp_path / "others"), "holds no mask files"),
    ):
        refused = invoke("masks", *arguments)
        assert refused.exit_code == 2, refused.output
        assert told in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_names_that_may_be_masks() -> None:
    for name in ("greedy-recall-16shot.json", "a.b+c_d.json"):
        assert is_mask_name(name)
    for name in (
        "../a.json",
        "a/b.json",
        ".a.json",
        "a.JSON",
        "json",
        "config.json",
        "a.json\n",
        "schema.json",
    ):
        assert not is_mask_name(name)
