"""Facts about the storage: what a reader can see, who wins, what an error says, and what it never says."""

import ctypes
import errno
import gzip
import hashlib
import os
import pickle
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from s3fs import S3FileSystem

import pipeline.store as store_module
from pipeline.protocols import options_for
from pipeline.store import (
    Store,
    StoreCredentialsError,
    StoreError,
    StoreForbiddenError,
    StoreMissingError,
    StoreOptionsError,
    StoreOversizedError,
    StoreUnwritableError,
    absolute_uri,
    fingerprint,
    list_uris,
    local_folder,
    open_fs,
    patiently,
    public_uri,
    read_uri,
    redact,
    sha256_of,
)

ODD_NAMES = ["a b.mp4", "größe 日本.mp4", "a+b%20c.mp4", "q?x=1&y#z.mp4", "brackets[1]*.mp4", 'it\'s "q"::x.mp4']


def one_try(s3_store: Store) -> Store:
    """The same store without botocore's waiting between retries."""
    return Store(s3_store.uri, {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}})


# ------------------------------------------------------------------------------------------------- objects


def test_what_was_put_is_read_back_with_its_hash_and_size(store):
    stored = store.put("videos/a.mp4", b"frames")
    assert store.read("videos/a.mp4") == b"frames"
    assert stored.sha256 == hashlib.sha256(b"frames").hexdigest()
    assert stored.bytes == 6
    assert stored.uri == store.uri_of("videos/a.mp4") == f"{store.uri}/videos/a.mp4"
    assert read_uri(stored.uri) == b"frames"


def test_put_replaces_and_an_empty_object_is_an_object(store):
    store.put("a", b"long content")
    store.put("a", b"")
    assert store.read("a") == b""
    assert store.exists("a")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_survive(store, name):
    store.put(f"in/{name}", name.encode())
    assert store.list("in") == [f"in/{name}"]
    assert store.read(f"in/{name}") == name.encode()
    assert list_uris(f"{store.uri}/in", "*.mp4") == [store.uri_of(f"in/{name}")]
    assert read_uri(store.uri_of(f"in/{name}")) == name.encode()
    assert list_uris(store.uri_of(f"in/{name}")) == [store.uri_of(f"in/{name}")]


def test_a_newline_in_a_name_survives(local_store):  # moto's router has no route for one
    local_store.put("in/a\nb.mp4", b"x")
    assert local_store.list("in") == ["in/a\nb.mp4"]
    assert list_uris(f"{local_store.uri}/in", "*.mp4") == [local_store.uri_of("in/a\nb.mp4")]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../../b", "./a", "a\0b", ".tmp-a", "v/.tmp-a"])
def test_a_key_that_is_no_plain_relative_path_is_refused(tmp_path, key):
    with pytest.raises(StoreError, match="not a plain relative path"):
        Store(str(tmp_path)).put(key, b"")


def test_only_objects_exist(store):
    store.put("videos/a.mp4", b"x")
    assert store.exists("videos/a.mp4")
    assert not store.exists("videos")
    assert not store.exists("videos/b.mp4")
    assert not store.exists("videos/a.mp4/below")


def test_a_deleted_object_is_gone_and_deleting_twice_is_fine(store):
    store.put("attempts/r/001.json", b"x")
    store.delete("attempts/r/001.json")
    store.delete("attempts/r/001.json")
    assert not store.exists("attempts/r/001.json")
    assert store.list() == []


def test_deleting_the_last_file_of_a_local_folder_removes_the_folder_but_not_the_root(local_store):
    local_store.put("attempts/r/001.json", b"x")
    local_store.delete("attempts/r/001.json")
    root = Path(local_store.uri.removeprefix("file://"))
    assert list(root.iterdir()) == []


def test_list_has_every_depth_sorted_and_sizes(store):
    for key in ("b/2", "b/1", "b/c/3", "a", "bb/4"):
        store.put(key, key.encode())
    assert store.list("b") == store.list("b/") == ["b/1", "b/2", "b/c/3"]
    assert store.sizes() == {"a": 1, "b/1": 3, "b/2": 3, "b/c/3": 5, "bb/4": 4}


def test_a_missing_folder_has_no_objects(store):
    assert store.list("videos") == []


def test_list_sees_what_another_writer_wrote_a_moment_ago(store):
    other = pickle.loads(pickle.dumps(store))
    assert store.list("m") == []
    other.put("m/1", b"x")
    assert store.list("m") == ["m/1"]
    assert store.exists("m/1")
    other.delete("m/1")
    assert store.list("m") == []


def test_an_input_folder_shows_what_came_from_elsewhere_since_the_last_look(s3, s3_store):
    s3.fill(s3_store.uri, ["refs/a.mp4"])
    assert len(list_uris(f"{s3_store.uri}/refs")) == len(s3_store.list("refs")) == 1
    s3.fill(s3_store.uri, ["refs/b.mp4"])
    assert len(list_uris(f"{s3_store.uri}/refs")) == len(s3_store.list("refs")) == 2


def test_more_than_a_thousand_objects_are_listed(s3, s3_store):
    keys = [f"many/{n:04d}" for n in range(1005)]
    s3.fill(s3_store.uri, keys)
    assert s3_store.list("many") == keys
    assert sum("continuation-token" in request for request in s3.requests) == 1
    assert len(list_uris(f"{s3_store.uri}/many")) == 1005


def test_a_large_upload_goes_in_parts(s3, s3_store, monkeypatch):
    monkeypatch.setattr(store_module, "PART_BYTES", 5 * 2**20)
    data = os.urandom(2**20) * 11
    assert s3_store.put("big", data).bytes == len(data)
    assert s3_store.read("big") == data
    assert sum("partNumber" in request for request in s3.requests) == 3


def test_a_store_travels_by_pickle_without_its_connections(store):
    store.put("a", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.uri, copy.storage_options) == (store.uri, store.storage_options)
    assert copy.read("a") == b"x"
    assert len(pickle.dumps(store)) < 1000


# ------------------------------------------------------------------------------------- atomicity and races


def test_one_of_sixteen_creators_wins_and_its_content_stays(store):
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: store.create("manifest/row", b"%02d" % n), range(16)))
    assert sum(won) == 1
    assert store.read("manifest/row") == b"%02d" % won.index(True)
    assert store.list() == ["manifest/row"]


def test_create_says_no_to_a_second_writer(store):
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"


class CrashError(BaseException):
    """Like KeyboardInterrupt: no ordinary handler stops it."""


def crash(*_):
    raise CrashError


