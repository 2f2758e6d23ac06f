"""How many choices of a new user LoRe needs: accuracy on unseen PersonalLLM users against the number of shots.

    python vary_fewshot.py                             reads what prepare.py wrote

Learns the basis on the seen users, then fits every unseen user from 5, 10, .. 50 pairs, drawn anew in each trial.
Writes vary_fewshot.json, .csv and .tex (means with
95 % intervals over users), .png and .pdf to results/ beside itself. Then asks them one question at a time, random ones
or those that tell the most, with the seen users as the prior: vary_questions.json, .csv, .png and .pdf.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import personalllm
from lore.files import FEW_SHOT_CHECKPOINT_FILE, TrainingCheckpoint, check_writable
from lore.results import save_few_shot_curves, vary_questions
from lore.scripts import run_script
from utils import UNSEEN_TEST, check_settings, default_device, process_rank, run_few_shot_vary_shots

# ---------------------------------------------------------------------------------------------------------------------
K_list = [5]
alpha_list = [0]
num_iterations = 500  # of the training, half of what train_basis.py takes
trials = 20
num_shots = list(range(5, 51, 5))
seed = 0  # of the training and of the drawn shots
num_questions = 8  # asked of an unseen user one by one: random pairs, or those that tell the most
question_seeds = [
    0,
    1,
    2,
]  # of the trainings behind the questions; accuracies are averaged within a user
population_seed = 0  # of the users and of the prompts that each compares
N, N_unseen = 1000, 500  # simulated users
concentration = 0.1  # of the Dirichlet distribution over the ten scorers
fractions = (
    0.005,
    0.01,
    1.0,
)  # of the train prompts, per seen user and unseen user (94 pairs); of the test prompts
demo_N, demo_N_unseen, demo_fractions = 60, 30, (0.1, 0.25, 1.0)  # of 240 train prompts
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # whose head is read where none stands beside the embeddings
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
        trials=trials,
        num_shots=num_shots,
        num_questions=num_questions,
        question_seeds=question_seeds,
        seed=seed,
    )
    check_settings(**config)
    for demo in (True, False):
        personalllm.check_population(population(demo))
    tables, V_final, about = personalllm.load_embeddings(args.dir, MODEL_NAME, args.data)
    config.update(population(about.get("demo")))
    data = personalllm.create_dataset(tables, *population(about.get("demo")).values())
    check_writable(args.dir / "results")
    print(f"{data['dropped']:,} pairs dropped, all responses tied")
    of_users = []
    curves = run_few_shot_vary_shots(
        trials,
        alpha_list,
        K_list,
        num_shots,
        data["train"],
        data["train_unseen"],
        data["test_unseen"],
        V_final,
        len(data["seen"]),
        len(data["unseen"]),
        default_device(),
        seed=seed,
        num_iterations=num_iterations,
        checkpoint=TrainingCheckpoint(args.dir / "results" / FEW_SHOT_CHECKPOINT_FILE),
        of_users=of_users,
    )
    if process_rank() == 0:
        table = save_few_shot_curves(
            args.dir / "results",
            curves,
            of_users,
            data,
            about,
            {**config, "pairs_dropped": data["dropped"]},
        )
        print(f"\n{UNSEEN_TEST}, 95 % intervals over users:\n{table.to_string()}")
    vary_questions(args.dir / "results", data, V_final, about, config, default_device())
    print(f"\nthe curves, tables and a picture are in {args.dir / 'results'}")


if __name__ == "__main__":
    run_script(main)
