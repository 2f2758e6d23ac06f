"""What the scripts of the data sets share: how they start and end, and their main steps."""

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lore.embedding import embed_distinct, warn_of_equal_token_ids
from lore.embedding_files import EARLIER, embeddings_are_finished, new_embeddings
from lore.evidence import evidence, judge_held_out, tossed_control
from lore.files import (
    FEW_SHOT_CHECKPOINT_FILE,
    TrainingCheckpoint,
    check_writable,
    digest_of,
    printable,
)
from lore.questions import question_curves
from lore.reading import read_named_model
from lore.results import (
    print_results,
    question_table,
    save_few_shot_curves,
    save_question_curves,
    save_results,
)
from lore.reward_model import check_gpu, load_reward_head, model_identity
from lore.rows import read_rows
from lore.standin import build_standin_model
from lore.study import Features, Study
from utils import (
    UNSEEN_TEST,
    Fit,
    InputError,
    check_number,
    check_sweep,
    check_whole,
    check_whole_numbers,
    default_device,
    process_count,
    process_rank,
    run_few_shot_vary_shots,
)

CACHE_FOLDER = ".embedding_cache"  # beside the embeddings
STANDIN_FOLDER = ".standin"  # of the demo's model, beside the embeddings
CONTROL_CHECKPOINT_FILE = ".tossed_control.pt"  # beside results, until these are there

Conversation = list[dict[str, str]]  # messages with a role and a content


# ---- Start and end


def run_script(main: Callable[[], None]) -> None:
    """Call a script's `main`; end with one line on stderr if a reader can mend what stopped it.

    The exit status is then 2, or 130 after Ctrl-C. Any other error is ours, and is raised.
    Under torchrun only the first process prints.
    """
    if process_rank() > 0 or sys.stdout is None:  # None: the shell has closed it
        sys.stdout = open(os.devnull, "w")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(
            "interrupted: finished files, finished embeddings and a training up to its last minute "
            "are kept; run the same command again to resume",
            status=130,
        )
    except (InputError, torch.cuda.OutOfMemoryError) as error:
        _end(" ".join(str(error).split()))
    except OSError as error:
        place = error.filename
        if place is None:  # a closed pipe, or a full disk behind it
            place = "standard output"
            # Python flushes it once more at its exit, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _end(f"{place}: {error.strerror or error}; free or choose another place")


def _end(message: str, status: int = 2) -> NoReturn:
    """Leave the script with one line on stderr, in which no name can hide anything."""
    print("error:", printable(message), file=sys.stderr)
    sys.exit(status)


# ---- Command line


class _Parser(argparse.ArgumentParser):
    """A parser that complains with an InputError: one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def script_parser(description: str, folder: Path | str) -> argparse.ArgumentParser:
    """The command line that every script has: `--dir`, where it reads and writes.

    folder: the default, which is that of the script.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(folder),
        metavar="DIR",
        help="read and write here, a folder of this data set's own, instead of beside the script",
    )
    return parser


def training_parser(description: str, folder: Path | str) -> argparse.ArgumentParser:
    """The command line of the scripts that train: `--dir`, and `--results` for `sweep_folder`."""
    parser = script_parser(description, folder)
    parser.add_argument(
        "--results",
        metavar="NAME",
        help="write to results/NAME, so that the results of other runs stay beside these",
    )
    return parser


def sweep_folder(folder: Path, name: str | None) -> Path:
    """The folder for the files of one sweep: `folder`, or the one in it that --results names.

    Raises InputError: a name that is no plain folder name, or that of earlier results which were
    set aside.
    """
    if name is None:
        return folder
    if not re.fullmatch(r"[\w-]+", name) or name.startswith(EARLIER):
        raise InputError(
            f"--results {name}: give a name of letters, digits, - and _ that does not "
            f"begin with {EARLIER}"
        )
    return folder / name


def next_command(script: str, folder: Path) -> str:
    """The command that runs another script of this data set, from where the user is.

    script: its name. folder: in which the running script writes.
    """
    running = Path(sys.argv[0])
    words = ["python", str(running.with_name(script))]
    if folder.resolve() != running.resolve().parent:
        words += ["--dir", str(folder)]
    return shlex.join(words)


