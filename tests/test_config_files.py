"""Options in files: TOML and YAML say the same, mean nothing else, and are refused in a line where wrong."""

import contextlib
import json
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem_icl.errors import InputError
from lowmem_icl.options import ALIASES, FLAGS, form_of, read_config, run_options

ANY_FOLDER = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        run_options({}, path)
    told = str(raised.value)
    assert len(told) < 600
    assert "\n" not in told
    return told


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    toml = written(
        tmp_path, "a.toml", 'tasks = ["recall", "a,b"]\nshots = [4, 0]\ntrain-limit = 8\nlimit = 0.25\n'
        'memory = "2GB"\nbos = false\nout = "~/run"\ntolerance = 0.5\ncurves = []\n'
    )  # fmt: skip
    texts = (
        "tasks:\n  - recall\n  - 'a,b'\nshots: [4, 0]\ntrain-limit: 8\nlimit: 0.25\nmemory: 2GB\n"
        "bos: no\nout: ~/run\ntolerance: .5\ncurves: []\n",
        "---\n# lm-eval's names\ntasks: [recall, 'a,b']\nnum_fewshot: [4, 0]\ntrain_limit: '8'\n"
        "limit: 25e-2\nmemory: 2000MB\nbos: false\noutput_path: ~/run\ntolerance: 0.5\ncurves: ''\n"
        "seed: null\nhours: ~\nrevision:\n",
    )
    for number, text in enumerate(texts):
        for suffix in ("yaml", "yml", "YAML"):
            path = written(tmp_path, f"{number}.{suffix}", text)
            assert run_options({}, path) == run_options({}, toml)
    assert run_options({}, written(tmp_path, "none.yaml", "")) == run_options({})
    assert run_options({}, written(tmp_path, "note.yaml", "# nothing\n---\n")) == run_options({})


