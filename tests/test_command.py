"""launch: overrides and config files, --help at once, and one sentence with exit code 1 for whatever is wrong."""

import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys

import pytest
from helpers import ROOT, call_verbs, config_file, draft, refused, untrained_run, write_corpus

from launch.command import known_configs, load_config, split_overrides
from lm.config import Config, Section, resolve

VERBS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "command.run(main" in path.read_text())


def test_the_verbs_are_found():
    assert {"train", "evaluate", "compare", "generate"} <= set(VERBS)


@pytest.mark.parametrize(
    "argv, overrides, rest",
    [
        (["verb"], [], ["verb"]),
        (["verb", "--config=a.py", "--workdir", "w"], [], ["verb", "--config=a.py", "--workdir", "w"]),
        (["verb", "--config.seed=3", "--x"], ["--config.seed=3"], ["verb", "--x"]),
        (["verb", "--config.seed", "3", "--x"], ["--config.seed=3"], ["verb", "--x"]),
        (["verb", "-config.seed=3"], ["-config.seed=3"], ["verb"]),
        (["verb", "--noconfig.model.tie_embeddings", "--x"], ["--noconfig.model.tie_embeddings"], ["verb", "--x"]),
        (["verb", "--config.data.path=a=b"], ["--config.data.path=a=b"], ["verb"]),
        (["verb", "--config.seed"], ["--config.seed="], ["verb"]),
        (["verb", "--configs=a,b"], [], ["verb", "--configs=a,b"]),
    ],
)
def test_overrides_are_taken_out_of_the_command_line(argv, overrides, rest):
    assert split_overrides(argv) == (overrides, rest)


@pytest.fixture
def file(tmp_path):
    """Writes a config file and returns its path."""

    def write(body):
        path = tmp_path / "my_config.py"
        path.write_text(body)
        return str(path)

    return write


GOOD = """
from lm.config import Config

def get_config(argument=""):
    config = Config()
    config.model.hidden_dim = 8
    config.model.tie_embeddings = True
    config.training.num_steps = int(argument or 7)
    return config
"""


def test_a_config_file_with_overrides(file):
    config = load_config(file(GOOD), [])
    assert (config.model.hidden_dim, config.training.num_steps, config.seed) == (8, 7, 0)
    assert load_config(file(GOOD) + ":12", []).training.num_steps == 12
    assert load_config(file(GOOD), ["--config.data.path=/x=none"]).data.path == "/x=none"
    assert load_config(file(GOOD), ["--config.data.path=None"]).data.path is None
    overrides = {
        "--config.seed=3": ("", "seed", 3),
        "--config.model.num_layers=3": ("model", "num_layers", 3),
        "--config.optimizer.learning_rate=1": ("optimizer", "learning_rate", 1.0),
        "--config.optimizer.clip_norm=none": ("optimizer", "clip_norm", None),
        "--config.model.hidden_dim=None": ("model", "hidden_dim", None),
        "--config.model.layer_dims=8,4": ("model", "layer_dims", (8, 4)),
        "--config.data.fractions=(0.8, 0.1, 0.1)": ("data", "fractions", (0.8, 0.1, 0.1)),
        "--config.model.tie_embeddings=false": ("model", "tie_embeddings", False),
        "--noconfig.model.variational_dropout": ("model", "variational_dropout", False),
        "--config.model.dropout_rate=5e-1": ("model", "dropout_rate", 0.5),
        "--config.data.path=/a=b/c:d e": ("data", "path", "/a=b/c:d e"),
        "-config.data.tokenizer=byte": ("data", "tokenizer", "byte"),
    }
    config = load_config(file(GOOD), list(overrides))
    for override, (section, name, value) in overrides.items():
        found = getattr(getattr(config, section) if section else config, name)
        assert (found, type(found)) == (value, type(value)), override
    config.seed = 4  # still a draft


@pytest.mark.parametrize("given, found", [(["none", "2"], 2.0), (["2", "none"], None), (["none", "2", "3"], 3.0)])
def test_of_a_field_named_twice_the_last_value_holds(given, found, file):
    overrides = [f"--config.optimizer.clip_norm={value}" for value in given]
    assert load_config(file(GOOD), overrides).optimizer.clip_norm == found


def test_every_config_of_the_project_is_listed_and_found():
    assert known_configs() and all((ROOT / path).is_file() for path in known_configs())
    for path in known_configs():
        assert isinstance(resolve(load_config(str(ROOT / path), [])), Config)


