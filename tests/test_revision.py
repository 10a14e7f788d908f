import pytest

from trl_interfere.revision import published_checkpoint, split_revision, stage_revision


def test_a_revision_stands_behind_the_name():
    for name, revision in (("user/repo", None), ("user/repo", "stage-1-math"), ("gpt2", "refs/pr/1")):
        assert split_revision(f"{name}@{revision}" if revision else name) == (name, revision)
    for name in ("user/repo@", "@main", "/no/such/folder@1", "a/b/c@d"):
        with pytest.raises(ValueError, match=f"^{name}: expected a folder"):
            split_revision(name)


def test_stages_are_branches():
    assert stage_revision("5-refresh-math") == "stage-5-refresh-math"
    assert published_checkpoint("/home/me/out/stages/1-math", "u/r") == "u/r@stage-1-math"
    assert published_checkpoint("Qwen/Qwen3-0.6B", "u/r") == "Qwen/Qwen3-0.6B"