@pytest.mark.parametrize(("write", "step"), [("put", "replace"), ("create", "link")])
def test_an_interruption_before_publishing_leaves_the_old_state_and_no_rubbish(local_store, monkeypatch, write, step):
    local_store.put("other", b"x")
    monkeypatch.setattr(os, step, crash)
    with pytest.raises(CrashError):
        getattr(local_store, write)("a", b"new")
    root = Path(local_store.uri.removeprefix("file://"))
    assert [path.name for path in root.iterdir()] == ["other"]


def test_a_process_killed_while_it_writes_leaves_no_object(local_store):
    program = (
        "import os, sys; from pipeline.store import Store; os.fsync = lambda _: os._exit(9); "
        "Store(sys.argv[1]).put('videos/a.mp4', b'x' * 100_000)"
    )
    root = Path(local_store.uri.removeprefix("file://"))
    (root / "videos").mkdir(parents=True)
    assert subprocess.run([sys.executable, "-c", program, local_store.uri], check=False).returncode == 9
    assert len(list((root / "videos").iterdir())) == 1  # the temporary file
    assert local_store.list() == []
    assert not local_store.exists("videos/a.mp4")


def test_a_reader_sees_the_old_or_the_new_content_never_a_mixture(store):
    contents = [bytes([n]) * 200_000 for n in range(2)]
    store.put("a", contents[0])
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(store.put, "a", contents[n % 2]) for n in range(20)]
        reads = [pool.submit(store.read, "a") for _ in range(20)]
        assert all(read.result() in contents for read in reads)
        assert all(write.result().bytes == 200_000 for write in writes)


def test_listing_a_local_folder_is_complete_while_others_write_into_it(local_store):
    for n in range(20):
        local_store.put(f"m/{n:03d}", b"x")
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(lambda: [local_store.put("m/000", b"x") for _ in range(100)])
        while not writing.done():
            assert len(local_store.list("m")) == 20
            assert len(list_uris(f"{local_store.uri}/m")) == 20


def test_a_conflict_without_a_winner_is_worth_another_try(s3, s3_store):
    s3.fail(409, "ConditionalRequestConflict", lambda request: request.startswith("PUT"))
    with pytest.raises(StoreError, match="try again") as caught:
        s3_store.create("a", b"x")
    assert caught.value.transient


def test_an_upload_that_arrives_shorter_than_sent_is_an_error(store, monkeypatch):
    fs, path = store._at("a")
    monkeypatch.setattr(fs, "info", lambda *_: {"size": 3, "type": "file", "name": path})
    with pytest.raises(StoreError, match="3 bytes after 6 were written") as caught:
        store.put("a", b"frames")
    assert caught.value.transient


