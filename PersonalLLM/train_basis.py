"""Learn the reward basis of PersonalLLM's simulated users at several ranks, and fit unseen users few-shot.

    python train_basis.py                              reads what prepare.py wrote; needs no GPU and no 8B model
    torchrun --nproc-per-node 2 train_basis.py         the seen users shared among processes

A user is a mixture over ten reward models, and prefers the response that it scores highest to the one that it scores
lowest. A pair is two row numbers of one table of embeddings, so 1.5 million test pairs fit in a laptop.
Prints the accuracies of each rank K (0: the reference model, 1: one Bradley-Terry model for all, 2 and up: LoRe) and a
closing table, and writes results/ beside itself: results.json, K_<rank>.safetensors, accuracy_by_rank.png, and
population.safetensors, the users' mixtures. On the demo's synthetic corpus the population is the demo's.
"""

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from utils import *

# ---------------------------------------------------------------------------------------------------------------------
K_list = [0, 1, 2, 3, 4, 5]
alpha_list = [0]  # penalties on the squared distance of the basis to the reward head
num_iterations = 1000  # of the training
seeds = [0]  # of the training; with several, the accuracies are averaged, five in under three times the time
population_seed = 0  # of the users and of the prompts that each compares
N, N_unseen = 1000, 500  # simulated users
concentration = 0.1  # of the Dirichlet distribution over the ten scorers: most users follow one or two of them
train_fraction = 0.005  # of the train prompts, per seen user: 47 pairs
few_shot_fraction = 0.001  # of the train prompts, per unseen user: 9 pairs
test_fraction = 1.0  # of the test prompts, per user
demo_N, demo_N_unseen, demo_train_fraction, demo_few_shot_fraction = 60, 30, 0.1, 0.05  # of 240 train prompts
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # whose head is read where none stands beside the embeddings
released_reference = False  # True: in place of the reward head the vector of the released scripts, to compare with
# ---------------------------------------------------------------------------------------------------------------------


def population(demo):
    """What `create_dataset_personalllm` needs: users, their concentration, fractions of prompts."""
    if demo:
        return demo_N, demo_N_unseen, concentration, (demo_train_fraction, demo_few_shot_fraction, test_fraction)
    return N, N_unseen, concentration, (train_fraction, few_shot_fraction, test_fraction)


def main():
    args = personalllm_parser(__doc__, HERE).parse_args()
    check_ranks(K_list, alpha_list)
    check_seeds(seeds, "seeds")
    tables, V_final, about = load_personalllm(args.dir, MODEL_NAME, args.data)
    if released_reference:
        V_final = load_released_reference(MODEL_NAME)
    users, users_unseen, *of_population = population(about.get("demo"))
    data = create_dataset_personalllm(tables, users, users_unseen, *of_population, population_seed)
    check_writable(args.dir / "results")
    print(f"{about['title']}: {users} seen and {users_unseen} unseen simulated users, "
          f"{sum(map(len, data['train'])):,} train pairs, d = {len(V_final)}; {data['dropped']:,} pairs dropped, all "
          "responses tied")

    fits, start = [], time.perf_counter()
    run(K_list, alpha_list, V_final, data["train"], data["test"], data["train_unseen"], data["test_unseen"],
        users, users_unseen, default_device(), seed=seeds, num_iterations=num_iterations, fits=fits,
        checkpoint=args.dir / "results" / CHECKPOINT_FILE)
    seconds = time.perf_counter() - start

    print_table(fits)
    if process_rank() == 0:
        config = {"data": about["title"], "model": about.get("model"), "K_list": K_list, "alpha_list": alpha_list,
                  "num_iterations": num_iterations, "released_reference": released_reference, "seeds": seeds,
                  "population_seed": population_seed, "N": users, "N_unseen": users_unseen,
                  **dict(zip(("concentration", "fractions"), of_population)), "pairs_dropped": data["dropped"]}
        save_results(args.dir / "results", fits, data, config, seconds)
        save_tensors(args.dir / "results" / "population.safetensors", {"seen": data["population"], "unseen":
                     data["population_unseen"]}, scorers=SCORER_NAMES, users=data["seen"], unseen_users=data["unseen"],
                     population_seed=population_seed)
    print(f"\n{seconds:.1f} s; results, the basis of each rank and a plot are in {args.dir / 'results'}")


if __name__ == "__main__":
    run_script(main)
