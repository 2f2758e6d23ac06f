"""A study: the people, their preference pairs, and what is known of both."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from utils import Pairs, pair_scores, shared_out

Features = list[torch.Tensor | Pairs]

PARTS = ("train", "test", "train_unseen", "test_unseen")


@dataclass
class Study:
    """What `load_embeddings` of every data set returns; what training, evidence and results take.

    The four parts hold the preference pairs of one user per entry: float32 `[m_i, d]` or `Pairs`,
    chosen minus rejected. `train` and `test` are those of the seen users, in the order of `seen`;
    `train_unseen` (the few shots) and `test_unseen` those of the unseen users, in that of `unseen`.

    prompts, texts, groups and conversations are dicts from a part's name to a list with one entry
    per user, which has one value for each of the user's pairs. A part that is missing there is not
    known.
    """

    title: str  # for people: the name of the data
    seen: list[str]  # user ids
    unseen: list[str]
    train: Features
    test: Features
    train_unseen: Features
    test_unseen: Features
    reward_head: torch.Tensor  # (d, 1), float32

    # Of each pair a value that is equal for equal prompts: the prompt as a text, the JSON of its
    # messages (see `lore.normal_forms.message_texts`), or a number.
    prompts: dict[str, list[list[Hashable]]] = field(default_factory=dict)
    # Of each pair the two answers: chosen, rejected.
    texts: dict[str, list[list[tuple[str, str]]]] = field(default_factory=dict)
    # The number of the conversation that each pair is from, int64 `[m_i]`, counted from 0 for each
    # user. Such pairs belong together: they are held out together, and a shot is a whole group.
    groups: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    # Of each pair a value that is equal for pairs of one conversation, of whichever user. The test
    # repeats the training if both have pairs of one conversation.
    conversations: dict[str, list[list[Hashable]]] = field(default_factory=dict)
    # What is known of a person, by user id: {column: value}, such as {"age": 31}. People of whom
    # nothing is known are missing.
    about_users: dict[str, dict[str, Any]] = field(default_factory=dict)
    # JSON values about the embeddings: the model, the data, their `identity`, how they were made.
    provenance: dict[str, Any] = field(default_factory=dict)

    _equal_pair_counts: dict[str, int] | None = field(default=None, init=False, repr=False)

    def features(self) -> dict[str, Features]:
        """The four parts by name, in the order of `PARTS`."""
        return {part: getattr(self, part) for part in PARTS}

    @property
    def everybody_is_seen(self) -> bool:
        """Whether the unseen users are the seen ones, with weights that are fitted once more."""
        return self.seen == self.unseen

    def pair_count(self, part: str) -> int:
        """How many pairs all users of a part have together."""
        return sum(map(len, getattr(self, part)))

    def count_equal_pairs(self) -> dict[str, int]:
        """Of each part, how many pairs have the same embedding on both sides.

        These are the pairs that score 0 under a random direction. Comparing the sides themselves
        would need all pairs of a table in memory. The first call has to be made by every process
        of torchrun, as each counts its own users' pairs; later ones return what was counted.
        """
        if self._equal_pair_counts is None:
            d = self.train[0].shape[1]
            direction = torch.randn(d, 1, generator=torch.Generator().manual_seed(0))

            def zero_scores_of(users: Features) -> list[int]:
                return [int((scores == 0).sum()) for scores in pair_scores(users, direction)]

            self._equal_pair_counts = {
                part: sum(shared_out(zero_scores_of, X)) for part, X in self.features().items()
            }
        return self._equal_pair_counts
