"""How many choices of a new worker LoRe needs: accuracy on unseen Reddit TL;DR workers against the number of shots.

    python vary_fewshot.py                             reads what prepare.py wrote

Learns the basis on the seen workers, then fits every unseen worker from 5, 10, .. 50 pairs, drawn anew in each trial.
Writes vary_fewshot.json, .csv and .tex (means with
95 % intervals over users), .png and .pdf to results/ beside itself. Then asks them one question at a time, random ones
or those that tell the most, with the seen users as the prior: vary_questions.json, .csv, .png and .pdf.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import tldr
from lore.files import FEW_SHOT_CHECKPOINT_FILE, TrainingCheckpoint, check_writable
from lore.results import save_few_shot_curves, vary_questions
from lore.scripts import run_script, script_parser
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
split_seed = 0  # of the split into seen and unseen workers
train_pairs = 150  # at most, per seen worker
unseen_pairs = 100  # at most, per unseen worker, of which the shots are drawn
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # whose head is read where none stands beside the embeddings
# ---------------------------------------------------------------------------------------------------------------------


def main():
    args = script_parser(__doc__, HERE).parse_args()
    config = dict(
        K_list=K_list,
        alpha_list=alpha_list,
        num_iterations=num_iterations,
        trials=trials,
        num_shots=num_shots,
        num_questions=num_questions,
        question_seeds=question_seeds,
        seed=seed,
        split_seed=split_seed,
        train_pairs=train_pairs,
        unseen_pairs=unseen_pairs,
    )
    check_settings(**config)
    train, validation, V_final, about = tldr.load_embeddings(args.dir, MODEL_NAME)
    data = tldr.create_dataset(
        train, validation, train_pairs, unseen_pairs, split_seed, about["leave_out"]
    )
    del train, validation
    check_writable(args.dir / "results")
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
        table = save_few_shot_curves(args.dir / "results", curves, of_users, data, about, config)
        print(f"\n{UNSEEN_TEST}, 95 % intervals over users:\n{table.to_string()}")
    vary_questions(args.dir / "results", data, V_final, about, config, default_device())
    print(f"\nthe curves, tables and a picture are in {args.dir / 'results'}")


if __name__ == "__main__":
    run_script(main)
