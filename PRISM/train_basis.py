"""Learn PRISM's reward basis at several ranks, anchored to the pretrained reward head, and fit unseen users few-shot.

    python train_basis.py                              reads what generate-prism-embeddings.py wrote, ours or released
    torchrun --nproc-per-node 2 train_basis.py         the seen users shared among processes

Prints the accuracies of each rank K (0: the reference model), then a table with 95 % intervals and the verdict: is the
reward personal, by how much, is any of it an artefact. Writes beside itself the basis and the weights of each rank,
checkpoints/PRISM_{V,W}_lore_K_{K}_alpha_{alpha}.pt, and results/: report.md, results.json, results.csv, a safetensors
file per rank, two pictures (PNG and PDF). On the demo's synthetic corpus the ranks, the penalty and the iterations are
the demo's.
"""

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import prism
from lore.evidence import evidence, kept_fit
from lore.files import (
    CHECKPOINT_FILE,
    TrainingCheckpoint,
    check_writable,
    replace_files_in,
    save_torch,
)
from lore.results import print_results, save_results
from lore.reward_model import load_released_reference
from lore.scripts import run_script, script_parser
from utils import check_settings, default_device, fits_per_model, process_rank, run_regularized

# ---------------------------------------------------------------------------------------------------------------------
K_list = [0, 1, 5, 10, 15, 20, 25, 50]
alpha_list = [
    1e4
]  # of the cosine anchor; a mean over columns, so the penalty on one column is alpha / K
validation_share = (
    0  # of each seen user's training conversations, held out to choose K and alpha; 0: as released
)
num_iterations = 20000
threshold = 1e-2  # columns whose largest user weight is below it are left out; 0 keeps all
seeds = [
    0
]  # of the training; with several, accuracies are averaged within a user, the seed of the lowest loss is kept
controls = True  # also trains the largest rank on tossed choices, which must end at chance: a third more time
demo_K_list, demo_num_iterations = [0, 1, 2, 3, 5], 1000
demo_alpha_list = [
    0.1
]  # at d = 64 the anchor of 1e4 would leave nothing but the stand-in's random reward head
# The released alpha pulls all columns onto the reward head, and nothing personal is left. To choose another:
# alpha_list = demo_alpha_list = [0, 1e-4, 1e-2, 1, 1e2, 1e4]; validation_share = 0.2
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # whose head is read where none stands beside the embeddings
released_reference = (
    False  # True: in place of the reward head the vector of the released scripts, to compare with
)
# ---------------------------------------------------------------------------------------------------------------------


def sweep(demo):
    """Ranks, penalties and iterations: the demo's where the embeddings are the demo's."""
    ranks, alphas, iterations = (
        (demo_K_list, demo_alpha_list, demo_num_iterations)
        if demo
        else (K_list, alpha_list, num_iterations)
    )
    return dict(
        K_list=ranks,
        alpha_list=alphas,
        num_iterations=iterations,
        seeds=seeds,
        threshold=threshold,
        validation_share=validation_share,
    )


def save_checkpoints(folder, fits):
    """Write V and W of the kept seed under the released names, in place of those of an earlier sweep."""
    with replace_files_in(folder, ["PRISM_[VW]_lore_K_*.pt"]) as new:
        for fit in map(kept_fit, fits_per_model(fits).values()):
            for name, tensor in (("V", fit.V), ("W", fit.W)):
                save_torch(
                    new / f"PRISM_{name}_lore_K_{fit.K}_alpha_{fit.alpha}.pt", tensor.cpu().clone()
                )


def main():
    args = script_parser(__doc__, HERE).parse_args()
    for demo in (True, False):
        check_settings(**sweep(demo))
    data, V_final, about = prism.load_embeddings(args.dir, MODEL_NAME)
    if released_reference:
        V_final = load_released_reference(MODEL_NAME)
    for folder in ("results", "checkpoints"):
        check_writable(args.dir / folder)
    config = sweep(about.get("demo"))
    N, N_unseen = len(data["seen"]), len(data["unseen"])
    print(
        f"{about['title']}: {N} seen and {N_unseen} unseen users, {sum(map(len, data['train'])):,} train pairs, "
        f"d = {len(V_final)}"
    )
    if about.get("demo"):
        print(
            "demo settings: K_list = {K_list}, alpha_list = {alpha_list}, {num_iterations} iterations".format(
                **config
            )
        )

    fits, tossed, start = [], [] if controls else None, time.perf_counter()
    run_regularized(
        config["K_list"],
        config["alpha_list"],
        V_final,
        data["train"],
        data["test"],
        data["train_unseen"],
        data["test_unseen"],
        N,
        N_unseen,
        default_device(),
        seed=seeds,
        num_iterations=config["num_iterations"],
        threshold=threshold,
        fits=fits,
        checkpoint=TrainingCheckpoint(args.dir / "results" / CHECKPOINT_FILE),
        validation_share=validation_share,
        prompts=[dialogs.tolist() for dialogs in data["dialogs"]],
        tossed=tossed,
    )
    seconds = time.perf_counter() - start

    for fit in fits:
        if fit.K > 0:
            print(
                f"rank {fit.K}, seed {fit.seed}: {fit.V.shape[1]} of {fit.K} columns have a user weight of "
                f"{threshold:g} or more"
            )
    if process_rank() == 0:
        config.update(controls=controls, released_reference=released_reference)
        save_checkpoints(args.dir / "checkpoints", fits)
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
    print(
        f"\n{seconds:.1f} s; read {args.dir / 'results' / 'report.md'}; pictures and each rank's basis are beside it; "
        f"V and W are in {args.dir / 'checkpoints'}"
    )


if __name__ == "__main__":
    run_script(main)
