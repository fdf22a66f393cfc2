"""Every file of a folder or an archive is read, or named."""

import os
import zipfile
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from finetune.data.files import find_files
from finetune.data.formats import read_file
from finetune.data.sources import parse_sources
from finetune.errors import UserError

LINE = b'{"prompt": "2+2?", "completion": "4"}\n'


def write_files(folder: Path, *names: str, content: bytes = LINE) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names_of(name: str | Path, split: str = "train") -> list[str]:
    return [file.place.rsplit("/", 1)[-1] for file in find_files(str(name), split=split).files]


def test_what_a_folder_holds_is_read_or_named(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jsonl", "deep/b.ndjson", "README.md", "c.xlsx", ".cache/d.jsonl")
    write_files(tmp_path, "e.jsonl", content=b"")
    assert names_of(tmp_path) == ["a.jsonl", "b.ndjson"]
    assert find_files(str(tmp_path)).notes == [
        "not read, of no known format: README.md, c.xlsx",
        "not read, hidden: .cache/d.jsonl",
        "not read, empty: e.jsonl",
    ]


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jsonl", *(f"{number}.txt" for number in range(9)))
    (note,) = find_files(str(tmp_path)).notes
    assert note == "not read, of no known format: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more"


def test_what_an_archive_holds_is_read_or_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in (
            "a.jsonl",
            "b.csv",
            "test.jsonl",
            "__MACOSX/._a.jsonl",
            "in.jsonl.zip",
            "c.md",
        ):
            archive.writestr(name, LINE)
    for dataset in (tmp_path, tmp_path / "x.zip"):
        assert names_of(dataset) == ["a.jsonl", "b.csv"]
        unknown, hidden, split = find_files(str(dataset)).notes
        assert "c.md" in unknown and "in.jsonl.zip" in unknown
        assert "._a.jsonl" in hidden
        assert split.startswith("not read, of another split than train:") and "test" in split


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["data/train-00000-of-00001.parquet", "data/validation-0.parquet"], ["train-00000"]),
        (["train/a.jsonl", "test/a.jsonl", "dev/a.jsonl"], ["a.jsonl"]),
        (["a.jsonl", "my_test.jsonl"], ["a.jsonl"]),
        (["latest.jsonl", "contest.jsonl"], ["contest.jsonl", "latest.jsonl"]),
        (["test.jsonl"], ["test.jsonl"]),
    ],
)
def test_a_test_split_is_not_trained_on_beside_the_train_split(
    names: list[str], train: list[str], tmp_path: Path
) -> None:
    write_files(tmp_path / "test", *names)  # the folder that the user names says nothing
    for dataset in (tmp_path / "test", f"{tmp_path / 'test'}/**"):
        found = names_of(dataset)
        assert len(found) == len(train)
        assert all(map(str.startswith, found, train))


def test_the_test_split_of_a_folder_can_be_evaluated_on(tmp_path: Path) -> None:
    write_files(tmp_path, "train.jsonl", "test.jsonl", "special-0.jsonl")
    assert names_of(tmp_path, "test") == ["test.jsonl"]
    assert names_of(tmp_path, "special") == ["special-0.jsonl"]
    with pytest.raises(UserError, match="has no split 'validation' but test and train: hold out"):
        find_files(str(tmp_path), split="validation")
    with pytest.raises(UserError, match="has no split 'test': hold out a share"):
        find_files(str(tmp_path / "test.jsonl"), split="test")


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": str(number), "completion": "4"} for number in range(4)])
    rows.select([3, 1]).save_to_disk(tmp_path / "rows", num_shards=2)
    (tmp_path / "rows/cache-1234.arrow").write_bytes(b"what map() left")
    found = find_files(str(tmp_path / "rows"))
    assert [row["prompt"] for file in found.files for _, row in read_file(file)] == ["3", "1"]  # type: ignore[index]
    assert found.notes == []

    parts = DatasetDict({"train": rows.select([0]), "test": rows.select([1])})
    parts.save_to_disk(tmp_path / "parts")
    for split, prompt in (("train", "0"), ("test", "1")):
        (file,) = find_files(str(tmp_path / "parts"), split=split).files
        assert [row["prompt"] for _, row in read_file(file)] == [prompt]  # type: ignore[index]

    next((tmp_path / "rows").glob("data-*")).unlink()
    with pytest.raises(UserError, match=r"state\.json lists data-00000.*, which is not there"):
        find_files(str(tmp_path / "rows"))


