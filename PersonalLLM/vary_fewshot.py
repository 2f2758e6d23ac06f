"""How many choices of a new user LoRe needs: accuracy on unseen PersonalLLM users against the number of shots.

    python vary_fewshot.py                             reads what prepare.py wrote

Learns the basis on the seen users, then fits every unseen user from 5, 10, .. 50 pairs, drawn anew in each trial.
Writes vary_fewshot.json and vary_fewshot.png to results/ beside itself.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from utils import *

# ---------------------------------------------------------------------------------------------------------------------
K_list = [5]
alpha_list = [0]
num_iterations = 500  # of the training, half of what train_basis.py takes
trials = 20
num_shots = list(range(5, 51, 5))
seed = 0  # of the training and of the drawn shots
population_seed = 0  # of the users and of the prompts that each compares
N, N_unseen = 1000, 500  # simulated users
concentration = 0.1  # of the Dirichlet distribution over the ten scorers
train_fraction = 0.005  # of the train prompts, per seen user: 47 pairs
pool_fraction = 0.01  # of the train prompts, per unseen user: 94 pairs, of which the shots are drawn
test_fraction = 1.0  # of the test prompts, per user
demo_N, demo_N_unseen, demo_train_fraction, demo_pool_fraction = 60, 30, 0.1, 0.25  # of 240 train prompts
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # whose head is read where none stands beside the embeddings
# ---------------------------------------------------------------------------------------------------------------------


def population(demo):
    """What `create_dataset_personalllm` needs: users, their concentration, fractions of prompts."""
    if demo:
        return demo_N, demo_N_unseen, concentration, (demo_train_fraction, demo_pool_fraction, test_fraction)
    return N, N_unseen, concentration, (train_fraction, pool_fraction, test_fraction)


def main():
    args = personalllm_parser(__doc__, HERE).parse_args()
    check_ranks(K_list, alpha_list)
    tables, V_final, about = load_personalllm(args.dir, MODEL_NAME, args.data)
    users, users_unseen, *of_population = population(about.get("demo"))
    data = create_dataset_personalllm(tables, users, users_unseen, *of_population, population_seed)
    check_writable(args.dir / "results")
    print(f"{data['dropped']:,} pairs dropped, all responses tied")
    curves = run_few_shot_vary_shots(
        trials, alpha_list, K_list, num_shots, data["train"], data["train_unseen"], data["test_unseen"], V_final, users,
        users_unseen, default_device(), seed=seed, num_iterations=num_iterations,
        checkpoint=args.dir / "results" / FEW_SHOT_CHECKPOINT_FILE)
    if process_rank() == 0:
        config = {"data": about["title"], "model": about.get("model"), "K_list": K_list, "alpha_list": alpha_list,
                  "trials": trials, "num_shots": num_shots, "seed": seed, "num_iterations": num_iterations,
                  "population_seed": population_seed, **dict(zip(("concentration", "fractions"), of_population)),
                  "pairs_dropped": data["dropped"]}
        save_few_shot_curves(args.dir / "results", curves, data, config)
    print(f"\nthe curves and a plot are in {args.dir / 'results'}")


if __name__ == "__main__":
    run_script(main)