def prepare_arguments(
    description: str, folder: Path | str, model_name: str, embeds: bool = True
) -> argparse.Namespace:
    """Read and check the command line of a prepare.py; with --demo make the stand-in model, too.

    folder: that of the script, whose demo/ holds the demo's data.
    embeds: whether the script itself runs the model, which needs a GPU unless a model is named.
    Returns a namespace: `dir`; `data`, a path, or None for the download; `model`, a name or path;
    `limit`, a whole number or None; `overwrite`; `demo`; `label`, the name of the data, or None for
    the download.
    If the script embeds, also `max_length`, a whole number or None.
    Raises InputError: --limit or --max_length below 1, --demo with --data or --model, no GPU for
    the default model.
    """
    parser = _prepare_parser(description, folder, model_name)
    if embeds:
        add_max_length(parser)
    args = parser.parse_args()
    if args.limit is not None:
        check_whole("--limit", args.limit, 1)
    if embeds and args.max_length is not None:
        check_whole("--max_length", args.max_length, 1)
    if args.demo and (args.data or args.model):
        raise InputError(
            "--demo brings its own data and model; leave out --data and --model, or --demo"
        )
    if embeds and not args.demo and not args.model:
        check_gpu(model_name)
    check_writable(args.dir)

    if args.demo:
        args.label = "synthetic demo"
        args.data = Path(folder) / "demo"
        args.model = args.dir / STANDIN_FOLDER
        _make_demo_model(args.model, args.data)
    elif args.data:
        args.label = Path(os.path.abspath(args.data)).name  # not absolute, "." has no name
    else:
        args.label = None

    if not args.model:
        args.model = model_name
    elif os.path.isdir(args.model):
        args.model = os.path.normpath(args.model)  # equal paths are one model
    return args


def _prepare_parser(
    description: str, folder: Path | str, model_name: str
) -> argparse.ArgumentParser:
    """The command line of a prepare.py."""
    parser = script_parser(description, folder)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="read the splits from here instead of downloading them: parquet, jsonl, csv, the last "
        "two also .gz; as in demo/ beside this script",
    )
    parser.add_argument(
        "--model", metavar="ID_OR_PATH", help=f"the reward model (default: {model_name})"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N rows of each split, or users"
    )
    parser.add_argument(
        "--demo", action="store_true", help="the synthetic data in demo/ and a tiny stand-in model"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace finished embeddings of another model or data",
    )
    return parser


def add_max_length(parser: argparse.ArgumentParser) -> None:
    """Add `--max_length`, which every script that embeds has."""
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="cut longer conversations to their last N tokens; without it, one beyond the model's "
        "context ends the run",
    )


def _make_demo_model(model: Path, data: Path) -> None:
    """Write the stand-in model, its tokenizer trained on the demo's data, and say what it is."""
    print(
        "demo: the reward model is a tiny stand-in with random weights and the data are synthetic, "
        "written for this demo; the accuracies say nothing about real models or people"
    )
    if process_rank() == 0:
        files = sorted(data.glob("*.jsonl.gz"))
        texts = [json.dumps(row) for path in files for _, row in read_rows(path)]
        build_standin_model(model, texts)
    if process_count() > 1:
        dist.barrier()  # the others wait for the model


# ---- Embedding


@dataclass
class EmbeddingFile:
    """One of the files of embeddings that a script writes."""

    name: str
    contents: str  # printed when it is written: "38 workers, 5,700 pairs"
    conversations: list[Conversation]
    # Writes the file at a path, given a table of embeddings, bfloat16 (distinct, d), and the row of
    # each of the file's conversations there, int64 (n,).
    write: Callable[[Path, torch.Tensor, torch.Tensor], None]
    # Which conversations are compared with each other, as their places in `conversations`
    pairs: list[tuple[int, int]] = field(default_factory=list)


