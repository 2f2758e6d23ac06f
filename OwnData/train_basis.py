"""Learn the reward basis of your users at several ranks; fit unseen users few-shot.

    python train_basis.py                              reads what prepare.py wrote; needs no GPU and
                                                       no 8B model
    torchrun --nproc-per-node 2 train_basis.py         the users shared among processes

Prints the accuracies of each rank K (0: the reference model, 1: one Bradley-Terry model for all,
2 and up: LoRe), then a table with 95 % intervals and the verdict: is the reward personal, by how
much, is any of it an artefact. Writes results/ beside itself: report.html, results.json,
results.csv, results_long.csv, K_<rank>.safetensors, pictures (PNG and PDF). With --results NAME it
writes to results/NAME, beside other sweeps.
"""

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import own_data
from lore.evidence import hold_out
from lore.files import CHECKPOINT_FILE, TrainingCheckpoint, check_writable
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

# The share of each seen user's training conversations that is held out, to choose K and alpha.
validation_share = 0
# Also train the largest rank on randomly flipped choices. Nothing can predict these, unless the
# test repeats pairs of the training. It takes a third more time.
controls = True

# The people. 0.5: half of them are seen, as released; 1: all are, and the columns of unseen users
# show the same people, whose weights are fitted once more from few shots with V frozen. None: 0.5,
# or 1 for PersonalRewardBench.
seen_share = None
split_seed = 0  # of the split into seen and unseen users, and of the drawn pairs
train_pairs = None  # at most, per seen user; None: all
unseen_pairs = 50  # at most, per unseen user: the few shots


def main() -> None:
    args = training_parser(__doc__, HERE).parse_args()
    results = sweep_folder(args.dir / "results", args.results)
    check_training(K_list, alpha_list, seeds, num_iterations, validation_share)

    study = own_data.load_embeddings(args.dir, seen_share, split_seed, train_pairs, unseen_pairs)
    check_writable(results)
    print(
        f"{study.title}: {own_data.users_in_words(study)}, {study.pair_count('train'):,} train "
        f"pairs, d = {len(study.reward_head)}"
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
        seen_share=seen_share,
        split_seed=split_seed,
        train_pairs=train_pairs,
        unseen_pairs=unseen_pairs,
        controls=controls,
    )
    finish_training(
        results, accuracies.fits, study, study_to_train, held_out, config, checkpoint, started
    )


if __name__ == "__main__":
    run_script(main)
