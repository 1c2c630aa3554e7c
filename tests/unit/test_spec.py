"""Facts about the job spec: what it accepts, what it says of every mistake, and that its resolved copy is the job."""

import re
from pathlib import Path

import pytest
import yaml
from hostile import SPECS

from ditflow import backbones
from jobs.spec import ReadySpec, SpecError, check_output, load_spec
from jobs.yaml12 import Loader, dump
from pipeline.job import Table
from pipeline.plan import make_plan
from pipeline.store import StoreError

SPEC = """\
kind: synthesize
name: quickstart
model: {path: mini, dtype: auto}
references: {uri: "s3://bucket/refs/", glob: "*.mp4", frames: 17, stride: 1, height: 64, width: 64}
prompts: ["a leopard running up a snowy hill"]
pairing: product
seeds: [1]
method:
  name: ditflow
  optimize: latent
  blocks: auto
  temperature: 2.0
  guided_steps: 10
  iterations: 5
  learning_rate: [0.002, 0.001]
  injection: true
sampling: {steps: 50, guidance_scale: 7.0, negative_prompt: "blurry"}
output:
  uri: s3://bucket/runs/quickstart/
resources: {extract: {actors: 1, gpus: auto}, generate: {actors: [1, 8], gpus: auto}}
faults:
  attempts: 3
"""
"""The spec of the documentation, on a model that is at hand."""


@pytest.fixture(scope="module", autouse=True)
def _cached_models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITFLOW_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
        yield


@pytest.fixture
def load(tmp_path):
    """Load a spec's text, with some of it replaced."""

    def load(*changes: tuple[str, str], overrides: tuple[str, ...] = (), text: str = SPEC) -> ReadySpec:
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} is in the spec {text.count(old)} times"
            text = text.replace(old, new)
        file = tmp_path / "job.yaml"
        file.write_text(text, encoding="utf-8")
        return load_spec(file, overrides)

    return load


@pytest.fixture
def mistakes(load):
    """Load a spec that is wrong, and return what is said of it, line by line."""

    def mistakes(*changes: tuple[str, str], **options) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load(*changes, **options)
        return str(caught.value).splitlines()

    return mistakes


def line_of(text: str, of: str = SPEC) -> int:
    return 1 + of[: of.index(text)].count("\n")


# ---------------------------------------------------------------------------------------------------- good specs


def test_the_documented_spec_says_what_the_job_does(load):
    job = load().job
    assert (job.kind, job.name, job.pairing, job.seeds) == ("synthesize", "quickstart", "product", (1,))
    assert job.prompts == ("a leopard running up a snowy hill",)
    assert (job.references.uris, job.references.size) == (("s3://bucket/refs/",), (17, 64, 64))
    assert (job.method.guided_steps, job.method.learning_rate) == (10, (0.002, 0.001))
    assert (job.sampling.steps, job.sampling.negative_prompt) == (50, "blurry")
    assert (job.resources.extract.bounds, job.resources.generate.bounds) == ((1, 1), (1, 8))
    assert job.faults.attempts == 3


def test_auto_means_the_models_own_default(load):
    defaults = backbones.identify("mini").defaults
    names = ("temperature: 2.0", "guided_steps: 10", "iterations: 5", "learning_rate: [0.002, 0.001]", "steps: 50,")
    job = load(*((name, f"{name.split(':')[0]}: auto{',' * name.endswith(',')}") for name in names)).job
    assert job.method.blocks == defaults.blocks
    for name in ("temperature", "guided_steps", "iterations", "learning_rate"):
        assert getattr(job.method, name) == getattr(defaults, name)
    assert job.sampling.steps == defaults.steps


def test_what_is_left_out_has_the_models_default_as_if_it_were_auto(load):
    shortest = (
        "kind: synthesize\nname: quickstart\noutput: {uri: out}\nreferences: {frames: 17, height: 64, width: 64}\n"
    )
    job = load(text=shortest).job
    assert job.method == job.method.resolve(backbones.identify("mini").defaults)
    assert None not in (job.method.blocks, job.method.guided_steps, job.sampling.steps, job.sampling.guidance_scale)


BANKS = "kind: build-bank\nname: b\noutput: {uri: out}\nreferences: {frames: 17, height: 64, width: 64}\n"