def test_one_number_does_for_a_list_of_one(tmp_path: Path) -> None:
    for name, text in (("a.yaml", "num_fewshot: 5\n"), ("a.toml", "num_fewshot = 5\n")):
        assert run_options({}, written(tmp_path, name, text)).shots == (5,)


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        # What YAML 1.1 takes for a truth value, a number to the base of 60, 8 or 16, a date or nothing.
        ("tasks: [no, on, 1:30, ~x, 2001-01-01]", "tasks", ("no", "on", "1:30", "~x", "2001-01-01")),
        ("model: no", "model", "no"),
        ("model: 010", "model", "010"),
        ("model: 1e3", "model", "1e3"),
        ("revision: 'null'", "revision", "null"),
        ("seed: 010", "seed", 10),
    ],
)
def test_yaml_values_are_the_texts_that_stand_there(
    text: str, option: str, value: object, tmp_path: Path
) -> None:
    assert getattr(run_options({}, written(tmp_path, "a.yaml", text)), option) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hours: 1:30", "expected a number above 0 and at most 10000, got '1:30'"),
        ("limit: no", "expected a whole number of at least 1, or a fraction such as 0.1, got 'no'"),
        ("limit: true", "got 'true'"),
        ("shots: [0, many]", "got 'many'"),
        ("- limit", "line 1: expected options, a line for each such as `limit: 16`"),
        ("limit", "line 1: expected options, a line for each"),
        ("limit: 1\nlimit: 2", "'limit' give one option twice"),
        ("train-limit: 1\ntrain_limit: 2", "'train-limit' and 'train_limit' give one option twice"),
        ("shots: 1\nnum_fewshot: 2", "'shots' and 'num_fewshot' give one option twice"),
        ("limit: {a: 1}", "line 1: expected a value after 'limit', or a list of values"),
        ("tasks: [[a]]", "line 1: expected values alone in the list after 'tasks'"),
        ("tasks: &x [a]\n", "line 1: expected a value after 'tasks'"),
        ("seed: &x 1\nlimit: *x\n", "line 1: expected a value after 'seed'"),
        ("model: !!python/object/apply:os.getcwd []", "line 1: expected a value after 'model'"),
        ("? [a]\n: 1", "line 1: expected the name of an option"),
        ("<<: {limit: 1}", "line 1: expected a value after '<<'"),
        ("limit: 1\n---\nlimit: 2", "line 2: expected one document in the file"),
        ("seed: 1\nlimit: [1", "line 2: "),
        ("limit: '\x07'", "special characters are not allowed"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("trian-limit: 8", "'trian-limit' is not an option of a run; did you mean 'train-limit'?"),
        ("model_args: {pretrained: x}", "line 1: expected a value after 'model_args'"),
        ("model_args: pretrained=x", "'model_args' is not an option of a run; give what lm-eval has as"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_yaml_is_said_with_what_was_expected(text: str, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.yaml", text)
    assert told in refusal(path)
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("limit = true", "expected a whole number of at least 1, or a fraction such as 0.1, got 'true'"),
        ("limit = 1.0", "got 1.0"),
        ("tolerance = true", "expected a number above 0 and below 1, got 'true'"),
        ("memory = true", "expected a size such as 6GB or 500MiB, got 'true'"),
        ("train-limit = 1\ntrain_limit = 2", "'train-limit' and 'train_limit' give one option twice"),
        ("limit = 1979-05-27", "got datetime.date(1979, 5, 27)"),
        ("[limit]\na = 1", "got {'a': 1}"),
    ],
)
def test_what_is_wrong_in_toml_is_said_with_what_was_expected(text: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(written(tmp_path, "a.toml", text))


DIGITS = "9" * 5000
DEEP = 10_000


@pytest.mark.parametrize("name", ["a.toml", "a.yaml"])
def test_files_made_to_break_readers_are_refused_in_a_line(name: str, tmp_path: Path) -> None:
    sign = "=" if name == "a.toml" else ":"
    cases = {
        f"limit {sign} {DIGITS}": ("digits", "expected a whole number"),
        f"model {sign} {'[' * DEEP}{']' * DEEP}": ("nested too deep", "expected values alone"),
        f"model {sign} {'{a' * DEEP}": ("cannot be read as", "expected a value"),
        f"{'x' * 100_000} {sign} 1": ("x is not an option", "cannot be read as", "x' is not an option"),
        f'model {sign} "{"y" * 100_000}"\nlimit {sign} 0': ("expected a whole number",),
        f'out {sign} "~nosuchuser/x"': ("expected a path",),
        f'out {sign} ""': ("expected a path",),
    }
    for text, expected in cases.items():
        told = refusal(written(tmp_path, name, text))
        assert any(each in told for each in expected), told
    bytes_of = f'model {sign} "caf\xe9"'.encode("latin-1")
    assert "'utf-8' codec can't decode" in refusal(written(tmp_path, name, bytes_of))
    marked = written(tmp_path, name, b"\xef\xbb\xbf" + f"limit {sign} 3\r\n".encode())
    assert run_options({}, marked).limit == 3
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


def test_half_a_character_is_no_path(tmp_path: Path) -> None:
    assert "expected a path" in refusal(written(tmp_path, "a.yaml", 'out: "\\ud83d"\n'))


ANY_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=60)
YAML_TEXT = st.lists(
    st.one_of(
        st.sampled_from(["limit", "tasks", "- ", ": ", "\n", "  ", "[", "]", "{", "}", "&a ", "*a", "!t "]),
        st.sampled_from(["'", '"', "# ", "---\n", "no", "1:30", "? ", "%YAML 1.1\n", ">|", ",", "\t", "<<"]),
        st.text(string.printable, max_size=4),
    ),
    max_size=25,
).map("".join)  # fmt: skip


@ANY_FOLDER
@given(text=st.one_of(ANY_TEXT, YAML_TEXT))
def test_whatever_stands_in_a_file_is_read_or_refused(text: str, tmp_path: Path) -> None:
    for name in ("a.yaml", "a.toml"):
        path = written(tmp_path, name, text)
        with contextlib.suppress(InputError):
            assert set(read_config(path)) <= set(FLAGS)


SIMPLE = st.text(string.ascii_letters + string.digits + " :#-'\"[]{},&*!|>%@`~\\é日", max_size=12)


@ANY_FOLDER
@given(values=st.dictionaries(st.sampled_from([*FLAGS, *ALIASES]), st.one_of(SIMPLE, st.lists(SIMPLE))))
def test_what_other_writers_write_is_read_back_as_texts(values: dict[str, Any], tmp_path: Path) -> None:
    if len({ALIASES.get(name, name) for name in values}) < len(values):
        return
    wanted = {ALIASES.get(name, name): value for name, value in values.items()}
    # JSON is YAML, and PyYAML quotes what its own reader would resolve.
    for text in (json.dumps(values), yaml.safe_dump(values, allow_unicode=True)):
        assert read_config(written(tmp_path, "a.yaml", text)) == wanted


@ANY_FOLDER
@given(
    name=st.sampled_from([name for name in FLAGS if form_of(name).placeholder == "N"]),
    value=st.integers(-5, 10**6),
)
def test_a_whole_number_is_the_same_option_wherever_it_stands(name: str, value: int, tmp_path: Path) -> None:
    found = []
    for path in (
        None,
        written(tmp_path, "a.toml", f"{name} = {value}"),
        written(tmp_path, "a.yaml", f"{name}: {value}"),
    ):
        more = {"screen": "attribution"} if name == "exact" else {}
        try:
            options = run_options(more | ({name: str(value)} if path is None else {}), path)
            found.append((getattr(options, name), options.digest))
        except InputError as error:
            found.append(("refused", str(error).partition(": ")[2].split(", got")[0]))
    assert len(set(found)) == 1