# -------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def new_clients():
    """S3 clients keep the credentials and the endpoint that they began with: none that outlives the test."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def test_a_missing_object_is_named_with_its_cause(store):
    with pytest.raises(StoreMissingError, match=r"cannot read '.*videos/a\.mp4': .* not exist") as caught:
        store.read("videos/a.mp4")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert not caught.value.transient


def test_a_missing_bucket_is_no_empty_folder(s3):
    nowhere = Store("s3://no-such-bucket-anywhere/run")
    for act in (nowhere.list, nowhere.check_writable, lambda: nowhere.put("a", b"")):
        with pytest.raises(StoreMissingError, match="bucket"):
            act()


@pytest.mark.parametrize("act", ["read", "list", "exists", "put", "create", "delete"])
def test_a_refused_access_is_an_error_at_once_and_never_an_absence(s3, s3_store, act):
    s3_store.put("a/b", b"x")
    s3.fail(403, "AccessDenied")
    s3.requests.clear()
    with pytest.raises(StoreForbiddenError, match="access was refused") as caught:
        getattr(s3_store, act)("a/b", *([b"y"] if act in ("put", "create") else []))
    assert isinstance(caught.value.__cause__, PermissionError)
    assert not caught.value.transient
    # A DELETE comes as two requests: s3fs looks for a bucket's name first.
    assert len(s3.requests) <= 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(local_store, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreForbiddenError, match="access was refused"):
        local_store.put("a", b"")


def test_a_local_permission_error_is_a_refusal(local_store, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreForbiddenError, match="permissions"):
        local_store.put("a", b"")


def test_missing_credentials_are_a_refusal_that_says_what_to_set(s3_store, monkeypatch, new_clients):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreForbiddenError, match="AWS_PROFILE"):
        s3_store.read("a")


def test_the_storage_options_of_the_documentation_reach_the_client(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    options = yaml.safe_load(page[page.index("storage_options:") :].split("```")[0])["storage_options"]
    fs, _ = open_fs("s3://bucket/folder", options)
    fs.connect()
    client = fs.s3.meta
    assert client.endpoint_url == "https://objects.example.com"
    assert client.region_name == "eu-central-1"
    assert client.config.s3["addressing_style"] == "path"
    assert (client.config.read_timeout, client.config.connect_timeout) == (120, 5)
    assert client.config.retries == {"mode": "adaptive", "total_max_attempts": 8}
    assert fs.req_kw == {"RequestPayer": "requester"}


def test_a_failing_server_is_asked_as_often_as_configured_and_no_more(s3, s3_store):
    twice = {"retries": {"mode": "standard", "total_max_attempts": 2}}
    s3.fail(503, "SlowDown")
    s3.requests.clear()
    with pytest.raises(StoreError, match="SlowDown") as caught:
        Store(s3_store.uri, {"config_kwargs": twice}).read("a")
    assert caught.value.transient
    assert len(s3.requests) == 2


def test_a_short_storm_is_ridden_out(s3, s3_store):
    s3_store.put("a", b"x")
    storm = iter([True, True])
    s3.fail(503, "SlowDown", lambda request: next(storm, False))
    assert s3_store.read("a") == b"x"


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [(500, "InternalError", True), (503, "ServiceUnavailable", True), (429, "TooManyRequests", True),
     (400, "InvalidArgument", False), (405, "MethodNotAllowed", False), (418, "Teapot", False)],
)  # fmt: skip
def test_a_servers_status_tells_whether_to_try_again(s3, s3_store, status, code, transient):
    s3.fail(status, code)
    with pytest.raises(StoreError) as caught:
        one_try(s3_store).read("a")
    assert caught.value.transient is transient


def test_an_unreachable_endpoint_is_transient(monkeypatch, s3, new_clients):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="endpoint") as caught:
        one_try(Store("s3://bucket/run")).read("a")
    assert caught.value.transient


def test_an_error_keeps_its_judgement_across_processes():
    error = pickle.loads(pickle.dumps(StoreMissingError("gone", transient=True)))
    assert (type(error), str(error), error.transient) == (StoreMissingError, "gone", True)


def test_check_writable_leaves_nothing_behind(store):
    store.check_writable()
    assert store.list() == []


def test_check_writable_tells_about_a_file_in_the_way(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written to"):
        Store(f"{tmp_path}/runs/one").check_writable()


def test_check_writable_finds_storage_that_ignores_conditions(s3_store, monkeypatch):
    monkeypatch.setattr(Store, "_create", lambda self, fs, path, data: fs.pipe_file(path, data))
    with pytest.raises(StoreError, match="ignores conditional writes"):
        s3_store.check_writable()
    assert s3_store.list() == []


def test_a_file_system_without_hard_links_is_named(local_store, monkeypatch):
    def unsupported(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    with pytest.raises(StoreError, match="no hard links"):
        local_store.check_writable()


def test_outputs_are_written_to_local_folders_and_s3_only():
    with pytest.raises(StoreError, match="only a local folder and s3://"):
        Store("https://host/run").put("a", b"")


@pytest.mark.parametrize(
    "uri",
    ["nonsense://a/b", "memory://a", "filecache::{url}/authorized_keys", "simplecache::{url}/a", "reference://a",
     "blockcache::file:///etc/passwd", "zip://a::{url}/a.zip", "dir::{url}/a", "ftp://host/a", "github://a:b@/c"],
)  # fmt: skip
def test_a_protocol_that_is_not_listed_is_refused_before_anything_is_fetched(uri, tmp_path, web):
    options = {"filecache": {"cache_storage": str(tmp_path / ".ssh"), "same_names": True}}
    web["authorized_keys"] = web["a"] = web["a.zip"] = b"an attacker's"
    for act in (read_uri, list_uris, fingerprint, sha256_of, Store):
        for given in ({}, options):
            with pytest.raises(StoreError, match=r"cannot open .*only file://.*s3://"):
                act(uri.format(url=web.url), storage_options=given)
    assert list(tmp_path.iterdir()) == []
    assert web.requests == []


def nested(depth: int) -> dict:
    options: dict = {}
    for _ in range(depth):
        options = {"client_kwargs": options}
    return options


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"filecache": {"cache_storage": "/home/me/.ssh", "same_names": True}}, "filecache"),
        ({"fo": {"templates": {"a": "{{ 9 ** 9 ** 9 }}"}}}, "fo"),
        ({"default_cache_type": "mmap"}, "default_cache_type"),
        ({"cache_options": {"location": "/home/me/.profile"}}, "cache_options"),
        ({"client_kwargs": {"verify": "/etc/shadow"}}, "client_kwargs.verify"),
        ({"config_kwargs": {"client_cert": "/home/me/key.pem"}}, "config_kwargs.client_cert"),
        ({"config_kwargs": {"retries": {"total_max_attempts": "many"}}}, "config_kwargs.retries.total_max_attempts"),
        ({"s3_additional_kwargs": {"ACL": "public-read"}}, "s3_additional_kwargs.ACL"),
        ({"account_host": "evil.example.com"}, "account_host"),
        ({"endpoint": "https://evil.example.com"}, "endpoint"),
        ({"endpoint_url": "file:///etc"}, "endpoint_url"),
        ({"anon": "yes"}, "anon"),
        ({"client_kwargs": 5}, "client_kwargs"),
        (nested(5000), "client_kwargs.client_kwargs"),
    ],
)
def test_an_option_that_is_not_listed_is_refused_by_its_key(options, key, tmp_path):
    for uri in ("s3://bucket/run", "https://host/a", str(tmp_path)):
        with pytest.raises(StoreOptionsError, match="expected|no such option") as caught:
            open_fs(uri, options)
        assert caught.value.key == f"storage_options.{key}"
        assert str(caught.value).startswith(f"storage_options.{key}: ")
        with pytest.raises(StoreOptionsError):
            Store(uri, options)


def test_one_set_of_options_serves_several_protocols_and_each_takes_its_own(tmp_path):
    given = {"endpoint_url": "http://127.0.0.1:9", "headers": {"Via": "me"}, "client_kwargs": {"trust_env": True},
             "config_kwargs": {"retries": {"mode": "legacy"}}}  # fmt: skip
    assert options_for("file", given) == {}
    assert options_for("https", given) == {key: given[key] for key in ("headers", "client_kwargs")}
    taken = options_for("s3", given)
    assert taken == {
        "endpoint_url": given["endpoint_url"],
        "client_kwargs": {},
        "config_kwargs": given["config_kwargs"],
    }
    taken["config_kwargs"]["retries"]["mode"] = "adaptive"
    assert given["config_kwargs"]["retries"]["mode"] == "legacy"
    assert options_for("gs", {"token": "anon"}) == {"token": "anon"}


def test_what_an_address_says_of_its_server_counts_as_little_as_an_option(monkeypatch):
    class Azure:
        _get_kwargs_from_urls = staticmethod(lambda uri: {"account_name": "me", "account_host": "evil.example.com"})
        _strip_protocol = staticmethod(str)

        def __init__(self, **options):
            self.options = options

    monkeypatch.setattr(store_module.fsspec, "get_filesystem_class", lambda protocol: Azure)
    fs, _ = open_fs("abfss://container@evil.example.com/a")
    assert fs.options == {"account_name": "me", "use_listings_cache": False}


# ------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "name",
    [
        "key", "secret", "token", "password", "Secret", "aws_secret_access_key", "Authorization", "sas_token",
        "passphrase", "secret_key", "X-Auth-Token", "SSECustomerKey", "Set-Cookie", "auth", "connection_string",
        "aws_access_key_id",
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_credentials_among_the_options_are_refused_by_name_without_their_value(name, nested):
    options = {name: "s3cr3t-value"}
    with pytest.raises(StoreError, match=f"hold the credentials {name}") as caught:
        Store("s3://bucket/run", {"client_kwargs": options} if nested else options)
    assert "s3cr3t-value" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"config_kwargs": {"proxies": {"https": "http://me:s3cr3t@proxy:3128"}}},
        {"mirrors": ["https://me:s3cr3t@host"]},
        {"hosts": [{"token": "s3cr3t"}]},
        {"headers": {"X-Api-Version": "Bearer s3cr3t-value"}},
    ],
)
def test_credentials_at_any_depth_of_the_options_are_refused(options):
    with pytest.raises(StoreError, match="hold the credentials") as caught:
        Store("s3://bucket/run", options)
    assert "s3cr3t" not in str(caught.value)


def test_options_that_are_no_credentials_are_taken():
    options = {"anon": True, "token": None, "config_kwargs": {"signature_version": "s3v4"}}
    key = {"s3_additional_kwargs": {"SSEKMSKeyId": "arn:aws:kms:x"}}
    Store("s3://bucket/run", {**options, **key, "endpoint_url": "https://host:9000"})


def test_credentials_in_an_s3_uri_are_refused_without_showing_them():
    with pytest.raises(StoreError, match="AWS_PROFILE") as caught:
        Store("s3://AKIAABCDEFGHIJKLMNOP:s3cr3t@bucket/run")
    assert "s3cr3t" not in str(caught.value)


SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzEXAMPLEKEY"
LEAKS = [
    "aws_secret_access_key={}", "aws_secret_access_key = {}", "AWS_SECRET_ACCESS_KEY: {}", "secret='{}'",
    '{{"secretAccessKey": "{}"}}', "password={} user=me", "token: {}", "x-amz-security-token: {}",
    "session_token={}", "api_key={}", "client_secret={}", "Authorization: Bearer {}",
    "'Authorization': 'AWS4-HMAC-SHA256 Credential=AKIA/x, Signature={}'", "Bearer {}",
    "https://user:{}@host/a.mp4", "s3://AKIAIOSFODNN7EXAMPLE:{}@bucket/a", "postgresql://{}@host/db",
    "https://host/a.mp4?X-Amz-Credential={}&x=1", "https://host/a.mp4?x=1&X-Amz-Signature={}",
    "https://host/a?X-Amz-Security-Token={}", "https://host/a?AWSAccessKeyId=A&Signature={}",
    "https://host/a?sv=1&sig={}", "https://host/a?unknown-name={}", "https://user:p@{}@host/a",
    "DefaultEndpointsProtocol=https;AccountName=x;AccountKey={};", "Cookie: session={}", "sas_token={}",
    "passphrase={}", "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("secret", [SECRET.replace("/", "%2F"), "abc123", "p.a-s_s~w=rd"])
def test_secrets_are_redacted(leak, secret):
    assert secret not in redact(leak.format(secret))
    assert "***" in redact(leak.format(secret))


def test_access_key_ids_and_the_environments_secrets_are_redacted_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MY_SERVICE_TOKEN", "tok-1234567")
    text = redact(f"signing with AKIAIOSFODNN7EXAMPLE over {SECRET} gave tok-1234567 and hf_abcdefghijklmnopqrst")
    assert text == "signing with *** over *** gave *** and ***"
    for known in ("ghp_" + 36 * "a", "glpat-" + 20 * "b", "ya29." + 30 * "c", f"eyJ{9 * 'd'}.eyJ{9 * 'e'}.{9 * 'f'}"):
        assert redact(f"got {known} there") == "got *** there"


@pytest.mark.parametrize("name", ["AZURE_STORAGE_CONNECTION_STRING", "STORAGE_KEY", "ZIP_PASSPHRASE", "BLOB_SAS"])
def test_values_of_secret_variables_are_redacted_and_the_current_folder_is_none(monkeypatch, name):
    monkeypatch.setenv(name, "lemon-1234567")
    monkeypatch.setenv("PWD", "/data/folder")
    assert redact("lemon-1234567 in /data/folder") == "*** in /data/folder"


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/refs/a b@2x.mp4", "file:///data/0123456789abcdef0123456789abcdef01234567.mp4",
     "https://host:8080/a.mp4", "the tokenizer failed", "a secretary types at http://host/a@b"],
)  # fmt: skip
def test_harmless_text_stays_as_it_is(text):
    assert redact(text) == text


def test_an_error_never_shows_the_credentials_of_its_uri():
    with pytest.raises(StoreError) as caught:
        read_uri("nonsense://user:s3cr3t@host/a.mp4?X-Amz-Signature=abcdef")
    assert "s3cr3t" not in str(caught.value)
    assert "abcdef" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- inputs


@pytest.fixture
def references(store):
    for key in ("refs/b.mp4", "refs/a.mp4", "refs/notes.txt", "refs/day/c.mp4", "refs/.hidden.mp4"):
        store.put(key, key.encode())
    return store


@pytest.mark.parametrize(
    ("uri", "glob", "found"),
    [
        ("refs", "*.mp4", ["refs/a.mp4", "refs/b.mp4"]),
        ("refs/", "*.mp4", ["refs/a.mp4", "refs/b.mp4"]),
        ("refs", "*", ["refs/a.mp4", "refs/b.mp4", "refs/notes.txt"]),
        ("refs", "**/*.mp4", ["refs/a.mp4", "refs/b.mp4", "refs/day/c.mp4"]),
        ("refs", "*/c.mp4", ["refs/day/c.mp4"]),
        ("refs", "[ab].mp4", ["refs/a.mp4", "refs/b.mp4"]),
        ("refs/b.mp4", "*.avi", ["refs/b.mp4"]),
        ("refs/?.mp4", "*", ["refs/a.mp4", "refs/b.mp4"]),
        ("re*/day/*.mp4", "*", ["refs/day/c.mp4"]),
    ],
)
def test_a_file_a_folder_and_a_pattern_name_files(references, uri, glob, found):
    assert list_uris(f"{references.uri}/{uri}", glob) == [references.uri_of(key) for key in found]


@pytest.mark.parametrize(("uri", "glob"), [("refs", "*.avi"), ("nothing/*.mp4", "*")])
def test_a_pattern_without_matches_is_an_error(references, uri, glob):
    with pytest.raises(StoreMissingError, match="no file matches"):
        list_uris(f"{references.uri}/{uri}", glob)


@pytest.mark.parametrize("glob", ["*.mp4", "**/*.mp4"])
def test_a_refused_listing_is_not_an_empty_one(s3, s3_store, glob):
    s3_store.put("refs/a.mp4", b"x")
    s3.fail(403, "AccessDenied", lambda request: "list-type" in request and "max-keys" not in request)
    with pytest.raises(StoreForbiddenError):
        list_uris(f"{s3_store.uri}/refs", glob)


def test_a_plain_path_is_an_input_too(tmp_path):
    (tmp_path / "a b.mp4").write_bytes(b"x")
    assert list_uris(str(tmp_path), "*.mp4") == [f"file://{tmp_path}/a b.mp4"]
    assert read_uri(f"{tmp_path}/a b.mp4") == b"x"


def test_the_fingerprint_changes_with_the_content_and_only_then(store):
    store.put("a", b"one")
    before = fingerprint(store.uri_of("a"))
    assert fingerprint(store.uri_of("a")) == before
    store.put("a", b"two")
    if store._local:  # file systems may round times to more than this test takes
        os.utime(store.uri_of("a").removeprefix("file://"), (0, 0))
    assert fingerprint(store.uri_of("a")) != before


def test_the_fingerprint_of_a_missing_file_and_of_a_folder_are_errors(store):
    store.put("folder/a", b"x")
    with pytest.raises(StoreMissingError):
        fingerprint(store.uri_of("nothing"))
    with pytest.raises(StoreError, match="folder, not a file"):
        fingerprint(store.uri_of("folder"))


def test_the_hash_is_of_every_piece_of_a_streamed_file(store, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 1000)
    data = os.urandom(2500)
    store.put("a", data)
    assert sha256_of(store.uri_of("a")) == hashlib.sha256(data).hexdigest()
    with pytest.raises(StoreMissingError):
        sha256_of(store.uri_of("nothing"))


# ---------------------------------------------------------------------------------------------- odd entries


def names_of(folder: Path | str, glob: str = "*.mp4") -> list[str]:
    return [uri.rsplit("/", 1)[-1] for uri in list_uris(str(folder), glob)]


@pytest.fixture
def clips(tmp_path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"a")
    return folder


@pytest.fixture
def without_privileges():
    """Permissions count for root too while this thread, and those that it starts, lack CAP_DAC_*."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    assert libc.capset(header, (ctypes.c_uint32 * 6)(before[0] & ~0b110, *before[1:])) == 0
    yield
    assert libc.capset(header, before) == 0


