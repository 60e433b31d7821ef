"""Runs the study: TEMPO and other methods from the same stage-1 checkpoints, at the quickstart's size.

    python tools/study.py run [--jobs 2] [--task TASK] [--only NAME ...] [--seeds 0 1 2]    # train what is not done
    python tools/study.py report                                              # write docs/study.md and its pictures

NAME is a group of arms (a part of docs/study.md), such as `methods`, or an arm. Each seed has one run of stage 1 for
each start: a base model and its questions. Each arm has a run of stage 2 per seed, from the seed's stage-1 actor and
critic. A run uses one process and one core, so its results depend neither on the number of cores nor on the
order of runs. `--jobs` of them run at a time. Interrupted runs are resumed, and finished runs are skipped. All files
are below runs/study.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import factorial

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "quickstart"
OUT = ROOT / "runs" / "study"
SEEDS = (0, 1, 2)
CHOICE_SEEDS = (0, 1)  # of the runs from which TEMPO+ was chosen
TEST_SEEDS = {"first_test": (10, 11, 12, 13, 14), "second_test": (15, 16, 17, 18, 19)}  # of those that test it
PLAIN_COUNTDOWN = ROOT / "build" / "countdown-plain"  # of tools/make_quickstart.py, with --misled 0
LOGIC_DATES = ROOT / "build" / "logic-dates"  # of tools/make_logic_dates.py

# One core, and no GPU.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Evaluate with pass@k up to all sixteen samples; a third set with questions of the labelled set.
COMMON = (
    "metrics.progress=false", "metrics.report=false", "evaluation.pass_k=[1,2,4,8,16]",
    "evaluation.votes=true",
    "evaluation.sets.labelled.limit=256", "evaluation.sets.labelled.answer_field=answer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Start:
    """Where runs start: a task, its questions and a base model, of which each seed has one run of stage 1."""

    name: str  # of the folder of stage 1
    task: str
    words: tuple[str, ...]  # overrides of all runs; {data} is the folder of the study's own sets
    model: tuple[str, ...] = ()  # overrides of stage 1


COUNTDOWN_WORDS = (
    "experiment=quickstart", *COMMON, "evaluation.every=10",
    "evaluation.sets.labelled.verifier=countdown", "evaluation.sets.labelled.chat_template=false",
)  # fmt: skip
COUNTDOWN = Start("stage1", "countdown", (
    *COUNTDOWN_WORDS, f"evaluation.sets.labelled.path={EXAMPLES / 'labelled.jsonl'}",
))  # fmt: skip
COUNTDOWN_PLAIN = Start("stage1_plain", "countdown", COUNTDOWN.words, (f"model.path={PLAIN_COUNTDOWN / 'model'}",))
COUNTDOWN_TESTS = {
    test: Start(f"stage1_{test}", "countdown", (
        *COUNTDOWN_WORDS, *(f"data.{name}.path={{data}}/{test}_{name}.jsonl" for name in ("labelled", "unlabelled")),
        *(f"evaluation.sets.{name}.path={{data}}/{test}_{name}.jsonl" for name in ("heldout", "labelled")),
    )) for test in TEST_SEEDS
}  # fmt: skip
SECOND_TASK = Start("stage1_logic_dates", "logic_dates", (
    "experiment=logic_dates", *COMMON, "evaluation.every=20",
    f"evaluation.sets.labelled.path={LOGIC_DATES / 'labelled.jsonl'}",
    "evaluation.sets.labelled.id_field=id", "evaluation.sets.labelled.verifier=text",
))  # fmt: skip
TASKS = ("countdown", "logic_dates")


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to train in stage 2: overrides, and their description."""

    name: str
    words: tuple[str, ...]  # {data} is the folder of the study's own sets, {seed} the run's seed
    what: str
    group: str  # of the tables and pictures
    start: Start = COUNTDOWN
    seeds: tuple[int, ...] = SEEDS


def ours(name: str, what: str, group: str, *words: str) -> Arm:
    return Arm(name, words, what, group)


# Where only the end of a run counts.
FEW = "evaluation.every=35"

# Changes that several arms have.
LABELLED, KL = "stage2.actor_on_labelled=true", "stage2.actor.kl_coef=0.02"
EARLY = "stage2.baseline=reference"
WHITENED, VALUES_BEFORE = "stage2.actor.whiten_advantages=true", "stage2.value_timing=before_estep"
ENTROPY = ("stage2.actor.entropy_target=0.12", "stage2.actor.entropy_coef=0.05")