def embed_files(
    files: list[EmbeddingFile],
    announcement: str,
    *,
    folder: Path,
    checkpoint: str,
    model: str,
    data: str,
    data_digest: str,
    token_budget: int | None,
    shard_size: int,
    overwrite: bool,
    max_length: int | None = None,
    **provenance: Any,
) -> None:
    """Embed the conversations of all files, and write the files and the reward head to `folder`.

    Does nothing if the files are there already, made of the same data with the same model. Equal
    conversations are embedded once. An interrupted call resumes from the cache in `folder`.

    announcement: printed before the embedding: "1,920 responses to embed".
    checkpoint: of the reward model; model: its name in results.
    data: the name of the data in results; data_digest: of what was read.
    token_budget, shard_size, max_length: of `lore.embedding.embed_conversations`.
    overwrite: replace files of another model or other data, which are else refused by InputError.
    provenance: further JSON values that the reward head's file keeps, such as `demo` and
        `data_notes`, what is odd in the data, a list of lines. It also keeps `equal_pairs` if there
        are any: of each file with pairs of equal token ids, how many are `equal` and how many
        `pairs` it has.
    """
    head = load_reward_head(checkpoint)
    cache = folder / CACHE_FOLDER
    paths = [folder / file.name for file in files]
    identity = {
        "model": model,
        "data": data_digest,
        "reward_head": digest_of(head.tolist()),
        **model_identity(checkpoint, cache),
    }
    if max_length is not None:
        identity["max_length"] = max_length
    if embeddings_are_finished(paths, identity, overwrite):
        command = next_command("train_basis.py", folder)
        print(f"these embeddings are finished already, in {folder}; next: {command}")
        return

    print(announcement)
    table, rows, record = embed_distinct(
        [conversation for file in files for conversation in file.conversations],
        checkpoint,
        cache_dir=cache,
        token_budget=token_budget,
        shard_size=shard_size,
        max_length=max_length,
        dtype=torch.bfloat16,
    )
    if process_rank() > 0:
        return
    rows_per_file = rows.split([len(file.conversations) for file in files])
    equal_pairs = {}
    for file, rows_of_file in zip(files, rows_per_file):
        equal = warn_of_equal_token_ids(
            file.name, file.pairs, file.conversations, rows_of_file, max_length
        )
        if equal:
            equal_pairs[file.name] = {"equal": equal, "pairs": len(file.pairs)}
    if equal_pairs:
        provenance["equal_pairs"] = equal_pairs

    provenance = {"model": model, "data": data, **provenance, "embedding": record}
    # Once more, as another prepare.py may have finished here in the meantime, with other data.
    embeddings_are_finished(paths, identity, overwrite)
    with new_embeddings(folder, head, identity, **provenance) as new_folder:
        for file, rows_of_file in zip(files, rows_per_file):
            file.write(new_folder / file.name, table, rows_of_file)
    for file, path in zip(files, paths):
        megabytes = path.stat().st_size / 1e6
        width = f", d = {len(head)}" if file.conversations else ""
        print(f"{file.name}: {file.contents}{width}, {megabytes:,.1f} MB")
    print(f"next: {next_command('train_basis.py', folder)}")


# ---- Training


def check_training(
    K_list: list[int],
    alpha_list: list[float],
    seeds: list[int],
    num_iterations: int,
    validation_share: float,
    threshold: float = 0.0,
) -> None:
    """Check the settings that every train_basis.py has.

    Raises InputError that names the setting.
    """
    check_sweep(K_list, alpha_list, seeds, num_iterations, threshold)
    check_number("validation_share", validation_share, 0, 0.9)


def finish_training(
    folder: Path,
    fits: list[Fit],
    study: Study,
    study_to_train: Study,
    held_out: Features | None,
    config: dict[str, Any],
    checkpoint: TrainingCheckpoint,
    started: float,
    regularized: bool = False,
    save_more: Callable[[list[Fit]], None] | None = None,
    closing: str = "",
) -> None:
    """What every train_basis.py does once its models are trained, up to the last line it prints.

    Judges the models on the held-out pairs, trains the control on randomly flipped choices, asks
    whether the result is personal, writes and prints the results, and then removes the checkpoints.

    folder: of the results. fits: of `run` or `run_regularized`, trained on `study_to_train`.
    study_to_train, held_out: what `hold_out` made of `study`.
    config: the settings to be written into the results. Used here: `K_list`, `alpha_list`, `seeds`,
    `num_iterations`, `controls` (whether the control is trained) and, if there is one, `threshold`.
    checkpoint: of the training. started: `time.perf_counter()` before the training.
    regularized: whether the models are those of `run_regularized`.
    save_more: writes what this data set has of its own, given the judged fits.
    closing: what the last line says at its end.
    """
    fits = judge_held_out(fits, held_out)
    control = None
    control_checkpoint = TrainingCheckpoint(folder / CONTROL_CHECKPOINT_FILE)
    if config["controls"]:
        control = tossed_control(
            study_to_train,
            config["K_list"],
            config["alpha_list"],
            config["seeds"],
            config["num_iterations"],
            default_device(),
            checkpoint=control_checkpoint,
            regularized=regularized,
            threshold=config.get("threshold", 0.0),
        )
    seconds = time.perf_counter() - started
    findings = evidence(fits, study, control)

    if process_rank() == 0:
        reading = read_named_model(fits, study, findings)
        results = save_results(
            folder, fits, study, config, seconds, findings, held_out, reading=reading
        )
        if save_more is not None:
            save_more(fits)
        print_results(results)
        checkpoint.clear()
        control_checkpoint.clear()
    print(
        f"\n{seconds:.1f} s; read {folder / 'report.html'} or report.md; pictures and each rank's "
        f"basis are beside it{closing}"
    )