def special_file(path: Path, kind: str) -> None:
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix, chdir(path.parent):
            unix.bind(path.name)
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_only_regular_files_are_opened(clips, kind):
    special_file(clips / "b.mp4", kind)
    assert names_of(clips) == ["a.mp4", "b.mp4"]
    for act in (read_uri, fingerprint, sha256_of, lambda uri: Store(str(clips)).read_start("b.mp4", 1)):
        with pytest.raises(StoreError, match=f"it is a {kind}.*only regular files are read") as caught:
            act(f"file://{clips}/b.mp4")
        assert not caught.value.transient


@pytest.mark.parametrize("glob", ["*.mp4", "**/*.mp4"])
def test_a_link_that_leads_nowhere_or_to_itself_is_listed_and_cannot_be_read(clips, glob):
    (clips / "gone.mp4").symlink_to("nowhere.mp4")
    (clips / "self.mp4").symlink_to("self.mp4")
    assert names_of(clips, glob) == ["a.mp4", "gone.mp4", "self.mp4"]
    with pytest.raises(StoreMissingError, match=r"symbolic link to 'nowhere\.mp4'"):
        fingerprint(f"{clips}/gone.mp4")
    with pytest.raises(StoreError, match="symbolic links"):
        fingerprint(f"{clips}/self.mp4")
    assert names_of(clips / "self.mp4") == ["self.mp4"]


