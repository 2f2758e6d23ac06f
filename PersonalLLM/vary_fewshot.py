"""How many choices of a new user LoRe needs: accuracy on unseen users against the number of shots.

    python vary_fewshot.py                             reads what prepare.py wrote

Learns the basis on PersonalLLM's seen users, then fits every unseen user from 5, 10, .. 50 pairs,
drawn again in each trial. Writes vary_fewshot.json, .csv and .tex (means with 95 % intervals over
users), .png and .pdf to results/ beside itself.

Then asks the unseen users one question at a time, random ones or those that tell the most. The
prior is the seen users only, or widened to people unlike all of them: vary_questions.json, .csv,
.png and .pdf.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import personalllm
from lore.files import check_writable
from lore.scripts import check_few_shots, run_script, sweep_folder, vary_shots
from personalllm import Population

# ---- Settings

K_list = [5]
alpha_list = [0]
num_iterations = 500  # of the training, half of what train_basis.py takes
seed = 0  # of the training and of the drawn shots

trials = 20  # how often each number of shots is drawn
num_shots = list(range(5, 51, 5))

# Questions to an unseen user, one by one: random pairs, or those that tell the most.
num_questions = 8
question_seeds = [0, 1, 2]  # of the trainings behind them; accuracies are averaged within a user

# The simulated users.
population = Population(
    N=1000,
    N_unseen=500,
    concentration=0.1,  # most users follow one or two of the ten scorers
    fractions=(0.005, 0.01, 1.0),  # 47 pairs per seen user, 94 per unseen user, all test prompts
    population_seed=0,
)
# Those of the demo, which has 240 train prompts.
demo_population = replace(population, N=60, N_unseen=30, fractions=(0.1, 0.25, 1.0))

# The model whose reward head is read if there is none beside the embeddings.
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"


def main() -> None:
    args = personalllm.training_parser(__doc__, HERE).parse_args()
    results = sweep_folder(args.dir / "results", args.results)
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
    check_few_shots(**config)
    study = personalllm.load_embeddings(
        args.dir, MODEL_NAME, population, demo_population, args.data
    )
    check_writable(results)
    print(f"{study.pairs_dropped:,} pairs dropped, all responses tied")
    config.update(asdict(study.population), pairs_dropped=study.pairs_dropped)
    vary_shots(results, study, config)


if __name__ == "__main__":
    run_script(main)
