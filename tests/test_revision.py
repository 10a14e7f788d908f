import pytest

from trl_interfere.revision import published_checkpoint, split_revision, stage_revision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/repo", ("user/repo", None)),
        ("user/repo@stage-1-math", ("user/repo", "stage-1-math")),
        ("gpt2@refs/pr/1", ("gpt2", "refs/pr/1")),
        ("out/stages/1-math", ("out/stages/1-math", None)),
    ],
)
def test_split(name, expected):
    assert split_revision(name) == expected


@pytest.mark.parametrize("name", ["user/repo@", "@main", "/no/such/folder@1", "a/b/c@d"])
def test_neither_a_folder_nor_a_revision(name):
    with pytest.raises(ValueError, match=f"^{name}: expected a folder"):
        split_revision(name)


def test_stages_are_branches():
    assert stage_revision("5-refresh-math") == "stage-5-refresh-math"
    assert published_checkpoint("/home/me/out/stages/1-math", "u/r") == "u/r@stage-1-math"
    assert published_checkpoint("Qwen/Qwen3-0.6B", "u/r") == "Qwen/Qwen3-0.6B"
    assert published_checkpoint(None, "u/r") is None