def test_links_to_folders_above_are_not_followed_for_ever(clips):
    (clips / "one").mkdir()
    (clips / "one" / "b.mp4").write_bytes(b"b")
    for name, target in {"here": ".", "one/up": "..", "one/above": "../..", "other": "one"}.items():
        (clips / name).symlink_to(target)
    found = [uri.removeprefix(f"file://{clips}/") for uri in list_uris(str(clips), "**/*.mp4")]
    assert found == ["a.mp4", "one/b.mp4", "other/b.mp4"]
    assert Store(str(clips)).list() == found


def test_a_folder_that_cannot_be_listed_matters_only_to_patterns_that_lead_into_it(clips, without_privileges):
    (clips / "lost+found").mkdir()
    (clips / ".Trash").mkdir(mode=0)
    (clips / "lost+found").chmod(0)
    assert names_of(clips) == ["a.mp4"]
    for glob in ("**/*.mp4", "*/*.mp4"):
        assert names_of(clips, glob)[-1] == "lost+found"
    with pytest.raises(StoreForbiddenError, match=r"lost\+found': access was refused.*permissions"):
        fingerprint(f"{clips}/lost+found")
    with pytest.raises(StoreForbiddenError):
        list_uris(f"{clips}/lost+found")


@pytest.mark.parametrize("glob", ["*/shots/*.mp4", "*/[st]hots/*.mp4", "*/**/*.mp4"])
def test_a_folder_that_is_a_link_to_itself_matters_to_no_other(clips, glob):
    (clips / "one" / "shots").mkdir(parents=True)
    (clips / "one" / "shots" / "b.mp4").write_bytes(b"b")
    (clips / "two").mkdir()
    (clips / "two" / "shots").symlink_to("shots")
    assert names_of(clips, glob) in (["b.mp4"], ["b.mp4", "shots"])


def test_a_folder_whose_disk_is_gone_is_one_row(clips, monkeypatch):
    (clips / "mount").mkdir()
    scandir = os.scandir

    def broken(path):
        if str(path).endswith("mount"):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    assert names_of(clips, "*/*.mp4") == names_of(clips, "**/*.mp4")[1:] == ["mount"]


def test_an_accent_is_the_same_however_it_is_written(store):
    """macOS takes letters apart: an e and an accent."""
    store.put("refs/cafe\u0301.mp4", b"x")
    assert list_uris(f"{store.uri}/refs", "caf\u00e9*.mp4") == [store.uri_of("refs/cafe\u0301.mp4")]


def test_a_name_that_only_looks_the_same_is_said_to(tmp_path):
    (tmp_path / "cafe\u0301.mp4").write_bytes(b"x")
    for act in (read_uri, list_uris):
        with pytest.raises(StoreMissingError, match="looks the same, of other Unicode characters"):
            act(f"file://{tmp_path}/caf\u00e9.mp4")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("${DATA}/a.mp4", "'[$][{]', which is not filled in here"),
        ("*.{mp4,mov}", "braces are no pattern: give a list"),
        ("C:\\clips\\a.mp4", "a path of Windows"),
    ],
)
def test_what_is_wrong_with_an_address_that_leads_nowhere_is_said(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreMissingError, match=said):
        list_uris(name)


def test_no_folder_above_or_beside_the_pattern_is_looked_into(clips, monkeypatch):
    (clips / "sub" / "deep").mkdir(parents=True)
    (clips / "sub" / "b.mp4").write_bytes(b"b")
    looked_into, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked_into.append(str(path)) or scandir(path))
    assert names_of(f"{clips}/*.mp4") == names_of(clips) == ["a.mp4"]
    assert set(looked_into) == {str(clips)}
    assert names_of(clips.parent, "clips/s*/*.mp4") == ["b.mp4"]
    assert str(clips / "sub" / "deep") not in looked_into


def test_only_the_level_that_is_asked_for_is_listed_on_s3(s3, s3_store):
    s3.fill(s3_store.uri, ["refs/a.mp4", "refs/day/b.mp4", "refs/day/deep/c.mp4", "elsewhere/d.mp4"])
    s3.requests.clear()
    assert list_uris(f"{s3_store.uri}/refs", "*/*.mp4") == [f"{s3_store.uri}/refs/day/b.mp4"]
    assert all("delimiter=%2F" in request for request in s3.requests if "list-type" in request)


