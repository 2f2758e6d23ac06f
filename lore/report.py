"""report.md: the verdict, and what it rests on."""

from lore.tables import shown_rows, text_table
from utils import UNSEEN_TEST


def report(results):
    """`report.md` of what `results.json` holds: the verdict, then the tables that it rests on."""
    counts, chosen, (first, *more) = (
        results["counts"],
        results["chosen"],
        results["verdict"]["text"].splitlines(),
    )
    trained, fits = (
        [entry for entry in results[name] if entry["K"]] for name in ("evidence", "fits")
    )

    def markdown(entries, values):
        table = text_table(entries, values)
        return "\n".join(
            f"| {' | '.join(row)} |" for row in (table, ["---"] * table.shape[1], *table.to_numpy())
        )

    return (
        "\n\n".join(
            [
                f"# {results['config']['data']}: is the reward personal?",
                f"**{first}**",
                *more,
                "---",
                f"The verdict is about {'all ranks K >= 2 at once' if chosen['by'] == 'none' else 'the model'}, "
                f"{'as none was' if chosen['by'] == 'none' else 'that was'} chosen by held-out pairs. The basis was learnt from "
                f"{counts['train pairs']:,} pairs of {counts['seen users']} seen users; the weights of {counts['unseen users']} "
                f"unseen users from {counts['train unseen pairs']:,} of their pairs, tested on {counts['test unseen pairs']:,} "
                f"other pairs of theirs. {counts.get('pairs with equal sides', 0):,} pairs in all have two equal sides, and count as "
                "wrong under every reward. K is the rank: ref (K = 0) the pretrained reward head, the reference; K = 1 one direction "
                "for everybody; from K = 2 on a basis that users mix. alpha penalises the distance to the head. Figures: shares "
                "of pairs predicted right, means over users and seeds, with 95 % intervals over users, for each row alone; p: "
                "Wilcoxon signed-rank test.",
                "## Accuracy",
                markdown(shown_rows(results), lambda entry: entry["accuracy"]),
                "![accuracy by rank](accuracy_by_rank.png)",
                f"## Controls, on {UNSEEN_TEST}",
                "Accuracies with other weights: the mean of all unseen users' weights; each "
                "other user's weights, averaged over these users. Tossed: the largest rank, trained and tested on pairs that a "
                "coin has turned round. Longer: always taking the longer answer. Personal part: the accuracy with own weights "
                "minus that with mean weights; minus reference and minus pooled: minus that of K = 0 and of K = 1.",
                markdown(
                    trained,
                    lambda entry: (
                        entry["controls"]
                        | {"personal_part": entry["personal_part"]}
                        | {
                            name: entry[name][UNSEEN_TEST]
                            for name in ("minus_reference", "minus_pooled")
                        }
                    ),
                ),
                "![personal part](personal_part.png)"
                * any(entry["personal_part"] for entry in trained),
                "## Basis and seeds",
                "Of each rank the kept seed, whose basis this is, has the "
                + (
                    "lowest training loss."
                    if chosen["by"] == "none"
                    else "best accuracy on held-out pairs."
                )
                + " Cosines are absolute; entropies, in nats, means over seen users; angles, in degrees, between two seeds' spans.",
                markdown(trained, lambda entry: entry["basis"]),
                markdown(
                    fits,
                    lambda fit: {
                        **{k: fit[k] for k in ("seed", "kept", "training_loss")},
                        UNSEEN_TEST: fit["mean_accuracy"][UNSEEN_TEST],
                    },
                ),
                "## Leaks",
                "Test pairs whose prompt stands among the training pairs of that group of users: "
                + "; ".join(
                    f"{name} {'not known' if share is None else f'{share:.1%}'}"
                    for name, share in results["leaks"].items()
                )
                + ".",
            ]
        )
        + "\n"
    )
