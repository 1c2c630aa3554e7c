"""Facts about the copies of remote files on this machine."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from ditflow.backbones.revision import folder_revision
from ditflow.cache import cache_folder
from ditflow.mini import mini_folder
from pipeline.cache import NodeCache, local_model
from pipeline.job import Cache, Job, Model, Output, Resources
from pipeline.store import Store, StoreMissingError

CONTENT = b"a reference video"
HASH = hashlib.sha256(CONTENT).hexdigest()
REMOTE = "s3://bucket/clip.mp4"


class Fetch:
    """A file on a storage that counts how often it is fetched."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.times = content, 0

    def __call__(self) -> bytes:
        self.times += 1
        return self.content


@pytest.fixture
def cache(tmp_path) -> NodeCache:
    return NodeCache(tmp_path / "cache", max_bytes=1000)


def copies(cache: NodeCache) -> list[str]:
    return sorted(path.name for path in cache.folder.glob("files/*"))


def test_a_remote_file_is_fetched_once(cache):
    fetch = Fetch()
    assert [cache.read(REMOTE, HASH, fetch) for _ in range(3)] == [CONTENT] * 3
    assert fetch.times == 1
    assert cache.read("s3://elsewhere/same.mp4", HASH, Fetch(b"never asked for")) == CONTENT


def test_a_copy_that_was_changed_is_fetched_anew(cache):
    fetch = Fetch()
    cache.read(REMOTE, HASH, fetch)
    (cache.folder / "files" / HASH).write_bytes(b"a reference vide0")
    assert cache.read(REMOTE, HASH, fetch) == CONTENT
    assert (cache.folder / "files" / HASH).read_bytes() == CONTENT
    assert fetch.times == 2


def test_what_is_not_what_was_asked_for_is_returned_but_not_kept(cache):
    assert cache.read(REMOTE, HASH, Fetch(b"something else")) == b"something else"
    assert copies(cache) == []


@pytest.mark.parametrize(
    ("uri", "sha256"), [("file:///videos/clip.mp4", HASH), ("/videos/clip.mp4", HASH), (REMOTE, None)]
)
def test_local_files_and_those_of_unknown_content_are_not_copied(cache, uri, sha256):
    assert cache.read(uri, sha256, Fetch()) == CONTENT
    assert not cache.folder.exists()


def test_the_copies_that_were_not_used_for_longest_make_room(cache):
    contents = [bytes([n]) * 400 for n in range(3)]
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    for n in (0, 1):
        cache.read(REMOTE, hashes[n], Fetch(contents[n]))
        os.utime(cache.folder / "files" / hashes[n], (n + 1, n + 1))
    cache.read(REMOTE, hashes[0], Fetch(contents[0]))  # used again: the other one is the oldest now
    cache.read(REMOTE, hashes[2], Fetch(contents[2]))
    assert copies(cache) == sorted([hashes[0], hashes[2]])


def test_a_copy_larger_than_the_cache_is_kept_while_it_is_the_last_one(cache):
    large, small = b"x" * 5000, b"y"
    cache.read(REMOTE, hashlib.sha256(large).hexdigest(), Fetch(large))
    assert copies(cache) == [hashlib.sha256(large).hexdigest()]
    cache.read(REMOTE, hashlib.sha256(small).hexdigest(), Fetch(small))
    assert copies(cache) == [hashlib.sha256(small).hexdigest()]


def test_a_remote_folder_is_copied_once_and_anew_when_it_has_changed(s3_store, cache, s3):
    s3_store.put("model_index.json", b"{}")
    s3_store.put("transformer/weights.safetensors", b"weights")
    folder = cache.folder_of(s3_store)
    assert (folder / "transformer/weights.safetensors").read_bytes() == b"weights"
    assert cache.folder_of(s3_store) == folder
    s3_store.put("transformer/weights.safetensors", b"weightz")
    other = cache.folder_of(s3_store)
    assert other != folder
    assert (other / "transformer/weights.safetensors").read_bytes() == b"weightz"
    assert list((cache.folder / "unfinished").iterdir()) == []