@pytest.mark.parametrize(
    ("method", "optimize", "preset"),
    [
        ("", "coordinates", "lasting"),
        ("method: {iterations: 3}", "coordinates", "lasting"),
        ("method: {optimize: position}", "position", "lasting"),
        ("method: {preset: paper}", "coordinates", "paper"),
    ],
)
def test_a_bank_is_learned_to_last_unless_the_job_says_how(load, method, optimize, preset):
    job = load(text=f"{BANKS}{method}\n").job
    assert (job.method.optimize, job.method.preset) == (optimize, preset)
    assert job.method == job.method.resolve(backbones.identify("mini").defaults)


def test_each_of_several_ways_to_learn_banks_lasts_unless_it_says_how(load):
    job = load(text=f"{BANKS}methods: {{ours: {{}}, paper: {{optimize: position, preset: paper}}}}\n").job
    ways = {name: (method.optimize, method.preset) for name, method in job.methods.items()}
    assert ways == {"ours": ("coordinates", "lasting"), "paper": ("position", "paper")}


def test_a_reuse_job_needs_no_method(load):
    job = load(text="kind: reuse\nname: r\noutput: {uri: out}\nbanks: {uri: banks}\nprompts: [a ball]\n").job
    assert job.method.learns_positions


@pytest.mark.parametrize(
    ("size", "said"),
    [("[17, 64, 65]", "banks.size.width: 65 .*multiple"), ("[18, 64, 64]", "banks.size.frames: 18"), ("[17, 64]", "")],
)
def test_the_size_of_reused_motion_is_one_that_the_model_can_do(load, size, said):
    reuse = f"kind: reuse\nname: r\noutput: {{uri: out}}\nbanks: {{uri: banks, size: {size}}}\n"
    with pytest.raises(SpecError, match=f"job.yaml:4: .*{said}"):
        load(text=reuse)


def test_prompts_and_pairing_may_be_tables(load):
    job = load(
        ('["a leopard running up a snowy hill"]', "{uri: prompts.csv, column: text}"),
        ("pairing: product", "pairing: {uri: pairs.parquet}"),
    ).job
    assert (job.prompts, job.pairing) == (Table("prompts.csv", "text"), Table("pairs.parquet", "prompt"))


def test_references_may_be_a_list(load):
    assert load(('"s3://bucket/refs/"', "[a.mp4, b.mp4]")).job.references.uris == ("a.mp4", "b.mp4")


# ------------------------------------------------------------------------------------------------------ mistakes

