"""Learn the reward basis of the Reddit TL;DR workers at several ranks, and fit unseen workers few-shot.

    python train_basis.py                              reads what prepare.py wrote; needs no GPU and no 8B model
    torchrun --nproc-per-node 2 train_basis.py         the seen workers shared among processes

Prints the accuracies of each rank K (0: the reference model, 1: one Bradley-Terry model for all, 2 and up: LoRe), then
a table with 95 % intervals and the verdict: is the reward personal, by how much, is any of it an artefact. Writes
results/ beside itself: report.md, results.json, results.csv, K_<rank>.safetensors, two pictures (PNG and PDF).
From a rank's file a checkpoint for servers and trainers, with the reward of one user or, without w, with all of V:

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
from lore.evidence import evidence
from lore.files import CHECKPOINT_FILE, TrainingCheckpoint, check_writable
from lore.results import print_results, save_results
from lore.reward_model import load_released_reference
from lore.scripts import run_script, script_parser
from utils import check_settings, default_device, process_rank, run

# ---------------------------------------------------------------------------------------------------------------------
K_list = [0, 1, 2, 3, 4, 5, 6]
alpha_list = [0]  # penalties on the squared distance of the basis to the reward head
num_iterations = 1000  # of the training
seeds = [
    0,
    1,
    2,
]  # of the training; accuracies are averaged within a user, the seed of the lowest loss is kept
controls = True  # also trains the largest rank on tossed choices, which must end at chance: a third more time
validation_share = (
    0  # of each seen worker's training posts, held out to choose K and alpha; 0: as released
)
split_seed = 0  # of the split into seen and unseen workers
train_pairs = 150  # at most, per seen worker
unseen_pairs = 50  # at most, per unseen worker: the few shots
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # whose head is read where none stands beside the embeddings
released_reference = (
    False  # True: in place of the reward head the vector of the released scripts, to compare with
)
# ---------------------------------------------------------------------------------------------------------------------


def main():
    args = script_parser(__doc__, HERE).parse_args()
    config = dict(
        K_list=K_list,
        alpha_list=alpha_list,
        num_iterations=num_iterations,
        seeds=seeds,
        validation_share=validation_share,
        split_seed=split_seed,
        train_pairs=train_pairs,
        unseen_pairs=unseen_pairs,
    )
    check_settings(**config)
    train, validation, V_final, about = tldr.load_embeddings(args.dir, MODEL_NAME)
    if released_reference:
        V_final = load_released_reference(MODEL_NAME)
    everyone = len(train.keys() | validation.keys())
    data = tldr.create_dataset(
        train, validation, train_pairs, unseen_pairs, split_seed, about["leave_out"]
    )
    del train, validation
    check_writable(args.dir / "results")
    N, N_unseen = len(data["seen"]), len(data["unseen"])
    print(
        f"{about['title']}: {N} seen and {N_unseen} unseen workers ({everyone - N - N_unseen} left out, in one file "
        f"only or of the smallest), {sum(map(len, data['train'])):,} train pairs, d = {len(V_final)}"
    )

    fits, tossed, start = [], [] if controls else None, time.perf_counter()
    run(
        K_list,
        alpha_list,
        V_final,
        data["train"],
        data["test"],
        data["train_unseen"],
        data["test_unseen"],
        N,
        N_unseen,
        default_device(),
        seed=seeds,
        num_iterations=num_iterations,
        fits=fits,
        checkpoint=TrainingCheckpoint(args.dir / "results" / CHECKPOINT_FILE),
        validation_share=validation_share,
        prompts=data["prompts"].get("train"),
        tossed=tossed,
    )
    seconds = time.perf_counter() - start

    if process_rank() == 0:
        config.update(controls=controls, released_reference=released_reference)
        print_results(
            save_results(
                args.dir / "results",
                fits,
                data,
                about,
                config,
                seconds,
                evidence(fits, data, V_final, tossed or ()),
            )
        )
    print(
        f"\n{seconds:.1f} s; read {args.dir / 'results' / 'report.md'}; pictures and each rank's basis are beside it"
    )


if __name__ == "__main__":
    run_script(main)
