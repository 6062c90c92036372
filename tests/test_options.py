"""Every option once: what it takes, what is said of it, and one way to check it wherever it was given."""

from pathlib import Path

import pytest

from lowmem_icl.errors import InputError
from lowmem_icl.options import (
    FLAGS,
    Group,
    RunOptions,
    default_text,
    environment_options,
    flag_name,
    form_of,
    run_options,
    shell_command,
    variable_name,
)
from lowmem_icl.options.defaults import PRESETS
from lowmem_icl.statistics.bands import LEAST_DRAWS

BAD = {
    "limit": ("0", "a whole number of at least 1"),
    "train_limit": ("many", "a whole number of at least 1"),
    "shots": ("0,-1", "a comma-separated list without repeats, each item a whole number of at least 0"),
    "weights": ("int4", "one of int8, nf4, bfloat16, float32"),
    "tolerance": ("2", "a number above 0 and below 1"),
    "memory": ("lots", "a size such as 6GB or 500MiB"),
    "device_memory": ("-1GB", "a size such as 6GB or 500MiB"),
    "hours": ("nan", "a number above 0 and at most 10000"),
    "experiments": ("guess", "each item one of evaluate, importance"),
    "curves": ("heads,heads", "a comma-separated list without repeats"),
    "screen": ("gradient", "expected attribution, got 'gradient'"),
    "device": ("tpu", "auto, cpu, cuda or cuda:N"),
    "tasks": ("", "a comma-separated list of tasks, none twice"),
    "out": ("", "a path"),
    "model": ("", "a folder, a file or a model's id on the hub"),
    "seed": ("1.5", "a whole number of at least 0"),
}


def refusal(flags: dict[str, object], config: Path | None = None) -> str:
    with pytest.raises(InputError) as raised:
        run_options(flags, config)
    return str(raised.value)


def test_every_option_says_what_it_is_and_groups_stand_together() -> None:
    assert list(FLAGS) == list(RunOptions.model_fields)
    for name, flag in FLAGS.items():
        assert flag.help.endswith("."), name
        assert default_text(name) or RunOptions.model_fields[name].default is False, name
        assert form_of(name).expected, name
    groups = [flag.group for flag in FLAGS.values()]
    assert groups == sorted(groups, key=list(Group).index)


def test_defaults_are_read_from_the_fields() -> None:
    assert default_text("weights") == "int8"
    assert default_text("curves") == "heads,ffns,random"
    assert default_text("tolerance") == "0.01"
    assert default_text("rescore") == ""
    assert form_of("weights").choices == ("int8", "nf4", "bfloat16", "float32")
    assert form_of("experiments").choices[-1] == "icl-heads"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_in_the_same_words_on_the_command_line_and_in_a_file(
    name: str, tmp_path: Path
) -> None:
    value, expected = BAD[name]
    told = refusal({name: value})
    assert told.startswith(f"{flag_name(name)}: expected ")
    assert expected in told
    got = {"shots": "-1"}.get(name, value)
    remedy = "did you mean 'nf4'?" if name == "weights" else "correct it or leave it out"
    assert f"got {got!r}; {remedy}" in told
    assert name == "weights" or f"(default: {default_text(name)})" in told
    config = tmp_path / "run.toml"
    config.write_text(f"{name.replace('_', '-')} = '{value}'\n")
    assert refusal({}, config) == told.replace(":", f" in {config}:", 1)


def test_options_that_do_not_go_together_are_refused_by_their_flags() -> None:
    assert refusal({"exact": "5"}).startswith("--exact: expected with --screen attribution")
    assert refusal({"screen": "attribution", "experiments": "ablate"}).startswith("--screen: ")
    assert refusal({"rescore": True, "experiments": "evaluate"}).startswith("--rescore: ")
    assert refusal({"label_drops": True, "experiments": "evaluate"}).startswith("--label-drops: ")


def test_text_and_toml_values_are_the_same_options(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'tasks = ["recall", "a,b"]\nshots = [4, 0]\ntrain-limit = 8\n'
        'memory = "2GB"\nbos = false\nout = "~/run"\n'
    )
    options = run_options({"limit": "16", "curves": "", "tolerance": "0.5"}, config)
    assert options.tasks == ("recall", "a,b")
    assert options.resolved_shots == (0, 4)
    assert (options.limit, options.train_limit, options.memory) == (16, 8, 2 * 10**9)
    assert (options.curves, options.tolerance, options.bos) == ((), 0.5, False)
    assert options.out == Path.home() / "run"
    assert run_options({"shots": "1"}, config).resolved_shots == (1,)


