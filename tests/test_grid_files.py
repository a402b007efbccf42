"""Grids as files and objects: what they plan, and what is said of a wrong one, with its line."""

import json

import pytest

from moeprof.studies import Grid
from moeprof.studies.grid.lines import Lines
from moeprof.studies.grid.settings import SHIPPED
from moeprof.studies.sweep.grid import configurations

pytestmark = pytest.mark.once

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))


def test_the_21_are_those_of_the_sweep():
    planned = Grid.read("bh-21").configurations(64, 8)
    assert len(planned.configurations) == 21 and planned.dropped == []
    for mine, sweeps in zip(planned.configurations, configurations(), strict=True):
        assert (mine.name, mine.router) == (sweeps.name, sweeps.router(8))
        assert mine.null == (None if sweeps.alpha is None else "trimmed")


def test_the_later_grid_has_4_static_and_16_bh():
    grid = Grid.read("bh-20-later")
    planned = grid.configurations(64, 8).configurations
    assert grid.samples == 200 and "Assumed here" in grid.about
    static = [one.name for one in planned if one.null is None]
    assert static == ["topk_8_baseline", "topk_16", "topk_32", "topk_64"]
    rest = {(one.router.alpha, one.router.max_k) for one in planned if one.null == "trimmed"}
    assert rest == {(a, k) for a in (0.3, 0.4, 0.5, 0.6) for k in (8, 16, 32, 64)}
    assert len(planned) == 20


def test_the_equal_budget_grid_sets_all_to_half_and_three_quarters():
    planned = Grid.read("equal-budget").configurations(64, 8).configurations[1:]
    assert {one.budget for one in planned} == {4.0, 6.0}
    assert all(one.router.max_k == 8 for one in planned)
    names = {one.router.name for one in planned}
    assert {"topk", "bh", "fixed_p", "top_p", "entropy", "local_fdr"} <= names
    assert {one.null for one in planned if one.router.name == "bh"} == {"trimmed", "efron"}


def test_every_shipped_grid_comes_back_from_its_own_file(tmp_path):
    assert NAMES == ["bh-20-later", "bh-21", "equal-budget"]
    for name in NAMES:
        grid = Grid.read(name)
        assert grid.name == name
        grid.write(tmp_path / "again.toml")
        assert Grid.read(tmp_path / "again.toml") == grid


def test_an_object_and_a_file_are_the_same_grid(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nbits = ["none", 4]\nseeds = [0, 1]\nnulls = "efron"\n'
        '[[routers]]\nrouter = "kneedle"\non = ["prob", "log"]\nc = -0.5\n'
        '[[routers]]\nrouter = "bh"\nbudgets = ["3k/4", 2.5]\nnull = "normal"\n'
    )
    routers = [
        {"router": "kneedle", "on": ["prob", "log"], "c": -0.5},
        {"router": "bh", "budgets": ["3k/4", 2.5], "null": ["normal"]},
    ]
    grid = Grid(name="mine", bits=("none", 4), seeds=[0, 1], nulls="efron", routers=routers)
    assert Grid.read(path) == grid
    planned = grid.configurations(8, 2)
    names = ["topk_2_baseline", "kneedle_prob_c-0.5", "kneedle_log_c-0.5", "bh@1.5", "bh@2.5"]
    assert [one.name for one in planned.configurations] == names
    table = str(planned)
    assert all(name in table for name in names) and "on=log, c=-0.5" in table


def test_what_a_model_cannot_have_is_left_out_and_said():
    planned = Grid.read("bh-21").configurations(8, 2)
    assert [one.name for one in planned.configurations] == [c.name for c in configurations(8, 2)]
    assert planned.dropped[0] == "4 configurations: max_k: expected 1 to 8 (experts), got 16"
    assert str(planned).count("Left out: ") == 3
    half = Grid(routers=[{"router": "topk", "k": ["k/2", "own", 5]}]).configurations(8, 3)
    assert [one.name for one in half.configurations] == ["topk_3_baseline", "topk_5"]
    assert half.dropped == ["1 configuration: k: k/2 of the model's own 3 is no whole number"]


def test_a_name_says_its_null_only_where_it_has_to():
    tables = [{"router": "bh", "alpha": 0.05}, {"router": "local_fdr", "null": "efron"}]
    planned = Grid(routers=tables, nulls=["trimmed", "normal"]).configurations(8, 2)
    names = [one.name for one in planned.configurations[1:]]
    assert names == ["bh_a005 on trimmed", "bh_a005 on normal", "local_fdr"]