@pytest.mark.parametrize("name", ["[2024]", "take [1] of 3"])
def test_brackets_in_the_name_of_a_folder_are_no_pattern(store, name):
    store.put(f"{name}/a.mp4", b"a")
    store.put("2/b.mp4", b"b")
    assert list_uris(f"{store.uri}/{name}/*.mp4") == [store.uri_of(f"{name}/a.mp4")]
    assert list_uris(store.uri, f"{name}/*.mp4") == [store.uri_of(f"{name}/a.mp4")]
    with pytest.raises(StoreMissingError, match="none.mp4' does not exist"):
        list_uris(f"{store.uri}/{name}/none.mp4")


def test_brackets_are_a_pattern_where_no_folder_has_the_name(store):
    store.put("2/b.mp4", b"b")
    assert list_uris(f"{store.uri}/[2024]/*.mp4") == [store.uri_of("2/b.mp4")]
    with pytest.raises(StoreMissingError, match=r"a bracket that is part of a name is written \[\[\]"):
        list_uris(f"{store.uri}/[3]/*.mp4")


def test_an_object_with_the_name_of_a_folder_hides_no_file_of_it(s3, s3_store):
    s3.fill(s3_store.uri, ["refs", "refs/", "refs/a.mp4", "b.mp4", "b.mp4/part"])
    found = [f"{s3_store.uri}/refs/a.mp4"]
    assert list_uris(f"{s3_store.uri}/refs", "*.mp4") == list_uris(f"{s3_store.uri}/refs/", "*.mp4") == found
    assert list_uris(f"{s3_store.uri}/refs", "**/*.mp4") == found
    assert list_uris(f"{s3_store.uri}/b.mp4", "*.mp4") == [f"{s3_store.uri}/b.mp4"]


def test_keys_below_a_leading_slash_are_listed_and_written(s3):
    store = Store(f"s3://{s3.new_bucket()}//lead")
    store.put("refs/a.mp4", b"a")
    store.put("refs/day/b.mp4", b"b")
    assert store.list() == ["refs/a.mp4", "refs/day/b.mp4"]
    for glob, keys in {"*.mp4": ["refs/a.mp4"], "**/*.mp4": store.list(), "*/*.mp4": ["refs/day/b.mp4"]}.items():
        assert list_uris(f"{store.uri}/refs/", glob) == [store.uri_of(key) for key in keys]
    assert read_uri(list_uris(f"{store.uri}/r*/*.mp4")[0]) == b"a"


def test_a_file_uri_may_name_the_host_and_be_percent_encoded(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "c%20d.mp4").write_bytes(b"x")
    found = [f"file://{tmp_path}/a b/c%20d.mp4"]
    for uri in (f"file://localhost{tmp_path}/a%20b", f"file://{tmp_path}/a%20b", f"file:{tmp_path}/a b", *found):
        assert list_uris(uri, "*.mp4") == found
    assert read_uri(f"file://localhost{tmp_path}/a b/c%20d.mp4") == b"x"
    assert Store(f"file://localhost{tmp_path}").uri == Store(f"file:{tmp_path}").uri == f"file://{tmp_path}"


def test_whatever_takes_an_address_decodes_it(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "c.mp4").write_bytes(b"x")
    encoded = f"FILE://localhost{tmp_path}/a%20b"
    assert list_uris(f"{encoded}/*.mp4") == [f"file://{tmp_path}/a b/c.mp4"]
    assert read_uri(f"{encoded}/c.mp4") == b"x"
    assert Store(f"{encoded}/new").uri == f"file://{tmp_path}/a b/new"
    assert local_folder(encoded) == f"{tmp_path}/a b"
    assert Store(f"file://{tmp_path}/no%20b/new").uri == f"file://{tmp_path}/no%20b/new"


def test_a_protocol_may_be_written_in_capitals(s3, s3_store):
    s3_store.put("a.mp4", b"a")
    capitals = s3_store.uri.replace("s3://", "S3://")
    assert read_uri(f"{capitals}/a.mp4") == b"a"
    assert Store(capitals).uri == s3_store.uri
    assert list_uris(capitals, "*.mp4") == [s3_store.uri_of("a.mp4")]


def test_a_single_missing_file_is_said_to_be_missing(store):
    with pytest.raises(StoreMissingError, match=r"gone\.mp4' does not exist"):
        list_uris(f"{store.uri}/gone.mp4", "*.mp4")


def test_an_ending_in_capitals_is_the_same_ending(store):
    for name in ("a.mp4", "B.MP4", "c.Mp4", "A.mov"):
        store.put(f"refs/{name}", b"x")
    assert [uri.rsplit("/", 1)[-1] for uri in list_uris(f"{store.uri}/refs", "*.mp4")] == ["B.MP4", "a.mp4", "c.Mp4"]
    assert list_uris(f"{store.uri}/refs/a*.mp4") == [store.uri_of("refs/a.mp4")]


def test_hidden_folders_are_passed_over_unless_the_pattern_names_them(store):
    store.put("refs/.cache/a.mp4", b"x")
    store.put("refs/b.mp4", b"x")
    assert list_uris(f"{store.uri}/refs", "**/*.mp4") == [store.uri_of("refs/b.mp4")]
    assert list_uris(f"{store.uri}/refs", ".c*/*.mp4") == [store.uri_of("refs/.cache/a.mp4")]


def test_a_pattern_that_mixes_two_stars_with_a_name_is_refused(store):
    store.put("refs/b.mp4", b"x")
    with pytest.raises(StoreError, match=r"stands alone between slashes"):
        list_uris(f"{store.uri}/refs", "**.mp4")


def test_a_refused_object_does_not_blame_the_credentials(s3, s3_store):
    s3_store.put("a", b"x")
    s3.fail(403, "AccessDenied")
    for act in (read_uri, fingerprint, sha256_of):
        with pytest.raises(StoreForbiddenError, match="access was refused") as caught:
            act(s3_store.uri_of("a"))
        assert "AWS_PROFILE" not in str(caught.value)
        assert not isinstance(caught.value, StoreCredentialsError)
    s3.fail(403, "InvalidObjectState")
    with pytest.raises(StoreForbiddenError, match=r"archived \(Glacier\): restore it"):
        read_uri(s3_store.uri_of("a"))
    s3.fail(403, "InvalidAccessKeyId")
    with pytest.raises(StoreCredentialsError, match="AWS_PROFILE"):
        read_uri(s3_store.uri_of("a"))