@pytest.mark.parametrize(
    "override, parts",
    [
        ("--config.model.hiden_dim=3", ["config.model.hiden_dim does not exist", "did you mean model.hidden_dim?"]),
        ("--config.model.hiden_dim=none", ["config.model.hiden_dim does not exist", "did you mean model.hidden_dim?"]),
        ("--config.modle.hidden_dim=3", ["config.modle does not exist", "did you mean model?"]),
        ("--config.xyzzy=3", ["config.xyzzy does not exist", "seed"]),
        ("--config.model.hidden_dim.x=3", ["config.model.hidden_dim.x does not exist", "hidden_dim has no parts"]),
        ("--config.model=3", ["config.model is a group of fields"]),
        ("--config.model=none", ["config.model is a group of fields"]),
        ("--config.=3", ["config. does not exist"]),
        ("--config.model.hidden_dim=3.5", ["config.model.hidden_dim", "a whole number, not '3.5'"]),
        ("--config.model.hidden_dim=", ["config.model.hidden_dim", "a whole number, not ''"]),
        ("--config.optimizer.learning_rate=fast", ["config.optimizer.learning_rate", "a number, not 'fast'"]),
        ("--config.model.tie_embeddings=perhaps", ["config.model.tie_embeddings", "true or false, not 'perhaps'"]),
        ("--noconfig.model.hidden_dim", ["config.model.hidden_dim"]),
    ],
)
def test_a_bad_override_is_one_sentence(override, parts, file):
    with refused(*parts):
        load_config(file(GOOD), [override])


def test_values_that_only_resolve_can_judge(file):
    with refused("config.model.layer_dims is ('8,x',)", "a tuple of whole numbers"):
        resolve(load_config(file(GOOD), ["--config.model.hidden_dim=none", "--config.model.layer_dims=8,x"]))
    with refused("config.data.seq_len is None", "a whole number"):
        resolve(load_config(file(GOOD), ["--config.data.seq_len=none"]))


@pytest.mark.parametrize(
    "body, parts",
    [
        ("def get_config():\n    return {'a': 1}\n", ["get_config() must return an lm.config.Config, not dict"]),
        ("def get_config():\n    pass\n", ["get_config() must return an lm.config.Config, not NoneType"]),
        ("x = 1\n", ["defines no get_config()"]),
        ("def get_config(:\n", ["SyntaxError"]),
        ("import nosuchlibrary\n", ["ModuleNotFoundError", "nosuchlibrary"]),
        ("def get_config():\n    return {}['key']\n", ["KeyError", "key"]),
        ("def get_config():\n    return None.field\n", ["AttributeError", "field"]),
        ("def get_config():\n    return open('/no/such/file')\n", ["FileNotFoundError", "/no/such/file"]),
        (GOOD.replace("hidden_dim", "hiden_dim"), ["config.model.hiden_dim does not exist", "did you mean model.hidden_dim?"]),
    ],
)
def test_a_bad_config_file_is_one_sentence(body, parts, file):
    load_config(file(GOOD), [])  # nothing is left of a file that was loaded before
    path = file(body)
    with refused(f"--config={path}: ", *parts):
        load_config(path, [])


def test_a_config_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (str(tmp_path / "nowhere.py"), str(tmp_path), "", "x" * 5000):
        with refused(f"--config={path} is not a file; those of this project stand in", "configs/compare, configs/enwik8, "):
            load_config(path, [])
    with refused("--config=configs/ptb/zarema_small.py is not a file; did you mean configs/ptb/zaremba_small.py?"):
        load_config("configs/ptb/zarema_small.py", [])
    for folder in ("configs/compare", "configs/compare/"):
        with refused(f"--config={folder} is not a file; it holds configs/compare/gru.py, "):
            load_config(folder, [])
    monkeypatch.chdir(ROOT / "tests")
    with refused("--config=configs/ptb/gru.py is not a file; did you mean ../configs/ptb/gru.py?"):
        load_config("configs/ptb/gru.py", [])