def test_a_folder_whose_copy_fails_leaves_none(s3_store, cache, monkeypatch):
    s3_store.put("model_index.json", b"{}")

    def fails(store, key, file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(Store, "download", fails)
        with pytest.raises(ConnectionError):
            cache.folder_of(s3_store)
    assert (cache.folder_of(s3_store) / "model_index.json").read_bytes() == b"{}"


def test_an_empty_remote_folder_is_refused(s3_store, cache):
    with pytest.raises(StoreMissingError, match="expected a diffusers model folder"):
        cache.folder_of(s3_store)


def test_a_model_on_object_storage_is_the_same_model(s3_store, tmp_path):
    from ditflow import backbones

    source = mini_folder("mini")
    for file in source.rglob("*"):
        if file.is_file():
            s3_store.put(file.relative_to(source).as_posix(), file)
    resources = Resources(cache=Cache(folder=str(tmp_path / "cache")))
    job = Job("synthesize", "test", Output("/nowhere"), Model(s3_store.uri), resources=resources)
    copy = local_model(job)
    assert Path(copy).is_relative_to(tmp_path / "cache")
    assert backbones.identify(copy).revision == backbones.identify("mini").revision
    assert backbones.load(copy, name=s3_store.uri).name == s3_store.uri


@pytest.mark.parametrize("path", ["mini", "/models/CogVideoX-5b", "THUDM/CogVideoX-5b", "~/models/x"])
def test_other_models_are_used_where_they_are(path):
    assert local_model(Job("synthesize", "test", Output("/nowhere"), Model(path))) == path


@pytest.fixture
def unusable(tmp_path, monkeypatch) -> Path:
    """A cache folder that nobody, not even root, can make."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DITFLOW_CACHE", str(tmp_path / "file/cache"))
    return tmp_path / "file/cache"


def test_a_cache_that_cannot_be_written_is_gone_without_and_said_once(unusable, caplog):
    cache, fetch = NodeCache(unusable, max_bytes=1000), Fetch()
    assert [cache.read(REMOTE, HASH, fetch) for _ in range(3)] == [CONTENT] * 3
    assert folder_revision(mini_folder("mini")) == folder_revision(mini_folder("mini"))
    (warning,) = caplog.messages
    assert warning.startswith(
        f"the cache {unusable} cannot be used (Not a directory): continuing without it. Set DITFLOW"
    )


def test_a_copy_that_cannot_be_finished_leaves_nothing_behind(cache, monkeypatch):
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cache.read(REMOTE, HASH, Fetch()) == CONTENT
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == []


def test_a_copy_of_another_user_is_used_if_it_can_be_read_and_gone_without_if_not(cache, monkeypatch):
    cache.read(REMOTE, HASH, Fetch())

    def not_ours(path, *_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", not_ours)
        assert cache.read(REMOTE, HASH, Fetch(b"never asked for")) == CONTENT
        patch.setattr(Path, "read_bytes", not_ours)
        patch.setattr(os, "replace", not_ours)
        assert cache.read(REMOTE, HASH, Fetch()) == CONTENT
    assert list((cache.folder / "unfinished").iterdir()) == []


def test_a_folder_of_another_user_that_cannot_be_read_is_copied_once_more(s3_store, cache, monkeypatch):
    s3_store.put("model_index.json", b"{}")
    theirs, access = cache.folder_of(s3_store), os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: theirs not in [path, *Path(path).parents] and access(path, mode)
    )
    own = cache.folder_of(s3_store)
    assert own == cache.folder_of(s3_store) == theirs.with_name(f"{theirs.name}-{os.getuid()}")
    assert (own / "model_index.json").read_bytes() == b"{}"


def test_what_a_process_that_died_has_left_unfinished_is_removed_and_nothing_else(cache, tmp_path):
    unfinished = cache.folder / "unfinished"
    abandoned, at_work, own = unfinished / ("a" * 32), unfinished / ("b" * 32), unfinished / "notes"
    for path in (abandoned, at_work, own):
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"half")
        os.utime(path, (1, 1))
    os.utime(abandoned / "weights", (1, 1))
    os.utime(own / "weights", (1, 1))
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (unfinished / ("c" * 32)).symlink_to(tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere", (1, 1))
    cache.read(REMOTE, HASH, Fetch())
    assert sorted(path.name for path in unfinished.iterdir()) == [at_work.name, own.name]
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


def test_a_cache_in_a_folder_of_the_users_own_removes_only_its_copies(cache, tmp_path):
    tight = NodeCache(cache.folder, max_bytes=0)
    for name in ("models/my-model/weights", "files/thesis.pdf"):
        (tight.folder / name).parent.mkdir(parents=True)
        (tight.folder / name).write_bytes(b"mine")
    (tight.folder / f"models/{HASH}").symlink_to(tmp_path)
    tight.read(REMOTE, HASH, Fetch())
    other = hashlib.sha256(b"other").hexdigest()
    tight.read(REMOTE, other, Fetch(b"other"))
    assert copies(tight) == sorted([other, "thesis.pdf"])
    assert (tight.folder / "models/my-model/weights").exists()
    assert (tight.folder / f"models/{HASH}").is_symlink()


def test_a_model_on_object_storage_needs_a_cache_and_the_error_names_its_key(unusable, s3_store):
    s3_store.put("model_index.json", b"{}")
    with pytest.raises(OSError, match=r"Set resources\.cache\.folder or DITFLOW_CACHE"):
        NodeCache(unusable, 1000).folder_of(s3_store)


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[1]", b"[" * 100_000, b"wrong values"], ids=range(5))
def test_a_damaged_memory_of_hashes_is_computed_again_with_a_warning(tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setenv("DITFLOW_CACHE", str(tmp_path))
    revision, memory = folder_revision(mini_folder("mini")), tmp_path / "file-hashes.json"
    hashes = json.loads(memory.read_bytes())
    memory.write_bytes(json.dumps(dict.fromkeys(hashes, 5)).encode() if damage == b"wrong values" else damage)
    assert folder_revision(mini_folder("mini")) == revision
    assert json.loads(memory.read_bytes()) == hashes
    assert f"{memory} is damaged" in caplog.messages[0]


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for variables, folder in (
        ({}, "/home/somebody/.cache/ditflow"),
        ({"DITFLOW_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/somebody/.cache/ditflow"),
        ({"XDG_CACHE_HOME": "/scratch"}, "/scratch/ditflow"),
        ({"XDG_CACHE_HOME": "scratch"}, "/home/somebody/.cache/ditflow"),  # invalid, by the standard
        ({"DITFLOW_CACHE": "~/here"}, "/home/somebody/here"),
    ):
        for name in ("DITFLOW_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cache_folder() == Path(folder)


def test_nobody_needs_a_home(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("DITFLOW_CACHE", "/scratch")
    assert cache_folder() == Path("/scratch")
    for name in ("DITFLOW_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert len(folder_revision(mini_folder("mini"))) == 16