def test_a_file_serves_commands_that_take_fewer_options_but_holds_no_others(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('limit = 8\nrescore = true\nscreen = "attribution"\n')
    options = run_options({"experiments": ("evaluate",)}, config, known=("limit", "experiments"))
    assert (options.limit, options.rescore, options.screen) == (8, False, None)
    config.write_text("trian-limit = 8\n")
    assert refusal({}, config).endswith(
        ": 'trian-limit' is not an option of a run; did you mean 'train-limit'?"
    )
    config.write_text("limit = \n")
    assert "cannot be read as TOML" in refusal({}, config)
    assert "none.toml: cannot be read (No such file or directory)" in refusal({}, tmp_path / "none.toml")


def test_the_digest_is_of_what_results_depend_on() -> None:
    digest = RunOptions().digest
    for name in ("out", "masks_dir", "store_dir", "hours", "memory", "device_memory", "device"):
        value = {"hours": 1, "memory": 1, "device_memory": 1, "device": "cpu"}.get(name, "x")
        assert RunOptions.model_validate({name: value}).digest == digest, name
    changed = [{"seed": 1}, {"limit": 5}, {"tolerance": 0.5}, {"device": "cpu", "bos": True}, {"shots": (0,)}]
    digests = {RunOptions.model_validate(change).digest for change in changed}
    assert len(digests | {digest}) == len(changed) + 1
    assert RunOptions(shots=(16, 4, 0), train_limit=32).digest == digest


def test_attribution_patching_goes_back_through_the_layers() -> None:
    assert RunOptions(experiments=("patch",)).takes_gradients
    assert not RunOptions(experiments=("icl-heads",)).takes_gradients


def test_limits_are_resolved_in_turn() -> None:
    assert RunOptions().resolved_importance_limit == RunOptions().resolved_train_limit == 32
    options = RunOptions(limit=7)
    assert (options.resolved_train_limit, options.resolved_importance_limit) == (7, 7)
    assert (options.resolved_curve_limit, RunOptions().resolved_curve_limit) == (7, 64)
    assert RunOptions(model="facebook/opt-125m").resolved_shots == (0, 1, 5)
    assert RunOptions().resolved_exact == 500


def test_what_is_given_stands_before_a_preset() -> None:
    night = RunOptions(preset="night")
    assert (night.demonstrations, night.search, night.exact) == ("shared", "nested", 28)
    assert night.curves == RunOptions().curves == ("heads", "ffns", "random")
    assert night.random_draws >= LEAST_DRAWS, "fewer have no band"
    given = RunOptions(preset="night", exact=100, certify_limit=5)
    assert (given.exact, given.certify_limit, given.demonstrations) == (100, 5, "shared")


def test_a_preset_is_the_options_that_it_sets() -> None:
    spelled_out = RunOptions.model_validate(PRESETS["night"])
    assert spelled_out.digest == RunOptions(preset="night").digest
    assert RunOptions().digest != spelled_out.digest
    with pytest.raises(InputError, match="--preset: expected night, got 'day'"):
        run_options({"preset": "day"})


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("experiments", "evaluate,abalte", "got 'abalte'; did you mean 'ablate'?"),
        ("device", "gpu", "got 'gpu'; did you mean 'cuda'?"),
        ("weights", "bf16", "did you mean 'bfloat16'?"),
        ("memory", "6", "a unit is missing: did you mean 6GB?"),
        ("shots", "0,a", "got 'a'; correct it"),
    ],
)
def test_a_bad_value_names_what_was_probably_meant(name: str, value: str, hint: str) -> None:
    assert hint in refusal({name: value})


def test_sizes_in_a_file_need_a_unit_too_unless_they_are_bytes(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("memory = 6\n")
    assert refusal({}, config).startswith(f"--memory in {config}: expected a size")
    assert "a unit is missing: did you mean 6GB?" in refusal({}, config)
    config.write_text("memory = 6_000_000_000\n")
    assert run_options({}, config).memory == 6 * 10**9


def test_flags_stand_before_the_environment_and_that_before_a_file(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("limit = 1\ntrain-limit = 1\nseed = 1\n")
    environment = environment_options({"LOWMEM_ICL_LIMIT": "2", "LOWMEM_ICL_SEED": "2", "LOWMEM_ICL_BOS": ""})
    options = run_options({"limit": "3"}, config, environment)
    assert (options.limit, options.seed, options.train_limit, options.bos) == (3, 2, 1, None)
    assert options.identity_values == RunOptions(limit=3, seed=2, train_limit=1).identity_values
    with pytest.raises(InputError, match=r"^LOWMEM_ICL_LIMIT: expected a whole number"):
        run_options({}, config, {"limit": "x"})
    assert run_options({}, None, {"limit": "x"}, known=("seed",)).limit is None


def test_every_option_has_a_variable_and_a_mistyped_one_is_refused() -> None:
    values = environment_options({variable_name(name): "x" for name in FLAGS})
    assert values == dict.fromkeys(FLAGS, "x")
    with pytest.raises(InputError, match=r"LOWMEM_ICL_LIMTI: .*did you mean 'LOWMEM_ICL_LIMIT'"):
        environment_options({"LOWMEM_ICL_LIMTI": "3"})
    assert environment_options({"LOWMEM_ICL_SHARED": "/somewhere", "LIMIT": "3"}) == {}


def test_a_command_is_told_with_the_variables_that_give_it_options() -> None:
    told = shell_command(["lowmem-icl", "run"], {"LOWMEM_ICL_OUT": "my runs", "HOME": "/root"})
    assert told == "LOWMEM_ICL_OUT='my runs' lowmem-icl run"