# ------------------------------------------------------------------------------------- addresses that are written down


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("https://host/a b.mp4?X-Amz-Signature=abc&next=https://x/y", "https://host/a b.mp4"),
        ("https://user:p@ss@host:8/a@b.mp4?t=1#f", "https://host:8/a@b.mp4"),
        ("simplecache::https://user@host/a.mp4?sig=x", "simplecache::https://host/a.mp4"),
        ("sftp://me:secret@host/a?b.mp4", "sftp://host/a?b.mp4"),
        (
            "abfss://container@account.dfs.core.windows.net/a.mp4",
            "abfss://container@account.dfs.core.windows.net/a.mp4",
        ),
        ("az://container/a.mp4?sv=1&sig=x", "az://container/a.mp4"),
        ("webdav://host/a.mp4?token=x", "webdav://host/a.mp4"),
        ("s3://bucket/a.mp4?versionId=x", "s3://bucket/a.mp4?versionId=x"),
        ("s3://bucket/q?x=1&y#z@w.mp4", "s3://bucket/q?x=1&y#z@w.mp4"),
        ("file:///a/q?x@y#z%20.mp4", "file:///a/q?x@y#z%20.mp4"),
        ("file:///a/caf\udce9 %.mp4", "file:///a/caf%E9 %25.mp4"),
    ],
)
def test_what_is_written_of_an_address_holds_no_secret(uri, written):
    assert public_uri(uri) == public_uri(written) == written or "\udce9" in uri
    assert public_uri(uri) == written


def test_a_name_that_is_no_utf8_is_found_again_by_what_is_written_of_it(tmp_path):
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9%.mp4")).write_bytes(b"x")
    (found,) = list_uris(str(tmp_path), "*.mp4")
    written = public_uri(found)
    assert written.encode().endswith(b"/caf%E9%25.mp4")
    assert read_uri(absolute_uri(written)) == read_uri(found) == b"x"


