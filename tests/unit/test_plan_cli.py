"""`megatron-tempo plan`: what fits, what does not and what would, and that no torch is loaded."""

from __future__ import annotations

import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.config.choices import Placement
from megatron_tempo.config.rules import Purpose
from megatron_tempo.plan.search import nearest, plan_of, search
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.split import laid_out
from megatron_tempo.plan.table import seconds_text
from tests.support.matrix import matrix

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted(path.stem for path in (ROOT / "configs" / "cluster").glob("*x*[0-9].yaml"))  # machines, not sites
PAPER = ["qwen3_8b_aime", "qwen3_14b_aime", "olmo3_7b_aime"]
# The presets' ways to save memory, taken back.
PLAIN = ["engine=embedded", "parallel.recompute=none", "parallel.offload=false"]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_there_are_clusters_of_both_gpus() -> None:
    assert [f"{gpu}x{gpus}" for gpu in ("h100", "h200") for gpus in (16, 64, 8)] == CLUSTERS
    for name in CLUSTERS:
        config = cli.build(["experiment=qwen3_8b_aime", f"cluster={name}"], purpose=Purpose.plan)
        assert config.cluster is not None
        assert config.cluster.gpus == int(name.split("x")[1])
        assert config.cluster.memory_gb == {"h100": 80, "h200": 141}[name[:4]]