MISTAKES = {
    # what is wrong: (text, the wrong text, key, what is valid)
    "misspelt key": ("prompts: [", "promts: [", "promts", "did you mean prompts?"),
    "misspelt key of a section": ("iterations:", "iteration:", "method.iteration", "did you mean iterations?"),
    "misspelt key in braces": ("glob:", "globb:", "references.globb", "did you mean glob?"),
    "misspelt key two levels down": ("actors: 1,", "actor: 1,", "resources.extract.actor", "did you mean actors?"),
    "key like no other": ("seeds:", "qqqq:", "qqqq", "Valid here: kind, name, output"),
    "negative learning rate": ("[0.002,", "[-0.002,", "method.learning_rate", "two positive rates"),
    "learning rate that is no number": ("[0.002,", "[.nan,", "method.learning_rate", "two positive rates"),
    "guided steps beyond the steps": ("guided_steps: 10", "guided_steps: 51", "method.guided_steps", "1 and "),
    "injected steps beyond the steps": (
        "guided_steps: 10",
        "injected_steps: 51",
        "method.injected_steps",
        "between 1 and sampling.steps (50)",
    ),
    "no guided steps": ("guided_steps: 10", "guided_steps: 0", "method.guided_steps", "count of steps"),
    "height that does not divide": ("height: 64", "height: 60", "references.height", "a multiple of 8"),
    "width that does not divide": ("width: 64", "width: 65", "references.width", "nearest is 64"),
    "frames that the model cannot do": ("frames: 17", "frames: 18", "references.frames", "near are 17 and 21"),
    "unknown method": ("name: ditflow", "name: ditflo", "method.name", "one of none, injection, ditflow"),
    "unknown variable": ("optimize: latent", "optimize: latents", "method.optimize", "'latent', 'position' or"),
    "unknown kind": ("kind: synthesize", "kind: synthesise", "kind", "'extract', 'synthesize', 'build-bank'"),
    "unknown dtype": ("dtype: auto", "dtype: float8", "model.dtype", "'bfloat16'"),
    "unknown pairing": ("pairing: product", "pairing: cross", "pairing", "'product' or 'zip'"),
    "unknown model": ("path: mini", "path: no/such/model", "model.path", "one of mini"),
    "text for a number": ("steps: 50,", "steps: many,", "sampling.steps", "integer"),
    "text for GPUs": ("actors: 1, gpus: auto", "actors: 1, gpus: some", "resources.extract.gpus", "auto"),
    "number for a name": ("name: quickstart", "name: 5", "name", "5 is not valid: expected a text: put it into quotes"),
    "nothing for a name": ("name: quickstart", "name:", "name", "a text"),
    "number for a list": ("seeds: [1]", "seeds: 1", "seeds", "seeds: 1 is not valid"),
    "text among the seeds": ("seeds: [1]", "seeds: [1, x]", "seeds.1", "integer"),
    "text for the prompts": (
        '["a leopard running up a snowy hill"]',
        "a leopard",
        "prompts",
        "'a leopard' is not valid",
    ),
    "one learning rate": ("[0.002, 0.001]", "0.002", "method.learning_rate", "0.002 is not valid"),
    "text for a section": (
        '{steps: 50, guidance_scale: 7.0, negative_prompt: "blurry"}',
        "x",
        "sampling",
        "'x' is not",
    ),
    "block beyond the model's depth": ("blocks: auto", "blocks: [99]", "method.blocks", "expected 0 to "),
    "negative block": ("blocks: auto", "blocks: [-1]", "method.blocks", "counted from 0"),
    "bank of latents": (
        "kind: synthesize",
        "kind: build-bank",
        "method",
        "position or coordinates for kind build-bank",
    ),
    "reuse of latents": ("kind: synthesize", "kind: reuse", "method", "position or coordinates for kind reuse"),
    "no steps": ("steps: 50,", "steps: 0,", "sampling.steps", "between 1 and 1000"),
    "no attempts": ("attempts: 3", "attempts: 0", "faults.attempts", "at least 1"),
    "more least than most actors": ("[1, 8]", "[8, 1]", "resources.generate.actors", "[least, most]"),
    "negative frame rate": ("quickstart/\n", "quickstart/\n  fps: -1\n", "output.fps", "above 0"),
}


