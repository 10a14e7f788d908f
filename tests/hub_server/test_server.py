"""The local Hub behaves like the real one, as far as the real client can tell."""

import hashlib

import httpx2
import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM

from trl_interfere.lab.build import MODEL_FOLDER


REPO = "tester/model"
LARGE = bytes(range(256)) * 4096


@pytest.fixture
def api(hub):
    api = HfApi()
    api.create_repo(REPO)
    return api


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def add(api, files, message="add", **kwargs):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations, commit_message=message, **kwargs)


def test_files_come_back_to_the_byte(hub, api, tmp_path):
    add(api, {"a.txt": b"text", "folder/w.safetensors": LARGE})
    for path, content in (("a.txt", b"text"), ("folder/w.safetensors", LARGE)):
        assert open(hf_hub_download(REPO, path), "rb").read() == content
    folder = api.snapshot_download(REPO, local_dir=tmp_path / "all")
    assert (tmp_path / "all/folder/w.safetensors").read_bytes() == LARGE and folder
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert entries["folder/w.safetensors"].lfs.sha256 == hashlib.sha256(LARGE).hexdigest()
    assert entries["a.txt"].blob_id == hashlib.sha1(b"blob 4\0text").hexdigest()
    assert sorted(entry.path for entry in api.list_repo_tree(REPO)) == [".gitattributes", "a.txt", "folder"]


def test_large_files_go_in_parts(hub, api):
    hub.part_size = 300_000
    add(api, {"w.safetensors": LARGE})
    assert sum("/storage/" in path and method == "PUT" for method, path in hub.log) == -(-len(LARGE) // 300_000)
    assert open(hf_hub_download(REPO, "w.safetensors"), "rb").read() == LARGE


def test_what_is_there_is_not_sent_again(hub, api):
    files = {"a.txt": b"text", "w.safetensors": LARGE}
    first = add(api, files)
    assert add(api, files).oid == first.oid and len(hub.committed) == 1
    add(api, {**files, "b.txt": b"new", "copy.safetensors": LARGE})
    assert hub.committed[1] == ["b.txt", "copy.safetensors"] and list(hub.uploads.values()) == [1]


def test_revisions(hub, api):
    first = add(api, {"a.txt": b"1"}).oid
    initial = api.list_repo_commits(REPO)[-1].commit_id
    api.create_branch(REPO, branch="stage-1-math", revision=initial)
    add(api, {"a.txt": b"2"}, revision="stage-1-math")
    api.create_tag(REPO, tag="v1", revision=first)
    add(api, {"a.txt": b"3"})
    for revision, content in (("main", b"3"), ("v1", b"1"), ("stage-1-math", b"2"), (first, b"1")):
        assert open(hf_hub_download(REPO, "a.txt", revision=revision), "rb").read() == content
    refs = api.list_repo_refs(REPO)
    assert {ref.name for ref in refs.branches} == {"main", "stage-1-math"} and refs.tags[0].target_commit == first
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="main")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a.txt", revision="nowhere")


def test_deletions_and_stale_parents(hub, api):
    first = add(api, {"a.txt": b"1", "b/c.txt": b"2"}).oid
    api.create_commit(REPO, [CommitOperationDelete("b/")], commit_message="delete")
    assert api.list_repo_files(REPO) == [".gitattributes", "a.txt"]
    with pytest.raises(HfHubHTTPError, match="412"):
        add(api, {"a.txt": b"4"}, parent_commit=first)


def test_what_is_missing_is_named(hub, api):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.txt")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/none", "a.txt")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("somebody/else")


def test_private_repositories_need_the_token(hub, api):
    api.create_repo("tester/secret", private=True)
    assert api.repo_info("tester/secret").private
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("tester/secret", token=False)


def test_cards_are_validated(hub, api):
    ModelCard("---\nlicense: apache-2.0\nbase_model: a/b\n---\n# Title").validate()
    for metadata in ("license: my-own", "base_model: a/b/c", "base_model_relation: child"):
        with pytest.raises(ValueError, match=metadata.split(":")[0]):
            ModelCard(f"---\n{metadata}\n---\n# Title").validate()
    with pytest.raises(ValueError, match="license"):
        add(api, {"README.md": b"---\nlicense: my-own\n---\n"})
    assert hub.committed == []


def test_collections(hub, api):
    collection = api.create_collection("A study", exists_ok=True)
    assert api.create_collection("A study", exists_ok=True).slug == collection.slug
    for _ in range(2):
        api.add_collection_item(collection.slug, REPO, item_type="model", note="seed 0", exists_ok=True)
    (item,) = api.get_collection(collection.slug).items
    assert (item.item_id, item.item_type, item.note) == (REPO, "model", "seed 0")


def test_transformers_and_datasets(hub, api):
    api.upload_folder(repo_id=REPO, folder_path=MODEL_FOLDER)
    ours = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=api.snapshot_download(REPO) + "-cache")
    assert all((a == b).all() for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    Dataset.from_list([{"prompt": "1+1="}]).push_to_hub("tester/data")
    assert load_dataset("tester/data", split="train")[0]["prompt"] == "1+1="


@pytest.mark.parametrize("headers", [{"Retry-After": "3"}, {}])
@pytest.mark.parametrize("status", [429, 500])
def test_busy_servers_are_asked_again(hub, api, status, headers, monkeypatch):
    waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    hub.fail("PUT", "/storage/", status, headers, times=2)
    add(api, {"w.safetensors": LARGE})
    assert waits == ([4.0, 4.0] if headers else [1, 2])
    assert hub.files(REPO)["w.safetensors"] == LARGE


def test_cut_connections(hub, api):
    hub.fail("PUT", "/storage/", cut_after=1000, times=20)
    with pytest.raises(RuntimeError, match="w.safetensors") as error:
        add(api, {"w.safetensors": LARGE})
    assert isinstance(error.value.__cause__, httpx2.NetworkError | httpx2.RemoteProtocolError)
    assert hub.uploads == {} and hub.repo(REPO).lfs == {} and hub.committed == []


def test_expired_tokens_and_quota(hub, api):
    hub.quota = 1000
    with pytest.raises(HfHubHTTPError, match="storage limit"):
        add(api, {"w.safetensors": LARGE})
    hub.tokens.clear()
    with pytest.raises(HfHubHTTPError, match="401"):
        add(api, {"a.txt": b"1"})
