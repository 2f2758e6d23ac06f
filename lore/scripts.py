"""What the scripts of the data sets share."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lore.files import check_writable
from lore.reward_model import check_gpu
from lore.rows import read_rows
from lore.standin import build_standin_model
from utils import InputError, check_settings, process_count, process_rank


def run_script(main):
    """Call a script's main(). What the reader can mend ends in one line on stderr and exit status 2, Ctrl-C in 130;
    under torchrun only the first process prints."""
    if process_rank() > 0 or sys.stdout is None:  # None: closed by the shell
        sys.stdout = open(os.devnull, "w")
    status = 2
    try:
        main()
        sys.stdout.flush()
        return
    except (InputError, torch.cuda.OutOfMemoryError) as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        status = 130
        message = "interrupted: finished files and embeddings are kept, run the same command again to resume"
    except OSError as error:
        if error.filename is None:  # standard output: a closed pipe, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        message = f"{error.filename or 'standard output'}: {error.strerror or error}; free or choose another place"
    print("error:", message, file=sys.stderr)
    sys.exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def script_parser(description, folder):
    """The command line that every script has: `--dir`, where it reads and writes."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(folder),
        metavar="DIR",
        help="read and write here, a folder of this data set's own, instead of beside the script",
    )
    return parser


def prepare_arguments(description, folder, model_name, embeds=True):
    """Read and check the command line of a prepare.py; with --demo build the stand-in model, for the data in demo/.
    embeds: whether the script itself runs the model, which asks for a GPU unless a model was named.
    Returns a namespace: dir, data (a folder, or None for the download), model, limit, overwrite, demo, label (of the
    data). Raises InputError: --limit below 1, --demo with other sources, no CUDA GPU for the default model."""
    parser = script_parser(description, folder)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="read the splits from here instead of downloading "
        "them: parquet, jsonl, csv, the last two also .gz; as in demo/ beside this script",
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
    args = parser.parse_args()
    if args.limit is not None:
        check_settings(**{"--limit": args.limit})
    if args.demo and (args.data or args.model):
        raise InputError(
            "--demo brings its own data and model; leave out --data and --model, or --demo"
        )
    if embeds and not args.demo and not args.model:
        check_gpu(model_name)
    check_writable(args.dir)
    args.label = "synthetic demo" if args.demo else args.data.name if args.data else None
    if args.demo:
        print(
            "demo: the reward model is a tiny stand-in with random weights and the data are synthetic, written for "
            "this demo; the accuracies say nothing about real models or people"
        )
        args.data, args.model = Path(folder) / "demo", args.dir / ".standin"
        if process_rank() == 0:
            texts = [
                json.dumps(row)
                for path in sorted(args.data.glob("*.jsonl.gz"))
                for _, row in read_rows(path)
            ]
            build_standin_model(args.model, texts)
        if process_count() > 1:
            dist.barrier()
    args.model = (
        os.path.normpath(args.model)
        if os.path.isdir(args.model or "")
        else args.model or model_name
    )
    return args
