"""launch.suite: its measurements are real ones, what is there is not measured again, and the page says what the files say."""

import json
import os
import pathlib

import pytest
from absl import flags
from helpers import ROOT, call_verbs, refused

from configs.benchmark._suites import ARCHITECTURES, SUITES
from launch.command import load_config
from lm.benchmark import page
from lm.config import resolve
from lm.errors import UserError


@pytest.mark.parametrize("suite", SUITES)
def test_every_measurement_of_a_suite_is_one_of_its_own(suite, monkeypatch):
    monkeypatch.chdir(ROOT)
    measurements = SUITES[suite]()
    assert len({measurement.name for measurement in measurements}) == len(measurements)
    for measurement in measurements:
        config = resolve(load_config(measurement.config, list(measurement.overrides)))
        assert (
            config.model.architecture in measurement.name.lower()
            or measurement.name.endswith(tuple(ARCHITECTURES))
            or "GPT" in (measurement.name)
        )
        if measurement.axis == "sequence length":
            assert config.data.seq_len == measurement.value and config.data.seq_len * config.data.batch_size == 8192


DEVICE = {"platform": "cpu", "device": "cpu", "num_devices": 1}


def result(number, name, model, speed, against=None, target=None, mode="train", axis=None, value=None):
    """As much of a measurement's file as the page reads."""
    memory = {"host_peak_bytes": (500 + number) * 2**20, "host_peak_bytes_before": 1, "device_peak_bytes": None}
    where = {"hardware": "Abacus, 2 cores", "python": "3.11", "jax": "0.10", "date": f"2026-01-0{number + 1}", **DEVICE}
    return {
        "measurement": {"number": number, "name": f"{mode}: {name}", "target": target, "axis": axis, "value": value},
        "mode": mode,
        "model": model,
        "tokens_per_second": {"median": speed},
        "share_of_matmul_peak": 0.42,
        "memory": memory,
        "environment": where,
        "against": against,
    }


def peer(speed, ratio, compiled=False, formerly=False):
    memory = {"host_peak_bytes": 700 * 2**20} | ({"host_peak_bytes_before": 1} if formerly else {})
    return {
        "library": "torch 2.13",
        "tokens_per_second": {"median": speed},
        "ratio": {"median": ratio},
        "compiled": compiled,
        "memory": memory,
    }


def write(folder, results):
    for found in results:
        name = f"{found['measurement']['number']}.json"
        (folder / name).write_text(json.dumps(found))


