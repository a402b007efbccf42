"""Documents of files, folders and datasets, and what is said where there is none."""

import json
import sys

import pytest

from moeprof.texts.documents import Document, read_documents
from moeprof.texts.windows import heldout_windows

pytestmark = pytest.mark.once

ROWS = [
    {"text": "one", "domain": "a", "complexity": "easy"},
    {"text": "two", "domain": None, "complexity": None},
]


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize("write", [parquet, jsonl])
def test_rows_and_lines_are_documents(tmp_path, write):
    path = tmp_path / f"x.{write.__name__}"
    write(path, ROWS)
    name = path.name
    assert read_documents([path]) == [
        Document("a", f"{name}:1", "one", "easy"),
        Document("text", f"{name}:2", "two"),
    ]


def test_a_folder_stands_for_its_files(tmp_path):
    for name in ("b.txt", "a.md", "code/x.txt", "code/deep/y.txt", ".git/z.txt", "code/w.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    jsonl(tmp_path / "code" / "lines.jsonl", ROWS)
    found = [(d.domain, d.name) for d in read_documents([tmp_path])]
    assert found == [
        ("text", "a.md"),
        ("text", "b.txt"),
        ("code/deep", "code/deep/y.txt"),
        ("a", "code/lines.jsonl:1"),
        ("code", "code/lines.jsonl:2"),
        ("code", "code/x.txt"),
    ]


def test_files_with_nothing_in_them_are_left_out_and_named(tmp_path):
    for name, content in (("a.txt", "one"), ("b.txt", " \n"), ("c.jsonl", '{"text": ""}\n')):
        (tmp_path / name).write_text(content)
    with pytest.warns(UserWarning, match=r"2 files are empty, the first .*b\.txt, and left out"):
        assert [d.name for d in read_documents([tmp_path])] == ["a.txt"]
    with pytest.warns(UserWarning, match=r"text .*c\.jsonl is empty, and left out"):
        assert [d.name for d in read_documents([tmp_path / "c.jsonl", tmp_path / "a.txt"])]
    (tmp_path / "a.txt").write_text("")
    one_line(ValueError, "3 files are empty, the first", tmp_path)
    one_line(ValueError, "b.txt is empty", tmp_path / "b.txt")


def test_a_dataset_is_read_by_name_config_and_split(monkeypatch):
    asked = []

    class Datasets:
        __spec__ = sys.__spec__

        @staticmethod
        def load_dataset(name, config, split):
            asked.append((name, config, split))
            return [*ROWS, {"text": " "}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    for written in ("datasets:o/n", "datasets:o/n:train", "datasets:o/n:en:validation[:5]"):
        assert [d.name for d in read_documents([written])] == ["o/n:1", "o/n:2"]
    assert asked == [
        ("o/n", None, "test"),
        ("o/n", None, "train"),
        ("o/n", "en", "validation[:5]"),
    ]


@pytest.mark.filterwarnings("ignore")  # of datasets and what it imports
def test_a_dataset_of_a_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    jsonl(tmp_path / "d" / "test.jsonl", ROWS)
    found = read_documents([f"datasets:{tmp_path / 'd'}:test"])
    assert [(d.domain, d.text, d.complexity) for d in found] == [
        ("a", "one", "easy"),
        ("text", "two", None),
    ]
    with pytest.raises(OSError, match="datasets:nobody/nothing can't be loaded") as said:
        read_documents(["datasets:nobody/nothing"])
    assert "\n" not in str(said.value)


def test_the_case_of_a_suffix_does_not_matter(tmp_path):
    jsonl(tmp_path / "A.JSONL", ROWS)
    found = read_documents([tmp_path / "A.JSONL"])
    assert len(found) == len(ROWS) and found == read_documents([tmp_path])


def one_line(error, words, *paths):
    with pytest.raises(error) as said:
        read_documents(paths)
    assert words in str(said.value) and "\n" not in str(said.value)


def test_what_is_no_text_is_said_in_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "empty").mkdir()
    one_line(ValueError, "empty: the folder has no .txt, .md, .jsonl, .par", tmp_path / "empty")
    bad = tmp_path / "bad.parquet"
    bad.write_text("no Parquet")
    one_line(ValueError, "bad.parquet is no Parquet file (ArrowInvalid", bad)
    parquet(bad, [{"content": "one"}])
    one_line(ValueError, "bad.parquet, row 1: no such document", bad)
    parquet(bad, [{"text": 3}])
    one_line(ValueError, "bad.parquet, row 1: no such document", bad)
    one_line(OSError, "none.parquet can't be read: No such file", tmp_path / "none.parquet")
    wrong = ("{", "3", '{"domain": "a"}', '{"text": "a", "complexity": 3}', "[" * 100_000)
    for line in wrong:
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line)
        one_line(ValueError, "a.jsonl, line 2: no such document", tmp_path / "a.jsonl")
    for field in ("text", "domain", "complexity"):
        jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", field: "\ud800"}])
        one_line(ValueError, f"a.jsonl, line 2: its {field} has a lone", tmp_path / "a.jsonl")
    one_line(ValueError, "expected datasets:NAME:SPLIT", "datasets:")
    one_line(ValueError, "expected datasets:NAME:SPLIT", "datasets:a:b:c:d")


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "x.parquet"), ("datasets", "datasets:x")]
)
def test_a_package_that_is_missing_is_named(package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    one_line(ImportError, f"needs {package}, which isn't installed: pip install", name)


def test_windows_that_overlap_count_each_token_once():
    from letters import Letters

    text, letters = "".join(map(chr, range(33, 93))), Letters()
    for stride in (1, 7, 19, 20):
        found = heldout_windows(letters, [Document("a", "d", text)], 99, window=20, stride=stride)
        counted = [letters.decode(w.ids[0, w.first :]) for w in found.windows]
        assert [len(part) for part in counted] == [w.num_bytes for w in found.windows]
        assert [len(part) for part in counted] == [w.predicted for w in found.windows]
        assert "".join(sorted(counted)) == (
            text[1:] if stride < 20 else text[1:20] + text[21:40] + text[41:]
        )
        assert max(w.ids.shape[1] for w in found.windows) == 20
        before = [w.first for w in found.windows if letters.decode(w.ids[0])[0] != text[0]]
        assert min(before) >= max(20 - stride, 1)


def test_a_window_of_a_single_token_predicts_nothing_and_is_left_out():
    from letters import Letters

    text = "".join(map(chr, range(33, 33 + 41)))
    found = heldout_windows(Letters(), [Document("a", "d", text)], 99, window=20)
    assert sorted(w.ids.shape[1] for w in found.windows) == [20, 20]
    with pytest.raises(ValueError, match="no document has two tokens"):
        heldout_windows(Letters(), [Document("a", "d", "x")], 99)
