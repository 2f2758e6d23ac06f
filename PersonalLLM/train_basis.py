"""Learn the reward basis of PersonalLLM's users at several ranks, and fit unseen users few-shot.

    python train_basis.py                              reads what prepare.py wrote; needs no GPU and
                                                       no 8B model
    torchrun --nproc-per-node 2 train_basis.py         the users shared among processes

A user is a mixture over ten reward models, and prefers the response that it scores highest to the
one that it scores lowest. A pair is two row numbers of one table of embeddings, so 1.5 million test
pairs fit in a laptop.

Prints the accuracies of each rank K (0: the reference model, 1: one Bradley-Terry model for all,
2 and up: LoRe), then a table with 95 % intervals and the verdict: is the reward personal, by how
much, is any of it an artefact. Writes results/ beside itself: report.html, results.json,
results.csv, results_long.csv, K_<rank>.safetensors, pictures (PNG and PDF), and
population.safetensors, the users' mixtures. With --results NAME it writes to results/NAME, beside
other sweeps. On the demo's synthetic corpus the population is the demo's.
"""

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import personalllm
from lore.evidence import hold_out
from lore.files import CHECKPOINT_FILE, TrainingCheckpoint, check_writable, save_tensors
from lore.reward_model import load_released_reference
from lore.scripts import check_training, finish_training, run_script, sweep_folder
from personalllm import Population
from utils import Fit, default_device, run

# ---- Settings

# The sweep. All ranks, alphas and seeds are trained side by side; accuracies are averaged over the
# seeds within a user, and the seed of the lowest loss is kept.
K_list = [0, 1, 2, 3, 4, 5]
alpha_list = [0]  # penalties on the squared distance of the basis to the reward head
num_iterations = 1000
seeds = [0, 1, 2]

# The share of each seen user's training prompts that is held out, to choose K and alpha; 0: as
# released.
validation_share = 0
# Also train the largest rank on randomly flipped choices. Nothing can predict these, unless the
# test repeats pairs of the training. It takes a third more time.
controls = True

# The simulated users.
population = Population(
    N=1000,
    N_unseen=500,
    concentration=0.1,  # most users follow one or two of the ten scorers
    fractions=(0.005, 0.001, 1.0),  # 47 pairs per seen user, 9 per unseen user, all test prompts
    population_seed=0,
)
# Those of the demo, which has 240 train prompts.
demo_population = replace(population, N=60, N_unseen=30, fractions=(0.1, 0.05, 1.0))

# The model whose reward head is read if there is none beside the embeddings.
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
# True: in place of the reward head take the vector of the released scripts, to compare with.
released_reference = False


def main() -> None:
    args = personalllm.training_parser(__doc__, HERE).parse_args()
    results = sweep_folder(args.dir / "results", args.results)
    check_training(K_list, alpha_list, seeds, num_iterations, validation_share)
    study = personalllm.load_embeddings(
        args.dir, MODEL_NAME, population, demo_population, args.data
    )
    if released_reference:
        study.reward_head = load_released_reference(MODEL_NAME)
    check_writable(results)
    print(
        f"{study.title}: {len(study.seen)} seen and {len(study.unseen)} unseen simulated users, "
        f"{study.pair_count('train'):,} train pairs, d = {len(study.reward_head)}; "
        f"{study.pairs_dropped:,} pairs dropped, all responses tied"
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
        **asdict(study.population),
        controls=controls,
        released_reference=released_reference,
        pairs_dropped=study.pairs_dropped,
    )

    def save_population(fits: list[Fit]) -> None:
        save_tensors(
            results / "population.safetensors",
            {"seen": study.mixtures, "unseen": study.mixtures_unseen},
            scorers=personalllm.SCORERS,
            users=study.seen,
            unseen_users=study.unseen,
            population_seed=study.population.population_seed,
        )

    finish_training(
        results,
        accuracies.fits,
        study,
        study_to_train,
        held_out,
        config,
        checkpoint,
        started,
        save_more=save_population,
    )


if __name__ == "__main__":
    run_script(main)
