"""How many conversations of a new PRISM user LoRe needs: accuracy on unseen users against the number of shots.

    python vary_fewshot.py                             reads what generate-prism-embeddings.py wrote

Learns the basis on the seen users, then fits every unseen user from the pairs of 1, 2, 3 of the user's conversations,
drawn anew in each trial. Writes vary_fewshot.json, .csv and .tex (means with 95 % intervals over users), .png and .pdf
to results/ beside itself. Then asks them one question (a pair) at a time, random ones or those that tell the most, with
the seen users as the prior: vary_questions.json, .csv, .png and .pdf.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import prism
from lore.files import FEW_SHOT_CHECKPOINT_FILE, TrainingCheckpoint, check_writable
from lore.results import save_few_shot_curves, vary_questions
from lore.scripts import run_script, script_parser
from utils import UNSEEN_TEST, check_settings, default_device, process_rank, run_few_shot_vary_shots

# ---------------------------------------------------------------------------------------------------------------------
K_list = [5]
alpha_list = [0]
num_iterations = 500  # of the training, of `LoRe` as for the other data sets, without the anchor
trials = 20
num_shots = [1, 2, 3]  # conversations; most users have six, of which half are for training
seed = 0  # of the training and of the drawn shots
num_questions = 8  # asked of an unseen user one by one: random pairs, or those that tell the most
question_seeds = [
    0,
    1,
    2,
]  # of the trainings behind the questions; accuracies are averaged within a user
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
    )
    check_settings(**config)
    data, V_final, about = prism.load_embeddings(args.dir, MODEL_NAME)
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
        groups=data["dialogs_unseen"],
        checkpoint=TrainingCheckpoint(args.dir / "results" / FEW_SHOT_CHECKPOINT_FILE),
        of_users=of_users,
    )
    if process_rank() == 0:
        table = save_few_shot_curves(
            args.dir / "results", curves, of_users, data, about, config, data["dialogs_unseen"]
        )
        print(f"\n{UNSEEN_TEST}, 95 % intervals over users:\n{table.to_string()}")
    vary_questions(args.dir / "results", data, V_final, about, config, default_device())
    print(f"\nthe curves, tables and a picture are in {args.dir / 'results'}")


if __name__ == "__main__":
    run_script(main)