@pytest.mark.parametrize(
    "uri", ["${OUT}/run", "$OUT/run", "s3://${BUCKET}/run", "$(pwd)/run", "{{ out }}/run", "~nobody-here/run"]
)
def test_a_variable_that_nobody_filled_in_makes_no_folder(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="is not filled in here"):
        Store(uri)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "is empty"),
        (" s3://bucket/run", "the protocol ' s3' is not opened here"),
        ("out\n", "white space"),
        ("s3://", "names no bucket"),
        ("C:\\run", "a path of Windows"),
        ("C:/run", "a path of Windows"),
        ("\\\\server\\run", "a path of Windows"),
        ("%OUT%/run", "'%OUT%', which is not filled in"),
        ("<OUT>/run", "'<OUT>', which is not filled in"),
        ("s3://bucket/{date}/run", "'{date}', which is not filled in"),
        ("`pwd`/run", "'`', which is not filled in"),
    ],
)
def test_what_is_no_place_makes_no_folder(uri, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=re.escape(said)):
        Store(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/cache", "${TMP}/cache", "s3:bucket/cache"])
def test_a_folder_of_this_machine_is_nothing_else(uri):
    with pytest.raises(StoreError):
        local_folder(uri)


def test_a_folder_that_is_called_like_a_variable_can_be_used(tmp_path):
    (tmp_path / "$cash").mkdir()
    Store(f"{tmp_path}/$cash").put("a", b"x")


@pytest.mark.parametrize(
    ("uri", "meant"), [("s3:bucket/run", "s3://bucket/run"), ("s3:/bucket/run", "s3://bucket/run")]
)
def test_a_protocol_without_slashes_is_refused_with_the_address_that_was_meant(uri, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for act in (Store, list_uris, read_uri):
        with pytest.raises(StoreError, match=f"Write {meant}"):
            act(uri)
    (tmp_path / "s3:bucket").mkdir()
    Store("s3:bucket").put("a", b"x")
    assert Store("take:1/run").uri == f"file://{tmp_path}/take:1/run"


@pytest.mark.parametrize("uri", ["https://host/banks?sig=x", "https://user:pass@host/banks"])
def test_a_folder_with_secrets_in_its_address_is_refused(uri):
    with pytest.raises(StoreError, match="holds a password or a signature") as caught:
        Store(uri)
    assert "sig=x" not in str(caught.value)
    assert "pass@" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- left-overs


def test_temporary_files_of_writers_that_died_are_removed(local_store):
    local_store.put("videos/a.mp4", b"1")
    root = Path(local_store.uri.removeprefix("file://"))
    (root / f"videos/.tmp-{'1' * 32}").write_bytes(b"half")
    (root / "banks").mkdir()
    (root / f"banks/.tmp-{'2' * 32}").write_bytes(b"")
    (root / "videos/.tmp-of-mine").write_bytes(b"")
    assert local_store.unfinished() == [f"banks/.tmp-{'2' * 32}", f"videos/.tmp-{'1' * 32}"]
    assert local_store.remove_unfinished() == 2
    assert sorted(path.name for path in root.rglob("*")) == [".tmp-of-mine", "a.mp4", "videos"]
    assert local_store.remove_unfinished() == 0


def test_uploads_of_writers_that_died_are_aborted_and_those_of_other_folders_are_not(s3_store):
    s3_store.put("a", b"1")
    fs, root = s3_store._at("")
    bucket, folder, _ = fs.split_path(root)
    for key in (f"{folder}/videos/half.mp4", f"{folder}-of-another/half.mp4"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert s3_store.remove_unfinished() == 1
    assert s3_store.remove_unfinished() == 0
    assert [one["Key"] for one in fs.list_multipart_uploads(bucket)] == [f"{folder}-of-another/half.mp4"]


# ---------------------------------------------------------------------------------------------------- patience


class Clock:
    """Time that passes only in pauses."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.pauses = 0.0, []
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_an_error_that_passes_is_waited_out_and_one_that_does_not_is_raised_at_once(monkeypatch):
    clock, errors = Clock(monkeypatch), [StoreError("503", transient=True)] * 9

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patiently(work, 300.0, clock.sleep) == "done"
    assert len(clock.pauses) == 9
    assert max(clock.pauses) <= store_module.LONGEST_PAUSE_S
    errors.append(StoreMissingError("gone"))
    with pytest.raises(StoreMissingError):
        patiently(work, 300.0, clock.sleep)
    assert len(clock.pauses) == 9


def test_patience_ends_with_the_storages_own_error(monkeypatch):
    clock, tries = Clock(monkeypatch), []

    def work() -> None:
        tries.append(1)
        raise StoreError(f"try {len(tries)}", transient=True)

    with pytest.raises(StoreError) as caught:
        patiently(work, 100.0, clock.sleep)
    assert str(caught.value) == f"try {len(tries)}"
    assert 100 - store_module.LONGEST_PAUSE_S <= clock.now <= 100 + store_module.LONGEST_PAUSE_S


def test_every_operation_of_a_patient_store_waits_and_none_of_an_impatient_one(local_store, monkeypatch):
    local_store.put("a", b"1")
    failures: list[int] = []
    real = store_module.open_fs

    def stuttering(*arguments):
        if failures:
            failures.pop()
            raise StoreError("throttled", transient=True)
        return real(*arguments)

    monkeypatch.setattr(store_module, "open_fs", stuttering)
    monkeypatch.setattr(store_module, "LONGEST_PAUSE_S", 0.0)
    operations = [
        lambda store: store.read("a"), lambda store: store.exists("a"), lambda store: store.list(),
        lambda store: store.put("b", b"2"), lambda store: store.create("c", b"3"), lambda store: store.delete("c"),
    ]  # fmt: skip
    for operation in operations:
        failures[:] = [1, 1]
        operation(Store(local_store.uri, patience_s=60.0))
        assert failures == []
        failures[:] = [1]
        with pytest.raises(StoreError, match="throttled"):
            operation(Store(local_store.uri))
    assert pickle.loads(pickle.dumps(Store("/x", patience_s=7.0))).patience_s == 7.0


# --------------------------------------------------------------------------------------------------- files


def test_a_file_is_stored_as_its_content_would_be(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 1000)
    content = bytes(range(256)) * 40
    file = tmp_path / "bank.safetensors"
    file.write_bytes(content)
    assert store.put("banks/a", file) == store.put("banks/a", content)
    assert store.read("banks/a") == content


def test_writing_where_it_is_not_allowed_says_that_nothing_can_be_written(local_store):
    local_store.put("folder/a", b"")
    folder = Path(local_store.uri.removeprefix("file://")) / "folder"
    folder.joinpath("blocked").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        local_store.put("folder/blocked/b", b"")  # a file where a folder is wanted: no question of rights
    assert not isinstance(caught.value, StoreUnwritableError)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        assert isinstance(store_module._store_error("write", "/x", OSError(number, "full")), StoreUnwritableError)
    assert isinstance(store_module._store_error("create", "/x", PermissionError("no")), StoreUnwritableError)
    assert not isinstance(store_module._store_error("read", "/x", PermissionError("no")), StoreUnwritableError)


# ------------------------------------------------------------------------------------------- answers without an end


def endless(answer, piece=b"<a href='x.mp4'>" * 4096):
    """Send for as long as anybody takes it."""
    answer.send_header("Content-Type", "text/html")
    answer.end_headers()
    while answer.command == "GET":
        answer.wfile.write(piece)


def bomb(answer):
    """Send 64 MB in 64 KB, packed though nobody asked for that."""
    answer.send_header("Content-Encoding", "gzip")
    answer.end_headers()
    if answer.command == "GET":
        answer.wfile.write(gzip.compress(bytes(64_000_000)))


def hopping(answer):
    """Redirect to the same address, again and again."""
    answer._headers_buffer = [b"HTTP/1.1 302 Found\r\n"]
    answer.send_header("Location", answer.path)
    answer.send_header("Connection", "close")
    answer.send_header("Content-Length", "0")
    answer.end_headers()


@pytest.fixture
def stalling(web):
    """Files that come byte by byte, that end in silence, and that never begin."""

    def slow(answer, beginning: bytes, rest: bytes):
        answer.end_headers()
        answer.wfile.write(beginning)
        answer.wfile.flush()
        while answer.command == "GET" and not web.ending.wait(0.02):
            answer.wfile.write(rest)

    web["trickle"] = lambda answer: slow(answer, b"1", b"2")
    web["silence"] = lambda answer: slow(answer, b"1", b"")
    web["nothing"] = lambda answer: web.ending.wait(60)
    return web


@pytest.mark.parametrize("answer", [endless, bomb])
@pytest.mark.parametrize("read", [read_uri, sha256_of])
def test_an_answer_is_ended_at_the_limit_whatever_its_server_says(web, answer, read):
    web["a"] = answer
    with pytest.raises(StoreOversizedError, match=r"has more than the 1000000 bytes that are accepted") as caught:
        read(f"{web.url}/a", most=1_000_000)
    assert not caught.value.transient


@pytest.mark.parametrize("name", ["trickle", "silence"])
def test_an_answer_that_comes_too_slowly_is_given_up(stalling, monkeypatch, name):
    monkeypatch.setattr(store_module, "GRACE_S", 0.5)
    for read in (read_uri, sha256_of):
        with pytest.raises(
            StoreError, match=r"came too slowly: [0-9]+ bytes in [0-9]+ seconds, expected 16384"
        ) as caught:
            read(f"{stalling.url}/{name}")
        assert not caught.value.transient


def test_a_server_that_never_answers_is_given_up_for_now(stalling, monkeypatch):
    monkeypatch.setattr(store_module, "FIRST_BYTE_S", 0.5)
    with pytest.raises(StoreError, match="cannot read") as caught:
        read_uri(f"{stalling.url}/nothing")
    assert caught.value.transient


def test_a_server_that_sends_elsewhere_without_end_is_given_up(web):
    web["a"] = hopping
    with pytest.raises(StoreError, match="TooManyRedirects"):
        read_uri(f"{web.url}/a")
    assert len(web.requests) < 20


def test_a_list_of_files_without_end_is_given_up(web, monkeypatch):
    monkeypatch.setattr(store_module, "MOST_LISTING_BYTES", 1_000_000)
    web["files/"] = web["files"] = endless
    with pytest.raises(StoreError, match="more than 1000000 bytes"):
        list_uris(f"{web.url}/files/*.mp4")


def test_the_beginning_of_an_answer_is_all_that_is_taken_of_it(web):
    web["a"] = endless
    assert Store(web.url).read_start("a", 10) == b"<a href='x"


def test_a_web_file_is_read_with_the_headers_of_the_options_and_in_any_length(web):
    seen = []

    def content(answer):
        seen.append((answer.headers["Accept-Encoding"], answer.headers["X-Who"]))
        answer.send_header("Content-Length", "3000000")
        answer.end_headers()
        answer.wfile.write(bytes(3_000_000))

    web["a"] = content
    options = {"headers": {"X-Who": "me"}}
    assert read_uri(f"{web.url}/a", options) == bytes(3_000_000)
    assert sha256_of(f"{web.url}/a", options) == hashlib.sha256(bytes(3_000_000)).hexdigest()
    assert seen == [("identity", "me")] * 2
    with pytest.raises(StoreMissingError):
        read_uri(f"{web.url}/b")


def test_an_object_on_s3_is_no_longer_than_accepted(s3, s3_store):
    s3_store.put("a", bytes(3_000_000))
    for read in (read_uri, sha256_of):
        with pytest.raises(StoreOversizedError):
            read(s3_store.uri_of("a"), most=2_000_000)
        s3.requests.clear()
        read(s3_store.uri_of("a"), most=3_000_000)
        assert len(s3.requests) == 1