# ---- Few shots


def check_few_shots(
    K_list: list[int],
    alpha_list: list[float],
    num_iterations: int,
    trials: int,
    num_shots: list[int],
    num_questions: int,
    question_seeds: list[int],
    seed: int,
) -> None:
    """Check the settings that every vary_fewshot.py has.

    Raises InputError that names the setting.
    """
    check_whole("seed", seed)
    check_sweep(K_list, alpha_list, [seed], num_iterations)
    check_whole("trials", trials, 1)
    check_whole_numbers("num_shots", num_shots, 1)
    check_whole("num_questions", num_questions, 1)
    check_whole_numbers("question_seeds", question_seeds)


def vary_shots(folder: Path, study: Study, config: dict[str, Any]) -> None:
    """What every vary_fewshot.py does with its study, up to the last line it prints.

    Learns the basis, fits the unseen users from each number of shots, and writes and prints the
    curves; asks the unseen users one question at a time, and writes and prints these curves, too;
    then removes the checkpoint of the training.

    folder: of the results.
    config: the settings to be written into the results. Used here: those that `check_few_shots`
    checks, and `shots_are`: if it is "conversations", a shot is a group of `study.groups`.
    """
    groups = None
    if config.get("shots_are") == "conversations":
        groups = study.groups["train_unseen"]
    seed = config["seed"]
    checkpoint = TrainingCheckpoint(folder / FEW_SHOT_CHECKPOINT_FILE)
    curves = run_few_shot_vary_shots(
        config["trials"],
        config["alpha_list"],
        config["K_list"],
        config["num_shots"],
        study.train,
        study.train_unseen,
        study.test_unseen,
        study.reward_head,
        len(study.seen),
        len(study.unseen),
        default_device(),
        seed=seed,
        num_iterations=config["num_iterations"],
        groups=groups,
        checkpoint=checkpoint,
        further_seeds=[other for other in config["question_seeds"] if other != seed],
    )
    study.count_equal_pairs()  # by all processes, as only the first one writes the results
    if process_rank() == 0:
        table = save_few_shot_curves(folder, curves, study, config)
        print(f"\n{UNSEEN_TEST}, 95 % intervals over users:\n{table.to_string()}")
        _ask_questions(folder, curves.fits, study, config)
        checkpoint.clear()
    print(f"\nthe curves, tables and a picture are in {folder}")


def _ask_questions(folder: Path, fits: list[Fit], study: Study, config: dict[str, Any]) -> None:
    """Write and print the accuracy after each question; nothing if no rank is above 1."""
    seeds = [int(seed) for seed in config["question_seeds"]]
    fits = [fit for fit in fits if fit.seed in seeds]
    frame = question_curves(fits, study, config["num_questions"], config["trials"])
    if frame.empty:
        return
    save_question_curves(folder, frame, study, config)
    print(
        f"\n{UNSEEN_TEST}, mean over seeds {seeds}, by questions asked.\n"
        "Questions are random pairs, or chosen: those that question_values puts first. Weights\n"
        "are fitted as released, or by Bayes' rule with the seen users only as the prior, or with\n"
        "the widened prior, which allows for people unlike all of them (fit_new_user).\n"
        + question_table(frame)
    )