# 64 labelled questions, half of them chosen for the seed's policy of stage 1 (`write_acquired`).
ACQUIRED = "data.labelled.path={data}/acquired_{seed}.jsonl"

# A run of both stages, where the others start from the export of stage 1.
BOTH_STAGES = ("stage1.iterations=70", f"model.path={EXAMPLES / 'model'}", "model.critic_path=null")


def in_test(test: str, *arms: tuple[str, ...]) -> Iterator[Arm]:
    """The arms of a test of TEMPO+, each given as its name, description and overrides."""
    for name, what, *words in arms:
        yield Arm(f"{test}_{name}", (*words, FEW), what, test, COUNTDOWN_TESTS[test], TEST_SEEDS[test])


# The arm that a group's arms are compared with, if it is not "tempo": TEMPO on their machine, start or length.
BASELINES = {"choices": "tempo_again", "labels": "tempo_again", "transfer": "tempo_again", "long": "long_tempo",
             "early_parts": "early_tempo", "acquisition": "tempo_64_random", "refined": "factorial_none",
             "first_test": "first_test_tempo", "second_test": "second_test_tempo", "plain": "plain_tempo",
             "logic_dates": "logic_tempo"}  # fmt: skip

# The paper's Figure 4: 350 iterations of stage 2.
LONG = ("stage2.iterations=350", "evaluation.every=25")

# The main arms, which other parts have too.
FIVE = (
    ("tempo", "TEMPO", "algorithm=paper"),
    ("ttrl", "TTRL", "algorithm=ttrl"),
    ("empo", "EMPO", "algorithm=empo"),
    ("ppo", "PPO on the labelled questions, continued", "algorithm=ppo"),
    ("grpo", "GRPO on the labelled questions", "algorithm=grpo"),
)

# A correction whose bounds make every weight 1: `check` refuses stale rollouts without a correction.
UNCORRECTED = ("stage2.actor.correction.level=token", "stage2.actor.correction.low=0.999999",
               "stage2.actor.correction.high=1.000001")  # fmt: skip