@pytest.mark.long
@pytest.mark.parametrize(
    ("experiment", "cluster"),
    matrix(
        [(experiment, cluster) for experiment in PAPER for cluster in ("h100x8", "h100x64", "h200x16")],
        [("qwen3_8b_aime", "h100x8"), ("qwen3_14b_aime", "h100x64"), ("olmo3_7b_aime", "h200x16")],
    ),
)
def test_what_is_suggested_fits(experiment: str, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"experiment={experiment}", f"cluster={cluster}", *PLAIN]
    status, out, _ = plan(capsys, *words)
    assert status == 1
    assert "does not fit: generate: the " in out
    suggested = re.findall(r"^(?:smallest change that fits|change that fits|fastest): (.*)$", out, re.MULTILINE)
    assert suggested or "not even with 8 times as many nodes, or with 1/16 of the response length" in out
    for line in suggested:
        status, changed, _ = plan(capsys, *words, *shlex.split(line))
        assert status == 0, line
        assert "\nfits: " in changed


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("experiment", PAPER)
def test_the_papers_experiments_fit_as_shipped(
    experiment: str, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Colocated on one or two nodes."""
    status, out, _ = plan(capsys, f"experiment={experiment}", f"cluster={cluster}")
    assert status == 0
    nodes = int(cluster.split("x")[1]) // 8
    together = nodes <= 2
    assert (f"{2 * nodes} servers with tensor 4, colocated on the trainer's GPUs, by turns" in out) == together
    assert re.search("^placement: colocated takes .* disaggregated ", out, re.MULTILINE)
    assert f"page-locked host memory per node: {8 if together else 4} processes x " in out


def test_both_placements_are_searched_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """14 billion parameters do not fit on the four GPUs that servers leave. By turns they fit, on all eight."""
    words = ["experiment=qwen3_14b_aime", "cluster=h100x8"]
    status, out, _ = plan(capsys, *words, "rollout.placement=disaggregated")
    assert status == 1
    (line,) = re.findall("^smallest change that fits: (.*)$", out, re.MULTILINE)
    _, changed, _ = plan(capsys, *words, "rollout.placement=disaggregated", *shlex.split(line))
    assert "\nfits: " in changed
    first, *why = out[out.index("\nplacement: ") :].splitlines()[1:4]
    faster, slower = (float(number.replace(",", "")) for number in re.findall(r"([\d,]+) s", first))
    assert first.startswith("placement: colocated takes ")
    assert faster < slower / 2
    assert [line.split(":")[0] for line in why] == ["  colocated", "  disaggregated"]
    for text, whole in zip(why, (faster, slower), strict=True):
        assert sum(float(n.replace(",", "")) for n in re.findall(r"([\d,.]+) s\b", text)) == pytest.approx(whole, abs=2)
    assert re.search("^  disaggregated: [1-7] GPUs generate for .* s, then [1-7] train for ", why[1])


def test_the_staleness_that_keeps_both_sides_busy(capsys: pytest.CaptureFixture[str]) -> None:
    """On one node a response of full length takes a small part of an iteration, on eight nodes a quarter of it. With
    a short response limit and few prompts it takes as long as the iteration."""
    expected = {"cluster=h100x8": 1, "cluster=h100x64": 2, "cluster=h100x64 stage2.unlabelled_prompts=64": 2}
    for words, k in expected.items():
        _, out, _ = plan(capsys, "experiment=qwen3_8b_aime", *words.split())
        (line,) = re.findall("^staleness: disaggregated, (.*)$", out, re.MULTILINE)
        assert f"rollout.max_staleness={k} " in line
        whole, response = (float(n.replace(",", "")) for n in re.findall(r"([\d,.]+) s\b", line))
        assert (response > 0.05 * whole) == (k > 1)
    words = ["experiment=qwen3_8b_aime", "cluster=h100x8", "rollout.placement=disaggregated", "rollout.max_staleness=1"]
    _, out, _ = plan(capsys, *words)
    seconds = next(line for line in out.splitlines() if line.startswith("at full length")).split()[3:]
    generate, *rest, whole = (float(text.replace(",", "")) for text in seconds)
    assert whole == max(generate, sum(rest))
    assert re.search("^  disaggregated: 4 GPUs generate for .* s, while 4 train for ", out, re.MULTILINE)


def test_a_smaller_share_makes_room_for_fp8_weights_that_stay(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=qwen3_8b_aime", "cluster=h100x8", "run.precision=fp8_blockwise"]
    status, out, _ = plan(capsys, *words)
    assert status == 1
    assert "does not fit: generate: the KV cache 4.9 GB over the limit" in out
    (line,) = re.findall("^smallest change that fits: (.*)$", out, re.MULTILINE)
    assert line == """'rollout.servers.arguments=["--gpu-memory-utilization=0.8"]'"""
    status, out, _ = plan(capsys, *words, *shlex.split(line))
    assert status == 0
    *_, total, free = next(row for row in out.splitlines() if row.startswith("generate ")).split()
    assert (total, free) == ("70.9", "3.1")  # 64 of the server, 6.9 of the trainer


def test_the_host_memory_that_a_checkpoint_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """14 bytes for each of 8.19 billion parameters of the actor and 7.57 of the critic, which has no output layer.

    Two tensor ranks hold half of them each, which two data-parallel ranks share."""
    words = ["experiment=qwen3_8b_aime", "cluster=h100x8", "parallel.pipeline=1", "parallel.tensor=2"]
    _, out, _ = plan(capsys, *words, "rollout.placement=disaggregated")
    assert "host memory per node for checkpoints: 4 processes x 55.2 = 221 GB" in out


def test_the_first_thing_over_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=qwen3_8b_aime", "cluster=h100x8", *PLAIN]
    servers = ["rollout.engine=vllm", "rollout.servers.devices=[4,5,6,7]", "rollout.servers.replicas=4"]
    _, out, _ = plan(capsys, *words, *servers, "parallel.tensor=1", "parallel.sequence=false")
    # Two models of 2 bytes a weight and 4 a gradient, of 8.2 and 7.6 billion: 94.6 GB.
    assert "does not fit: generate: the gradients" in out
    for share, part, over in ((0.1, "engine weights", 11.1), (0.22, "KV cache", 1.5)):  # 16.4, 2.7 a row
        arguments = f"rollout.servers.arguments=['--gpu-memory-utilization={share}']"
        _, out, _ = plan(capsys, *words, *servers, arguments)
        assert f"does not fit: serve: the {part} {over} GB over" in out
    _, out, _ = plan(capsys, *words, "rollout.batch_rows=8", "rollout.max_response_tokens=1024")
    assert re.search(r"does not fit: (critic|actor): the activations [\d.]+ GB over", out)


def test_the_search_keeps_to_the_rules() -> None:
    config = cli.build(["experiment=qwen3_14b_aime", "cluster=h200x16"], purpose=Purpose.plan)
    shape, _ = shape_of(config)
    assert shape is not None
    plans = search(config, shape)
    assert len(plans) > 3
    assert {one.config.rollout.placement for one in plans} == set(Placement)
    assert [one.iteration for one in plans] == sorted(one.iteration for one in plans)
    for one in plans:
        assert one.over is None
        assert laid_out(one.config, shape) == []
        layout = one.layout
        assert 40 % layout.tensor == 8 % layout.tensor == 17408 % layout.tensor == 0 < layout.pipeline <= 40
        assert layout.tensor * layout.pipeline * layout.data == one.split.trainers
        turns = one.config.rollout.is_colocated
        assert one.split.trainers == one.split.serving == 16 if turns else one.split.trainers + one.split.serving <= 16
        assert layout.pipeline == 1 or not turns, "each node has a whole copy"
        assert (one.split.trainers // 2) % layout.tensor == 0  # inside a node
    least = nearest(plans)
    assert least is not None
    assert len(least.words) == min(len(one.words) for one in plans)
    again = cli.build(
        ["experiment=qwen3_14b_aime", "cluster=h200x16", *shlex.split(" ".join(least.words))], purpose=Purpose.plan
    )
    assert again == least.config
    assert plan_of(again, shape).memory == least.memory


def test_a_configuration_that_fits_is_marked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    words = ["experiment=qwen3_8b_aime", "cluster=h200x8", "rollout.batch_rows=16", "--picture", str(picture)]
    status, out, err = plan(capsys, *words)
    assert (status, err) == (0, "")
    assert "8.19 billion parameters, 36 layers, on 8 x H200 of 141 GB" in out
    assert len(re.findall(r"^\*  ", out, re.MULTILINE)) == 1
    assert "not measured" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


REFUSED = {
    "experiment=qwen3_8b_aime": "cluster=null: it is not set, so the machines to plan for are unknown",
    "cluster=h100x8 stage1.iterations=1": "model.path=???: it is not set, so the model to plan for is unknown",
    "experiment=qwen3_8b_aime cluster=h100x8 cluster.gpu_count=3": "cluster.gpu_count=3: there is no such field",
    "experiment=qwen3_8b_aime cluster=h100x8 cluster.compute_share=2": "must be above 0 and at most 1",
    "experiment=qwen3_8b_aime cluster.memory_gb=80": "cluster.bf16_tflops=0.0: must be above 0",
    "experiment=qwen3_8b_aime cluster=h100x9": "there is no preset of this name in configs/cluster",
    "experiment=qwen3_8b_aime cluster=h100x8 parallel.tensor=3": "does not divide the 32 attention heads",
    "experiment=qwen3_8b_aime cluster=h100x8 parallel.world_size=16": "the cluster has 8 GPUs",
    "experiment=qwen3_8b_aime cluster=h100x8 rollout.engine=vllm rollout.servers.devices=[8]": "different numbers",
    "experiment=qwen3_8b_aime cluster=h100x8 model.path=nowhere": "has no config.json",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_planned(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = plan(capsys, *words.split())
    assert (status, out) == (2, "")
    assert REFUSED[words] in err


def test_a_picture_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["experiment=qwen3_8b_aime", "cluster=h200x8", "--picture"]
    for path in (tmp_path / "none" / "a.png", tmp_path / "a.what"):
        status, _, err = plan(capsys, *words, str(path))
        assert status == 2
        assert err.startswith("error: --picture=")


def test_a_plan_loads_no_torch_and_takes_a_moment() -> None:
    code = (
        "import sys; from megatron_tempo.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'megatron.core', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(status)"
    )
    words = ["plan", "experiment=qwen3_8b_aime", "cluster=h200x8", "rollout.batch_rows=16"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("[]\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12


def test_a_tiny_model_is_planned_without_servers(capsys: pytest.CaptureFixture[str]) -> None:
    """The quickstart's 156 thousand parameters: no engine to install, and no layout to change for milliseconds."""
    status, out, _ = plan(capsys, "experiment=quickstart", "cluster=h100x8")
    assert status == 0
    assert "vllm" not in out
    assert "fastest:" not in out
    times = next(line for line in out.splitlines() if line.startswith("at full length"))
    assert float(times.split()[-1]) > 0


def test_a_large_one_on_the_embedded_engine_is_planned_with_servers(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(capsys, "experiment=qwen3_8b_aime", "cluster=h200x8", "engine=embedded")
    assert "rollout.engine=vllm" in out


@pytest.mark.parametrize(("seconds", "shown"), [(1234.4, "1,234"), (12.3, "12"), (0.0123, "0.012"), (0.0, "0")])
def test_seconds_have_two_digits_at_least(seconds: float, shown: str) -> None:
    assert seconds_text(seconds) == shown


def test_the_readme_states_what_runs_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes an iteration and time of the run by the planner: of one that a person would start, and of the paper's."""
    text = " ".join((ROOT / "README.md").read_text().split("## ")[0].split())

    def seconds(experiment: str, cluster: str) -> tuple[float, float]:
        status, out, _ = plan(capsys, f"experiment={experiment}", f"cluster={cluster}")
        assert status == 0
        times = next(line for line in out.splitlines() if line.startswith("at full length"))
        each = float(times.split()[-1].replace(",", ""))
        config = cli.build([f"experiment={experiment}", f"cluster={cluster}"], purpose=Purpose.plan)
        return each, each * sum(stage.iterations for stage in config.stages().values())

    each, whole = seconds("qwen3_8b_day", "h100x8")
    assert whole < 24 * 3600
    assert (
        f"`experiment=qwen3_8b_day` takes {each / 60:.0f} minutes an iteration and {whole / 3600:.0f} hours in all on "
        "one node of eight H100"
    ) in text
    each, whole = seconds("qwen3_8b_aime", "h100x64")
    _, alone = seconds("qwen3_8b_aime", "h100x8")
    assert (
        f"`experiment=qwen3_8b_aime`, takes {each / 60:.0f} minutes an iteration and {whole / 86400:.0f} days on eight "
        f"such nodes, and {alone / 86400:.0f} days on one"
    ) in text
    assert "Nothing has run on a GPU yet" in text
    assert "Apache-2.0" in text
    assert re.search(r"make test +# .*about \d+ minutes on two cores", text)