WRONG = [
    # text, line, what has to be said
    ('name = "x"\nmodles = ["demo"]', 2, ["'modles'", "'models'"]),
    ("\n\ntokens = 1", 3, ["tokens", "got 1"]),
    ("tokens = true", 1, ["tokens", "True"]),
    ('dtype = "fp32"', 1, ["dtype", "'float32'", "'fp32'"]),
    ('bits = [\n  "none", # as it is\n  5,\n]', 3, ["bits", "'none', 8, 4", "got 5"]),
    ("seeds = []", 1, ["seeds", "none"]),
    ('name = "a\nb = 1', 1, ["no TOML"]),
    ('name = "a"\nname = "b"', 2, ["no TOML"]),
    ("bits = [8,\n4", 2, ["no TOML"]),
    ('[[routers]]\nrouter = "bh"\n[[routers]]\nrouter = "bhh"', 4, ["'bhh'", "'bh'"]),
    ('[[routers]]\nrouter = "bh"\n\n[[routers]]\nalpha = 0.1', 4, ["no key 'router'", "bh"]),
    ('[[routers]]\nrouter = "bh"\nalhpa = 0.1', 3, ["bh takes no 'alhpa'", "'alpha'"]),
    (
        'about = """\nrouter = "bh"\nalpha = 7\n"""\n[[routers]]\nrouter = "bh"\nalpha = [\n'
        "  0.1,\n  # alpha = 7\n  7,\n]",
        10,
        ["alpha", "(0, 1)", "got 7"],
    ),
    (
        'routers = [\n  {router = "bh"},\n  {router = "top_p", P = 2},\n]',
        3,
        ["P", "got 2"],
    ),
    ('[[routers]]\nrouter = "bh"\nmax_k = ["own", "onw"]', 3, ["max_k", "'onw'", "k/2"]),
    ('[[routers]]\nrouter = "bh"\nmax_k = 0', 3, ["max_k", "got 0"]),
    ('[[routers]]\nrouter = "bh"\nbudgets = "k/0"', 3, ["budgets", "'k/0'"]),
    ('[[routers]]\nrouter = "bh"\nbudgets = 4\nalpha = 0.1', 4, ["alpha", "budgets"]),
    ('[[routers]]\nrouter = "top_p"\nnull = "efron"', 3, ["null", "top_p"]),
    ('[[routers]]\nrouter = "local_fdr"', 2, ["local_fdr", "trimmed", "efron"]),
    ('[[routers]]\nrouter = "weighted_bh"\nu = [1, 1]', 3, ["weighted_bh takes no 'u'"]),
    ("routers = [3]", 1, ["routers", "table", "3"]),
]


@pytest.mark.parametrize(("text", "line", "said"), WRONG)
def test_what_is_wrong_is_one_line_with_the_files_line(tmp_path, text, line, said):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        Grid.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ") and "\n" not in message
    assert all(part in message for part in said), message


def test_of_an_object_the_table_is_named():
    with pytest.raises(ValueError, match=r"^Grid, routers\[1\]: no router 'entropi'.*'entropy'"):
        Grid(routers=[{"router": "bh"}, {"router": "entropi"}])


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="grid bh-12: no such file.*'bh-21'"):
        Grid.read("bh-12")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ValueError, match="isn't UTF-8"):
        Grid.read(tmp_path / "latin.toml")
    with pytest.raises(OSError, match="can't be read"):
        Grid.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('models = [\n  "demo",\n  "dmeo",\n]', 3, ["models: model dmeo", "'demo'"]),
        ('texts = ["shiped"]', 1, ["texts: text shiped", "'shipped'"]),
        ('\nprompts = "promts.txt"', 2, ["prompts: ", "promts.txt", "prompts.txt"]),
        ('nulls = "trimed"', 1, ["nulls: ", "'trimmed'"]),
        ('[[routers]]\nrouter = "bh"\nnull = ["normal",\n"norml"]', 4, ["null: ", "'normal'"]),
    ],
)
def test_what_it_names_is_looked_for(tmp_path, monkeypatch, text, line, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("The list is\n")
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises((ValueError, OSError)) as caught:
        Grid.read("grid.toml").check()
    message = str(caught.value)
    assert message.startswith(f"grid.toml:{line}: ") and "\n" not in message
    assert all(part in message for part in said), message


def test_nothing_is_wrong_with_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The list is"}) + "\n")
    Grid(texts=["shipped", "text.jsonl"], nulls=["trimmed", "efron", "normal", "softmax"]).check()


def test_a_line_is_found_where_the_parser_first_sees_the_value():
    text = '# a\n"quoted key" = 1\na.b = [[1,\n2], [3]]\n[table]\n# c = 0\nc = """\nd = 1\n"""\n'
    lines = Lines("f", text)
    places = {("quoted key",): 2, ("a", "b"): 3, ("a", "b", 1): 4, ("table", "c"): 7, ("x",): 1}
    for keys, line in places.items():
        assert lines.place(keys) == f"f:{line}", keys
    assert lines.place(("table", "d")) == "f:5"  # the table's line, for what isn't there