ARMS = (
    # Table 1, Figures 1 and 3
    ours("tempo", "TEMPO", "methods", "algorithm=paper"),
    ours("frozen_critic", "TEMPO, the critic frozen", "methods", "algorithm=frozen_critic"),
    ours("reference", "TEMPO as its published code has it", "methods", "algorithm=reference"),
    ours("ttrl", "TTRL", "methods", "algorithm=ttrl"),
    ours("ttrl_guard", "TTRL-Guard", "methods", "algorithm=ttrl_guard"),
    ours("scrl", "SCRL, 32 responses vote", "methods", "algorithm=scrl"),
    ours("empo", "EMPO", "methods", "algorithm=empo"),
    ours("intuitor", "Intuitor", "methods", "algorithm=intuitor"),
    ours("entropy_min", "entropy minimisation", "methods", "algorithm=entropy_min"),
    ours("ppo", "PPO on the labelled questions, continued", "methods", "algorithm=ppo"),
    ours("grpo", "GRPO on the labelled questions", "methods", "algorithm=grpo"),
    # The effect of each choice. These three parts come from another machine, so they have their own TEMPO.
    ours("tempo_again", "TEMPO", "choices", "algorithm=paper"),
    ours("baseline_paper", "baseline after the token (Eq. 11 read literally)", "choices", "stage2.baseline=paper"),
    ours("baseline_reference", "reward and baseline one token early", "choices", EARLY),
    ours("whitened", "whitened advantages", "choices", WHITENED),
    ours("values_before", "values before the E-step", "choices", VALUES_BEFORE),
    ours("estep_2", "an E-step every 2 iterations", "choices", "stage2.estep_every=2"),
    ours("estep_4", "an E-step every 4 iterations", "choices", "stage2.estep_every=4"),
    ours("estep_8", "an E-step every 8 iterations", "choices", "stage2.estep_every=8"),
    # The labelled set
    ours("labelled_512", "512 labelled questions", "labels", "data.labelled.limit=512"),
    ours("labelled_64", "64 labelled questions", "labels", "data.labelled.limit=64"),
    ours("labelled_near", "only labelled questions of the unlabelled ones' kind", "labels",
         "data.labelled.path={data}/misleading.jsonl"),
    ours("labelled_far", "only labelled questions of the other kinds", "labels",
         "data.labelled.path={data}/other.jsonl"),
    # Which questions to label
    *(Arm(f"{name}_64_{choice}", (FEW, f"algorithm={preset}", word), f"{what}; {how}", "acquisition")
      for name, what, preset in (("tempo", "TEMPO", "paper"), ("grpo", "GRPO on the labelled questions", "grpo"))
      for choice, how, word in (("random", "64 at random", "data.labelled.limit=64"),
                                ("acquired", "32 at random, 32 chosen", ACQUIRED))),
    # Retention and transfer
    ours("more_unlabelled", "four times as many unlabelled questions", "transfer",
         "data.unlabelled.path={data}/unlabelled_2048.jsonl", "data.labelled.path={data}/rest.jsonl",
         f"evaluation.sets.unlabelled.path={EXAMPLES}/unlabelled.jsonl"),
    ours("kl", "a KL term, 0.02, to the policy of stage 1", "transfer", KL),
    ours("labelled_term", "labelled rows in the M-step", "transfer", LABELLED),
    # Asynchronous rollouts: the most updates between generation and use, without and with a correction
    *(ours(f"stale_{k}_{name}", f"max_staleness={k}, {what}", "staleness", f"rollout.max_staleness={k}", *words)
      for k in (1, 2, 4) for name, what, words in (
          ("uncorrected", "weights of 1", UNCORRECTED), ("corrected", "tokens weighted by their ratios, up to 2",
           ("stage2.actor.correction.level=token", "stage2.actor.correction.high=2")))),
    # Responses that do not end
    ours("truncated_masked", "truncated responses masked", "truncation", "stage2.truncated_responses=masked"),
    ours("truncated_penalised", "truncated responses penalised over the last 5 tokens", "truncation",
         "stage2.truncated_responses=penalised", "stage2.length_penalty_tokens=5"),
    # Why the published code does not collapse: its differences from the paper, with its early baseline
    ours("early_baseline", "reward and baseline one token early", "early", EARLY),
    ours("early_labelled", "one token early; labelled rows in the M-step", "early", EARLY, LABELLED),
    ours("reference_unlabelled", "as its published code has it, without labelled rows", "early",
         "algorithm=reference", "stage2.actor_on_labelled=false"),
    # Which of its other differences, one at a time; on another machine, so with its own TEMPO
    *(ours(f"early_{name}", what, "early_parts", FEW, *words) for name, what, *words in (
        ("tempo", "TEMPO"),
        ("alone", "reward and baseline one token early", EARLY),
        ("whitened", "one token early; whitened advantages", EARLY, WHITENED),
        ("values_before", "one token early; values before the E-step", EARLY, VALUES_BEFORE),
        ("targets", "one token early; the critic trained on -1 and 1", EARLY,
         "stage2.critic.targets=plus_minus_one"),
        ("clip", "one token early; the critic's loss clipped at 0.1", EARLY, "stage2.critic.clip=0.1"),
        ("mixed_groups", "one token early; the critic trained on mixed groups only", EARLY,
         "stage2.critic.drop_uniform_groups=true"))),
    # From a base model without a misconception
    *(Arm(f"plain_{name}", (words,), what, "plain", COUNTDOWN_PLAIN) for name, what, words in FIVE),
    # The second round of the choice: what the factorial part favours, and how much of it
    *(Arm(f"refined_{name}", (FEW, *words), what, "refined", seeds=CHOICE_SEEDS) for name, what, words in (
        ("only_kl", "KL 0.02", (KL,)),
        ("only_strong_kl", "KL 0.05", ("stage2.actor.kl_coef=0.05",)),
        ("kl_to_base", "both stages in one run; KL 0.02, to the base model", (KL, *BOTH_STAGES)),
        ("kl_to_start", "both stages in one run; KL 0.02, to the policy of stage 1", (
            KL, "stage2.actor.kl_reference=start", *BOTH_STAGES)),
        ("kl", "labelled rows; KL 0.02", (LABELLED, KL)),
        ("kl_weak", "labelled rows; KL 0.01", (LABELLED, "stage2.actor.kl_coef=0.01")),
        ("entropy", "labelled rows; an entropy target of 0.12", (LABELLED, *ENTROPY)),
        ("kl_best_2", "labelled rows; KL 0.02; the best of 2", (LABELLED, KL, "stage2.pass_at_k=2")),
        ("kl_rows_32", "labelled rows, of 32 prompts; KL 0.02", (LABELLED, KL, "stage2.labelled_prompts=32")),
        ("kl_rows_16", "labelled rows, of 16 prompts; KL 0.02", (LABELLED, KL, "stage2.labelled_prompts=16")),
        ("kl_epochs_2", "labelled rows; KL 0.02; two epochs of the actor", (LABELLED, KL, "stage2.actor.epochs=2")),
        ("epochs_2", "two epochs of the actor", ("stage2.actor.epochs=2",)))),
    # What was chosen, on questions and seeds that the choice has not seen: the first choice, and the second
    *in_test("first_test", FIVE[0], ("both", "TEMPO with labelled rows and KL 0.02", LABELLED, KL), *FIVE[3:]),
    *in_test("second_test", FIVE[0], ("tempo_plus", "TEMPO+", "algorithm=tempo_plus"), *FIVE[3:]),
    # Figure 4
    ours("long_tempo", "TEMPO, 350 iterations", "long", *LONG),
    ours("long_tempo_plus", "TEMPO+, 350 iterations", "long", *LONG, "algorithm=tempo_plus"),
    # The second task
    *(Arm(f"logic_{name}", (words,), what, "logic_dates", SECOND_TASK)
      for name, what, words in (*FIVE, ("tempo_plus", "TEMPO+", "algorithm=tempo_plus"))),
)  # fmt: skip