def test_the_page_says_what_the_files_say(tmp_path):
    both = {"name": "torch", "allocators": {"system": peer(8000, 1.5), "tuned": peer(10_000, 1.2, compiled=True)}}
    results = [
        result(1, "RNN", "rnn", 12_345, None, mode="evaluate"),
        result(0, "LSTM 2 × 200", "lstm", 12_000, both, 1.8),
        *(
            result(2 + i, f"{axis} {i}", ("lstm", "transformer")[i // 2], 100 * i + 50, axis=axis, value=2**i)
            for i, axis in enumerate(("batch size", "width", "batch size", "width"))  # numbers of a suite that has grown since
        ),
    ]
    write(tmp_path, results)
    scanned = result(9, "GRU", "gru", 1_550, {"name": "scan", "allocators": {"system": peer(500, 3.1, compiled=True)}}, 3.0)
    suite = [*(found["measurement"] | {"mode": found["mode"]} for found in results)]
    suite += [
        {"name": "generate: LSTM", "mode": "generate", "axis": None, "target": 3.0},
        {"name": "batch size 4: gru", "mode": "train", "axis": "batch size", "target": None},
    ]
    assert "| GRU | 1,550 | 500 (lax.scan) | **3.10** | 3.00 (41%) |  |  | 509 MiB, 700 MiB | 42% |" in page.table([scanned])
    scanned["measurement"]["target_share"] = 0.4
    assert page.table([scanned])[-1].endswith("| **42%** (target 40%) |")
    scanned["measurement"]["target_share"] = 0.45
    assert page.table([scanned])[-1].endswith("| 42% (target 45%) |")
    scanned["share_of_matmul_peak"] = 0.446
    assert page.table([scanned])[-1].endswith("| 44% (target 45%) |")
    one = result(9, "GRU", "gru", 900, {"name": "torch", "allocators": {"system": peer(450, 2.0)}}, 3.0, mode="generate")
    few = one | {"share_of_few_row_matmul_peak": 0.8}
    absent = {"measurement": {"name": "generate: RNN", "target": 3.0}}
    head, _, *rows = page.table([few, one, absent])
    assert head.endswith("| of matmul peak | of few rows' peak |")
    assert rows[0] == "| GRU | 900 | 450 | 2.00 | 3.00 (63%, 120%) |  |  | 509 MiB, 700 MiB | 42% | 80% |"
    assert rows[1] == "| GRU | 900 | 450 | 2.00 | 3.00 (63%) |  |  | 509 MiB, 700 MiB | 42% |  |"
    assert rows[2] == "| RNN | not yet measured |  |  | 3.00 |  |  |  |  |  |"
    assert any("few rows' peak" in line for line in page.provenance([few])) and "few" not in str(page.provenance([one]))
    assert [page._against_target(ratio, 1.3) for ratio in (1.3, 1.2951, 1.2949)] == ["**1.30**", "1.29", "1.29"]
    former = result(9, "GRU", "gru", 1_550, {"name": "torch", "allocators": {"system": peer(500, 3.1, formerly=True)}}, 3.0)
    assert "| GRU | 1,550 | 500 † | 3.10 | 3.00 (41%) |  |  | 509 MiB | 42% |" in page.table([former])  # it reached nothing
    assert any("†" in line for line in page.provenance([former])) and not any("†" in line for line in page.provenance(results))
    assert any("ratio" in line for line in page.provenance(results)) and "ratio" not in str(page.provenance(results[2:]))
    text = page.write_page(tmp_path, "Speed", "Of some.", suite, "python -m this").read_text()
    assert text.startswith("# Speed\n\nOf some.\n\n`python -m this`\n\n## Training\n")
    assert "| LSTM | not yet measured |  |  | 3.00 |  |  |  |  |" in text.splitlines()
    assert "Points of the curves that are not yet measured: 1." in text.splitlines()
    row = "| LSTM 2 × 200 | 12,000 | 8,000 | 1.50 | 1.80 (50%) | 10,000 (compiled) | 1.20 | 500 MiB, 700 MiB | 42% |"
    assert row in text.splitlines()
    assert "| RNN | 12,345 |  |  |  |  |  | 501 MiB | 42% |" in text.splitlines()
    assert text.index("## Training") < text.index("## Evaluation") < text.index("## By batch size")
    assert "![Tokens per second and peak memory by batch size](batch_size.png)" in text
    assert [text.count(f"## By {axis}\n") for axis in ("batch size", "width")] == [1, 1]
    assert (tmp_path / "batch_size.png").stat().st_size > 1000
    assert "- Abacus, 2 cores; Python 3.11, JAX 0.10, torch 2.13; 2026-01-01 to 2026-01-01" in text.splitlines()


def test_curves_draw_each_architecture_over_what_is_varied():
    results = [
        result(0, "x", model, 10 * value, axis="width", value=value) for model in ("gru", "transformer") for value in (8, 2)
    ]
    figure = page.curves(results, "width")
    speed, memory = figure.axes
    assert [line.get_label() for line in speed.lines] == ["gru", "transformer"]
    for line in speed.lines:
        assert list(line.get_xdata()) == [2, 8] and list(line.get_ydata()) == [20, 80]
    assert speed.get_ylabel() == "training (tokens per second)" and "MiB" in memory.get_ylabel()


def test_a_file_that_is_no_measurement_is_named(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with refused("other.json is not a result of launch.suite"):
        page.read_results(tmp_path)


def test_what_is_there_is_not_measured_again(tmp_path, monkeypatch, capsys):
    from launch import suite

    measured = []

    def measure(measurement):
        measured.append(measurement.name)
        return {key: value for key, value in result(0, "", "lstm", 5.0).items() if key != "measurement"}

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(suite, "measure", measure)
    monkeypatch.setattr(suite, "machine", lambda: {"hardware": "Abacus, 2 cores", **DEVICE})
    for arguments in (["--only=width 64: "], ["--only=width 64: "], ["--only=width"]):
        flags.FLAGS(["suite", "--suite=curves", f"--folder={tmp_path}", "--seconds=1000", *arguments])
        suite.main([])
    assert measured[:4] == [f"width 64: {name}" for name in ARCHITECTURES]
    assert len(measured) == len(set(measured)) == 20
    assert len(list(tmp_path.glob("*.json"))) == 20 and (tmp_path / "width.png").exists()
    kept = tmp_path / "width_64_gru.json"
    kept.write_text(kept.read_text().replace('"rounds": 3', '"rounds": 2'))
    with refused(f"{kept} was measured with rounds = 2, but it is 3 now", "remove it"):
        suite.main([])
    kept.unlink()
    monkeypatch.setattr(suite, "machine", lambda: {"hardware": "Slide rule, 1 core", **DEVICE})
    with refused("was measured on Abacus, 2 cores, and this is Slide rule, 1 core", "--folder"):
        suite.main([])
    on_gpu = {"hardware": "Abacus, 2 cores", "platform": "gpu", "device": "H100", "num_devices": 8}
    monkeypatch.setattr(suite, "machine", lambda: on_gpu)
    with refused("was measured on Abacus, 2 cores, and this is Abacus, 2 cores, 8 × H100"):
        suite.main([])


def test_devices_that_are_emulated_are_of_any_machine_with_that_processor(tmp_path):
    from launch import suite

    path = tmp_path / "one.json"
    path.write_text(json.dumps({"environment": {"hardware": "Abacus, 2 cores", **DEVICE, "num_devices": 4}}))
    on_gpu = {"hardware": "Abacus, 2 cores", "platform": "gpu", "device": "H100", "num_devices": 8}
    emulated = next(measurement for measurement in SUITES["curves"]() if measurement.num_emulated)
    suite.check_machine([(path, emulated)], on_gpu)
    with refused("was measured on Abacus"):
        suite.check_machine([(path, emulated)], on_gpu | {"hardware": "Slide rule, 1 core"})


def test_the_cpu_suite_is_measured_on_the_cpu_of_any_machine(tmp_path, monkeypatch):
    from launch import suite

    seen = []

    def measure(measurement):
        seen.append(os.environ["JAX_PLATFORMS"])
        return {key: value for key, value in result(0, "", "lstm", 5.0).items() if key != "measurement"}

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(suite, "measure", measure)
    flags.FLAGS(["suite", "--suite=cpu", f"--folder={tmp_path}", "--only=generate: RNN 2 × 650, 1 at"])
    suite.main([])
    assert seen == ["cpu"] and os.environ["JAX_PLATFORMS"] == ""


def test_what_cannot_be_measured_is_told_and_the_rest_is_done(tmp_path, monkeypatch, capsys):
    from launch import suite

    def measure(measurement):
        if measurement.name.endswith("gru"):
            raise UserError("the device's memory ran out")
        return {key: value for key, value in result(0, "", "lstm", 5.0).items() if key != "measurement"}

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(suite, "measure", measure)
    flags.FLAGS(["suite", "--suite=curves", f"--folder={tmp_path}", "--only=width 64: "])
    with refused("not measured: width 64: gru", "has the rest"):
        suite.main([])
    assert len(list(tmp_path.glob("*.json"))) == len(ARCHITECTURES) - 1
    assert "not measured: the device's memory ran out" in capsys.readouterr().err


def test_where_there_is_no_gpu_its_page_says_what_is_not_yet_measured(tmp_path):
    (done,) = call_verbs([["launch.suite", "--suite=gpu", f"--folder={tmp_path / 'gpu'}"]], tmp_path)
    assert done.code == 1 and "the gpu suite needs a GPU" in done.err
    text = (tmp_path / "gpu" / "README.md").read_text()
    assert text.count("not yet measured") == len(SUITES["gpu"]()) and "| LSTM 2 × 1500, 20 × 35 | not yet measured |" in text
    assert f"`python -m launch.suite --suite=gpu --folder={tmp_path / 'gpu'}`" in text


def test_a_suite_without_a_folder_or_with_an_unknown_name_is_refused(tmp_path):
    calls = [["launch.suite"], ["launch.suite", "--suite=curves", f"--folder={tmp_path / 'x'}", "--only=nothing"]]
    nothing, unknown = call_verbs(calls, tmp_path)
    assert nothing.code == 1 and "give --suite (cpu, gpu or curves) and --folder" in nothing.err
    assert unknown.code == 1 and "--only=nothing is in no name of the curves suite" in unknown.err
    assert not list(pathlib.Path(tmp_path / "x").glob("*"))