def test_a_config_written_by_a_test_is_the_config(tmp_path):
    config = draft(tmp_path, "transformer", data__fractions=(0.8, 0.1, 0.1))
    assert load_config(str(config_file(tmp_path / "c.py", config)), []) == config


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_there_at_once_and_mentions_every_flag(verb):
    env, seconds = {**os.environ, "PYTHONPATH": str(ROOT)}, []
    for _ in range(3):
        begun = cpu_seconds_of_children()
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{verb}", "--help"], env=env, capture_output=True, text=True, check=True
        )
        seconds.append(cpu_seconds_of_children() - begun)
    assert statistics.median(seconds) < 1  # of a processor, so that a busy machine does not count; JAX alone takes more
    assert done.stderr == ""
    source = (ROOT / "launch" / f"{verb}.py").read_text()
    flags = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source)
    assert flags
    for flag in [*flags, "json"]:
        assert re.search(rf"^  --{flag}=\S+\s+\S", done.stdout, re.MULTILINE), flag
    assert f"python -m launch.{verb}" in done.stdout
    assert "relu, relu" not in done.stdout  # a choice of two architectures
    if "takes_config=True" in source:
        assert "counted [subword: 1000]" in re.sub(r"\s+", " ", done.stdout)  # what a field that is left open becomes
        for section in [Config(), *(value for value in vars(Config()).values() if isinstance(value, Section))]:
            for name, value in vars(section).items():
                dotted = f"{type(section)._section}.{name}".lstrip(".")
                assert isinstance(value, Section) or re.search(rf"^  --config\.{dotted}\s", done.stdout, re.MULTILINE), dotted
    else:
        assert "--config." not in done.stdout


