"""Learn the reward basis of the Reddit TL;DR workers at several ranks; fit unseen workers few-shot.

    python train_basis.py                              reads what prepare.py wrote; needs no GPU and
                                                       no 8B model
    torchrun --nproc-per-node 2 train_basis.py         the workers shared among processes

Prints the accuracies of each rank K (0: the reference model, 1: one Bradley-Terry model for all,
2 and up: LoRe), then a table with 95 % intervals and the verdict: is the reward personal, by how
much, is any of it an artefact. Writes results/ beside itself: report.html, results.json,
results.csv, results_long.csv, K_<rank>.safetensors, pictures (PNG and PDF). With --results NAME it
writes to results/NAME, beside other sweeps.

A rank's file can be exported as a checkpoint for servers and trainers, with the reward of one user
or, without w, with all of V:

    tensors, about = load_tensors("results/K_5.safetensors")
    export_reward_model("my_reward", MODEL_NAME, tensors["V"], w=tensors["W"][0],
                        about={**load_json("results/results.json"), **about})
"""

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import tldr
from lore.evidence import hold_out
from lore.files import CHECKPOINT_FILE, TrainingCheckpoint, check_writable
from lore.reward_model import load_released_reference
from lore.scripts import (
    check_training,
    finish_training,
    run_script,
    sweep_folder,
    training_parser,
)
from utils import default_device, run

# ---- Settings

# The sweep. All ranks, alphas and seeds are trained side by side; accuracies are averaged over the
# seeds within a user, and the seed of the lowest loss is kept.
K_list = [0, 1, 2, 3, 4, 5, 6]
alpha_list = [0]  # penalties on the squared distance of the basis to the reward head
num_iterations = 1000
seeds = [0, 1, 2]

# The share of each seen worker's training posts that is held out, to choose K and alpha; 0: as
# released.
validation_share = 0
# Also train the largest rank on randomly flipped choices. Nothing can predict these, unless the
# test repeats pairs of the training. It takes a third more time.
controls = True

# The data.
split_seed = 0  # of the split into seen and unseen workers
train_pairs = 150  # at most, per seen worker
unseen_pairs = 50  # at most, per unseen worker: the few shots

# The model whose reward head is read if there is none beside the embeddings.
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
# True: in place of the reward head take the vector of the released scripts, to compare with.
released_reference = False


def main() -> None:
    args = training_parser(__doc__, HERE).parse_args()
    results = sweep_folder(args.dir / "results", args.results)
    check_training(K_list, alpha_list, seeds, num_iterations, validation_share)

    study = tldr.load_embeddings(args.dir, MODEL_NAME, train_pairs, unseen_pairs, split_seed)
    if released_reference:
        study.reward_head = load_released_reference(MODEL_NAME)
    check_writable(results)
    print(
        f"{study.title}: {len(study.seen)} seen and {len(study.unseen)} unseen workers "
        f"({study.left_out} left out, in one file only or of the smallest), "
        f"{study.pair_count('train'):,} train pairs, d = {len(study.reward_head)}"
    )

    study_to_train, held_out = hold_out(study, validation_share)
    checkpoint = TrainingCheckpoint(results / CHECKPOINT_FILE)
    started = time.perf_counter()
    accuracies = run(
        K_list,
        alpha_list,
        study.reward_head,
        study_to_train.train,
        study.test,
        study.train_unseen,
        study.test_unseen,
        len(study.seen),
        len(study.unseen),
        default_device(),
        seed=seeds,
        num_iterations=num_iterations,
        checkpoint=checkpoint,
    )

    config = dict(
        K_list=K_list,
        alpha_list=alpha_list,
        num_iterations=num_iterations,
        seeds=seeds,
        validation_share=validation_share,
        split_seed=split_seed,
        train_pairs=train_pairs,
        unseen_pairs=unseen_pairs,
        controls=controls,
        released_reference=released_reference,
    )
    finish_training(
        results, accuracies.fits, study, study_to_train, held_out, config, checkpoint, started
    )


if __name__ == "__main__":
    run_script(main)
