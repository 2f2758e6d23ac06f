"""Learn PRISM's reward basis at several ranks, anchored to the reward head, and fit unseen users.

    python train_basis.py                              reads what generate-prism-embeddings.py wrote
    torchrun --nproc-per-node 2 train_basis.py         the users shared among processes

It reads embeddings of the released script, too, also in data/prism/, where that one writes them.

Prints the accuracies of each rank K (0: the reference model), then a table with 95 % intervals and
the verdict: is the reward personal, by how much, is any of it an artefact. Writes beside itself the
basis and the weights of each rank, checkpoints/PRISM_{V,W}_lore_K_{K}_alpha_{alpha}.pt, and
results/: report.html, results.json, results.csv, results_long.csv, a safetensors file per rank,
pictures (PNG and PDF). With --results NAME these go to results/NAME and checkpoints/NAME, beside
other sweeps.

On the demo's synthetic corpus the ranks, the penalty and the iterations are the demo's.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import prism
from lore.evidence import hold_out, kept_fit
from lore.files import (
    CHECKPOINT_FILE,
    TrainingCheckpoint,
    check_writable,
    replace_files_in,
    save_torch,
)
from lore.reward_model import load_released_reference
from lore.scripts import (
    check_training,
    finish_training,
    run_script,
    sweep_folder,
    training_parser,
)
from lore.tables import model_in_file_name
from utils import Fit, default_device, fits_per_model, run_regularized

# ---- Settings

# The sweep. All ranks, alphas and seeds are trained side by side; accuracies are averaged over the
# seeds within a user, and the seed of the lowest loss is kept.
K_list = [0, 1, 5, 10, 15, 20, 25, 50]
alpha_list = [1e4]  # of the cosine anchor, a mean over columns: on one column it is alpha / K
num_iterations = 20000
threshold = 1e-2  # columns whose largest user weight is smaller are left out; 0 keeps all
seeds = [0]

# The share of each seen user's training conversations that is held out, to choose K and alpha; 0:
# as released. The released alpha pulls all columns onto the reward head, and nothing personal is
# left. To choose another: alpha_list = [0, 1e-4, 1e-2, 1, 1e2, 1e4] and validation_share = 0.2
validation_share = 0
# Also train the largest rank on randomly flipped choices. Nothing can predict these, unless the
# test repeats pairs of the training. It takes a third more time.
controls = True

# The demo's sweep. At d = 64 an alpha of 1e4 would leave nothing but the stand-in's random head.
demo_K_list = [0, 1, 2, 3, 5]
demo_alpha_list = [0.1]
demo_num_iterations = 1000

# The model whose reward head is read if there is none beside the embeddings.
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
# True: in place of the reward head take the vector of the released scripts, to compare with.
released_reference = False


def settings(is_demo: bool) -> dict[str, Any]:
    """The settings above, as they go into the results; for the demo with its own sweep.

    Raises InputError that names the setting.
    """
    config = dict(
        K_list=K_list,
        alpha_list=alpha_list,
        num_iterations=num_iterations,
        seeds=seeds,
        threshold=threshold,
        validation_share=validation_share,
    )
    if is_demo:
        config.update(
            K_list=demo_K_list, alpha_list=demo_alpha_list, num_iterations=demo_num_iterations
        )
    check_training(**config)
    config.update(controls=controls, released_reference=released_reference)
    return config


def print_columns(fits: list[Fit]) -> None:
    """Print how many columns of each basis are left."""
    for fit in fits:
        if fit.K > 0:
            print(
                f"rank {fit.K}, seed {fit.seed}: {fit.V.shape[1]} of {fit.K} columns have a user "
                f"weight of {threshold:g} or more"
            )


def save_checkpoints(folder: Path, fits: list[Fit]) -> None:
    """Write V and W of each model's kept seed under the released names, and remove older ones.

    The reference does not depend on alpha, so it is there with the first alpha only.
    """
    with replace_files_in(folder, ["PRISM_[VW]_lore_K_*.pt"]) as new_folder:
        for (K, alpha), model_fits in fits_per_model(fits).items():
            if K == 0 and alpha != fits[0].alpha:
                continue
            fit = kept_fit(model_fits)
            model = model_in_file_name(K, alpha)
            save_torch(new_folder / f"PRISM_V_lore_{model}.pt", fit.V.cpu().clone())
            save_torch(new_folder / f"PRISM_W_lore_{model}.pt", fit.W.cpu().clone())


def main() -> None:
    args = training_parser(__doc__, HERE).parse_args()
    results = sweep_folder(args.dir / "results", args.results)
    checkpoints = sweep_folder(args.dir / "checkpoints", args.results)
    configs = {is_demo: settings(is_demo) for is_demo in (True, False)}

    study = prism.load_embeddings(args.dir, MODEL_NAME)
    if released_reference:
        study.reward_head = load_released_reference(MODEL_NAME)
    check_writable(results)
    check_writable(checkpoints)
    print(
        f"{study.title}: {len(study.seen)} seen and {len(study.unseen)} unseen users, "
        f"{study.pair_count('train'):,} train pairs, d = {len(study.reward_head)}"
    )
    is_demo = bool(study.provenance.get("demo"))
    config = configs[is_demo]
    if is_demo:
        print(
            f"demo settings: K_list = {demo_K_list}, alpha_list = {demo_alpha_list}, "
            f"{demo_num_iterations} iterations"
        )

    study_to_train, held_out = hold_out(study, validation_share)
    checkpoint = TrainingCheckpoint(results / CHECKPOINT_FILE)
    started = time.perf_counter()
    accuracies = run_regularized(
        config["K_list"],
        config["alpha_list"],
        study.reward_head,
        study_to_train.train,
        study.test,
        study.train_unseen,
        study.test_unseen,
        len(study.seen),
        len(study.unseen),
        default_device(),
        seed=seeds,
        num_iterations=config["num_iterations"],
        checkpoint=checkpoint,
        threshold=threshold,
    )
    print_columns(accuracies.fits)

    finish_training(
        results,
        accuracies.fits,
        study,
        study_to_train,
        held_out,
        config,
        checkpoint,
        started,
        regularized=True,
        save_more=functools.partial(save_checkpoints, checkpoints),
        closing=f"; V and W are in {checkpoints}",
    )


if __name__ == "__main__":
    run_script(main)