def test_a_reader_that_goes_away_ends_a_verb_quietly():
    command = f"{sys.executable} -m launch.train --help; echo $? >&2"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -0` would
    done = subprocess.run(command, shell=True, env=env, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == "141\n"


def test_a_platform_that_is_not_there_is_one_sentence(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", "launch.train", "--config=configs/compare/lstm.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("launch.train: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "JAX cannot start 'cuda'" in sentence and "JAX_PLATFORMS=cpu" in sentence


def test_an_interruption_inside_a_callback_is_not_lost():
    """Python reports what is raised there and goes on; the verb hears of it all the same."""
    program = """
import signal, sys, time
from launch import command
class Callback:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def main(overrides):
    callback = Callback()
    del callback
    time.sleep(20)
sys.argv = ["verb"]
command.run(main, "", resumes=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=15
    )
    assert done.returncode == 130 and "goes on from the last checkpoint" in done.stderr and "ignored" not in done.stderr


def test_a_bad_path_for_json_is_told_before_the_work(workplace, tmp_path):
    (done,) = call_verbs(
        [["launch.train", f"--config={workplace}/lstm.py", f"--workdir={tmp_path}/x", "--json=/proc/x"]], tmp_path
    )
    assert done.code == 1 and "/proc/x cannot be written" in done.err and not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a corpus, config files and runs."""
    folder = tmp_path_factory.mktemp("workplace")
    corpus = write_corpus(folder / "corpus", train=60, valid=10, test=10)
    config_file(folder / "ngram.py", draft(corpus, "ngram", model__ngram_order=2))
    config_file(folder / "lstm.py", draft(corpus, "lstm"))
    config_file(folder / "wrong.py", draft(corpus, "lstm", optimizer__plateau_patience=2))
    config_file(folder / "other.py", draft(write_corpus(folder / "other text", train=60, valid=10, test=10, seed=9), "lstm"))
    untrained_run(draft(corpus, "ngram", model__ngram_order=2), folder / "counted")
    (folder / "file").write_text("in the way")
    (folder / "empty").mkdir()
    return folder


# What is called, and what its one sentence has to say. {w} is the workplace.
BAD = [
    ("train", ["--config is missing", "configs/"]),
    ("train --config={w}/lstm.py", ["--workdir is missing", "--workdir="]),
    ("train --config={w}/nowhere.py --workdir={w}/x", ["--config={w}/nowhere.py is not a file"]),
    ("train --config={w}/file --workdir={w}/x", ["--config={w}/file: SyntaxError"]),
    ("train --config={w}/lstm.py --workdir={w}/x --config.model.hiden_dim=3", ["did you mean model.hidden_dim?"]),
    ("train --config={w}/lstm.py --workdir={w}/x --config.model.hidden_dim=0", ["config.model.hidden_dim is 0", "at least 1"]),
    ("train --config={w}/lstm.py --workdir={w}/x --config.data.path={w}/no", ["config.data.path '{w}/no' does not exist"]),
    ("train --config={w}/lstm.py --workdir={w}/x --config.data.cache_dir={w}/file", ["{w}/file cannot be written"]),
    (
        "train --config={w}/lstm.py --workdir={w}/x --config.data.batch_size=1000",
        ["too few for 1000 rows of config.data.seq_len"],
    ),
    ("train --config={w}/lstm.py --workdir={w}/x --config.num_devices=99", ["config.num_devices is 99", "device"]),
    ("train --config={w}/lstm.py --workdir={w}/file", ["--workdir {w}/file is a file; give a folder"]),
    ("train --config={w}/ngram.py --workdir={w}/counted --config.model.ngram_order=3", ["model.ngram_order: 2 then, 3 now"]),
    ("train --config={w}/lstm.py --workdir={w}/x --nosuch=1", ["nosuch", "--help lists the flags of launch.train"]),
    ("train --config={w}/lstm.py --workdir={w}/x --dry_run=perhaps", ["--dry_run=perhaps", "true or false"]),
    ("train --config={w}/lstm.py --workdir={w}/x --nodry_run=3", ["nodry_run"]),
    ("train --config={w}/lstm.py --workdir", ["workdir", "--help"]),
    ("train extra --config={w}/lstm.py", ["'extra' is not a flag", "--name=value"]),
    ("evaluate", ["--workdir is missing"]),
    ("evaluate --workdir={w}/nowhere", ["{w}/nowhere holds no run"]),
    ("evaluate --workdir={w}/empty", ["{w}/empty holds no run"]),
    ("evaluate --workdir={w}/file", ["{w}/file holds no run"]),
    ("evaluate --workdir={w}/counted --split=dev", ["--split=dev is not a split", "train, valid, test"]),
    ("evaluate --workdir={w}/counted --split=valid --text={w}/lstm.py", ["--split and --text are both set", "leave one out"]),
    ("evaluate --workdir={w}/counted --step=7", ["--step=7 names no checkpoint", "best, latest, 1"]),
    ("evaluate --workdir={w}/counted --context=many", ["--context=many", "a whole number"]),
    ("evaluate --workdir={w}/counted --config.seed=3", ["--config.seed is set", "takes no config"]),
    ("evaluate --workdir={w}/counted --json={w}/file/x.json", ["{w}/file/x.json cannot be written"]),
    ("evaluate --workdir={w}/counted --dynamic=sgd --dynamic_epsilon=1", ["--dynamic_epsilon is of --dynamic=rms"]),
    ("generate", ["--workdir is missing"]),
    ("generate --workdir={w}/empty", ["{w}/empty holds no run"]),
    ("generate --workdir={w}/counted", ["{w}/counted is an n-gram model"]),
    ("generate --workdir={w}/counted --top_p=most", ["--top_p=most", "a number"]),
    ("compare", ["--configs", "--workdirs"]),
    ("compare --configs={w}/lstm.py", ["--workdir is missing"]),
    ("compare --configs={w}/lstm.py --workdirs={w}/counted --workdir={w}/x", ["either --configs", "or --workdirs"]),
    ("compare --configs={w}/lstm.py,{w}/lstm.py --workdir={w}/x", ["--configs names the same thing twice", "{w}/lstm.py"]),
    ("compare --configs=. --workdir={w}/x", ["--config=. is not a file"]),
    ("compare --configs={w}/lstm.py, --workdir={w}/x", ["--configs={w}/lstm.py, has nothing before or behind a comma"]),
    ("compare --workdirs={w}/run --workdir={w}/lstm.py", ["{w}/lstm.py/report.md cannot be written"]),
    ("compare --configs={w}/lstm.py,{w}/nowhere.py --workdir={w}/x", ["--config={w}/nowhere.py is not a file"]),
    ("compare --configs={w}/lstm.py,{w}/wrong.py --workdir={w}/x", ["wrong: config.optimizer.plateau_patience is set"]),
    ("compare --configs={w}/lstm.py,{w}/other.py --workdir={w}/x", ["lstm and other have different texts for test"]),
    ("compare --workdirs={w}/counted,{w}/empty --workdir={w}/x", ["{w}/empty holds no run"]),
    ("compare --workdirs={w}/counted --workdir={w}/x --config.seed=3", ["--config.seed is set", "--configs"]),
    ("compare --configs={w}/lstm.py --workdir={w}/x --position_context=0", ["--position_context=0", "at least 1"]),
    ("word_language_model", ["--data_path is missing"]),
    ("word_language_model --data_path={w}/no", ["--data_path={w}/no does not exist", "train, valid and test"]),
]


def test_whatever_is_wrong_is_one_sentence_and_exit_code_1(workplace, tmp_path):
    calls = [f"launch.{call}".format(w=workplace).split() for call, _ in BAD]
    for (call, parts), done in zip(BAD, call_verbs(calls, tmp_path), strict=True):
        verb = call.split()[0]
        assert done.code == 1, call
        lines = done.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"launch.{verb}: "), (call, done.err)
        for part in parts:
            assert part.format(w=workplace) in lines[0], call
        assert "Traceback" not in done.out + done.err
    assert not list((workplace / "x").glob("checkpoints")), "something was trained"
    assert not list((workplace / "counted").glob("evaluation/*")), "something was scored"


def test_test_is_not_scored_at_another_checkpoint_unasked(workplace, tmp_path):
    run = untrained_run(draft(workplace / "corpus", "lstm"), tmp_path / "run", steps=(1, 2))
    shutil.rmtree(run / "checkpoints" / "1")  # the best
    verb = ["launch.evaluate", f"--workdir={run}"]
    refusal, valid, latest = call_verbs([verb, [*verb, "--split=valid"], [*verb, "--step=latest"]], tmp_path / "said")
    warning, sentence = refusal.err.strip().splitlines()
    assert refusal.code == 1 and "best checkpoint (step 1) is missing" in warning
    assert "best on valid is not to be had" in sentence and "--step=latest takes that of step 2" in sentence
    assert (valid.code, latest.code) == (0, 0) and "at step 2 (latest)" in valid.out
    assert sorted(path.stem for path in run.glob("evaluation/*.json")) == ["test.step-2", "valid.step-2"]


def test_a_process_of_its_own_ends_the_same_way(workplace):
    """`call_verbs` ends its processes by hand; this one is Python's own."""
    command = [sys.executable, "-m", "launch.train", f"--config={workplace / 'nowhere.py'}", "--workdir=x"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=workplace, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"launch.train: --config={workplace / 'nowhere.py'} is not a file")


def test_what_is_compiled_is_kept_for_the_next_start(workplace, tmp_path, monkeypatch):
    call = ["launch.train", f"--config={workplace}/lstm.py", "--config.training.num_steps=1"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (done,) = call_verbs([[*call, f"--workdir={tmp_path}/a"]], tmp_path / "out")
    kept = sorted((tmp_path / "lm" / "compiled").glob("*/jit_train_step-*"))
    assert done.code == 0 and kept, done.err
    (done,) = call_verbs([[*call, f"--workdir={tmp_path}/b"]], tmp_path / "out")
    assert done.code == 0 and done.err == ""
    assert sorted((tmp_path / "lm" / "compiled").glob("*/jit_train_step-*")) == kept
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    (done,) = call_verbs([[*call, f"--workdir={tmp_path}/c"]], tmp_path / "out")
    assert done.code == 0 and list((tmp_path / "mine").glob("jit_train_step-*"))


def test_verbs_write_their_result_for_a_program(workplace, tmp_path):
    calls = [
        f"launch.train --config={workplace}/ngram.py --workdir={tmp_path}/run --json={tmp_path}/train.json",
        f"launch.evaluate --workdir={tmp_path}/run --split=valid --json={tmp_path}/deep/evaluate.json",
        f"launch.train --config={workplace}/lstm.py --dry_run --json={tmp_path}/dry.json",
        f"launch.train --config={workplace}/ngram.py --dry_run --workdir={tmp_path}/run",
        f"launch.train --config={workplace}/ngram.py --dry_run --workdir={tmp_path}/run --config.model.ngram_order=3",
    ]
    *results, begun, another = call_verbs([call.split() for call in calls], tmp_path / "out")
    assert begun.code == 0 and f"{tmp_path}/run has been trained for 1 steps, where it would go on" in begun.out
    assert another.code == 1 and "model.ngram_order: 2 then, 3 now" in another.err
    assert [done.code for done in results] == [0, 0, 0], results
    assert all(done.err == "" and done.out for done in results)

    def written(name):
        def not_json(constant):
            raise ValueError(constant)

        return json.loads((tmp_path / name).read_text(), parse_constant=not_json)  # Infinity and NaN are not JSON

    train, evaluate, dry = (written(name) for name in ("train.json", "deep/evaluate.json", "dry.json"))
    assert (train["workdir"], train["step"], train["best_loss"]) == (f"{tmp_path}/run", 1, None)
    assert "launch.evaluate" in results[0].out  # what to do next
    stored = json.loads((tmp_path / "run" / "evaluation" / "valid.json").read_text())
    assert {**stored, "name": "valid", "stored": False} == evaluate
    assert f"{evaluate['perplexity']:.3f}" in results[1].out
    assert dry["num_params"] > 100 and f"{dry['num_params']:,}" in results[2].out
    assert "embedding/table" in results[2].out and "would train lstm" in results[2].out