def test_a_pattern_gives_the_files_that_match(tmp_path: Path) -> None:
    write_files(tmp_path, "rows.jsonl", "rows.jsonl.gz", "rows.csv")
    for pattern, names in {
        "*.jsonl": ["rows.jsonl"],
        "ro*.jsonl.gz": ["rows.jsonl.gz"],
        "*": ["rows.csv", "rows.jsonl", "rows.jsonl.gz"],
    }.items():
        assert names_of(f"{tmp_path}/{pattern}") == names
    with pytest.raises(UserError, match="does not exist"):
        find_files(f"{tmp_path}/*.parquet")


def test_the_key_of_a_file_changes_with_its_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINE)
    (before,) = find_files(str(file)).files
    file.write_bytes(LINE * 2)
    (after,) = find_files(str(file)).files
    assert before.key != after.key


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, words in (("missing.jsonl", "does not exist"), ("folder", "is a folder without")):
        with pytest.raises(UserError, match=words):
            find_files(str(tmp_path / name))
    write_files(tmp_path / "folder", "notes.txt")
    with pytest.raises(UserError, match=r"holds no file that ends in .* but notes\.txt"):
        find_files(str(tmp_path / "folder"))
    with pytest.raises(UserError, match="cannot be read"):
        find_files("nowhere://bucket/a.jsonl")


def test_what_is_behind_a_link_is_read_and_a_loop_is_not_followed(tmp_path: Path) -> None:
    write_files(tmp_path, "elsewhere/a.jsonl", "data/b.jsonl")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    for name in (tmp_path / "data", f"{tmp_path}/data/**", f"{tmp_path}/d*/**/*.jsonl"):
        found = find_files(str(name))
        assert [file.url for file in found.files] == [
            f"{tmp_path}/data/b.jsonl",
            f"{tmp_path}/data/link/a.jsonl",
        ]
        assert found.notes == []
    assert names_of(f"{tmp_path}/data/*/*.jsonl") == ["a.jsonl"]
    assert names_of(f"{tmp_path}/data/*.jsonl") == ["b.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jsonl", "closed/b.jsonl")
    (tmp_path / "closed").chmod(0)
    for name in (tmp_path, tmp_path / "closed", f"{tmp_path}/**", f"{tmp_path}/*/*.jsonl"):
        with pytest.raises(UserError, match=r"cannot be read: PermissionError: .*closed"):
            find_files(str(name))


def test_an_archive_without_data_is_named_as_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("inner.zip", b"PK")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    with pytest.raises(UserError, match=r"archives in an archive: unpack .*outer\.zip/inner\.zip"):
        find_files(str(tmp_path / "outer.zip"))
    with pytest.raises(UserError, match=r"empty\.zip' holds no file: the archive is empty"):
        find_files(str(tmp_path / "empty.zip"))


@pytest.mark.parametrize("name", ["a::b.jsonl", "a*2", "a.jsonl*3.jsonl", "a.jsonl ", "a?.jsonl"])
def test_what_exists_is_a_file_whatever_its_name(name: str, tmp_path: Path) -> None:
    write_files(tmp_path, name, "ab2")
    (source,) = parse_sources(f"{tmp_path}/{name}")
    assert source.weight == 1
    (file,) = find_files(source.name).files
    assert [row for _, row in read_file(file)] == [{"prompt": "2+2?", "completion": "4"}]


@pytest.mark.parametrize("pattern", ["?.jsonl", "[ab].jsonl"])
def test_only_a_star_is_a_pattern(pattern: str, tmp_path: Path) -> None:
    write_files(tmp_path, "a.jsonl")
    with pytest.raises(UserError, match=r"does not exist: of patterns, only `\*` is known"):
        find_files(f"{tmp_path}/{pattern}")
