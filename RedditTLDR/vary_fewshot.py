"""How many choices of a new worker LoRe needs: accuracy on unseen workers against number of shots.

    python vary_fewshot.py                             reads what prepare.py wrote

Learns the basis on the seen Reddit TL;DR workers, then fits every unseen worker from 5, 10, .. 50
pairs, drawn again in each trial. Writes vary_fewshot.json, .csv and .tex (means with 95 % intervals
over users), .png and .pdf to results/ beside itself.

Then asks the unseen workers one question at a time, random ones or those that tell the most. The
prior is the seen workers only, or widened to people unlike all of them: vary_questions.json, .csv,
.png and .pdf.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import tldr
from lore.files import check_writable
from lore.scripts import (
    check_few_shots,
    run_script,
    sweep_folder,
    training_parser,
    vary_shots,
)

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

# The data.
split_seed = 0  # of the split into seen and unseen workers
train_pairs = 150  # at most, per seen worker
unseen_pairs = 100  # at most, per unseen worker, of which the shots are drawn

# The model whose reward head is read if there is none beside the embeddings.
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"


def main() -> None:
    args = training_parser(__doc__, HERE).parse_args()
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
    config.update(split_seed=split_seed, train_pairs=train_pairs, unseen_pairs=unseen_pairs)

    study = tldr.load_embeddings(args.dir, MODEL_NAME, train_pairs, unseen_pairs, split_seed)
    check_writable(results)
    vary_shots(results, study, config)


if __name__ == "__main__":
    run_script(main)