@pytest.mark.parametrize(("text", "wrong", "key", "valid"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_file_line_and_key_and_what_is_valid(
    mistakes, tmp_path, text, wrong, key, valid
):
    said = mistakes((text, wrong))
    assert len(said) == 1, said
    spec = SPEC.replace(text, wrong)
    line = line_of(f"{key.split('.')[-1]}:", spec) if key == "output.fps" else line_of(_with_its_key(text, key))
    assert said[0].startswith(f"{tmp_path / 'job.yaml'}:{line}: {key}: ")
    assert valid in said[0]


def test_noises_are_compared_in_jobs_that_guide_videos_alone(mistakes):
    (said,) = mistakes(("kind: synthesize", "kind: extract"), ("blocks: auto", "noise_candidates: 2"))
    assert "method.noise_candidates: 2 is not valid: expected 1 for kind extract" in said


def _with_its_key(text: str, key: str) -> str:
    """The text of the spec that holds the key's line: the key of a section stands before the section's text."""
    return f"\n{key}:".lstrip() if key == "method" else text


def test_a_seed_that_the_manifest_cannot_hold_is_a_mistake(mistakes):
    (said,) = mistakes(("seeds: [1]", f"seeds: [{2**63}]"))
    assert f":{line_of('seeds')}: seeds" in said


def test_a_key_that_is_missing_is_named(mistakes):
    (said,) = mistakes(("kind: synthesize\n", ""))
    assert "job.yaml: kind: " in said
    (said,) = mistakes(("output:\n  uri: s3://bucket/runs/quickstart/", "output: {fps: 8}"))
    assert f"job.yaml:{line_of('output:')}: output.uri: " in said


def test_an_extraction_needs_a_method_that_extracts_something(mistakes):
    (said,) = mistakes(("kind: synthesize", "kind: extract"), ("name: ditflow", "name: injection"))
    assert "method.name: 'injection' is not valid: expected a method with a motion loss" in said


def test_mistakes_in_several_sections_are_all_reported(mistakes):
    changes = [("stride: 1", "stride: 0"), ("iterations: 5", "iterations: 0"), ("steps: 50,", "steps: 0,")]
    said = mistakes(*changes)
    assert [line.split(": ")[1] for line in said] == ["references.stride", "method.iterations", "sampling.steps"]


def test_what_the_model_cannot_do_is_reported_all_at_once(mistakes):
    changes = [("height: 64", "height: 60"), ("guided_steps: 10", "guided_steps: 51"), ("blocks: auto", "blocks: [99]")]
    keys = {line.split(": ")[1] for line in mistakes(*changes)}
    assert keys == {"references.height", "method.guided_steps", "method.blocks"}


def test_several_misspelt_keys_are_all_reported(mistakes):
    keys = [line.split(": ")[1] for line in mistakes(("seeds:", "seed:"), ("glob:", "globb:"))]
    assert keys == ["references.globb", "seed"]


def test_a_misspelt_key_does_not_hide_a_wrong_value(mistakes):
    keys = {line.split(": ")[1] for line in mistakes(("iterations:", "iteration:"), ("steps: 50,", "steps: 0,"))}
    assert keys == {"method.iteration", "sampling.steps"}


@pytest.mark.parametrize(
    "text", ["kind: [\nname: x\n", "kind:\n\tname: x\n", "kind: 'open\n", "a: b: c\n", "&a *a *a"], ids=range(5)
)
def test_a_file_that_is_no_yaml_is_one_line_with_the_place(mistakes, text):
    (said,) = mistakes(text=text)
    assert "job.yaml" in said
    assert "YAML" in said
    assert re.search(r"(line |yaml:)[123]\b", said)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- kind\n- name\n", "just text\n", "5\n"])
def test_a_file_that_is_no_mapping_is_told_which_keys_there_are(mistakes, text):
    (said,) = mistakes(text=text)
    assert "expected a mapping with the keys kind, name, output" in said


def test_a_file_that_is_missing_is_told_which_presets_there_are(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yaml: cannot be read.*quickstart\.yaml"):
        load_spec(tmp_path / "none.yaml")


def test_a_folder_or_bytes_that_are_no_text_are_no_spec(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00kind")
    for path in (tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(SpecError, match="cannot be read"):
            load_spec(path)


def test_an_output_that_cannot_be_written_to_is_a_mistake_of_the_spec(load, tmp_path):
    (tmp_path / "file").write_text("in the way")
    spec = load(("s3://bucket/runs/quickstart/", str(tmp_path / "file" / "out")))
    with pytest.raises(SpecError, match=r"^output\.uri: .*cannot be written to"):
        check_output(spec.job)
    check_output(load(("s3://bucket/runs/quickstart/", str(tmp_path / "new" / "out"))).job)


# --------------------------------------------------------------------------------------------------------- --set


def test_an_override_changes_a_key_of_a_section(load):
    job = load(overrides=("sampling.steps=20", "method.guided_steps=0.5", "name=other")).job
    assert (job.sampling.steps, job.method.guided_steps, job.name) == (20, 0.5, "other")
    assert job.sampling.negative_prompt == "blurry"


def test_an_override_may_be_a_list_and_may_add_keys_and_sections(load):
    job = load(
        overrides=("seeds=[1,2,3]", "method.blocks=[0]", "model.execution.cfg=serial", "banks.glob='*.bank'")
    ).job
    assert (job.seeds, job.method.blocks) == ((1, 2, 3), (0,))
    assert (job.model.execution.cfg, job.banks.glob) == ("serial", "*.bank")


def test_of_two_overrides_of_a_key_the_last_one_counts(load):
    assert load(overrides=("seeds=[1]", "seeds=[2]")).job.seeds == (2,)


def test_an_override_may_hold_an_equals_sign(load):
    assert load(overrides=("sampling.negative_prompt=a=b",)).job.sampling.negative_prompt == "a=b"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name", "expected KEY=VALUE"),
        ("name.first=x", "name is no section"),
        ("seeds=[1,", "--set seeds=[1,"),
        ("references.glob=*.mp4", "--set references.glob=*.mp4"),
        ("name=!!python/name:os.system", "--set name="),
        ("method.iteration=5", "did you mean iterations?"),
        ("sampling.steps=many", "sampling.steps: 'many' is not valid"),
        ("method=latent", "method: 'latent' is not valid"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_its_key(mistakes, override, said):
    lines = mistakes(overrides=(override,))
    assert len(lines) == 1, lines
    assert said in lines[0]


# ------------------------------------------------------------------------------------------------- resolved copy


def clips(folder: Path) -> str:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.mp4").write_bytes(name.encode())
    return str(folder)


def test_the_resolved_spec_loads_again_as_the_same_job_with_the_same_rows(load, tmp_path):
    places = [
        ('"s3://bucket/refs/"', clips(tmp_path / "refs")),
        ("s3://bucket/runs/quickstart/", str(tmp_path / "out")),
    ]
    first = load(*places, overrides=("seeds=[1,2]",))
    again = load(text=first.yaml)
    assert again.job == first.job
    assert again.yaml == first.yaml
    ids = [row.row_id for row in make_plan(first.job, first.model.revision).todo]
    assert ids == [row.row_id for row in make_plan(again.job, again.model.revision).todo]
    assert len(ids) == 4


# ------------------------------------------------------------------------------------------------ several methods


METHODS_OF_ITS_OWN = (
    "sampling:",
    "methods:\n  plain: {name: none}\n  moft: {name: moft, iterations: auto, guided_steps: 3}\nsampling:",
)


def test_each_of_several_methods_takes_from_method_what_it_leaves_out(load):
    job = load(METHODS_OF_ITS_OWN).job
    plain, moft = (job.variants[name].method for name in ("plain", "moft"))
    assert (plain.name, moft.name) == ("none", "moft")
    assert (moft.temperature, moft.guided_steps, moft.iterations) == (2.0, 3, 5)
    assert None not in (moft.blocks, plain.blocks)


def test_several_methods_survive_the_resolved_copy(load):
    first = load(METHODS_OF_ITS_OWN)
    assert load(text=first.yaml).job == first.job


@pytest.mark.parametrize(
    ("entry", "keys", "says"),
    [
        ("{name: warp}", "methods.bad.name", "expected one of"),
        ("{nmae: none}", "methods.bad.nmae", "did you mean name?"),
        ("{blocks: [9]}", "methods.bad.blocks", "0 to 5"),
        ("{guided_steps: 51}", "methods.bad.guided_steps", "between 1 and"),
        ("{zero_shot: true}", "methods.bad.zero_shot", "optimises the position"),
        ("3", "methods.bad", "expected a section"),
    ],
)
def test_a_mistake_in_one_of_several_methods_is_said_with_its_name(mistakes, entry, keys, says):
    (said,) = mistakes(("sampling:", f"methods:\n  good: {{}}\n  bad: {entry}\nsampling:"))
    assert f":19: {keys}: " in said
    assert says in said


def test_the_resolved_spec_has_no_auto_left_in_method_and_sampling(load):
    values = yaml.safe_load(load().yaml)
    assert {None, "auto"}.isdisjoint(map(str, [*values["method"].values(), *values["sampling"].values()]))
    assert None not in [*values["method"].values(), *values["sampling"].values()]


AWKWARD = [
    "${HOME} and $(whoami) and {{ x }}",
    "ein Bär läuft über Schnee 雪の中の豹 🐆",
    "two\nlines\n",
    "  spaces around  ",
    "he said \"no\", 'maybe': # not a comment",
    "yes",
    "2024-01-01",
    "!!python/object/apply:os.system ['true']",
    "a\ttab and a back\\slash",
    "*anchor & %tag @at `tick",
    "1e5",
    "\x85\u2028 line ends of other alphabets",
    "off",
    "010",
    "08",
    "1:30",
    "1_000",
    "<<",
    "null",
    "~",
    "",
]


def test_awkward_prompts_survive_the_way_through_yaml_twice(load):
    text = yaml.safe_dump({**yaml.safe_load(SPEC), "prompts": AWKWARD}, allow_unicode=True)
    spec = load(text=text)
    assert list(spec.job.prompts) == AWKWARD
    assert list(load(text=spec.yaml).job.prompts) == AWKWARD


@pytest.mark.parametrize("rules", [yaml.SafeLoader, Loader], ids=["YAML 1.1", "YAML 1.2"])
def test_the_resolved_spec_is_read_alike_by_both_rules_of_yaml(load, rules):
    spec = load(text=yaml.safe_dump({**yaml.safe_load(SPEC), "prompts": AWKWARD}, allow_unicode=True))
    assert yaml.load(spec.yaml, rules)["prompts"] == AWKWARD
    values = [1e-5, 1e20, 10, True, None, "0o17"]
    assert yaml.load(dump(values), rules) == values


# --------------------------------------------------------------------------------------- what is read as something else


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[010, 08]", (10, 8)),
        ("[0x1f, 0o17, +7]", (31, 15, 7)),
        ("[1_000]", (1000,)),
    ],
)
def test_numbers_are_those_of_yaml_1_2(load, written, read):
    assert load(("seeds: [1]", f"seeds: {written}")).job.seeds == read
    assert load(overrides=(f"seeds={written}",)).job.seeds == read


@pytest.mark.parametrize("word", ["no", "on", "off", "Yes", "y", "1:30", "2024-01-01", "1_000", "0b11", "1e5", "010"])
def test_words_that_yaml_1_1_takes_for_something_else_are_texts(load, word):
    prompts = '["a leopard running up a snowy hill"]'
    assert load((prompts, f"[{word}]")).job.prompts == (word,)
    assert load(overrides=(f"prompts=[{word}]",)).job.prompts == (word,)


def test_a_number_with_an_exponent_is_one_where_the_key_is_a_number(load):
    assert load(("[0.002, 0.001]", "[2e-3, 1e-3]")).job.method.learning_rate == (0.002, 0.001)


def test_a_time_of_day_is_no_number_of_frames(mistakes):
    (said,) = mistakes(("stride: 1", "start: 1:30"))
    assert "references.start: '1:30' is not valid: expected a valid integer" in said


def test_a_number_among_the_prompts_is_refused_with_what_to_do(mistakes):
    (said,) = mistakes(('["a leopard running up a snowy hill"]', "[7]"))
    assert said.endswith("prompts.0: 7 is not valid: expected a text: put it into quotes")


def test_switches_need_no_quotes_and_yes_and_no_serve_where_a_key_is_true_or_false(load):
    job = load(("injection: true", "injection: no"), overrides=("model.execution.checkpointing=on", "log=off")).job
    assert (job.method.injection, job.model.execution.checkpointing, job.log) == (False, "on", "off")


@pytest.mark.parametrize(
    ("old", "twice", "key", "first"),
    [
        ("seeds: [1]", "seeds: [1]\nprompts: [a ball]", "prompts", "prompts:"),
        ("  iterations: 5", "  iterations: 5\n  name: none", "name", "  name: ditflow"),
        ("{steps: 50,", "{steps: 50, steps: 20,", "steps", "sampling:"),
        ("faults:", "storage_options: {a: {b: 1, b: 2}}\nfaults:", "b", "faults:"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(mistakes, old, twice, key, first):
    (said,) = mistakes((old, twice))
    assert f"the key '{key}' stands twice, first in line {line_of(first)}. Remove one." in said


def test_a_key_that_stands_twice_in_an_override_is_refused(mistakes):
    (said,) = mistakes(overrides=("sampling={steps: 5, steps: 6}",))
    assert said.startswith("--set sampling={steps: 5, steps: 6}:1: the key 'steps' stands twice")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sampling:", "methods: {<<: {a: {name: none}}, b: {name: none}}\nsampling:", "YAML 1.2 has no merge key <<"),
        ('["a leopard running up a snowy hill"]', "*.mp4", "Put a text that begins with * & ! % or @ into quotes"),
        ("sampling:", "sampling:\n\tsteps: 5\nfoo:", "indent by blanks, not tabs"),
    ],
)
def test_what_yaml_reads_as_something_else_is_refused_with_its_line(mistakes, old, new, said):
    (message,) = mistakes((old, new))
    assert re.match(r".*:\d+: ", message)
    assert said in message


def test_a_byte_order_mark_and_the_line_ends_of_windows_change_nothing(load):
    assert load(text="\ufeff" + SPEC.replace("\n", "\r\n")).job == load().job


@pytest.mark.parametrize("folder", ["s3://bucket/cache", "${TMP}/cache"])
def test_a_cache_that_is_no_folder_of_this_machine_is_refused_by_its_key(mistakes, folder):
    (said,) = mistakes(overrides=(f"resources.cache.folder={folder}",))
    assert "resources.cache.folder: " in said
    assert "expected a folder of this machine" in said


@pytest.mark.parametrize("value", ["no", "010", "1e3", "{config_kwargs: {retries: [1:30]}}"])
def test_an_option_that_yaml_1_1_reads_otherwise_is_refused_where_no_type_says_what_it_is(load, mistakes, value):
    (said,) = mistakes(text=f"{SPEC}storage_options: {{anon: {value}}}\n")
    assert f":{1 + SPEC.count(chr(10))}: storage_options: " in said
    (said,) = mistakes(overrides=(f"storage_options.anon={value}",))
    assert "Put a text into quotes; write true or false" in said
    options = load(
        text=f"{SPEC}storage_options: {{anon: false, profile: 'no', max_concurrency: 10}}\n"
    ).job.storage_options
    assert options == {"anon": False, "profile": "no", "max_concurrency": 10}


# ------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("name", SPECS)
def test_a_hostile_spec_is_planned_or_refused_in_a_few_lines_that_name_the_place(load, mistakes, tmp_path, name):
    hostile = SPECS[name]
    text = hostile.build().replace("uri: OUT", f"uri: {tmp_path / 'out'}")
    if hostile.says is None:
        spec = load(text=text)
        assert len(make_plan(spec.job, spec.model.revision).todo) == hostile.rows
        return
    said = mistakes(text=text)
    assert re.search(hostile.says, "\n".join(said)), said[:3]
    assert len(said) <= 101
    assert len("\n".join(said)) < 50_000


def test_a_misspelt_key_in_a_section_that_an_alias_repeats_is_reported_in_both_places(mistakes):
    pools = "resources: {extract: &pool {actor: 2}, generate: *pool}"
    old = "resources: {extract: {actors: 1, gpus: auto}, generate: {actors: [1, 8], gpus: auto}}"
    keys = [line.split(": ")[1] for line in mistakes((old, pools))]
    assert keys == ["resources.extract.actor", "resources.generate.actor"]


def test_a_misspelt_key_in_a_section_whose_name_is_a_number_is_reported(mistakes):
    said = mistakes(("sampling:", "methods:\n  5: {nmae: none}\nsampling:"))
    assert "methods.5.nmae: there is no such key; did you mean name?" in said[0]


def test_an_alias_that_repeats_little_is_no_bomb(load):
    text = SPEC.replace("resources: {extract: {actors: 1, gpus: auto}, generate: {actors: [1, 8], gpus: auto}}\n", "")
    pools = "resources: {extract: &pool {actors: 2, gpus: auto}, generate: *pool}\n"
    resources = load(text=text + pools).job.resources
    assert resources.extract == resources.generate
    assert resources.extract.bounds == (2, 2)


# ------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!evil"])
def test_a_yaml_tag_is_refused_and_nothing_runs(mistakes, tmp_path, tag):
    said = mistakes(("seeds: [1]", f"seeds: {tag} [touch {tmp_path / 'ran'}]"))
    assert not (tmp_path / "ran").exists()
    assert len(said) == 1, said
    assert tag.split(":")[-1].strip("!") in said[0]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("storage_options:\n  filecache: {cache_storage: /home/me/.ssh, same_names: true}\n", 2,
         "storage_options.filecache: there is no such option"),
        ("storage_options:\n  client_kwargs: {verify: /etc/shadow}\n", 2,
         "storage_options.client_kwargs.verify: '/etc/shadow' is not valid: expected true or false"),
        ("banks: {uri: 'filecache::https://host/a'}\n", 1,
         "banks.uri: cannot open 'filecache::https://host/a': the protocol 'filecache::https' is not opened"),
    ],
)  # fmt: skip
def test_addresses_and_options_that_are_not_taken_are_refused_by_key_and_line(mistakes, text, line, said):
    (found,) = mistakes(text=SPEC + text)
    assert f":{line + SPEC.count(chr(10))}: {said}" in found


SECRET = "wJalrXUtnFEMI-K7MDENG"
CREDENTIALS = {
    "in the options": f"storage_options: {{key: AKIAIOSFODNN7EXAMPLE, secret: {SECRET}}}\n",
    "in nested options": f"storage_options: {{client_kwargs: {{aws_secret_access_key: {SECRET}}}}}\n",
    "in the endpoint": f'storage_options: {{endpoint_url: "http://user:{SECRET}@127.0.0.1:9000"}}\n',
}


@pytest.mark.parametrize("options", CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_are_refused_before_anything_is_written_and_are_not_repeated(load, tmp_path, options):
    out = tmp_path / "out"
    text = SPEC.replace("s3://bucket/runs/quickstart/", str(out)) + options
    with pytest.raises((SpecError, StoreError)) as caught:
        check_output(load(text=text).job)
    assert SECRET not in str(caught.value)
    assert "storage" in str(caught.value)
    assert not out.exists()


def test_a_job_with_credentials_is_not_planned(load, tmp_path):
    places = [
        ('"s3://bucket/refs/"', clips(tmp_path / "refs")),
        ("s3://bucket/runs/quickstart/", str(tmp_path / "out")),
    ]
    options = CREDENTIALS["in the options"]
    try:
        job = load(*places, text=SPEC + options).job
    except (SpecError, StoreError):
        return
    with pytest.raises(StoreError, match="credentials"):
        make_plan(job, "revision")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", CREDENTIALS.values(), ids=CREDENTIALS)
def test_no_credential_is_in_the_resolved_spec(load, options):
    try:
        resolved = load(text=SPEC + options).yaml
    except (SpecError, StoreError) as error:
        resolved = str(error)
    assert SECRET not in resolved


SIGNED = "https://user:s3cr3t@host/a.mp4?X-Other-Token=s3cr3t"


@pytest.mark.parametrize(
    "override",
    [
        f"references.uri={SIGNED}",
        f"references.uri=['{SIGNED}', b.mp4]",
        f"prompts={{uri: '{SIGNED}'}}",
        f"pairing={{uri: '{SIGNED}'}}",
        f"banks.uri={SIGNED}",
    ],
)
def test_no_signature_of_a_url_is_in_the_resolved_spec(load, override):
    ready = load(overrides=(override,))
    assert SIGNED in str(ready.job), "what is run has it"
    assert "https://host/a.mp4" in ready.yaml
    assert "s3cr3t" not in ready.yaml


def test_a_value_that_is_refused_is_shown_without_half_of_its_signature(load):
    long = f"https://host/{'a' * 300}?X-Other-Token={'s3cr3t' * 30}"
    with pytest.raises(SpecError) as caught:
        load(overrides=(f"references.frames={long}",))
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("uri", ["${OUT}/run", "s3:bucket/run"])
def test_an_output_that_is_no_place_is_refused_by_its_key(load, uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"output\.uri: .*(is not filled in here|Write s3://bucket/run)"):
        load(overrides=(f"output.uri='{uri}'",))
    assert not list(tmp_path.glob("*OUT*")) + list(tmp_path.glob("s3:*"))


def test_options_that_are_no_credentials_are_kept(load):
    options = {"endpoint_url": "http://127.0.0.1:9000", "config_kwargs": {"read_timeout": 120}}
    assert load(overrides=(f"storage_options={options}",)).job.storage_options == options


def test_a_reuse_job_leaves_the_guided_and_injected_steps_to_its_banks(tmp_path):
    spec = {
        "kind": "reuse",
        "name": "test",
        "model": {"path": "mini"},
        "banks": {"uri": str(tmp_path)},
        "prompts": ["a red ball"],
        "method": {"optimize": "coordinates"},
        "output": {"uri": str(tmp_path / "out")},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    for name in ("guided_steps", "injected_steps"):
        assert getattr(load_spec(file).job.method, name) is None
        assert getattr(load_spec(file, [f"method.{name}=3"]).job.method, name) == 3
    file.write_text(load_spec(file).yaml)
    assert (load_spec(file).job.method.guided_steps, load_spec(file).job.method.injected_steps) == (None, None)
