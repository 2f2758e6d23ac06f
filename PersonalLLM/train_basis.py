"""Learn the reward basis of PersonalLLM's simulated users at several ranks, and fit unseen users few-shot.

    python train_basis.py                              reads what prepare.py wrote; needs no GPU and no 8B model
    torchrun --nproc-per-node 2 train_basis.py         the seen users shared among processes

A user is a mixture over ten reward models, and prefers the response that it scores highest to the one that it scores
lowest. A pair is two row numbers of one table of embeddings, so 1.5 million test pairs fit in a laptop.
Prints the accuracies of each rank K (0: the reference model, 1: one Bradley-Terry model for all, 2 and up: LoRe), then
a table with 95 % intervals and the verdict: is the reward personal, by how much, is any of it an artefact. Writes
results/ beside itself: report.md, results.json, results.csv, K_<rank>.safetensors, two pictures (PNG and PDF), and
population.safetensors, the users' mixtures. On the demo's synthetic corpus the population is the demo's.
"""

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import personalllm
from lore.evidence import evidence
from lore.files import CHECKPOINT_FILE, TrainingCheckpoint, check_writable, save_tensors
from lore.results import print_results, save_results
from lore.reward_model import load_released_reference
from lore.scripts import run_script
from utils import check_settings, default_device, process_rank, run

# ---------------------------------------------------------------------------------------------------------------------
K_list = [0, 1, 2, 3, 4, 5]
alpha_list = [0]  # penalties on the squared distance of the basis to the reward head
num_iterations = 1000  # of the training
seeds = [
    0,
    1,
    2,
]  # of the training; accuracies are averaged within a user, the seed of the lowest loss is kept
controls = True  # also trains the largest rank on tossed choices, which must end at chance: a third more time
validation_share = (
    0  # of each seen user's training prompts, held out to choose K and alpha; 0: as released
)
population_seed = 0  # of the users and of the prompts that each compares
N, N_unseen = 1000, 500  # simulated users
concentration = (
    0.1  # of the Dirichlet distribution over the ten scorers: most users follow one or two of them
)
fractions = (
    0.005,
    0.001,
    1.0,
)  # of the train prompts, per seen user (47 pairs) and unseen user (9); of the test prompts
demo_N, demo_N_unseen, demo_fractions = 60, 30, (0.1, 0.05, 1.0)  # of 240 train prompts
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # whose head is read where none stands beside the embeddings
released_reference = (
    False  # True: in place of the reward head the vector of the released scripts, to compare with
)
# ---------------------------------------------------------------------------------------------------------------------


def population(demo):
    """How many users are simulated, and what each compares; the demo's where the embeddings are the demo's."""
    users, users_unseen, shares = (
        (demo_N, demo_N_unseen, demo_fractions) if demo else (N, N_unseen, fractions)
    )
    return dict(
        N=users,
        N_unseen=users_unseen,
        concentration=concentration,
        fractions=shares,
        population_seed=population_seed,
    )


def main():
    args = personalllm.scripts_parser(__doc__, HERE).parse_args()
    config = dict(
        K_list=K_list,
        alpha_list=alpha_list,
        num_iterations=num_iterations,
        seeds=seeds,
        validation_share=validation_share,
    )
    check_settings(**config)
    for demo in (True, False):
        personalllm.check_population(population(demo))
    tables, V_final, about = personalllm.load_embeddings(args.dir, MODEL_NAME, args.data)
    if released_reference:
        V_final = load_released_reference(MODEL_NAME)
    config.update(population(about.get("demo")))
    data = personalllm.create_dataset(tables, *population(about.get("demo")).values())
    check_writable(args.dir / "results")
    print(
        f"{about['title']}: {len(data['seen'])} seen and {len(data['unseen'])} unseen simulated users, "
        f"{sum(map(len, data['train'])):,} train pairs, d = {len(V_final)}; {data['dropped']:,} pairs dropped, all "
        "responses tied"
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
        len(data["seen"]),
        len(data["unseen"]),
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
        config.update(
            controls=controls, released_reference=released_reference, pairs_dropped=data["dropped"]
        )
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
        save_tensors(
            args.dir / "results" / "population.safetensors",
            {"seen": data["population"], "unseen": data["population_unseen"]},
            scorers=personalllm.SCORERS,
            users=data["seen"],
            unseen_users=data["unseen"],
            population_seed=population_seed,
        )
    print(
        f"\n{seconds:.1f} s; read {args.dir / 'results' / 'report.md'}; pictures and each rank's basis are beside it"
    )


if __name__ == "__main__":
    run_script(main)