# Seven changes of TEMPO together, to choose from.
FACTORIAL = tuple(
    Arm(factorial.name_of(levels), (FEW, *factorial.words_of(levels)), factorial.what_of(levels),
        "factorial", seeds=CHOICE_SEEDS)
    for levels in factorial.design()
)  # fmt: skip
EVERY = (*ARMS, *FACTORIAL)


def write_files() -> None:
    """Write other sets, made from the quickstart's labelled questions.

    Those of the tests of TEMPO+ are misleading questions, which the base model has not been pretrained on and which no
    other part of the study trains on without answers or evaluates. The labelled questions there do not have them, and
    begin with others than the quickstart's.
    """
    from countdown_task import every_question

    misleading = {question.prompt for question in every_question() if question.misleading}
    read = [json.loads(line) for line in (EXAMPLES / "labelled.jsonl").read_text().splitlines()]
    near = [row for row in read if row["prompt"] in misleading]
    moved = {row["id"] for row in near[:1536]}
    unlabelled = [json.loads(line) for line in (EXAMPLES / "unlabelled.jsonl").read_text().splitlines()]
    sets = {
        "misleading": near,
        "other": [row for row in read if row["prompt"] not in misleading],
        "unlabelled_2048": [{"id": r["id"], "prompt": r["prompt"]} for r in [*unlabelled, *near[:1536]]],
        "rest": [row for row in read if row["id"] not in moved],
        "pool": read[:1024],
        "known": read[:32],
    }
    for test, fresh in zip(TEST_SEEDS, (near[-768:], near[-1536:-768]), strict=True):
        taken = {row["id"] for row in fresh}
        sets |= {f"{test}_unlabelled": fresh[:512], f"{test}_heldout": fresh[512:]}
        sets[f"{test}_labelled"] = [row for row in (*read[256:], *read[:256]) if row["id"] not in taken]
    data().mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = data() / f"{name}.jsonl"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def write_acquired(seed: int) -> None:
    """Write the labelled questions of ACQUIRED, which depend on a seed's stage 1.

    Its policy answers 1024 labelled questions. CARE's rule knows the labels of the first 32, and chooses 32 others.
    """
    made, run = data() / f"acquired_{seed}.jsonl", folder("acquired", seed)
    if made.exists():
        return
    chosen, pool, known = run / "chosen.jsonl", data() / "pool.jsonl", data() / "known.jsonl"
    if not (run / "results.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        _program("-m", "megatron_tempo", "eval", f"model={exported(seed) / 'actor'}", f"data={pool}", f"run.dir={run}",
                 "evaluation.sets.pool.id_field=id", "evaluation.sets.pool.verifier=countdown",
                 "evaluation.sets.pool.chat_template=false", "rollout.max_prompt_tokens=7",
                 "rollout.max_response_tokens=15", "rollout.batch_rows=1024")  # fmt: skip
    chosen.unlink(missing_ok=True)
    _program(ROOT / "tools" / "acquire.py", run / "responses.jsonl", pool, "--verifier", "countdown", "--budget", "32",
             "--known", known, "--out", chosen)  # fmt: skip
    made.write_text(known.read_text() + chosen.read_text())


def _program(*words: str | Path) -> None:
    """Run a program on a CPU, one core."""
    subprocess.run([sys.executable, "-W", "ignore", *words], check=True, cwd=ROOT, env=ENVIRONMENT)


def data() -> Path:
    """The folder that `write_files` writes to."""
    return OUT / "data"


def folder(arm: str, seed: int) -> Path:
    return OUT / f"seed{seed}" / arm


def exported(seed: int, start: Start = COUNTDOWN) -> Path:
    """The folder with the actor and critic of a seed's stage 1."""
    (folder_of_export,) = folder(start.name, seed).glob("hf_step_*")
    return folder_of_export


def is_done(run: Path) -> bool:
    """Whether `train` has completed this run."""
    return (run / "done").exists()


def stage_one(seed: int, start: Start = COUNTDOWN) -> list[str]:
    run = folder(start.name, seed)
    return _filled_in(seed, *start.words, *start.model, f"run.seed={seed}", f"run.dir={run}", "stage2.iterations=0",
                      "evaluation.every=0")  # fmt: skip


def stage_two(arm: Arm, seed: int) -> list[str]:
    export = exported(seed, arm.start)
    models = [f"model.path={export / 'actor'}", f"model.critic_path={export / 'critic'}"]
    return _filled_in(seed, *arm.start.words, *models, f"run.seed={seed}", f"run.dir={folder(arm.name, seed)}",
                      "stage1.iterations=0", "checkpoint.export_hf=false", *arm.words)  # fmt: skip


def _filled_in(seed: int, *words: str) -> list[str]:
    return [word.replace("{data}", str(data())).replace("{seed}", str(seed)) for word in words]


def train(run: Path, words: list[str]) -> None:
    """Train a run, unless it is done. Raises RuntimeError with the end of its output if it fails."""
    if is_done(run):
        return
    run.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    log = run / "log.txt"
    with log.open("a") as output:
        status = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "megatron_tempo", "train", *words],
            stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT,
        ).returncode  # fmt: skip
    if status:
        end = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{run} ended with status {status}:\n{end}")
    (run / "done").write_text(f"{time.monotonic() - began:.0f}\n")
    print(f"{run.relative_to(OUT)}: {time.monotonic() - began:.0f} s", flush=True)


def jobs(arms: list[Arm], seeds: list[int] | None) -> Iterator[tuple[Arm, int]]:
    """All arms of a seed before the next seed, so that an interrupted study has complete comparisons.

    `seeds`: if given, only these; else each arm's own.
    """
    for seed in sorted({seed for arm in arms for seed in arm.seeds} | set(seeds or ())):
        for arm in arms:
            if seed in (arm.seeds if seeds is None else seeds):
                yield arm, seed


def make_bases(starts: list[Start]) -> None:
    """Make the questions and base models of these starts that are not part of the repository, if they are not there."""
    if any(start.task == "countdown" for start in starts):
        write_files()
    if COUNTDOWN_PLAIN in starts and not (PLAIN_COUNTDOWN / "model" / "model.safetensors").exists():
        words = ["--out", PLAIN_COUNTDOWN, "--misled", "0", "--force"]
        subprocess.run([sys.executable, ROOT / "tools" / "make_quickstart.py", *words], check=True)
    if SECOND_TASK in starts:
        subprocess.run([sys.executable, ROOT / "tools" / "make_logic_dates.py", "--bases", "plain"], check=True)


def run(arms: list[Arm], seeds: list[int] | None, at_a_time: int) -> None:
    make_bases(list(dict.fromkeys(arm.start for arm in arms)))
    firsts = list(dict.fromkeys((arm.start, seed) for arm, seed in jobs(arms, seeds)))
    with ThreadPoolExecutor(at_a_time) as workers:
        list(workers.map(lambda one: train(folder(one[0].name, one[1]), stage_one(one[1], one[0])), firsts))
        acquiring = sorted({seed for arm, seed in jobs(arms, seeds) if ACQUIRED in arm.words})
        list(workers.map(write_acquired, acquiring))
        list(workers.map(lambda job: train(folder(job[0].name, job[1]), stage_two(*job)), jobs(arms, seeds)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train all arms that are not done")
    runs.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    runs.add_argument("--task", choices=TASKS, help="only arms of this task (default: of both)")
    runs.add_argument("--only", nargs="*", metavar="NAME", help="groups and arms (default: all)")
    runs.add_argument("--seeds", nargs="*", type=int, metavar="SEED", help="(default: those of docs/study.md)")
    commands.add_parser("report", help="write docs/study.md and its pictures")
    args = parser.parse_args()
    if args.command == "run":
        groups = list(dict.fromkeys(arm.group for arm in EVERY))
        only = args.only or groups
        if unknown := sorted(set(only) - {arm.name for arm in EVERY} - set(groups)):
            parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join([*groups, *(a.name for a in EVERY)])}")
        chosen = [a for a in EVERY if {a.name, a.group} & set(only) and args.task in (None, a.start.task)]
        if not chosen:
            parser.error(f"no arm of --only is of the task {args.task}")
        run(chosen, args.seeds, args.jobs)
    else:
        from study_report import write

        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
